"""Masked language modelling (BERT, arXiv 1810.04805) for two-sided mixers: predict the tokens of a text that were hidden.

Of each row 15 % of the tokens (rounded, at least one) are to be predicted. Of these, each by itself, 80 % are replaced by
the mask, 10 % by a token drawn evenly from the vocabulary, and 10 % are left as they are. What is hidden is drawn anew in
every epoch of training, and for ever the same in valid and test. Rows are whole windows of the text, which may hold the
borders of documents; the end of a split that fills no row is left out. The mask is the last id of the inputs and no target.
"""

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder, cache_folder
from data import corpora, flat, mixture, tokenized, tokenizers
from data.rows import one_segment
from data.task import Outline, Spec, Task

HIDDEN, MASKED, RANDOM = 0.15, 0.8, 0.1


def _spec(size: int, unit: str, length: int) -> Spec:
    return Spec(
        vocab_size=size + 1,
        channels=None,
        targets=size,
        objective="token_labels",
        length=length,
        unit=unit,
        causal=False,
        metrics=(f"bits_per_{unit}", "perplexity", "accuracy", "row_accuracy"),
    )


class MaskedLanguageModel(Task):
    """Prediction of hidden tokens.

    The paper-size configuration is that of FLASH (arXiv 2202.10447): C4 in subwords, in rows of 512 (there up to 8192).

    Args:
      corpus, cache_dir, data_dir, tokenizer, download: as in `data/tasks/language_model.py`.
      length: tokens of a row.

    Raises:
      UserError: for an unknown corpus or tokenizer, and for a corpus too short for `length`.
      UserError: where the files of a corpus or a tokenizer are not in their folder.
      data.corpora.FetchError: where the corpus must be downloaded and cannot be.
    """

    floors_of_rows = True
    paper_size: ClassVar[dict] = {"corpus": "tfds:c4/en", "length": 512, "tokenizer": "bpe:32000"}

    def __init__(
        self,
        corpus: str = "shakespeare",
        length: int = 256,
        tokenizer: str = "byte",
        cache_dir: Folder | None = None,
        data_dir: Folder | None = None,
        download: bool = False,
    ):
        self.corpus = corpora.load(corpus, cache_dir, data_dir, download, ids=True)
        self.tokens = tokenized.load(tokenizer, self.corpus, cache_folder(cache_dir))
        self.tokenizer = self.tokens.tokenizer
        size, unit = self.tokenizer.vocab_size, self.tokenizer.unit
        self.spec = _spec(size, unit, length)
        self.mask = size
        self.name = f"masked_lm/{self.corpus.name}" + (f"/{self.tokens.name}" if tokenizer != "byte" else "")
        self.resolved = {"corpus": self.corpus.name, "tokenizer": self.tokens.name}
        for split, stream in self.tokens.splits.items():
            need = 2 * length if split == "train" else length
            if len(stream.data) < need:
                raise UserError(
                    f"the {split} split of {self.corpus.name!r} has {len(stream.data)} {unit}s and length={length} needs "
                    f"{need}: give a longer text or a smaller length"
                )

    @classmethod
    def build(cls, **hyperparameters) -> Task:
        return mixture.build(cls, **hyperparameters)

    @classmethod
    def outline(cls, corpus: str, length: int, tokenizer: str, **_) -> Outline:
        return Outline(f"masked_lm/{corpus}/{tokenizer}", _spec(*tokenizers.outline(tokenizer), length))

    def num_examples(self, split: str) -> int:
        # A training row fits behind any offset below `length`.
        return len(self.tokens.splits[split].data) // self.spec.length - (split == "train")

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        length = self.spec.length
        start = index * length
        if split == "train":
            start += int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]) % length
        text = np.asarray(self.tokens.splits[split].data[start : start + length], np.int32)
        rng = np.random.default_rng([seed, self.splits.index(split), epoch, index])
        hidden = rng.permutation(length)[: max(1, round(HIDDEN * length))]
        fate, drawn = rng.random(len(hidden)), rng.integers(self.mask, size=len(hidden))
        inputs, targets, weights = text.copy(), np.zeros(length, np.int32), np.zeros(length, np.float32)
        inputs[hidden] = np.where(fate < MASKED, self.mask, np.where(fate < MASKED + RANDOM, drawn, text[hidden]))
        targets[hidden], weights[hidden] = text[hidden], 1
        return {"inputs": inputs, "targets": targets, "weights": weights} | one_segment(length)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Bits per hidden token of the uniform guess, of the tokens' frequencies on train, and of those and the visible input.

        Frequencies are counts plus one. The last predictor knows that a hidden token without a mask is often what it looks like:
        p(token | input) is proportional to frequency(token) * (0.1 [token = input] + 0.1 / vocabulary).
        """
        check_choice("split", split, ("valid", "test"))
        counts = np.ones(self.mask)
        for block in flat.blocks(self.tokens.splits["train"].data):
            counts += np.bincount(block, minlength=self.mask)
        frequency = counts / counts.sum()
        unigram, seen, scored, drawn = 0.0, 0.0, 0, RANDOM / self.mask
        for index in range(self.num_examples(split)):
            row = self.example(split, index)
            hidden = row["weights"] > 0
            inputs, targets = row["inputs"][hidden], row["targets"][hidden]
            p = frequency[targets]
            # The prior of the input itself, where it shows one.
            shown = frequency[np.minimum(inputs, self.mask - 1)]
            left = 1 - MASKED - RANDOM
            posterior = p * (left * (targets == inputs) + drawn) / (left * shown + drawn)
            unigram -= np.log2(p).sum()
            seen -= np.log2(np.where(inputs == self.mask, p, posterior)).sum()
            scored += len(targets)
        return {
            "uniform": math.log2(self.mask),
            "unigram": float(unigram / scored),
            "unigram and input": float(seen / scored),
        }

    def content(self) -> str:
        return self.tokens.fingerprint

    def encode(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; a mask is shown as a low line."""
        ids = np.asarray(ids, np.int64)
        parts = np.split(ids, np.flatnonzero(ids == self.mask))
        # Each part but the first begins with its mask.
        parts = [parts[0], *(part[1:] for part in parts[1:])]
        return "_".join(self.tokenizer.decode(part) for part in parts)

"""Language modelling: predict the next byte, character or subword of a text; the metric is bits for each of them.

A split is one stream of tokens, cut into rows of `length` inputs; the targets are the inputs shifted by one, so the
first token of the stream is read and never scored. Training rows start at a multiple of `length` plus an offset that
each epoch draws anew, so that a token meets every amount of context. Evaluation rows do not overlap, start at 0 and
cover the split, the last one padded: every token after the first is scored exactly once, in the context of its row.

packing="windows" reads the stream as one document. packing="documents" keeps the documents of the corpus apart: segment
ids and positions restart with each of them, and no token is predicted from another document's (weight 0 at the last token
of each, so that the first token of a document is not scored either).

Bits per token compare only models with the same tokenizer. Bits per byte and the perplexity per word compare all, and are
what is published for WikiText-103, PG-19 and LM1B (per word) and enwik8 and text8 (bits per character); `sizes` has what
they are reckoned with.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder, cache_folder
from data import corpora, flat, metrics, mixture, ngram, tokenized, tokenizers
from data.task import Outline, Spec, Task

PACKINGS = ("windows", "documents")
# After so many documents their ids begin again: those of neighbours differ, whatever the size of the text.
SEGMENTS = 2**30


def _spec(size: int, unit: str, length: int, packing: str, positions: str = "") -> Spec:
    spec = Spec(size, None, size, "causal_lm", length, packed=packing == "documents", unit=unit)
    if not positions:
        return spec
    parts = positions.split("+")
    if packing != "windows" or not all(part.isdecimal() and 1 <= int(part) <= length for part in parts):
        raise UserError(
            f"positions={positions!r} takes positions 1 to length={length} of a row, joined by '+', such as 50+500, with "
            "packing='windows'"
        )
    return dataclasses.replace(
        spec, metrics=(*spec.metrics, *metrics.at_positions(tuple(dict.fromkeys(map(int, parts)))))
    )


class LanguageModel(Task):
    """Next-token prediction.

    The paper-size configuration is WikiText-103 in rows of 512, as TransNormer (arXiv 2210.10340) has it; of subwords here, where
    the paper has words.

    Args:
      corpus: "shakespeare", "stdlib", "auto", "enwik8", "text8", "wikitext103" or "tfds:NAME[/CONFIG]", files of your own
        ("file:PATH", "jsonl:PATH", ...), see `data/corpora.py`; or "mix:CORPUS*WEIGHT+CORPUS*WEIGHT", see `data/mixture.py`.
      length: inputs of a row.
      packing: "windows" or "documents".
      cache_dir: for fetched text and floors; None for the environment's MIXOLOGY_CACHE, else ~/.cache/mixology.
      data_dir: of TFDS data sets, enwik8, text8 and wikitext103; None for the default of `corpora.load`.
      tokenizer: "byte", "character", "bpe:SIZE", "file:PATH" or, of token ids, "ids:SIZE"; see `data/tokenizers.py`.
      download: whether a data set of TFDS or Hugging Face that is not here may be downloaded, which can be gigabytes.
      positions: of a row, joined by "+", whose bits are reported each by itself; see `data.metrics.at_positions`. With 50+500 the
        in-context learning score.

    Raises:
      UserError: for an unknown corpus, packing or tokenizer, and for a corpus too short for `length`; for a train split that is,
        where rows of it are asked for, so that others can be scored at any length.
      UserError: where the files of a corpus or a tokenizer are not in their folder.
      data.corpora.FetchError: where the corpus must be downloaded and cannot be.
    """

    contiguous = True
    paper_size: ClassVar[dict] = {"corpus": "wikitext103", "length": 512, "tokenizer": "bpe:32768"}

    def __init__(
        self,
        corpus: str = "shakespeare",
        length: int = 256,
        packing: str = "windows",
        cache_dir: Folder | None = None,
        data_dir: Folder | None = None,
        tokenizer: str = "byte",
        download: bool = False,
        positions: str = "",
    ):
        check_choice("packing", packing, PACKINGS)
        self.corpus = corpora.load(corpus, cache_dir, data_dir, download, ids=True)
        self._cache = cache_folder(cache_dir)
        self.tokens = tokenized.load(tokenizer, self.corpus, self._cache)
        self.tokenizer = self.tokens.tokenizer
        unit = self.tokenizer.unit
        self.spec = _spec(self.tokenizer.vocab_size, unit, length, packing, positions)
        self.name = f"language_model/{self.corpus.name}" + (f"/{self.tokens.name}" if tokenizer != "byte" else "")
        self.resolved = {"corpus": self.corpus.name, "tokenizer": self.tokens.name}
        self._documents = packing == "documents"
        for split in self.splits:
            if split != "train":
                self.num_examples(split)
            if not self._scored(split):
                raise UserError(
                    f"the {split} split of {self.corpus.name!r} has documents of one {unit} each, which nothing tells: there is "
                    "nothing to score; give another corpus (or the right eot, of token ids), or set packing='windows'"
                )

    @classmethod
    def build(cls, **hyperparameters) -> Task:
        return mixture.build(cls, **hyperparameters)

    @classmethod
    def outline(cls, corpus: str, length: int, packing: str, tokenizer: str, positions: str = "", **_) -> Outline:
        check_choice("packing", packing, PACKINGS)
        spec = _spec(*tokenizers.outline(tokenizer), length, packing, positions)
        return Outline(f"language_model/{corpus}/{tokenizer}", spec)

    def num_examples(self, split: str) -> int:
        size, length = len(self.tokens.splits[split].data), self.spec.length
        # A training row and its last target fit behind any offset below `length`.
        if size < (need := 2 * length if split == "train" else 2):
            raise UserError(
                f"the {split} split of {self.corpus.name!r} has {size} {self.spec.unit}s and length={length} needs {need}: give "
                "a longer text or a smaller length"
            )
        return size // length - 1 if split == "train" else -(-(size - 1) // length)

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        length = self.spec.length
        start = index * length
        if split == "train":
            start += int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]) % length
        result = self.stretch(split, start, length)
        if self._documents:  # counted from 1 in each row
            ids = result["segment_ids"]
            result["segment_ids"] = np.where(ids > 0, (ids - ids[0]) % SEGMENTS + 1, 0).astype(np.int32)
        return result

    def num_tokens(self, split: str) -> int:
        return len(self.tokens.splits[split].data) - 1

    def stretch(self, split: str, start: int, length: int) -> dict[str, np.ndarray]:
        stream = self.tokens.splits[split]
        text = np.asarray(stream.data[start : start + length + 1], np.int32)
        size = len(text) - 1
        result = {key: np.zeros(length, np.int32) for key in ("inputs", "targets", "segment_ids", "positions")}
        result["inputs"][:size] = text[:-1]
        document = np.zeros(size + 1, np.int64)
        if self._documents:
            document[:] = np.searchsorted(stream.ends, np.arange(start, start + size + 1), "right")
        scored = document[1:] == document[:-1]
        result["targets"][:size] = np.where(scored, text[1:], 0)
        result["segment_ids"][:size] = document[:-1] % SEGMENTS + 1
        result["positions"][:size] = np.arange(size) - np.searchsorted(document, document[:-1])
        result["weights"] = np.zeros(length, np.float32)
        result["weights"][:size] = scored
        return result

    def _scored(self, split: str) -> int:
        """Tokens that are scored: all but the first of the text, or of each document."""
        stream = self.tokens.splits[split]
        return len(stream.data) - (len(stream.ends) if self._documents else 1)

    def text_sizes(self, split: str) -> dict[str, int]:
        """What is scored when a whole split is: its "tokens" (the sum of the weights), the "bytes" of their text, and "words".

        With the nats of the split, nats / (ln 2 bytes) is bits per byte, and exp(nats / words) the perplexity per word by the
        corpus' own number of words. There are none where packing="documents", which scores no first word whole; and of token ids
        only the "tokens".
        """
        if self.corpus.largest_id is not None:
            return {"tokens": self._scored(split)}
        first = self.tokens.first_bytes[split][: None if self._documents else 1]
        result = {
            "tokens": self._scored(split),
            "bytes": self.tokens.num_bytes[split] - int(first.sum()),
        }
        return result if self._documents else {**result, "words": self.corpus.words(split)}

    def floors(self, split: str = "test") -> dict[str, float]:
        """Bits per token of the uniform guess, the 5-gram and the n-gram of the order that is best on valid.

        The n-grams are of bytes, fitted on train and score the bytes that a model is scored on, each with all the context that
        they can use: they see across the borders of the rows. Of token ids, instead, their frequencies on (the beginning of)
        train, counts plus one.
        """
        check_choice("split", split, ("valid", "test"))
        if self.corpus.largest_id is not None:
            return {"uniform": math.log2(self.spec.vocab_size), "unigram": self._unigram(split)}
        table = ngram.bits_per_byte(self.corpus, self._documents, self._cache)
        best = ngram.best_order(table)
        sizes = self.text_sizes(split)
        bytes_per_token = sizes["bytes"] / sizes["tokens"]
        return {
            "uniform": math.log2(self.spec.vocab_size),
            "5-gram": table[split][4] * bytes_per_token,
            f"n-gram (order {best})": table[split][best - 1] * bytes_per_token,
        }

    def _unigram(self, split: str) -> float:
        """Bits per scored token by the frequencies of tokens."""
        size, stream = self.spec.vocab_size, self.tokens.splits[split]
        counts = np.ones(size)
        for block in flat.blocks(self.tokens.splits["train"].data[: ngram.FIT_BYTES]):
            counts += np.bincount(block, minlength=size)
        scored = np.zeros(size)
        for block in flat.blocks(stream.data):
            scored += np.bincount(block, minlength=size)
        first = [0, *stream.ends[:-1].tolist()] if self._documents else [0]
        for start in first:
            scored[stream.data[start]] -= 1
        return float(-scored @ np.log2(counts / counts.sum()) / scored.sum())

    def content(self) -> str:
        return self.tokens.fingerprint

    def encode(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

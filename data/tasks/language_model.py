"""Byte-level language modelling: predict the next byte of a text; the metric is bits per byte.

A split is one stream of bytes, cut into rows of `length` inputs; the targets are the inputs shifted by one, so the
first byte of the stream is read and never scored. Training rows start at a multiple of `length` plus an offset that
each epoch draws anew, so that a byte meets every amount of context. Evaluation rows do not overlap, start at 0 and
cover the split, the last one padded: every byte after the first is scored exactly once, in the context of its row.

packing="windows" reads the stream as one document. packing="documents" keeps the documents of the corpus apart: segment
ids and positions restart with each of them, and no byte is predicted from another document's (weight 0 at the last byte
of each, so that the first byte of a document is not scored either).
"""

from collections.abc import Iterable

import numpy as np

from data import corpora, ngram
from data.task import Spec, Task, check_choice

VOCAB_SIZE = 256


class LanguageModel(Task):
    """Next-byte prediction.

    Args:
      corpus: "shakespeare", "stdlib", "auto", "file:PATH" or "tfds:NAME[/CONFIG]"; see `data/corpora.py`.
      length: inputs of a row.
      packing: "windows" or "documents".
      seed: of the training rows' order and offsets.
      cache_dir: for fetched text and floors; None for the environment's MIXOLOGY_CACHE, else ~/.cache/mixology.
      data_dir: of TFDS data sets; None for TFDS' default.

    Raises:
      ValueError: for an unknown corpus or packing, and for a corpus too short for `length`.
      data.corpora.FetchError: where the corpus must be downloaded and cannot be.
    """

    def __init__(
        self,
        corpus: str = "shakespeare",
        length: int = 256,
        packing: str = "windows",
        seed: int = 0,
        cache_dir: str | None = None,
        data_dir: str | None = None,
    ):
        check_choice("packing", packing, ("windows", "documents"))
        self.spec = Spec(
            vocab_size=VOCAB_SIZE,
            channels=None,
            targets=VOCAB_SIZE,
            objective="causal_lm",
            length=length,
            segmented=packing == "documents",
            unit="byte",
        )
        self.corpus = corpora.load(corpus, cache_dir, data_dir)
        self.name = f"language_model/{self.corpus.name}"
        self.seed = seed
        self._documents = packing == "documents"
        self._cache = corpora.cache_folder(cache_dir)
        for split, stream in self.corpus.splits.items():
            need = 2 * length if split == "train" else 2
            if len(stream.data) < need:
                raise ValueError(
                    f"the {split} split of {self.corpus.name!r} has {len(stream.data)} bytes and length={length} needs "
                    f"{need}: give a longer text or a smaller length"
                )

    def num_examples(self, split: str) -> int:
        size, length = len(self.corpus.splits[split].data), self.spec.length
        # A training row and its last target fit behind any offset below `length`.
        return size // length - 1 if split == "train" else -(-(size - 1) // length)

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        stream, length = self.corpus.splits[split], self.spec.length
        start = index * length
        if split == "train":
            start += int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]) % length
        text = np.asarray(stream.data[start : start + length + 1], np.int32)
        size = len(text) - 1
        result = {key: np.zeros(length, np.int32) for key in ("inputs", "targets", "segment_ids", "positions")}
        result["inputs"][:size] = text[:-1]
        # Document of each byte of the row, and where in the row it starts.
        document = np.zeros(size + 1, np.int32)
        if self._documents:
            document[:] = np.searchsorted(stream.ends, np.arange(start, start + size + 1), "right")
        document -= document[0]
        scored = document[1:] == document[:-1]
        result["targets"][:size] = np.where(scored, text[1:], 0)
        result["segment_ids"][:size] = document[:-1] + 1
        result["positions"][:size] = np.arange(size) - np.searchsorted(document, document[:-1])
        result["weights"] = np.zeros(length, np.float32)
        result["weights"][:size] = scored
        return result

    def floors(self, split: str = "test") -> dict[str, float]:
        """Bits per byte of the uniform guess, the 5-gram and the n-gram of the order that is best on valid.

        The n-grams are fitted on train and score the bytes that a model is scored on, each with all the context that
        they can use: they see across the borders of the rows.
        """
        check_choice("split", split, ("valid", "test"))
        table = ngram.bits_per_byte(self.corpus, self._documents, self._cache)
        best = ngram.best_order(table)
        return {"uniform": 8.0, "5-gram": table[split][4], f"n-gram (order {best})": table[split][best - 1]}

    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")

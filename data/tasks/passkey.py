"""Passkey retrieval: a number hidden in a long text, asked for at its end (Mohtashami and Jaggi, arXiv 2305.16300; the single
needle in real text of RULER, arXiv 2404.06654).

The text is a corpus of `data/corpora.py` as bytes, cut out at a random place of the split, with the needle at `depth` (0: before
all of it, 1: behind all of it) and the question at the end. The row has the form of the language model's, so that a byte-level
language model answers without further training; scored are the five digits of the answer, and a row is right where each of
them is the most likely byte after what stands before it, which is what greedy decoding says.

    <text> The pass key is 71432. Remember it. 71432 is the pass key. <text> What is the pass key? The pass key is 71432

Evaluate it over a grid of `length` and `depth`.

filler="grass" is the form of the original (epfml/landmark-attention, run_test.py): no corpus but "The grass is green. ..."
again and again, a line of instruction before it, and keys from 1 to 49,999, of which as many digits are scored as they have.
"""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder
from data import corpora
from data.generated import GeneratedTask
from data.rows import token_row
from data.task import Outline, Spec

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is {key}"
KEYS = (10_000, 100_000)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the "
    "important information there.\n"
)
GRASS_KEYS = (1, 50_000)
FILLERS = ("corpus", "grass")
DIGITS = 5


def _spec(length: int) -> Spec:
    return Spec(256, None, 256, "causal_lm", length, metrics=("row_accuracy", "accuracy"))


class Passkey(GeneratedTask):
    """A five-digit number, to be found in a text.

    Args:
      corpus: a name of `data/corpora.py`.
      length: inputs of a row.
      depth: where the number is, 0 to 1; None for everywhere, evenly.
      filler: "corpus" or "grass", which reads no corpus.
      cache_dir: for fetched text; None for the environment's MIXOLOGY_CACHE, else ~/.cache/mixology.
      data_dir: folder of corpora that are read from one; see `data/corpora.py`.
      download: whether a TFDS data set that is not prepared may be downloaded, which can be gigabytes.

    Raises:
      UserError: for an unknown corpus, one too short for `length`, a length too short for needle and question, and a depth
        outside 0 to 1.
      data.corpora.FetchError: where the corpus must be downloaded and cannot be.
    """

    sizes: dict[str, int] = {"train": 100_000, "valid": 200, "test": 200}
    paper_size: ClassVar[dict] = {"length": 32_768}

    def __init__(
        self,
        corpus: str = "shakespeare",
        length: int = 256,
        depth: float | None = None,
        cache_dir: Folder | None = None,
        data_dir: Folder | None = None,
        download: bool = False,
        filler: str = "corpus",
    ):
        check_choice("filler", filler, FILLERS)
        if depth is not None and not 0 <= depth <= 1:
            raise UserError(f"depth={depth} must be 0 (the beginning) to 1 (the end), or None for everywhere")
        self._grass = filler == "grass"
        frame = len((NEEDLE + QUESTION).format(key=KEYS[0])) + self._grass * len(INSTRUCTION)
        if length < frame:
            raise UserError(f"length={length} must be at least {frame}, for needle and question")
        self.spec = _spec(length)
        self._depth = depth
        if self._grass:
            self.corpus, self.name = None, "passkey/grass"
            return
        self.corpus = corpora.load(corpus, cache_dir, data_dir, download)
        self.name = f"passkey/{self.corpus.name}"
        self.resolved = {"corpus": self.corpus.name}
        # A row's inputs and its last target.
        self._text = length + 1 - frame
        for split, stream in self.corpus.splits.items():
            if len(stream.data) < self._text:
                raise UserError(
                    f"the {split} split of {self.corpus.name!r} has {len(stream.data)} bytes and length={length} needs "
                    f"{self._text}: give a longer text or a smaller length"
                )

    @classmethod
    def outline(cls, corpus: str, length: int, filler: str = "corpus", **_) -> Outline:
        return Outline(f"passkey/{corpus if filler == 'corpus' else filler}", _spec(length))

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if self._grass:
            return self._in_grass(rng)
        stream, length = self.corpus.splits[split].data, self.spec.length
        start = rng.integers(len(stream) - self._text + 1)
        key = rng.integers(*KEYS)
        depth = rng.random() if self._depth is None else self._depth
        middle = start + round(depth * self._text)
        parts = (
            stream[start:middle],
            NEEDLE.format(key=key),
            stream[middle : start + self._text],
            QUESTION.format(key=key),
        )
        encoded = [self.encode(part) if isinstance(part, str) else np.asarray(part, np.int32) for part in parts]
        text = np.concatenate(encoded)
        return token_row(text[:-1], text[1:], np.arange(length) >= length - DIGITS)

    def _in_grass(self, rng):
        length, key = self.spec.length, str(rng.integers(*GRASS_KEYS))
        needle, question = NEEDLE.format(key=key), QUESTION.format(key=key)
        size = length + 1 - len(INSTRUCTION + needle + question)
        middle = round((rng.random() if self._depth is None else self._depth) * size)
        grass = GRASS * (size // len(GRASS) + 1)
        text = self.encode(INSTRUCTION + grass[:middle] + needle + grass[: size - middle] + question)
        return token_row(text[:-1], text[1:], np.arange(length) >= length - len(key))

    def floors(self, split: str = "test") -> dict[str, float]:
        first, last = GRASS_KEYS if self._grass else KEYS
        return {"chance": 1 / (last - first)}

    def content(self) -> str:
        return "" if self._grass else self.corpus.fingerprint

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")

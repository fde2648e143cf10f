"""Text of the Long Range Arena: the sentiment of an IMDB review read byte by byte or character by character.

lra   ids are byte + 1 (257 with padding), the first `length` bytes of a review.
s4    ids are characters: padding, unknown, <eos>, then those that occur at least 15 times in the first 4,095 characters of
      the training reviews, the most frequent first; the first `length` - 1 characters of a review and <eos>.

In both protocols valid is the test split, as neither repository holds reviews back: a checkpoint or a hyperparameter
chosen on valid has seen the test labels, and its test accuracy is optimistic. Numbers printed by the papers share this.
"""

import collections
import pathlib
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder, read_bytes
from data import images, lra
from data.rows import class_row
from data.task import Outline, Spec, Task

FOLDER = "aclImdb"
ARCHIVE = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
OTHERWISE = f"Or unpack {ARCHIVE} and give the folder that holds {FOLDER}."
# The s4 protocol counts characters after it has cut the reviews to its own length, whatever `length` is here.
COUNTED, MIN_COUNT = 4095, 15
SPECIALS = 3


def _spec(size: int, length: int) -> Spec:
    return Spec(size, None, 2, "classification", length, padded=True, unit="row")


class Text(Task):
    """Classification of reviews, negative (0) or positive (1).

    Args:
      protocol: "lra" or "s4".
      length: positions of a row.
      data_dir: a folder that holds aclImdb (the original archive), or TFDS' folder with imdb_reviews prepared as
        ArrayRecord; None for TFDS' default.

    Raises:
      UserError: where there is no data.
    """

    # The LRA paper's "up to 4K" (its released configuration reads 1,000); with protocol="s4" the length is 4096.
    paper_size: ClassVar[dict] = {"length": 4000}

    def __init__(self, protocol: str = "lra", length: int = 512, data_dir: Folder | None = None):
        check_choice("protocol", protocol, lra.PROTOCOLS)
        self.name = f"text/{protocol}"
        folder = None if data_dir is None else pathlib.Path(data_dir) / FOLDER
        if folder is not None and folder.is_dir():
            train, test = _archive(folder / "train"), _archive(folder / "test")
        else:
            train, test = _tfds("train", data_dir), _tfds("test", data_dir)
        self._data = {"train": train, "valid": test, "test": test}
        self._characters = _characters(text for text, _ in train) if protocol == "s4" else None
        self.spec = _spec(257 if self._characters is None else SPECIALS + len(self._characters), length)

    @classmethod
    def outline(cls, protocol: str, length: int, **_) -> Outline:
        check_choice("protocol", protocol, lra.PROTOCOLS)
        if protocol == "s4":
            raise UserError(
                "task 'text' with protocol='s4': how many characters there are only the text says, and no data is read to "
                "compile; take protocol='lra' instead"
            )
        return Outline(f"text/{protocol}", _spec(257, length))

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._data[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        text, label = self._data[split][index]
        length = self.spec.length
        if self._characters is None:
            return class_row(lra.byte_ids(text, length), label, length)
        # A character is at most 4 bytes of UTF-8.
        ids = self.encode(text[: 4 * length].decode(errors="ignore"))[: length - 1]
        return class_row(np.append(ids, lra.EOS), label, length)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent class, and of naive Bayes on the counts of the bytes of a row.

        Both are fitted on train; the counts are of the first `length` bytes and smoothed by one.
        """
        check_choice("split", split, self.splits)
        (train, fitted), (held, labels) = self._counts("train"), self._counts(split)
        totals = np.stack([train[fitted == label].sum(0) + 1 for label in (0, 1)])
        scores = held @ np.log(totals / totals.sum(1, keepdims=True)).T + np.log(np.bincount(fitted, minlength=2) + 1)
        return {
            "majority": lra.majority(fitted, labels),
            "byte naive Bayes": float(np.mean(scores.argmax(1) == labels)),
        }

    def _counts(self, split):
        length, data = self.spec.length, self._data[split]
        counts = np.stack([np.bincount(lra.byte_ids(text, length), minlength=257) for text, _ in data])
        return counts, np.array([label for _, label in data])

    def content(self) -> str:
        parts = (
            part for split in ("train", "test") for text, label in self._data[split] for part in (text, f"\0{label}\n")
        )
        return lra.digest(*parts)

    def encode(self, text: str) -> np.ndarray:
        if self._characters is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1
        return np.array([self._characters.get(character, lra.UNKNOWN) for character in text], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids if int(i) != lra.PAD]
        if self._characters is None:
            return bytes(i - 1 for i in ids).decode(errors="replace")
        known = {i: character for character, i in self._characters.items()}
        return "".join(known.get(i, "" if i == lra.EOS else "\ufffd") for i in ids)


def _characters(texts: Iterable[bytes]) -> dict[str, int]:
    """The ids of the characters; equally frequent ones are ordered by code point."""
    counts = collections.Counter()
    for text in texts:
        counts.update(text.decode(errors="replace")[:COUNTED])
    kept = sorted((-count, character) for character, count in counts.items() if count >= MIN_COUNT)
    return {character: SPECIALS + i for i, (_, character) in enumerate(kept)}


def _archive(folder: pathlib.Path) -> list[tuple[bytes, int]]:
    """The reviews neg/*.txt and pos/*.txt, in order of their names."""
    rows = []
    for label, kind in enumerate(("neg", "pos")):
        paths = sorted((folder / kind).glob("*.txt"))
        if not paths:
            raise UserError(f"{folder / kind} holds no reviews (*.txt): unpack {ARCHIVE} again")
        rows += [(read_bytes(path), label) for path in paths]
    return rows


def _tfds(split: str, data_dir: str | None) -> list[tuple[bytes, int]]:
    source = images.tfds_source("imdb_reviews", split, data_dir, OTHERWISE)
    rows = []
    for i in range(len(source)):
        example = source[i]
        text, label = example["text"], int(example["label"])
        rows.append((text.encode() if isinstance(text, str) else bytes(text), label))
    return rows

"""Retrieval of the Long Range Arena: whether one of two papers of the ACL Anthology Network cites the other.

The pairs are read from new_aan_pairs.{train,eval,test}.tsv of the released archive: label, id, id, text, text, separated
by tabs, without quoting; 147,086, 18,090 and 17,437 pairs. The files are gigabytes, so they are mapped and an index of
their lines is kept in the cache.

lra   ids are byte + 1 (257 with padding), the first `length` bytes of each text.
s4    ids are padding, unknown, <eos> and the 95 printable characters of ASCII in order (98); the first `length` - 1
      characters of each text and <eos>. The repository orders the same 98 by frequency.

The LRA repository's pooling takes the first byte's state here by an omission; pooling is the model's choice and not part
of this task.
"""

import hashlib
import io
import mmap
import pathlib
from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder, cache_folder, in_cache, write_atomically
from data import lra
from data.rows import class_row
from data.task import Outline, Spec, Task

FILES = {"train": "train", "valid": "eval", "test": "test"}
SPECIALS = 3
FIRST, LAST = 32, 126
_BLOCK = 2**24
_S4_IDS = np.full(256, lra.UNKNOWN, np.int32)
_S4_IDS[FIRST : LAST + 1] = SPECIALS + np.arange(LAST + 1 - FIRST)


def _spec(protocol: str, length: int) -> Spec:
    size = SPECIALS + LAST + 1 - FIRST if protocol == "s4" else 257
    return Spec(size, None, 2, "pair_classification", length, padded=True, unit="row")


class Retrieval(Task):
    """Classification of pairs of papers: related (1) or not (0).

    Args:
      protocol: "lra" or "s4".
      length: positions of each text.
      data_dir: the unpacked LRA archive, whose tsv_data is read.
      cache_dir: for the index of the lines; None for the environment's MIXOLOGY_CACHE, else ~/.cache/mixology.

    Raises:
      UserError: for a missing file.
      UserError: without data_dir, or for a corrupt file.
    """

    paper_size: ClassVar[dict] = {"length": 4000}  # arXiv 2011.04006, both protocols

    def __init__(
        self,
        protocol: str = "lra",
        length: int = 512,
        data_dir: Folder | None = None,
        cache_dir: Folder | None = None,
    ):
        check_choice("protocol", protocol, lra.PROTOCOLS)
        if data_dir is None:
            raise UserError(f"retrieval needs data_dir, the folder lra_release of {lra.ARCHIVE}, fetched and unpacked")
        self.name = f"retrieval/{protocol}"
        self._eos = protocol == "s4"
        self.spec = _spec(protocol, length)
        cache = cache_folder(cache_dir) / "retrieval"
        paths = {split: lra.locate(data_dir, f"tsv_data/new_aan_pairs.{part}.tsv") for split, part in FILES.items()}
        self._lines = {split: _Lines(path, cache) for split, path in paths.items()}

    @classmethod
    def outline(cls, protocol: str, length: int, **_) -> Outline:
        check_choice("protocol", protocol, lra.PROTOCOLS)
        return Outline(f"retrieval/{protocol}", _spec(protocol, length))

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._lines[split].labels)

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        lines, length = self._lines[split], self.spec.length
        encode = self._s4_ids if self._eos else lra.byte_ids
        rows = [class_row(encode(text, length), lines.labels[index], length) for text in lines.texts(index)]
        pair = {key: np.stack([row[key] for row in rows]) for key in ("inputs", "segment_ids", "positions")}
        return rows[0] | pair

    def _s4_ids(self, text, length):
        return np.append(_S4_IDS[np.frombuffer(text[: length - 1], np.uint8)], np.int32(lra.EOS))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the class that is most frequent in train."""
        check_choice("split", split, self.splits)
        return {"majority": lra.majority(self._lines["train"].labels, self._lines[split].labels)}

    def content(self) -> str:
        return lra.digest(*(self._lines[split].sha256 for split in self.splits))

    def encode(self, text: str) -> np.ndarray:
        content = np.frombuffer(text.encode(), np.uint8)
        return _S4_IDS[content] if self._eos else content.astype(np.int32) + 1

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids if int(i) != lra.PAD]
        if not self._eos:
            return bytes(i - 1 for i in ids).decode(errors="replace")
        return "".join(chr(i - SPECIALS + FIRST) if i >= SPECIALS else "\ufffd" for i in ids if i != lra.EOS)


class _Lines:
    """A mapped file of pairs: labels int64 [N], sha256 of the file, and the two texts of a line by its number."""

    def __init__(self, path: pathlib.Path, cache: pathlib.Path):
        self._path = path
        stat = path.stat()
        if not stat.st_size:
            raise UserError(f"{path} is empty; unpack {lra.ARCHIVE} again")
        try:
            with open(path, "rb") as file:
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        # A file that was unpacked again has another time of change, so an old index is never taken for it.
        facts = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        key = hashlib.sha256(facts.encode()).hexdigest()[:32]
        stored = cache / f"{key}.npz"
        if not stored.exists():
            buffer = io.BytesIO()
            np.savez(buffer, **self._index())
            with in_cache(stored):
                write_atomically(stored, buffer.getvalue())
        with np.load(stored) as index:
            self._starts, self.labels, self.sha256 = index["starts"], index["labels"], str(index["sha256"])

    def _index(self):
        """starts int64 [N + 1] of the lines and of the end, labels and the file's SHA-256."""
        size, ends, digest = len(self._content), [], hashlib.sha256()
        for start in range(0, size, _BLOCK):
            block = self._content[start : start + _BLOCK]
            digest.update(block)
            ends.append(start + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")))
        starts = np.concatenate([[0], *ends, [] if self._content[-1:] == b"\n" else [size]]).astype(np.int64)
        labels = np.empty(len(starts) - 1, np.int64)
        for i, start in enumerate(starts[:-1].tolist()):
            field = self._content[start : min(start + 8, int(starts[i + 1]))].split(b"\t")
            # The labels are written as numbers with or without a fraction.
            if len(field) < 2 or field[0] not in (b"0", b"1", b"0.0", b"1.0"):
                raise UserError(
                    f"{self._path}, line {i + 1}: it begins with {field[0]!r} where a label, 0 or 1, and a tab should be; "
                    f"unpack {lra.ARCHIVE} again"
                )
            labels[i] = field[0][:1] == b"1"
        return {"starts": starts, "labels": labels, "sha256": digest.hexdigest()}

    def texts(self, index: int) -> list[bytes]:
        line = self._content[self._starts[index] : self._starts[index + 1]].rstrip(b"\r\n")
        fields = line.split(b"\t")
        if len(fields) != 5:
            raise UserError(
                f"{self._path}, line {index + 1}: {len(fields)} fields between tabs where label, id, id, text, text should "
                f"be; unpack {lra.ARCHIVE} again"
            )
        return fields[3:]

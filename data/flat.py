"""Texts and token ids as flat files in the cache: written in bounded memory, mapped into it, and read at any place.

A split of a corpus is the files `<split>`, `<split>.1`, ... of a folder, its bytes or ids one after the other, and
`<split>.ends.npy`, where its documents end.
"""

import array
import bisect
import dataclasses
import hashlib
import itertools
import json
import mmap
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import damaged, make_folder, read_json

SPLITS = ("train", "valid", "test")
# Another one where files of the user's are to be converted again, because the program makes something else of them.
VERSION = 1
# A file of a split holds no more.
SHARD_BYTES = 2**34
# Passes over a whole split take so much at once.
BLOCK = 2**24
# So much of the maps may stay in the memory of the process; a place that is read may bring a large page with it.
MAPPED, AROUND = 2**26, 2**21
# Where a document ends and another begins, in texts of several.
SEPARATOR = b"\n\n"
_CHANGED = "a text was changed while it was read; run again"


class Mapped:
    """The numbers of files, one file after the other, as a vector that is mapped into memory; its slices are arrays.

    The memory of the process does not grow with what is read: pages of the files are given back to the operating system's cache,
    which all processes of a machine share.

    Args:
      files: (path, offset in bytes, count of numbers) of each.
      dtype: of the numbers, in the files' order of bytes.
    """

    def __init__(self, files: Sequence[tuple[pathlib.Path, int, int]], dtype: np.dtype | str):
        self.dtype = np.dtype(dtype)
        self._maps, self._parts, sizes = [], [], []
        for path, offset, count in files:
            if count:  # an empty file cannot be mapped
                with open(path, "rb") as file:
                    self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                self._parts.append(np.frombuffer(self._maps[-1], self.dtype, count, offset))
                sizes.append(count)
        self._starts = [0, *itertools.accumulate(sizes)]
        self._read, self._touched = 0, set()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, key):
        if not isinstance(key, slice):
            return self[key : key + 1 or None][0]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError("slices have no steps here")
        if start >= stop:
            return np.zeros(0, self.dtype)
        first, last = bisect.bisect(self._starts, start) - 1, bisect.bisect(self._starts, stop - 1) - 1
        self._give_back((stop - start) * self.dtype.itemsize)
        self._touched.update(self._maps[first : last + 1])
        if first == last:
            return self._parts[first][start - self._starts[first] : stop - self._starts[first]]
        pieces = zip(self._parts[first : last + 1], self._starts[first : last + 1], strict=True)
        return np.concatenate([part[max(start - begin, 0) : stop - begin] for part, begin in pieces])

    def _give_back(self, size: int) -> None:
        self._read += max(size, AROUND)
        if self._read > MAPPED:
            self._read = 0
            # Threads may read meanwhile: what is given back is mapped again where it is needed.
            touched, self._touched = self._touched, set()
            for one in list(touched):
                one.madvise(mmap.MADV_DONTNEED)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self[:], dtype)

    def tobytes(self) -> bytes:
        return self[:].tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Documents one after the other.

    Attributes:
      data: uint8 [bytes], or ids (integers, [tokens]); in memory or mapped from files.
      ends: int64 [documents], the offset after each document's last byte or token; increasing, the last is len(data).
    """

    data: np.ndarray | Mapped
    ends: np.ndarray


class Numbers:
    """An .npy file of int64 that is written number by number, in bounded memory."""

    def __init__(self, path: pathlib.Path):
        self._file, self._waiting, self._size = open(path, "wb"), array.array("q"), 0
        self._head()

    def append(self, number: int) -> None:
        self._waiting.append(number)
        if len(self._waiting) >= 2**16:
            self._write()

    def extend(self, more: np.ndarray) -> None:
        self._write()
        self._file.write(np.asarray(more, "<i8").tobytes())
        self._size += len(more)

    def close(self) -> None:
        self._write()
        self._file.seek(0)
        self._head()
        self._file.close()

    def _write(self) -> None:
        self._file.write(np.asarray(self._waiting, "<i8").tobytes())
        self._size += len(self._waiting)
        self._waiting = array.array("q")

    def _head(self) -> None:
        # NumPy leaves room in it for a growing first axis, so that all are of one size.
        header = {"descr": "<i8", "fortran_order": False, "shape": (self._size,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class Writer:
    """Writes the documents of one split into a folder, in bounded memory.

    Args:
      folder: that exists.
      split: its name.

    Attributes:
      size: bytes that are written.
    """

    def __init__(self, folder: pathlib.Path, split: str):
        self._path, self._shards = folder / split, itertools.count(1)
        self._file, self._room = open(self._path, "wb"), SHARD_BYTES
        self._ends = Numbers(folder / f"{split}.ends.npy")
        self.size = self._last = 0

    def write(self, content: bytes | memoryview) -> None:
        """Goes on with the document."""
        content = memoryview(content).cast("B")
        while len(content):
            if not self._room:
                self._file.close()
                self._file, self._room = open(f"{self._path}.{next(self._shards)}", "wb"), SHARD_BYTES
            written = self._file.write(content[: self._room])
            self.size, self._room, content = self.size + written, self._room - written, content[written:]

    def end(self, itemsize: int = 1) -> None:
        """Ends the document, if there is any; its numbers have `itemsize` bytes."""
        if self.size > self._last:
            self._last = self.size
            self._ends.append(self.size // itemsize)

    def close(self) -> None:
        self._file.close()
        self._ends.close()


def mapped(folder: pathlib.Path, dtype: str = "u1") -> dict[str, Stream]:
    """The splits that lie in a folder."""
    return {split: Stream(_files(folder, split, dtype), numbers(folder / f"{split}.ends.npy")) for split in SPLITS}


def numbers(path: pathlib.Path) -> np.ndarray:
    """What `Numbers` wrote, mapped."""
    # A file of nothing cannot be mapped.
    return np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None)


def _files(folder: pathlib.Path, split: str, dtype: str) -> Mapped:
    paths = [folder / split]
    while (more := folder / f"{split}.{len(paths)}").exists():
        paths.append(more)
    return Mapped([(path, 0, path.stat().st_size // np.dtype(dtype).itemsize) for path in paths], dtype)


def blocks(data: np.ndarray | Mapped) -> Iterator[np.ndarray]:
    """All of a vector, in pieces of `BLOCK`."""
    for start in range(0, len(data), BLOCK):
        yield np.asarray(data[start : start + BLOCK])


def fingerprint(splits: dict[str, Stream]) -> str:
    """SHA-256 of the contents and the documents of train, valid and test."""
    digest = hashlib.sha256()
    for split in SPLITS:
        stream = splits[split]
        digest.update(f"{split} {len(stream.data)} {len(stream.ends)}\n".encode())
        for block in blocks(stream.data):
            digest.update(np.ascontiguousarray(block))
        for block in blocks(stream.ends):
            digest.update(np.ascontiguousarray(block, "<i8"))
    return digest.hexdigest()


def listing(files: Iterable[pathlib.Path]) -> list[tuple[str, int, int, int]]:
    """What says whether files are still what they were: path, bytes, and when they and what is said of them were changed, in ns.
    The first of these times is copied along with a file, or set by who unpacks it; the second is not.

    Raises:
      UserError: where there is no such file.
    """
    found = []
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        found.append((str(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    return found


def check_apart(splits: Mapping[str, Iterable[pathlib.Path]]) -> None:
    """Raises a UserError where a file of train is one of another split, too: what is learned would be what is scored."""
    learned = {os.path.realpath(file) for file in splits["train"]}
    for split, files in splits.items():
        for file in files if split != "train" else ():
            if os.path.realpath(file) in learned:
                raise UserError(
                    f"{file} is of train and of {split}: name the files of train so that it is not among them, or have it in "
                    "another folder"
                )


def kept(
    cache: pathlib.Path, key: Sequence[Any], fill: Callable[[pathlib.Path], dict[str, Any]]
) -> tuple[pathlib.Path, dict[str, Any]]:
    """A folder in the cache and the facts of it, which are made once.

    Args:
      cache: see `common.files.cache_folder`.
      key: of JSON, all that the folder depends on; the first names its kind.
      fill: writes the folder and returns its facts, of JSON.

    Raises:
      UserError: if a file of the folder is not there or has another size than it was made with, as after a power cut.
    """
    name = hashlib.sha256(json.dumps([VERSION, *key]).encode()).hexdigest()[:32]
    folder = cache / key[0] / name

    def make(made: pathlib.Path) -> None:
        facts = fill(made)
        (made / "facts.json").write_text(json.dumps({"sizes": _sizes(made), **facts}))

    make_folder(folder, make)
    facts = read_json(folder / "facts.json")
    if not isinstance(facts, dict) or facts.get("sizes", {}).items() - _sizes(folder).items():
        raise damaged(folder)
    return folder, facts


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


class Cut:
    """Writes one text and cuts it, in order, into train, valid and test.

    Args:
      folder: that exists.
      size: bytes of the text in all.
      shares: of valid and test. By default 5 % each, cut as 90, 5 and 5 %.
    """

    def __init__(self, folder: pathlib.Path, size: int, shares: tuple[float, float] | None = None):
        self._writers = [Writer(folder, split) for split in SPLITS]
        self._stops, self._size, self._at = bounds(size, shares)[1:], 0, 0

    def write(self, content: bytes | memoryview) -> None:
        """Goes on with the document, which the border of two splits cuts."""
        content = memoryview(content)
        if self._size + len(content) > self._stops[-1]:
            raise UserError(_CHANGED)
        while len(content):
            while self._size == self._stops[self._at]:
                self._writers[self._at].end()
                self._at += 1
            piece = content[: self._stops[self._at] - self._size]
            self._writers[self._at].write(piece)
            self._size, content = self._size + len(piece), content[len(piece) :]

    def end(self) -> None:
        """Ends the document."""
        self._writers[self._at].end()

    def close(self) -> None:
        """Raises a UserError where the text was shorter."""
        if self._size != self._stops[-1]:
            raise UserError(_CHANGED)
        self.end()
        for writer in self._writers:
            writer.close()


def bounds(size: int, shares: tuple[float, float] | None = None) -> tuple[int, int, int, int]:
    """Where train, valid and test begin and end in a text of so many bytes, see `Cut`."""
    if shares is None:
        return 0, size * 90 // 100, size * 95 // 100, size
    valid, test = shares
    return 0, size - round(size * valid) - round(size * test), size - round(size * test), size


def check_room(folder: pathlib.Path, size: int) -> None:
    """Raises a UserError where a disk has not so many bytes left."""
    facts = os.statvfs(folder)
    if (free := facts.f_bavail * facts.f_frsize) < size:
        raise UserError(
            f"{folder} has {free / 1e9:,.1f} GB left and {size / 1e9:,.1f} GB are to be written there: make room, or give "
            "another folder for what is kept between runs, as cache_dir or in the environment's MIXOLOGY_CACHE"
        )

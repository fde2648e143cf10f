"""Rows that are slow to draw, drawn once: the first process that needs a row keeps it in the cache for all, for ever.

A split is one file of records of one size, each the content of its row and a checksum of it. A row is a pure function of its
index, so that processes may write the same row at the same time; one that is not there, or not whole, is drawn again.
"""

import functools
import os
import pathlib
import zlib
from collections.abc import Callable

from common.files import in_cache

CHECK_BYTES = 4


class Drawn:
    """The rows of one split.

    Args:
      path: of the file, which is made.
      size: bytes of a row.
      draw: index -> the bytes of that row.
    """

    def __init__(self, path: pathlib.Path, size: int, draw: Callable[[int], bytes]):
        self._path, self._size, self._draw = path, size, draw
        self._record = size + CHECK_BYTES

    @functools.cached_property
    def _file(self):
        with in_cache(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return open(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)

    def __getitem__(self, index: int) -> bytes:
        """The row, from the file, where it is put if it is not there."""
        if (row := self.kept(index)) is None:
            row = self._draw(index)
            with in_cache(self._path):
                os.pwrite(self._file.fileno(), row + _check(row), index * self._record)
        return row

    def kept(self, index: int) -> bytes | None:
        """The row, if it is in the file."""
        record = os.pread(self._file.fileno(), self._record, index * self._record)
        row, check = record[: self._size], record[self._size :]
        return row if len(check) == CHECK_BYTES and check == _check(row) else None


def _check(row: bytes) -> bytes:
    # Where nothing is written a file reads as zeros, which must be no checksum.
    return (zlib.crc32(row) or 1).to_bytes(CHECK_BYTES, "big")

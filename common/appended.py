"""Files to which lines are added while other processes may read them.

An object store adds nothing to an object, so what is added there becomes objects of their own beside it, `<name>.000001` and so
on: a piece for some seconds of lines.
"""

import os
import time
from pathlib import Path

from common import remote
from common.files import write_atomically

PIECE = 30.0  # seconds between two pieces; what was written since the last one is lost where a process is killed


class Appended:
    """A file that is open for lines to be added.

    Args:
      path: of the file, whose folder is there.
      lasting: whether each line outlives the machine, too: it is on the disk, or in a piece of its own, when `write` returns.
    """

    def __init__(self, path: Path, lasting: bool = False):
        self.path, self._lasting = path, lasting
        self._file = None if remote.is_address(path) else path.open("ab+")
        self._waiting, self._since = b"", time.monotonic()
        self._number = 0 if self._file is not None else max(map(_number, pieces(path)), default=0)
        if self._file is not None and self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            # A line that a full disk or a crash has cut must not take the next along.
            if self._file.read() != b"\n":
                self._file.write(b"\n")

    def write(self, text: str) -> None:
        """Adds whole lines."""
        if self._file is not None:
            self._file.write(text.encode())
            self._file.flush()
            if self._lasting:
                os.fsync(self._file.fileno())
            return
        self._waiting += text.encode()
        if self._lasting or time.monotonic() - self._since >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Returns when what was added can be read by others."""
        if self._waiting:
            self._number += 1
            write_atomically(self.path.with_name(f"{self.path.name}.{self._number:06}"), self._waiting)
            self._waiting, self._since = b"", time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def pieces(path: Path) -> list[Path]:
    """What was added to a file on an object store, in order."""
    if not remote.is_address(path):
        return []
    return sorted((found for found in path.parent.glob(f"{path.name}.*") if _number(found)), key=_number)


def _number(piece: Path) -> int:
    """The number of a piece, from 1; 0 for what is none."""
    end = piece.name.rpartition(".")[2]
    return int(end) if end.isdecimal() else 0


def read(path: Path) -> list[str]:
    """The lines of a file, what was added included; none if it is not there. What is not UTF-8 is replaced."""
    there = [path] if path.exists() else []
    return [line for part in [*there, *pieces(path)] for line in _text(part).splitlines()]


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def replace(path: Path, text: str) -> None:
    """Writes a file anew, without what was added. A crash amid this leaves lines twice on an object store."""
    write_atomically(path, text)
    for piece in pieces(path):
        piece.unlink()

"""Text of the user's own, from a file or a folder: what is read is said, and so is what is left out, and why.

A file that is named must be text; in a folder, what is no text is left out and named. Compressed files, JSON and tables hold
text in another form, which would be learned with it: they are refused, and the reader for them is named.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Set

from common.console import say
from common.errors import UserError
from common.files import KEPT

NAMED = 5  # files that are named of each kind that is left out
# Endings and first bytes of files whose text must be unpacked first.
PACKED = {".gz": "gunzip", ".zst": "unzstd", ".zip": "unzip", ".bz2": "bunzip2", ".xz": "unxz"}
PACKED_BYTES = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
}
RECORDS = (".jsonl", ".ndjson", ".json")
TEXT_KEYS = ("text", "content", "document", "body")
WIDE = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
BLOCK = 2**24  # even
WIDE_SHARE = 0.2  # of bytes that are 0, from which on a file is taken for UTF-16

# Each is said once in a process, however often the task is built.
_say_once = functools.cache(say)


@dataclasses.dataclass(frozen=True)
class Found:
    """The files that a text may be in.

    Attributes:
      path: the file or folder that was asked for.
      files: in the order in which they are read.
      left_out: names of what is left out, by the reason.
    """

    path: pathlib.Path
    files: list[pathlib.Path]
    left_out: dict[str, list[str]]


def kept_in(cache: pathlib.Path) -> frozenset[str]:
    """The real paths of what this program keeps in a cache, which may lie in a folder of the user's texts or be it."""
    return frozenset(os.path.realpath(cache / name) for name in KEPT)


def find(path: pathlib.Path, but: Set[str] = frozenset()) -> Found:
    """A file, or the files of a folder in order of their names.

    Folders that are linked to are followed; what lies inside the folder itself is read once.

    Args:
      path: of the file or folder.
      but: real paths of folders that are left out.

    Raises:
      UserError: where there is nothing.
    """
    if path.is_file():
        return Found(path, [path], {})
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}; corpus='file:PATH' takes a text file or a folder of them")
    left_out = collections.defaultdict(list)
    files = sorted(_files(path, left_out, but), key=lambda file: file.relative_to(path).parts)
    return Found(path, files, left_out)


def sift(found: Found) -> tuple[list[tuple[pathlib.Path, int]], str]:
    """The files that are text, with their bytes, and what is to be said of a folder. Each file is read, none is kept.

    Raises:
      UserError: where there is no text, for a file that is named and is none, and for one that may not be read.
    """
    left_out = collections.defaultdict(list, {reason: list(names) for reason, names in found.left_out.items()})
    texts = []
    for file in found.files:
        reason, size = why_not(file)
        if reason is None:
            texts.append((file, size))
        elif file == found.path:
            raise UserError(f"{file} {reason}")
        else:
            left_out[reason].append(str(file.relative_to(found.path)))
    if found.files == [found.path]:
        return texts, ""
    told = "".join(f"\n  left out: {_some(names)}: {reason}" for reason, names in left_out.items())
    if not texts:
        raise UserError(
            f"the folder {found.path} holds no text file; corpus='file:PATH' takes a folder of text files{told}"
        )
    return texts, f"{found.path}: {len(texts):,} files, {sum(size for _, size in texts):,} bytes{told}"


def say_once(told: str) -> None:
    """Says what there is to say; once in a process, however often the task is built."""
    if told:
        _say_once(told)


def why_not(path: pathlib.Path) -> tuple[str | None, int]:
    """Why a file is no text to learn from, and what can be done, as the end of a sentence, None if it is; and its bytes."""
    beginning, size, zeros = b"", 0, [0, 0]
    for block in read_blocks(path):
        if not size:
            beginning = block[: 2**20]
        size += len(block)
        zeros[0] += block[::2].count(0) if 0 in block else 0
        zeros[1] += block[1::2].count(0) if 0 in block else 0
    return _why_not(path.name, beginning, size, zeros), size


def read_blocks(path: pathlib.Path) -> Iterator[bytes]:
    """A file of the user's, in pieces of an even number of bytes.

    Raises:
      UserError: where it cannot be read; the message names it.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _why_not(name: str, beginning: bytes, size: int, zeros: list[int]) -> str | None:
    """See `why_not`; of the file are given its first bytes, its size, and how many bytes at even and odd places are 0."""
    ending = pathlib.PurePath(name).suffix.lower()
    packed = next((kind for start, kind in PACKED_BYTES.items() if beginning.startswith(start)), ending)
    if packed in PACKED:
        if pathlib.PurePath(pathlib.PurePath(name).stem).suffix.lower() in RECORDS and packed in (".gz", ".zst"):
            return "is compressed JSON: read it with corpus='jsonl:PATH'"
        return f"is compressed: unpack it first ({PACKED[packed]})"
    if ending == ".parquet" or beginning.startswith(b"PAR1"):
        return "is a table: read it with corpus='parquet:PATH'"
    wide = next((kind for mark, kind in WIDE.items() if beginning.startswith(mark)), None)
    if ending == ".bin" and wide is None and sum(zeros):
        return "is no text; if it holds token ids, read it with corpus='bin:PATH'"
    if wide is None and sum(zeros) > WIDE_SHARE * size:
        wide = "UTF-16LE" if zeros[1] >= zeros[0] else "UTF-16BE"
    if wide is not None:
        return f"is {wide}: convert it to UTF-8 (iconv -f {wide} -t UTF-8)"
    if sum(zeros):
        return "has bytes that are 0 and so is no text"
    if ending in RECORDS or _is_records(beginning):
        return "holds JSON: read it with corpus='jsonl:PATH'"
    return None


def _is_records(content: bytes) -> bool:
    """Whether the first two lines, or the only one, are JSON objects with a text."""
    lines = [line for line in content.split(b"\n", 2)[:2] if line.strip()]
    if not lines or not all(line.lstrip().startswith(b"{") for line in lines):
        return False
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            return False
        if not any(isinstance(record.get(key), str) for key in TEXT_KEYS):
            return False
    return True


def _files(root: pathlib.Path, left_out: dict[str, list[str]], but: Set[str]) -> list[pathlib.Path]:
    """The files below a folder but hidden ones; what else is left out goes into `left_out`, by its reason."""
    found, folders = [], [root]
    inside, entered = pathlib.Path(os.path.realpath(root)), set()
    while folders:
        folder = folders.pop()
        # A link may lead back to where it is.
        if (real := os.path.realpath(folder)) in entered:
            left_out["links to a folder that is read already"].append(str(folder.relative_to(root)))
            continue
        entered.add(real)
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be read ({error.strerror})") from error
        for entry in entries:
            if entry.is_dir() and os.path.realpath(entry) in but:
                left_out["is kept between runs by this program"].append(str(entry.relative_to(root)))
            elif entry.name.startswith("."):
                left_out["hidden"].append(str(entry.relative_to(root)))
            elif entry.is_dir():
                if entry.is_symlink() and pathlib.Path(os.path.realpath(entry)).is_relative_to(inside):
                    left_out["links to a folder that is read already"].append(str(entry.relative_to(root)))
                else:
                    folders.append(entry)
            elif entry.is_file():
                found.append(entry)
            else:
                left_out["no file: a broken link or a device"].append(str(entry.relative_to(root)))
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{len(names):,} ({', '.join(sorted(names)[:NAMED])}{more})"

"""Text of the user's own, from a file or a folder: what is read is said, and so is what is left out, and why.

A file that is named must be text; in a folder, what is no text is left out and named. Compressed files, JSON and tables hold
text in another form, which would be learned with it: they are refused.
"""

import collections
import functools
import json
import os
import pathlib

from common.console import say
from common.errors import UserError
from common.files import read_bytes

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
RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
TEXT_KEYS = ("text", "content", "document", "body")
WIDE = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
WIDE_SHARE = 0.2  # of bytes that are 0, from which on a file is taken for UTF-16

# Each is said once in a process, however often the task is built.
_say_once = functools.cache(say)


def read(path: pathlib.Path) -> list[bytes]:
    """The text of a file, or of each text file of a folder in order of their names.

    Folders that are linked to are followed; what lies inside the folder itself is read once.

    Raises:
      UserError: where there is nothing, for a file that is no text and for one that may not be read.
    """
    if path.is_file():
        text = read_bytes(path)
        if (reason := why_not(path.name, text)) is not None:
            raise UserError(f"{path} {reason}")
        return [text]
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}; corpus='file:PATH' takes a text file or a folder of them")
    left_out = collections.defaultdict(list)
    texts = []
    for file in sorted(_files(path, left_out), key=lambda file: file.relative_to(path).parts):
        text = read_bytes(file)
        reason = why_not(file.name, text)
        if reason is None:
            texts.append(text)
        else:
            left_out[reason].append(str(file.relative_to(path)))
    told = "".join(f"\n  left out: {_some(names)}: {reason}" for reason, names in left_out.items())
    if not texts:
        raise UserError(f"the folder {path} holds no text file; corpus='file:PATH' takes a folder of text files{told}")
    _say_once(f"{path}: {len(texts):,} files, {sum(map(len, texts)):,} bytes{told}")
    return texts


def why_not(name: str, content: bytes) -> str | None:
    """Why a file is no text to learn from, and what can be done, as the end of a sentence; None if it is."""
    ending = pathlib.PurePath(name).suffix.lower()
    packed = next((kind for start, kind in PACKED_BYTES.items() if content.startswith(start)), ending)
    if packed in PACKED:
        return f"is compressed: unpack it first ({PACKED[packed]})"
    if ending == ".parquet" or content.startswith(b"PAR1"):
        return "is a table: write its text into files, one for each document, and give their folder"
    wide = next((kind for mark, kind in WIDE.items() if content.startswith(mark)), None)
    zeros = content.count(0)
    if wide is None and zeros > WIDE_SHARE * len(content):
        wide = "UTF-16LE" if content[1::2].count(0) >= content[::2].count(0) else "UTF-16BE"
    if wide is not None:
        return f"is {wide}: convert it to UTF-8 (iconv -f {wide} -t UTF-8)"
    if zeros:
        return "has bytes that are 0 and so is no text"
    if ending in RECORDS or _is_records(content):
        return "holds JSON: write the text of its records into files, one for each document, and give their folder"
    return None


def _is_records(content: bytes) -> bool:
    """Whether the first two lines, or the only one, are JSON objects with a text."""
    lines = [line for line in content[: 2**20].split(b"\n", 2)[:2] if line.strip()]
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


def _files(root: pathlib.Path, left_out: dict[str, list[str]]) -> list[pathlib.Path]:
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
            if entry.name.startswith("."):
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

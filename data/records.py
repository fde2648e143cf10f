"""Documents that stand one by one in records, rows or tables: what the readers jsonl, parquet and hf have in common.

Documents are cut into train, valid and test by a hash of their text, unless valid and test have their own: a document falls
into the same split in whatever order they come and whatever is added, and copies of one never fall into two. By default valid and
test get 5 % of the documents each or, of more than 320 MB of files, the share that is some 16 MB.

Each document but the last of a split ends with a blank line.
"""

import abc
import contextlib
import dataclasses
import glob
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from common.console import say
from common.errors import UserError
from common.files import absolute
from data import flat, local_text
from data.corpus import Corpus, Reader, share
from data.flat import SEPARATOR, SPLITS

SHARE, HELD_OUT_BYTES = 0.05, 2**24
# From so many bytes on it is said that a conversion begins.
LONG = 2**28


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where documents are.

    Attributes:
      splits: the sources of train, and of valid and test where they have their own, each as `Records.texts` takes it.
      key: of JSON; another one if anything is changed.
      size: bytes of the sources of train, at least about.
    """

    splits: dict[str, list[Any]]
    key: Any
    size: int


class Records(Reader):
    """Documents of records.

    Args:
      field: of a record, that holds the text.
      valid, test: a share of the documents, or where documents of their own are.
    """

    def __init__(self, field: str = "text", valid: str | None = None, test: str | None = None):
        self.field, self.held_out = field, {"valid": valid, "test": test}

    @abc.abstractmethod
    def sources(self, path: str, cache: pathlib.Path, download: bool) -> Sources:
        """Where the documents are.

        Raises:
          UserError: where there are none.
        """

    @abc.abstractmethod
    def texts(self, source: Any) -> Iterator[str | None]:
        """The texts of a source, None for one that its record leaves empty.

        Raises:
          UserError: for a record that has no text; the message names it.
        """

    def read(self, path: str, cache: pathlib.Path, download: bool) -> Corpus:
        sources = self.sources(path, cache, download)
        shares = {}
        for split in ("valid", "test"):
            if split not in sources.splits:
                asked = self.held_out[split] and share(self.held_out[split])
                shares[split] = asked or min(SHARE, HELD_OUT_BYTES / sources.size)
        key = ["corpora", type(self).__module__, sources.key, self.field, shares]

        def fill(made: pathlib.Path) -> dict:
            if sources.size > LONG:
                say(f"{path}: {sources.size / 1e9:,.1f} GB are converted, once")
            flat.check_room(made, sources.size)
            return self._convert(path, sources.splits, shares, made)

        folder, facts = flat.kept(cache, key, fill)
        local_text.say_once(facts["told"])
        files = {s: [one for one in ones if isinstance(one, pathlib.Path)] for s, ones in sources.splits.items()}
        return Corpus("", flat.mapped(folder), facts["fingerprint"], files=files)

    def _convert(
        self, path: str, sources: dict[str, list[Any]], shares: dict[str, float], folder: pathlib.Path
    ) -> dict[str, str]:
        counts, empty = dict.fromkeys(SPLITS, 0), 0
        with contextlib.ExitStack() as stack:
            writers = {split: stack.enter_context(contextlib.closing(flat.Writer(folder, split))) for split in SPLITS}
            for own, ones in sources.items():
                for text in self._all(ones):
                    if not text:
                        empty += 1
                        continue
                    split = hashed(text, shares) if own == "train" else own
                    if counts[split]:
                        writers[split].write(SEPARATOR)
                        writers[split].end()
                    writers[split].write(text)
                    counts[split] += 1
            for writer in writers.values():
                writer.end()
        if not any(counts.values()):
            raise UserError(
                f"{path} holds no text: " + (f"all {empty:,} documents are empty" if empty else "it is empty")
            )
        for split, count in counts.items():
            if not count:
                share_of = "smaller shares, as in corpus='...,valid=0.01,test=0.01'"
                if split != "train":
                    share_of = f"another share, as in corpus='...,{split}=0.2', or {split} documents of their own"
                raise UserError(
                    f"{path}: of {sum(counts.values()):,} documents none fell to {split}: give more documents (those of one "
                    f"text are in one split), or {share_of}"
                )
        told = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        if empty:
            told += f"; {empty:,} without text are left out"
        return {"fingerprint": flat.fingerprint(flat.mapped(folder)), "told": f"{path}: documents: {told}"}

    def _all(self, sources: Iterable[Any]) -> Iterator[bytes]:
        for source in sources:
            for text in self.texts(source):
                yield b"" if text is None else text.encode()


def hashed(text: bytes, shares: dict[str, float]) -> str:
    """The split of a document, by the first 64 bits of its SHA-256 as a number from 0 to 1: its ends are test and valid."""
    place = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    if place < shares.get("test", 0):
        return "test"
    return "valid" if place >= 1 - shares.get("valid", 0) else "train"


class FileRecords(Records):
    """Documents of files: PATH is a file, a folder with such files, also in folders below it, or a pattern of names (*.parquet).

    Attributes:
      endings: of the files of a folder.
    """

    endings: tuple[str, ...]

    def sources(self, path: str, cache: pathlib.Path, download: bool) -> Sources:
        held_out = {split: value for split, value in self.held_out.items() if value and share(value) is None}
        splits = {split: files(where, self.endings, cache) for split, where in {"train": path, **held_out}.items()}
        flat.check_apart(splits)
        listing = {split: flat.listing(found) for split, found in splits.items()}
        return Sources(splits, listing, max(1, sum(size for _, size, *_ in listing["train"])))


def files(path: str, endings: tuple[str, ...], cache: pathlib.Path) -> list[pathlib.Path]:
    """The files that a path stands for, see `FileRecords`, in order of their names; what is kept between runs is none of them.

    Raises:
      UserError: where there are none.
    """
    where = pathlib.Path(absolute(path))
    if where.is_file():
        return [where]
    if where.is_dir():
        found = [file for file in where.rglob("*") if file.name.endswith(endings) and file.is_file()]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(where).parts)]
        lacking = f"the folder {where} holds no file that ends in {', '.join(endings)}"
    else:
        found = [pathlib.Path(name) for name in glob.glob(str(where), recursive=True) if pathlib.Path(name).is_file()]
        lacking = f"there is no file or folder {where}, and no file of such a name"
    kept = tuple(os.path.join(folder, "") for folder in local_text.kept_in(cache))
    found = [file for file in found if not os.path.realpath(file).startswith(kept)]
    if not found:
        raise UserError(lacking)
    return sorted(found)

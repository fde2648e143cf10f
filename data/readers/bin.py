"""Token ids in flat files, mapped where they lie: nanoGPT's, llm.c's, or Megatron's with their index.

A file holds ids of two or four bytes, least first, and nothing else (nanoGPT's data/*/prepare.py). A header of llm.c
(karpathy/llm.c, dev/data/data_common.py: 256 int32, the first 20240520 for uint16 or 20240801 for uint32, the third the number
of ids) is seen and passed over. Beside NAME.bin of Megatron-LM (megatron/core/datasets/indexed_dataset.py) lies NAME.idx:

    b"MMIDIDX\\0\\0", uint64 1, uint8 code of the type, uint64 sequences S, uint64 D,
    int32 [S] ids of each sequence, int64 [S] its first byte, int64 [D] the sequences before each document, the last of them S

PATH is a file, with or without .bin; a folder, of which train.bin, val.bin and test.bin are the splits (as nanoGPT names them),
or else all files together; or a pattern of names. Documents are those of the index; else they end with the id `eot`; else
each file is one. Where valid or test has no files of its own, it is cut off the end of train: by default 5 %, or the share that
is 16 MB.

What the ids stand for is said by `tokenizer`, "file:PATH" or "ids:SIZE".

    bin:openwebtext/,eot=50256      bin:fineweb/*_train_*.bin,valid=fineweb/*_val_*.bin      bin:megatron/my_text_document
"""

import contextlib
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from common.errors import UserError, check_choice
from common.files import absolute
from data import flat
from data.corpus import Corpus, Reader, share
from data.flat import SPLITS, Mapped, Stream
from data.records import HELD_OUT_BYTES, SHARE, files

DTYPES = {"uint16": "<u2", "uint32": "<u4"}
HEADER = 1024
MAGIC = {20240520: "uint16", 20240801: "uint32"}
INDEX, INDEX_HEADER = b"MMIDIDX\x00\x00", 34
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
OF_FOLDER = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}


class Bin(Reader):
    """Token ids.

    Args:
      dtype: of files that do not say it themselves, "uint16" or "uint32".
      eot: the id with which a document ends.
      valid, test: a share of the ids, or files of their own.
    """

    def __init__(
        self, dtype: str = "uint16", eot: str | None = None, valid: str | None = None, test: str | None = None
    ):
        check_choice("dtype", dtype, DTYPES)
        if eot is not None and not eot.isdecimal():
            raise UserError(f"eot={eot!r} must be a token id")
        self._dtype, self._eot = dtype, None if eot is None else int(eot)
        self._held_out = {"valid": valid, "test": test}

    def where(self, path: str) -> str:
        return absolute(path)

    def read(self, path: str, cache: pathlib.Path, download: bool) -> Corpus:
        own = {"train": _files(path, cache)}
        folder = pathlib.Path(absolute(path))
        if folder.is_dir():
            named = {
                s: [folder / f"{n}.bin" for n in names if (folder / f"{n}.bin").is_file()]
                for s, names in OF_FOLDER.items()
            }
            if named["train"]:
                own = {split: found for split, found in named.items() if found}
        shares = {}
        for split, value in self._held_out.items():
            if value is not None and share(value) is None:
                own[split] = _files(value, cache)
            elif value is not None or split not in own:
                own.pop(split, None)
                shares[split] = None if value is None else share(value)
        flat.check_apart(own)
        opened = {split: [_Ids(file, self._dtype) for file in found] for split, found in own.items()}
        kinds = {one.dtype.str for ones in opened.values() for one in ones}
        if len(kinds) > 1:
            raise UserError(
                f"{path}: files hold ids of different types ({', '.join(sorted(kinds))}); give them one by one"
            )
        size = max(1, sum(one.size * one.dtype.itemsize for one in opened["train"]))
        shares = {split: part or min(SHARE, HELD_OUT_BYTES / size) for split, part in shares.items()}
        splits = _cut(opened, shares)
        listed = [file for ones in opened.values() for one in ones for file in one.read]
        key = [
            "corpora",
            "bin",
            flat.listing(listed),
            [[s, len(o)] for s, o in own.items()],
            shares,
            self._eot,
            kinds.pop(),
        ]

        def fill(made: pathlib.Path) -> dict:
            largest = max(self._index(split, parts, made) for split, parts in splits.items())
            return {"largest": largest, "fingerprint": flat.fingerprint(_streams(splits, made))}

        kept, facts = flat.kept(cache, key, fill)
        return Corpus("", _streams(splits, kept), facts["fingerprint"], largest_id=facts["largest"], files=own)

    def _index(self, split: str, parts: "list[_Part]", folder: pathlib.Path) -> int:
        """Writes where the documents of a split end, and gives its largest id."""
        largest = before = last = ended = 0
        needs_eot = split == "train" and self._eot is not None and any(part.of.index is None for part in parts)
        with contextlib.closing(flat.Numbers(folder / f"{split}.ends.npy")) as ends:

            def append(more: np.ndarray) -> int:
                # Empty documents are none.
                more = more[np.diff(more, prepend=last) > 0]
                ends.extend(more)
                return int(more[-1]) if len(more) else last

            for part in parts:
                at = before
                for block in flat.blocks(part.ids()):
                    largest = max(largest, int(block.max()))
                    if block.dtype.kind == "i" and block.min() < 0:
                        raise UserError(f"{part.of.path} holds the id {block.min()}, below 0; its index is wrong")
                    if self._eot is not None and part.of.index is None:
                        places = np.flatnonzero(block == self._eot)
                        ended += len(places)
                        last = append(places + at + 1)
                    at += len(block)
                for found in part.of.document_ends(part.start, part.stop):
                    last = append(found - part.start + before)
                before = at
                # A document ends with its file, unless it is known to go on.
                if self._eot is None or part.of.index is not None:
                    last = append(np.array([before]))
            last = append(np.array([before]))
        if not before:
            raise UserError(f"the {split} split has no ids; give more, or another share")
        if needs_eot and not ended:
            raise UserError(f"no id of train is eot={self._eot}: give the one that documents end with, or leave it out")
        return largest


class _Part:
    """The ids `start` to `stop` of a file."""

    def __init__(self, of: "_Ids", start: int, stop: int):
        self.of, self.start, self.stop = of, start, stop

    def file(self) -> tuple[pathlib.Path, int, int]:
        return self.of.path, self.of.offset + self.start * self.of.dtype.itemsize, self.stop - self.start

    def ids(self) -> Mapped:
        return Mapped([self.file()], self.of.dtype)


class _Ids:
    """A file of ids: its type, where they begin, how many they are, and its index if it has one."""

    def __init__(self, path: pathlib.Path, dtype: str):
        self.path, self.offset, self.index = path, 0, path.with_suffix(".idx")
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                beginning = file.read(HEADER)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        magic = struct.unpack("<i", beginning[:4])[0] if len(beginning) >= 4 else None
        if self.index.is_file():
            dtype = self._read_index()
        else:
            self.index = None
            if magic in MAGIC:
                if size < HEADER:
                    raise UserError(f"{path} ends within its header; fetch it again")
                dtype, self.offset = MAGIC[magic], HEADER
        self.read = [path] if self.index is None else [path, self.index]
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.size, rest = divmod(size - self.offset, self.dtype.itemsize)
        if rest:
            raise UserError(
                f"{path} has {size:,} bytes, which are no whole ids of {dtype}; give dtype=uint16 or uint32"
            )
        said = struct.unpack("<i", beginning[8:12])[0] if self.offset else self.size
        if self.index is not None:
            some = len(self._sizes) > 0
            said = int(self._starts[-1]) // self.dtype.itemsize + int(self._sizes[-1]) if some else 0
        if said != self.size:
            raise UserError(f"{path} holds {self.size:,} ids, and its header or index says {said:,}; fetch it again")

    def _read_index(self) -> str:
        with open(self.index, "rb") as file:
            beginning = file.read(INDEX_HEADER)
        if len(beginning) < INDEX_HEADER or not beginning.startswith(INDEX):
            raise UserError(f"{self.index} is no index of Megatron; take it away if {self.path} needs none")
        version, code, sequences, documents = struct.unpack("<QBQQ", beginning[len(INDEX) :])
        if version != 1 or code not in CODES:
            raise UserError(f"{self.index}: version {version} and type {code} are not known here")
        need = INDEX_HEADER + 12 * sequences + 8 * documents
        if self.index.stat().st_size < need:
            raise UserError(f"{self.index} has {self.index.stat().st_size:,} bytes instead of {need:,}; fetch it again")
        at = INDEX_HEADER
        self._sizes = Mapped([(self.index, at, sequences)], "<i4")
        self._starts = Mapped([(self.index, at + 4 * sequences, sequences)], "<i8")
        self._documents = Mapped([(self.index, at + 12 * sequences, documents)], "<i8")
        return CODES[code]

    def document_ends(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Where documents of the index end, from `start` to `stop`, in pieces."""
        for at in range(0, len(self._documents) if self.index else 0, 2**16):
            numbers = self._documents[at : at + 2**16]
            if (np.diff(numbers) < 0).any() or (
                len(numbers) and not 0 <= numbers[0] <= numbers[-1] <= len(self._sizes)
            ):
                raise UserError(
                    f"{self.index}: documents do not follow each other, or it has fewer sequences; make it anew"
                )
            numbers = numbers[numbers > 0]
            if len(numbers):
                # The last sequence of each document.
                first, last = int(numbers[0]) - 1, int(numbers[-1])
                ends = self._starts[first:last] // self.dtype.itemsize + self._sizes[first:last]
                ends = ends[numbers - 1 - first]
                yield ends[(ends > start) & (ends <= stop)]


def _files(path: str, cache: pathlib.Path) -> list[pathlib.Path]:
    if pathlib.Path(f"{absolute(path)}.bin").is_file():
        return [pathlib.Path(f"{absolute(path)}.bin")]
    return files(path, (".bin",), cache)


def _cut(opened: dict[str, list[_Ids]], shares: dict[str, float]) -> dict[str, list[_Part]]:
    """The parts of files that are each split; what has none of its own is the end of train."""
    splits = {split: [_Part(one, 0, one.size) for one in ones] for split, ones in opened.items()}
    total = sum(one.size for one in opened["train"])
    stops = flat.bounds(total, tuple(shares.get(split, 0.0) for split in ("valid", "test")))
    for split, start, stop in zip(SPLITS, stops[:-1], stops[1:], strict=True):
        if split != "train" and split not in shares:
            continue
        splits[split], before = [], 0
        for one in opened["train"]:
            low, high = max(start - before, 0), min(stop - before, one.size)
            if low < high:
                splits[split].append(_Part(one, low, high))
            before += one.size
    return splits


def _streams(splits: dict[str, list[_Part]], folder: pathlib.Path) -> dict[str, Stream]:
    return {
        split: Stream(
            Mapped([part.file() for part in parts], parts[0].of.dtype), flat.numbers(folder / f"{split}.ends.npy")
        )
        for split, parts in splits.items()
    }

"""Text as token ids: bytes, characters, or byte-pair encoding (arXiv 1508.07909) on bytes as GPT-2 has it.

byte        the 256 bytes; the text as it is
character   the characters that occur in the corpus (all splits), in order of their code points; text8 has 27
bpe:SIZE    byte-pair encoding with at most SIZE tokens, trained on the beginning of the train split
file:PATH   a tokenizer of somebody else: a tokenizer.json as the `tokenizers` package writes it, or a folder with
            the two files of a byte-level BPE (vocab.json and merges.txt, or OpenAI's encoder.json and vocab.bpe of GPT-2)
ids:SIZE    of a corpus of token ids (bin:), SIZE of them, whose tokenizer is not here; with file:PATH they have a text, too

All of them but the last give the text back exactly, so that the nats of a split are those of its text, and bits per byte and
perplexity per word can be compared whatever the tokens are. Nothing is added at the borders of documents.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import absolute

# A trained vocabulary has no more.
MOST_TOKENS = 2**24
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token that is a byte of a character which the vocabulary lacks


class Byte:
    """The bytes of UTF-8."""

    unit, vocab_size = "byte", 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")

    def vocabulary(self) -> list[int]:
        """What each id stands for."""
        return list(range(self.vocab_size))


class Character:
    """Characters of a sorted alphabet."""

    unit, version = "character", 1  # the second of what is kept of a text in its tokens

    def __init__(self, alphabet: str):
        self._points = np.frombuffer(alphabet.encode("utf-32-le"), "<u4")
        self.vocab_size = len(self._points)
        self.fingerprint = hashlib.sha256(alphabet.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids, int32. Raises a UserError for a character that the alphabet does not have."""
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = np.minimum(np.searchsorted(self._points, points), self.vocab_size - 1)
        strange = points[self._points[ids] != points]
        if len(strange):
            raise UserError(
                f"the corpus has no character {chr(strange[0])!r}; leave it out, or train with tokenizer='byte'"
            )
        return ids.astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """Ids of each text, and the bytes of its first token."""
        return [(self.encode(text), len(text[:1].encode())) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._points[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le")

    def vocabulary(self) -> list[str]:
        """What each id stands for."""
        return [chr(point) for point in self._points.tolist()]


class Subword:
    """A tokenizer of the `tokenizers` package. It reads a text whole, also where its file says that texts are to be cut or
    filled up, which is for those who make batches.

    Args:
      tokenizer: of the package.
      file: that it was read from, or the folder; None if it is nowhere.
    """

    unit, version = "token", 2

    def __init__(self, tokenizer, file: pathlib.Path | None = None):
        self._tokenizer, self.file = tokenizer, file
        self._added = tokenizer.get_added_tokens_decoder()
        self._of_bytes = "ByteLevel" in repr(tokenizer.decoder)
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        # Of the file as it is: runs of older code have recorded it so.
        self.fingerprint = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):  # which is for training: each call would give other ids
            tokenizer.model.dropout = None

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids with those that the tokenizer puts around a text, such as the token of its beginning."""
        return np.array(self._tokenizer.encode(text).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """Ids of each text, and the bytes of its first token."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(encoding.ids, np.int32), self._first_bytes(text, encoding) if encoding.ids else 0)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _first_bytes(self, text: str, encoding) -> int:
        first = encoding.ids[0]
        if first not in self._added:
            # Offsets are of whole characters, of which such a token may be a part: of a byte-level one each character is a byte.
            token = self._tokenizer.id_to_token(first)
            if self._of_bytes or _BYTE.fullmatch(token):
                return len(token) if self._of_bytes else 1
        return len(text[: encoding.offsets[0][1]].encode())

    def to_json(self) -> str:
        """What the `tokenizers` package reads again, from a file tokenizer.json."""
        return self._tokenizer.to_str()

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)

    def vocabulary(self) -> list[str | None]:
        """What each id stands for, in the tokenizer's own spelling; None of one that it does not use."""
        return [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]

    def pieces(self) -> list[str]:
        """The texts of all tokens that are whole characters, without those that were added for other ends."""
        ids = sorted(set(range(self.vocab_size)) - self._added.keys())
        return [text for text in map(self.decode, ([i] for i in ids)) if "\ufffd" not in text]


class Ids:
    """Token ids of which no text is known."""

    unit = "token"

    def __init__(self, size: int):
        self.vocab_size = size

    def encode(self, text: str) -> np.ndarray:
        """Raises a UserError, unless the text is numbers between blanks, as `decode` writes them."""
        try:
            return np.array(text.split(), np.int32)
        except ValueError:
            raise UserError(
                f"tokenizer='ids:{self.vocab_size}' knows no text: give ids between blanks, or tokenizer='file:PATH' of the "
                "tokenizer that made the ids"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, np.asarray(ids).tolist()))


def outline(name: str) -> tuple[int, str]:
    """The size of a tokenizer's vocabulary and its unit, without any text; a trained one is taken to have as many as it may.

    Raises:
      UserError: for the characters of a corpus, which must be read to be counted, and as `load` does.
    """
    kind, _, rest = name.partition(":")
    if name == "byte":
        return Byte.vocab_size, Byte.unit
    if (size := bpe_size(name)) is not None:
        return size, Subword.unit
    if kind == "ids" and rest.isdecimal() and int(rest) >= 1:
        return int(rest), Ids.unit
    if kind == "file" and rest:
        tokenizer = _from_file(pathlib.Path(absolute(rest)))
        return tokenizer.vocab_size, tokenizer.unit
    if name == "character":
        raise UserError(
            "tokenizer='character': how many characters there are only the text says, and no data is read to compile; "
            "take 'bpe:SIZE' or 'byte' instead"
        )
    raise unknown(name)


def bpe_size(name: str) -> int | None:
    """The SIZE of "bpe:SIZE"; None for another name, and for a size that no vocabulary has."""
    found = re.fullmatch("bpe:([0-9]{3,9})", name)
    return int(found[1]) if found and 256 <= int(found[1]) <= MOST_TOKENS else None


def unknown(name: str) -> UserError:
    return UserError(
        f"tokenizer={name!r} is unknown; choose 'byte', 'character', 'bpe:SIZE' (256 to {MOST_TOKENS}, as in 'bpe:8192'), "
        "'file:PATH' (a tokenizer.json, or a folder with vocab.json and merges.txt) or, for token ids, 'ids:SIZE'"
    )


def alone(name: str) -> Byte | Subword:
    """The tokenizer "byte" or "file:PATH", which are not made from a corpus.

    Raises:
      UserError: for another one, and if the file is missing.
    """
    kind, _, rest = name.partition(":")
    if name == "byte":
        return Byte()
    if kind != "file" or not rest:
        raise UserError(
            f"tokenizer={name!r} is made from a corpus: give 'byte', or 'file:PATH' with the file of its tokens"
        )
    return _from_file(pathlib.Path(absolute(rest)))


def check_lossless(name: str, tokenizer: Byte | Character | Subword, text: str, ids: np.ndarray) -> None:
    """Raises a UserError where a tokenizer does not give a text back from its ids."""
    back = tokenizer.decode(ids)
    if back != text:
        at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
        near = slice(max(at - 10, 0), at + 10)
        raise UserError(
            f"tokenizer={name!r} loses text: {text[near]!r} comes back as {back[near]!r}. Scores would not be those of the "
            "text; choose one without normalisation, such as a byte-level BPE"
        )


def byte_level(model):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def read(file: pathlib.Path, merges: pathlib.Path | None = None) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, or of the vocabulary and the merges of a byte-level BPE.

    Raises:
      UserError: if the package cannot read it.
    """
    import tokenizers  # slow to import, and only needed for subwords

    try:
        if merges is None:
            return tokenizers.Tokenizer.from_file(str(file))
        return byte_level(tokenizers.models.BPE.from_file(str(file), str(merges)))
    except Exception as error:  # the package raises plain exceptions for files that it cannot read
        raise UserError(f"{file} is no tokenizer that the package `tokenizers` can read ({error})") from error


def _from_file(path: pathlib.Path) -> Subword:
    pairs = [(path / "vocab.json", path / "merges.txt"), (path / "encoder.json", path / "vocab.bpe")]
    found = next((pair for pair in pairs if all(file.is_file() for file in pair)), None)
    if found is None and not path.is_file():
        raise UserError(
            f"there is no tokenizer {path}: give a tokenizer.json, or a folder with vocab.json and merges.txt, or with "
            "encoder.json and vocab.bpe"
        )
    tokenizer = Subword(read(*(found or (path,))), path)
    if not tokenizer.vocab_size:
        raise UserError(f"{path} is a tokenizer without tokens: give the file of one that was trained")
    return tokenizer

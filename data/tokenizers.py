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

import codecs
import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import absolute, damaged, make_file
from data import flat
from data.corpus import Corpus
from data.flat import SPLITS, Stream

# Long documents are cut at the end of a line near these bytes, and each piece is encoded by itself.
PIECE_BYTES = 2**20
# A vocabulary is trained on this much of the train split.
TRAIN_BYTES = 2**28
# A trained vocabulary has no more.
MOST_TOKENS = 2**24
_VERSION = 1
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


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenized:
    """A corpus as token ids.

    Attributes:
      name: by which `load` gives the same tokenizer again, from whatever directory.
      tokenizer: has `vocab_size`, `unit` ("byte", "character" or "token"), `encode` and `decode`.
      splits: streams whose data are ids (unsigned integers, mapped from a file).
      num_bytes: of the text of each split; empty where only the ids are known.
      first_bytes: int64 [documents] for each split, the bytes of the documents' first tokens (which no model is scored on).
      fingerprint: SHA-256 of the text, the tokenizer and the ids; the corpus' own for bytes.
    """

    name: str
    tokenizer: Byte | Character | Subword | Ids
    splits: dict[str, Stream]
    num_bytes: dict[str, int]
    first_bytes: dict[str, np.ndarray]
    fingerprint: str


def outline(name: str) -> tuple[int, str]:
    """The size of a tokenizer's vocabulary and its unit, without any text; a trained one is taken to have as many as it may.

    Raises:
      UserError: for the characters of a corpus, which must be read to be counted, and as `load` does.
    """
    kind, _, rest = name.partition(":")
    if name == "byte":
        return Byte.vocab_size, Byte.unit
    if (size := _bpe_size(name)) is not None:
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
    raise _unknown(name)


def _bpe_size(name: str) -> int | None:
    """The SIZE of "bpe:SIZE"; None for another name, and for a size that no vocabulary has."""
    found = re.fullmatch("bpe:([0-9]{3,9})", name)
    return int(found[1]) if found and 256 <= int(found[1]) <= MOST_TOKENS else None


def _unknown(name: str) -> UserError:
    return UserError(
        f"tokenizer={name!r} is unknown; choose 'byte', 'character', 'bpe:SIZE' (256 to {MOST_TOKENS}, as in 'bpe:8192'), "
        "'file:PATH' (a tokenizer.json, or a folder with vocab.json and merges.txt) or, for token ids, 'ids:SIZE'"
    )


def load(name: str, corpus: Corpus, cache: pathlib.Path) -> Tokenized:
    """A corpus in the tokens of a tokenizer, which is trained first where it has to be; both are kept in the cache.

    Args:
      name: as in the table above.
      corpus: the text. A character that the border of two splits cuts is left out by all but "byte".
      cache: see `corpora.cache_folder`.

    Raises:
      UserError: for an unknown name, a tokenizer that loses text, and for a text that is no UTF-8.
      UserError: if the tokenizer's file is missing, and if a corpus of ids has larger ones than the tokenizer.
    """
    if corpus.largest_id is not None:
        return _of_ids(name, corpus)
    if name.startswith("ids:"):
        raise UserError(f"tokenizer={name!r} is of token ids, and {corpus.name!r} is text; choose another tokenizer")
    if name == "byte":
        # Takes no memory, however many documents there are.
        first = {split: np.broadcast_to(np.int64(1), len(stream.ends)) for split, stream in corpus.splits.items()}
        sizes = {split: len(stream.data) for split, stream in corpus.splits.items()}
        return Tokenized(name, Byte(), corpus.splits, sizes, first, corpus.fingerprint)
    kind, _, rest = name.partition(":")
    if name == "character":
        tokenizer = _character(corpus, cache)
    elif (size := _bpe_size(name)) is not None:
        tokenizer = _bpe(corpus, size, cache)
    elif kind == "file" and rest:
        name = f"file:{absolute(rest)}"
        tokenizer = _from_file(pathlib.Path(absolute(rest)))
    else:
        raise _unknown(name)
    key = ["tokens", corpus.fingerprint, tokenizer.fingerprint, tokenizer.version]
    folder, facts = flat.kept(cache, key, lambda made: _convert(name, tokenizer, corpus, made))
    first = {split: flat.numbers(folder / f"{split}.first.npy") for split in SPLITS}
    splits = flat.mapped(folder, facts["dtype"])
    parts = f"{corpus.fingerprint} {tokenizer.fingerprint} {facts['fingerprint']}"
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()
    return Tokenized(name, tokenizer, splits, facts["num_bytes"], first, fingerprint)


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


def _of_ids(name: str, corpus: Corpus) -> Tokenized:
    kind, _, rest = name.partition(":")
    if kind == "ids" and rest.isdecimal() and int(rest) >= 1:
        tokenizer = Ids(int(rest))
    elif kind == "file" and rest:
        name = f"file:{absolute(rest)}"
        tokenizer = _from_file(pathlib.Path(absolute(rest)))
    else:
        raise UserError(
            f"corpus={corpus.name!r} holds token ids up to {corpus.largest_id}: give the tokenizer that made them as "
            f"tokenizer='file:PATH', or the size of its vocabulary, as in tokenizer='ids:{corpus.largest_id + 1}'; got {name!r}"
        )
    if corpus.largest_id >= tokenizer.vocab_size:
        other = "uint16" if ",dtype=uint32" in corpus.name else "uint32"
        raise UserError(
            f"corpus={corpus.name!r} holds the id {corpus.largest_id} and tokenizer={name!r} has 0 to "
            f"{tokenizer.vocab_size - 1}: give another tokenizer, or the right dtype (corpus='bin:PATH,dtype={other}')"
        )
    return Tokenized(name, tokenizer, corpus.splits, {}, {}, corpus.fingerprint)


def _convert(name: str, tokenizer: Character | Subword, corpus: Corpus, folder: pathlib.Path) -> dict[str, Any]:
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    itemsize = np.dtype(dtype).itemsize
    num_bytes = {}
    for split in SPLITS:
        writer, first_bytes, num_bytes[split] = (
            flat.Writer(folder, split),
            flat.Numbers(folder / f"{split}.first.npy"),
            0,
        )
        with contextlib.closing(writer), contextlib.closing(first_bytes):
            for batch in _batches(_pieces(corpus, split)):
                encoded = tokenizer.encode_all([text for _, text in batch])
                for (begins, text), (ids, first) in zip(batch, encoded, strict=True):
                    if name.startswith("file:"):  # our own lose nothing
                        check_lossless(name, tokenizer, text, ids)
                    if begins:
                        writer.end(itemsize)
                        first_bytes.append(first)
                    writer.write(ids.astype(dtype).tobytes())
                    num_bytes[split] += len(text.encode())
            writer.end(itemsize)
        if not writer.size:
            raise UserError(f"the {split} split of {corpus.name!r} has no whole character; give a longer text")
    return {"dtype": dtype, "num_bytes": num_bytes, "fingerprint": flat.fingerprint(flat.mapped(folder, dtype))}


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


def _pieces(corpus: Corpus, split: str) -> Iterator[tuple[bool, str]]:
    """(whether a document begins here, text) of all documents, long ones cut at ends of lines."""
    stream = corpus.splits[split]
    ends = (end for block in flat.blocks(stream.ends) for end in block.tolist())
    for start, stop in itertools.pairwise(itertools.chain([0], ends)):
        # A border of splits may have cut a character: then its rest is at the start, or the decoder keeps its beginning.
        while start < min(3, stop) and stream.data[start] & 0xC0 == 0x80:
            start += 1
        decoder, rest, begins = codecs.getincrementaldecoder("utf-8")(), "", True
        for at in range(start, stop, PIECE_BYTES):
            try:
                whole = at + PIECE_BYTES >= stop and stop < len(stream.data)
                text = rest + decoder.decode(stream.data[at : min(at + PIECE_BYTES, stop)].tobytes(), whole)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"the {split} split of {corpus.name!r} is no UTF-8 text ({error}); use tokenizer='byte'"
                ) from None
            cut = len(text) if at + PIECE_BYTES >= stop else text.rfind("\n") + 1 or len(text)
            text, rest = text[:cut], text[cut:]
            if text:
                yield begins, text
                begins = False


def _batches(pieces: Iterable[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= PIECE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _character(corpus: Corpus, cache: pathlib.Path) -> Character:
    path = cache / "tokenizers" / f"{corpus.fingerprint[:32]}-character-{_VERSION}.txt"

    def alphabet() -> str:
        found = set()
        for split in SPLITS:
            for _, text in _pieces(corpus, split):
                found |= set(text)
        return "".join(sorted(found))

    make_file(path, alphabet)
    try:
        found = path.read_bytes().decode()
    except UnicodeDecodeError:
        found = ""
    if not found:
        raise damaged(path)
    return Character(found)


def _bpe(corpus: Corpus, size: int, cache: pathlib.Path) -> Subword:
    path = train_bpe(f"{corpus.fingerprint[:32]}-bpe{size}", [(corpus, 1.0)], size, cache)
    try:
        return Subword(read(path), path)
    except UserError as error:
        raise damaged(path) from error


def train_bpe(name: str, corpora: Sequence[tuple[Corpus, float]], size: int, cache: pathlib.Path) -> pathlib.Path:
    """The tokenizer.json of byte-pair encoding with at most `size` tokens, trained once.

    Args:
      name: of the file in the cache, without its end; says what it is made of.
      corpora: and the share of the text, `TRAIN_BYTES` in all, that is the beginning of the train split of each.
      size: of the vocabulary.
      cache: where it is kept.
    """
    import tokenizers

    def train() -> str:
        tokenizer = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        texts = (text for corpus, part in corpora for text in _beginning(corpus, part * TRAIN_BYTES))
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.to_str()

    path = cache / "tokenizers" / f"{name}-{_VERSION}.json"
    make_file(path, train)
    return path


def _beginning(corpus: Corpus, most: float) -> Iterator[str]:
    size = 0
    for _, text in _pieces(corpus, "train"):
        yield text
        size += len(text)
        if size >= most:
            return


def _byte_level(model):
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
        return _byte_level(tokenizers.models.BPE.from_file(str(file), str(merges)))
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

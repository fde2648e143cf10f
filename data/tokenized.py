"""A corpus as token ids: the tokenizer, which is made from the text where it has to be, and the ids, both kept in the cache."""

import codecs
import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import absolute, damaged, make_file
from data import flat, tokenizers
from data.corpus import Corpus
from data.flat import SPLITS, Stream
from data.tokenizers import Byte, Character, Ids, Subword

# Long documents are cut at the end of a line near these bytes, and each piece is encoded by itself.
PIECE_BYTES = 2**20
# A vocabulary is trained on this much of the train split.
TRAIN_BYTES = 2**28
_VERSION = 1


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


def load(name: str, corpus: Corpus, cache: pathlib.Path) -> Tokenized:
    """A corpus in the tokens of a tokenizer, which is trained first where it has to be; both are kept in the cache.

    Args:
      name: as in the table of `data/tokenizers.py`.
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
    elif (size := tokenizers.bpe_size(name)) is not None:
        tokenizer = _bpe(corpus, size, cache)
    elif kind == "file" and rest:
        name = f"file:{absolute(rest)}"
        tokenizer = tokenizers.alone(name)
    else:
        raise tokenizers.unknown(name)
    key = ["tokens", corpus.fingerprint, tokenizer.fingerprint, tokenizer.version]
    folder, facts = flat.kept(cache, key, lambda made: _convert(name, tokenizer, corpus, made))
    first = {split: flat.numbers(folder / f"{split}.first.npy") for split in SPLITS}
    splits = flat.mapped(folder, facts["dtype"])
    parts = f"{corpus.fingerprint} {tokenizer.fingerprint} {facts['fingerprint']}"
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()
    return Tokenized(name, tokenizer, splits, facts["num_bytes"], first, fingerprint)


def _of_ids(name: str, corpus: Corpus) -> Tokenized:
    kind, _, rest = name.partition(":")
    if kind == "ids" and rest.isdecimal() and int(rest) >= 1:
        tokenizer = Ids(int(rest))
    elif kind == "file" and rest:
        name = f"file:{absolute(rest)}"
        tokenizer = tokenizers.alone(name)
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
                        tokenizers.check_lossless(name, tokenizer, text, ids)
                    if begins:
                        writer.end(itemsize)
                        first_bytes.append(first)
                    writer.write(ids.astype(dtype).tobytes())
                    num_bytes[split] += len(text.encode())
            writer.end(itemsize)
        if not writer.size:
            raise UserError(f"the {split} split of {corpus.name!r} has no whole character; give a longer text")
    return {"dtype": dtype, "num_bytes": num_bytes, "fingerprint": flat.fingerprint(flat.mapped(folder, dtype))}


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
        return Subword(tokenizers.read(path), path)
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
    import tokenizers as package

    def train() -> str:
        tokenizer = tokenizers.byte_level(package.models.BPE())
        trainer = package.trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
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

"""Interpolated modified Kneser-Ney (Chen and Goodman 1998, section 3): the n-gram floor of a byte-level language model.

    p_N(w | h) = max(c(h w) - D, 0) / c(h .) + gamma(h) p_{N-1}(w | h'),     p_0 = 1/256

with h' = h less its oldest byte and gamma(h) the mass freed by the discounts D, one each for counts of 1, 2, and 3 or
more. At the highest order c counts occurrences; below, c counts the different bytes (or the document's start) seen to
the left. Contexts never reach over the start of a document: there, shorter orders take over. The probabilities of the
256 bytes sum to one in every context.

As a language model of sentences, each a line of its own (its end is scored with it, so that an unfinished one pays):

    python -m data.ngram fit shakespeare --model=shakespeare.npz     fits on train, prints what it scores on valid and test
    python -m data.ngram score --model=shakespeare.npz "To be, or not to be" "To or be"
    python -m data.ngram rank --model=shakespeare.npz lines.txt                    scores and lines, the likeliest first
    python -m data.ngram rank --model=shakespeare.npz lines.txt --keep=0.5          the better half, in its own order
"""

import io
import json
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, UInt8

from common import command
from common.errors import UserError
from common.files import check_can_write, damaged, make_file, read_json, write_atomically
from data import corpora
from data.corpus import Corpus
from data.flat import Stream

BYTES = 256
# Bounds memory, some 100 bytes for each byte of text. Of a longer training split the beginning is used.
FIT_BYTES = 2**25
_BLOCK = 2**20
# The highest order that the command tries.
ORDERS = 9
_VERSION = 1


class KneserNey:
    """The models of order 1 to `orders`, fitted on one stream.

    Args:
      stream: the training text.
      orders: the highest order; by default the largest whose n-grams of the bytes that occur pack into 63 bits.
    """

    def __init__(self, stream: Stream, orders: int | None = None):
        text = np.asarray(stream.data[:FIT_BYTES])
        seen = np.unique(text)
        # Bytes that never occur share one more symbol, which no n-gram of the tables holds.
        self._symbol = np.full(BYTES, len(seen), np.int64)
        self._symbol[seen] = np.arange(len(seen))
        self._bits = _symbol_bits(text)
        self.orders = 63 // self._bits if orders is None else orders
        if not 1 <= self.orders <= 63 // self._bits:
            raise UserError(f"orders={orders} must be 1 to {63 // self._bits} ({self._bits} bits a symbol, 63 in all)")
        past = _past(stream.ends, 0, len(text))
        self._tables = []
        longer = np.zeros(0, np.int64)
        for n in range(self.orders, 0, -1):
            codes = self._codes(text, n)
            kinds, counts = np.unique(codes[past >= n - 1], return_counts=True)
            # Every n-gram ends a longer one, with one more byte to the left, or begins a document.
            left = np.concatenate([longer & ((1 << n * self._bits) - 1), np.unique(codes[past == n - 1])])
            variety = np.unique(left, return_counts=True)[1] if n < self.orders else counts
            contexts = kinds >> self._bits
            first = np.flatnonzero(np.diff(contexts, prepend=-1))
            self._tables.insert(0, (kinds, contexts[first], _discounted(counts, first), _discounted(variety, first)))
            longer = kinds

    def _codes(self, text: UInt8[np.ndarray, "N"], n: int) -> np.ndarray:
        """The n bytes that end at each position, packed; before the n-th byte of the text, fewer."""
        symbols = self._symbol[text]
        codes = symbols.copy()
        for i in range(1, n):
            codes[i:] |= symbols[:-i] << i * self._bits
        return codes

    def probabilities(self, stream: Stream, start: int, stop: int) -> Float64[np.ndarray, "orders N"]:
        """p(byte | the bytes before it in its document), by the model of each order, at the positions start..stop-1."""
        reach = max(start - self.orders + 1, 0)
        text = np.asarray(stream.data[reach:stop])
        past = _past(stream.ends, reach, stop)
        result = np.empty((self.orders, stop - start))
        below = np.full(len(text), 1 / BYTES)
        for n, (kinds, contexts, highest, lower) in enumerate(self._tables, 1):
            if not len(kinds):  # every document is shorter than n
                result[n - 1] = below[start - reach :]
                continue
            codes = self._codes(text, n)
            i, found = _look_up(kinds, codes)
            j, known = _look_up(contexts, codes >> self._bits)
            lookups = i, found, j, known & (past >= n - 1)
            result[n - 1] = _interpolated(*highest, *lookups, below)[start - reach :]
            below = _interpolated(*lower, *lookups, below)
        return result

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the fitted tables to a NumPy archive."""
        arrays = {"version": np.array(_VERSION), "bits": np.array(self._bits), "symbol": self._symbol}
        for n, (kinds, contexts, highest, lower) in enumerate(self._tables, 1):
            arrays |= {f"{name}{n}": a for name, a in zip(_TABLE, (kinds, contexts, *highest, *lower), strict=True)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomically(pathlib.Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "KneserNey":
        """Reads what `save` wrote.

        Raises:
          UserError: if there is no such file.
          UserError: if it is no intact model of this version.
        """
        if not pathlib.Path(path).is_file():
            raise UserError(f"there is no model {path}; make it with python -m data.ngram fit")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                model = cls.__new__(cls)
                version, model._bits, model._symbol = int(arrays["version"]), int(arrays["bits"]), arrays["symbol"]
                model.orders = (len(arrays.files) - 3) // len(_TABLE)
                model._tables = []
                for n in range(1, model.orders + 1):
                    table = [arrays[f"{name}{n}"] for name in _TABLE]
                    model._tables.append((table[0], table[1], tuple(table[2:4]), tuple(table[4:6])))
        except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no intact n-gram model ({error}); fit it again") from error
        if version != _VERSION:
            raise UserError(f"{path} is a model of version {version}, this program reads {_VERSION}; fit it again")
        return model


def _symbol_bits(text: UInt8[np.ndarray, "N"]) -> int:
    """Bits that hold the number of each byte that occurs, and one more number."""
    return max(1, min(len(np.unique(text)), BYTES - 1).bit_length())


_TABLE = ("kinds", "contexts", "share", "gamma", "lower_share", "lower_gamma")


def _interpolated(share, gamma, i, found, j, known, below):
    return np.where(known, np.where(found, share[i], 0) + gamma[j] * below, below)


def _discounted(counts, first):
    """(counts less the discount, relative to their context; gamma of each context); contexts start at `first`."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    y = n1 / max(1, n1 + 2 * n2)
    d = np.array([0, 1 - 2 * y * n2 / max(1, n1), 2 - 3 * y * n3 / max(1, n2), 3 - 4 * y * n4 / max(1, n3)])
    # Few counts can make an estimate negative; a discount of 0 would leave no mass for what was not seen.
    discount = np.where(d > 0, d, [0, 0.5, 1, 1.5])[np.minimum(counts, 3)]
    total = np.add.reduceat(counts, first)
    sizes = np.diff(first, append=len(counts))
    return (counts - discount) / np.repeat(total, sizes), np.add.reduceat(discount, first) / total


def _look_up(keys, queries):
    i = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return i, keys[i] == queries


def _past(ends, start: int, stop: int) -> np.ndarray:
    """Bytes before each of the positions start..stop-1 in its document."""
    position = np.arange(start, stop)
    # The documents of these positions alone: there may be hundreds of millions.
    low, high = np.searchsorted(ends, [start, stop], "right")
    starts = np.append(ends[low - 1] if low else 0, ends[low:high])
    return position - starts[np.searchsorted(starts, position, "right") - 1]


def bits_per_byte(corpus: Corpus, documents: bool, cache: pathlib.Path) -> dict[str, list[float]]:
    """Bits per byte of valid and test by the models of order 1, 2, ..., fitted on train; kept in the cache.

    What is scored is what a model that reads the bytes is scored on: every byte that has a byte before it, in its
    document where `documents`, else in its split.
    """
    path = cache / "ngram" / f"{corpus.fingerprint[:32]}-{'documents' if documents else 'stream'}-{_VERSION}.json"

    def table() -> str:
        streams = {
            split: stream if documents else Stream(stream.data, np.array([len(stream.data)]))
            for split, stream in corpus.splits.items()
        }
        model = KneserNey(streams["train"])
        return json.dumps({split: _bits(model, streams[split]) for split in ("valid", "test")})

    make_file(path, table)
    found = read_json(path)
    if not _is_table(found):
        raise damaged(path)
    return found


def _is_table(found) -> bool:
    """Whether something is a table of `bits_per_byte`: numbers of as many orders for both splits, and at least of those whose
    n-grams of all bytes pack into 63 bits."""
    if not isinstance(found, dict):
        return False
    bits = [found.get(split) for split in ("valid", "test")]
    numbers = all(isinstance(one, list) and all(isinstance(value, float) for value in one) for one in bits)
    return numbers and 63 // 8 <= len(bits[0]) == len(bits[1])


def _bits(model: KneserNey, stream: Stream) -> list[float]:
    """Bits per byte by the models of order 1, 2, ..., without the first byte of each document."""
    bits, scored = np.zeros(model.orders), 0
    for start in range(0, len(stream.data), _BLOCK):
        stop = min(start + _BLOCK, len(stream.data))
        counts = _past(stream.ends, start, stop) > 0
        bits -= np.log2(model.probabilities(stream, start, stop)[:, counts]).sum(1)
        scored += counts.sum()
    return (bits / scored).tolist()


def best_order(table: dict[str, list[float]]) -> int:
    """The order that scores best on valid, counted from 1."""
    return int(np.argmin(table["valid"])) + 1


def fit_sentences(sentences: Sequence[bytes], order: int) -> KneserNey:
    """The model of sentences, for `sentence_bits`."""
    return KneserNey(_padded(sentences, order), order)


def sentence_bits(model: KneserNey, sentences: Sequence[bytes]) -> Float64[np.ndarray, "N"]:
    """-log2 p of each sentence and its end of line by a model of `fit_sentences`."""
    stream, total = _padded(sentences, model.orders), np.zeros(len(sentences))
    for start in range(0, len(stream.data), _BLOCK):
        stop = min(start + _BLOCK, len(stream.data))
        scored = _past(stream.ends, start, stop) >= model.orders - 1
        bits = -np.log2(model.probabilities(stream, start, stop)[-1, scored])
        sentence = np.searchsorted(stream.ends, np.arange(start, stop)[scored], "right")
        total += np.bincount(sentence, bits, len(sentences))
    return total


def _padded(sentences: Sequence[bytes], order: int) -> Stream:
    """Documents that begin with so many ends of line that the first byte of a sentence has a whole context.

    Its count is then one of the highest order. Lower orders count contexts, and a sentence's start would be but one.
    """
    documents = [b"\n" * (order - 1) + sentence + b"\n" for sentence in sentences]
    data = np.frombuffer(b"".join(documents), np.uint8)
    return Stream(data, np.cumsum([len(document) for document in documents]))


def main(arguments: list[str]) -> None:
    """The command; raises a UserError for what cannot be done."""
    parser = command.Parser(__doc__, prog="python -m data.ngram")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", description="Fits a model on the train split of a corpus.")
    fit.add_argument("corpus", help="shakespeare, stdlib, file:PATH, tfds:NAME, ...; see data/corpora.py")
    fit.add_argument("--model", required=True, help="the file to write")
    fit.add_argument("--order", type=int, help="the longest n-grams; by default the order that is best on valid")
    fit.add_argument("--data_dir", help="folder of data sets that are read from one")
    fit.add_argument("--download", action="store_true", help="download a TFDS data set that is not prepared")
    score = commands.add_parser("score", description="Prints the perplexities of sentences.")
    score.add_argument("--model", required=True, help="a file that fit wrote")
    score.add_argument("sentences", nargs="+")
    rank = commands.add_parser("rank", description="Prints the lines of a text file, the likeliest first.")
    rank.add_argument("--model", required=True, help="a file that fit wrote")
    rank.add_argument("--keep", type=float, help="print only this fraction of the lines, the best, in their own order")
    rank.add_argument("text", help="the text file")
    options = parser.parse_args(arguments)
    {"fit": _fit, "score": _score, "rank": _rank}[options.command](options)


def _fit(options) -> None:
    check_can_write("--model", options.model)
    corpus = corpora.load(options.corpus, data_dir=options.data_dir, download=options.download)
    splits = {split: _lines(stream.data[:FIT_BYTES].tobytes()) for split, stream in corpus.splits.items()}
    for split, lines in splits.items():
        if not lines:
            raise UserError(f"the {split} split of {corpus.name!r} has no lines; give a longer text")
    print("order  valid bits/byte  test bits/byte  test perplexity/word", flush=True)
    best, model = np.inf, None
    highest = min(ORDERS, 63 // _symbol_bits(_padded(splits["train"], 1).data))
    for order in [options.order] if options.order is not None else range(1, highest + 1):
        candidate = fit_sentences(splits["train"], order)
        valid, test = (sentence_bits(candidate, splits[split]).sum() for split in ("valid", "test"))
        print(
            f"{order:>5}  {valid / sum(len(line) + 1 for line in splits['valid']):15.4f}"
            f"  {test / sum(len(line) + 1 for line in splits['test']):14.4f}"
            f"  {2 ** (test / sum(len(line.split()) + 1 for line in splits['test'])):20.2f}",
            flush=True,
        )
        if valid >= best:  # longer contexts only do worse
            break
        best, model = valid, candidate
    model.save(options.model)
    print(f"{options.model}: order {model.orders}")


def _score(options) -> None:
    # Bytes that are no text stay what they are.
    sentences = [sentence.encode(errors="surrogateescape") for sentence in options.sentences]
    bits = sentence_bits(KneserNey.load(options.model), sentences)
    print("      bits  bits/byte  perplexity/byte  perplexity/word  sentence")
    for sentence, total in zip(sentences, bits, strict=True):
        rate, words = total / (len(sentence) + 1), len(sentence.split()) + 1
        said = sentence.decode(errors="replace")
        print(f"{total:10.2f}  {rate:9.4f}  {2**rate:15.3f}  {2 ** (total / words):15.6g}  {said}")


def _rank(options) -> None:
    if options.keep is not None and not 0 < options.keep <= 1:
        raise UserError(f"--keep={options.keep} is the fraction of the lines to keep: above 0, at most 1")
    path = pathlib.Path(options.text)
    if not path.is_file():
        raise UserError(f"there is no text file {path}")
    lines = _lines(path.read_bytes())
    if not lines:
        raise UserError(f"{path} has no lines to rank")
    rates = sentence_bits(KneserNey.load(options.model), lines) / np.array([len(line) + 1 for line in lines])
    order = np.argsort(rates, kind="stable")
    if options.keep is None:
        output = (f"{rates[i]:.4f}\t".encode() + lines[i] + b"\n" for i in order)
    else:
        output = (lines[i] + b"\n" for i in np.sort(order[: max(1, round(options.keep * len(lines)))]))
    sys.stdout.buffer.writelines(output)


def _lines(text: bytes) -> list[bytes]:
    return [line for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    command.run(main)

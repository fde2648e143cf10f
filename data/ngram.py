"""Interpolated modified Kneser-Ney (Chen and Goodman 1998, section 3): the n-gram floor of a byte-level language model.

    p_N(w | h) = max(c(h w) - D, 0) / c(h .) + gamma(h) p_{N-1}(w | h'),     p_0 = 1/256

with h' = h less its oldest byte and gamma(h) the mass freed by the discounts D, one each for counts of 1, 2, and 3 or
more. At the highest order c counts occurrences; below, c counts the different bytes (or the document's start) seen to
the left. Contexts never reach over the start of a document: there, shorter orders take over. The probabilities of the
256 bytes sum to one in every context.
"""

import json
import pathlib

import numpy as np
from jaxtyping import Float64, UInt8

from data.corpora import Corpus, Stream, write_atomically

BYTES = 256
# Bounds memory, some 100 bytes for each byte of text. Of a longer training split the beginning is used.
FIT_BYTES = 2**25
_BLOCK = 2**20
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
        self._bits = max(1, min(len(seen), BYTES - 1).bit_length())
        self.orders = 63 // self._bits if orders is None else orders
        if not 1 <= self.orders <= 63 // self._bits:
            raise ValueError(f"orders={orders} must be 1 to {63 // self._bits} ({self._bits} bits a symbol, 63 in all)")
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
    starts = np.append(0, ends)
    return position - starts[np.searchsorted(starts, position, "right") - 1]


def bits_per_byte(corpus: Corpus, documents: bool, cache: pathlib.Path) -> dict[str, list[float]]:
    """Bits per byte of valid and test by the models of order 1, 2, ..., fitted on train; kept in the cache.

    What is scored is what a model that reads the bytes is scored on: every byte that has a byte before it, in its
    document where `documents`, else in its split.
    """
    path = cache / "ngram" / f"{corpus.fingerprint[:32]}-{'documents' if documents else 'stream'}-{_VERSION}.json"
    if path.exists():
        return json.loads(path.read_text())
    streams = {
        split: stream if documents else Stream(stream.data, np.array([len(stream.data)]))
        for split, stream in corpus.splits.items()
    }
    model = KneserNey(streams["train"])
    table = {}
    for split in ("valid", "test"):
        stream, bits, scored = streams[split], np.zeros(model.orders), 0
        for start in range(0, len(stream.data), _BLOCK):
            stop = min(start + _BLOCK, len(stream.data))
            counts = _past(stream.ends, start, stop) > 0
            bits -= np.log2(model.probabilities(stream, start, stop)[:, counts]).sum(1)
            scored += counts.sum()
        table[split] = (bits / scored).tolist()
    write_atomically(path, json.dumps(table).encode())
    return table


def best_order(table: dict[str, list[float]]) -> int:
    """The order that scores best on valid, counted from 1."""
    return int(np.argmin(table["valid"])) + 1

"""ListOps of the Long Range Arena: the value of a nested expression of MIN, MAX, MED and SM (sum modulo 10) over digits.

Distribution (google-research/long-range-arena, lra_benchmarks/data/listops.py): a node above depth `max_depth` is an
operation with probability 1/4, else a digit, uniform; an operation has 2 to `max_args` arguments, uniform, and is one of
the four, uniform. Expressions whose number of tokens (operators, digits, closing brackets) lies strictly between
`min_length` and `max_length` are kept. MED is the median rounded down. Parentheses are not tokens; the closing bracket
is X, as both protocols' tokenizers leave it.

Departure: index i of a split draws trees from a stream of its own until one is kept, where the repository draws one
stream, removes duplicates and cuts it in an order that depends on the Python process. For the paper's sizes a duplicate
is practically impossible. The released files are read instead where data_dir is given.
"""

import csv
import inspect
import io
import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from common.errors import UserError, check_choice, check_range
from common.files import Folder, read_bytes
from data import lra
from data.rows import class_row
from data.task import Spec, Task

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = (*map(str, range(10)), *OPERATORS, "X")
CLOSE = TOKENS.index("X")
OPERATION_PROBABILITY = 0.25
SIZES = {"train": 96_000, "valid": 2_000, "test": 2_000}
FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
# Floors are fitted on the first rows of train.
FLOOR_ROWS = 6_000
NESTED = 4  # arguments of the root that are operations; more count as so many
NONE = 10  # in place of a digit
# A row is given up after so many tokens of trees that were thrown away, or `MOST_TREES` times the tokens of the longest that is
# kept: some seconds, where rows of the published size take 1,500 tokens in the mean and 4,000 in the worst of fifty.
MOST_TOKENS, MOST_TREES = 10**7, 100
# Between the default size and the published one, 31 times as long, four levels and five arguments are added.
LEVELS, ARGUMENTS, TIMES = 4, 5, 2000 / 64


class ListOps(Task):
    """Classification of expressions by their value, 0 to 9.

    Args:
      protocol: "lra" (17 ids: padding, 15 tokens, one unused) or "s4" (18 ids: padding, unknown, <eos>, 15 tokens; <eos>
        ends the row).
      length: positions of a row.
      min_length: expressions have more tokens than this.
      max_length: and fewer than this; None for `length`.
      max_depth: levels of a tree, the leaves' included.
      max_args: most arguments of an operation.
      data_dir: folder of the unpacked LRA archive, whose listops-1000 is read (and cut to `length`) instead of drawing
        trees; min_length, max_length, max_depth and max_args are then not used.

    Raises:
      UserError: for sizes that no expression has, or hardly any (also from a row), or a corrupt file.
      UserError: for a file missing in data_dir.
    """

    floors_of_rows = True
    # arXiv 2011.04006; with protocol="s4" the length is 2048 and max_length 2000.
    paper_size: ClassVar[dict] = {"length": 2000, "min_length": 500, "max_depth": 10, "max_args": 10}

    def __init__(
        self,
        protocol: str = "lra",
        length: int = 64,
        min_length: int = 16,
        max_length: int | None = None,
        max_depth: int = 6,
        max_args: int = 5,
        data_dir: Folder | None = None,
    ):
        check_choice("protocol", protocol, lra.PROTOCOLS)
        self._eos = protocol == "s4"
        self._released = data_dir is not None
        self._shift = 3 if self._eos else 1
        self.spec = Spec(
            vocab_size=len(TOKENS) + (3 if self._eos else 2),
            channels=None,
            targets=10,
            objective="classification",
            length=length,
            padded=True,
            unit="row",
        )
        self.min_length, self.max_length = min_length, length if max_length is None else max_length
        self.max_depth, self.max_args = max_depth, max_args
        if data_dir is None:
            self._check_sizes()
            self.name = f"listops/{protocol}/{min_length}-{self.max_length}-d{max_depth}-a{max_args}"
            self._rows = {split: {} for split in SIZES}
            self._sizes = SIZES
            self.expression("train", 0)  # sizes that hardly any tree has are refused here
        else:
            self.name = f"listops/{protocol}/released"
            self._rows = {split: _read(lra.locate(data_dir, f"listops-1000/{FILES[split]}")) for split in SIZES}
            self._sizes = {split: len(rows) for split, rows in self._rows.items()}

    def _check_sizes(self) -> None:
        check_range("max_depth", self.max_depth, 2, 100)
        check_range("max_args", self.max_args, 2)
        longest = _longest(self.max_depth, self.max_args)
        if not 0 <= self.min_length < self.max_length - 3 or self.min_length >= longest:
            raise UserError(
                f"no expression of max_depth={self.max_depth} and max_args={self.max_args} (at most {longest} tokens) need "
                f"have between min_length={self.min_length} and max_length={self.max_length}, both exclusive; keep them "
                "at least 4 apart, and min_length below the longest"
            )
        if self.max_length > self.spec.length:
            raise UserError(
                f"max_length={self.max_length} is more than length={self.spec.length}: expressions would be cut; raise length"
            )
        # Broader trees would be drawn for ever and thrown away.
        check_range("max_args", self.max_args, 2, self.max_length)

    @classmethod
    def at_length(cls, options: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Trees of another length: the bounds grow with it, levels and arguments with its logarithm.

        Raises:
          UserError: for the released files, whose expressions are as long as they are.
        """
        if options.get("data_dir") is not None:
            raise UserError(
                "the released expressions have the lengths that they have: leave data_dir out, or the length"
            )
        used = {key: p.default for key, p in inspect.signature(cls).parameters.items()} | dict(options)
        times = length / used["length"]
        grown = math.log(times) / math.log(TIMES)
        used["min_length"] = int(used["min_length"] * times)
        if used["max_length"] is not None:
            used["max_length"] = int(used["max_length"] * times)
        used["max_depth"] = max(2, used["max_depth"] + round(LEVELS * grown))
        used["max_args"] = max(2, used["max_args"] + round(ARGUMENTS * grown))
        return used | {"length": length}

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return self._sizes[split]

    def expression(self, split: str, index: int) -> tuple[bytes, int]:
        """The tokens, as indices into TOKENS, and the value."""
        rows = self._rows[split]
        # Rows are small and drawing them is not: what was drawn once is kept.
        if index not in rows:
            rows[index] = self._draw(split, index)
        return rows[index]

    def _draw(self, split, index):
        rng = np.random.default_rng([self.splits.index(split), index])
        uniform, drawn = _uniforms(rng), 0
        while drawn < max(MOST_TOKENS, MOST_TREES * self.max_length):
            tokens = bytearray()
            value = self._grow(tokens, 1, uniform)
            if value is not None and len(tokens) > self.min_length:
                return bytes(tokens), value
            drawn += len(tokens)
        raise UserError(
            f"of trees with {drawn:,} tokens, drawn with max_depth={self.max_depth} and max_args={self.max_args}, none has "
            f"between min_length={self.min_length} and max_length={self.max_length} tokens, both exclusive: raise max_depth and "
            "max_args (the published size has 10 and 10 for 500 to 2,000), or lower min_length"
        )

    def _grow(self, tokens: bytearray, depth: int, uniform) -> int | None:
        """Appends a random tree and returns its value, or None as soon as it is too long."""
        if depth == self.max_depth or next(uniform) >= OPERATION_PROBABILITY:
            tokens.append(digit := int(next(uniform) * 10))
            return digit if len(tokens) < self.max_length else None
        operator = int(next(uniform) * 4)
        tokens.append(10 + operator)
        values = []
        for _ in range(2 + int(next(uniform) * (self.max_args - 1))):
            if (value := self._grow(tokens, depth + 1, uniform)) is None:
                return None
            values.append(value)
        tokens.append(CLOSE)
        return evaluate(operator, values) if len(tokens) < self.max_length else None

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        tokens, value = self.expression(split, index)
        ids = np.frombuffer(tokens, np.uint8)[: self.spec.length - self._eos].astype(np.int32) + self._shift
        return class_row(np.append(ids, lra.EOS) if self._eos else ids, value, self.spec.length)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent value; of the most frequent value for the operator at the root; and of a table without
        recursion: the most frequent value for that operator, what it makes of the root's own digits, and how many of the root's
        arguments are operations."""
        fitted, values = self._shallow("train", FLOOR_ROWS)
        held, expected = self._shallow(split, self.num_examples(split))
        counts = np.zeros((len(TOKENS), NONE + 1, NESTED + 1, 10), np.int64)
        np.add.at(counts, (*fitted.T, values), 1)
        root = counts.sum((1, 2)).argmax(-1)
        best = np.where(counts.any(-1), counts.argmax(-1), root[:, None, None])
        return {
            "majority": lra.majority(values, expected),
            "root operator": float(np.mean(root[held[:, 0]] == expected)),
            "root, its digits, nested": float(np.mean(best[tuple(held.T)] == expected)),
        }

    def _shallow(self, split, count):
        rows = [self.expression(split, i) for i in range(min(count, self.num_examples(split)))]
        return np.array([shallow_features(tokens) for tokens, _ in rows]), np.array([value for _, value in rows])

    def content(self) -> str:
        """Of the expressions and values of the released files."""
        if not self._released:
            return ""
        rows = (self.expression(split, i) for split in self.splits for i in range(self.num_examples(split)))
        return lra.digest(*(tokens + bytes([value]) for tokens, value in rows))

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_tokenize(text), np.uint8).astype(np.int32) + self._shift

    def decode(self, ids) -> str:
        known = {i + self._shift: token for i, token in enumerate(TOKENS)}
        unseen = (lra.PAD, lra.EOS) if self._eos else (lra.PAD,)
        return " ".join(known.get(int(i), "?") for i in ids if int(i) not in unseen)


def shallow_features(tokens: bytes) -> tuple[int, int, int]:
    """What can be said of an expression without recursion.

    Returns:
      the token at the root; what it makes of the digits that are its own arguments, `NONE` if it has none or is a digit; and how
      many of its arguments are operations, at most `NESTED`.
    """
    digits, nested, depth = [], 0, 0
    for token in tokens:
        if depth == 1 and token < 10:
            digits.append(token)
        nested += depth == 1 and 10 <= token < CLOSE
        depth += (10 <= token < CLOSE) - (token == CLOSE)
    own = evaluate(tokens[0] - 10, digits) if digits else NONE
    return tokens[0], own, min(nested, NESTED)


def evaluate(operator: int, values: list[int]) -> int:
    """The value of an operation, an index into OPERATORS, on digits."""
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 2:
        ordered, half = sorted(values), len(values) // 2
        return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2
    return sum(values) % 10


def _longest(depth: int, args: int) -> int:
    return 1 if depth == 1 else 2 + args * _longest(depth - 1, args)


def _uniforms(rng):
    while True:
        yield from rng.random(256).tolist()


def _tokenize(text: str) -> bytes:
    """The tokens of an expression as indices into TOKENS; parentheses are dropped.

    Raises:
      UserError: for what is no token.
    """
    words = text.translate({ord("]"): "X", ord("("): None, ord(")"): None}).split()
    try:
        return bytes(TOKENS.index(word) for word in words)
    except ValueError as error:
        unknown = next(word for word in words if word not in TOKENS)
        raise UserError(f"{unknown!r} is no token of ListOps; they are {' '.join(TOKENS)}") from error


def _read(path):
    """Rows (tokens, value) of a released file: a header, then an expression, a tab and its value a line."""
    csv.field_size_limit(sys.maxsize)
    rows = {}
    with io.StringIO(read_bytes(path).decode(errors="replace"), newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                tokens, value = _tokenize(row["Source"]), int(row["Target"])
                if not tokens or not 0 <= value <= 9:
                    raise UserError(f"{len(tokens)} tokens, value {value}")
                rows[len(rows)] = tokens, value
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}, row {len(rows)}: needed are the columns Source, an expression, and Target, a digit ({error})"
                ) from error
    if not rows:
        raise UserError(f"{path} holds no expressions; unpack the archive again")
    return rows

"""The word problem of a finite group: track a state under a sequence of moves ("The Illusion of State", arXiv 2404.08819;
jopetty/word-problem).

Inputs are elements of the group, drawn evenly; the label of position t is the product x_1 x_2 ... x_t, in that order. The
group is a number of factors joined by "_x_": Zn (the integers modulo n), Sn and An (all and the even permutations of n
points, p q being p after q), or "parity", another name for Z2. Element 0 is the identity. A commutative group (Z60) can be
counted; A5 and S5, which are not solvable, need a state that is updated step by step.

Training scores every position, so that one length teaches all shorter ones. Evaluation scores only the last position of a
row, and the accuracy is that of the whole product: an average over positions hides a model that loses the state after the
length that it was trained on (its early positions stay right). With scored="all" evaluation scores every position too, and
the metric is the share of rows without an error, the papers' accuracy of the sequence. `eval.py` prints both.

The papers' form is bos=True, a token before the elements that is not scored, shortest=2, training rows of any number of
elements from there on (the rest is blanks), and scored="all". Their training set is finite, 80 % of 5 million sequences at
most.

No sequence is in two splits: which one it belongs to follows from its hash.
"""

import hashlib
import itertools
import re
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from common.errors import UserError, check_choice
from data.generated import GeneratedTask, majority
from data.rows import token_row
from data.task import Spec

MAX_ORDER = 1000
MIN_SEQUENCES = 4096


class WordProblem(GeneratedTask):
    """Running products in a finite group.

    Args:
      group: "parity", or factors such as "S5", "A5", "Z60", "A4_x_Z5"; of at most 1000 elements.
      length: elements of a row.
      scored: positions that evaluation scores, "last" or "all".
      bos: whether a token stands before the elements, which are then `length` - 1.
      shortest: training rows have from `shortest` elements on to as many as fit, evenly; None for as many as fit.

    Raises:
      UserError: for a group that is unknown or too large, where there are too few sequences to keep some for test, and for a
        `shortest` that does not fit.
    """

    paper_size: ClassVar[dict] = {"group": "A5", "length": 25}  # its form is that of the docstring
    beside: ClassVar[dict] = {"scored": "all"}

    def __init__(
        self,
        group: str = "parity",
        length: int = 16,
        scored: str = "last",
        bos: bool = False,
        shortest: int | None = None,
    ):
        check_choice("scored", scored, ("last", "all"))
        self.table = multiplication_table(group)
        order, elements = len(self.table), length - bos
        if elements < 2 or elements * np.log(order) < np.log(MIN_SEQUENCES):
            raise UserError(
                f"group={group!r} has {order} elements and at length={length} fewer than {MIN_SEQUENCES} sequences, "
                "too few to keep some for test; give a larger length"
            )
        metric = "accuracy" if scored == "last" else "row_accuracy"
        self.name = f"word_problem/{group}"
        if shortest is not None and not 1 <= shortest <= elements:
            raise UserError(f"shortest={shortest} must be 1 to the {elements} elements of a row, or None")
        # Elements, the token before them, and the blank.
        vocab = order + bos + (shortest is not None)
        self.spec = Spec(vocab, None, vocab, "token_labels", length, causal=True, metric=metric)
        self._scored, self._elements, self._bos, self._shortest = scored, elements, bos, shortest

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length = self._elements
        if split == "train" and self._shortest is not None:
            length = int(rng.integers(self._shortest, length + 1))
        while True:
            inputs = rng.integers(len(self.table), size=length, dtype=np.int32)
            # A sixteenth of all sequences each. The hash is no linear function of the elements, as a checksum would be.
            if length < self._elements:  # which no other split has
                break
            byte = hashlib.blake2b(inputs.astype("<i4").tobytes(), digest_size=1).digest()[0]
            if split == ("test" if byte < 16 else "valid" if byte < 32 else "train"):
                break
        scored = np.ones(length, bool)
        if split != "train" and self._scored == "last":
            scored[:-1] = False
        labels, around = products(self.table, inputs), (int(self._bos), self._elements - length)
        inputs = np.pad(inputs, around, constant_values=(len(self.table), self.spec.vocab_size - 1))
        return token_row(inputs, np.pad(labels, around), np.pad(scored, around))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Of the metric: chance; where the last position is scored, the most common element of the split; and of groups that are
        not commutative, of what can be counted: the class of the product modulo the commutators, and a guess inside it."""
        order, positions = len(self.table), self._elements
        # The first product is the first element itself, which costs nothing to know.
        asked = 1 if self._scored == "last" else positions - 1
        found = {"chance": float(order) ** -asked}
        if self._scored == "last":
            found["majority"] = majority(self, split)
        inside = len(commutators(self.table))
        return found | ({"counting": float(inside) ** -asked} if 1 < inside < order else {})


def commutators(table: Int[np.ndarray, "G G"]) -> Int[np.ndarray, "C"]:
    """The subgroup that is generated by all a b a^-1 b^-1."""
    inverse = np.argmin(table, axis=1)  # where the product is the identity, element 0
    found = np.unique(table[table, table[np.ix_(inverse, inverse)]])
    while len(products := np.unique(table[np.ix_(found, found)])) > len(found):
        found = products
    return found


def products(table: Int[np.ndarray, "G G"], elements: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
    """x_1, x_1 x_2, x_1 x_2 x_3, ...: the running products, in log2(T) vectorised steps."""
    result = np.array(elements)
    step = 1
    while step < len(result):
        result[step:] = table[result[:-step], result[step:]]
        step *= 2
    return result


def multiplication_table(group: str) -> Int[np.ndarray, "G G"]:
    """table[a, b] = a b; element 0 is the identity. Elements of a product of groups count like digits, the last fastest."""
    table = np.zeros((1, 1), np.int32)
    for name in ("Z2" if group == "parity" else group).split("_x_"):
        factor = _factor(group, name)
        size = len(table) * len(factor)
        if size > MAX_ORDER:
            raise UserError(f"group={group!r} has more than {MAX_ORDER} elements; give a smaller one")
        a, b = np.divmod(np.arange(size), len(factor))
        table = (table[np.ix_(a, a)] * len(factor) + factor[np.ix_(b, b)]).astype(np.int32)
    return table


def _factor(group: str, name: str) -> np.ndarray:
    match = re.fullmatch(r"([ASZ])([1-9]\d*)", name)
    if not match:
        raise UserError(
            f"group={group!r}: {name!r} is no group; give 'parity', Zn, Sn or An, "
            "or several joined by '_x_', as 'A4_x_Z5'"
        )
    kind, n = match[1], int(match[2])
    if n > {"Z": MAX_ORDER, "S": 6, "A": 6}[kind]:
        raise UserError(f"group={group!r}: {name} has more than {MAX_ORDER} elements; give a smaller one")
    if kind == "Z":
        return np.add.outer(np.arange(n), np.arange(n)) % n
    # In the order of the dictionary, with the identity first.
    elements = np.array([p for p in itertools.permutations(range(n)) if kind == "S" or _even(p)])
    code = n ** np.arange(n)[::-1]
    return np.searchsorted(elements @ code, elements[:, elements] @ code)


def _even(p: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0

"""Formal languages along the Chomsky hierarchy: trained on short strings, tested on long ones (Delétang et al., arXiv 2207.02098;
google-deepmind/neural_networks_chomsky_hierarchy, tasks/).

A row is a string, a token that asks as often as the answer is long, and blanks. Scored are the tokens of the answer, at the
places where they are asked for. Strings have `shortest` to `longest` tokens, evenly; the modulus is 5.

parity_check                 bits: whether there is an odd number of 1s
even_pairs                   bits: whether there is an odd number of 01s and 10s, which is whether the first and the last differ
cycle_navigation             steps left, none, right (0, 1, 2) on a circle of 5: where they end
modular_arithmetic           digits with +, -, * between them, * before + and -: the value; lengths are odd
modular_arithmetic_brackets  nested sums and differences in brackets: the value
solve_equation               such a one with x for a digit, =, and its value: the digit
dyck                         a beginning of a well-nested string of ( and [: what closes it, in order, then an end
stack_manipulation           a stack from its bottom, then pops and pushes: the stack from its top, then an end
reverse_string               bits: the bits in reverse
duplicate_string             bits: the bits twice
missing_duplicate_string     bits twice, one of them hidden (and a blank, where the length is odd): the hidden bit
odds_first                   bits: the second, fourth, ..., then the first, third, ...
binary_addition              two numbers, their lowest bits first, with + between: the sum, without zeros behind it, then an end
binary_multiplication        the same with *: the product, then an end
compute_sqrt                 a number, its highest bit first: the whole part of its root, in half as many bits, rounded up
bucket_sort                  digits: the digits in order

The paper trains on lengths 1 to 40 and tests on 41 to 500, where its score is the accuracy of the tokens averaged over lengths:
the string accuracy of `eval.py --set task.shortest=41 task.longest=500`, while accuracy is of all tokens, of which long answers
have more. All of the paper's fifteen problems are here, and `dyck`, which is not of it.
Departures: lengths are drawn row by row (there, batch by batch). Lengths too short for a problem have the source's stand-ins:
of solve_equation up to 2 zeros and the answer 0, of the two with numbers one number, that is the sum, and the product 0.
"""

import collections
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from common.errors import UserError, check_choice, check_range
from data import metrics
from data.generated import GeneratedTask, majority
from data.rows import token_row
from data.task import MOST_IDS, Spec

MODULUS = 5
PLUS, MINUS, TIMES, OPEN, CLOSE, UNKNOWN, EQUALS = range(MODULUS, MODULUS + 7)
END = 2  # of bits
FIT_ROWS = 2000
PROBLEMS = {  # tokens of strings, labels, tokens of the answer to a string of n tokens at most n * a + b
    "parity_check": (2, 2, 0, 1),
    "even_pairs": (2, 2, 0, 1),
    "cycle_navigation": (3, 5, 0, 1),
    "modular_arithmetic": (MODULUS + 3, MODULUS, 0, 1),
    "modular_arithmetic_brackets": (MODULUS + 5, MODULUS, 0, 1),
    "solve_equation": (MODULUS + 7, MODULUS, 0, 1),
    "dyck": (4, 3, 1, 1),
    "stack_manipulation": (5, 3, 1, 1),
    "reverse_string": (2, 2, 1, 0),
    "duplicate_string": (2, 2, 2, 0),
    "missing_duplicate_string": (4, 2, 0, 1),
    "odds_first": (2, 2, 1, 0),
    "binary_addition": (3, 3, 1, 1),
    "binary_multiplication": (3, 3, 1, 1),
    "compute_sqrt": (2, 2, 1, 0),
    "bucket_sort": (MODULUS, MODULUS, 1, 0),
}


def string_sums(scores, targets, weights):
    """The number of strings that are asked for, and the sum over them of the share of their answer that is right."""
    asked = (weights > 0).sum(1)
    right = ((weights > 0) & metrics.is_correct(scores, targets)).sum(1)
    return {"strings": jnp.sum(asked > 0, dtype=jnp.float32), "shares": jnp.sum(right / jnp.maximum(asked, 1))}


STRING_ACCURACY = metrics.Metric(
    name="string_accuracy",
    **metrics.PERCENT,
    value=lambda sums: sums["shares"] / sums["strings"],
    sums=string_sums,
    of=metrics.CLASSES,
    whole_rows=True,
)


class Chomsky(GeneratedTask):
    """One of the problems of the table above.

    Args:
      problem: its name.
      longest: tokens of the longest strings.
      shortest: tokens of the shortest ones.

    Raises:
      UserError: for an unknown problem, and where there is no length from `shortest` to `longest`.
    """

    paper_size: ClassVar[dict] = {"longest": 40}

    def __init__(self, problem: str = "parity_check", longest: int = 40, shortest: int = 1):
        check_choice("problem", problem, PROBLEMS)
        check_range("longest", longest, 1, MOST_IDS // 4)
        if not 1 <= shortest <= longest:
            raise UserError(f"shortest={shortest} must be 1 to longest={longest}")
        tokens, self._labels, growth, more = PROBLEMS[problem]
        self._problem, self._shortest, self._longest = problem, shortest, longest
        self._ask, self._blank = tokens, tokens + 1
        self.name = f"chomsky/{problem}"
        vocab = tokens + 2
        shown = ("accuracy", "row_accuracy", STRING_ACCURACY)
        self.spec = Spec(vocab, None, vocab, "token_labels", longest * (1 + growth) + more, causal=True, metrics=shown)

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = int(rng.integers(self._shortest, self._longest + 1))
        string, answer = getattr(self, f"_{self._problem}")(rng, size)
        begin, end = len(string), len(string) + len(answer)
        inputs = np.full(self.spec.length, self._blank)
        labels, scored = np.zeros(self.spec.length, np.int64), np.zeros(self.spec.length, bool)
        inputs[:begin], inputs[begin:end] = string, self._ask
        labels[begin:end], scored[begin:end] = answer, True
        return token_row(inputs, labels, scored)

    def _parity_check(self, rng, size):
        bits = rng.integers(2, size=size)
        return bits, [bits.sum() % 2]

    def _even_pairs(self, rng, size):
        bits = rng.integers(2, size=size)
        return bits, [bits[0] ^ bits[-1]]

    def _cycle_navigation(self, rng, size):
        steps = rng.integers(3, size=size)
        return steps, [(steps - 1).sum() % 5]

    def _modular_arithmetic(self, rng, size):
        pairs = (size - 1) // 2
        string = np.empty(2 * pairs + 1, np.int64)
        string[::2] = rng.integers(MODULUS, size=pairs + 1)
        string[1::2] = rng.integers(PLUS, TIMES + 1, size=pairs)
        total, term = 0, int(string[0])
        for operator, digit in zip(string[1::2].tolist(), string[2::2].tolist()):
            if operator == TIMES:
                term = term * digit % MODULUS
            else:
                total, term = total + term, digit if operator == PLUS else -digit
        return string, [(total + term) % MODULUS]

    def _modular_arithmetic_brackets(self, rng, size):
        string, value = _expression(rng, size)
        return string, [value]

    def _solve_equation(self, rng, size):
        if size < 3:
            return np.zeros(size, np.int64), [0]
        string, value = _expression(rng, size - 2)
        place = int(rng.integers(size - 2))
        while string[place] >= MODULUS:
            place = (place + 1) % (size - 2)
        digit = string[place]
        string[place] = UNKNOWN
        return np.append(string, [EQUALS, value]), [digit]

    def _dyck(self, rng, size):
        string, open_ = [], []
        for opens, kind in zip((rng.random(size) < 0.5).tolist(), rng.integers(2, size=size).tolist()):
            if opens or not open_:
                open_.append(kind)
                string.append(kind)
            else:
                string.append(2 + open_.pop())
        return string, [*open_[::-1], 2]

    def _stack_manipulation(self, rng, size):
        filled = int(rng.integers(1, size)) if size > 1 else 1
        string = np.concatenate([rng.integers(2, size=filled), rng.integers(2, 5, size=size - filled)])
        stack = string[:filled].tolist()
        for action in string[filled:].tolist():
            if action > 2:
                stack.append(action - 3)
            elif stack:
                stack.pop()
        return string, [*stack[::-1], 2]

    def _reverse_string(self, rng, size):
        bits = rng.integers(2, size=size)
        return bits, bits[::-1]

    def _duplicate_string(self, rng, size):
        bits = rng.integers(2, size=size)
        return bits, np.tile(bits, 2)

    def _missing_duplicate_string(self, rng, size):
        hidden, blank = 2, 3
        if size == 1:
            return np.ones(1, np.int64), [1]
        string = np.tile(rng.integers(2, size=size // 2), 2)
        place = int(rng.integers(len(string)))
        bit, string[place] = string[place], hidden
        return np.append(string, [blank] * (size % 2)), [bit]

    def _odds_first(self, rng, size):
        bits = rng.integers(2, size=size)
        return bits, np.concatenate([bits[1::2], bits[::2]])

    def _binary_addition(self, rng, size):
        if size < 3:
            bits = _bits(int(rng.integers(2**size - 1)))
            return np.append(bits, [0] * (size - len(bits))), [*bits, END]
        string, one, other = _two_numbers(rng, size)
        return string, [*_bits(one + other), END]

    def _binary_multiplication(self, rng, size):
        if size < 3:
            bits = _bits(int(rng.integers(2**size - 1)))
            return np.append(bits, [0] * (size - len(bits))), [*[0] * (size - 1), END]
        string, one, other = _two_numbers(rng, size)
        return string, [*_bits(one * other), END]

    def _compute_sqrt(self, rng, size):
        bits, number = _number(rng, size)
        root = _bits(math.isqrt(number))
        return bits[::-1], np.pad(root, (0, (size + 1) // 2 - len(root)))[::-1]

    def _bucket_sort(self, rng, size):
        digits = rng.integers(MODULUS, size=size)
        return digits, np.sort(digits)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of any label, of the most common one, and of three tables of `FIT_ROWS` training rows: over the ends of the
        string (its first token and its last two) and the place in the answer (in fifths); over its first four tokens, whether its
        length is odd, and the place (up to the sixth); and over the first and last three tokens and the place, counted from the
        beginning (up to the fourth) and from where the answer is as long as the string."""
        return {
            "chance": 1 / self._labels,
            "majority": majority(self, split),
            "ends and place": self._table(split, lambda string, i, size: (string[0], *string[-2:], 5 * i // size)),
            "beginning and place": self._table(
                split, lambda string, i, size: (*string[:4], len(string) % 2, min(i, 5))
            ),
            "both ends and place": self._table(
                split,
                lambda string, i, size: (string[:3], string[-3:], min(i, 3), max(-3, min(i - len(string), 2))),
            ),
        }

    def _table(self, split, feature):
        """Accuracy of the commonest label of each feature of (string, place in the answer, length of the answer)."""

        def pairs(row):
            (places,) = np.nonzero(row["weights"])
            string = tuple(row["inputs"][: places[0]].tolist())
            return [(feature(string, i, len(places)), row["targets"][place]) for i, place in enumerate(places)]

        counts = collections.defaultdict(lambda: np.zeros(self._labels, np.int64))
        for index in range(FIT_ROWS):
            for key, label in pairs(self.row("train", index, 0, 0)):
                counts[key][label] += 1
        most = sum(counts.values()).argmax()
        said = {key: count.argmax() for key, count in counts.items()}
        return float(np.mean([said.get(key, most) == label for row in self.rows(split) for key, label in pairs(row)]))


def _bits(number: int) -> list[int]:
    """The bits of a number, the lowest first, without zeros behind the highest; of 0 one zero."""
    return [int(bit) for bit in f"{number:b}"[::-1]]


def _number(rng: np.random.Generator, size: int) -> tuple[Int[np.ndarray, "size"], int]:
    """A number from 1 on of at most so many bits, evenly: its bits, the lowest first, with zeros behind them; and itself."""
    bits = rng.integers(2, size=size)
    while not bits.any():
        bits = rng.integers(2, size=size)
    return bits, int("".join(map(str, bits[::-1].tolist())), 2)


def _two_numbers(rng: np.random.Generator, size: int) -> tuple[Int[np.ndarray, "size"], int, int]:
    """Two numbers with an operator between, in `size` tokens, and both of them."""
    first = int(rng.integers(1, size - 1))
    (a, one), (b, other) = _number(rng, first), _number(rng, size - 1 - first)
    return np.concatenate([a, [2], b]), one, other


def _expression(rng: np.random.Generator, size: int) -> tuple[Int[np.ndarray, "size"], int]:
    """The source's grammar: d, -d, (d), (-d), or (left + right) and (left - right) with the lengths of both sides drawn evenly.

    It is written from a list of pieces, since its recursion may be as deep as the string is long.
    """
    string = np.empty(size, np.int64)
    # Where a piece begins, how long it is, and the sign of its value in the whole.
    pieces, value = [(0, size, 1)], 0
    while pieces:
        begin, size, sign = pieces.pop()
        if size < 5:
            digit = int(rng.integers(MODULUS))
            negative = size in (2, 4)
            text = [MINUS] * negative + [digit]
            string[begin : begin + size] = text if size < 3 else [OPEN, *text, CLOSE]
            value += -sign * digit if negative else sign * digit
            continue
        left = int(rng.integers(1, size - 3))
        minus = int(rng.integers(2))
        string[begin], string[begin + size - 1] = OPEN, CLOSE
        string[begin + 1 + left] = MINUS if minus else PLUS
        pieces.append((begin + 1, left, sign))
        pieces.append((begin + 2 + left, size - left - 3, -sign if minus else sign))
    return string, value % MODULUS

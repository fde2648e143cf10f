"""Combination sum: in how many ways do some of the candidates add up to the target?

A row reads  T <target> | <candidate> | <candidate> ... REUSE  (or ONCE): distinct candidates of 2 to limit - 1 in random order,
which may each be used any number of times, or once. A combination is a multiset, whatever its order.

answer="count": the number of combinations modulo 10, by dynamic programming; the candidates are drawn evenly. From 12 or so
candidates on the classes are balanced; of few, most targets have no combination (see the floors).
answer="feasible": whether there is any. Evenly drawn candidates almost always have one, so all of them (or all but one, each
half of the time) are multiples of a divisor from 2 to 5, and rows are drawn until one has the answer that a fair coin chose.
"""

import math
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from common.errors import UserError, check_choice, check_range
from data import generated, numbers
from data.generated import GeneratedTask
from data.rows import class_row
from data.task import Spec

ANSWERS = {"count": 10, "feasible": 2}
REUSES = ("mixed", "always", "never")
TARGET, BAR, REUSE, ONCE = range(4)
DIVISORS = (2, 3, 4, 5)
FIT_ROWS = 4_096
MOST_DRAWS = 10_000
LARGEST = 10**6  # a sum is found by a table of all numbers up to it


class CombinationSum(GeneratedTask):
    """Classification of (target, candidates) by the number of combinations.

    Args:
      length: positions of a row: candidates + 4 for encoding="numbers", and 2 + W + (W + 1) * candidates for "digits", where
        W is the number of digits of the largest number.
      limit: candidates are below it.
      max_target: targets are drawn evenly from the upper half of 0 to max_target - 1.
      reuse: whether candidates may be used again: "mixed" (half of the rows), "always" or "never".
      answer: "count" (10 classes) or "feasible" (2).
      encoding: "numbers" (a token for each) or "digits".

    Raises:
      UserError: for an unknown option, or a length that no number of candidates has or the limit has not enough for.
    """

    # No publication has this task. 65 candidates as numbers, 16 as digits.
    paper_size: ClassVar[dict] = {"length": 69, "limit": 256, "max_target": 400}

    def __init__(
        self,
        length: int = 22,
        limit: int = 64,
        max_target: int = 100,
        reuse: str = "mixed",
        answer: str = "count",
        encoding: str = "numbers",
    ):
        check_choice("reuse", reuse, REUSES)
        check_choice("answer", answer, ANSWERS)
        check_choice("encoding", encoding, numbers.ENCODINGS)
        check_range("limit", limit, 3, LARGEST)
        check_range("max_target", max_target, 4, LARGEST)
        largest = max(limit, max_target) - 1
        self.width = len(str(largest)) if encoding == "digits" else 0
        each, rest = (self.width + 1, self.width + 2) if self.width else (1, 4)
        self.count, left = divmod(length - rest, each)
        if left or self.count < 2:
            near = rest + each * max(2, self.count)
            raise UserError(
                f"length={length} must be {rest} + {each} * candidates for encoding={encoding!r}, and 2 candidates or more; "
                f"use {near} or {near + each}"
            )
        step = DIVISORS[0] if answer == "feasible" else 1
        available = len(range(step, limit, step)) - (step == 1)
        if self.count > available:
            raise UserError(
                f"length={length} has room for {self.count} candidates and limit={limit} leaves {available} for "
                f"answer={answer!r}; lower the length or raise the limit"
            )
        self.name = f"combination_sum/{answer}-{reuse}-{encoding}-{limit}-{max_target}"
        self.spec = Spec(
            4 + (10 if self.width else largest + 1), None, ANSWERS[answer], "classification", length, unit="row"
        )
        self.limit, self.max_target, self.reuse, self.answer = limit, max_target, reuse, answer

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        target, candidates, reuse, label = self.question(rng)
        mode = REUSE if reuse else ONCE
        values = np.append(target, candidates)
        if not self.width:
            return class_row(np.concatenate([[TARGET, values[0] + 4, BAR], values[1:] + 4, [mode]]), label)
        parts = np.full((len(values), self.width + 1), BAR, np.int32)
        parts[0, 0] = TARGET
        parts[:, 1:] = 4 + numbers.digits(values, self.width)
        return class_row(np.append(parts, mode), label)

    def question(self, rng: np.random.Generator) -> tuple[int, Int[np.ndarray, "N"], bool, int]:
        """(target, candidates, whether they may be used again, class)."""
        reuse = bool(rng.integers(2)) if self.reuse == "mixed" else self.reuse == "always"
        if self.answer == "count":
            target = int(rng.integers(self.max_target // 2, self.max_target))
            candidates = 2 + rng.choice(self.limit - 2, self.count, replace=False)
            return target, candidates, reuse, count_modulo(candidates, target, reuse, 10)
        wanted = bool(rng.integers(2))
        for _ in range(MOST_DRAWS):
            target = int(rng.integers(self.max_target // 2, self.max_target))
            candidates = self._with_divisor(rng)
            if feasible(candidates, target, reuse) == wanted:
                return target, candidates, reuse, int(wanted)
        raise UserError(
            f"{MOST_DRAWS} rows of {self.count} candidates below limit={self.limit} for targets below max_target="
            f"{self.max_target} were all {'in' * wanted}feasible; bring limit and max_target nearer to each other"
        )

    def _with_divisor(self, rng):
        """Candidates that are multiples of a divisor, all or all but one."""
        divisors = [d for d in DIVISORS if len(range(d, self.limit, d)) >= self.count]
        divisor = divisors[rng.integers(len(divisors))]
        multiples = divisor * (1 + rng.choice(len(range(divisor, self.limit, divisor)), self.count, replace=False))
        if rng.integers(2):
            others = np.arange(2, self.limit)
            others = others[others % divisor != 0]
            multiples[rng.integers(self.count)] = others[rng.integers(len(others))]
        return multiples

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most common class; of the most common class for the target and the mode, fitted on training rows;
        and, for answer="feasible", of "the common divisor of the candidates divides the target", and of the same of all
        candidates but one, which may be used a few times: a rule without search that is almost always right."""
        counts = np.zeros((self.max_target, 2, self.spec.targets), np.int64)
        for i in range(FIT_ROWS):
            row = self.row("train", i, 0, 0)
            target, _, reuse = self.parse(row["inputs"])
            counts[target, int(reuse), row["targets"]] += 1
        best = counts.argmax(-1)
        right, divides, all_but_one = [], [], []
        for row in self.rows(split):
            target, candidates, reuse = self.parse(row["inputs"])
            right.append(best[target, int(reuse)] == row["targets"])
            divides.append((target % math.gcd(*candidates.tolist()) == 0) == row["targets"])
            all_but_one.append(divisible(target, candidates, reuse) == row["targets"])
        result = {"majority": generated.majority(self, split), "target": float(np.mean(right))}
        if self.answer == "feasible":
            result |= {"common divisor": float(np.mean(divides)), "divisor of all but one": float(np.mean(all_but_one))}
        return result

    def parse(self, inputs: Int[np.ndarray, "T"]) -> tuple[int, Int[np.ndarray, "N"], bool]:
        """(target, candidates, whether they may be used again) of a row."""
        if self.width:
            values = (inputs[:-1].reshape(-1, self.width + 1)[:, 1:] - 4) @ 10 ** np.arange(self.width)[::-1]
        else:
            values = np.delete(inputs[1:-1], 1) - 4
        return int(values[0]), values[1:], bool(inputs[-1] == REUSE)


def divisible(target: int, candidates: Int[np.ndarray, "N"], reuse: bool) -> bool:
    """Whether a divisor of all candidates but one at most divides the target, less that one: once, or as often as it fits."""
    divisor = max((d for d in DIVISORS if np.sum(candidates % d != 0) <= 1), default=1)
    left = [target]
    for odd in candidates[candidates % divisor != 0].tolist():
        left = list(range(target, -1, -odd)) if reuse else [n for n in (target, target - odd) if n >= 0]
    return any(n % divisor == 0 for n in left)


def count_modulo(candidates: Int[np.ndarray, "N"], target: int, reuse: bool, modulus: int) -> int:
    """The number of multisets (reuse) or sets of candidates >= 1 that add up to the target, modulo `modulus`."""
    ways = np.zeros(target + 1, np.int64)
    ways[0] = 1
    for c in candidates[candidates <= target].tolist():
        if reuse:
            # ways[t] += ways[t - c] in rising order of t: a running sum over the numbers of equal remainder.
            columns = np.pad(ways, (0, -len(ways) % c)).reshape(-1, c)
            ways = np.cumsum(columns, 0).ravel()[: target + 1] % modulus
        else:
            ways[c:] = (ways[c:] + ways[:-c]) % modulus
    return int(ways[target] % modulus)


def feasible(candidates: Int[np.ndarray, "N"], target: int, reuse: bool) -> bool:
    """Whether some multiset (reuse) or set of candidates >= 1 adds up to the target."""
    sums, mask = 1, (1 << target + 1) - 1  # bit t: t is a sum
    for c in candidates.tolist():
        shift = c
        while shift <= target:
            sums |= sums << shift & mask
            if not reuse:
                break
            shift *= 2  # up to 1, 3, 7, ... more copies
    return bool(sums >> target & 1)

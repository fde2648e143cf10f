"""Maximum gap: the largest difference of neighbours in the sorted order of a list of integers, which is given unsorted.

Uniform lists have narrow gaps that their length predicts, so each list has one planted: of size limit // 16 + c * step,
with c uniform in 0..9 and step so that the largest is near limit / 4, between two numbers of the list. From these two, walks with
steps below limit // 16 go down and up; the remaining numbers fall anywhere between the walks' ends, outside the gap. The sizes
do not depend on the length, so that a model can be evaluated at others than it was trained at. The class is c, found by the
linear-time bucket method on the whole list.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Int

from common.errors import UserError, check_choice, check_range
from data import generated, numbers
from data.generated import GeneratedTask
from data.rows import class_row
from data.task import MOST_IDS, Spec

CLASSES = 10
FIT_ROWS = 4_096
RANGE_BINS = 16


class MaxGap(GeneratedTask):
    """Classification of lists by their maximum gap, 10 sizes.

    Args:
      length: positions of a row.
      limit: numbers are 0 to limit - 1, at least 64.
      encoding: "numbers" (a token for each number, `length` of them) or "digits" (as many digits as limit - 1 has and a
        separator for each number).

    Raises:
      UserError: for an unknown encoding, a limit too small for ten sizes, or a length that is no list of four numbers or more.
    """

    # No publication has this task; the sizes are those of long-range tasks. Lengths 64, 256, 1024 and 4096 fit both encodings.
    paper_size: ClassVar[dict] = {"length": 1024, "limit": 1000}

    def __init__(self, length: int = 64, limit: int = 256, encoding: str = "numbers"):
        check_choice("encoding", encoding, numbers.ENCODINGS)
        if limit < 64:
            raise UserError(f"limit={limit} must be at least 64, for {CLASSES} sizes of gaps")
        check_range("limit", limit, 64, MOST_IDS)
        self.width = len(str(limit - 1)) if encoding == "digits" else 0
        self.count, rest = divmod(length, self.width + 1)
        if rest or self.count < 4:
            raise UserError(
                f"length={length} must be a multiple of {self.width + 1} for encoding={encoding!r} and limit={limit}, and at "
                "least 4 numbers"
            )
        self.name = f"max_gap/{encoding}-{limit}"
        self.spec = Spec(11 if self.width else limit, None, CLASSES, "classification", length, unit="row")
        self.limit = limit
        self.smallest = limit // 16
        self.step = (limit // 4 - self.smallest) // CLASSES

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        values = self.values(rng)
        label = (maximum_gap(values) - self.smallest) // self.step
        if self.width:
            separated = np.full((self.count, self.width + 1), 10, np.int32)
            separated[:, :-1] = numbers.digits(values, self.width)
            return class_row(separated.ravel(), label)
        return class_row(values, label)

    def values(self, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
        """A shuffled list with a planted gap."""
        gap = self.smallest + self.step * int(rng.integers(CLASSES))
        below = int(rng.integers(self.limit - gap))
        above = below + gap
        # 64 steps, half of limit / 16 in the mean, all but surely leave the range; a shorter walk only leaves the ends emptier.
        down, up = np.cumsum(rng.integers(1, self.smallest, (2, min(64, (self.count - 2) // 2))), 1)
        down, up = below - down, above + up
        walked = np.concatenate([[below, above], down[down >= 0], up[up < self.limit]])
        lowest, highest = walked.min(), walked.max()
        # The integers of lowest..highest that are not inside the gap, counted through.
        fill = rng.integers(lowest, highest - gap + 2, self.count - len(walked))
        fill += (fill > below) * (gap - 1)
        return rng.permutation(np.concatenate([walked, fill]))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most common class, and of the most common class for the list's range (in 16 bins, fitted on
        training rows)."""
        counts = np.zeros((RANGE_BINS, CLASSES), np.int64)
        for i in range(FIT_ROWS):
            row = self.row("train", i, 0, 0)
            counts[self._range_bin(row), row["targets"]] += 1
        best = counts.argmax(1)
        right = [best[self._range_bin(row)] == row["targets"] for row in self.rows(split)]
        return {"majority": generated.majority(self, split), "range": float(np.mean(right))}

    def _range_bin(self, row):
        values = row["inputs"]
        if self.width:
            values = values.reshape(self.count, -1)[:, :-1] @ 10 ** np.arange(self.width)[::-1]
        return int(values.max() - values.min()) * RANGE_BINS // self.limit


def maximum_gap(values: Int[np.ndarray, "N"]) -> int:
    """The largest difference of neighbours in the sorted order of N >= 2 integers, in linear time.

    N numbers have a gap of at least (max - min) / (N - 1); buckets of that width, rounded up, hide no larger one inside.
    """
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low) // (len(values) - 1)))
    bucket = (values - low) // width
    size = (high - low) // width + 1
    first, last = np.full(size, high + 1), np.full(size, -1)
    np.minimum.at(first, bucket, values)
    np.maximum.at(last, bucket, values)
    filled = last >= 0
    # The largest gap lies between the last of a filled bucket and the first of the next; a single value leaves none.
    return int(np.max(first[filled][1:] - last[filled][:-1], initial=0))

"""Maximum gap: the largest difference of neighbours in the sorted order of a list of integers, which is given unsorted.

Uniform lists have narrow gaps that their length predicts, so each list has one planted: of size limit // 16 + c * step,
with c uniform in 0..9 and step so that the largest is near limit / 4, between two numbers of the list. From these two, walks with
steps below limit // 16 go down and up. More numbers, anywhere between the walks' ends but outside the gap, make the distinct ones
as many in all lists: 48 where the limit has room for them. All others repeat these, each with a probability of its own that is
drawn for the list. So no count tells the gap, and moments tell little of it, at no length: lists that fill all of the range tell
it by how many numbers are missing, and even ones by their variance. The sizes do not depend on the length, so that a model can be
evaluated at others than it was trained at. The class is c, found by the linear-time bucket method on the whole list.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from common.errors import UserError, check_choice, check_range
from data import generated, numbers, shallow
from data.generated import GeneratedTask
from data.rows import class_row
from data.task import MOST_IDS, Spec

CLASSES = 10
FIT_ROWS = 4_096
DISTINCT = 48
CONCENTRATION = 0.5  # of the probabilities of repeated numbers, which are Dirichlet distributed


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
        # The integers between the walks' ends that are neither in the gap nor on a walk are counted, and not listed: they may be
        # billions. Counted with those on a walk, a number below the gap is as many as it is above the lower end.
        low, high, left = walked.min(), walked.max(), walked.max() - walked.min() - gap
        taken = np.sort(
            np.where(walked < above, walked - low, walked - low - gap)[(walked != below) & (walked != high)]
        )
        free = left - len(taken)
        more = min(DISTINCT, self.limit // 2, self.count) - len(walked)
        chosen = rng.choice(free, min(max(more, 0), free), replace=False)
        place = chosen + np.searchsorted(taken - np.arange(len(taken)), chosen, "right")
        distinct = np.append(walked, low + place + gap * (low + place >= below))
        weights = rng.gamma(CONCENTRATION, size=len(distinct)) + 1e-12
        again = rng.choice(distinct, self.count - len(distinct), p=weights / weights.sum())
        return rng.permutation(np.append(distinct, again))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most common class, and of logistic regression on the quartiles, range, least, greatest, standard
        deviation and mean of the numbers and their products of two, fitted on training rows."""
        fitted = [self.row("train", i, 0, 0) for i in range(FIT_ROWS)]
        held = list(self.rows(split))
        features = [np.stack([self.moments(row) for row in rows]) for rows in (fitted, held)]
        labels, expected = (np.array([int(row["targets"]) for row in rows]) for rows in (fitted, held))
        train, test = (shallow.polynomial(a, 2) for a in shallow.standardised(*features))
        right = shallow.linear_classifier(train, labels, test) == expected
        return {"majority": generated.majority(self, split), "moments": float(right.mean())}

    def moments(self, row: dict[str, np.ndarray]) -> Float[np.ndarray, "8"]:
        """What a shallow model may know of a row: see `floors`."""
        values = row["inputs"]
        if self.width:
            values = values.reshape(self.count, -1)[:, :-1] @ 10 ** np.arange(self.width)[::-1]
        low, high = values.min(), values.max()
        quartiles = np.quantile(values, [0.25, 0.5, 0.75])
        return np.array([*quartiles, high - low, low, high, values.std(), values.mean()])


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

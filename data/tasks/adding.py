"""The adding problem: the sum of the two marked numbers of a row (Hochreiter and Schmidhuber 1997; the form of Le et al.,
arXiv 1504.00941, as in state-spaces/s4, src/dataloaders/datasets/adding.py).

Channel 0 is a number drawn evenly from [0, 1) at each position. Channel 1 is 1 at one random position of each half of the row,
else 0. The target is the sum of the two numbers that are marked. A model that always says 1 has an rmse of sqrt(1/6) = .408
(a mean squared error of .167, as it is usually reported); one that has forgotten the first number, sqrt(1/12) = .289.

It is a test of memory only where the answer is read from the last position: the mean over positions of a two-sided or even a
pointwise model holds the sum.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask
from data.rows import real_row
from data.task import Spec


class Adding(GeneratedTask):
    """The sum of two marked numbers.

    Args:
      length: of the row, at least 2.

    Raises:
      UserError: for a length that has no two halves.
    """

    sizes: dict[str, int] = {"train": 50_000, "valid": 1_000, "test": 1_000}
    paper_size: ClassVar[dict] = {"length": 1000}

    def __init__(self, length: int = 128):
        if length < 2:
            raise UserError(f"length={length} must be at least 2: a number is marked in each half")
        self.name = "adding"
        self.spec = Spec(None, 2, 1, "regression", length, causal=True)

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        length = self.spec.length
        inputs = np.zeros((length, 2), np.float32)
        inputs[:, 0] = rng.random(length, np.float32)
        marked = [rng.integers(length // 2), rng.integers(length // 2, length)]
        inputs[marked, 1] = 1
        return real_row(inputs, inputs[marked, :1].sum(0), np.ones((), np.float32))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Root mean squared error of saying 1, and of the last marked number plus one half, on the split."""
        errors = []
        for row in self.rows(split):
            last = row["inputs"][row["inputs"][:, 1] == 1, 0][-1]
            errors.append([row["targets"][0] - 1, row["targets"][0] - last - 0.5])
        mean, last = np.sqrt(np.mean(np.square(np.float64(errors)), 0))
        return {"mean": float(mean), "last number": float(last)}

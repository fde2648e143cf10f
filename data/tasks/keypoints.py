"""Keypoints of an image that is read pixel by pixel: the centres of a square, a disc and a cross.

A grey image of side x side pixels, row by row, with a filled square, a disc and an upright cross of random size, brightness
and place, none near the border or another (anti-aliased, Gaussian pixel noise of .05). The targets are the centres, x and y of
the square, the disc and the cross, as fractions of the image less one half: the units of arXiv 2107.11291's code (Jeff-sjtu/
res-loglikelihood-regression), whose losses this task is for. Training labels may be noisy; those of valid and test never are.
"""

import math
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from data import label_noise as labels
from data.generated import GeneratedTask
from data.rows import real_row
from data.task import Spec

SHAPES = ("square", "disc", "cross")
PIXEL_NOISE = 0.05
SPREAD, SHIFT = 0.03, 0.12


class Keypoints(GeneratedTask):
    """Six numbers from a sequence of pixels.

    Args:
      length: pixels, a square number from 256 on.
      label_noise: of the training labels: "clean", or "heavy-tailed", Laplace noise of scale .03 and on a fifth of the numbers
        an excess of .12 in the mean.

    Raises:
      UserError: for an unknown noise, or a length that is no square or too small for three shapes.
    """

    sizes: dict[str, int] = {"train": 50_000, "valid": 1_000, "test": 2_000}
    # No publication has this task; the size is that of the pixel sequences of the field.
    paper_size: ClassVar[dict] = {"length": 1024}

    def __init__(self, length: int = 784, label_noise: str = "clean"):
        check_choice("label_noise", label_noise, labels.NOISES)
        self.side = math.isqrt(max(length, 0))
        if self.side**2 != length or self.side < 16:
            raise UserError(
                f"length={length} must be the number of pixels of a square image of side 16 or more, as 784 = 28 * 28"
            )
        self.name = f"keypoints/{label_noise}"
        self.spec = Spec(None, 1, 2 * len(SHAPES), "regression", length, unit="row")
        self.label_noise = label_noise

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        unit = self.side / 28
        centers = self._centers(rng)
        radius = rng.uniform(2.5 * unit, 3.8 * unit, 3)
        brightness = rng.uniform(0.6, 1, 3)
        dx, dy = np.abs(np.arange(self.side) + 0.5 - centers[..., None]).transpose(1, 0, 2)
        dx, dy = dx[:, None, :], dy[:, :, None]
        # Signed distances from the outlines; within half a pixel of one, a pixel is covered in part.
        arm = radius[2] / 4
        distance = (
            np.maximum(dx[0], dy[0]) - 0.9 * radius[0],
            np.hypot(dx[1], dy[1]) - radius[1],
            np.minimum(
                np.maximum(dx[2] - radius[2], dy[2] - arm),
                np.maximum(dx[2] - arm, dy[2] - radius[2]),
            ),
        )
        covered = np.clip(0.5 - np.stack(distance), 0, 1)
        image = np.max(brightness[:, None, None] * covered, 0) + rng.normal(0, PIXEL_NOISE, (self.side, self.side))
        targets = centers.ravel() / self.side - 0.5
        if split == "train":
            targets = labels.noisy(rng, targets, self.label_noise, SPREAD, SHIFT)
        return real_row(image.reshape(-1, 1), targets, np.ones((), np.float32))

    def _centers(self, rng):
        """[shape, (x, y)] in pixels: no nearer to the border than a shape's size, and the shapes apart."""
        unit = self.side / 28
        while True:
            centers = rng.uniform(4.5 * unit, 23.5 * unit, (16, 3, 2))
            gaps = np.abs(centers - np.roll(centers, 1, 1)).max(-1).min(-1)
            apart = np.flatnonzero(gaps >= 8.5 * unit)
            if len(apart):
                return centers[apart[0]]

    def floors(self, split: str = "test") -> dict[str, float]:
        """Root mean squared error of the training labels' mean and median, of ridge regression on the pixels, and of the
        image's centre of brightness taken for all three."""
        result = labels.floors(self, split, rmse)
        axis = (np.arange(self.side) + 0.5) / self.side - 0.5
        guesses, truth = [], []
        for row in self.rows(split):
            image = row["inputs"].reshape(self.side, self.side).astype(np.float64)
            guesses.append(np.tile([image.sum(0) @ axis, image.sum(1) @ axis], 3) / image.sum())
            truth.append(row["targets"])
        return result | {"centre of brightness": rmse(np.stack(guesses), np.stack(truth))}


def rmse(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Root mean squared error over rows and numbers."""
    return float(np.sqrt(np.mean(np.square(predictions - targets))))

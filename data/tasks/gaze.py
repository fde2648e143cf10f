"""Gaze of a drawn eye that is read pixel by pixel: pitch and yaw in radians.

A grey image of 16 x 24 pixels, row by row: skin, the white between two lids, and on it iris and pupil, which lie where a ball of
8 pixels' radius that is turned by pitch and yaw shows them to a camera in front of it, at 8 (-cos(pitch) sin(yaw), -sin(pitch))
from the eye's centre. The centre moves by up to a pixel, lids and all; opening, tones, light and pixel noise (.05) vary. Pitch
is drawn evenly from +-0.5, yaw from +-0.7. The metric is the mean angle, in degrees, between the directions
(-cos(pitch) sin(yaw), -sin(pitch), -cos(pitch) cos(yaw)). Training labels may be noisy; those of valid and test never are.

The task is for the losses of `models.heads`: under heavy-tailed labels, the squared error fits their mean.
"""

from typing import ClassVar

import numpy as np

from common.errors import check_choice
from data import label_noise as labels
from data.gaze_geometry import angle, direction
from data.generated import GeneratedTask
from data.rows import real_row
from data.task import Spec

HEIGHT, WIDTH = 16, 24
EYEBALL, IRIS, PUPIL = 8.0, 3.2, 1.4
RANGE = np.array([0.5, 0.7])
PIXEL_NOISE = 0.05
SPREAD, SHIFT = 0.06, 0.25
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH] + 0.5


class Gaze(GeneratedTask):
    """Two angles from a sequence of 384 pixels.

    Args:
      label_noise: of the training labels: "clean", or "heavy-tailed", Laplace noise of scale .06 and on a fifth of the angles
        an excess of .25 in the mean.

    Raises:
      UserError: for an unknown noise.
    """

    sizes: dict[str, int] = {"train": 50_000, "valid": 1_000, "test": 2_000}
    paper_size: ClassVar[dict] = {}  # no publication has this task

    def __init__(self, label_noise: str = "clean"):
        check_choice("label_noise", label_noise, labels.NOISES)
        self.name = f"gaze/{label_noise}"
        self.spec = Spec(None, 1, 2, "regression", HEIGHT * WIDTH, unit="row", metric="angular_error")
        self.label_noise = label_noise

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        angles = rng.uniform(-RANGE, RANGE)
        center = np.array([WIDTH / 2, HEIGHT / 2]) + rng.uniform(-1, 1, 2)
        x, y = COLUMNS - center[0], ROWS - center[1]
        upper, lower = rng.uniform([4, 3.5], [6.5, 6])
        # The lids are parabolas that meet 11 pixels from the centre.
        curve = 1 - np.square(x / 11)
        white = _inside(np.maximum(-y - upper * curve, y - lower * curve))
        shown = EYEBALL * direction(angles)[:2]
        r = np.hypot(x - shown[0], y - shown[1])
        skin, sclera, iris, pupil = rng.uniform([0.45, 0.8, 0.2, 0.0], [0.65, 1.0, 0.45, 0.1])
        eye = _over(_over(sclera, iris, _inside(r - IRIS)), pupil, _inside(r - PUPIL))
        light = rng.uniform(0.7, 1.2) + rng.uniform(-0.01, 0.01) * x
        image = light * _over(skin, eye, white) + rng.normal(0, PIXEL_NOISE, x.shape)
        targets = labels.noisy(rng, angles, self.label_noise, SPREAD, SHIFT) if split == "train" else angles
        return real_row(image.reshape(-1, 1), targets, np.ones((), np.float32))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Mean angular error, in degrees, of the training labels' mean and median and of ridge regression on the pixels."""
        return labels.floors(self, split, angular_error)


def _inside(distance):
    """How much of a pixel at a signed distance from an outline lies inside."""
    return np.clip(0.5 - distance, 0, 1)


def _over(below, above, share):
    return below + (above - below) * share


def angular_error(predictions: np.ndarray, targets: np.ndarray) -> float:
    """The mean angle between gazes [N, 2], in degrees."""
    return float(np.mean(angle(predictions, targets)))

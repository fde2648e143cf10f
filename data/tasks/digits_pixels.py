"""Handwritten digits of 8x8 pixels as sequences of 64: scikit-learn's copy of the UCI test set, 1,797 images.

A stand-in for the image tasks that is there without a download; no published number is comparable. The images are
shuffled once, by a fixed permutation, and cut into 1,297, 250 and 250. Pixels, 0 to 16, are divided by 16.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from data import images
from data.rows import class_row
from data.task import Task

HELD = 250


class DigitsPixels(Task):
    """Classification of 8x8 digits, 10 classes, one real channel.


    Raises:
      UserError: without scikit-learn.
    """

    paper_size: ClassVar[dict] = {}  # the images have one size

    def __init__(self):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError("digits_pixels reads scikit-learn's digits: pip install scikit-learn") from error
        self.name = "digits_pixels"
        self.spec = images.spec(64, 10, ids=False)
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        data = images.Pixels(pixels.astype(np.uint8)[order], labels[order])
        cuts = {"train": slice(None, -2 * HELD), "valid": slice(-2 * HELD, -HELD), "test": slice(-HELD, None)}
        self._data = {split: data[cut] for split, cut in cuts.items()}

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._data[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        data = self._data[split]
        return class_row(images.standardised(data.images[index], 0, 16), data.labels[index])

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent class and of the nearest class mean, fitted on train."""
        check_choice("split", split, self.splits)
        return images.floors(self._data["train"], self._data[split])

    def content(self) -> str:
        return images.digest(*self._data.values())

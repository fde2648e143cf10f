"""MNIST-1D (arXiv 2011.14439): ten digit-like templates, padded, scaled, shifted, sheared and noisy, as 40 real numbers.

The data are those of the paper, as the authors' package `mnist1d` makes them with its default arguments and seed 42 (4,000
and 1,000 examples, scaled to variance 1); nothing is downloaded. Valid is the last eighth of their training examples, so
3,500 are trained on where the paper trains on 4,000.
"""

import random
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from data import images
from data.rows import class_row
from data.task import Task


class Mnist1d(Task):
    """Classification of series of 40 numbers, 10 classes.


    Raises:
      UserError: without the package mnist1d.
    """

    paper_size: ClassVar[dict] = {}  # the series have one size

    def __init__(self):
        try:
            from mnist1d.data import get_dataset_args, make_dataset
        except ImportError as error:
            raise UserError(
                f"mnist1d makes its data with the authors' package: pip install mnist1d ({error})"
            ) from error
        self.name = "mnist1d"
        # The package seeds the global generators, which are not ours to change.
        states = random.getstate(), np.random.get_state()
        try:
            made = make_dataset(get_dataset_args())
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        train = images.Pixels(made["x"].astype(np.float32), made["y"])
        test = images.Pixels(made["x_test"].astype(np.float32), made["y_test"])
        size = len(train) * 7 // 8
        self._data = {"train": train[:size], "valid": train[size:], "test": test}
        self.spec = images.spec(train.images.shape[1], 10, ids=False)

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._data[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        data = self._data[split]
        return class_row(data.images[index][:, None], data.labels[index])

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent class and of the nearest class mean, fitted on train."""
        check_choice("split", split, self.splits)
        return images.floors(self._data["train"], self._data[split])

    def content(self) -> str:
        return images.digest(*self._data.values())

"""MNIST as a sequence of 784 pixels (sequential MNIST, Le et al., arXiv 1504.00941), in the order of rows or permuted.

Pixels are 0 to 1, and valid is the tenth of the training images that torch's random_split with seed 42 cuts off, as in
state-spaces/s4 (src/dataloaders/basic.py). Published "permuted MNIST" is of one of two orders:

rows          as they are read
bit_reversal  the places whose bits are those of 0, 1, ..., 1023 in reverse, without those from 784 on: s4's
permuted      a random order, numpy's RandomState(92916).permutation(784), which s4's code names as that of other works
"""

import pathlib
from typing import ClassVar

import numpy as np

from common.errors import check_choice
from common.files import Folder
from data import images, lra
from data.rows import class_row
from data.task import Outline, Task

SIDE = 28
OTHERWISE = (
    "Or give a folder with the four original files ({train,t10k}-{images-idx3,labels-idx1}-ubyte, with .gz or without)."
)


def _bit_reversal() -> np.ndarray:
    bits = 10
    places = np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)])
    return places[places < SIDE * SIDE]


ORDERS = {
    "rows": np.arange(SIDE * SIDE),
    "bit_reversal": _bit_reversal(),
    "permuted": np.random.RandomState(92916).permutation(SIDE * SIDE),
}


class MnistPixels(Task):
    """Classification of handwritten digits, 10 classes, one real channel.

    Args:
      order: of the pixels: "rows", "bit_reversal" or "permuted".
      data_dir: a folder with the four IDX files, .gz or not, or TFDS' folder with mnist prepared as ArrayRecord (reading it
        needs Pillow); None for TFDS' default.

    Raises:
      UserError: for an unknown order, where there is no data, and for a corrupt file.
    """

    paper_size: ClassVar[dict] = {}  # the images have one size

    def __init__(self, order: str = "rows", data_dir: Folder | None = None):
        known = self.outline(order)
        self.name, self.spec = known.name, known.spec
        self._order = ORDERS[order]
        folder = None if data_dir is None else pathlib.Path(data_dir)
        if folder is not None and any(folder.glob("*-idx?-ubyte*")):
            train, test = (images.idx_pixels(folder, split, SIDE, 10) for split in ("train", "t10k"))
        else:
            train, test = (images.tfds_pixels("mnist", split, data_dir, OTHERWISE) for split in ("train", "test"))
        shuffled, size = lra.torch_permutation(len(train), 42), len(train) * 9 // 10
        self._data = {"train": train[shuffled[:size]], "valid": train[shuffled[size:]], "test": test}

    @classmethod
    def outline(cls, order: str, **_) -> Outline:
        check_choice("order", order, ORDERS)
        return Outline(f"mnist_pixels/{order}", images.spec(SIDE * SIDE, 10, ids=False))

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._data[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        data = self._data[split]
        return class_row(images.standardised(data.images[index][self._order], 0, 255), data.labels[index])

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent class, of the nearest class mean and of logistic regression, fitted on train."""
        check_choice("split", split, self.splits)
        return images.floors(self._data["train"], self._data[split])

    def content(self) -> str:
        return images.digest(*self._data.values())

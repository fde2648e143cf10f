"""Fashion-MNIST (arXiv 1708.07747) as a sequence of 784 pixels, row by row: a stand-in for the image tasks.

Pixels are standardised by the mean and deviation of the training images, 72.94 and 90.02 of 255. Valid is the last tenth
of the training images.
"""

import pathlib
from typing import ClassVar

import numpy as np

from common.errors import check_choice
from common.files import Folder
from data import images
from data.rows import class_row
from data.task import Outline, Task

SIDE = 28
MEAN, STD = 72.94, 90.02
DEBIAN = "/usr/share/datasets/fashion-mnist"
OTHERWISE = (
    "Or give a folder with the four original files ({train,t10k}-{images-idx3,labels-idx1}-ubyte, packed with gzip or not) "
    "from github.com/zalandoresearch/fashion-mnist, or install Debian's package dataset-fashion-mnist."
)


class FashionMnistPixels(Task):
    """Classification of pictures of clothes, 10 classes, one real channel.

    Args:
      data_dir: a folder with the four IDX files, .gz or not, or TFDS' folder with fashion_mnist prepared as ArrayRecord
        (reading it needs Pillow); None for the folder of Debian's package, else TFDS' default.

    Raises:
      UserError: where there is no data.
      UserError: for a corrupt file.
    """

    paper_size: ClassVar[dict] = {}  # the images have one size

    def __init__(self, data_dir: Folder | None = None):
        self.name = "fashion_mnist_pixels"
        self.spec = images.spec(SIDE * SIDE, 10, ids=False)
        folder = pathlib.Path(DEBIAN if data_dir is None else data_dir)
        if any(folder.glob("*-idx?-ubyte*")):
            train, test = (images.idx_pixels(folder, split, SIDE, 10) for split in ("train", "t10k"))
        else:
            train = images.tfds_pixels("fashion_mnist", "train", data_dir, OTHERWISE)
            test = images.tfds_pixels("fashion_mnist", "test", data_dir, OTHERWISE)
        size = len(train) * 9 // 10
        self._data = {"train": train[:size], "valid": train[size:], "test": test}

    @classmethod
    def outline(cls, **_) -> Outline:
        return Outline("fashion_mnist_pixels", images.spec(SIDE * SIDE, 10, ids=False))

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._data[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        data = self._data[split]
        return class_row(images.standardised(data.images[index], MEAN, STD), data.labels[index])

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent class and of the nearest class mean, fitted on train."""
        check_choice("split", split, self.splits)
        return images.floors(self._data["train"], self._data[split])

    def content(self) -> str:
        return images.digest(*self._data.values())

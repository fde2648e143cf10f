"""Image of the Long Range Arena: CIFAR-10 in grey as a sequence of 1024 pixels, row by row.

lra   pixels are token ids 0 to 255; valid is the last tenth of train.
s4    one real channel, (x - 122.6) / 61 with x from 0 to 255; valid is the tenth that torch's random_split with seed 42 cuts
      off, the same images as in state-spaces/s4 where the original archive is read.

Grey is ITU-R 601, rounded to the nearest level; TensorFlow and Pillow round differently from it by at most one level.
Departures: all 10,000 test images are scored (the LRA repository drops the last, partial batch), and black pixels are
pixels. With the original archive, lra's valid is its last 5,000 training images, with TFDS those of TFDS' order.
"""

import pathlib
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder, read_bytes
from data import images, lra
from data.rows import class_row
from data.task import Outline, Task

SIDE = 32
MEAN, STD = 122.6, 61.0
FOLDER = "cifar-10-batches-bin"
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
OTHERWISE = f"Or unpack {ARCHIVE} and give the folder that holds {FOLDER}."


class Image(Task):
    """Classification of grey CIFAR-10 images, 10 classes.

    Args:
      protocol: "lra" or "s4".
      data_dir: a folder that holds cifar-10-batches-bin (the original archive), or TFDS' folder with cifar10 prepared as
        ArrayRecord (reading it needs Pillow); None for TFDS' default.

    Raises:
      UserError: where there is no data.
      UserError: for a corrupt file.
    """

    paper_size: ClassVar[dict] = {}  # the images have one size

    def __init__(self, protocol: str = "lra", data_dir: Folder | None = None):
        check_choice("protocol", protocol, lra.PROTOCOLS)
        self.name = f"image/{protocol}"
        self._ids = protocol == "lra"
        self.spec = images.spec(SIDE * SIDE, 10, self._ids)
        folder = None if data_dir is None else pathlib.Path(data_dir) / FOLDER
        if folder is not None and folder.is_dir():
            train, test = _archive(folder, range(1, 6)), _archive(folder, ["test"])
        else:
            train = images.tfds_pixels("cifar10", "train", data_dir, OTHERWISE)
            test = images.tfds_pixels("cifar10", "test", data_dir, OTHERWISE)
        size = len(train) * 9 // 10
        order = np.arange(len(train)) if self._ids else lra.torch_permutation(len(train), 42)
        self._data = {"train": train[order[:size]], "valid": train[order[size:]], "test": test}

    @classmethod
    def outline(cls, protocol: str, **_) -> Outline:
        check_choice("protocol", protocol, lra.PROTOCOLS)
        return Outline(f"image/{protocol}", images.spec(SIDE * SIDE, 10, ids=protocol == "lra"))

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._data[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        pixels = self._data[split].images[index]
        inputs = pixels.astype(np.int32) if self._ids else images.standardised(pixels, MEAN, STD)
        return class_row(inputs, self._data[split].labels[index])

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent class and of the nearest class mean, fitted on train."""
        check_choice("split", split, self.splits)
        return images.floors(self._data["train"], self._data[split])

    def content(self) -> str:
        return images.digest(*self._data.values())


def _archive(folder, batches):
    """Records of one byte, the class, and 3 * 1024, the red, green and blue planes."""
    record = 1 + 3 * SIDE * SIDE
    parts = []
    for batch in batches:
        path = folder / ("test_batch.bin" if batch == "test" else f"data_batch_{batch}.bin")
        if not path.exists():
            raise UserError(f"{path} is missing: unpack {ARCHIVE} again")
        content = np.frombuffer(read_bytes(path), np.uint8)
        if not len(content) or len(content) % record or content[::record].max() > 9:
            raise UserError(f"{path} is corrupt: it is no sequence of {record}-byte records; unpack {ARCHIVE} again")
        records = content.reshape(-1, record)
        parts.append((images.grey(records[:, 1:].reshape(-1, 3, SIDE * SIDE).swapaxes(1, 2)), records[:, 0]))
    return images.Pixels(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

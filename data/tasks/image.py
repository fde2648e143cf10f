"""Image of the Long Range Arena: CIFAR-10 in grey, or in colour, as a sequence of 1024 pixels, row by row.

lra   pixels are token ids 0 to 255; valid is the last tenth of train.
s4    one real channel, (x - 122.6) / 61 with x from 0 to 255; valid is the tenth that torch's random_split with seed 42 cuts
      off, the same images as in state-spaces/s4 where the original archive is read. With channels="rgb" three channels
      (sequential CIFAR in colour, as LRU and S4 have it), less the mean and by the deviation of each, s4's.

Grey is ITU-R 601, rounded to the nearest level; TensorFlow and Pillow round differently from it by at most one level.
Departures: all 10,000 test images are scored (the LRA repository drops the last, partial batch), and black pixels are
pixels. With the original archive, lra's valid is its last 5,000 training images, with TFDS those of TFDS' order.
"""

import io
import pathlib
import pickle
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder, read_bytes
from data import images, lra
from data.rows import class_row
from data.task import Outline, Task

SIDE = 32
MEAN, STD = 122.6, 61.0
COLOUR_MEAN, COLOUR_STD = np.array([0.4914, 0.4822, 0.4465]), np.array([0.247, 0.243, 0.261])  # of 1
FOLDER = "cifar-10-batches-bin"
PYTHON = "cifar-10-batches-py"  # the archive for Python: pickles, of which nothing but arrays and lists is read
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
OTHERWISE = f"Or unpack {ARCHIVE} and give the folder that holds {FOLDER} (or {PYTHON})."


class Image(Task):
    """Classification of grey CIFAR-10 images, 10 classes.

    Args:
      protocol: "lra" or "s4".
      data_dir: a folder that holds cifar-10-batches-bin (the original archive) or cifar-10-batches-py, or TFDS' folder with
        cifar10 prepared as ArrayRecord (reading it needs Pillow); None for TFDS' default.
      channels: "grey" or, with protocol="s4", "rgb".

    Raises:
      UserError: where there is no data; for colour in the lra protocol.
      UserError: for a corrupt file.
    """

    paper_size: ClassVar[dict] = {}  # the images have one size

    def __init__(self, protocol: str = "lra", data_dir: Folder | None = None, channels: str = "grey"):
        known = self.outline(protocol, channels)
        self.name, self.spec = known.name, known.spec
        self._ids, self._colour = protocol == "lra", channels == "rgb"
        folder = None if data_dir is None else pathlib.Path(data_dir) / FOLDER
        plain = None if data_dir is None else pathlib.Path(data_dir) / PYTHON
        if folder is not None and folder.is_dir():
            train, test = (_archive(folder, batches, self._colour) for batches in (range(1, 6), ["test"]))
        elif plain is not None and plain.is_dir():
            train, test = (_pickles(plain, batches, self._colour) for batches in (range(1, 6), ["test"]))
        else:
            train = images.tfds_pixels("cifar10", "train", data_dir, OTHERWISE, self._colour)
            test = images.tfds_pixels("cifar10", "test", data_dir, OTHERWISE, self._colour)
        size = len(train) * 9 // 10
        order = np.arange(len(train)) if self._ids else lra.torch_permutation(len(train), 42)
        self._data = {"train": train[order[:size]], "valid": train[order[size:]], "test": test}

    @classmethod
    def outline(cls, protocol: str, channels: str, **_) -> Outline:
        check_choice("protocol", protocol, lra.PROTOCOLS)
        check_choice("channels", channels, ("grey", "rgb"))
        if channels == "grey":
            return Outline(f"image/{protocol}", images.spec(SIDE * SIDE, 10, ids=protocol == "lra"))
        if protocol == "lra":
            raise UserError("channels='rgb' is three real channels: it needs protocol='s4'")
        return Outline("image/s4/rgb", images.spec(SIDE * SIDE, 10, ids=False, channels=3))

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._data[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        pixels = self._data[split].images[index]
        if self._colour:
            inputs = (pixels.reshape(-1, 3) / 255 - COLOUR_MEAN) / COLOUR_STD
            return class_row(inputs, self._data[split].labels[index])
        inputs = pixels.astype(np.int32) if self._ids else images.standardised(pixels, MEAN, STD)
        return class_row(inputs, self._data[split].labels[index])

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent class and of the nearest class mean, fitted on train."""
        check_choice("split", split, self.splits)
        return images.floors(self._data["train"], self._data[split])

    def content(self) -> str:
        return images.digest(*self._data.values())


def _archive(folder, batches, colour):
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
        parts.append((_levels(records[:, 1:], colour), records[:, 0]))
    return images.Pixels(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _pickles(folder, batches, colour):
    """Dictionaries with the planes b"data" [N, 3 * 1024] and the classes b"labels"."""
    parts = []
    for batch in batches:
        path = folder / ("test_batch" if batch == "test" else f"data_batch_{batch}")
        if not path.exists():
            raise UserError(f"{path} is missing: unpack cifar-10-python.tar.gz again")
        try:
            found = _Arrays(io.BytesIO(read_bytes(path)), encoding="bytes").load()
            data, labels = np.asarray(found[b"data"]), np.asarray(found[b"labels"])
            whole = data.dtype == np.uint8 and data.shape == (len(labels), 3 * SIDE * SIDE) and len(labels)
            if not whole or not 0 <= labels.min() <= labels.max() <= 9:
                raise ValueError(f"data {data.shape} and {len(labels)} labels")
        except (pickle.UnpicklingError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is corrupt ({error}); unpack cifar-10-python.tar.gz again") from error
        parts.append((_levels(data, colour), labels))
    return images.Pixels(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class _Arrays(pickle.Unpickler):
    """Reads arrays and what Python has built in, and calls nothing else."""

    KNOWN = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode")

    def find_class(self, module, name):
        if module.partition(".")[0] in ("numpy", "_codecs") and name in self.KNOWN:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _levels(planes, colour):
    """Grey levels [N, 1024], or red, green and blue in turn [N, 3 * 1024], of red, green and blue planes [N, 3 * 1024]."""
    rgb = planes.reshape(-1, 3, SIDE * SIDE).swapaxes(1, 2)
    return rgb.reshape(len(rgb), -1) if colour else images.grey(rgb)

"""Images as sequences of pixels, row by row, and the formats that they are stored in."""

import gzip
import pathlib
import zlib

import numpy as np

from common.errors import UserError
from data import lra, shallow
from data.task import Spec

FIT_ROWS = 10_000


class Pixels:
    """Labelled images or series of one split: images [N, positions], uint8 (grey) or float32; labels int64 [N]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images.reshape(len(images), -1), labels.astype(np.int64)

    def __getitem__(self, rows: slice | np.ndarray) -> "Pixels":
        return Pixels(self.images[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


def spec(length: int, classes: int, ids: bool, channels: int = 1) -> Spec:
    """The spec of images of `length` pixels, as ids 0 to 255 or as real channels."""
    return Spec(
        vocab_size=256 if ids else None,
        channels=None if ids else channels,
        targets=classes,
        objective="classification",
        length=length,
        unit="row",
    )


def standardised(pixels: np.ndarray, mean: float, std: float) -> np.ndarray:
    """float32 [length, 1]: (pixels - mean) / std."""
    return ((pixels.astype(np.float32) - np.float32(mean)) / np.float32(std))[:, None]


def floors(train: Pixels, held: Pixels) -> dict[str, float]:
    """Accuracy of the most frequent class, of the class whose mean training image is nearest (Euclidean), and of logistic
    regression on the pixels (of the first `FIT_ROWS` images)."""
    classes = np.unique(train.labels)
    means = np.stack([train.images[train.labels == c].mean(0) for c in classes])
    # |x - m|^2 less |x|^2, which is the same for all classes.
    distance = (means**2).sum(1) - 2 * held.images.astype(np.float64) @ means.T
    few = train[:FIT_ROWS]
    linear = shallow.linear_classifier(np.float64(few.images), few.labels, np.float64(held.images))
    return {
        "majority": lra.majority(train.labels, held.labels),
        "nearest class mean": float(np.mean(classes[distance.argmin(1)] == held.labels)),
        "logistic regression": float(np.mean(linear == held.labels)),
    }


def digest(*splits: Pixels) -> str:
    """SHA-256 of the images and labels."""
    return lra.digest(*(part for split in splits for part in (split.images, split.labels.astype("<i8"))))


def grey(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma of uint8 [..., 3], rounded: uint8 [...]."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)


def read_idx(folder: pathlib.Path, name: str) -> np.ndarray:
    """The uint8 array of an IDX file `name` or `name`.gz in a folder.

    Raises:
      UserError: if there is neither.
      UserError: for a file that is no whole IDX file of bytes.
    """
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
    if not found:
        raise UserError(f"{folder / name} is missing, and so is {name}.gz")
    try:
        content = found[0].read_bytes()
        content = gzip.decompress(content) if found[0].suffix == ".gz" else content
        # Two zeros, the type (8: unsigned bytes), the number of dimensions, then each of them, big-endian.
        if content[:3] != b"\0\0\x08":
            raise UserError("it does not begin as an IDX file of bytes")
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise UserError(f"{found[0]} is corrupt ({error}); fetch it again") from error


def idx_pixels(folder: pathlib.Path, split: str, side: int, classes: int) -> Pixels:
    """The images and labels of `split`, "train" or "t10k", of MNIST's four files.

    Raises:
      UserError: for files that are missing, corrupt or of other images.
    """
    pixels = read_idx(folder, f"{split}-images-idx3-ubyte")
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte")
    if pixels.shape != (len(labels), side, side) or not len(labels) or labels.max() >= classes:
        raise UserError(
            f"{folder}: the {split} images are {pixels.shape} and their labels {labels.shape}; needed are "
            f"[N, {side}, {side}] and [N] with labels 0 to {classes - 1}; fetch the files again"
        )
    return Pixels(pixels, labels)


def read_png(path: pathlib.Path) -> np.ndarray:
    """The grey levels of an image file: uint8 [height, width].

    Raises:
      UserError: for a file that is no image, and without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("reading PNG files needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); unpack the archive again") from error


def tfds_source(name: str, split: str, data_dir: str | None, otherwise: str):
    """The examples of a prepared TFDS data set, by index; `otherwise` says what else the user can do.

    Raises:
      UserError: where the data set is not prepared in data_dir as ArrayRecord. Nothing is downloaded.
    """
    # Slow to import, and only needed here.
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record").as_data_source(split=split)
    except Exception as error:  # TFDS reports what it misses through dozens of types, and pages long
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"TFDS {name!r} has no prepared split {split!r} in {data_dir or 'its default folder'} "
            f"({type(error).__name__}: {reason}). Prepare it where TensorFlow is installed (tfds build {name} "
            f"--file_format=array_record) and give its folder as data_dir. {otherwise}"
        ) from error


def tfds_pixels(name: str, split: str, data_dir: str | None, otherwise: str, colour: bool = False) -> Pixels:
    """A TFDS data set's split of images [height, width, 1 or 3], read whole, in grey or in colour; errors as `tfds_source`."""
    source = tfds_source(name, split, data_dir, otherwise)
    images, labels = [], []
    for i in range(len(source)):
        example = source[i]
        image = np.asarray(example["image"])
        images.append(image if colour else grey(image) if image.shape[-1] == 3 else image[..., 0])
        labels.append(int(example["label"]))
    return Pixels(np.stack(images), np.array(labels))

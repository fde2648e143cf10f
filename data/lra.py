"""What the tasks of the Long Range Arena (arXiv 2011.04006) share: protocols, splits and where the archive lies.

Published numbers follow one of two protocols that are not comparable, so a task's name says which one it follows:

lra   the preprocessing of google-research/long-range-arena: bytes, pixels as token ids, no end-of-sequence token
s4    the one of state-spaces/s4 that S4, S5, LRU, MEGA and later papers use: characters, pixels as real numbers, <eos>

The first repository hides black pixels and the first token from the model as if they were padding; here padding is
padding (segment id 0) in both protocols and nothing else is.
"""

import hashlib
import pathlib

import numpy as np

from common.errors import UserError

PROTOCOLS = ("lra", "s4")
PAD, UNKNOWN, EOS = 0, 1, 2  # of the s4 protocol; lra has PAD only
ARCHIVE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"


def byte_ids(text: bytes, length: int) -> np.ndarray:
    """Ids of the lra protocol, int32: byte + 1, cut to `length`."""
    return np.frombuffer(text[:length], np.uint8).astype(np.int32) + 1


def majority(fitted: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on `labels` of the most frequent of the labels `fitted`."""
    return float(np.mean(labels == np.bincount(fitted).argmax()))


def torch_permutation(size: int, seed: int) -> np.ndarray:
    """int64 [size]: what torch.randperm gives on a CPU for a generator of that seed, and so the order of random_split.

    PyTorch walks the list from the front and swaps each element with one drawn from the rest, by 32-bit words of the
    Mersenne twister modulo the number left.
    """
    words = np.random.RandomState(seed).randint(0, 2**32, size - 1, np.uint32).astype(np.int64)
    order = list(range(size))
    for i, step in enumerate((words % np.arange(size, 1, -1)).tolist()):
        order[i], order[i + step] = order[i + step], order[i]
    return np.asarray(order)


def locate(data_dir: str, path: str) -> pathlib.Path:
    """A file or folder of the unpacked archive; data_dir is lra_release/ or a folder above or inside it.

    The archive holds a second lra_release/ inside the first, which is the good one: the outer one's labels of
    pathfinder128 are wrong (issue 38 of google-research/long-range-arena).

    Raises:
      UserError: where it is missing.
    """
    folder = pathlib.Path(data_dir)
    for inside in ("lra_release/lra_release", "lra_release", "."):
        if (folder / inside / path).exists():
            return folder / inside / path
    raise UserError(
        f"{folder / path} is missing: fetch {ARCHIVE} (see github.com/google-research/long-range-arena), unpack it with "
        "tar -xf, and give the folder lra_release as data_dir"
    )


def digest(*parts: bytes | np.ndarray | str) -> str:
    """SHA-256 of the parts one after the other, in hexadecimal."""
    result = hashlib.sha256()
    for part in parts:
        result.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return result.hexdigest()

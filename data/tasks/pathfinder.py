"""Pathfinder and Path-X of the Long Range Arena: whether two discs lie on one dashed contour, read pixel by pixel.

Side 32 is Pathfinder (1,024 positions), 128 Path-X (16,384), 256 Path-256 (65,536), and 64 lies between. Contours have 6 dashes
("easy"), 9 ("intermediate") or 14 ("hard", which is what is published).

lra   pixels are token ids 0 to 255.
s4    one real channel, 0 to 1.

source="archive" reads the released images, 80/10/10 %, in both protocols by the split of state-spaces/s4 (torch's
random_split with seed 42): the order in which TFDS stored them for the LRA repository cannot be had without its builder.
source="generated" draws images like them without any file (data/pathfinder.py) and keeps them in the cache; they are not the
released ones, their splits are smaller where they are scored, and the name of the task says so.
"""

import io
import os
import pathlib
from typing import ClassVar

import numpy as np

from common.console import say
from common.errors import UserError, check_choice
from common.files import Folder, read_bytes
from data import images, lra, pathfinder
from data.rows import class_row
from data.task import Task

CONTOURS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}


class Pathfinder(Task):
    """Classification of images: two discs on two contours (0) or on one (1).

    Args:
      protocol: "lra" or "s4".
      source: "generated" or "archive".
      side: 32, 64, 128 or 256.
      data_dir: the unpacked LRA archive, for source="archive" (which needs Pillow).
      cache_dir: for images that are drawn; None for the environment's MIXOLOGY_CACHE, else ~/.cache/mixology.
      difficulty: "easy", "intermediate" or "hard".

    Raises:
      UserError: for an unknown source, side or difficulty, a missing data_dir or a corrupt file.
      UserError: for a missing file.
    """

    paper_size: ClassVar[dict] = {"source": "archive", "side": 32}  # arXiv 2011.04006; Path-X has side 128

    def __init__(
        self,
        protocol: str = "lra",
        source: str = "generated",
        side: int = 32,
        data_dir: Folder | None = None,
        cache_dir: Folder | None = None,
        difficulty: str = "hard",
    ):
        check_choice("difficulty", difficulty, CONTOURS)
        check_choice("protocol", protocol, lra.PROTOCOLS)
        check_choice("source", source, ("generated", "archive"))
        if side not in pathfinder.PARAMETERS:
            raise UserError(f"side={side} must be one of {', '.join(map(str, pathfinder.PARAMETERS))}")
        if (source == "archive") != (data_dir is not None):
            raise UserError(
                f"source={source!r} and data_dir={data_dir!r} do not fit: source='archive' needs the folder lra_release of "
                f"{lra.ARCHIVE}, fetched and unpacked, as data_dir, and source='generated' reads none"
            )
        self.name = f"pathfinder{side}/{protocol}/{source}" + ("" if difficulty == "hard" else f"/{difficulty}")
        self.side = side
        self._ids = protocol == "lra"
        self.spec = images.spec(side * side, 2, self._ids)
        self._generated = source == "generated"
        if self._generated:
            self._drawn = pathfinder.drawn(side, cache_dir, difficulty)
            self.fingerprint_rows = 3  # a large image takes a quarter of a second
            self._sizes = pathfinder.SIZES
        else:
            self._folder = lra.locate(data_dir, f"pathfinder{side}/{CONTOURS[difficulty]}")
            paths, labels, self._sha256 = _metadata(self._folder)
            empty = _empty(self._folder, paths)
            if empty.any():
                names = [path for path, none in zip(paths, empty) if none]
                say(f"{self._folder}: {len(names)} images are empty and left out: {', '.join(names[:5])}")
                paths, labels = [path for path, none in zip(paths, empty) if not none], labels[~empty]
            if len(paths) < 10:
                raise UserError(
                    f"{self._folder} has {len(paths)} images, too few for three splits: unpack {lra.ARCHIVE} again"
                )
            order, held = lra.torch_permutation(len(paths), 42), len(paths) // 10
            cuts = np.split(order, [len(paths) - 2 * held, len(paths) - held])
            self._paths = {split: [paths[i] for i in cut] for split, cut in zip(self.splits, cuts, strict=True)}
            self._labels = {split: labels[cut] for split, cut in zip(self.splits, cuts, strict=True)}
            self._sizes = {split: len(cut) for split, cut in zip(self.splits, cuts, strict=True)}

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return self._sizes[split]

    def pixels(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """The image, uint8 [side * side], and the label of a row."""
        if not self._generated:
            path = self._folder / self._paths[split][index]
            image = images.read_png(path)
            if image.shape != (self.side, self.side):
                raise UserError(f"{path} has the shape {image.shape}, not {self.side} by {self.side}; unpack it again")
            return image.reshape(-1), int(self._labels[split][index])
        drawn = np.frombuffer(self._drawn[split][index], np.uint8)
        return drawn[:-1], int(drawn[-1])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        pixels, label = self.pixels(split, index)
        return class_row(pixels.astype(np.int32) if self._ids else images.standardised(pixels, 0, 255), label)

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the class that is most frequent in train; of generated images, whose labels are fair coins, 1/2."""
        check_choice("split", split, self.splits)
        if self._generated:
            return {"chance": 0.5}
        return {"majority": lra.majority(self._labels["train"], self._labels[split])}

    def content(self) -> str:
        """Of the archive's lists of images and labels; of its 200,000 files only those of the fingerprint's rows are read."""
        return "" if self._generated else self._sha256


def _empty(folder: pathlib.Path, paths: list[str]) -> np.ndarray:
    """Which files have no bytes, as some of the archive's have; the LRA repository leaves them out, too."""
    sizes = {}
    for inner in sorted({path.rpartition("/")[0] for path in paths}):
        if (folder / inner).is_dir():
            with os.scandir(folder / inner) as entries:
                sizes |= {f"{inner}/{entry.name}": entry.stat().st_size for entry in entries}
    return np.array([sizes.get(path) == 0 for path in paths], bool)  # what is missing is said when it is read


def _metadata(folder: pathlib.Path) -> tuple[list[str], np.ndarray, str]:
    """Paths below `folder`, labels int64 and the SHA-256 of the lists metadata/<n>.npy, in order of n.

    They are text in the archive, and arrays of texts as the generator (drewlinsley/pathfinder) writes them now.

    A line's fields are the folder, the file, a number, the label and the parameters of the image, separated by blanks.
    """
    lists = sorted((folder / "metadata").glob("*.npy"), key=lambda path: int(path.stem))
    if not lists:
        raise UserError(f"{folder / 'metadata'} holds no lists of images (*.npy): unpack {lra.ARCHIVE} again")
    paths, labels, contents = [], [], []
    for path in lists:
        contents.append(read_bytes(path))
        for number, line in enumerate(_lines(path, contents[-1]), 1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise UserError(
                    f"{path}, line {number}: it should hold a folder, a file, a number and a label, 0 or 1, but is "
                    f"{line[:80]!r}; unpack {lra.ARCHIVE} again"
                )
            paths.append(f"{fields[0]}/{fields[1]}")
            labels.append(int(fields[3]))
    return paths, np.array(labels), lra.digest(*contents)


def _lines(path: pathlib.Path, content: bytes) -> list[str]:
    if not content.startswith(np.lib.format.MAGIC_PREFIX):
        return content.decode(errors="replace").splitlines()
    try:
        table = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} is no array of texts ({error}); make it again") from error
    return [" ".join(map(str, row)) for row in np.atleast_2d(table)]

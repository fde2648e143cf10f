"""Time series of one's own, or of the UEA archive (arXiv 1811.00075): a class, or real numbers, of a whole series.

`data_dir` holds the files of a data set, in one of three formats:

NAME_TRAIN.ts, NAME_TEST.ts   the archive's own: a class (@classLabel) or a number (@targetLabel) behind a series; "?" is missing
train.npz, test.npz           arrays x [rows, length] or [rows, length, channels] and y [rows] or [rows, numbers]; a y of whole
                              numbers or texts is classes, of floats numbers
train.csv, test.csv           a row in a line: y, then the values of one channel; where a y of any file is a float all are numbers

valid.npz and valid.csv are used where they are there; else valid is every tenth row of train. Channels are standardised by
the values of train, and so are numbers that are to be predicted (the metric is in standard deviations); what is missing is 0
after that, the mean. Series of unequal lengths are padded.
"""

import pathlib
import re
import zipfile
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice
from common.files import Folder, read_bytes
from data import images, lra
from data.rows import LARGEST, class_row
from data.task import Outline, Spec, Task

HELD = 10  # of so many rows of train one is of valid
Series = tuple[
    list[np.ndarray], np.ndarray
]  # [length, channels] each, and what is to be said of them: texts, or float64 [N, K]


class TimeSeries(Task):
    """Classification or regression of whole series of real channels.

    Args:
      data_dir: the folder with the files.

    Raises:
      UserError: where there are no such files, and for what is no series, with numbers that are not infinite, and its label.
    """

    paper_size: ClassVar[dict] = {}  # a data set has one size

    def __init__(self, data_dir: Folder | None = None):
        folder = pathlib.Path(data_dir or "")
        read = next((read for suffix, read in READERS.items() if any(folder.glob(f"*.{suffix}"))), None)
        if data_dir is None or read is None:
            raise UserError(
                f"data_dir={data_dir} holds no NAME_TRAIN.ts, train.npz or train.csv: give the folder of a data set"
            )
        found, self._content = read(folder)
        _check(folder, found)
        if "valid" not in found:
            rows, answers = found["train"]
            held = np.arange(len(rows)) % HELD == HELD - 1
            found["train"] = [row for row, out in zip(rows, held) if not out], answers[~held]
            found["valid"] = [row for row, out in zip(rows, held) if out], answers[held]
        for split in self.splits:
            if not found[split][0]:
                raise UserError(
                    f"{folder}: {split} has no series (without a file of its own it is every {HELD}th of train)"
                )
        sizes = {row.shape[1] for rows, _ in found.values() for row in rows}
        if len(sizes) > 1:
            raise UserError(
                f"{folder}: series have {' and '.join(map(str, sorted(sizes)))} channels; they must have as many"
            )
        lengths = {len(row) for rows, _ in found.values() for row in rows}
        self._real = found["train"][1].dtype.kind == "f"
        self._rows = {split: _standardised(rows, found["train"][0]) for split, (rows, _) in found.items()}
        if self._real:
            mean, std = found["train"][1].mean(0), found["train"][1].std(0)
            self._answers = {split: (y - mean) / np.where(std > 0, std, 1) for split, (_, y) in found.items()}
            answers = self._answers["train"].shape[1]
        else:
            names = np.unique(np.concatenate([y for _, y in found.values()]))
            self._answers = {split: np.searchsorted(names, y) for split, (_, y) in found.items()}
            answers = max(2, len(names))
        objective = "regression" if self._real else "classification"
        self.name = f"time_series/{folder.name}"
        self.spec = Spec(None, sizes.pop(), answers, objective, max(lengths), padded=len(lengths) > 1, unit="row")

    @classmethod
    def outline(cls, **_) -> Outline:
        raise UserError("how long the series of time_series are only the files say: nothing is compiled without them")

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._rows[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        series, answer = self._rows[split][index], self._answers[split][index]
        row = class_row(series, 0 if self._real else answer, self.spec.length)
        if self._real:
            row["targets"] = answer.astype(np.float32)
        return row

    def floors(self, split: str = "test") -> dict[str, float]:
        """Of classes the accuracy of the most frequent one, of the nearest class mean and of logistic regression; of numbers the
        error of the mean, and of least squares on the mean, the deviation and the ends of each channel."""
        check_choice("split", split, self.splits)
        if not self._real:
            pixels = {
                key: images.Pixels(
                    np.stack([self.row(key, i, 0, 0)["inputs"] for i in range(self.num_examples(key))]), answers
                )
                for key, answers in self._answers.items()
                if key in ("train", split)
            }
            return images.floors(pixels["train"], pixels[split])
        features = {
            key: np.stack([np.concatenate([x.mean(0), x.std(0), x[0], x[-1], [1]]) for x in self._rows[key]])
            for key in ("train", split)
        }
        weights, *_ = np.linalg.lstsq(features["train"], self._answers["train"], rcond=None)
        rmse = lambda guess: float(np.sqrt(np.mean(np.square(self._answers[split] - guess))))
        return {"mean": rmse(0), "least squares": rmse(features[split] @ weights)}

    def content(self) -> str:
        return self._content


def _check(folder: pathlib.Path, found: dict[str, Series]) -> None:
    """Raises a UserError for what no model can be trained on, and for files that do not go together."""
    for split, (rows, answers) in found.items():
        if any((np.abs(row) > LARGEST).any() for row in rows):
            raise UserError(
                f"{folder}: a series of {split} has a value that is infinite, or beyond {LARGEST:g}; write nan for "
                "it (? in .ts), or leave the row out"
            )
        if answers.dtype.kind == "f" and not (np.abs(answers) <= LARGEST).all():
            raise UserError(f"{folder}: a number that is to be predicted in {split} is none, or infinite: leave it out")
    shapes = {answers.shape[1:] if answers.dtype.kind == "f" else None for rows, answers in found.values() if rows}
    if None in shapes and len(shapes) > 1:
        raise UserError(f"{folder}: the y of one file are classes and those of another numbers")
    if len(shapes) > 1:
        raise UserError(f"{folder}: the y of one file are other numbers than those of another")


def _standardised(rows: list[np.ndarray], train: list[np.ndarray]) -> list[np.ndarray]:
    every = np.concatenate(train)
    unknown = np.isnan(every).all(0)
    every = np.where(unknown, 0, every)
    mean, std = np.where(unknown, np.nan, np.nanmean(every, 0)), np.nanstd(every, 0)
    return [np.nan_to_num((row - mean) / np.where(std > 0, std, 1)).astype(np.float32) for row in rows]


def _read_ts(folder: pathlib.Path) -> tuple[dict[str, Series], str]:
    found, contents = {}, []
    for split in ("train", "test"):
        files = sorted(folder.glob(f"*_{split.upper()}.ts"))
        if len(files) != 1:
            raise UserError(f"{folder} holds {len(files)} files *_{split.upper()}.ts: give the folder of one data set")
        contents.append(read_bytes(files[0]))
        found[split] = _parse_ts(files[0], contents[-1].decode(errors="replace"))
    return found, lra.digest(*contents)


def _parse_ts(path: pathlib.Path, text: str) -> Series:
    rows, answers, real, unlabelled, data = [], [], False, False, False
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, value = [*line.lower().split(maxsplit=1), ""][:2]
        if not data and key.startswith("@"):
            data = key == "@data"
            real |= key == "@targetlabel" and value.strip().startswith("true")
            if data and unlabelled and not real:
                raise UserError(f"{path} has no labels (@classLabel false): there is nothing to learn")
            unlabelled |= key == "@classlabel" and value.strip().startswith("false")
            if key == "@timestamps" and value.strip() == "true":
                raise UserError(
                    f"{path} has times of its own (@timeStamps true): series must have a value at each step"
                )
            continue
        *channels, answer = line.split(":")
        try:
            values = [
                [float("nan") if v.strip() == "?" else float(v) for v in channel.split(",")] for channel in channels
            ]
            rows.append(np.array(values).T.reshape(-1, len(channels)))
            answers.append([float(answer)] if real else answer.strip())
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}, is no series of channels of one length and its label: {error}"
            ) from None
    return rows, np.array(answers)


def _read_npz(folder: pathlib.Path) -> tuple[dict[str, Series], str]:
    def read(path):
        try:
            with np.load(path, allow_pickle=False) as file:
                x, y = file["x"], file["y"]
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no arrays x and y ({error})") from error
        several = y.ndim == 2 and y.dtype.kind == "f"
        if (
            x.ndim not in (2, 3)
            or not (y.ndim == 1 or several)
            or len(x) != len(y)
            or 0 in (*x.shape[1:], *y.shape[1:])
        ):
            raise UserError(
                f"{path}: x {x.shape} and y {y.shape} are not [rows, length(, channels)] and [rows(, numbers)]"
            )
        if x.dtype.kind not in "fiub":
            raise UserError(f"{path}: x is an array of {x.dtype}, not of real numbers")
        rows = list(np.float64(x if x.ndim == 3 else x[..., None]))
        return rows, np.float64(y if several else y[:, None]) if y.dtype.kind == "f" else y.astype(str)

    return _read_splits(folder, "npz", read)


def _read_csv(folder: pathlib.Path) -> tuple[dict[str, Series], str]:
    def read(path):
        text = read_bytes(path).decode("utf-8-sig", errors="replace")
        lines = [line.split(",") for line in text.splitlines() if line.strip()]
        try:
            rows = [np.array([float(value) for value in values]).reshape(-1, 1) for _, *values in lines]
        except ValueError as error:
            raise UserError(
                f"{path}: a line should be y and then numbers, with commas between, without a heading ({error})"
            ) from None
        if not all(map(len, rows)):
            raise UserError(f"{path}: a line has a y and no values behind it")
        return rows, np.array([answer.strip() for answer, *_ in lines], str)

    found, content = _read_splits(folder, "csv", read)
    said = np.concatenate([answers for _, answers in found.values()])
    try:
        said.astype(np.float64)
    except ValueError:
        return found, content
    if all(re.fullmatch(r"[+-]?[0-9]+", answer) for answer in said):
        # +1 is 1 where both are written.
        same = {answer: answer[1:] for answer in said.tolist() if answer[0] == "+" and answer[1:] in said}
        one = lambda answers: np.array([same.get(answer, answer) for answer in answers.tolist()], str)
        return {split: (rows, one(answers)) for split, (rows, answers) in found.items()}, content
    return {split: (rows, answers.astype(np.float64)[:, None]) for split, (rows, answers) in found.items()}, content


def _read_splits(
    folder: pathlib.Path, suffix: str, read: Callable[[pathlib.Path], Series]
) -> tuple[dict[str, Series], str]:
    found, contents = {}, []
    for split in ("train", "valid", "test"):
        path = folder / f"{split}.{suffix}"
        if path.is_file():
            found[split] = read(path)
            contents.append(read_bytes(path))
        elif split != "valid":
            raise UserError(f"{path} is missing")
    return found, lra.digest(*contents)


READERS = {"ts": _read_ts, "npz": _read_npz, "csv": _read_csv}

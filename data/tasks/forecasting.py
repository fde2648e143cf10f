"""Forecasting: the next `horizon` values of the columns of a table, from the `length` before them (Informer, arXiv 2012.07436).

A CSV file with a heading and a column of times first, which is not read: ETTh1, ETTm1 (zhouhaoyi/ETDataset), electricity,
traffic, weather, exchange rates. Every window of a split is a row. The first of them follow one another in time: of files
whose names begin with ETTh or ETTm 12, 4 and 4 months of 30 days are train, valid and test, as in Informer; of others 70, 10
and 20 %. The inputs of the first windows of valid and test lie in the split before, as there. Columns are standardised by
train, and so is what is scored: mean squared and mean absolute error of all values of the horizon, the papers' numbers.

The targets are `horizon` times the columns, one step after the other; with `column` both inputs and targets are that column.
"""

import math
import pathlib
import re
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_range
from common.files import Folder, read_bytes
from data import lines, lra
from data.metrics import MAE, NUMBERS, Metric, squared_sums
from data.rows import LARGEST, real_row
from data.task import Outline, Spec, Task

MONTH = 30 * 24
DAY = {"ETTh": 24, "ETTm": 96}  # steps of a day
LONGEST = 2**24
FIT_ROWS, RIDGE = 5000, 1e-3  # of the linear map

MSE = Metric(
    name="mse",
    higher_is_better=False,
    value=lambda sums: sums["squared"] / sums["weight"],
    sums=squared_sums,
    of=NUMBERS,
)


def _spec(length: int, horizon: int, columns: int) -> Spec:
    return Spec(None, columns, horizon * columns, "regression", length, metrics=(MSE, MAE))


class Forecasting(Task):
    """Regression of the next values of a table.

    Args:
      data_dir: the folder with the file.
      file: its name, or its path in the folder; None for the only .csv of the folder. Without a folder, its path.
      length: steps of the input.
      horizon: steps that are forecast.
      column: the name of the only column that is read and forecast; None for all.

    Raises:
      UserError: where there is no such file or column, for a table with other things than numbers, and for one that is too short.
    """

    paper_size: ClassVar[dict] = {"length": 96, "horizon": 96}

    def __init__(
        self,
        data_dir: Folder | None = None,
        file: str | None = None,
        length: int = 96,
        horizon: int = 24,
        column: str | None = None,
    ):
        check_range("length", length, 1, LONGEST)
        check_range("horizon", horizon, 1, LONGEST)
        path, file = lines.find(data_dir, file, ".csv", "a table")
        content = read_bytes(path)
        values = _table(path, content.decode(errors="replace"), column)
        day = next((day for start, day in DAY.items() if path.name.startswith(start)), None)
        if day is None:
            ends = [len(values) * 7 // 10, len(values) - len(values) * 2 // 10, len(values)]
        else:
            ends = [months * MONTH * day // 24 for months in (12, 16, 20)]
        # Where the windows of a split begin, and how many there are.
        self._begins = dict(zip(self.splits, (0, ends[0] - length, ends[1] - length)))
        windows = [end - begin - length - horizon + 1 for begin, end in zip(self._begins.values(), ends)]
        if len(values) < ends[-1] or min(windows) < 1 or min(self._begins.values()) < 0:
            raise UserError(
                f"{path} has {len(values)} rows, of which train, valid and test end at {', '.join(map(str, ends))}: too few for "
                f"length={length} and horizon={horizon}"
            )
        self._windows = dict(zip(self.splits, windows))
        mean, std = values[: ends[0]].mean(0), values[: ends[0]].std(0)
        self._values = (values - mean) / np.where(std > 0, std, 1)
        self._day, self._horizon = day or 24, horizon
        self._content = lra.digest(content)
        self.name = f"forecasting/{path.stem}" + ("" if column is None else f"/{column}")
        self.spec = _spec(length, horizon, values.shape[1])
        self.resolved = {"file": file}

    @classmethod
    def outline(cls, file: str | None, length: int, horizon: int, column: str | None, **_) -> Outline:
        if column is None:
            raise UserError("how many columns forecasting has only the file says: give a column, or the file")
        return Outline(f"forecasting/{file}/{column}", _spec(length, horizon, 1))

    def num_examples(self, split: str) -> int:
        return self._windows[split]

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        middle = self._begins[split] + index + self.spec.length
        inputs = self._values[middle - self.spec.length : middle]
        return real_row(inputs, self._values[middle : middle + self._horizon].reshape(-1), np.ones((), np.float32))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Mean squared error of the mean of train, of the last value, of the values a day ago (24 steps where the name of the
        file does not say how long a day is), the last known day again and again, and of one linear map of the inputs less the
        last value for all columns, which was fitted on train (NLinear, arXiv 2205.13504)."""
        squares = np.zeros(3)
        length, horizon = self.spec.length, self._horizon
        first = self._begins[split] + length
        middles = np.arange(first, first + self.num_examples(split))
        for step in range(horizon):
            truth = self._values[middles + step]
            season = min(self._day, length)
            before = middles + step - season * math.ceil((step + 1) / season)
            guesses = (0, self._values[middles - 1], self._values[before])
            squares += [np.mean(np.square(truth - guess)) for guess in guesses]
        found = dict(zip(("mean", "last value", "a day ago"), (squares / horizon).tolist(), strict=True))
        return found | {"linear": self._linear(split)}

    def _linear(self, split):
        """Mean squared error of least squares on at most `FIT_ROWS` windows of each column of train."""
        length, horizon = self.spec.length, self._horizon
        columns = range(self._values.shape[1])

        def windows(of, column, step):
            first = self._begins[of]
            part = self._values[first : first + self._windows[of] + length + horizon - 1, column]
            view = np.lib.stride_tricks.sliding_window_view(part, length + horizon)[::step]
            view = view - view[:, length - 1 : length]
            # The last of the inputs is now 0: a constant takes its place.
            return np.concatenate([view[:, : length - 1], np.ones((len(view), 1))], 1), view[:, length:]

        squares, products = RIDGE * np.eye(length), np.zeros((length, horizon))
        for column in columns:
            x, y = windows("train", column, -(-self._windows["train"] // FIT_ROWS))
            squares, products = squares + x.T @ x, products + x.T @ y
        weights = np.linalg.solve(squares, products)
        errors = []
        for column in columns:
            x, y = windows(split, column, 1)
            errors.append(np.mean(np.square(x @ weights - y)))
        return float(np.mean(errors))

    def content(self) -> str:
        return self._content


def _table(path: pathlib.Path, text: str, column: str | None) -> np.ndarray:
    """The columns behind the first, or the one that is named: float64 [rows, columns]."""
    heading, *rows = text.splitlines() or [""]
    _, *names = [name.strip() for name in heading.split(",")]
    if names and all(re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", name) for name in names):
        raise UserError(f"{path} has no heading but numbers in its first line: write the names of the columns there")
    if not names:
        raise UserError(f"{path} has one column in its first line: give a heading, with commas between the columns")
    if column is not None and column not in names:
        raise UserError(f"{path} has no column {column!r}; there are {', '.join(names)}")
    chosen = range(1, len(names) + 1) if column is None else [names.index(column) + 1]
    try:
        values = np.array(
            [[float(cells[i]) for i in chosen] for cells in (row.split(",") for row in rows if row.strip())]
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} holds something else than numbers behind its first column: {error}") from None
    if not len(values):
        raise UserError(f"{path} has a heading and no rows below it")
    if not (np.abs(values) <= LARGEST).all():
        raise UserError(
            f"{path} has values that are no finite numbers, or beyond {LARGEST:g}: fill them in, or cut the table"
        )
    return values

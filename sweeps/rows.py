"""The rows of a sweep's report: its cells by everything but their seed."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from data.metrics import Display
from models.accounting import Summary
from sweeps.cells import Cell
from sweeps.sizing import Sized
from training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Row:
    """The cells that differ in nothing but the seed.

    Attributes:
      values: of all axes but the seed.
      cells: one for each seed.
      results: of the finished ones, as `sweeps.result.write` makes them.
      seeds: of the results; None where seeds are no axis.
      metrics: recorded by them.
      cost, sized: of the model.
    """

    values: Mapping[str, str]
    cells: Sequence[Cell]
    results: Sequence[Mapping[str, Any]]
    seeds: Sequence[str | None]
    metrics: Sequence[Sequence[Mapping[str, Any]]]
    cost: Summary | None
    sized: Sized | None

    @property
    def first(self) -> Mapping[str, Any]:
        """A result, for what they have in common."""
        return self.results[0]

    def label(self, common: Sequence[str] = ()) -> str:
        """Its values, without those of axes that all rows have in common."""
        shown = {key: value for key, value in self.values.items() if key not in common}
        return ", ".join(v if key == "mixer" else f"{key}={v}" for key, v in shown.items()) or "all"

    def test(self, length: int | None = None) -> tuple[float, float | None]:
        """Mean and half the interval of the test metric, at a length (by default that of training)."""
        return interval([result["test"][str(length or result["length"])] for result in self.results])

    def by_seed(self) -> dict[str | None, float]:
        """The test metric at the length of training, by seed."""
        return {seed: result["test"][str(result["length"])] for seed, result in zip(self.seeds, self.results)}

    def diverged(self) -> int:
        """How many of its cells have diverged."""
        return sum(cell.diverged() is not None for cell in self.cells)

    def lengths(self) -> list[int]:
        """The lengths that all its cells are scored at."""
        return sorted(
            set.intersection(
                *({int(n) for n, value in result["test"].items() if value is not None} for result in self.results)
            )
        )

    def grid(self) -> dict[str, list[Mapping[str, Any]]]:
        """By settings of the task in words, what each of its cells has scored under them, see `sweeps.result.write`; without
        those under which one has no score."""
        tables = [
            {settings_in_words(entry): entry for entry in result.get("grid", ()) if entry["score"] is not None}
            for result in self.results
        ]
        return {words: [table[words] for table in tables] for words in tables[0] if all(words in t for t in tables)}

    def tokens_per_second(self) -> float | None:
        """Median speed of training."""
        speeds = [line["tokens_per_second"] for run in self.metrics for line in run if "tokens_per_second" in line]
        return statistics.median(speeds) if speeds else None


def settings_in_words(entry: Mapping[str, Any]) -> str:
    """The settings of a score, such as "depth=0.5, length=512"."""
    return ", ".join(f"{key}={value}" for key, value in entry["settings"].items())


def grids(group: Sequence[Row]) -> list[tuple[Display, list[str]]]:
    """The settings that some row of a group has scores under, in words, those of one metric together."""
    found: dict[Display, list[str]] = {}
    for row in group:
        for words, entries in row.grid().items():
            own = found.setdefault(Display.read(entries[0]), [])
            if words not in own:
                own.append(words)
    return list(found.items())


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """The mean, and half the width of its confidence interval by the t distribution; None for less than two values."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2 or not math.isfinite(mean):
        return mean, None
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    return mean, quantile * statistics.stdev(values) / math.sqrt(count)


def rows(cells: Sequence[Cell]) -> list[Row]:
    """The cells by everything but their seed."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        values = {key: value for key, value in cell.values.items() if key != "seed"}
        groups.setdefault(tuple(values.items()), []).append(cell)
    made = []
    for values, members in groups.items():
        found = [(cell, result) for cell in members if (result := cell.result()) is not None]
        results, seeds = [result for _, result in found], [cell.values.get("seed") for cell, _ in found]
        metrics = [read_metrics(cell.workdir) for cell, _ in found]
        made.append(Row(dict(values), members, results, seeds, metrics, members[0].cost, members[0].sized))
    return made


def sections(all_rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that have results, those together that can be compared (task, data, metric and floors), best first."""
    groups: dict[str, list[Row]] = {}
    for row in all_rows:
        if row.results:
            same = repr([row.first.get(key) for key in ("task", "data", "metric", "floors", "length")])
            groups.setdefault(same, []).append(row)
    return [
        sorted(group, key=lambda row: row.test()[0] * (-1 if Display.read(row.first).higher_is_better else 1))
        for group in groups.values()
    ]


def common_axes(group: Sequence[Row]) -> list[str]:
    """The axes on which all rows have the same value, the mixer apart."""
    return [k for k in group[0].values if k != "mixer" and len({row.values[k] for row in group}) == 1]

"""Choosing values on the validation split: axes that are tuned away, the same for all that is compared.

For each combination of the other values, the best is what has the best mean score on the validation split over the seeds that all
of its candidates have. A candidate with a cell that has failed or diverged cannot be the best. What is reported is of the test
split, on which nothing is chosen.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from data.metrics import Display
from sweeps import axes, cells
from sweeps.request import Request
from sweeps.rows import Row


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for one combination of the values that are not tuned.

    Attributes:
      values: of the combination.
      candidates: all rows of it.
      scores: of the candidates on validation, the mean over seeds; None for one that is not finished, infinitely bad for one
        that has failed or diverged.
      best: the place of the best; None where there is no score yet.
      edges: by key, values beyond the end of the axis, where the best is at the edge of it.
    """

    values: Mapping[str, str]
    candidates: Sequence[Row]
    scores: Sequence[float | None]
    best: int | None
    edges: Mapping[str, Sequence[str]]

    @property
    def complete(self) -> bool:
        """Whether all candidates have ended."""
        return None not in self.scores

    @property
    def chosen(self) -> Row | None:
        """The best candidate."""
        return None if self.best is None else self.candidates[self.best]


def choose(request: Request, rows: Sequence[Row], failed: Sequence[str] = ()) -> list[Choice]:
    """What is chosen, in the order of the grid.

    Args:
      request: with `best_of`, the keys that are tuned.
      rows: of the report.
      failed: names of the cells that have failed.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        kept = {key: value for key, value in row.values.items() if key not in request.best_of}
        groups.setdefault(tuple(kept.items()), []).append(row)
    return [_choice(request, dict(values), group, failed) for values, group in groups.items()]


def _choice(request: Request, values: Mapping[str, str], group: Sequence[Row], failed: Sequence[str]) -> Choice:
    seeds = [{cell.values.get("seed") for cell in row.cells} for row in group]
    common = set.intersection(*seeds) if request.seeds_of_best is None else {"0"}
    displays = [Display.read(row.first) for row in group if row.results]
    worst = -math.inf if displays and displays[0].higher_is_better else math.inf
    scores = [_score(row, common, failed, worst) for row in group]
    known = [(score, place) for place, score in enumerate(scores) if score is not None and math.isfinite(score)]
    pick = max if worst < 0 else min
    best = pick(known, key=lambda item: item[0])[1] if known else None
    edges = {}
    if best is not None:
        for key in [key for key in request.best_of if key in request.grid]:
            # Values of the axis that its neighbours, the same in all else that is tuned, have been tried with.
            found = axes.beyond(request.grid[key], group[best].values[key])
            found = [text for text in found if cells.accepted(request, {**group[best].values, key: text})]
            if found:
                edges[key] = found
    return Choice(values, group, scores, best, edges)


def _score(row: Row, seeds: set, failed: Sequence[str], worst: float) -> float | None:
    """The mean on validation over some seeds; None if it is not known yet."""
    found = []
    for cell in row.cells:
        if cell.values.get("seed") not in seeds:
            continue
        result = cell.result()
        if result is None and (cell.error or cell.name in failed or cell.diverged() is not None):
            return worst
        if result is None:
            return None
        found.append(result["valid"])
    return statistics.fmean(found)


def more_seeds(request: Request, choices: Sequence[Choice]) -> Request | None:
    """The cells of what was chosen, with the seeds that it was not chosen with; None if there are none, or none is chosen."""
    if request.seeds_of_best is None or not all(choice.complete for choice in choices):
        return None
    points = [dict(choice.chosen.values) for choice in choices if choice.chosen is not None]
    seeds = [f"{n}" for n in range(1, request.seeds_of_best)]
    if not points or not seeds:
        return None
    changed = {"best_of": (), "seeds_of_best": None, "reference": None, "match_to": request.first_mixer}
    return dataclasses.replace(request, points=points, axes={"seed": seeds}, **changed)

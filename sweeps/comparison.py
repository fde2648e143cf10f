"""Whether one row of a report is better than another: differences paired over seeds, which share the order of the data."""

import dataclasses
from collections.abc import Mapping, Sequence

from scipy.special import stdtr, stdtrit

from data.metrics import Display
from sweeps.request import Request
from sweeps.rows import Row, interval

LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of the test metric, to the reference.

    Attributes:
      mean: over the seeds that both have.
      half: half the 95 % confidence interval (t distribution); None for one seed.
      p: of the two-sided t test that there is none; None for one seed.
      verdict: "better", "worse" or "=".
    """

    mean: float
    half: float | None
    p: float | None
    verdict: str = "="


def paired(ours: Mapping, others: Mapping) -> Difference | None:
    """The difference of scores by seed, over the seeds that both have; None if there are none."""
    found = [ours[seed] - others[seed] for seed in ours if seed in others]
    if not found:
        return None
    mean, half = interval(found)
    if half is None:
        return Difference(mean, None, None)
    error = half / -float(stdtrit(len(found) - 1, LEVEL / 2))  # the standard error of the mean
    p = (0.0 if mean else 1.0) if error == 0 else 2 * float(stdtr(len(found) - 1, -abs(mean) / error))
    return Difference(mean, half, p)


def clear(values: Sequence[float | None]) -> list[bool]:
    """Which of several tests are clear after Holm's correction, by their p."""
    order = sorted((p, place) for place, p in enumerate(values) if p is not None)
    found = [False] * len(values)
    for rank, (p, place) in enumerate(order):
        if p > LEVEL / (len(order) - rank):
            break
        found[place] = True
    return found


def compare(request: Request, group: Sequence[Row]) -> tuple[Row | None, dict[int, Difference | None]]:
    """The differences of comparable rows to their reference.

    Args:
      request: which may name the reference: a mixer or KEY=VALUE. Where other axes are left open, each row has the reference with
        its own values of these.
      group: of rows that can be compared, best first; without a name the first is the reference.

    Returns:
      the reference, if there is one for all rows, and by `id` of the row the difference, None for the reference itself and
      where there is none; {} where there is nothing to compare.
    """
    references = [_reference(request, group, row) for row in group]
    found = {}
    for row, other in zip(group, references):
        found[id(row)] = None if other is None or other is row else paired(row.by_seed(), other.by_seed())
    if not any(found.values()):
        return None, {}
    higher = Display.read(group[0].first).higher_is_better
    tests = [one and one.p for one in found.values()]
    for (name, one), sure in zip(list(found.items()), clear(tests)):
        if sure:
            found[name] = dataclasses.replace(one, verdict="better" if (one.mean > 0) == higher else "worse")
    single = references[0] if all(other is references[0] for other in references) else None
    return single, found


def _reference(request: Request, group: Sequence[Row], row: Row) -> Row | None:
    if request.reference is None:
        return group[0]
    kept = {key: value for key, value in row.values.items() if key not in request.best_of}
    wanted = kept | request.reference_values
    return next((other for other in group if wanted.items() <= {**request.settings, **other.values}.items()), None)

"""The values of a sweep's axes: written out, as expressions, drawn, or listed by a program of the user's.

A,B,C            values
log:A..B:N       N values from A to B, each the same multiple of the one before it
lin:A..B:N       N values at equal distances
pow2:A..B        the powers of two from A to B
log:A..B         any value of a range: how many are drawn is said once, for all such axes

Values have three significant digits, and more where they lie too near to each other for that; A and B are exact.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError, check_range
from common.files import absolute
from common.plugins import program
from sweeps.request import split_values

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# Of values of an axis, and of draws: far more than anybody trains.
MOST = 10_000
RANGE = re.compile(rf"(log|lin|pow2):({NUMBER})\.\.({NUMBER})(?::(\d+))?")


def expand(
    given: Mapping[str, str], draw: int | None = None, seed: int = 0
) -> tuple[dict[str, list[str]], list[dict[str, str]] | None]:
    """What axes stand for.

    Args:
      given: the text of each axis, by its key.
      draw: how many points are drawn for the axes that are ranges.
      seed: of the draw.

    Returns:
      the values of each axis that has some, and the points of the ranges together, spread as evenly as points can be (a
      scrambled Halton sequence, of which more points are a continuation); None without ranges.

    Raises:
      UserError: for an expression that has no meaning, ranges without a number of draws, and the reverse.
    """
    axes, ranges = {}, {}
    for key, text in given.items():
        parts = _range(key, text)
        if parts is None:
            axes[key] = split_values(text)
        elif parts[0] == "pow2" or parts[3] is not None:
            axes[key] = _values(key, *parts)
        else:
            ranges[key] = parts
    if ranges and draw is None:
        raise UserError(f"{next(iter(ranges))} is a range without a number of values: add it (:5), or --draw=N")
    if draw is None:
        return axes, None
    check_range("--draw", draw, 1, MOST)
    check_range("--draw_seed", seed, 0)
    if not ranges:
        raise UserError("--draw needs an axis that is a range without a number of values, such as log:1e-4..1e-2")
    return axes, _drawn(ranges, draw, seed)


def _range(key: str, text: str) -> tuple[str, float, float, int | None] | None:
    """Kind, ends and number of values of an expression; None for a text that is none."""
    if not re.match(r"(log|lin|pow2):", text):
        return None
    found = RANGE.fullmatch(text)
    if found is None:
        raise UserError(f"{key}={text} is no range: log:A..B:N, lin:A..B:N or pow2:A..B")
    kind, low, high, count = found[1], float(found[2]), float(found[3]), found[4] and int(found[4])
    if not -math.inf < low < high < math.inf:
        raise UserError(f"{key}={text}: the range must go up, from one number to another")
    if kind != "lin" and low <= 0:
        raise UserError(f"{key}={text}: such a range begins above 0")
    if count is not None and (kind == "pow2" or count < 2):
        raise UserError(f"{key}={text}: " + ("pow2 takes no number" if kind == "pow2" else "at least two values"))
    if count is not None and count > MOST:
        raise UserError(f"{key}={text}: at most {MOST:,} values")
    return kind, low, high, count


def _values(key: str, kind: str, low: float, high: float, count: int | None) -> list[str]:
    if kind == "pow2":
        first, last = math.log2(low), math.log2(high)
        if first != int(first) or last != int(last):
            raise UserError(f"{key}: the ends of pow2 are powers of two, {low:g} and {high:g} are not both")
        return [f"{2.0**n:.17g}" for n in range(int(first), int(last) + 1)]
    values = (np.geomspace if kind == "log" else np.linspace)(low, high, count).tolist()
    made = [_number(low, 0)] + [_number(b, b - a) for a, b in itertools.pairwise(values[:-1])] + [_number(high, 0)]
    if len(set(made)) < len(made):
        raise UserError(f"{key}: {count} values from {low!r} to {high!r} are more than there are numbers")
    return made


def _number(value: float, distance: float) -> str:
    """The shortest text of a number, from three significant digits on, that is off by at most a hundredth of the distance to the
    next one."""
    rounded = next(
        (near for digits in range(3, 16) if abs((near := float(f"{value:.{digits}g}")) - value) <= distance / 100),
        value,
    )
    return f"{rounded:.15g}"


def _drawn(ranges: Mapping[str, tuple], count: int, seed: int) -> list[dict[str, str]]:
    from scipy.stats import qmc

    points = qmc.Halton(d=len(ranges), scramble=True, seed=seed).random(count)
    found = []
    for point in points:
        values = {}
        for u, (key, (kind, low, high, _)) in zip(point, ranges.items()):
            value = low * (high / low) ** u if kind == "log" else low + u * (high - low)
            # The digits of a point are those of its range, however many are drawn.
            values[key] = _number(value, min(value, high - low) / 2 if kind == "log" else (high - low) / 10)
        found.append(values)
    if len({tuple(values.items()) for values in found}) < count:
        raise UserError(f"--draw={count} is more points than {', '.join(ranges)} can show as different numbers")
    return found


def listed(file: str, drawn: Sequence[Mapping[str, str]] | None = None) -> list[dict[str, str]]:
    """The cells that a Python file lists: what its function `cells()` returns, a dict of values by key for each.

    Args:
      file: its path.
      drawn: points of ranges, each of which is taken with each cell.

    Raises:
      UserError: if there is no such file or function, if it returns something else, and for a key that is drawn, too.
    """
    path = Path(absolute(file))
    if not path.is_file():
        raise UserError(f"--cells={file}: there is no such file")
    found = program(path, "cells", f"--cells={file}")()
    if not isinstance(found, Sequence) or not found or not all(item and isinstance(item, Mapping) for item in found):
        raise UserError(f"--cells={file}: cells() is to return a list of dicts with keys, at least one")
    if len({tuple(item) for item in found}) > 1:
        raise UserError(f"--cells={file}: all cells are to have the same keys, in the same order")
    points = [{key: str(value) for key, value in item.items()} for item in found]
    if len({tuple(point.items()) for point in points}) < len(points):
        raise UserError(f"--cells={file}: a cell is there twice")
    if drawn and (clash := sorted({*points[0]} & {*drawn[0]})):
        raise UserError(f"{clash[0]} is both drawn and of the listed cells: choose one")
    return [{**point, **values} for point in points for values in drawn or [{}]]


def beyond(values: Sequence[str], value: str) -> list[str]:
    """Two values that go on where an axis ends, if one of its values is the first or the last; [] if it is in the midst of
    them, or they are not numbers, in order."""
    try:
        numbers = [float(text) for text in values]
    except ValueError:
        return []
    order = sorted(numbers)
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)) or float(value) not in (order[0], order[-1]):
        return []
    if float(value) == order[0]:
        order.reverse()
    last, before = order[-1], order[-2]
    if min(numbers) > 0:
        made = [last * (last / before) ** n for n in (1, 2)]
    else:
        made = [last + (last - before) * n for n in (1, 2)]
    whole = all(text.lstrip("+-").isdigit() for text in values)
    made = [f"{value:.0f}" if whole else f"{value:.3g}" for value in made]
    return [text for text in made if text not in values and float(text) != 0]

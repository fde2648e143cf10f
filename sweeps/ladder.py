"""A ladder: models that are scaled from the narrowest of them, each trained for given numbers of floating-point operations.

    --ladder=64,128,256                                    widths; the first is `model.base_width` of all
    --ladder=64,128,256 --budgets=1e13,3e13,1e14           and, for each, the steps that take so many operations
    --over mixer=gla,mamba --budgets=1e13                  the second without the first

The heads that the configuration has are those of the first width, and grow with it, so that their size stays.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from common.errors import UserError
from sweeps import cells, sizing
from sweeps.request import Request

TOLERANCE = 0.01  # of a budget, by whole steps
STEPS, WIDTH, BASE = "train.steps", "model.width", "model.base_width"


def numbers(option: str, text: str) -> tuple[float, ...]:
    """N,N,... as numbers above 0, ascending; none for no text.

    Raises:
      UserError: for anything else.
    """
    try:
        found = tuple(float(item) for item in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"{option} takes numbers joined by commas, not {text!r}") from None
    if not all(0 < a < b for a, b in zip(found, (*found[1:], math.inf))):
        raise UserError(f"{option} takes different numbers above 0 in ascending order, not {text!r}")
    return found


def rungs(
    widths: Sequence[int], axes: Mapping[str, Sequence[str]], settings: Mapping[str, str]
) -> tuple[dict[str, Sequence[str]], dict[str, str]]:
    """The axes and settings of a request, with models at some widths that are scaled from the first.

    Raises:
      UserError: for a key that the ladder decides.
    """
    _check_free((WIDTH, BASE), axes, settings)
    return {**axes, WIDTH: [f"{width}" for width in widths]}, {**settings, BASE: f"{widths[0]}"}


def climb(request: Request, budgets: Sequence[float]) -> Request:
    """The request with each of its cells trained for some budgets.

    Args:
      request: what is asked for otherwise.
      budgets: operations of training, three times those of the forward pass.

    Raises:
      UserError: for a key that the budget decides, a model that cannot be built, and budgets that whole steps do not meet.
    """
    _check_free((STEPS,), request.axes, request.settings, *(request.points or ())[:1])
    # A seed that is an axis stays one: points are there once for all of its values.
    apart = {"seed"} if "seed" in request.axes or request.seeds_of_best is not None else set()
    costs, points, seen = sizing.Costs(), [], []
    for combination in request.combinations():
        values = {key: value for key, value in combination.items() if key not in apart}
        if values in seen:
            continue
        seen.append(values)
        each = _step(request, {key: value for key, value in values.items() if key != "seed"}, costs)
        for budget in budgets:
            steps = round(budget / each)
            if steps < 1 or abs(steps * each / budget - 1) > TOLERANCE:
                raise UserError(
                    f"--budgets: {budget:.3g} operations are {budget / each:.1f} steps of {each:.3g} with {values}, and whole "
                    f"steps are more than {100 * TOLERANCE:.0f} % off; make it larger, or train.batch_size smaller"
                )
            points.append({**values, STEPS: f"{steps}"})
    seeds = {key: values for key, values in request.axes.items() if key == "seed"}
    return dataclasses.replace(request, axes=seeds, points=points, over=request.axes)


def _check_free(keys: Sequence[str], *given: Mapping[str, object]) -> None:
    for key in keys:
        if any(key in one for one in given):
            raise UserError(f"{key} is what --ladder or --budgets decides: leave it out")


def _step(request: Request, values: Mapping[str, str], costs: sizing.Costs) -> float:
    """Operations of one step of training."""

    def found() -> float:
        resolved, _ = cells.built(request, values, costs)
        spec = resolved.task.spec
        return 3 * costs.of(resolved.model, spec).flops_per_token * resolved.train.batch_size * spec.length

    return costs.once(f"a step of {values}", found)

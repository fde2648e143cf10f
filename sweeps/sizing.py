"""The width at which a model has a given number of parameters, FLOPs per token or bytes of carry."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UserError
from data.task import Spec
from models.accounting import Summary
from models.config import ModelConfig
from training import setup

# What models can be matched by, and the field of their `Summary` that measures it.
MEASURES = {"params": "parameters", "active": "active_parameters", "flops": "flops_per_token", "state": "carry_bytes"}
IN_WORDS = {
    "params": "number of parameters",
    "active": "number of parameters that a token uses",
    "flops": "FLOPs per token",
    "state": "carry",
}
TOLERANCE = 0.05  # a budget counts as reached within this fraction
ROUNDING = 0.01  # a width that hardware likes (a multiple of 8) is taken if it is this near to the budget
NARROWEST, WIDEST = 8, 2**16
DIVISIBLE = 1920  # a width that any reasonable number of heads divides
GAP = 256  # among so many consecutive widths one can be built, or none can


@dataclasses.dataclass(frozen=True)
class Sized:
    """A model sized to a budget.

    Attributes:
      width: of the residual stream.
      budget: what was asked for.
      achieved: what the model has; None if it has no such thing (a carry, where the task or a mixer does not stream).
    """

    width: int
    budget: float
    achieved: float | None

    @property
    def deviation(self) -> float | None:
        """achieved / budget - 1."""
        return None if self.achieved is None else self.achieved / self.budget - 1

    @property
    def reached(self) -> bool:
        """Whether the budget is met within `TOLERANCE`."""
        return self.deviation is not None and abs(self.deviation) <= TOLERANCE


class Costs:
    """What models cost on tasks, each counted once: cells that differ only in how they are trained have the same models."""

    def __init__(self):
        self._found: dict[str, Any] = {}

    def once(self, key: str, find: Callable[[], Any]) -> Any:
        """What `find` returns, or the UserError that it raises; it is called once for a key."""
        if key not in self._found:
            try:
                self._found[key] = find()
            except UserError as error:
                self._found[key] = error
        if isinstance(found := self._found[key], UserError):
            raise found
        return found

    def of(self, model: ModelConfig, spec: Spec) -> Summary:
        """The cost of a model, see `training.setup.cost`. The forward pass is always traced: some widths are refused only there.

        Raises:
          UserError: if the model cannot be built.
        """
        return self.once(repr((model, spec.length, spec.channels)), lambda: setup.cost(model, spec))

    def amount(self, model: ModelConfig, spec: Spec, measure: str) -> float | None:
        """The amount of one of `MEASURES` that a model has; raises as `of` does."""
        return getattr(self.of(model, spec), MEASURES[measure])


def match(costs: Costs, model: ModelConfig, spec: Spec, measure: str, budget: float) -> Sized:
    """Sizes a model to a budget by its width; everything else stays.

    Args:
      costs: of the models that were looked at before.
      model: the model at some width.
      spec: of the task.
      measure: one of `MEASURES`.
      budget: how much of it the model is to have.

    Returns:
      the buildable width (heads divide it, and so on) whose model is nearest to the budget; one that is a multiple of 8 if
      that is within `ROUNDING` of it. The nearest may be far: see `Sized.reached`. The width stays as it is where the
      model has nothing to measure, or as much at any width.

    Raises:
      UserError: if no width can be built.
    """

    def amount_at(width: int) -> float | None:
        return costs.amount(dataclasses.replace(model, width=width), spec, measure)

    return solve(amount_at, budget, model.width)


def solve(measure: Callable[[int], float | None], budget: float, start: int) -> Sized:
    """The width at which what is measured, which grows with the width, is nearest to the budget.

    Args:
      measure: the amount at a width. It raises a UserError for a width that cannot be built, and returns None if there is
        nothing to measure. Every other exception is a fault, and goes on to the caller.
      budget: more than 0.
      start: a likely width.

    Raises:
      UserError: if no width from `start` on can be built.
    """
    if budget <= 0:
        raise UserError(f"the budget must be more than 0, got {budget}")
    reasons, amounts = {}, {}

    @functools.cache
    def at(width: int) -> tuple[bool, float | None]:
        """Whether the width can be built, and the amount."""
        try:
            amounts[width] = measure(width)
            return True, amounts[width]
        except UserError as error:
            reasons[width] = str(error)
            return False, None

    def nearest(width: int, step: int) -> int | None:
        """The first buildable width from `width` on, in steps (down, if negative)."""
        return next((w for w in range(width, width + GAP * step, step) if w >= NARROWEST and at(w)[0]), None)

    def above(width: int) -> float:
        """The amount of the first buildable width from `width` on: a growing function of all integers."""
        found = nearest(width, 1)
        return math.inf if found is None else at(found)[1]

    def guess() -> float:
        """Where the power of the width through the two amounts nearest to the budget has the budget."""
        far = lambda width: abs(math.log(amounts[width] / budget))
        a, b = sorted((width for width in amounts if amounts[width] > 0), key=far)[:2]
        slope = math.log(amounts[a] / amounts[b]) / math.log(a / b)
        return a * (budget / amounts[a]) ** (1 / slope) if slope > 0 else a

    if not at(start)[0] and not at(DIVISIBLE)[0]:  # the width is not what is wrong
        raise UserError(reasons[start])
    first = nearest(start, 1)
    if first is None:
        raise UserError(f"no width from {start} to {start + GAP - 1} can be built: {reasons[start]}")
    if at(first)[1] is None or above(2 * first) == at(first)[1]:
        return Sized(first, budget, at(first)[1])
    low, high = NARROWEST - 1, first  # above(low) < budget <= above(high), once the latter is wide enough
    while high < WIDEST and above(high) < budget:
        low, high = high, 2 * high
    # A guess is mostly right at once; halves, now and then, come to an end whatever is measured.
    for turn in itertools.count(1):
        if high - low <= 1:
            break
        middle = (low + high) // 2 if turn % 4 == 0 else max(low + 1, min(high - 1, math.floor(guess())))
        low, high = (low, middle) if above(middle) >= budget else (middle, high)

    def best(step: int) -> int | None:
        """Of the buildable multiples of `step` next to `high`, the one nearest to the budget."""
        up = -(-high // step) * step
        found = [width for width in (nearest(up, step), nearest(up - step, -step)) if width is not None]
        return min(found, key=lambda width: abs(at(width)[1] - budget), default=None)

    width, liked = best(1), best(8)
    if width is None:
        raise UserError(f"no width within {GAP} of {high} can be built: {reasons[high]}")
    if liked is not None and abs(at(liked)[1] / budget - 1) <= ROUNDING:
        width = liked
    return Sized(width, budget, at(width)[1])


def heads(model: Mapping[str, Any], base_width: int) -> dict[str, int]:
    """The heads of a model's mixers by their key, if they grow with the width and `base_width` has what the configuration says.

    All numbers of heads do (`heads`, `kv_heads`, `value_heads`), so that as many share one as at the base, which
    `ModelConfig.base` finds again; but a single one that others share stays one.

    Args:
      model: the section of a configuration.

    Raises:
      UserError: where these are no whole numbers.
    """
    found, width = {}, model["width"]
    for name, own in model.get("mixer", {}).items():
        for key, count in own.items():
            shared = key != "heads" and count == 1
            if not key.endswith("heads") or not isinstance(count, int) or shared or width == base_width:
                continue
            if count * width % base_width:
                raise UserError(
                    f"{key}={count} of mixer {name!r} at width {base_width} is no whole number of heads at width {width}"
                )
            found[f"model.mixer.{name}.{key}"] = count * width // base_width
    return found

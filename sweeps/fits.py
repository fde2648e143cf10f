"""Curves through what a sweep has found: the best learning rate of each row, and how the loss falls with size and data.

With N parameters, D tokens of training, and C = 3 x FLOPs of the forward pass per token x D, counted in the trace (not 6 N D: in
small models embeddings and attention are not small):

    lr        a parabola in log lr through the best value and its two neighbours
    scaling   iso-FLOP (arXiv 2203.15556, approach 2): for each budget C a parabola in log N, and log N* linear in log C;
              loss surface (approach 3): L = E + A N^-alpha + B D^-beta, by least squares. For given exponents the rest is
              linear, so a grid of exponents is refined; the paper's Huber loss of log L is not taken.

Scores are means over seeds of the test split, and of the validation split for "lr", which is tuned there.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import minimize, nnls

from common.errors import check_choice
from data.metrics import Display
from sweeps.rows import Row

RATE = "optimizer.learning_rate"
SAME = 1.05  # budgets within this factor are one
FEWEST = 3  # sizes of a budget, and budgets
DRAWS = 200


class Refused(Exception):
    """What is there does not determine the curve; the message says why."""


def minimum(x: Sequence[float], y: Sequence[float]) -> float:
    """The x at which a parabola through the points, by least squares, is lowest.

    Raises:
      Refused: for less than three points, and where the lowest one is at an end, or the parabola's minimum beyond it.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(set(x)) < FEWEST:
        raise Refused(f"{len(set(x))} values, a parabola takes {FEWEST}")
    if x[np.argmin(y)] in (x.min(), x.max()):
        raise Refused("the best is at the edge")
    curvature, slope, _ = np.polyfit(x - x.mean(), y, 2)
    found = x.mean() - slope / (2 * curvature) if curvature > 0 else math.nan
    if not x.min() < found < x.max():
        raise Refused("the parabola has no minimum between the ends")
    return float(found)


def best_rate(rates: Sequence[float], scores: Sequence[float]) -> float:
    """The learning rate at the minimum of the parabola through the lowest score and its neighbours.

    Raises:
      Refused: as `minimum`.
    """
    order = np.argsort(rates)
    x, y = np.log2(np.asarray(rates)[order]), np.asarray(scores, float)[order]
    place = int(np.argmin(y))
    if len(x) >= FEWEST and place in (0, len(x) - 1):
        raise Refused("the best is at the edge")
    return 2 ** minimum(x[max(place - 1, 0) : place + 2], y[max(place - 1, 0) : place + 2])


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """N* = exp(intercept) C^exponent.

    Attributes:
      budgets, sizes: C, and the N* of each.
    """

    exponent: float
    intercept: float
    budgets: Sequence[float]
    sizes: Sequence[float]


def iso_flop(compute: Sequence[float], size: Sequence[float], loss: Sequence[float]) -> IsoFlop:
    """The size that is best for a budget, from runs at some budgets.

    Args:
      compute, size, loss: C, N and L of each run.

    Raises:
      Refused: for less than `FEWEST` budgets, or a budget as in `minimum`.
    """
    runs = sorted(zip(compute, size, loss))
    groups: list[list[tuple]] = []
    for run in runs:
        if groups and run[0] <= SAME * groups[-1][0][0]:
            groups[-1].append(run)
        else:
            groups.append([run])
    if len(groups) < FEWEST:
        raise Refused(f"{len(groups)} budgets, a line through their best sizes takes {FEWEST}")
    budgets, sizes = [], []
    for group in groups:
        budget = math.exp(statistics.fmean(math.log(c) for c, _, _ in group))
        try:
            best = minimum([math.log(n) for _, n, _ in group], [value for _, _, value in group])
        except Refused as error:
            raise Refused(f"at {budget:.3g} FLOPs: {error}") from error
        budgets.append(budget)
        sizes.append(math.exp(best))
    exponent, intercept = np.polyfit(np.log(budgets), np.log(sizes), 1)
    return IsoFlop(float(exponent), float(intercept), budgets, sizes)


@dataclasses.dataclass(frozen=True)
class Surface:
    """L = E + A N^-alpha + B D^-beta."""

    alpha: float
    beta: float
    E: float
    A: float
    B: float

    @property
    def exponent(self) -> float:
        """k of N* ~ (N D)^k."""
        return self.beta / (self.alpha + self.beta)

    def __call__(self, size, tokens):
        return self.E + self.A * size**-self.alpha + self.B * tokens**-self.beta


def surface(
    size: Sequence[float], tokens: Sequence[float], loss: Sequence[float], start: tuple[float, float] | None = None
) -> Surface:
    """The surface through runs.

    Args:
      size, tokens, loss: N, D and L of each run.
      start: exponents that are nearly right already, of which the fit is then quick; by default the best of a grid.

    Raises:
      Refused: for less than `FEWEST` sizes or numbers of tokens, or not more runs than the five numbers.
    """
    size, tokens, loss = (np.asarray(values, float) for values in (size, tokens, loss))
    if min(len(set(size)), len(set(tokens))) < FEWEST or len(set(zip(size, tokens))) <= 5:
        raise Refused(
            f"{len(set(size))} sizes, {len(set(tokens))} numbers of tokens, {len(set(zip(size, tokens)))} runs; a surface takes "
            f"{FEWEST}, {FEWEST} and 6"
        )

    def linear(exponents):
        """The residual of the best E, A, B >= 0, and these."""
        alpha, beta = exponents
        columns = np.stack([np.ones_like(size), size**-alpha, tokens**-beta], 1)
        scale = columns.max(0)
        found, residual = nnls(columns / scale, loss)
        return residual**2, found / scale

    error = lambda exponents: linear(exponents)[0] if min(exponents) > 0 else math.inf
    grid = np.linspace(0.05, 0.95, 19)
    options = {"xatol": 1e-4, "fatol": 1e-10}
    if start is None:
        start, options = min(itertools.product(grid, grid), key=error), {"xatol": 1e-9, "fatol": 1e-18, "maxiter": 4000}
    alpha, beta = minimize(error, start, method="Nelder-Mead", options=options).x
    return Surface(float(alpha), float(beta), *map(float, linear((alpha, beta))[1]))


def interval(fit: Callable, columns: Sequence[Sequence[float]], of: Callable, draws: int = DRAWS) -> tuple:
    """From where to where 95 % of a number of a fit are, over runs drawn with replacement; nan where most draws are refused."""
    data, rng, found = np.asarray(columns, float), np.random.default_rng(0), []
    for _ in range(draws):
        try:
            found.append(of(fit(*data[:, rng.integers(0, data.shape[1], data.shape[1])])))
        except Refused:
            pass
    return tuple(np.percentile(found, [2.5, 97.5])) if len(found) > draws / 2 else (math.nan, math.nan)


def names(text: str) -> tuple[str, ...]:
    """The fits that are asked for, NAME,NAME.

    Raises:
      UserError: for one that is unknown.
    """
    found = tuple(filter(None, text.split(",")))
    for name in found:
        check_choice("--fit", name, tuple(FITS))
    return found


def report(asked: Sequence[str], rows: Sequence[Row], chosen: Sequence[Row], tuned: Sequence[str] = ()) -> list[str]:
    """The sections of a sweep's report with these fits.

    Args:
      asked: names of `FITS`.
      rows: all of them.
      chosen: those that the report compares: all, or the best of each axis that is tuned.
      tuned: keys of the axes that are tuned.
    """
    return [text for name in asked for text in FITS[name](rows, chosen, tuned)]


def _groups(rows: Sequence[Row], *without: str) -> dict[tuple, list[Row]]:
    """The finished rows by their values but some."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.results:
            kept = tuple((key, value) for key, value in row.values.items() if key not in without)
            groups.setdefault(kept, []).append(row)
    return groups


def _label(values: tuple) -> str:
    return ", ".join(value if key == "mixer" else f"{key}={value}" for key, value in values) or "all"


def _rates(rows: Sequence[Row], chosen: Sequence[Row], tuned: Sequence[str]) -> list[str]:
    lines = []
    for kept, group in _groups([row for row in rows if RATE in row.values], RATE).items():
        rates = [float(row.values[RATE]) for row in group]
        shared = set.intersection(*(set(row.seeds) for row in group))  # a mean over other seeds is another number
        valid = [[r["valid"] for seed, r in zip(row.seeds, row.results) if seed in shared] for row in group]
        try:
            if not shared:
                raise Refused("no seed has been run with all of them")
            sign = -1 if Display.read(group[0].first).higher_is_better else 1
            scores = [sign * statistics.fmean(values) for values in valid]
            found = f"{best_rate(rates, scores):.3g}, 2^{math.log2(best_rate(rates, scores)):.2f}"
        except Refused as error:
            found = f"no fit: {error}"
        lines.append(f"- `{_label(kept)}`: {found}")
    note = "A parabola in the logarithm, through the best value on the validation split and its neighbours."
    return ["## Learning rates", note, "\n".join(lines) or f"None: no finished cells with an axis {RATE}."]


def _scaling(rows: Sequence[Row], chosen: Sequence[Row], tuned: Sequence[str]) -> list[str]:
    text = [
        "## Scaling",
        "N: parameters; D: tokens of training; C = 3 x FLOPs of the forward pass per token x D; L: the test metric. In brackets "
        f"are 95 % of {DRAWS} fits to runs drawn with replacement.",
    ]
    falls = [row for row in chosen if row.cost and row.results and not Display.read(row.first).higher_is_better]
    groups = _groups(falls, "model.width", "model.depth", "train.steps", *tuned)
    for values, group in groups.items():
        size, tokens, compute, loss = map(list, zip(*(_run(row) for row in group)))
        lines = [
            f"- loss surface: {_said_surface(size, tokens, loss)}",
            f"- iso-FLOP: {_said_budgets(compute, size, loss)}",
        ]
        text += [f"### `{_label(values)}`", "\n".join(lines)]
    return text if groups else [*text, "None: no finished cells with a metric that falls."]


def _run(row: Row) -> tuple[float, float, float, float]:
    """N, D, C and L."""
    config = row.cells[0].config
    tokens = config["train"]["steps"] * config["train"]["batch_size"] * row.first["length"]
    return row.cost.parameters, tokens, 3 * row.cost.flops_per_token * tokens, row.test()[0]


def _said_surface(size: Sequence[float], tokens: Sequence[float], loss: Sequence[float]) -> str:
    try:
        found = surface(size, tokens, loss)
    except Refused as error:
        return f"no fit: {error}"
    start = (found.alpha, found.beta)
    low, high = interval(lambda *data: surface(*data, start=start), (size, tokens, loss), lambda fit: fit.exponent)
    off = max(abs(found(n, d) / value - 1) for n, d, value in zip(size, tokens, loss))
    return (
        f"L = {found.E:.4g} + {found.A:.4g} N^-{found.alpha:.4f} + {found.B:.4g} D^-{found.beta:.4f}; N* ~ (N D)^"
        f"{found.exponent:.4f} [{low:.3f}, {high:.3f}]; no run is further from it than {100 * off:.2g} %"
    )


def _said_budgets(compute: Sequence[float], size: Sequence[float], loss: Sequence[float]) -> str:
    try:
        found = iso_flop(compute, size, loss)
    except Refused as error:
        return f"no fit: {error}"
    low, high = interval(iso_flop, (compute, size, loss), lambda fit: fit.exponent)
    shown = ", ".join(f"{n:,.0f} at {c:.3g}" for c, n in zip(found.budgets, found.sizes))
    far = 10 * max(found.budgets)
    return (
        f"N* ~ C^{found.exponent:.4f}"
        + (f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else " (too few runs for an interval)")
        + f"; N* = {shown}; at {far:.3g} FLOPs, ten times the largest budget and as far as this says anything, "
        f"{math.exp(found.intercept) * far**found.exponent:,.0f}"
    )


FITS: Mapping[str, Callable[[Sequence[Row], Sequence[Row], Sequence[str]], list[str]]] = {
    "lr": _rates,
    "scaling": _scaling,
}

"""Plots of what a sweep has found: quality against cost, learning curves, scores by length."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import write_figure
from data.metrics import Display
from sweeps.rows import Row, common_axes, grids, interval

COSTS = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs per token (forward)",
    "carry_bytes": "carry, bytes per sequence",
}
NAMES = re.compile(r"(quality|learning|lengths|settings|tuning)(-\d+)?\.png")  # of what is written
MANY = 12  # rows beyond which labels go into a legend and shrink


def save(groups: Sequence[Sequence[Row]], folder: Path, choices: Sequence = (), keys: Sequence[str] = ()) -> str:
    """Writes the plots.

    Args:
      groups: of comparable rows.
      folder: where.
      choices: of `sweeps.tuning`.
      keys: of the axes that are tuned.

    Returns:
      a sentence that says where they are.
    """
    plots = {"quality": quality, "learning": learning, "lengths": lengths, "settings": settings}
    if not groups:
        return "no plots: nothing is finished"
    for path in [path for path in folder.glob("*.png") if NAMES.fullmatch(path.name)]:
        path.unlink()  # of an earlier state of the sweep
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no plots: pip install matplotlib"
    made = []
    for i, group in enumerate(groups):
        suffix = f"-{i + 1}" if len(groups) > 1 else ""
        hidden = [*common_axes(group), *keys]  # what was chosen for a row does not tell it from others
        for name, plot in plots.items():
            if (figure := plot(group, hidden)) is not None:
                made.append(f"{name}{suffix}.png")
                write_figure(folder / made[-1], figure, dpi=130)
    for i, same in enumerate(groups):
        some = [choice for choice in choices if any(choice.chosen is row for row in same)]
        if (figure := tuning(some, keys)) is not None:
            made.append(f"tuning-{i + 1}.png" if len(groups) > 1 else "tuning.png")
            write_figure(folder / made[-1], figure, dpi=130)
    return f"plots: {', '.join(made)}"


def panels(count: int, width: float = 5.0, height: float = 4.2, **options):
    """A figure without a window, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def styles(group: Sequence[Row]) -> list[dict]:
    """A colour for each row; where these repeat, other markers and dashes."""
    from matplotlib import colormaps

    colours = colormaps["tab10"].colors
    turns = [(i % 10, i // 10) for i in range(len(group))]
    return [{"color": colours[i], "marker": "osD^vP*X"[n % 8], "ls": ("-", "--", ":", "-.")[n % 4]} for i, n in turns]


def quality(group: Sequence[Row], hidden: Sequence[str]):
    """The test metric against parameters, FLOPs and carry, with intervals over seeds and the floors."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    names = [name for name in COSTS if any(getattr(row.cost, name) for row in group)]
    figure, axes = panels(len(names), sharey=True)
    metric = Display.read(group[0].first)
    scale = metric.scale
    labels = []
    for axis, name in zip(axes, names):
        points = []
        for row, style in zip(group, styles(group)):
            x = getattr(row.cost, name)
            if not x:
                continue
            mean, half = row.test()
            axis.errorbar(
                x, scale * mean, None if half is None else scale * half, capsize=3, ms=6, **style | {"ls": ""}
            )
            points.append((x, scale * mean, row.label(hidden), style["color"]))
        axis.set_xscale("log")
        xs = [x for x, *_ in points]
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(xs) < 100 * min(xs) else (1,)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
        # Matched models lie on a line: they are shown as such, not magnified.
        centre, spread = (max(xs) * min(xs)) ** 0.5, max(2.0, (max(xs) / min(xs)) ** 0.5 * 1.4)
        axis.set_xlim(centre / spread, centre * spread)
        axis.set(xlabel=COSTS[name])
        axis.grid(alpha=0.3)
        labels.append((axis, points))
    axes[0].set_ylabel(f"test {metric.label}")
    for axis in axes:
        floors(axis, group[0], scale)
    entitle(figure, group, "bars: 95 % interval of the mean over seeds")
    if len(group) > MANY:
        handles = [
            Line2D([], [], label=row.label(hidden), **style | {"ls": ""}) for row, style in zip(group, styles(group))
        ]
        figure.legend(handles=handles, loc="outside right upper", fontsize=7, ncols=1 + len(group) // 30)
    else:
        figure.draw_without_rendering()  # labels are kept apart where the layout has put the points
        for axis, points in labels:
            annotate(axis, points)
    return figure


def annotate(axis, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes (x, y, text, colour) beside the points, none over another; points of about the same x share a column."""
    from matplotlib import patheffects

    def place(point):
        """Where a point is on the figure, in points, as fonts are."""
        return axis.transData.transform(point[:2]) * 72 / axis.figure.dpi

    left, right = axis.transAxes.transform(((0, 0), (1, 0)))[:, 0] * 72 / axis.figure.dpi
    columns, taken = [], []
    for point in sorted(points):
        if not columns or place(point)[0] - place(columns[-1][0])[0] > 40:
            columns.append([])
        columns[-1].append(point)
    for column in columns:
        width = 4.8 * max(len(text) for *_, text, _ in column)
        begin = max(place(point)[0] for point in column) + 10
        if begin + width > right:
            begin = max(left + 3, min(place(point)[0] for point in column) - 10 - width)
        lowest = -math.inf
        for point in sorted(column, key=lambda point: point[1]):
            x, y, text, colour = point
            height = max(lowest, place(point)[1])
            for other, start, end in sorted(taken):
                if start < begin + width and begin < end and abs(other - height) < 11:
                    height = other + 11
            lowest = height + 11
            taken.append((height, begin, begin + width))
            label = axis.annotate(
                text,
                (x, y),
                xytext=(begin - place(point)[0], height - place(point)[1]),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
            )
            label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def floors(axis, row: Row, scale: float) -> None:
    """The trivial predictors, as lines where they are near what is shown, else in words."""
    low, high = axis.get_ylim()
    values = {name: scale * value for name, value in row.first["floors"].items()}
    near = {n: v for n, v in values.items() if low - 0.8 * (high - low) <= v <= high + 0.8 * (high - low)}
    low, high = min(low, *near.values(), high), max(high, *near.values(), low)
    axis.set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))
    names, last = [], -math.inf
    for name, value in sorted(near.items(), key=lambda item: item[1]):
        axis.axhline(value, color="grey", lw=0.8, ls="--", zorder=0)
        if value - last < 0.05 * (high - low):
            names[-1][1].append(name)
        else:
            names.append((value, [name]))
        last = value
    for value, together in names:
        options = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "top", "fontsize": 7, "color": "grey"}
        axis.text(0.99, value, ", ".join(together), **options)
    far = [f"{name} {value:.3g}" for name, value in values.items() if name not in near]
    if far:
        axis.set_title(f"floors beyond: {', '.join(far)}", fontsize=7, color="grey", loc="right")


def learning(group: Sequence[Row], hidden: Sequence[str]):
    """The loss in training and the metric on the validation split by step; bands are the range over seeds."""
    figure, (training, validation) = panels(2, 6.0)
    metric = Display.read(group[0].first)
    scale = metric.scale
    curves = ((training, "train", "loss", 1), (validation, "valid", metric.name, scale))
    for axis, split, name, factor in curves:
        for row, style in zip(group, styles(group)):
            runs = [{l["step"]: l[name] for l in run if l["split"] == split and name in l} for run in row.metrics]
            steps = sorted(set.intersection(*map(set, runs)))
            values = factor * np.array([[run[step] for step in steps] for run in runs], float)
            marks = {"ms": 4} if len(steps) <= 20 else {"marker": ""}
            axis.plot(steps, values.mean(0), lw=1.5, label=row.label(hidden), **style | marks)
            if len(runs) > 1:
                axis.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, lw=0)
        axis.set(xlabel="step", ylabel=f"{'training' if split == 'train' else 'validation'} {name.replace('_', ' ')}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    validation.set_ylabel(f"validation {metric.label}")
    floors(validation, group[0], scale)
    legend(figure, validation, group)
    entitle(figure, group, "bands: range over seeds")
    return figure


def lengths(group: Sequence[Row], hidden: Sequence[str]):
    """The test metric by length; None where only the length of training was scored."""
    if all(len(row.lengths()) < 2 for row in group):
        return None
    figure, (axis,) = panels(1, 7.0)
    metric = Display.read(group[0].first)
    scale = metric.scale
    for row, style in zip(group, styles(group)):
        means, halves = zip(*(row.test(n) for n in row.lengths()))
        means = scale * np.array(means)
        axis.plot(row.lengths(), means, lw=1.5, ms=5, label=row.label(hidden), **style)
        if None not in halves:
            half = scale * np.array(halves)
            axis.fill_between(row.lengths(), means - half, means + half, color=style["color"], alpha=0.15, lw=0)
    floors(axis, group[0], scale)
    axis.axvline(group[0].first["length"], color="grey", lw=0.8, ls="--", zorder=0)
    axis.set_xscale("log", base=2)
    ticks = sorted(set().union(*(row.lengths() for row in group)))
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="length (dashed: of training)", ylabel=f"test {metric.label}")
    axis.grid(alpha=0.3)
    legend(figure, axis, group)
    entitle(figure, group, "bands: 95 % interval of the mean over seeds")
    return figure


def settings(group: Sequence[Row], hidden: Sequence[str]):
    """Test metrics under other settings of the task, a panel for each metric; None where there are none."""
    found = grids(group)
    if not found:
        return None
    figure, axes = panels(len(found), 6.0)
    for axis, (metric, columns) in zip(axes, found):
        for row, style in zip(group, styles(group)):
            there = {words: own for words, own in row.grid().items() if words in columns}
            places = [columns.index(words) for words in there]
            means, halves = zip(*(interval([e["score"] for e in own]) for own in there.values())) if there else ((), ())
            bars = None if None in halves or not halves else metric.scale * np.array(halves)
            means = metric.scale * np.array(means)
            axis.errorbar(places, means, bars, capsize=3, lw=1.5, ms=5, label=row.label(hidden), **style)
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=7)
        axis.set_ylabel(f"test {metric.label}")
        axis.grid(alpha=0.3)
    legend(figure, axes[-1], group)
    entitle(figure, group, "bars: 95 % interval of the mean over seeds")
    return figure


def tuning(choices, keys: Sequence[str]):
    """The score on validation against a tuned axis, one line for each combination of the others, the chosen one marked; None
    where several axes are tuned together, or one whose values are not numbers."""
    finite = [choice for choice in choices if choice.chosen is not None]
    if len(keys) != 1 or not finite:
        return None
    try:
        values = [[float(row.values[keys[0]]) for row in choice.candidates] for choice in finite]
    except ValueError:
        return None
    figure, (axis,) = panels(1, 7.0)
    metric = Display.read(finite[0].chosen.first)
    for choice, xs, style in zip(finite, values, styles([choice.chosen for choice in finite])):
        known = sorted((x, s) for x, s in zip(xs, choice.scores) if s is not None and math.isfinite(s))
        label = ", ".join(v if key == "mixer" else f"{key}={v}" for key, v in choice.values.items()) or "all"
        axis.plot(*zip(*((x, metric.scale * s) for x, s in known)), lw=1.5, ms=5, label=label, **style)
        best = float(choice.chosen.values[keys[0]]), metric.scale * choice.scores[choice.best]
        axis.plot(*best, marker="o", ms=13, mfc="none", color=style["color"])
    if min(map(min, values)) > 0:
        axis.set_xscale("log")
    axis.set(xlabel=f"{keys[0]} (ring: chosen)", ylabel=f"validation {metric.label}")
    axis.grid(alpha=0.3)
    floors(axis, finite[0].chosen, metric.scale)
    legend(figure, axis, [choice.chosen for choice in finite])
    return figure


def legend(figure, axis, group: Sequence[Row]) -> None:
    """Beside the panels, one entry for each row, best first."""
    handles, labels = axis.get_legend_handles_labels()
    size, columns = 8 if len(group) <= MANY else 6, 1 + len(group) // 30
    figure.set_figwidth(figure.get_figwidth() + 1.2 * (columns - 1))  # or it would lie on the title
    figure.legend(handles, labels, loc="outside right upper", fontsize=size, handlelength=3, ncols=columns)


def entitle(figure, group: Sequence[Row], spread: str) -> None:
    """Above the panels, beside the legend: the task, what all rows have in common, and what shows the spread over seeds where
    there are several."""
    values = ", ".join([group[0].first["task"], *(f"{k}={group[0].values[k]}" for k in common_axes(group))])
    several = any(len(row.results) > 1 for row in group)
    figure.suptitle(f"{values} ({spread})" if several else values, x=0.01, ha="left")

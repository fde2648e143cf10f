"""Recall against the size of the state, over mixers: one picture and one table from finished sweeps.

    python -m benchmarks.recall_state --mixers
    python sweep.py --config=configs/recall.py:task=mqar --over mixer=attention,based,gla model.width=64,128 --workdir=runs/mqar
    python -m benchmarks.recall_state runs/mqar runs/other --png=recall_state.png

`--mixers` prints the names of all mixers that can be trained on a recall task and have a carry, as a value of the sweep's axis.
The sweeps may have any axes beside the mixer, such as widths and states, and may be several, of one task at one length. Of
axes that a sweep has tuned (--best_of), only what was chosen on the validation split is there. A point is a setting, its bar the
range over seeds; the points of a mixer are joined in the order of their carries. The stairs are the best score that is found up
to each size of the carry, and the table marks the settings on them (after figure 2 of Based, arXiv 2402.18668).
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common import command
from common.errors import UserError
from common.files import read_json


class Point(NamedTuple):
    """A setting of a mixer.

    Attributes:
      mixer: its name, or the pattern's.
      setting: the values of the sweep's other axes.
      carry: bytes of one sequence.
      scores: on the test split, one for each seed.
    """

    mixer: str
    setting: str
    carry: int
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """The mean over seeds."""
        return sum(self.scores) / len(self.scores)


def read(folders: Sequence[Path]) -> tuple[list[Point], Mapping]:
    """The finished settings of sweeps, by the size of their carries, and a result that says what the scores are.

    Raises:
      UserError: if a folder holds no report of a sweep, no cell is finished, or the sweeps are not of one task, metric and
        length.
    """
    found, kinds, example = {}, {}, None
    for folder in folders:
        if not (folder / "results.csv").is_file():
            raise UserError(f"{folder} holds no results.csv: give the --workdir of a sweep")
        with open(folder / "results.csv", newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            if "status" not in names:
                raise UserError(f"{folder}/results.csv is no table of a sweep: give the --workdir of one")
            axes = [name for name in names[: names.index("status")] if name not in ("mixer", "seed")]
            for line in reader:
                if line["status"] != "finished" or not line.get("carry_bytes") or line.get("chosen") == "False":
                    continue
                kinds.setdefault((line["task"], line["metric"], line["length"]), folder)
                setting = ", ".join(f"{name}={line[name]}" for name in axes)
                key = (line.get("mixer") or folder.name, setting, int(line["carry_bytes"]))
                found.setdefault(key, []).append(float(line["test"]))
        example = example or next(filter(None, map(read_json, sorted(folder.glob("*/result.json")))), None)
    if not found or example is None:
        raise UserError(f"no cell of {', '.join(map(str, folders))} is finished and has a carry")
    if len(kinds) > 1:
        told = "; ".join(
            f"{folder} has {task}, {metric}, length {length}" for (task, metric, length), folder in kinds.items()
        )
        raise UserError(f"the sweeps are not of one task, metric and length: {told}")
    points = [Point(*key, tuple(scores)) for key, scores in found.items()]
    return sorted(points, key=lambda point: (point.carry, point.mixer)), example


def frontier(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """Of points in the order of their carries, those that are better than all with as large a carry or a smaller one."""
    sign = 1 if higher_is_better else -1
    made: list[Point] = []
    for point in sorted(points, key=lambda point: (point.carry, -sign * point.score)):
        if not made or sign * point.score > sign * made[-1].score:
            made.append(point)
    return made


def table(points: Sequence[Point], best: Sequence[Point], scale: float) -> str:
    """The points as aligned text; * is on the stairs."""
    cells = [("", "mixer", "setting", "carry bytes", "test score")]
    for point in points:
        spread = f" ± {scale * (max(point.scores) - min(point.scores)) / 2:.2f}" if len(point.scores) > 1 else ""
        mark = "*" if point in best else ""
        cells.append((mark, point.mixer, point.setting, f"{point.carry:,}", f"{scale * point.score:.2f}{spread}"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells)


def draw(points: Sequence[Point], best: Sequence[Point], example: Mapping, path: Path) -> None:
    """Writes the picture."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    from data.metrics import Display
    from sweeps import plots

    metric = Display.read(example)
    scale = metric.scale
    figure, (axis,) = plots.panels(1, 9.0, 5.6)
    mixers = sorted({point.mixer for point in points}, key=lambda name: max(p.score for p in points if p.mixer == name))
    for name, style in zip(reversed(mixers) if metric.higher_is_better else mixers, plots.styles(mixers)):
        own = [point for point in points if point.mixer == name]
        ys = [scale * point.score for point in own]
        bars = [
            [y - scale * min(p.scores) for y, p in zip(ys, own)],
            [scale * max(p.scores) - y for y, p in zip(ys, own)],
        ]
        axis.errorbar([p.carry for p in own], ys, bars, label=name, lw=1, ms=5, capsize=2, **style)
    right = max(point.carry for point in points)
    xs, ys = [point.carry for point in best] + [right], [scale * point.score for point in best]
    axis.step(xs, [*ys, ys[-1]], where="post", color="black", lw=4, alpha=0.15, zorder=0)
    for name, value in example["floors"].items():
        axis.axhline(scale * value, color="grey", lw=0.8, ls="--", zorder=0)
        options = {"ha": "right", "va": "bottom", "fontsize": 7, "color": "grey"}
        axis.text(0.99, scale * value, name, transform=axis.get_yaxis_transform(), **options)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="carry, bytes per sequence", ylabel=f"test {metric.label}")
    axis.set_title(f"{example['task']}, length {example['length']}; bars: range over seeds", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, ncols=1 + len(mixers) // 40)
    figure.savefig(path, dpi=130)


def trainable() -> list[str]:
    """The mixers that are causal and have a carry."""
    from models import mixer

    return [name for name in mixer.names() if mixer.find(name).causal and mixer.find(name).streaming]


def main(arguments: Sequence[str]) -> int:
    parser = command.Parser(__doc__, usage="python -m benchmarks.recall_state SWEEP [SWEEP ...] [--png=FILE]")
    parser.add_argument("sweeps", nargs="*", type=Path, help="--workdir of finished sweeps")
    parser.add_argument("--mixers", action="store_true", help="print the mixers that can take part, and exit")
    parser.add_argument("--png", type=command.new_file, help="where to draw the picture")
    options = parser.parse_args(arguments)
    if options.mixers:
        print(",".join(trainable()))
        return 0
    if not options.sweeps:
        parser.error("give the directories of finished sweeps, or --mixers")
    from data.metrics import Display

    points, example = read(options.sweeps)
    metric = Display.read(example)
    best = frontier(points, metric.higher_is_better)
    print(f"{example['task']}, length {example['length']}: test {metric.label}\n")
    print(table(points, best, metric.scale))
    if options.png:
        draw(points, best, example, options.png)
        print(f"\n{options.png}")
    return 0


if __name__ == "__main__":
    command.run(main)

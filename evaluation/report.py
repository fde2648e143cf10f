"""What is printed beside a result: intervals, the scores of trivial predictors, and the same model at several settings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.console import say
from data.metrics import LOSS, Metric, describe, reported
from data.task import Spec, Task


def line(scored) -> None:
    """Prints an `evaluation.scoring.Scored` in one line."""
    task, metric = scored.task, scored.task.spec.metric
    part = f", {scored.rows:,} of {scored.all_rows:,} rows" if scored.rows < scored.all_rows else ""
    text = f"{scored.split}, length {task.spec.length}{part}: {describe(task.spec, scored.result)}"
    if metric.name in scored.intervals:
        text += f"; {metric.words} {ends(metric, scored.intervals)} with 95 % over {scored.rows:,} rows"
    say(text)


def ends(metric: Metric, intervals: Mapping[str, tuple[float, float]]) -> str:
    """The interval of a metric, such as "81.20 to 84.10"; "-" where there is none."""
    return " to ".join(map(metric.number, sorted(intervals[metric.name]))) if metric.name in intervals else "-"


def floors(task: Task, split: str, result: Mapping[str, float], found: Mapping[str, float] | None = None) -> None:
    """Prints a result beside the floors of its rows (by default those of its split), worst first, in the unit of the task's
    metric."""
    metric = task.spec.metric
    rows = {**(task.floors(split) if found is None else found), "model": result[metric.name]}
    numbers = {name: metric.number(value) for name, value in rows.items()}
    width = max(map(len, numbers.values()))
    print(f"\n{metric.label} on the {split} split of {task.name}, length {task.spec.length}")
    for name in sorted(rows, key=rows.get, reverse=not metric.higher_is_better):
        print(f"  {name:<24} {numbers[name]:>{width}}{'   <--' if name == 'model' else ''}")


def lengths(spec: Spec, results: Sequence[tuple[int, dict[str, float]]], trained: int) -> None:
    """Prints scores at several lengths."""
    metrics = [metric for name, metric in reported(spec).items() if name in results[0][1]]
    print(f"\n{'length':>8}  " + "  ".join(f"{metric.label:>8}" for metric in metrics))
    for length, result in results:
        note = "   trained at" if length == trained else ""
        cells = (f"{metric.number(result[metric.name]):>{max(8, len(metric.label))}}" for metric in metrics)
        print(f"{length:>8}  " + "  ".join(cells) + note)


def best_floor(scored) -> tuple[str, float] | None:
    """The floor that is hardest to beat, and its score; None where there is none."""
    found = {name: value for name, value in (scored.floors or {}).items() if not math.isnan(value)}
    if not found:
        return None
    name = (max if scored.task.spec.metric.higher_is_better else min)(found, key=found.get)
    return name, found[name]


def table(cells: Sequence[tuple[Mapping[str, Any], Any]]) -> str:
    """Scores of one task under several settings, as text.

    Args:
      cells: pairs of the settings that are named and an `evaluation.scoring.Scored`.
    """
    keys = list(dict.fromkeys(key for varied, _ in cells for key in varied))
    metric = cells[0][1].task.spec.metric
    spec = cells[0][1].task.spec
    scores = {other.name for other in spec.metrics} | {name for _, scored in cells for name in scored.result}
    others = [other for name, other in reported(spec).items() if name in scores - {metric.name, LOSS.name}]
    lines = [[*keys, "rows", metric.label, "95 %", *(other.label for other in others), "best floor"]]
    for varied, scored in cells:
        floor = best_floor(scored)
        lines.append(
            [
                *(str(varied.get(key, "")) for key in keys),
                f"{scored.rows:,}",
                metric.number(scored.result[metric.name]),
                ends(metric, scored.intervals),
                *(other.number(scored.result[other.name]) if other.name in scored.result else "" for other in others),
                "-" if floor is None else f"{metric.number(floor[1])} ({floor[0]})",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{text:>{width}}" for text, width in zip(line, widths)) for line in lines)

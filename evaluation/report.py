"""What is printed beside a result: the scores of trivial predictors, and the same model at several lengths."""

from collections.abc import Sequence

from data.metrics import reported
from data.task import Spec, Task


def floors(task: Task, split: str, result: dict[str, float]) -> None:
    """Prints a result beside the floors of its split, worst first, in the unit of the task's metric."""
    metric = task.spec.metric
    rows = {**task.floors(split), "model": result[metric.name]}
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

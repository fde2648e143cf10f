"""What is printed beside a result: the scores of trivial predictors, and the same model at several lengths."""

from collections.abc import Sequence

from data.task import Task


def floors(task: Task, split: str, result: dict[str, float]) -> None:
    """Prints a result beside the floors of its split, worst first."""
    metric = task.spec.metric
    rows = {**task.floors(split), "model": result[metric]}
    print(f"\n{metric.replace('_', ' ')} on the {split} split of {task.name}")
    for name, value in sorted(rows.items(), key=lambda row: row[1], reverse=not task.spec.higher_is_better):
        print(f"  {name:<24} {value:7.4f}{'   <--' if name == 'model' else ''}")


def lengths(results: Sequence[tuple[int, dict[str, float]]], trained: int) -> None:
    """Prints scores at several lengths."""
    names = [name for name in results[0][1] if name != "tokens"]
    print(f"\n{'length':>8}  " + "  ".join(name.replace("_", " ") for name in names))
    for length, result in results:
        note = "   trained at" if length == trained else ""
        print(f"{length:>8}  " + "  ".join(f"{result[name]:{len(name)}.4f}" for name in names) + note)

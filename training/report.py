"""What is printed beside a result: the scores of trivial predictors, and the same model at several lengths."""

from collections.abc import Sequence

from data.task import Task


def floors(task: Task, split: str, result: dict[str, float]) -> None:
    """Prints a result beside the floors of its split, worst first."""
    unit = task.spec.unit
    rows = {**task.floors(split), "model": result[f"bits_per_{unit}"]}
    print(f"\nbits per {unit} on the {split} split of {task.name}")
    for name, value in sorted(rows.items(), key=lambda row: -row[1]):
        print(f"  {name:<16} {value:7.4f}{'   <--' if name == 'model' else ''}")


def lengths(results: Sequence[tuple[int, dict[str, float]]], trained: int, unit: str) -> None:
    """Prints scores at several context lengths."""
    print(f"\n{'length':>8}  bits per {unit}  perplexity  accuracy")
    for length, result in results:
        note = "   trained at" if length == trained else ""
        print(
            f"{length:>8}  {result[f'bits_per_{unit}']:{len('bits per ' + unit)}.4f}  {result['perplexity']:10.3f}"
            f"  {100 * result['accuracy']:6.2f} %{note}"
        )

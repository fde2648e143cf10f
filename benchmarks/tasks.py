"""How fast the rows of each task are made, in one process.

    python -m benchmarks.tasks
    python -m benchmarks.tasks --tasks=mqar,listops --seconds=5

Prints rows and positions per second for the default size and, of tasks that are generated, for the published one. The others
fetch or read their data, as in training, or are listed with the first line of what they miss.
"""

import argparse
import sys
import time

from absl import flags

from data import task as tasks
from data.generated import GeneratedTask


def speed(task: tasks.Task, seconds: float) -> float:
    """Rows of the train split in a second."""
    task.example("train", 0)  # tables that are made once
    rows, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        rows += 1
        task.example("train", rows)
    return rows / passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(tasks.names()), help="names joined by commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    flags.FLAGS(sys.argv[:1])  # the input pipeline reads absl's flags
    print(f"{'task':<22}{'size':<10}{'length':>8}{'rows/s':>12}{'positions/s':>16}")
    for name in options.tasks.split(","):
        for size, chosen in {"default": {}, "paper": tasks.find(name).paper_size}.items():
            if size == "paper" and not (chosen and issubclass(tasks.find(name), GeneratedTask)):
                continue
            try:
                task = tasks.create(name, **chosen)
                rows = speed(task, options.seconds)
            except (FileNotFoundError, ImportError, ValueError, RuntimeError) as error:
                print(f"{name:<22}{size:<10}{str(error).splitlines()[0][:100]}", flush=True)
                continue
            print(
                f"{name:<22}{size:<10}{task.spec.length:>8,}{rows:>12,.0f}{rows * task.spec.length:>16,.0f}", flush=True
            )


if __name__ == "__main__":
    main()

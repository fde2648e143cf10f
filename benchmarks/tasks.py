"""How fast the rows of each task are made, in one process, beside the rows that a step of training takes.

    python -m benchmarks.tasks
    python -m benchmarks.tasks --tasks=mqar,listops --seconds=5
    python -m benchmarks.tasks --tasks=mqar --workers=8

Prints rows and positions per second of CPU for the default size and, of tasks that are generated, for the published one; then
the rows of a step of that size in the configuration for such tasks, and for how many steps a second these rows are enough: one
thread makes the rows of a host, and a device that is faster than that waits for data. `--workers` are processes that make them
(`train.data_workers`): then the rows are those of a second of wall time, and "taken/s" are the rows that one process takes from
however many workers in a second of its CPU. The other tasks
fetch or read their data, as in training, or are listed with the first line of what they miss. Rows that are kept are measured as
they are drawn.
"""

import contextlib
import importlib
import sys
import tempfile
import time

from absl import flags

from common import command
from data import task as tasks
from data.generated import GeneratedTask
from data.loader import Loader
from data.task import REAL
from data.workers import Workers


def family(name: str, task: tasks.Task) -> str:
    """The experiment file for such tasks, as docs/tasks.md has them."""
    if "corpus" in tasks.defaults(name) and not isinstance(task, GeneratedTask):
        return "lm"
    if not isinstance(task, GeneratedTask):
        return "lra"
    return "regression" if task.spec.objective in REAL else "recall"


def rows_of_a_step(name: str, task: tasks.Task, size: str) -> int:
    """The batch size of an experiment on a task, of size "default" or "paper"."""
    of = family(name, task)
    if of == "lm":
        argument = "size=" + {"default": "default", "paper": "medium"}[size]
    else:
        argument = f"task={name},size=" + {"default": "cpu", "paper": "paper"}[size]
    return importlib.import_module(f"configs.{of}").get_config(argument).train.batch_size


def speed(task: tasks.Task, seconds: float) -> float:
    """Rows of the train split in a second of CPU."""
    task.example("train", 0)  # tables that are made once
    rows, start = 0, time.process_time()
    while (passed := time.process_time() - start) < seconds:
        rows += 1
        task.example("train", rows)
    return rows / passed


def speed_of_workers(
    name: str, task: tasks.Task, options: dict, count: int, batch: int, seconds: float
) -> tuple[float, float]:
    """Rows of the train split that processes make in a second of wall time, in batches; and rows that this process takes from
    them in a second of its CPU: it checks them and places them on the device."""
    workers = Workers(name, options, count)
    try:
        loader = Loader(task, "train", batch, 0, workers=workers)
        for step in range(2 * count):  # all of them have begun
            loader[step]
        step, start, begun = 2 * count, time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - start) < seconds:
            loader[step]
            step += 1
        rows = (step - 2 * count) * batch
        return rows / passed, rows / (time.process_time() - begun)
    finally:
        workers.close()


def measure(
    name: str, options: dict, size: str, seconds: float, workers: int
) -> tuple[tasks.Task, float, float | None]:
    """The task, its speed, and how fast this process takes what workers make."""
    with contextlib.ExitStack() as stack:
        if "corpus" not in tasks.defaults(name) and "cache_dir" in tasks.defaults(name):  # nothing is kept there yet
            options = options | {"cache_dir": stack.enter_context(tempfile.TemporaryDirectory())}
        task = tasks.create(name, **options)
        if workers:
            return task, *speed_of_workers(name, task, options, workers, rows_of_a_step(name, task, size), seconds)
        return task, speed(task, seconds), None


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--tasks", default=",".join(tasks.names()), help="names joined by commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--workers", type=int, default=0, help="processes that make the rows; 0 is this one")
    options = parser.parse_args(arguments)
    flags.FLAGS(sys.argv[:1])  # the input pipeline reads absl's flags
    print(
        f"{'task':<22}{'size':<10}{'length':>8}{'rows/s':>10}{'positions/s':>14}{'rows/step':>11}{'steps/s':>10}"
        + f"{'taken/s':>10}" * bool(options.workers)
    )
    for name in options.tasks.split(","):
        for size, chosen in {"default": {}, "paper": tasks.find(name).paper_size}.items():
            if size == "paper" and not (chosen and issubclass(tasks.find(name), GeneratedTask)):
                continue
            try:
                task, rows, taken = measure(name, chosen, size, options.seconds, options.workers)
            except (FileNotFoundError, ImportError, ValueError, RuntimeError) as error:
                print(f"{name:<22}{size:<10}{str(error).splitlines()[0][:100]}", flush=True)
                continue
            step = rows_of_a_step(name, task, size)
            print(
                f"{name:<22}{size:<10}{task.spec.length:>8,}{rows:>10,.0f}{rows * task.spec.length:>14,.0f}{step:>11,}"
                f"{rows / step:>10,.1f}" + ("" if taken is None else f"{taken:>10,.0f}"),
                flush=True,
            )


if __name__ == "__main__":
    command.run(main)

"""What the cache of compiled programs saves: a run that is started a second time, and a sweep over seeds, with it and without.

    python -m benchmarks.compile_cache
    python -m benchmarks.compile_cache --mixer=mamba --seeds=8 --steps=20

Each row is whole processes, from their start to their end: `train.py` in a directory of its own, first with an empty cache,
then with what the first one left there, then without any; and `sweep.py` over seeds and over learning rates, with an empty cache,
and over seeds without any. The
first column is wall time, the second what the processes took of CPUs. On a machine that does other work, too, go by the second.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import command
from common.compilation_cache import MINIMUM_SECONDS

SMALL = {"task.length": 128, "model.width": 64, "model.depth": 2, "train.batch_size": 8, "train.eval_batches": 2}


def timed(program: list[str], cache: Path | None) -> tuple[float, float]:
    """Seconds of wall time and of CPUs that a command takes.

    Args:
      program: arguments of Python.
      cache: the folder of compiled programs; None for no cache.
    """
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if cache is not None:  # the settings of `common.compilation_cache`, in another folder
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "true"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(MINIMUM_SECONDS)
        environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(program)} ended with {done.returncode}:\n{done.stdout}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--mixer", default="gla")
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args(arguments)
    settings = SMALL | {"train.steps": options.steps, "optimizer.warmup_steps": 2, "train.eval_every": 0}
    config = f"--config=configs/lm.py:mixer={options.mixer},corpus={options.corpus}"
    train = ["train.py", config, *(f"--config.{key}={value}" for key, value in settings.items())]
    sweep = ["sweep.py", config, "--set", *(f"{key}={value}" for key, value in settings.items()), "--over"]
    seeds = f"seed={','.join(map(str, range(options.seeds)))}"
    rates = f"optimizer.learning_rate=log:1e-4..1e-2:{options.seeds}"
    print(
        f"{options.mixer}, {options.steps} steps, {os.cpu_count()} cores\n{'':<34}{'wall s':>8}{'CPU s':>8}", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "cache")
        for name, program, cache in (
            ("first start of a run", train, kept),
            ("second start, another directory", train, kept),
            ("without a cache", train, None),
            (f"sweep of {options.seeds} seeds, an empty cache", [*sweep, seeds], Path(folder, "seeds")),
            (f"sweep of {options.seeds} rates, an empty cache", [*sweep, rates], Path(folder, "rates")),
            (f"sweep of {options.seeds} seeds, without a cache", [*sweep, seeds], None),
        ):
            workdir = tempfile.mkdtemp(dir=folder)
            wall, processors = timed([*program, f"--workdir={workdir}"], cache)
            print(f"{name:<34}{wall:>8.1f}{processors:>8.1f}", flush=True)


if __name__ == "__main__":
    command.run(main)

"""Timing of alternatives against each other: a settled process, a clock, and rounds in which they take turns."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from common.errors import UserError

# Without these, glibc gives large temporaries back after every call, and the page faults of the next one can cost more
# than the computation, to some alternatives more than to others.
_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=17179869184"
)
_MEMORY = 8 * 2**30  # bytes of temporaries above which a program is not run
_SAMPLE = 0.02  # seconds: shorter calls are repeated to make up a sample
_QUEUED = 20  # least calls in a sample on a device, between two waits for it


def settle_process() -> None:
    """On a Linux CPU, starts the process again on one core and with the allocator set, unless it is so already."""
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    cores = os.sched_getaffinity(0)
    if len(cores) > 1 or "GLIBC_TUNABLES" not in os.environ:
        os.sched_setaffinity(0, {max(cores)})  # XLA and torch then start one thread
        os.environ.setdefault("GLIBC_TUNABLES", _TUNABLES)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def environment(packages: Sequence[str]) -> dict:
    """What the figures depend on besides the code: device, load, versions of the packages that are there."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": _device(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": versions,
    }


def earlier(file: pathlib.Path | None, options: Mapping[str, Any], section: str | None = None) -> dict:
    """The rows of a file of results, which a benchmark goes on with; {} without a file.

    Args:
      file: JSON with "rows".
      options: that the rows depend on, by the name that the file has them under.
      section: of the file that these are in; None for the file itself.

    Raises:
      UserError: if the file is none of such results, or its rows were measured with other options.
    """
    if file is None or not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        known, rows = found if section is None else found[section], found["rows"]
        other = [key for key, value in options.items() if known[key] != value]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} holds no results of this benchmark: give another file") from None
    if other:
        told = ", ".join(f"--{key}={known[key]}" for key in other)
        raise UserError(f"the rows of {file} were measured with {told}: give that, or another file")
    return rows


def _device():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if jax.default_backend() == "cpu" and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return jax.devices()[0].device_kind


class Clock:
    """Seconds: CPU time of the process on a CPU, wall time on other devices."""

    def __init__(self):
        self.on_cpu = jax.default_backend() == "cpu"
        self.now = time.process_time if self.on_cpu else time.perf_counter
        self.metric = "CPU time" if self.on_cpu else "wall time"

    def per_call(self, function: Callable, calls: int) -> float:
        start = self.now()
        for _ in range(calls):
            result = function()
            if self.on_cpu:  # one call at a time; a device is given a queue of them
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (self.now() - start) / calls

    def calls(self, seconds: float) -> int:
        """In a sample, if one call takes `seconds`."""
        return max(1 if self.on_cpu else _QUEUED, math.ceil(_SAMPLE / max(seconds, 1e-6)))


class Program:
    """One alternative, and what was measured of it.

    Attributes:
      name, is_peer: what the table shows. Failures of a peer are noted, others are raised.
      prepare: () -> (function of no arguments that returns arrays, bytes of its temporaries or None).
      samples: seconds a call, one for each round; none if it did not run.
      note: why there are no samples, or fewer than asked for.
      difference: of the outputs from those of the first program, relative; the largest of all outputs.
    """

    def __init__(self, name: str, is_peer: bool, prepare: Callable):
        self.name, self.is_peer, self.prepare = name, is_peer, prepare
        self.samples: list[float] = []
        self.note = ""
        self.temporary_bytes = self.prepare_seconds = self.difference = None


def measure(
    programs: Sequence[Program],
    rounds: int,
    budget: float,
    clock: Clock,
    expected: Callable[[Program], float | None] = lambda program: None,
) -> None:
    """Runs the programs, which take turns in each round, and fills in what was measured.

    Args:
      programs: alternatives with the same outputs.
      rounds: samples of each.
      budget: seconds for the rounds of one program; fewer are run if not all fit. One whose single call is expected to
        take longer is not run at all.
      clock: what times them.
      expected: program -> seconds a call, None if nothing is known.
    """
    first, plans = None, []
    for program in programs:
        seconds = expected(program)
        if seconds is not None and seconds > budget:
            program.note = f"not run: about {seconds:.0f} s a call"
            continue
        try:
            start = time.perf_counter()
            call, program.temporary_bytes = program.prepare()
            program.prepare_seconds = time.perf_counter() - start
            if (program.temporary_bytes or 0) > _MEMORY:
                program.note = f"not run: {program.temporary_bytes / 1e9:.0f} GB of temporaries"
                continue
            start = clock.now()
            outputs = jax.block_until_ready(call())
            seconds = clock.now() - start
        except Exception as error:
            if not program.is_peer:
                raise
            program.note = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            continue
        outputs = [_array(x) for x in outputs]
        first = first or outputs
        program.difference = max(_difference(x, y) for x, y in zip(outputs, first, strict=True))
        if seconds > budget:
            program.samples, program.note = [seconds], "first call only"
            continue
        seconds = clock.per_call(call, 1)
        calls = clock.calls(seconds)
        own_rounds = max(1, min(rounds, int(budget / (seconds * calls))))
        program.note = "" if own_rounds == rounds else f"rounds: {own_rounds}"
        plans.append((program, call, calls, own_rounds))
    for number in range(rounds):
        for program, call, calls, own_rounds in plans if number % 2 == 0 else reversed(plans):
            if number < own_rounds:
                program.samples.append(clock.per_call(call, calls))


def _array(x) -> np.ndarray:
    """A jax array or a torch tensor of any device and precision, in float32."""
    return np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, np.float32)


def _difference(x, y):
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))


class Expectation:
    """Extrapolates times from shorter lengths by the power law through the last two, at least linearly."""

    def __init__(self):
        self._known: dict[str, dict[int, float]] = {}

    def learn(self, length: int, programs: Sequence[Program]) -> None:
        for program in programs:
            if program.samples:
                self._known.setdefault(program.name, {})[length] = statistics.median(program.samples)

    def at(self, length: int) -> Callable[[Program], float | None]:
        def expected(program):
            known = sorted(self._known.get(program.name, {}).items())
            if not known:
                return None
            (t0, s0), (t1, s1) = known[max(0, len(known) - 2)], known[-1]
            power = max(1.0, math.log(s1 / s0) / math.log(t1 / t0)) if t1 > t0 else 1.0
            return s1 * (length / t1) ** power

        return expected

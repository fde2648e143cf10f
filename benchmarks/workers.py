"""Programs in processes of their own, which take turns: what one allocates, or how many threads it starts, meets no other.

A worker prints one line of JSON with what it is, then reads numbers of calls from its standard input and answers each with the
seconds of CPU time and of wall time that they took and the megabytes that it has held at most.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence


class Worker:
    """A process that runs a program when it is told to.

    Args:
      name: as a table shows it.
      command: the program's arguments after the interpreter.
      cores: those that it may run on.

    Attributes:
      facts: what it printed of itself; {} if it ended first.
      error: the last line of what it complained of, if it ended.
      cpu, wall: seconds of a call, one for each round.
      megabytes: the most memory that it has held.
    """

    def __init__(self, name: str, command: Sequence[str], cores: set[int]):
        self.name, self.error, self.megabytes = name, "", 0.0
        self.cpu: list[float] = []
        self.wall: list[float] = []
        threads = {name: str(len(cores)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # which the new process inherits
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | threads,
        )
        os.sched_setaffinity(0, before)
        line = self._process.stdout.readline()
        self.facts = json.loads(line) if line.strip() else {}
        if not self.facts:
            self._fail()

    def _fail(self) -> None:
        self.error = (self._process.communicate()[1].strip().splitlines() or ["ended without a word"])[-1]

    def run(self, calls: int) -> float:
        """Runs the program, keeps what a call took, and returns the seconds of CPU time of a call; 0 if it ended, see `error`."""
        if self.error:
            return 0.0
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.strip():
            self._fail()
            return 0.0
        cpu, wall, self.megabytes = map(float, line.split())
        self.cpu.append(cpu / calls)
        self.wall.append(wall / calls)
        return cpu / calls

    def end(self) -> None:
        if not self.error:
            self._process.communicate("")


def alternate(workers: Sequence[Worker], rounds: int, seconds: float, most: int | None = None) -> None:
    """Runs the workers in turns, forwards and backwards, each some `seconds` a round, but at most `most` calls; the first calls
    are not kept."""
    calls = {}
    for worker in workers:
        fastest = min(worker.run(1), worker.run(1))
        if not worker.error:
            calls[worker] = max(1, round(seconds / max(fastest, 1e-9)))
            calls[worker] = min(calls[worker], most or calls[worker])
            worker.cpu.clear()
            worker.wall.clear()
    for number in range(rounds):
        for worker in list(calls)[:: 1 if number % 2 == 0 else -1]:
            worker.run(calls[worker])
    for worker in workers:
        worker.end()


def serve(facts: dict, call: Callable[[int], None]) -> None:
    """The other side, in the worker: prints the facts, then runs `call(number)` for each number that is read."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        call(int(line))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(cpu, wall, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)

"""Engines that run the cells of a sweep. There is one: processes of this machine."""

import dataclasses
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from common.errors import UserError
from sweeps.cells import LOG, Cell
from training.stopping import GracefulStop


@dataclasses.dataclass(frozen=True)
class Result:
    """How a cell has ended.

    Attributes:
      cell: the cell; what it found is in its directory.
      status: "finished", "failed", or "interrupted" (it goes on when the sweep is run again).
      error: of a failed cell, one line.
      seconds: since it was started, this time.
    """

    cell: Cell
    status: str
    error: str | None = None
    seconds: float = 0.0


class Launcher(Protocol):
    """Runs `cell.todo()` of each cell, one command after the other, with the output in its `log.txt`."""

    def run(self, cells: Sequence[Cell]) -> Iterator[Result]:
        """Yields the cells as they end, in any order. Those that a stop kept from starting are left out."""


class LocalLauncher:
    """Processes of this machine, each with its share of the cores and of `CUDA_VISIBLE_DEVICES`.

    SIGINT (Ctrl-C) and SIGTERM are passed on: runs save and stop, and go on next time. A second one kills them.

    Args:
      workers: cells that run at the same time.
      lock: a file that is locked while cells run, also by those that outlive this process.

    Raises:
      UserError: for less than one worker; from `run`, if the file is locked.
    """

    def __init__(self, workers: int, lock: Path):
        if workers < 1:
            raise UserError(f"a sweep needs at least one worker, got {workers}")
        self._workers = workers
        self._lock = lock

    def run(self, cells: Sequence[Cell]) -> Iterator[Result]:
        waiting, running, stopping = deque(cells), {}, False
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as lock, GracefulStop() as stop:
            self._acquire(lock)
            try:
                while running or (waiting and not stopping):
                    for worker in range(self._workers):
                        if waiting and worker not in running and not stopping:
                            running[worker] = _Job(waiting.popleft(), worker, self._workers, lock.fileno())
                    for worker, job in list(running.items()):
                        if (result := job.poll(stopping)) is not None:
                            del running[worker]
                            yield result
                    if stop.requested(0) and not stopping:
                        stopping = True
                        for job in running.values():
                            job.process.terminate()
                    time.sleep(0.05)
            finally:
                for job in running.values():
                    os.killpg(job.process.pid, signal.SIGKILL)

    def _acquire(self, lock) -> None:
        import fcntl  # not on Windows; nothing but this launcher needs it

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another sweep is at work in {self._lock.parent}, or a cell that it has left: wait for it or stop it"
            ) from None


class _Job:
    """A cell that runs."""

    def __init__(self, cell: Cell, worker: int, workers: int, lock: int):
        self._cell, self._worker, self._workers, self._lock = cell, worker, workers, lock
        self._begin = time.monotonic()
        cell.workdir.mkdir(parents=True, exist_ok=True)
        self._start(cell.todo()[0])

    def _start(self, command: list[str]) -> None:
        self._command = command
        self._environment = dict(os.environ)
        if self._workers > 1:
            self._environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they may share a GPU
            if devices := self._share(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
                self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        log = self._cell.workdir / LOG
        with log.open("ab") as output:
            self._output_start = output.tell()
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the sweep, which passes it on
                pass_fds=(self._lock,),
            )
        if hasattr(os, "sched_setaffinity") and (cores := self._share(sorted(os.sched_getaffinity(0)))):
            try:
                os.sched_setaffinity(self.process.pid, cores)
            except ProcessLookupError:
                pass  # it has ended already

    def _share(self, resources: list) -> list:
        """This worker's part; [] where there are too few for all."""
        return resources[self._worker :: self._workers] if len(resources) >= self._workers else []

    def poll(self, stopping: bool) -> Result | None:
        """How the cell has ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        left = self._cell.todo()
        end = lambda status, error=None: Result(self._cell, status, error, time.monotonic() - self._begin)
        if not left:
            return end("finished")
        if stopping:
            return end("interrupted")
        if code != 0:
            return end("failed", self._error(code))
        if left[0] == self._command:  # told by somebody else to stop
            return end("interrupted")
        self._start(left[0])
        return None

    def _error(self, code: int) -> str:
        """The line of the log that says why the last command has failed."""
        with (self._cell.workdir / LOG).open("rb") as log:
            log.seek(self._output_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception|Interrupt)\b)", line)]
        if code < 0:
            return f"killed by {signal.Signals(-code).name}" + (", perhaps for want of memory" if code == -9 else "")
        return (said or lines or [f"exit status {code}"])[-1].removeprefix("error: ")

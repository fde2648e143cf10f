"""Processes of this machine."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence

from sweeps.cells import LOG, Cell
from sweeps.engine import Engine, Outcome, outcome
from training.lock import locked
from training.stopping import GracefulStop


class Local(Engine):
    """Processes of this machine, each with its share of the cores and of `CUDA_VISIBLE_DEVICES`.

    SIGINT (Ctrl-C) and SIGTERM are passed on: runs save and stop, and go on next time. A second one kills them. The sweep's
    directory is locked while cells run, also by those that outlive this process.
    """

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        waiting, running, stopping = deque(cells), {}, False
        self.workdir.mkdir(parents=True, exist_ok=True)
        with locked(self.workdir, "sweep") as lock, GracefulStop() as stop:
            try:
                while running or (waiting and not stopping):
                    for worker in range(self.workers):
                        if waiting and worker not in running and not stopping:
                            running[worker] = _Job(self, waiting.popleft(), worker, lock)
                    for worker, job in list(running.items()):
                        if (ended := job.poll(stopping)) is not None:
                            del running[worker]
                            yield ended
                    if stop.requested(0) and not stopping:
                        stopping = True
                        for job in running.values():
                            job.process.terminate()
                    time.sleep(0.05)
            finally:
                for job in running.values():
                    os.killpg(job.process.pid, signal.SIGKILL)


class _Job:
    """A cell that runs."""

    def __init__(self, engine: Engine, cell: Cell, worker: int, lock: int):
        self._engine, self._cell, self._worker, self._lock = engine, cell, worker, lock
        self._begin = time.monotonic()
        cell.workdir.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        """Starts the next step."""
        self._step = self._cell.todo()[0]
        environment = dict(os.environ)
        if self._engine.workers > 1:
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they may share a GPU
            if devices := self._share(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        with (self._cell.workdir / LOG).open("ab") as output:
            self._output_start = output.tell()
            self.process = subprocess.Popen(
                self._engine.command(self._step),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
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
        workers = self._engine.workers
        return resources[self._worker :: workers] if len(resources) >= workers else []

    def poll(self, stopping: bool) -> Outcome | None:
        """How the cell has ended; None while it runs. With `stopping` no further step is started."""
        code = self.process.poll()
        if code is None:
            return None
        seconds = time.monotonic() - self._begin
        ended = outcome(self._cell, self._step, code, self._printed(), seconds)
        if ended is None and stopping:
            return Outcome(self._cell, "interrupted", None, seconds)
        if ended is None:
            self._start()
        return ended

    def _printed(self) -> str:
        """What the last step has printed."""
        with (self._cell.workdir / LOG).open("rb") as log:
            log.seek(self._output_start)
            return log.read().decode(errors="replace")

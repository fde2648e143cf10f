"""Processes of this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import remote
from common.appended import Appended
from common.console import say
from common.errors import UserError
from common.files import read_json
from common.lock import FILE, held
from sweeps import jobs
from sweeps.cells import LOG
from sweeps.engine import ALONE, Engine, Seen


class Local(Engine):
    """Processes of this machine, each with its share of the cores and of `CUDA_VISIBLE_DEVICES`.

    They end with the command: a signal to it is passed on, so that they save and stop. Those that it left behind when it was
    killed are adopted by the next one. A cell takes all accelerators of its share, and has one host.
    """

    poll = 0.1
    lasting = False
    remote = True
    known_options = {}

    def check(self) -> None:
        self.workers = 1 if self.workers is None else self.workers
        self._processes: dict[str, tuple[subprocess.Popen, int]] = {}
        self._logs: dict[str, Path] = {}  # of cells on an object store, which are copied there at their end
        if self.resources != ALONE:
            raise UserError(
                "--hosts, --accelerators and --minutes are for engines with several machines; --engine=local has this one, which "
                "--workers shares"
            )

    def submit(self, cells: Sequence[Path], retries: int) -> list[str]:
        return [self._start(cell) for cell in cells]

    def _start(self, cell: Path) -> str:
        taken = {worker for process, worker in self._processes.values() if process.returncode is None}
        worker = next(n for n in range(self.workers) if n not in taken)
        environment = dict(os.environ)
        if self.workers > 1:
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they may share a GPU
            if devices := self._share(worker, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")):
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        log = cell / LOG
        if remote.is_address(cell):
            handle, name = tempfile.mkstemp(prefix="mixology-", suffix=".log")
            os.close(handle)
            log = Path(name)
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command(cell),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the sweep, which passes it on
            )
        if hasattr(os, "sched_setaffinity") and (cores := self._share(worker, sorted(os.sched_getaffinity(0)))):
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, cores)
        self._processes[str(process.pid)] = process, worker
        if remote.is_address(cell):
            self._logs[str(process.pid)] = log
        return str(process.pid)

    def _share(self, worker: int, resources: list) -> list:
        """A worker's part; [] where there are too few for all."""
        return resources[worker :: self.workers] if len(resources) >= self.workers else []

    def states(self, given: Mapping[str, Path]) -> dict[str, Seen]:
        return {name: self._state(name, cell) for name, cell in given.items()}

    def _state(self, name: str, cell: Path) -> Seen:
        if name not in self._processes:  # of another command, which has been killed
            return Seen("running") if held(jobs.folder(cell)) else Seen("ended", "the sweep was killed")
        code = self._processes[name][0].poll()
        if code is None or held(jobs.folder(cell)):  # by one that another command left behind
            return Seen("running")
        jobs.write_exit_code(cell, code)
        if (log := self._logs.pop(name, None)) is not None:
            with contextlib.closing(Appended(cell / LOG, lasting=True)) as kept:
                kept.write(log.read_text(errors="replace"))
            log.unlink()
        return Seen("ended")

    def cancel(self, given: Mapping[str, Path]) -> None:
        self._send(given, signal.SIGTERM)

    def kill(self, given: Mapping[str, Path]) -> None:
        self._send(given, signal.SIGKILL)

    def _send(self, given: Mapping[str, Path], number: int) -> None:
        for name, cell in given.items():
            if self._state(name, cell).state == "running" and (process := self._process(name, cell)) is not None:
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(process, number)

    def _process(self, name: str, cell: Path) -> int | None:
        """Its number: of one that was adopted, what holds the cell's lock; None where that is on another machine, or has not said
        who it is."""
        if name in self._processes:
            return int(name)
        holder = read_json(jobs.folder(cell) / FILE)
        if not isinstance(holder, dict) or holder.get("host") != socket.gethostname():
            where = "a process that has not said which" if not isinstance(holder, dict) else f"{holder.get('host')}"
            say(f"{cell.name} is at work on {where}: stop it there")
            return None
        return holder["process"]

"""Programs that run as several processes of this machine, joined over the loopback."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process has ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(
    commands: Sequence[Sequence[object]],
    environments: Sequence[Mapping[str, str]] | None = None,
    meanwhile: Callable[[list[subprocess.Popen]], None] = lambda processes: None,
    count: int | None = None,
    seconds: float = 1800,
) -> list[Ended]:
    """Runs Python with the arguments of each process, JAX's variables for joining them in the environment.

    Args:
      commands: of each process, the arguments of Python.
      environments: of each process, more variables.
      meanwhile: is called with the processes when they have been started.
      count: how many processes they are told that they are; by default as many as there are.
      seconds: after which they are killed.

    Raises:
      AssertionError: if they were, with what each has printed.
    """
    address, processes = f"127.0.0.1:{free_port()}", []
    for i, command in enumerate(commands):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1"),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count or len(commands)),
            "JAX_PROCESS_ID": str(i),
        }
        environment |= environments[i] if environments else {}
        started = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(started)
    ends: dict[int, Ended] = {}

    late = []

    def collect(i: int) -> None:
        try:
            out, err = processes[i].communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            late.append(i)
            processes[i].kill()
            out, err = processes[i].communicate()
        ends[i] = Ended(processes[i].returncode, out, err)

    threads = [threading.Thread(target=collect, args=(i,)) for i in range(len(processes))]
    try:
        for thread in threads:
            thread.start()
        meanwhile(processes)
        for thread in threads:
            thread.join()
    finally:
        for process in processes:
            process.kill()
    assert not late, f"processes {sorted(late)} did not end within {seconds:g} s: {[ends[i] for i in sorted(ends)]}"
    return [ends[i] for i in range(len(processes))]

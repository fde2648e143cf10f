"""The roll call: the processes of one program find each other, before JAX is started, and see that they run the same.

Process 0 listens at the address that JAX's coordinator will have, every other process connects to it and says who it is. JAX's
own start does not say who is missing, and ends a process that waits for others by an abort. The connections stay open, see
`common.hosts`.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, check_range

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy")
NAMES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
MOST = 2**16  # processes
START = 300.0  # seconds for all processes to come
NAMED = 16  # of those that are missing
GREETING = 5.0  # seconds for what connects to say who it is


@dataclasses.dataclass(frozen=True)
class Place:
    """Where processes meet, and which of them this is.

    Attributes:
      address: "host:port" of process 0.
      processes: how many there are.
      process: the number of this one, from 0.
      devices: numbers of the local devices that this one drives; None for all.
    """

    address: str
    processes: int
    process: int
    devices: list[int] | None = None


def find(given: Mapping[str, str | None] | None = None, seconds: float = START) -> Place:
    """Where this process belongs: as flags say, else as the environment does, else as JAX finds it (TPUs, SLURM, GKE, MPI).

    Args:
      given: values of flags, by the keys of `NAMES`.
      seconds: for JAX to ask a cluster.

    Raises:
      UserError: for what is missing, and for what is no address or no number.
    """
    from jax._src import clusters  # the only place that knows how each cluster names its processes

    said = {key: (given or {}).get(key) or os.environ.get(name) or None for key, name in NAMES.items()}
    numbers = {key: _whole(key, said[key]) for key in ("num_processes", "process_id")}
    own = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    if own is not None and (not re.fullmatch(r"\d+(,\d+)*", own) or len({*own.split(",")}) < own.count(",") + 1):
        raise UserError(f"JAX_LOCAL_DEVICE_IDS takes different numbers of devices, as in 0,1,2,3; got {own!r}")
    devices = None if own is None else [int(number) for number in own.split(",")]
    address, count, me, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        said["coordinator_address"], numbers["num_processes"], numbers["process_id"], devices, None, int(seconds)
    )
    found = {"coordinator_address": address, "num_processes": count, "process_id": me}
    if missing := [key for key, value in found.items() if value is None]:
        known = "; there is " + ", ".join(f"{NAMES[k]}={v}" for k, v in found.items() if v is not None)
        raise UserError(
            f"--distributed finds no cluster that JAX knows (a TPU pod, SLURM's srun, GKE, Open MPI), so it must be told "
            f"{' and '.join(f'{NAMES[key]} (or --{key})' for key in missing)}{known if len(missing) < 3 else ''}: the address "
            "host:port of process 0, how many processes there are, and which of them, from 0, this is"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"JAX_COORDINATOR_ADDRESS must be host:port, as in 10.0.0.1:8476; got {address!r}")
    check_range("JAX_NUM_PROCESSES", count, 1, MOST)
    check_range("JAX_PROCESS_ID", me, 0, count - 1)
    return Place(address, count, me, None if devices is None else list(devices))


def _whole(key: str, value: str | None) -> int | None:
    if value is None or re.fullmatch(r"\d+", str(value).strip()):
        return None if value is None else int(value)
    raise UserError(f"{NAMES[key]} (or --{key}) must be a whole number, got {value!r}")


def call(place: Place, seconds: float = START) -> tuple[list[str], dict[int, "Line"]]:
    """Finds the other processes. To be called by all.

    Args:
      place: where, and which this one is.
      seconds: for all to come.

    Returns:
      the host of each process, and the connections: of process 0 to each other one, of these to process 0.

    Raises:
      UserError: the same on all that have come, if some are missing, which it names; if two say that they are the same one, or
        they disagree on how many there are; if they run different programs, versions or command lines.
    """
    return _call(place, seconds) if place.process == 0 else _answer(place, seconds)


def _call(place: Place, seconds: float) -> tuple[list[str], dict[int, "Line"]]:
    """Process 0 calls the roll."""
    deadline, port, wrong = time.monotonic() + seconds, int(place.address.rpartition(":")[2]), None
    here, lines = {0: _self(place)}, []
    with _listener(port) as listener:
        while len(here) < place.processes and wrong is None and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            hello, line = _hello(connection)
            if hello is None:
                continue  # something else has knocked
            lines.append((hello["process"], line))
            wrong = _wrong(here, hello)
            here.setdefault(hello["process"], hello)
    names = [here[i]["host"] if i in here else "?" for i in range(place.processes)]
    if wrong is None and (missing := [str(i) for i in range(place.processes) if i not in here]):
        told = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else "")
        wrong = (
            f"process{'es' if len(missing) > 1 else ''} {told} of {place.processes} did not come to "
            f"{place.address} within {seconds:g} s; here: {named(sorted(here), names)}"
        )
    if wrong is None and (text := differing(names, [here[i]["facts"] for i in range(place.processes)])):
        wrong = f"the processes do not run the same:{text}"
    for _, line in lines:
        with contextlib.suppress(OSError):  # that it has gone is noticed where it is read
            line.send({"wrong": wrong, "names": names})
    if wrong is not None:
        raise UserError(wrong)
    return names, dict(lines)


def _listener(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} of {socket.gethostname()} ({error.strerror or error}): stop what holds it, "
            "or give another port in JAX_COORDINATOR_ADDRESS"
        ) from None


def _wrong(here: Mapping[int, Mapping[str, Any]], hello: Mapping[str, Any]) -> str | None:
    """Why a process that has come cannot be one of those that are called."""
    process, host, first = hello["process"], hello["host"], here[0]
    if hello["processes"] != first["processes"]:
        return (
            f"process {process} on {host} was told of {hello['processes']} processes, and process 0 on {first['host']} of "
            f"{first['processes']}"
        )
    if process in here:
        return f"process {process} is on {here[process]['host']} and on {host}: give each process an id of its own"
    return None


def _hello(connection: socket.socket) -> tuple[dict[str, Any] | None, "Line"]:
    """What a process that has connected says of itself; None for what is no process of ours."""
    line = Line(connection)
    hello = line.receive(GREETING)
    if hello is None or not {"process", "processes", "host", "facts"} <= hello.keys():
        line.close()
        return None, line
    return hello, line


def _answer(place: Place, seconds: float) -> tuple[list[str], dict[int, "Line"]]:
    """Another process answers the roll call."""
    host, _, port = place.address.rpartition(":")
    here = _self(place)  # it reads the sources, and process 0 waits no longer than `GREETING` for who has connected
    deadline, problem = time.monotonic() + seconds, "what answers there is not process 0"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, left)))
            line.send(here)
        except OSError as error:
            problem = error.strerror or str(error)
        else:
            answer = line.receive(left + 2 * GREETING)  # process 0 waits for the others as long as it was told
            if answer is not None and "names" in answer:
                if answer["wrong"] is not None:
                    raise UserError(answer["wrong"])
                return answer["names"], {0: line}
            line.close()
        time.sleep(0.3)
    raise UserError(
        f"process {place.process} on {socket.gethostname()} did not reach process 0 at {place.address} within {seconds:g} s "
        f"({problem}): start process 0, and see that this address and port can be reached from here"
    )


def _self(place: Place) -> dict[str, Any]:
    """What a process says of itself."""
    return {
        "process": place.process,
        "processes": place.processes,
        "host": socket.gethostname(),
        "facts": program(),
    }


class Line:
    """A connection that carries JSON objects, a line each.

    One whose other end is cut off breaks within half a minute, by the operating system's doing.
    """

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in {
            "TCP_KEEPIDLE": 10,
            "TCP_KEEPINTVL": 5,
            "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": 30_000,
        }.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection, self._lines = connection, connection.makefile("r", encoding="utf-8", newline="\n")

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises an OSError where the connection has broken."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next object, waited for so long; None where the other end has closed, has broken off, or sends something else."""
        self._connection.settimeout(seconds)
        try:
            line = self._lines.readline(2**26)
            message = json.loads(line) if line else None
        except (OSError, ValueError):
            return None
        self._connection.settimeout(None)
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


def program() -> dict[str, str]:
    """What this process runs: versions, the sources, and the command line but for what says which process it is."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    folders = sorted(path.parent for path in root.glob("*/__init__.py"))
    for path in [*sorted(root.glob("*.py")), *(path for folder in folders for path in sorted(folder.rglob("*.py")))]:
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    own, rest = tuple(f"--{key}" for key in NAMES), []
    for before, argument in zip(["", *sys.argv], sys.argv):
        if before not in own and not argument.startswith(own):
            rest.append(argument)
    return {
        "code (hash of the sources)": digest.hexdigest()[:12],
        "python": platform.python_version(),
        **{name: version(name) or "absent" for name in PACKAGES},
        "command line": " ".join([Path(rest[0]).name, *rest[1:]]),
    }


def version(package: str) -> str | None:
    """The version of an installed package; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def differing(names: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str:
    """What differs between processes, a line for each fact, with who says what; empty if nothing does.

    Args:
      names: the host of each process.
      facts: of each process.
    """
    lines = []
    for key in dict.fromkeys(key for one in facts for key in one):
        values: dict[str, list[int]] = {}
        for process, one in enumerate(facts):
            values.setdefault(one.get(key, "absent"), []).append(process)
        if len(values) > 1:
            said = "; ".join(f"{value} ({named(processes, names)})" for value, processes in values.items())
            lines.append(f"\n  {key}: {said}")
    return "".join(lines)


def named(processes: Sequence[int], names: Sequence[str], most: int = 4) -> str:
    """ "process 1 on b and process 2 on c"."""
    said = [f"process {i} on {names[i]}" for i in processes[:most]]
    more = [f"{len(processes) - most} more"] if len(processes) > most else []
    return " and ".join([*said, *more])

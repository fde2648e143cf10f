"""What is recorded of the work on a cell, in its directory under `job/`: all that an engine and a later command know of it.

cell.json        the cell, so that any machine which sees the directory can run it (`sweeps.cells.load`)
job.json         whom the cell was given to: the engine, and the engine's name for the job
attempts.jsonl   a line when a process begins with the cell, and one when it ends
alive            touched while a process works
exit_code        of the process, where what started it can tell: of one that was killed there is no other word
"""

import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import appended, hosts, remote
from common.errors import UserError
from common.files import modified, read_json, touch, write_atomically

HEARTBEAT = 5.0  # seconds


def folder(workdir: Path) -> Path:
    """Where the records of a cell are."""
    return workdir / "job"


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A job that a cell was given to.

    Attributes:
      engine: its name.
      id: the engine's name for the job.
      tries: how often the cell has been submitted since a command last began with it.
      first, since: attempts that there were before the first of these, and before this one.
      collected: whether a command has told how the job ended.
    """

    engine: str
    id: str
    tries: int = 1
    first: int = 0
    since: int = 0
    collected: bool = False

    def write(self, workdir: Path) -> None:
        """Writes `job.json`."""
        write_atomically(folder(workdir) / "job.json", json.dumps(dataclasses.asdict(self)))


def submitted(workdir: Path) -> Submitted | None:
    """The last job of a cell; None if there was none. Raises a UserError for a record that is none."""
    found = read_json(path := folder(workdir) / "job.json")
    if found is None:
        return None
    try:
        return Submitted(**found)
    except TypeError:
        raise UserError(
            f"{path} is none of this version of the program: see that no job is at work, and delete it"
        ) from None


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One process group that has worked on a cell.

    Attributes:
      began: when, in seconds since 1970.
      host: where.
      devices: how many it had; None where it ended before it knew.
      seconds: that it worked; of one that was killed, until its last sign of life.
      status: "finished", "diverged", "failed", "interrupted" or "lost" (it was killed, or another process of the cell was);
        None while it works, or if it was killed and nobody has come after it.
      error: why, in one line, of a cell that has diverged, failed, was lost, or was stopped between steps.
    """

    began: float
    host: str = ""
    devices: int | None = None
    seconds: float = 0.0
    status: str | None = None
    error: str | None = None


def attempts(workdir: Path) -> list[Attempt]:
    """All attempts at a cell, in order."""
    found = []
    for line in appended.read(folder(workdir) / "attempts.jsonl"):
        try:
            fields = json.loads(line)
            if "began" in fields:
                found.append(Attempt(**fields))
            elif found:
                found[-1] = dataclasses.replace(found[-1], **fields)
        except (ValueError, TypeError):  # a crash has cut it, or it is of another version
            continue
    if found and found[-1].status is None:
        found[-1] = dataclasses.replace(found[-1], seconds=max(0.0, (alive(workdir) or 0) - found[-1].began))
    return found


def alive(workdir: Path) -> float | None:
    """The last sign of life of a process at a cell, in seconds since 1970; None if there was none."""
    return modified(folder(workdir) / "alive")


@contextlib.contextmanager
def attempt(workdir: Path):
    """Records an attempt. Yields a dict whose items are written with its end: status, error, devices."""
    place = folder(workdir)
    if (earlier := attempts(workdir)) and earlier[-1].status is None:  # it was killed
        _append(workdir, {"status": "lost", "seconds": earlier[-1].seconds})
    (place / "exit_code").unlink(missing_ok=True)
    began, ended = datetime.now(UTC).timestamp(), threading.Event()
    _append(workdir, {"began": began, "host": socket.gethostname()})

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError), remote.spoken(place):  # a full disk, or one that is away for a moment
                touch(place / "alive")
            if ended.wait(HEARTBEAT):
                return

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    result: dict[str, Any] = {"status": "failed", "error": "it ended without a word"}

    def cut_short(status: int, text: str) -> None:
        how = "lost" if status == hosts.AGAIN else "failed"
        _append(
            workdir,
            {"status": how, "error": text.rstrip().splitlines()[-1], "seconds": datetime.now(UTC).timestamp() - began},
        )

    try:
        with hosts.ending(cut_short):
            yield result
    finally:
        ended.set()
        heart.join(HEARTBEAT)  # no sign of life behind the end; a disk that hangs is not waited for
        _append(workdir, result | {"seconds": datetime.now(UTC).timestamp() - began})


def _append(workdir: Path, fields: Mapping[str, Any]) -> None:
    with contextlib.closing(appended.Appended(folder(workdir) / "attempts.jsonl", lasting=True)) as file:
        file.write(json.dumps(fields) + "\n")


def write_error(workdir: Path, process: int, error: str) -> None:
    """Says why a process other than the first has failed."""
    write_atomically(folder(workdir) / "error.json", json.dumps({"process": process, "error": error}))


def error(workdir: Path, since: float) -> str | None:
    """Why a process other than the first has failed since then, in seconds since 1970; None if none has."""
    path = folder(workdir) / "error.json"
    found = read_json(path)
    return None if found is None or (modified(path) or 0) < since else f"process {found['process']}: {found['error']}"


def exit_code(workdir: Path) -> int | None:
    """How the last process at a cell ended, if what started it has written it down; -9 is killed by signal 9."""
    try:
        code = int((folder(workdir) / "exit_code").read_text())
    except (OSError, ValueError):
        return None
    return 128 - code if code > 128 else code  # as shells say it


def write_exit_code(workdir: Path, code: int) -> None:
    """Writes `exit_code`."""
    write_atomically(folder(workdir) / "exit_code", f"{code}\n")

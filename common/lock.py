"""A lock on a directory: one process group writes to it at a time."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import lease, remote
from common.errors import UserError
from common.files import read_json

FILE = ".lock"


@contextlib.contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Holds the lock of a directory.

    It is a lock of the operating system on the file `.lock`, which network file systems pass on to their other hosts, and which
    ends with the processes that hold it: what a dead process has left blocks nobody. The file says who holds it. Where a file
    system has no locks, that is said, and there is none. On an object store it is another one, see `common.lease`.

    Args:
      directory: which exists and can be written.
      what: works there, for the message.

    Raises:
      UserError: if another process holds it; the message says which. Or if its file cannot be opened or written.
    """
    path = directory / FILE
    busy = lambda: UserError(f"another {what} is at work in {directory} ({_holder(path)}): wait for it or stop it")
    if remote.is_address(directory):
        with lease.held(path, _here(), busy):
            yield
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened ({error.strerror}), by which one {what} at a time works there"
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy() from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            print(
                f"{directory}: its file system has no locks; see to it that one {what} at a time works there",
                file=sys.stderr,
            )
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_here()).encode(), 0)
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from error
        yield
    finally:
        os.close(file)


def held(directory: Path) -> bool:
    """Whether a process holds the lock of a directory."""
    if remote.is_address(directory):
        return lease.is_alive(directory / FILE)
    try:
        file = os.open(directory / FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _here() -> dict[str, Any]:
    """Who this process is."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(path: Path) -> str:
    try:
        holder = read_json(path)
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (TypeError, KeyError):
        return "it has not said which"

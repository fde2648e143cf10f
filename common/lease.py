"""The lock of a folder on an object store: an object that says who holds it, and is written anew while that process lives.

The store makes an object only if there is none, in one act, so of several that come at once one has it. It ends no lock with its
process: one that has not been written anew for `PATIENCE` seconds, watched by the clock of who wants it, is taken over. That is
the weaker half: of two processes that take over at once, the one whose name stands there after `SETTLE` seconds has it, and a
process that stood still for longer than `PATIENCE`, and finds another name, ends at once.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import hosts, remote
from common.errors import UserError
from common.files import modified

BEAT = 10.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one after which a lock is a dead process's
SETTLE = 2.0  # seconds for another one that takes over to have written its name


@contextlib.contextmanager
def held(path: Path, who: dict[str, Any], busy: Callable[[], UserError]) -> Iterator[None]:
    """Holds the lock that an object is.

    Args:
      path: of the object.
      who: holds it, for readers.
      busy: makes the error of a lock that is held.
    """
    own = who | {"token": uuid.uuid4().hex}
    ended = threading.Event()

    def ours() -> bool:
        return (_read(path) or {}).get("token") == own["token"]

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            try:
                with remote.spoken(path):
                    if not ours():
                        break
                    path.write_bytes(_text(own | {"beat": count}))
            except OSError:  # the store cannot be reached: so far nobody can take over either
                continue
        if not ended.is_set():
            print(
                f"error: {path} is not this process's any more: it gave no sign of life for {PATIENCE:.0f} s, and another one "
                "has taken over",
                file=sys.stderr,
                flush=True,
            )
            os._exit(hosts.AGAIN)

    with remote.spoken(path):
        while not (_create(path, own) or ours()):
            if _abandoned(path, busy):
                path.write_bytes(_text(own))
                time.sleep(SETTLE)
                if not ours():
                    raise busy()
                break
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError), remote.spoken(path):
            if ours():
                path.unlink(missing_ok=True)


def is_alive(path: Path) -> bool:
    """Whether a lock has lately been written anew, by the clocks of the store and of this machine."""
    last = modified(path)
    return last is not None and time.time() - last < PATIENCE


def _create(path: Path, own: dict[str, Any]) -> bool:
    # Asked first, too: some stores that are like one of the known do not heed the condition.
    return not path.exists() and remote.create(path, _text(own))


def _abandoned(path: Path, busy: Callable[[], UserError]) -> bool:
    """Whether a lock is a dead process's, which takes `PATIENCE` to see; False if it has been given back meanwhile.

    Raises `busy()` where its holder shows that it lives.
    """
    first, last = _read(path), modified(path)
    if last is not None and time.time() - last > 10 * PATIENCE:  # whatever the clocks differ by
        return True
    end = time.monotonic() + PATIENCE
    print(f"{path} is held; watching for a sign of life, at most {PATIENCE:.0f} s", file=sys.stderr, flush=True)
    while time.monotonic() < end:
        now = _read(path)
        if now != first:
            if now is None:
                return False
            raise busy()
        time.sleep(BEAT / 5)
    return True


def _text(own: dict[str, Any]) -> bytes:
    return json.dumps(own).encode()


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; None where there is none. Raises an OSError where the store cannot be reached."""
    try:
        return json.loads(remote.read(path))
    except FileNotFoundError:
        return None

"""Several processes, of one or several hosts, that run one program: they meet, agree, and end together.

JAX joins processes for computing. It does not say which of them is missing, lets hosts with different data train together, and
leaves those whose partner has died waiting. So they first meet at a roll call (`common.roll_call`), whose connections, one of
each process to process 0, stay open: over them processes exchange what they must agree on, and tell each other why they end;
and one that breaks off is how the others know at once that a process was killed.
"""

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from common import remote, roll_call
from common.errors import UserError
from common.roll_call import Line, Place, differing, named
from common.watchdog import Watchdog

AGAIN = 75  # exit status of what is to be run again, see `common.command`
PREPARE = 3600.0  # seconds for all to have read their data
TOLD = 60.0  # seconds after which it is said who is waited for
SEEN = 30.0  # seconds in which a network disk shows a new file
NOTICE = 60.0  # seconds to wait for the cause of what is only its consequence
PARTING = 10.0  # seconds for the others to hear why process 0 ends
# What JAX says of a computation over several processes one of which has gone.
LOST = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|coordination service|heartbeat|gloo|closed by peer", re.IGNORECASE)

# What joins this process to the others; None where it is alone.
_group: "_Group | None" = None
_watchdog: Watchdog | None = None
_calls: list[Callable[[int, str], None]] = []
_noting: int | None = None  # C's handler for SIGTERM that JAX has, see `noting_sigterm`


def joined() -> bool:
    """Whether this process is one of several that have met."""
    return _group is not None


def join(place: Place, seconds: float = roll_call.START) -> None:
    """Meets the other processes, and starts JAX on all of them.

    Args:
      place: where, and which this one is.
      seconds: for all to come.

    Raises:
      UserError: as `roll_call.call` does; if the processes have devices of different kinds.
    """
    import jax
    from jax.experimental import multihost_utils

    meet(place, seconds)
    jax.distributed.initialize(
        place.address,
        place.processes,
        place.process,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(max(seconds, roll_call.START)),
    )
    if _group is not None:
        _group.computes = True
    _take_back_sigterm()
    # All open their devices at the same time, since JAX has each of them wait for the others there, and not for long.
    agree("devices", {"kind of devices": ", ".join(sorted({device.device_kind for device in jax.local_devices()}))})
    if jax.process_count() > 1 and jax.local_devices()[0].platform == "cpu":
        # Gloo gives them 30 seconds to come to the first thing that they compute together, and keeps the connections that it
        # makes then. What comes next is compiled first, which one of them may take a minute longer for.
        multihost_utils.sync_global_devices("devices")


def meet(place: Place, seconds: float = roll_call.START) -> None:
    """Meets the other processes, see `roll_call.call`. Where there are no others nothing is done."""
    global _group
    if place.processes > 1:
        _group = _Group(place.process, *roll_call.call(place, seconds))


def agree(
    what: str, facts: Mapping[str, str], beside: Mapping[str, str] | None = None, seconds: float = PREPARE
) -> None:
    """Returns when all processes have said the same. To be called by all; nothing where a process is alone.

    Args:
      what: is agreed on, for messages.
      facts: by name, what must be the same.
      beside: what is said, too, where something differs.
      seconds: for all to say it.

    Raises:
      UserError: the same on all processes, with each fact that differs, and who says what.
    """
    if _group is None:
        return
    said = _group.exchange(what, [dict(facts), dict(beside or {})], seconds)
    if text := differing(_group.names, [facts for facts, _ in said]):
        text += differing(_group.names, [beside for _, beside in said])
        raise UserError(f"the processes do not agree on their {what}:{text}")


def wait(what: str, seconds: float = PREPARE) -> None:
    """Returns when all processes have come here. Nothing where a process is alone."""
    if _group is not None:
        _group.exchange(what, None, seconds)


def share(directory: Path) -> None:
    """Returns when all processes see what the others write in a directory that process 0 has made.

    Raises:
      UserError: the same on all processes, with those that have a disk of their own.
    """
    if _group is None:
        return
    token = _group.exchange("mark", uuid.uuid4().hex[:12], PREPARE)[0]
    mark = lambda process: directory / f".host-{token}-{process}"

    def sees(process: int) -> bool:
        end = time.monotonic() + SEEN
        while time.monotonic() < end:
            with contextlib.suppress(OSError), remote.spoken(directory):
                if mark(process).exists():
                    return True
            time.sleep(0.1)
        return False

    try:
        if _group.me == 0:
            mark(0).touch()
        _group.exchange("mark made", None, PREPARE)
        if _group.me != 0 and sees(0):
            with contextlib.suppress(OSError):  # process 0 does not see it, and says so
                mark(_group.me).touch()
        _group.exchange("mark seen", None, PREPARE)
        others = range(1, len(_group.names))
        missing = [process for process in others if not sees(process)] if _group.me == 0 else []
        missing = _group.exchange("marks seen", missing, PREPARE)[0]
    finally:
        mark(_group.me).unlink(missing_ok=True)
    if missing:
        raise UserError(
            f"{directory} of process 0 on {_group.names[0]} is not the {directory} of {named(missing, _group.names)}: give a "
            "--workdir on a disk that all hosts see and may write to (NFS, Lustre, a mounted bucket), or on gs://"
        )


def leave() -> None:
    """Parts from the other processes when all have come here: from now on none is waited for, or missed. To be called by all."""
    global _group
    if _group is None:
        return
    _group.exchange("end", None, PREPARE)
    _group.leaving = True
    if _group.computes:
        import jax

        jax.distributed.shutdown()
    _group = None


def end(status: int, text: str, consequence: bool = False) -> NoReturn:
    """Ends this process, and with it the others, which are told why. Does not return.

    Where another process has ended first, its reason is the one that is told. From then on SIGTERM and Ctrl-C change nothing.

    Args:
      status: of all.
      text: the reason, printed whole by this process and by process 0; the others print its last line.
      consequence: whether it is only one of what has befallen another process, which is then waited to hear of.
    """
    if consequence:
        time.sleep(NOTICE)  # the thread that hears the cause ends this process
    for number in (signal.SIGTERM, signal.SIGINT):  # a scheduler may send them twice
        signal.signal(number, signal.SIG_IGN)
    _group.end({"process": _group.me, "status": status, "text": text, "ours": True})


def is_consequence(error: BaseException | None) -> bool:
    """Whether an error is what JAX raises where a partner has gone."""
    while error is not None:
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def ending(call: Callable[[int, str], None]) -> Iterator[None]:
    """Has a function called with the status and the reason if this process is ended together with the others meanwhile."""
    _calls.append(call)
    try:
        yield
    finally:
        _calls.remove(call)


@contextlib.contextmanager
def noting_sigterm() -> Iterator[None]:
    """Leaves SIGTERM to JAX meanwhile, which only takes note: `multihost_utils.reached_preemption_sync_point` then says after
    which step all processes stop. Elsewhere it ends all at once, as Ctrl-C does. Nothing where JAX has joined no processes.
    """
    if _noting is None:
        yield
        return
    _library().signal(signal.SIGTERM, _noting)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def progress(step: int) -> None:
    """Says that this process has made a step, for `watch`."""
    if _watchdog is None:
        return
    if _group is None or _group.me == 0:
        _watchdog.note(0, step)
    else:
        _group.tell(0, {"step": step})


@contextlib.contextmanager
def watch(minutes: float) -> Iterator[None]:
    """Ends all processes where one makes no step (`progress`) for so long, and names it; 0 is without."""
    global _watchdog
    if not minutes:
        yield
        return
    names = [socket.gethostname()] if _group is None else _group.names
    _watchdog = Watchdog(minutes, names, _stuck, looks=_group is None or _group.me == 0)
    try:
        wait("watch")  # or process 0 might not hear of first steps
        yield
    finally:
        _watchdog.stop()
        _watchdog = None


def _stuck(stuck: list[int], text: str) -> NoReturn:
    """Ends all where some processes are stuck, which print where they are."""
    if _group is not None:
        _group.end({"process": stuck[0], "status": AGAIN, "text": text, "ours": False, "stuck": stuck})
    faulthandler.dump_traceback(all_threads=True)
    print(text, file=sys.stderr, flush=True)
    os._exit(AGAIN)


class _Group:
    """The processes as one of them knows them: process 0 all others, and each of these process 0 alone.

    Args:
      me: the number of this process.
      names: the host of each process.
      lines: the connections, by process.
    """

    def __init__(self, me: int, names: list[str], lines: Mapping[int, Line]):
        self.me, self.names = me, names
        self.computes = self.leaving = False  # whether JAX has joined the processes, and whether they part
        self._lines = dict(lines)
        self._lock, self._changed = threading.RLock(), threading.Condition()
        self._said: dict[str, dict[int, Any]] = {}  # by what is exchanged, what each process says; of process 0
        self._heard: dict[str, list[Any]] = {}  # by what is exchanged, what all have said
        self._count: dict[str, int] = {}
        self._reason: dict[str, Any] | None = None
        self._closed = {process: threading.Event() for process in lines}
        if me != 0:
            _let_speak()
        for process in lines:
            threading.Thread(target=self._listen, args=(process,), daemon=True, name=f"process {process}").start()

    def exchange(self, what: str, value: Any, seconds: float) -> list[Any]:
        """What each process says, when all have; ends all where some do not in time."""
        self._count[what] = self._count.get(what, 0) + 1
        key, begin, told = f"{what} {self._count[what]}", time.monotonic(), TOLD
        if self.me == 0:
            self._add(key, 0, value)
        else:
            self.tell(0, {"say": key, "value": value})
        with self._changed:
            while key not in self._heard:
                self._changed.wait(1.0)
                waited = time.monotonic() - begin
                if self.me == 0 and key not in self._heard and waited > told:
                    late = named([i for i in range(len(self.names)) if i not in self._said[key]], self.names)
                    print(f"{what}: waiting for {late} since {waited:.0f} s", file=sys.stderr, flush=True)
                    told += TOLD
                    if waited > seconds:
                        raise UserError(f"{what}: {late} did not come within {seconds:.0f} s")
            return self._heard.pop(key)

    def end(self, reason: dict[str, Any]) -> NoReturn:
        """Ends this process for a reason, or for the one that another has given before."""
        if self.me != 0:
            self.tell(0, {"end": reason})
            time.sleep(PARTING)  # the answer ends this process
            self._exit(reason)
        with self._lock:
            first, self._reason = self._reason is None, self._reason or reason
        if not first:
            time.sleep(2 * PARTING)  # the thread that was first ends this process
        for process in self._lines:
            self.tell(process, {"end": self._reason})
        self._exit(self._reason)

    def _exit(self, reason: Mapping[str, Any]) -> NoReturn:
        try:
            self._say(reason)
            for call in list(_calls):
                call(reason["status"], reason["text"])
            if self.me == 0:
                limit = time.monotonic() + PARTING
                for closed in self._closed.values():
                    closed.wait(max(0.0, limit - time.monotonic()))
        finally:
            os._exit(reason["status"])

    def _say(self, reason: Mapping[str, Any]) -> None:
        text, who = reason["text"].rstrip(), named([reason["process"]], self.names)
        if reason["process"] == self.me or not reason["ours"]:
            print(text, file=sys.stderr)
        elif self.me == 0:
            print(f"{who} has ended, and so do all:\n{text}", file=sys.stderr)
        else:
            line = text.splitlines()[0 if text.startswith("error:") else -1]
            print(f"{who} has ended, and so do all: {line}", file=sys.stderr)
        if self.me in reason.get("stuck", ()):
            faulthandler.dump_traceback(all_threads=True)
        sys.stdout.flush()
        sys.stderr.flush()

    def tell(self, process: int, message: Mapping[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):  # a broken connection is noticed where it is read
            self._lines[process].send(message)

    def _add(self, key: str, process: int, value: Any) -> None:
        with self._lock:
            said = self._said.setdefault(key, {})
            said[process] = value
            complete = len(said) == len(self.names)
        if complete:
            values = [said[i] for i in range(len(self.names))]
            for other in self._lines:
                self.tell(other, {"all": key, "values": values})
            self._hear(key, values)

    def _hear(self, key: str, values: list[Any]) -> None:
        with self._changed:
            self._heard[key] = values
            self._changed.notify_all()

    def _listen(self, process: int) -> None:
        while (message := self._lines[process].receive()) is not None:
            self._receive(process, message)
        self._closed[process].set()
        if not self.leaving and (self.me != 0 or self._reason is None):
            text = (
                f"{named([process], self.names)} has gone without a word (killed, out of memory, its machine or the "
                "network is down), and so do all; run the same command again to go on from the last checkpoint"
            )
            reason = {"process": process, "status": AGAIN, "text": text, "ours": False}
            if self.me == 0:
                self.end(reason)
            self._exit(reason)

    def _receive(self, process: int, message: Mapping[str, Any]) -> None:
        if "say" in message:
            self._add(message["say"], process, message["value"])
        elif "all" in message:
            self._hear(message["all"], message["values"])
        elif "step" in message and _watchdog is not None:
            _watchdog.note(process, message["step"])
        elif "end" in message:
            if self.me != 0:
                self._exit(message["end"])
            threading.Thread(target=self.end, args=(message["end"],), daemon=True).start()  # this one listens on


def _let_speak() -> None:
    """Has an abort wait for some seconds. JAX aborts a process as soon as it misses process 0, before this process could say
    why; the handler is C's sleep, whose argument is then the number of the signal."""
    with contextlib.suppress(OSError, AttributeError):
        library = _library()
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _take_back_sigterm() -> None:
    """Gives SIGTERM back to Python. JAX has taken it, and a process that asks JAX at no step would heed it no more: one that
    reads its data, or that scores a run."""
    global _noting
    with contextlib.suppress(OSError, AttributeError):
        _noting = _library().signal(signal.SIGTERM, None)
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _library() -> ctypes.CDLL:
    """C's, whose handlers of signals Python does not show."""
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return library

"""Finds processes that are alive and do nothing: stuck in reading, in a lock, or in a computation that does not end."""

import threading
import time
from collections.abc import Callable, Sequence

from common.roll_call import named


class Watchdog:
    """Looks whether all processes make steps.

    Args:
      minutes: that a process may be without one.
      names: the host of each process.
      stuck: is called, in a thread, with the processes that are furthest behind, and what is to be said of them.
      looks: whether it is this process that looks.
    """

    def __init__(
        self, minutes: float, names: Sequence[str], stuck: Callable[[list[int], str], None], looks: bool = True
    ):
        self._minutes, self._names, self._stuck, self._stopped = minutes, names, stuck, threading.Event()
        now = time.monotonic()
        self._last: dict[int, tuple[int | None, float]] = {process: (None, now) for process in range(len(names))}
        if looks:
            threading.Thread(target=self._look, daemon=True, name="watchdog").start()

    def note(self, process: int, step: int) -> None:
        """A process has made a step."""
        self._last[process] = step, time.monotonic()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def _look(self) -> None:
        limit = 60 * self._minutes
        while not self._stopped.wait(min(1.0, limit / 4)):
            if any(time.monotonic() - since > limit for _, since in self._last.values()):
                self._stuck(*self._behind())
                return

    def _behind(self) -> tuple[list[int], str]:
        # All wait for the one that does nothing: it is the one that has made fewer steps than the others.
        steps = {process: -1 if step is None else step for process, (step, _) in self._last.items()}
        least, most = min(steps.values()), max(steps.values())
        stuck = [process for process, step in steps.items() if step == least]
        others = f", and others are at step {most}" if most > least else ""
        return stuck, (
            f"{named(stuck, self._names)} made no step for {self._minutes:g} minutes (train.watchdog_minutes) after "
            f"{'the start' if least < 0 else f'step {least}'}{others}; what was being done is printed there. Run the same "
            "command again to go on from the last checkpoint"
        )

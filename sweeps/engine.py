"""What an engine is: it starts the processes of a sweep's cells. Each file of `sweeps/engines/` defines one.

Engines hold no state. What a cell has done, and what is left of it, is read from its directory.
"""

import abc
import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.command import STOPPED
from common.errors import check_range
from common.plugins import Plugins
from sweeps import failures
from sweeps.cells import Cell, Step
from training.command_line import ROOT

# Exit statuses of what somebody has told to stop: by itself, or before it could do so.
INTERRUPTED = (STOPPED, -signal.SIGTERM, -signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a cell has ended.

    Attributes:
      cell: the cell; what it has found is in its directory.
      status: "finished", "diverged", "failed", or "interrupted" (it goes on when the sweep is run again).
      error: why, in one line, of a cell that has diverged or failed.
      seconds: since it was started, this time.
    """

    cell: Cell
    status: str
    error: str | None = None
    seconds: float = 0.0


class Engine(abc.ABC):
    """Runs the steps of each cell, `cell.todo()`, one after the other, with their output in the cell's `log.txt`.

    Args:
      workdir: directory of the sweep.
      workers: cells that run at the same time.

    Raises:
      UserError: for less than one worker.
    """

    def __init__(self, workdir: Path, workers: int = 1):
        check_range("--workers", workers, 1)
        self.workdir = workdir
        self.workers = workers

    @abc.abstractmethod
    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """Yields the cells as they end, in any order. Those that a stop kept from starting are left out.

        Raises:
          UserError: if another sweep is at work in the directory.
        """

    def command(self, step: Step) -> list[str]:
        """The command line of a step, to be run in the directory that the sweep was started in."""
        return [sys.executable, str(ROOT / step.program), *step.arguments]


def outcome(cell: Cell, step: Step, code: int, printed: str, seconds: float) -> Outcome | None:
    """How a cell has ended, now that a step of it has; None if it is to go on with its next step.

    Args:
      cell: the cell.
      step: that has ended.
      code: its exit status; of a process that a signal has killed, the signal's number with a minus.
      printed: by the step.
      seconds: since the cell was started.
    """
    if (why := cell.diverged()) is not None:
        return Outcome(cell, "diverged", why, seconds)
    left = cell.todo()
    if not left:
        return Outcome(cell, "finished", None, seconds)
    if code in INTERRUPTED:
        return Outcome(cell, "interrupted", None, seconds)
    if code == 0 and left[0] != step:
        return None
    if code < 0:
        killed = f"killed by {signal.Signals(-code).name}"
        return Outcome(cell, "failed", killed + (", perhaps for want of memory" if code == -9 else ""), seconds)
    said = [line.strip() for line in printed.splitlines() if line.strip()]
    why = failures.reason(printed) or (said[-1] if said else "it printed nothing")
    if code == 0:
        why = f"it ended without having done its work: {why}"
    return Outcome(cell, "failed", why, seconds)


_PLUGINS = Plugins("engine", "sweeps.engines", Engine)


def names() -> list[str]:
    """The names of all engines: the files of `sweeps/engines/`."""
    return _PLUGINS.names()


def find(name: str) -> type[Engine]:
    """The class of an engine.

    Raises:
      UserError: if there is none of that name; the message has the near ones.
    """
    return _PLUGINS.find(name)

"""What all engines have in common: gives cells to an engine, adopts those that it has already, and tells how they end.

A cell that was stopped or lost (exit status 75, a machine that was taken away) is given to the engine again, within a budget; one
that has failed is not: it would fail again.
"""

import dataclasses
import signal
import time
from collections.abc import Iterator, Mapping, Sequence

from common import appended
from common.console import say
from common.errors import UserError
from common.files import make_directory
from common.lock import locked
from sweeps import jobs
from sweeps.cells import Cell
from sweeps.engine import Engine, Seen
from sweeps.jobs import Submitted
from training.stopping import GracefulStop

BY_A_STOP = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a cell has ended.

    Attributes:
      cell: the cell; what it has found is in its directory.
      status: "finished", "diverged", "failed", or "interrupted" (it goes on when the sweep is run again).
      error: why, in one line, of a cell that has not finished.
      seconds: that its last attempt took.
    """

    cell: Cell
    status: str
    error: str | None = None
    seconds: float = 0.0


def drive(engine: Engine, cells: Sequence[Cell], retries: int = 2, detach: bool = False) -> Iterator[Outcome]:
    """Runs cells on an engine.

    What a cell's `job/job.json` names, and the engine still has, is not submitted again. What has ended since, unseen, is told
    like what ends now. SIGINT (Ctrl-C) and SIGTERM stop the cells of an engine whose jobs end with the command, a second one
    kills them; of all others, they end the command alone.

    Args:
      engine: starts the cells.
      cells: those that have something left to do.
      retries: how often a cell that was stopped or lost is given to the engine again.
      detach: submit, tell what has ended, and return.

    Yields:
      cells as they end. Those that a stop kept from starting, and those that go on without this command, are left out.

    Raises:
      UserError: if another sweep is at work in the directory, or the engine does not take the cells.
    """
    make_directory(engine.workdir)
    with locked(engine.workdir, "sweep"):
        with GracefulStop() as stop:
            yield from _Drive(engine, retries, stop).run(cells, detach or not engine.waits)


def cancel(engine: Engine, cells: Sequence[Cell]) -> int:
    """Stops all jobs of cells that the engine has; returns how many."""
    found = _Drive(engine, 0, None).adopted(cells)
    engine.cancel({job.id: cell.workdir for cell, job in found.values()})
    return len(found)


class _Drive:
    def __init__(self, engine: Engine, retries: int, stop: GracefulStop | None):
        self.engine, self.retries, self.stop = engine, retries, stop

    def run(self, cells: Sequence[Cell], detach: bool) -> Iterator[Outcome]:
        running = self.adopted(cells)
        if running:
            say(f"{len(running)} {'job is' if len(running) == 1 else 'jobs are'} already with {self.engine.name}")
        waiting = [cell for cell in cells if cell.name not in running]
        for cell in waiting:
            _check_nobody_works(cell, self.engine.name)
        # What has not ended, as far as one can tell, is given to an engine that does not wait once more, which changes nothing.
        if not self.engine.waits:
            yield from self._collect(running, waiting, False)
            waiting += [cell for cell, _ in running.values()]
            running = {}
        stopping = False
        try:
            while running or (waiting and not stopping):
                if not stopping:
                    waiting = self._submit(waiting, running)
                yield from self._collect(running, waiting, stopping)
                if detach and not waiting:
                    return
                if self.stop.requested(0) and not stopping:
                    stopping = True
                    if self.engine.lasting:
                        return
                    self.engine.cancel({job.id: cell.workdir for cell, job in running.values()})
                if running:
                    time.sleep(self.engine.poll)
        except BaseException:  # a second signal, too
            if not self.engine.lasting:
                self.engine.kill({job.id: cell.workdir for cell, job in running.values()})
            raise

    def adopted(self, cells: Sequence[Cell]) -> dict[str, tuple[Cell, Submitted]]:
        """By name, the cells that were given to the engine and whose end no command has told yet."""
        found = {}
        for cell in cells:
            job = jobs.submitted(cell.workdir)
            if job is not None and not job.collected and job.engine == self.engine.name and cell.todo():
                found[cell.name] = cell, job
        return found

    def _submit(self, waiting: Sequence[Cell], running: dict[str, tuple[Cell, Submitted]]) -> list[Cell]:
        """Submits what there is room for; returns what is left."""
        room = len(waiting) if self.engine.workers is None else max(0, self.engine.workers - len(running))
        now = waiting[:room]
        counts = [len(jobs.attempts(cell.workdir)) for cell in now]  # before any of them can begin
        names = self.engine.submit([cell.workdir for cell in now], self.retries) if now else []
        for cell, name, count in zip(now, names, counts):
            last = jobs.submitted(cell.workdir)
            if last is not None and not last.collected and last.engine == self.engine.name:  # it is tried again
                job = dataclasses.replace(last, id=name, tries=last.tries + 1, since=count)
            else:
                job = Submitted(self.engine.name, name, first=count, since=count)
            job.write(cell.workdir)
            running[cell.name] = cell, job
        return list(waiting[room:])

    def _collect(
        self, running: dict[str, tuple[Cell, Submitted]], waiting: list[Cell], stopping: bool
    ) -> Iterator[Outcome]:
        """The cells that have ended; those that are to be tried again wait."""
        seen = self.engine.states({job.id: cell.workdir for cell, job in running.values()})
        for name, (cell, job) in list(running.items()):
            state = seen.get(job.id, Seen("ended"))
            if state.state in ("queued", "running"):
                continue
            outcome, again = judged(cell, job, state)
            if outcome is None:
                continue
            del running[name]
            tried = max(job.tries, len(jobs.attempts(cell.workdir)) - job.first)
            if again and not stopping and tried <= self.retries:
                say(f"{name}: {outcome.error or 'it was stopped'}; try {tried + 1} of {self.retries + 1}")
                waiting.append(cell)
                continue
            dataclasses.replace(job, collected=True).write(cell.workdir)
            yield outcome


def _check_nobody_works(cell: Cell, engine: str) -> None:
    """Raises a UserError where a cell is at work with another engine."""
    job, made, alive = jobs.submitted(cell.workdir), jobs.attempts(cell.workdir), jobs.alive(cell.workdir) or 0
    if job is None or job.engine == engine or not made or made[-1].status is not None:
        return
    if time.time() - alive < 10 * jobs.HEARTBEAT:
        raise UserError(
            f"{cell.workdir} is at work with --engine={job.engine} ({job.id}): go on with that, or stop its jobs with --cancel"
        )


def judged(cell: Cell, job: Submitted, seen: Seen) -> tuple[Outcome | None, bool]:
    """How a cell whose job has ended has done, by its directory; and whether it is worth another try.

    None where nobody can tell whether it has ended: neither the engine nor the directory.
    """
    made = jobs.attempts(cell.workdir)[job.since :]
    last = made[-1] if made else None
    seconds = last.seconds if last else 0.0
    if not cell.todo():
        why = cell.diverged()
        return Outcome(cell, "finished" if why is None else "diverged", why, seconds), False
    if last is not None and (of_another := jobs.error(cell.workdir, last.began)) is not None:
        return Outcome(cell, "failed", of_another, seconds), False
    if last is not None and last.status == "failed":
        return Outcome(cell, "failed", last.error, seconds), False
    if seen.state == "unknown":
        return None, False
    if seen.state == "cancelled":
        return Outcome(cell, "interrupted", seen.why, seconds), False
    if last is not None and last.status is not None:
        return Outcome(cell, "interrupted", None, seconds), True
    code = jobs.exit_code(cell.workdir)
    stopped = (*BY_A_STOP, -signal.SIGABRT) if cell.hosts > 1 else BY_A_STOP  # JAX aborts when it loses a process
    if code is not None and code < 0 and code not in stopped:
        want = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return Outcome(cell, "failed", f"killed by {signal.Signals(-code).name}{want}", seconds), False
    if code is not None and code > 0 and last is None:
        said = _last_line(cell)
        return Outcome(cell, "failed", f"it ended with {code} before it had begun" + said, seconds), False
    lost = "the job was lost" + (f" ({seen.why})" if seen.why else "")
    return Outcome(cell, "interrupted", lost, seconds), True


def _last_line(cell: Cell) -> str:
    """What a process printed last."""
    lines = [line.strip() for line in appended.read(cell.workdir / "log.txt") if line.strip()]
    return f": {lines[-1].removeprefix('error: ')}" if lines else ""


def status(cell: Cell) -> str:
    """How far a cell is, in words, by its directory alone."""
    if cell.error:
        return f"cannot be run: {cell.error}"
    if not cell.todo():
        why = cell.diverged()
        return "finished" if why is None else f"diverged: {why}"
    job, made = jobs.submitted(cell.workdir), jobs.attempts(cell.workdir)
    last = made[-1] if made else None
    if job is not None and not job.collected and len(made) <= job.since:
        return f"queued ({job.engine} {job.id})"
    if last is None:
        return "not started"
    if last.status is None:
        since = max(0, round(time.time() - (jobs.alive(cell.workdir) or last.began)))
        return "running" if since < 10 * jobs.HEARTBEAT else f"no sign of life for {since:,} s ({last.host})"
    return {"failed": f"failed: {last.error}", "lost": "lost"}.get(last.status, last.status)


def by_status(cells: Sequence[Cell]) -> Mapping[str, int]:
    """How many cells there are of each status, its details left out."""
    counts: dict[str, int] = {}
    for cell in cells:
        word = status(cell).split(":")[0].split(" (")[0]
        counts[word] = counts.get(word, 0) + 1
    return counts

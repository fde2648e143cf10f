"""Runs a cell where this process is: trains, then scores. Every engine starts `sweep.py --cell=DIRECTORY`, and so can anyone.

What has come of it stands in the cell's directory, see `sweeps.jobs`. Several processes, of several hosts, run a cell together
where it asks for several hosts; the first one records.
"""

import contextlib
import math
import sys
import traceback

import jax

from common import hosts
from common.command import STOPPED
from common.console import say
from common.errors import UserError
from common.lock import locked
from data.task import REAL
from sweeps import failures, jobs, result
from sweeps.cells import Cell
from training import command_line, config, loop
from training.actions import Action, every

CODES = {"finished": 0, "diverged": 1, "failed": 1, "interrupted": STOPPED, "lost": STOPPED}


class Watch:
    """Stops a run that is lost, when it is called after a step, and says why in `why`.

    A run is lost if, after its warm-up, more than a twentieth of the updates of the last hundred steps were left out because they
    were not finite, or if its loss is twice in succession half as high again as that of a uniform guess.
    """

    WINDOW, SKIPPED, WORSE = 100, 0.05, 1.5

    def __init__(self):
        self.why: str | None = None
        self._skipped: list[tuple[int, float]] = []
        self._high = 0

    def __call__(self, run: loop.Run) -> None:
        spec = run.config.task.spec
        uniform = math.log(spec.targets) if spec.objective not in REAL and spec.targets > 1 else math.inf
        loss, skipped = (float(value) for value in jax.device_get((run.metrics["loss"], run.metrics["skipped"])))
        self.why = self.judge(run.step, run.config.optimizer.warmup_steps, loss, skipped, uniform)
        if self.why is not None and run.step < run.last:
            say(f"stopped: {self.why}")
            run.stop()

    def judge(self, step: int, warmup: int, loss: float, skipped: float, uniform: float) -> str | None:
        """Why a run is lost; None if it is not, as far as one can tell.

        Args:
          step: of the run.
          warmup: steps of it.
          loss: at the step, in nats.
          skipped: updates that were left out so far.
          uniform: the loss of a uniform guess; infinity where there is none.
        """
        if step <= warmup:
            return None
        self._skipped.append((step, skipped))
        before = [(n, count) for n, count in self._skipped if n <= step - self.WINDOW]
        if before:
            start, count = before[-1]
            if (share := (skipped - count) / (step - start)) > self.SKIPPED:
                return f"{share:.0%} of the updates of steps {start + 1} to {step} were not finite"
        self._high = self._high + 1 if loss > self.WORSE * uniform else 0
        if self._high > 1:
            return f"the loss at step {step} is {loss:.3g}, a uniform guess has {uniform:.3g}"
        return None


def run(cell: Cell) -> int:
    """Does what is left of a cell; the exit status: 0, finished; 1, failed or diverged; 75, interrupted.

    Raises:
      UserError: if another process is at work on the cell; nothing is recorded then.
    """
    if jax.process_index() != 0:
        status, error = _ended(cell)
        if status == "failed":
            jobs.write_error(cell.workdir, jax.process_index(), error)
        return _left(status, error)
    with locked(jobs.folder(cell.workdir), "process"), jobs.attempt(cell.workdir) as record:
        record["devices"] = jax.device_count()
        record["status"], record["error"] = _ended(cell)
    return _left(record["status"], record["error"])


def _left(status: str, error: str | None) -> int:
    """The exit status. One of several processes that has failed, or was stopped alone, ends here, and the others with it."""
    alone = status == "interrupted" and error is not None  # the others would wait for it
    if hosts.joined() and (alone or status in ("failed", "lost")):
        hosts.end(CODES[status], error if alone else f"error: {error}", consequence=status == "lost")
    return CODES[status]


def _ended(cell: Cell) -> tuple[str, str | None]:
    """How the cell has ended, and why, of one that has failed, has diverged or was stopped between steps. What has failed is
    printed, too."""
    try:
        with contextlib.chdir(command_line.ROOT if cell.cwd is None else cell.cwd):
            return _run(cell)
    except KeyboardInterrupt:
        return "interrupted", "stopped"
    except loop.Diverged as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return "diverged", cell.diverged() or str(error)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return "failed", str(error)
    except Exception as error:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        if hosts.joined() and hosts.is_consequence(error):
            return "lost", failures.reason(text)
        return "failed", failures.reason(text) or repr(error)


def _run(cell: Cell) -> tuple[str, str | None]:
    left = cell.todo()
    if "train" in left:
        watch, resolved = Watch(), config.resolve(command_line.parse(cell.arguments))
        look = Action(every(resolved.train.log_every or Watch.WINDOW), watch)
        ended = loop.train(resolved, cell.workdir, look, allow_other_data=cell.allow_other_data)
        if not ended.finished:
            return ("interrupted", None) if watch.why is None else ("diverged", watch.why)
    if "score" in left:
        result.write(cell.workdir, cell.lengths, cell.allow_other_data, cell.score)
    if jax.process_index() == 0 and cell.todo():
        return "failed", f"it ended without having done its work: {', '.join(cell.todo())}"
    return "finished", None

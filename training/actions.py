"""What is done after steps of training. An action is a pair of when it is due and what it does, both functions of the run:

train(config, workdir, Action(every(100), lambda run: print(run.step)))
"""

import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from common import remote
from common.console import say
from data.loader import Loader
from data.metrics import describe, training_summary
from training import setup
from training.run_directory import writing
from training.stopping import GracefulStop
from training.validation import Abandoned, validate


@dataclasses.dataclass(frozen=True)
class Action:
    """What is done after a step.

    Attributes:
      when: whether it is due, given a `training.loop.Run`. All processes must agree.
      do: called with the run; what it returns is ignored.
    """

    when: Callable[[Any], bool]
    do: Callable[[Any], Any]


def every(steps: int) -> Callable[[Any], bool]:
    """Due every so many steps (0: never), and at the last."""
    return functools.partial(_due, steps)


def _due(steps: int, run) -> bool:
    return run.step == run.last or (steps > 0 and run.step % steps == 0)


def _score(run) -> float:
    """What the best checkpoint is chosen by: the task's metric on the validation split; NaN where the loss there is not finite,
    since an accuracy is a number, too, where the model's scores are none."""
    return run.result[run.config.task.spec.metric.name] if math.isfinite(run.result["loss"]) else math.nan


_norm = jax.jit(optax.tree.norm)


class Log:
    """Records the metrics of training, and says when an update was left out.

    It is called after every step and reports a step late, so that the device always has the next step to do.

    Args:
      skipped: updates that were left out before the first step.
    """

    def __init__(self, skipped: float):
        self._skipped = skipped
        self._late: tuple[int, Mapping[str, jax.Array], bool] | None = None

    def __call__(self, run) -> None:
        self.flush(run)
        due = _due(run.config.train.log_every, run)
        # No part of the step, since it reads all parameters, also those of which a step changes a few rows.
        norm = {"param_norm": _norm(run.state["params"])} if due else {}
        self._late = run.step, run.metrics | norm, due

    def flush(self, run) -> None:
        """Reports the last step now."""
        if self._late is None:
            return
        (step, metrics, due), self._late = self._late, None
        metrics = jax.device_get(metrics)
        sums = metrics.pop("sums")
        metrics = {key: float(value) for key, value in metrics.items()}
        if metrics["skipped"] > self._skipped:
            self._skipped = metrics["skipped"]
            say(f"step {step}: the update was not finite and is left out ({self._skipped:.0f} so far)")
        if due:
            metrics |= training_summary(run.config.task.spec, sums) | run.progress.rates(step)
            run.record.write(step, "train", metrics)
            say(run.progress.line(step, metrics))
        elif step == run.start + 1:
            run.progress.start(step)  # the first step compiled


class Evaluate:
    """Scores the validation split; `run.result` is what it finds, and `run.improved` whether that is the best so far.

    Who asks the run to stop is not waited for: the run is saved, and its next launch begins with the evaluation.
    """

    def __init__(self, run, log: Log, batches: Loader, stop: GracefulStop):
        self._log, self._stop = log, stop
        self._eval_step = setup.eval_step(run.config, run.built)
        self._batches = batches

    def __call__(self, run) -> None:
        self._log.flush(run)
        count, asked = run.config.train.eval_batches, lambda: self._stop.asked
        try:
            run.result = validate(self._eval_step, run.state["params"], self._batches, count, asked)
        except Abandoned:
            run.stopping = True
            return
        run.scored = run.step
        run.record.write(run.step, "valid", run.result)
        spec = run.config.task.spec
        say(f"step {run.step:>{len(str(run.last))}}/{run.last}  valid  {describe(spec, run.result)}")
        run.improved = run.checkpoints.improves(_score(run))
        run.progress.start(run.step)  # the speed of training leaves evaluations out


class Save:
    """Writes a checkpoint: every so many steps, at the last, where the run stops, and where an evaluation is the best so far."""

    def __init__(self, log: Log):
        self._log = log

    def due(self, run) -> bool:
        """Whether to save after this step."""
        best = run.improved and run.scored == run.step
        return run.stopping or best or _due(run.config.train.checkpoint_every, run)

    def __call__(self, run) -> None:
        self._log.flush(run)
        run.record.flush()
        score = _score(run) if run.scored == run.step else None
        run.checkpoints.save(run.step, run.state, {"config": run.config.raw}, score)


class Profile:
    """Traces three steps into the run's `profile/`; 0 is for none. It is called before the first step, too."""

    def __init__(self, first: int):
        self._first = first
        self._until: int | None = None
        self._folder: Path | None = None

    def __call__(self, run) -> None:
        if self._first and run.step == self._first - 1 and run.step < run.last and not run.stopping:
            self._folder = run.directory.profile
            if remote.is_address(self._folder):  # the profiler writes to this machine
                self._folder = Path(tempfile.mkdtemp(prefix="mixology-profile-"))
            jax.profiler.start_trace(self._folder)
            self._until = min(self._first + 2, run.last)
        elif self._until is not None and (run.step == self._until or run.stopping):
            jax.block_until_ready(run.metrics)
            jax.profiler.stop_trace()
            if self._folder != run.directory.profile:
                with writing(run.directory.profile):
                    remote.upload(self._folder, run.directory.profile)
                shutil.rmtree(self._folder)
            say(f"profile of steps {self._first} to {run.step} in {run.directory.profile}")
            self._until = None

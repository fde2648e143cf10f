"""The training loop: from a resolved configuration and a work directory to a trained model."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from common import hosts
from common.console import say
from common.errors import UserError
from data.loader import Loader, prefetch
from data.metrics import LOSS
from data.workers import Workers
from ops import dispatch
from training import setup, sharding
from training.actions import Action, Evaluate, Log, Profile, Save, every
from training.checkpoints import Checkpoints
from training.config import Config
from training.initial import Weights, read_weights
from training.metrics import MetricWriter, Progress, peak_flops, read_metrics
from training.run_directory import RunDirectory, locate, open_run
from training.state import Built, State
from training.stopping import GracefulStop


class Diverged(UserError):
    """A run has ended without having learned: its numbers are not finite, or its last updates could not be made."""


@dataclasses.dataclass
class Run:
    """A run that is under way: what actions see and may use.

    Attributes:
      config: the resolved configuration.
      built: the model on its mesh.
      directory: where everything is written.
      record: of metrics; actions may write their own, under a split of their own.
      checkpoints: of the run.
      progress: the clock of the training.
      start: the step that it goes on from.
      step: the last step that was made.
      state: after that step, see `training.state`.
      metrics: of that step, on the devices: reading them waits for the step.
      result: the last evaluation on the validation split; empty before the first.
      scored: the step of the last evaluation; None before the first.
      improved: whether the last evaluation is better than all before it.
      stopping: whether the run ends after this step, saved.
    """

    config: Config
    built: Built
    directory: RunDirectory
    record: MetricWriter
    checkpoints: Checkpoints
    progress: Progress
    start: int
    step: int
    state: State
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    result: dict[str, float] = dataclasses.field(default_factory=dict)
    scored: int | None = None
    improved: bool = False
    stopping: bool = False

    @property
    def last(self) -> int:
        """The step that the run ends with."""
        return self.config.train.steps

    def stop(self) -> None:
        """Ends the run after this step; the same command goes on with it."""
        self.stopping = True


@dataclasses.dataclass(frozen=True)
class Ended:
    """How training has ended: the last evaluation on the validation split, and whether all steps are done."""

    result: dict[str, float]
    finished: bool


def train(config: Config, workdir: str | Path, *actions: Action, allow_other_data: bool = False) -> Ended:
    """Trains, or goes on with the run that `workdir` holds.

    Args:
      config: the resolved configuration.
      workdir: the run's directory, see `training/run_directory.py`.
      *actions: what else is to be done after steps, see `training.actions`.
      allow_other_data: go on with a run although its data has changed.

    Raises:
      UserError: for a configuration that does not fit, or another run in `workdir`; nothing is written then.
      Diverged: at the end, when everything is written.
    """
    built = setup.build(config)
    options = config.train
    weights = None
    if options.init_from and not Checkpoints(RunDirectory(locate(workdir)).checkpoints).steps():
        weights = read_weights(options.init_from, config, built)
    rows = {
        split: setup.batches(config, built, split, options.batch_size, for_training=split == "train")
        for split in ("train", "valid")
    }
    table, flops_per_token = setup.cost_table(config)
    train_step = setup.train_step(config, built)
    with (
        open_run(
            config,
            workdir,
            allow_other_data=allow_other_data,
            notes=None if weights is None else {"init_from": weights.record},
        ) as directory,
        jax.set_mesh(built.mesh),
        dispatch.implementation(options.implementation),
        GracefulStop() as stop,
        hosts.watch(options.watchdog_minutes),
        _started(config, built, directory, flops_per_token, weights) as run,
    ):
        task = config.task
        say(f"{task.name}: {task.num_examples('train'):,} rows of {task.spec.length} an epoch")
        say(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, mesh {dict(built.mesh.shape)}\n{table}")
        for warning in sharding.warnings(built.abstract["params"], built.metadata, built.mesh):
            say(warning)
        log, profile = Log(float(run.state["skipped"])), Profile(options.profile_step)
        evaluate, save = Evaluate(run, log, rows["valid"], stop), Save(log)
        due = every(options.eval_every)
        after_each_step = [
            Action(every(1), profile),
            Action(every(1), log),
            Action(due, evaluate),
            *actions,
            Action(save.due, save),
        ]
        if run.step >= run.last:
            say(f"{directory.root} has its {run.step} steps already")
        if run.step >= run.last or (run.step and due(run) and run.record.lacks(run.step, "valid")):
            evaluate(run)  # which the launch before has not done, or has not ended
            if run.improved:
                save(run)
        with _prefetched(config, rows["train"], run.step) as batches:
            profile(run)  # which may begin with the first step
            while run.step < run.last and not run.stopping:
                run.state, run.metrics = train_step(run.state, next(batches))
                run.step += 1
                run.stopping = stop.requested(run.step)
                hosts.progress(run.step)
                for action in after_each_step:
                    if action.when(run):
                        action.do(run)
                        hosts.progress(run.step)
        profile(run)  # which may have begun
        finished = run.step >= run.last and run.scored == run.step
        if not finished:
            say(f"stopped at step {run.step}; run the same command to go on")
    ended = Ended(run.result, finished)
    if ended.finished and (reason := diverged(directory.root, run.last, config.task.spec.metric.name)):
        raise Diverged(f"diverged: {reason} ({directory.root})")
    return ended


@contextlib.contextmanager
def _started(
    config: Config, built: Built, directory: RunDirectory, flops_per_token: float, weights: Weights | None
) -> Iterator[Run]:
    """The run at the step that it goes on from, its files open."""
    task, tokens = config.task, config.train.batch_size * config.task.spec.length
    checkpoints = Checkpoints(
        directory.checkpoints, keep=config.train.keep, higher_is_better=task.spec.metric.higher_is_better
    )
    # A network disk may show one host less than another; all must begin in the same way.
    hosts.agree("checkpoints", {"steps": str(checkpoints.steps())})
    if checkpoints.steps():
        state = checkpoints.restore(built.abstract).state
        say(f"resuming {directory.root} at step {int(state['step'])}")
    else:
        state = built.init(jax.random.key(config.seed))
        if weights is not None:
            state = weights.into(state)
    start, peak = int(state["step"]), peak_flops(built.mesh.devices.flat[0])
    progress = Progress(
        config.train.steps,
        tokens,
        metrics=task.spec.metrics,
        flops_per_step=3 * flops_per_token * tokens,
        peak=peak and peak * built.mesh.size,
    )
    record = MetricWriter(directory.root, resume_step=start)
    try:
        yield Run(config, built, directory, record, checkpoints, progress, start, start, state)
    except BaseException:
        # What they have to say is a consequence of the error; and other processes do not come to the end of a checkpoint.
        for file in (record,) if hosts.joined() else (checkpoints, record):
            with contextlib.suppress(Exception):
                file.close()
        raise
    checkpoints.close()
    record.close()


@contextlib.contextmanager
def _prefetched(config: Config, loader: Loader, start: int) -> Iterator[Iterator[dict[str, Any]]]:
    if config.train.data_workers:
        name, options = config.raw["task"]["name"], config.raw["task"]
        options = {key: value for key, value in options.items() if key != "name"}
        loader.workers = Workers(name, options, config.train.data_workers)
    stream = prefetch(loader, start)
    try:
        yield stream
    finally:
        stream.close()
        if loader.workers is not None:
            loader.workers.close()


def diverged(workdir: str | Path, steps: int, metric: str) -> str | None:
    """Why a run that has all its steps has not learned, from its record: its last evaluation is not finite, or none of the
    updates in its last tenth was made. None if it has."""
    lines = read_metrics(workdir)
    valid = [line for line in lines if line["split"] == "valid" and line["step"] == steps]
    for name in (metric, LOSS.name) if valid else ():  # an accuracy is a number, too, where the model's scores are none
        if not _finite(value := {LOSS.name: 0.0, **valid[-1]}.get(name)):
            return f"{name} on the validation split is {value}"
    skipped = {line["step"]: line["skipped"] for line in lines if line["split"] == "train" and "skipped" in line}
    earlier = max((step for step in skipped if step <= 0.9 * steps), default=0)
    if steps in skipped and skipped[steps] - skipped.get(earlier, 0) >= steps - earlier:
        return f"none of the updates after step {earlier} was finite, and so none was made"
    return None


def _finite(value: Any) -> bool:
    return value is not None and abs(value) < float("inf")

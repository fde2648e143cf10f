"""The training loop: from a resolved configuration and a work directory to a trained model."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from common.console import say
from common.errors import UserError
from data.loader import Loader, prefetch
from data.task import Spec
from models import accounting
from models import mixer as mixers
from models.sequence_model import SequenceModel
from ops import dispatch
from sweeps import sizing
from training import optimizer, run_directory, sharding, state
from training.checkpoints import Checkpoints
from training.config import Config
from training.metrics import MetricWriter, Progress, peak_flops
from training.step import make_eval_step, make_train_step
from training.stopping import GracefulStop
from training.validation import evaluate

SEGMENT_KEYS = ("segment_ids", "positions")


def build(config: Config, for_training: bool = True) -> state.Built:
    """The model of a configuration on its mesh.

    Raises:
      UserError: if the mesh, the model's sizes or the mixers' capabilities do not fit.
    """
    mesh = sharding.make_mesh(config.mesh)
    check_capabilities(config)
    make_optimizer = functools.partial(optimizer.build, config.optimizer, config.train.steps) if for_training else None
    return state.build(lambda rngs: SequenceModel(config.model, rngs=rngs), make_optimizer, mesh)


def check_capabilities(config: Config) -> None:
    """Raises a UserError if the task packs or pads its rows and a mixer cannot honour that."""
    spec = config.task.spec
    for name in config.model.pattern:
        mixer = mixers.find(name)
        if spec.packed and not mixer.packing:
            raise UserError(
                f"the rows of task {config.task.name!r} hold several segments, and mixer {name!r} has packing=False; "
                "set config.task.packing='windows' or choose another mixer"
            )
        if spec.padded and not (mixer.padding or mixer.packing):
            raise UserError(
                f"the rows of task {config.task.name!r} are padded, and mixer {name!r} has padding=False; choose another "
                "mixer"
            )


class Batches(Loader):
    """Batches on the mesh, with segments only where rows have them, so that a task without them takes the fast paths."""

    def __init__(self, config: Config, built: state.Built, split: str, batch_size: int, task=None):
        task = config.task if task is None else task
        self.drop = () if task.spec.segmented else SEGMENT_KEYS
        super().__init__(task, split, batch_size, config.seed, sharding.batch_sharding(built.mesh))

    def __getitem__(self, step):
        return {key: value for key, value in super().__getitem__(step).items() if key not in self.drop}


def cost_table(config: Config) -> tuple[str, float]:
    """What the model and each of its mixers cost, as text, and the model's forward FLOPs per token.

    FLOPs are those of matrix products and Fourier transforms with every primitive in its matmul form, whatever form this
    platform runs.
    """
    model, length = config.model, config.task.spec.length
    rows = [sizing.cost(model, config.task.spec)]
    capacity = None if rows[0].carry_bytes is None else length
    with dispatch.implementation("chunked"):
        for name in dict.fromkeys(model.pattern):
            make = lambda name=name: mixers.create(
                name,
                model.width,
                rngs=nnx.Rngs(0),
                causal=model.causal,
                depth=model.depth,
                length=model.length,
                **model.mixer.get(name, {}),
            )
            x = jax.ShapeDtypeStruct((1, length, model.width), jnp.float32)
            rows.append(accounting.summarize(f"  one {name}", nnx.eval_shape(make), x, length, capacity))
    return accounting.table(rows), rows[0].flops_per_token


def train(config: Config, workdir: str | Path) -> dict[str, float]:
    """Trains, or goes on with the run that `workdir` holds.

    Args:
      config: the resolved configuration.
      workdir: the run's directory, see `training/run_directory.py`.

    Returns:
      the last evaluation on the validation split.

    Raises:
      UserError: for a configuration that does not fit; nothing is written then.
    """
    built = build(config)
    options, spec = config.train, config.task.spec
    batches = Batches(config, built, "train", options.batch_size)
    valid = Batches(config, built, "valid", options.batch_size)
    train_step = make_train_step(
        built,
        accumulation=options.accumulation,
        z_loss=options.z_loss,
        compute_dtype=options.compute_dtype,
        random=config.model.random,
    )
    eval_step = make_eval_step(built, compute_dtype=options.compute_dtype)
    run = run_directory.open_run(workdir, config.raw, environment_extra={"data": config.task.fingerprint()})
    table, flops_per_token = cost_table(config)
    checkpoints = Checkpoints(run.checkpoints, keep=options.keep)
    say(f"{config.task.name}: {config.task.num_examples('train'):,} rows of {config.task.spec.length} an epoch")
    say(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, mesh {dict(built.mesh.shape)}\n{table}")

    with jax.set_mesh(built.mesh), dispatch.implementation(options.implementation), GracefulStop() as stop:
        resuming = bool(checkpoints.steps())
        current = checkpoints.restore(built.abstract).state if resuming else built.init(jax.random.key(config.seed))
        start = int(current["step"])
        if resuming:
            say(f"resuming {run.root} at step {start}")
        writer = MetricWriter(run.root, resume_step=start)
        tokens = options.batch_size * config.task.spec.length
        peak = peak_flops(built.mesh.devices.flat[0])
        progress = Progress(
            options.steps,
            tokens,
            flops_per_step=3 * flops_per_token * tokens,
            peak=peak and peak * built.mesh.size,
        )
        result, late, traced, skipped = {}, None, 0, float(current["skipped"])

        def report(step, metrics):
            """Called a step late, so that the device always has the next step to do."""
            nonlocal skipped
            metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
            if metrics["skipped"] > skipped:
                skipped = metrics["skipped"]
                say(f"step {step}: the update was not finite and is left out ({skipped:.0f} so far)")
            if due(step, options.log_every, options.steps):
                if spec.metric.startswith("bits_per_"):
                    metrics[spec.metric] = metrics["loss"] / math.log(2)
                metrics |= progress.rates(step)
                writer.write(step, "train", metrics)
                say(progress.line(step, metrics))
            elif step == start + 1:
                progress.start(step)  # the first step compiled

        stream = prefetch(batches, start)
        try:
            for step in range(start + 1, options.steps + 1):
                if step == options.profile_step:
                    jax.profiler.start_trace(run.profile)
                    traced = step + 2
                current, metrics = train_step(current, next(stream))
                if traced and step == min(traced, options.steps):
                    jax.block_until_ready(metrics)
                    jax.profiler.stop_trace()
                    say(f"profile of steps {options.profile_step} to {step} in {run.profile}")
                    traced = 0
                if late is not None:
                    report(*late)
                late = (step, metrics)
                stopping = stop.requested(step)
                evaluating = due(step, options.eval_every, options.steps)
                saving = due(step, options.checkpoint_every, options.steps) or stopping
                if evaluating or saving:
                    report(*late)
                    late = None
                if evaluating:
                    result = evaluate_split(eval_step, current["params"], valid, options.eval_batches)
                    writer.write(step, "valid", result)
                    say(f"step {step:>{len(str(options.steps))}}/{options.steps}  valid  {describe(result, spec)}")
                if saving:
                    score = (-1 if spec.higher_is_better else 1) * result[spec.metric] if evaluating else None
                    checkpoints.save(step, current, {"config": config.raw}, score)
                if evaluating:
                    progress.start(step)  # the speed of training leaves evaluations out, and only them
                if stopping and step < options.steps:
                    say(f"stopped at step {step}; run the same command to go on")
                    break
        finally:
            stream.close()
            checkpoints.close()
            writer.close()
        if start >= options.steps:
            say(f"{run.root} has its {options.steps} steps already")
            result = evaluate_split(eval_step, current["params"], valid, options.eval_batches)
    return result


def evaluate_split(eval_step, params, batches: Batches, count: int = 0) -> dict[str, float]:
    """Scores `params` on the first `count` batches (0: all)."""
    total = len(batches) if count == 0 else min(count, len(batches))
    stream = prefetch(batches)
    try:
        return evaluate(eval_step, params, (next(stream) for _ in range(total)), batches.task.spec)
    finally:
        stream.close()


def describe(result: dict[str, float], spec: Spec) -> str:
    """One line of scores, the task's metric first."""
    names = [spec.metric, *(name for name in result if name not in (spec.metric, "tokens"))]
    shown = "  ".join(show(name, result[name]) for name in names)
    return f"{shown}  ({result['tokens']:,.0f} {spec.unit}s)"


def show(name: str, value: float) -> str:
    """A metric in words."""
    if name.endswith("accuracy"):
        return f"{name.replace('_', ' ')} {100 * value:.2f} %"
    return (
        f"{value:.4f} {name.replace('_', ' ')}" if name.startswith("bits") else f"{name.replace('_', ' ')} {value:.4g}"
    )


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps (0: never) and at the last happens at `step`."""
    return step == last or (every > 0 and step % every == 0)

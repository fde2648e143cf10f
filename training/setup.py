"""What a configuration describes, built: the model on its mesh, its batches, its costs."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from data.loader import Lanes, Loader
from data.task import Spec, Task
from models import accounting, scaling
from models import mixer as mixers
from models.accounting import Summary
from models.config import ModelConfig
from models.params import without_values
from models.sequence_model import SequenceModel
from ops import dispatch
from training import optimizer, sharding, state, step
from training.config import Config


def build(config: Config, for_training: bool = True, devices: Sequence[jax.Device] | None = None) -> state.Built:
    """The model of a configuration on its mesh.

    Args:
      config: the configuration.
      for_training: whether the state has an optimiser.
      devices: of the mesh; by default all that are here.

    Raises:
      UserError: if the mesh, the model's sizes or the mixers' capabilities do not fit.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    check_capabilities(config)
    check_shards(config, mesh.shape["sequence"])
    check_implementation(config)
    make_optimizer = None
    if for_training:
        grown = scaling.growth(config.model)
        given = None if grown is None else optimizer.Scaling(state.nest(grown), config.model.gradient_ratio)
        make_optimizer = lambda metadata: optimizer.build(config.optimizer, config.train.steps, metadata, given)
    carry = (config.train.batch_size, config.train.compute_dtype) if config.train.carry and for_training else None
    return state.build(lambda rngs: SequenceModel(config.model, rngs=rngs), make_optimizer, mesh, carry)


def train_step(config: Config, built: state.Built) -> step.TrainStep:
    """The step of `step.make_train_step`, as a configuration wants it. Raises a UserError if its batch does not fit the mesh."""
    step.check_rows(config.train.batch_size, config.train.accumulation, built.mesh)
    return step.make_train_step(
        built,
        metrics=config.task.spec.metrics,
        accumulation=config.train.accumulation,
        loss_chunks=config.train.loss_chunks,
        z_loss=config.train.z_loss,
        compute_dtype=config.train.compute_dtype,
        random=config.model.random,
    )


def eval_step(config: Config, built: state.Built) -> Callable:
    """The step of `step.make_eval_step`, as a configuration wants it."""
    metrics, chunks, dtype = config.task.spec.metrics, config.train.loss_chunks, config.train.compute_dtype
    return step.make_eval_step(built, metrics=metrics, loss_chunks=chunks, compute_dtype=dtype)


def check_capabilities(config: Config) -> None:
    """Raises a UserError if the task packs or pads its rows and a mixer cannot honour that, or if its loss has no chunks."""
    spec = config.task.spec
    if config.train.loss_chunks > 1:
        whole = [metric.name for metric in spec.metrics if metric.whole_rows]
        if config.model.head != "token" or config.model.loss is not None or whole:
            why = f"its metric {whole[0]!r} is of whole rows" if whole else "it does not score tokens by logits"
            raise UserError(f"config.train.loss_chunks > 1 is not for task {config.task.name!r}: {why}; leave it at 1")
        if config.train.loss_chunks > spec.length:
            raise UserError(
                f"config.train.loss_chunks={config.train.loss_chunks} is more pieces than the {spec.length} positions of a row"
            )
    if config.train.carry:
        check_streams(config.model, config.task, "config.train.carry")
    for name, mixer in config.model.sketches.items():
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


def check_shards(config: Config, ways: int) -> None:
    """Raises a UserError if the rows of the task cannot lie in shards on so many devices, or a mixer would gather them again."""
    if ways == 1:
        return
    length = config.task.spec.length
    if length % (2 * ways):
        raise UserError(
            f"mesh.sequence={ways} needs rows of a multiple of {2 * ways} positions (attention gives each device two pieces), "
            f"and those of task {config.task.name!r} have {length}; change the task's length or mesh.sequence"
        )
    for name, mixer in config.model.sketches.items():
        if not mixer.in_shards:
            form = "causal" if mixer.causal else "two-sided"
            raise UserError(
                f"mesh.sequence={ways} is not for mixer {name!r}: its {form} form would gather whole sequences on every "
                "device; leave mesh.sequence at 1 (data, fsdp and tensor split it), or choose a mixer that `python -m "
                "models.catalogue` lists as in shards"
            )


def check_streams(model: ModelConfig, task: Task, what: str) -> None:
    """Raises a UserError if a text of any length cannot be read with the carry, whatever asks for it."""
    if not task.contiguous:
        raise UserError(
            f"{what} is for contiguous text (task language_model), and task {task.name!r} has rows that stand alone"
        )
    for name, mixer in model.sketches.items():
        why = {
            "it takes no carry (streaming=False)": not mixer.streams,
            "its carry grows with the text (constant_carry=False)": not mixer.constant_carry,
            f"it reads {model.length} tokens and no more (fixed_length=True)": mixer.fixed_length,
        }
        if reasons := [reason for reason, holds in why.items() if holds]:
            raise UserError(f"{what} is not for mixer {name!r}: {reasons[0]}; choose another mixer")


def check_implementation(config: Config) -> None:
    """Raises a UserError if some of `train.implementation` is not offered by, or has no effect on, the model."""
    if config.train.implementation == "auto":
        return
    abstract = without_values(lambda: SequenceModel(config.model, rngs=nnx.Rngs(0)))
    with dispatch.implementation(config.train.implementation) as choice:
        inputs = _inputs(config.model, config.task.spec)
        ids = jax.ShapeDtypeStruct(inputs.shape[: 3 if config.model.head == "pair" else 2], jnp.int32)
        where = {"segment_ids": ids, "positions": ids} if config.task.spec.segmented else {}
        nnx.eval_shape(lambda model, x, where: model(x, **where)[0], abstract, inputs, where)
    choice.check_used()


def batches(
    config: Config,
    built: state.Built,
    split: str,
    batch_size: int,
    task: Task | None = None,
    for_training: bool = False,
) -> Loader:
    """The batches of a split on the mesh.

    Args:
      config: the configuration.
      built: its model.
      split: "train", "valid" or "test".
      batch_size: rows of a batch.
      task: stands in for the configuration's own (another length, say).
      for_training: whether they are for the step of training: with `train.carry` their rows go on where the batch before has
        ended. Else each row of the split is there once, and stands alone.
    """
    task = config.task if task is None else task
    if for_training and config.train.carry:
        return Lanes(task, batch_size, config.seed, sharding.batch_sharding(built.mesh))
    return Loader(task, split, batch_size, config.seed, sharding.batch_sharding(built.mesh))


def cost(model: ModelConfig, spec: Spec) -> Summary:
    """What a model costs on a task; nothing is computed.

    Args:
      model: the model.
      spec: of the task: the FLOPs are those of rows of its length, and the carry is to hold as many tokens.

    Returns:
      parameters, FLOPs per token of the forward pass with every primitive in its matmul form, and bytes of carry per
      sequence (None where the model cannot stream).

    Raises:
      UserError: if the model cannot be built.
    """
    abstract = without_values(lambda: SequenceModel(model, rngs=nnx.Rngs(0)))
    with dispatch.matmul_form():
        return accounting.summarize(
            "model", abstract, _inputs(model, spec), spec.length, spec.length if model.streams else None
        )


def _inputs(model: ModelConfig, spec: Spec) -> jax.ShapeDtypeStruct:
    """The inputs of one row of a task."""
    if spec.channels is not None:
        return jax.ShapeDtypeStruct((1, spec.length, spec.channels), jnp.float32)
    return jax.ShapeDtypeStruct((1, 2, spec.length) if model.head == "pair" else (1, spec.length), jnp.int32)


def cost_table(config: Config) -> tuple[str, float]:
    """What the model and each of its mixers cost, as text, and the model's forward FLOPs per token.

    FLOPs are those of matrix products and Fourier transforms with every primitive in its matmul form, whatever form this
    platform runs.
    """
    model, length = config.model, config.task.spec.length
    rows = [cost(model, config.task.spec)]
    capacity = None if rows[0].carry_bytes is None else length
    with dispatch.matmul_form():
        x = jax.ShapeDtypeStruct((1, length, model.width), jnp.float32)
        for name in model.names:
            # With what it shares with others of its name, without which it cannot be called.
            mixer = mixers.sketch(name, model.width, **model.mixer_options(name))
            rows.append(accounting.summarize(f"  one {name}", mixer, x, length, capacity))
    return accounting.table(rows), rows[0].flops_per_token

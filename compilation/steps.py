"""The steps that can be compiled: functions and what they are called with, described and not made."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from common.errors import UserError
from compilation.targets import Target
from data.loader import batch_shapes
from evaluation.generation import Generator, of_model
from training import setup, sharding
from training.config import Config
from training.state import Built, cast


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted function with its arguments.

    Attributes:
      name: "train", "score" or "decode".
      config, built: the model on the mesh of the devices that it is to run on.
      function: of the arguments.
      arguments: trees of `jax.ShapeDtypeStruct`.
      held: the arguments, or parts of them, by what they are called on the page.
      rows: of the batch, over all devices.
    """

    name: str
    config: Config
    built: Built
    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    held: Mapping[str, PyTree]
    rows: int


def train(config: Config, target: Target) -> Step:
    """The step of training.

    Raises:
      UserError: if the mesh, the model or the batch does not fit the devices.
    """
    built = setup.build(config, devices=target.devices)
    batch = _batch(config, built, config.train.batch_size)
    held = {"parameters": built.abstract["params"], "optimizer": built.abstract["opt"], "batch": batch}
    step = setup.train_step(config, built)
    described = functools.partial(jax.ShapeDtypeStruct, sharding=step.sharding)
    settings = {name: described(value.shape, value.dtype) for name, value in step.settings.items()}
    arguments = built.abstract, batch, settings
    return Step("train", config, built, step.function, arguments, held, config.train.batch_size)


def score(config: Config, target: Target) -> Step:
    """The step of an evaluation. Raises a UserError as `train` does."""
    built = setup.build(config, for_training=False, devices=target.devices)
    rows = _rows(config, built)
    params, batch = built.abstract["params"], _batch(config, built, rows)
    function = setup.eval_step(config, built)
    return Step("score", config, built, function, (params, batch), {"parameters": params, "batch": batch}, rows)


def decode(config: Config, target: Target) -> Step | None:
    """One token more for each of a batch of rows, with a carry for the task's length; None of a model that decodes nothing.

    Where the carry lies is left to the compiler.
    """
    if config.model.head != "token" or not config.model.streams or config.task.spec.vocab_size is None:
        return None
    built = setup.build(config, for_training=False, devices=target.devices)
    rows = _rows(config, built)
    dtype = config.train.compute_dtype
    kinds = jax.eval_shape(lambda params: cast(params, built.metadata, dtype), built.abstract["params"])
    params = jax.tree.map(
        lambda leaf, kind: jax.ShapeDtypeStruct(leaf.shape, kind.dtype, sharding=leaf.sharding),
        built.abstract["params"],
        kinds,
    )
    function = Generator(*of_model(built), temperature=0.8).step
    by_rows = sharding.batch_sharding(built.mesh)
    token = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_rows)
    keys = jax.ShapeDtypeStruct((rows,), jax.random.key(0).dtype, sharding=by_rows)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(built.mesh))
    capacity = config.task.spec.length
    carry = jax.eval_shape(lambda params: built.merge(params).initial_carry(rows, capacity), params)
    return Step(
        "decode",
        config,
        built,
        function,
        (params, token, carry, keys, index),
        {"parameters": params, "carry, if not split": carry},
        rows,
    )


def _rows(config: Config, built: Built) -> int:
    """The batch size of the configuration, as an evaluation on these devices takes it."""
    return max(1, config.train.batch_size // built.mesh.size) * built.mesh.size


def _batch(config: Config, built: Built, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    ways = sharding.batch_ways(built.mesh)
    if rows % ways:
        raise UserError(
            f"batch_size={rows} does not divide over mesh.data * mesh.fsdp * mesh.expert = {ways}; make it a multiple"
        )
    place, shapes = sharding.batch_sharding(built.mesh), batch_shapes(config.task.spec, rows)
    if "carry" in built.abstract:
        shapes["restart"] = jax.ShapeDtypeStruct((rows,), bool)
    return {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for key, x in shapes.items()}

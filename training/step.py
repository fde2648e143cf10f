"""One step of training, and one of evaluation.

The loss is the weighted mean over all that the batch scores (tokens, labelled positions, rows): sum(w * loss) / sum(w), in
float32, whatever the devices, the microbatches and the weights are. Classes are scored by cross-entropy, real targets by the
model's own loss.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num, PyTree

from common.errors import UserError
from training import sharding
from training.optimizer import of_the_loss
from training.state import Built, State, cast

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]


def class_sums(
    logits: Float[Array, "B *T V"], targets: Int[Array, "B *T"], weights: Num[Array, "B *T"]
) -> dict[str, Float[Array, ""]]:
    """Weighted sums over tokens, or over rows, in float32.

    Args:
      logits: scores of the V classes.
      targets: the right class; any number where the weight is 0.
      weights: weight of each token or row.

    Returns:
      "nats", the cross-entropy; "weight"; "correct", the weight of those whose target has the highest score (the first of
      equals); "squared_log_z", the squared log-normaliser; "rows", the number of rows with any weight, and "rows_correct",
      that of those of them in which all is correct.

    Raises:
      UserError: if the shapes do not fit.
    """
    if not logits.shape[:-1] == targets.shape == weights.shape:
        raise UserError(
            f"targets {targets.shape} and weights {weights.shape} must have the logits' shape without classes, "
            f"{logits.shape[:-1]}"
        )
    logits, weights = logits.astype(jnp.float32), weights.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A sum over a comparison stays local where the classes are split over devices; a gather would collect them.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    score = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    correct = jnp.argmax(logits, axis=-1) == targets
    per_token = {"nats": log_z - score, "weight": 1, "correct": correct, "squared_log_z": jnp.square(log_z)}
    sums = {name: jnp.sum(weights * value) for name, value in per_token.items()}
    scored = (weights > 0).reshape(len(weights), -1)
    rows = scored.any(1)
    right = rows & (correct.reshape(scored.shape) | ~scored).all(1)
    return sums | {"rows": jnp.sum(rows, dtype=jnp.float32), "rows_correct": jnp.sum(right, dtype=jnp.float32)}


def real_sums(
    predictions: Float[Array, "B *T K"],
    loss: Float[Array, "B *T"],
    targets: Float[Array, "B *T K"],
    weights: Num[Array, "B *T"],
) -> dict[str, Float[Array, ""]]:
    """Weighted sums over tokens, or over rows, in float32.

    Returns:
      "nats", the model's loss; "weight"; "squared" and "absolute", the errors, means over the K targets; for K = 2 also
      "angle", in degrees, between the directions that pitch and yaw (in radians) point to.
    """
    error = predictions - targets
    values = {
        "nats": loss,
        "weight": 1,
        "squared": jnp.mean(jnp.square(error), -1),
        "absolute": jnp.mean(jnp.abs(error), -1),
    }
    if targets.shape[-1] == 2:
        a, b = direction(predictions), direction(targets)
        # atan2 is exact at small angles, where arccos of the product is not.
        sine = jnp.linalg.norm(jnp.cross(a, b), axis=-1)
        values["angle"] = jnp.rad2deg(jnp.arctan2(sine, jnp.sum(a * b, -1)))
    weights = weights.astype(jnp.float32)
    return {name: jnp.sum(jnp.where(weights > 0, weights * value, 0)) for name, value in values.items()}


def direction(angles: Float[Array, "... 2"]) -> Float[Array, "... 3"]:
    """The unit vector of a gaze with (pitch, yaw) in radians."""
    pitch, yaw = angles[..., 0], angles[..., 1]
    return -jnp.stack([jnp.cos(pitch) * jnp.sin(yaw), jnp.sin(pitch), jnp.cos(pitch) * jnp.cos(yaw)], -1)


def make_train_step(
    built: Built, *, accumulation: int = 1, z_loss: float = 0.0, compute_dtype="float32", random: bool = False
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Makes the jitted step `(state, batch) -> (state, metrics)`; the state that is passed in is consumed.

    The batch has "inputs", "targets" and "weights" as `data.task.OBJECTIVES` says, with a batch axis before, and may have
    "segment_ids" and "positions". An update that would not be finite, or of a
    batch without any weight, is not made: parameters and optimiser stay, `state["skipped"]` counts it, and the step
    goes on.

    Args:
      built: the model, with an optimiser.
      accumulation: number of microbatches whose gradients are summed; the loss stays that of the whole batch.
      z_loss: weight of the squared log-normaliser (2204.02311, section 5); in the gradient, not in the metric "loss".
      compute_dtype: of the parameters that the model sees (those without `keep_float32`).
      random: whether to pass the model a `key`, a function of `state["key"]`, the step and the microbatch.

    Returns:
      The step. Its metrics are float32 scalars: "loss" (nats per token), "accuracy", "tokens" (sum of the weights),
      "grad_norm" (before clipping), "param_norm", "learning_rate" (of this update), "skipped" (so far).

    Raises:
      UserError: if there is no optimiser or `accumulation` is not positive; from the step, if rows cannot be divided.
    """
    optimizer = built.optimizer
    if optimizer is None:
        raise UserError("the state was built without an optimizer; pass make_optimizer to training.state.build")
    if accumulation < 1:
        raise UserError(f"accumulation must be 1 or more, got {accumulation}")

    def loss(params, batch, total, key):
        kwargs = {"key": key} if random else {}
        sums = _sums(built, cast(params, built.metadata, compute_dtype), batch, **kwargs)
        return (sums["nats"] + z_loss * sums.get("squared_log_z", 0)) / total, sums

    def gradient(params, batch, total, key):
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, total, key)
        return jax.lax.with_sharding_constraint(grads, built.shardings["params"]), sums

    def accumulate(params, batch, total, key):
        def add(carry, inputs):
            microbatch, index = inputs
            microbatch = jax.lax.with_sharding_constraint(microbatch, sharding.batch_sharding(built.mesh))
            new = gradient(params, microbatch, total, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, new), None

        # Microbatch i takes every accumulation-th row, so that each device cuts its own rows and sends none.
        split = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, total, key))
        grads, sums = jax.lax.scan(add, zeros, (split, jnp.arange(accumulation)))[0]
        mean = lambda g, facts: g / accumulation if facts.group == "statistics" else g
        return jax.tree.map(mean, grads, built.metadata), sums

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        batch = _prepare(built, batch, accumulation)
        weight = jnp.sum(batch["weights"].astype(jnp.float32))
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        params = state["params"]
        compute = gradient if accumulation == 1 else accumulate
        grads, sums = compute(params, batch, jnp.where(weight > 0, weight, 1), key)
        grad_norm = optax.tree.norm(of_the_loss(grads, built.metadata))
        update, opt = optimizer.update(grads, state["opt"], params)
        made = (weight > 0) & jnp.isfinite(sums["nats"]) & jnp.isfinite(grad_norm)
        new = {"params": optax.apply_updates(params, update), "opt": opt}
        new = jax.tree.map(lambda a, b: jnp.where(made, a, b), new, {k: state[k] for k in new})
        skipped = state["skipped"] + ~made
        metrics = {
            "loss": sums["nats"] / jnp.where(weight > 0, weight, 1),
            **({"accuracy": sums["correct"] / jnp.where(weight > 0, weight, 1)} if "correct" in sums else {}),
            "tokens": weight,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new["params"]),
            "learning_rate": optimizer.learning_rate(state["step"] - state["skipped"]),
            "skipped": skipped.astype(jnp.float32),
        }
        return {**new, "step": state["step"] + 1, "skipped": skipped, "key": state["key"]}, metrics

    out = (built.shardings, sharding.replicated(built.mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def make_eval_step(built: Built, *, compute_dtype="float32") -> Callable[[PyTree, Batch], dict[str, Float[Array, ""]]]:
    """Makes the jitted `(params, batch) -> sums` of `class_sums` or `real_sums`, to be added over batches outside."""

    def step(params, batch):
        return _sums(built, cast(params, built.metadata, compute_dtype), _prepare(built, batch, 1))

    return jax.jit(step, out_shardings=sharding.replicated(built.mesh))


def _sums(built: Built, params: PyTree, batch: Batch, **kwargs) -> dict[str, Float[Array, ""]]:
    return score(functools.partial(built.apply, params), batch, **kwargs)


def score(model: Callable, batch: Batch, **kwargs) -> dict[str, Float[Array, ""]]:
    """The sums of a batch: `class_sums` or, of real targets, `real_sums`; `model` is a `SequenceModel` or is called like one."""
    kwargs |= {"segment_ids": batch.get("segment_ids"), "positions": batch.get("positions")}
    targets, weights = batch["targets"], batch["weights"]
    if jnp.issubdtype(targets.dtype, jnp.floating):
        (predictions, loss), _ = model(batch["inputs"], targets=targets, **kwargs)
        return real_sums(predictions, loss, targets, weights)
    logits, _ = model(batch["inputs"], **kwargs)
    # The backward pass keeps the logits and nothing else of their size.
    return jax.checkpoint(class_sums)(logits, targets, weights)


def _prepare(built: Built, batch: Batch, accumulation: int) -> dict[str, Array]:
    rows, ways = len(batch["inputs"]), sharding.batch_ways(built.mesh)
    if rows % (accumulation * ways):
        raise UserError(
            f"a batch of {rows} rows cannot be divided by {accumulation} microbatches and mesh.data * mesh.fsdp = "
            f"{ways}; make it a multiple of {accumulation * ways}"
        )
    keys = [key for key in ("inputs", "targets", "weights", "segment_ids", "positions") if key in batch]
    return jax.lax.with_sharding_constraint({key: batch[key] for key in keys}, sharding.batch_sharding(built.mesh))

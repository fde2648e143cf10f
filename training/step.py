"""One step of training, and one of evaluation.

The loss is the weighted mean over all that the batch scores (tokens, labelled positions, rows): sum(w * loss) / sum(w), in
float32, whatever the devices, the microbatches and the weights are. Classes are scored by cross-entropy, real targets by the
model's own loss.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from common.errors import UserError
from data.metrics import Metric, batch_sums, weighted
from models.norms import Statistics, follow
from ops import sequence
from training import sharding, tables
from training.optimizer import Settings
from training.state import Built, State, cast

Batch = Mapping[str, Array]
Metrics = dict[str, Any]


def class_sums(
    logits: Float[Array, "B *T V"],
    targets: Int[Array, "B *T"],
    weights: Num[Array, "B *T"],
    metrics: Sequence[Metric] = (),
) -> dict[str, Float[Array, "..."]]:
    """Weighted sums over tokens, or over rows, in float32.

    Args:
      logits: scores of the V classes.
      targets: the right class; any number where the weight is 0.
      weights: weight of each token or row.
      metrics: whose sums are wanted.

    Returns:
      "nats", the cross-entropy; "weight"; "squared_log_z", the squared log-normaliser; and the sums of the metrics.

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
    per_token = {"nats": log_z - score, "weight": 1, "squared_log_z": jnp.square(log_z)}
    sums = {name: jnp.sum(weights * value) for name, value in per_token.items()}
    return sums | batch_sums(metrics, logits, targets, weights)


def real_sums(
    predictions: Float[Array, "B *T K"],
    loss: Float[Array, "B *T"],
    targets: Float[Array, "B *T K"],
    weights: Num[Array, "B *T"],
    metrics: Sequence[Metric] = (),
) -> dict[str, Float[Array, "..."]]:
    """Weighted sums over tokens, or over rows, in float32: "nats", the model's loss; "weight"; and the sums of the metrics."""
    predictions, weights = predictions.astype(jnp.float32), weights.astype(jnp.float32)
    sums = {"nats": weighted(loss, weights), "weight": jnp.sum(weights)}
    return sums | batch_sums(metrics, predictions, targets, weights)


def class_sums_in_chunks(
    head: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Num[Array, "B T"],
    metrics: Sequence[Metric] = (),
    chunks: int = 1,
) -> dict[str, Float[Array, "..."]]:
    """`class_sums` of head(x), a chunk of the length after the other: logits of all tokens are never there at once.

    The backward pass computes the logits of each chunk again. The metrics must be sums over tokens (not `whole_rows`).
    """
    # Each device goes over its own tokens: of a length in shards, a chunk is made of a piece of each of them.
    shards = sequence.ways() if sequence.is_split(x.shape[1]) else 1
    size = -(-x.shape[1] // (shards * chunks))

    def split(a):
        rows, length, *rest = a.shape
        a = a.reshape(rows, shards, length // shards, *rest)
        a = jnp.pad(a, [(0, 0), (0, 0), (0, size * chunks - a.shape[2])] + [(0, 0)] * len(rest))
        a = jnp.moveaxis(a.reshape(rows, shards, chunks, size, *rest), 2, 0)
        return a.reshape(chunks, rows, shards * size, *rest)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def sums(x, targets, weights):
        return class_sums(head(x), targets, weights, metrics)

    def add(total, chunk):
        return jax.tree.map(jnp.add, total, sums(*chunk)), None

    parts = split(x), split(targets), split(weights)
    shapes = jax.eval_shape(sums, *(part[0] for part in parts))
    return jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), parts)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A step of training, `(state, batch) -> (state, metrics)`.

    Attributes:
      function: the jitted `(state, batch, settings) -> (state, metrics)`.
      settings: see `training.optimizer.settings`.
      sharding: of the settings.
    """

    function: Callable[[State, Batch, Settings], tuple[State, Metrics]]
    settings: Settings
    sharding: jax.sharding.Sharding

    @functools.cached_property
    def placed(self) -> Settings:
        """The settings on the devices, where they stay: to send them anew takes as long as to start a step."""
        return jax.device_put(self.settings, self.sharding)

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        return self.function(state, batch, self.placed)


def make_train_step(
    built: Built,
    *,
    metrics: Sequence[Metric] = (),
    accumulation: int = 1,
    loss_chunks: int = 1,
    z_loss: float = 0.0,
    compute_dtype="float32",
    random: bool = False,
) -> TrainStep:
    """Makes the jitted step `(state, batch) -> (state, metrics)`; the state that is passed in is consumed.

    The batch has "inputs", "targets" and "weights" as `data.task.OBJECTIVES` says, with a batch axis before, and may have
    "segment_ids" and "positions". An update that would not be finite, or of a
    batch without any weight, is not made: parameters and optimiser stay, `state["skipped"]` counts it, and the step
    goes on.

    A state that has a "carry" goes on with it, but for the rows that "restart" [batch] of the batch begins anew, and no gradient
    goes back there: truncated back-propagation. Where an update is not made, all rows begin anew.

    Args:
      built: the model, with an optimiser.
      metrics: of the task, whose sums are reported.
      accumulation: number of microbatches whose gradients are summed; the loss stays that of the whole batch.
      loss_chunks: number of pieces of the length that logits and their loss are computed in, see `class_sums_in_chunks`.
      z_loss: weight of the squared log-normaliser (2204.02311, section 5); in the gradient, not in the metric "loss".
      compute_dtype: of the parameters that the model sees (those without `keep_float32`).
      random: whether to pass the model a `key`, a function of `state["key"]`, the step and the microbatch.

    Returns:
      The step. Its metrics are float32 scalars: "loss" (nats per token), "tokens" (sum of the weights), "grad_norm"
      (before clipping), "learning_rate" (of this update), "skipped" (so far); and "sums", a dict of the batch's
      sums, for `data.metrics.training_summary`. Beside them are the means over the layers of the model's `models.mixer.Scalars`;
      what these call "objective" is added to the gradient's objective, not to the metric "loss".

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
        cast_params = cast(params, built.metadata, compute_dtype)
        if "carry" in batch:
            kwargs["carry"] = restarted(built, cast_params, batch["carry"], batch["restart"])
        if "places" in batch:
            kwargs["places"] = batch["places"]
        model = functools.partial(built.apply, cast_params)
        sums, seen, carry = sums_and_statistics(model, batch, metrics, loss_chunks, **kwargs)
        objective = (sums["nats"] + z_loss * sums.get("squared_log_z", 0)) / total
        if "objective" in seen[1]:  # of layers; a mean over microbatches
            objective = objective + jnp.sum(seen[1]["objective"]) / accumulation
        return objective, (sums, seen, carry)

    def gradient(params, batch, total, key):
        with sharding.tracing(built.mesh):  # backward passes, too, are traced here
            (_, (sums, seen, carry)), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, total, key)
        return (jax.lax.with_sharding_constraint(grads, built.shardings["params"]), sums, seen), carry

    def accumulate(params, batch, total, key):
        def add(carry, inputs):
            microbatch, index = inputs
            microbatch = sharding.lay_out(microbatch, built.mesh)
            new, left = gradient(params, microbatch, total, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, new), left

        # Microbatch i takes every accumulation-th row, so that each device cuts its own rows and sends none.
        split = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, total, key)[0]
        )
        (grads, sums, seen), left = jax.lax.scan(add, zeros, (split, jnp.arange(accumulation)))
        left = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), left)
        return (grads, sums, jax.tree.map(lambda total: total / accumulation, seen)), left

    def read(params, batch):
        carry = restarted(built, params, batch["carry"], batch["restart"]) if "carry" in batch else None
        rows = built.merge(params).rows_read(batch["inputs"], carry, batch.get("segment_ids"))
        rows, places = tables.read(rows, built.mesh)
        return rows, sharding.lay_out({"inputs": batch["inputs"], "places": places}, built.mesh)["places"]

    def step(state: State, batch: Batch, settings: Settings) -> tuple[State, Metrics]:
        batch = _prepare(built, batch, accumulation)
        weight = jnp.sum(batch["weights"].astype(jnp.float32))
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        count = state["step"] - state["skipped"]
        compute = gradient if accumulation == 1 else accumulate
        if "carry" in state:
            batch["carry"] = state["carry"]
        old = {name: state[name] for name in ("params", "opt")}
        by_rows = tables.by_rows(built, batch["inputs"].size)
        if by_rows:
            rows, batch["places"] = read(state["params"], batch)
            old = tables.cut(built, old, rows)
        params = old["params"]
        (grads, sums, (statistics, scalars)), carry = compute(params, batch, jnp.where(weight > 0, weight, 1), key)
        grad_norm = optax.tree.norm(grads)
        update, opt = optimizer.update(grads, old["opt"], params, settings=settings)
        finite = (jnp.isfinite(value).all() for value in (sums["nats"], grad_norm, *jax.tree.leaves(statistics)))
        made = functools.reduce(jnp.logical_and, finite, weight > 0)
        new = {"params": follow(optax.apply_updates(params, update), statistics), "opt": opt}
        new = jax.tree.map(lambda a, b: jnp.where(made, a, b), new, old)
        if by_rows:
            left = lambda group: jnp.where(made, optimizer.left(count, group, settings=settings), 1)
            new = tables.put(built, {name: state[name] for name in new}, new, rows, left)
        if "carry" in state:
            new["carry"] = restarted(built, cast(params, built.metadata, compute_dtype), carry, ~made)
        skipped = state["skipped"] + ~made
        reported = {
            "loss": sums["nats"] / jnp.where(weight > 0, weight, 1),
            "tokens": weight,
            "grad_norm": grad_norm,
            "learning_rate": optimizer.learning_rate(count, settings=settings),
            "skipped": skipped.astype(jnp.float32),
            "sums": sums,
            **{name: jnp.mean(value) for name, value in scalars.items() if name != "objective"},
        }
        return {**new, "step": state["step"] + 1, "skipped": skipped, "key": state["key"]}, reported

    everywhere = sharding.replicated(built.mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(built.shardings, everywhere))
    return TrainStep(jitted, optimizer.settings, everywhere)


def make_eval_step(
    built: Built, *, metrics: Sequence[Metric] = (), loss_chunks: int = 1, compute_dtype="float32"
) -> Callable[[PyTree, Batch], dict[str, Float[Array, "..."]]]:
    """Makes the jitted `(params, batch) -> sums` of `class_sums` or `real_sums`, to be added over batches outside."""

    def step(params, batch):
        model = functools.partial(built.apply, cast(params, built.metadata, compute_dtype))
        return score(model, _prepare(built, batch, 1), metrics, loss_chunks)

    return jax.jit(step, out_shardings=sharding.replicated(built.mesh))


def score(
    model: Callable, batch: Batch, metrics: Sequence[Metric] = (), loss_chunks: int = 1, **kwargs
) -> dict[str, Float[Array, "..."]]:
    """The sums of a batch: `class_sums` or, of real targets, `real_sums`; `model` is a `SequenceModel` or is called like one."""
    return sums_and_statistics(model, batch, metrics, loss_chunks, **kwargs)[0]


def restarted(built: Built, params: PyTree, carry: PyTree, where: Bool[Array, "*B"]) -> PyTree:
    """A carry with that before the first token in place of it in some rows (or, of one bool, in all)."""
    fresh = built.merge(params).initial_carry(len(carry["segment"]), 0)

    def pick(fresh, old):
        return jnp.where(where.reshape(where.shape + (1,) * (old.ndim - where.ndim)), fresh.astype(old.dtype), old)

    return jax.tree.map(pick, fresh, carry)


def sums_and_statistics(
    model: Callable, batch: Batch, metrics: Sequence[Metric], loss_chunks: int, **kwargs
) -> tuple[dict[str, Float[Array, "..."]], tuple[Statistics | None, dict[str, Float[Array, "L"]]], Any]:
    """The sums of `score`; what a model in training saw of the batch, see `SequenceModel.__call__` (None and {} of one that does
    not say); and the carry that it leaves."""
    kwargs |= {"segment_ids": batch.get("segment_ids"), "positions": batch.get("positions")}
    targets, weights = batch["targets"], batch["weights"]
    if jnp.issubdtype(targets.dtype, jnp.floating):
        (predictions, loss), carry, *seen = model(batch["inputs"], targets=targets, **kwargs)
        sums = real_sums(predictions, loss, targets, weights, metrics)
    elif loss_chunks > 1:
        chunked = functools.partial(
            class_sums_in_chunks, targets=targets, weights=weights, metrics=metrics, chunks=loss_chunks
        )
        sums, carry, *seen = model(batch["inputs"], reduce=chunked, **kwargs)
    else:
        logits, carry, *seen = model(batch["inputs"], **kwargs)
        # The backward pass keeps the logits and nothing else of their size.
        sums = jax.checkpoint(functools.partial(class_sums, metrics=metrics))(logits, targets, weights)
    return sums, tuple(seen) if seen else (None, {}), carry


def check_rows(rows: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
    """Raises a UserError if the rows of a batch cannot be divided over the microbatches and the devices."""
    ways = sharding.batch_ways(mesh)
    if rows % (accumulation * ways):
        raise UserError(
            f"a batch of {rows} rows cannot be divided by {accumulation} microbatches and mesh.data * mesh.fsdp * "
            f"mesh.expert = {ways}; make it a multiple of {accumulation * ways}"
        )


def _prepare(built: Built, batch: Batch, accumulation: int) -> dict[str, Array]:
    check_rows(len(batch["inputs"]), accumulation, built.mesh)
    keys = [key for key in ("inputs", "targets", "weights", "segment_ids", "positions", "restart") if key in batch]
    return sharding.lay_out({key: batch[key] for key in keys}, built.mesh)

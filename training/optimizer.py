"""Optimisers and learning-rate schedules.

What differs between parameters (whether one decays, its learning-rate group) is read from the facts that each parameter
carries; there is no list of names and no pattern here. The learning rate, its schedule's numbers and the weight decay are
arguments of the compiled step, so that a sweep over them compiles it once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from optax import contrib

from common.errors import UserError, check_range, near
from models.scaling import Growth

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "muon")
TABLE_RULES = ("same", "adagrad")
SCHEDULES = ("cosine", "linear", "rsqrt", "wsd", "constant")

_BELOW_ONE = 1 - 1e-7  # an average that never forgets has no bias correction
# Of what is added to Adam's denominator: in float32 0 / 0, where a parameter has no gradient, is no number.
_SMALLEST = 1e-30


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser.

    Attributes:
      name: "adamw" (arXiv 1711.05101), "adam" (1412.6980), "sgd" with heavy-ball momentum, "lion" (2302.06675) or
        "muon" (momentum orthogonalised by Newton-Schulz, with the update size of 2502.16982; AdamW for what is no
        matrix).
      learning_rate: peak.
      schedule: what follows the warm-up: "cosine", "linear", "rsqrt", "wsd" (stable, then a linear decay; 2405.18392)
        or "constant". See `schedule`.
      warmup_steps: updates until the peak is reached, linearly.
      decay_fraction: share of all steps that the decay of "wsd" takes.
      final_fraction: learning rate of the last update over the peak; a floor for "rsqrt", nothing for "constant".
      weight_decay: applied to the parameters that say `decay`. Decoupled and multiplied by the learning rate for adamw,
        lion and muon; added to the gradient (L2 penalty) for adam and sgd.
      b1: momentum of every optimiser (0.95 is usual for muon).
      b2: second moment of adam, adamw and muon's AdamW; the slow average of lion.
      eps: added to the denominator of Adam; its square to what Adagrad takes the root of.
      clip_norm: gradients of a larger global norm are scaled down to it; 0 for no clipping.
      group_scale: learning-rate multiplier of each group that parameters name. "default" is 1 if left out. "fixed" never
        moves.
      tables: the rule of tables of which a token looks up single rows (`Metadata.is_table`: embeddings of n-grams): "same" as
        that of `name`, or "adagrad" (Duchi et al., 2011), whose steps become shorter with each gradient of a row and which, but
        for the weight decay, moves no row without one, so that a step trains the rows that are read, see `training.tables`.
      table_scale: learning-rate multiplier of "adagrad".

    Raises:
      UserError: for an unknown name or a value out of range.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.02
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    group_scale: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"default": 1.0, "ssm": 0.25})
    tables: str = "same"
    table_scale: float = 4.0

    def __post_init__(self):
        if self.group_scale.get("fixed"):
            raise UserError('optimizer.group_scale: what is in the group "fixed" never moves; leave it out')
        object.__setattr__(self, "group_scale", {"default": 1.0, **self.group_scale, "fixed": 0.0})
        for field, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES), ("tables", TABLE_RULES)):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"there is no optimizer.{field} {value!r}; {near(value, known)}")
        ranges = {
            "learning_rate": math.inf,
            "warmup_steps": math.inf,
            "decay_fraction": 1,
            "final_fraction": 1,
            "weight_decay": math.inf,
            "b1": _BELOW_ONE,
            "b2": _BELOW_ONE,
            "eps": math.inf,
            "clip_norm": math.inf,
            "table_scale": math.inf,
        }
        for field, high in ranges.items():
            check_range(f"optimizer.{field}", getattr(self, field), 0, high)
        for group, scale in self.group_scale.items():
            check_range(f"optimizer.group_scale.{group}", scale, 0)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What the optimiser must know to use a base model's learning rate.

    Attributes:
      growth: a `models.scaling.Growth` for each parameter, in the tree of the parameters.
      gradients: how many times smaller gradients are than in the base model.
    """

    growth: PyTree
    gradients: float


Settings = dict[str, Any]
"""The numbers of `settings`: float32 scalars."""


class Optimizer(NamedTuple):
    """An optax transformation (`init`, `update`) and the learning rate of its n-th update, n counted from 0.

    `update(gradients, state, parameters, settings=...)` and `learning_rate(n, settings=...)` go by other numbers than the
    configuration's where they are given: by arguments of a compiled step. `left(n, group, settings=...)` is the share of a row
    of a table, of a learning-rate group, that the n-th update leaves where the row has no gradient; None where more than weight
    decay would change such a row or what is known of it.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    learning_rate: Callable[..., jax.Array]
    settings: Settings
    left: Callable[..., jax.Array] | None = None


def settings(config: OptimizerConfig, total_steps: int) -> Settings:
    """The numbers that a compiled step is told at each call; runs that differ in nothing else share its program.

    Raises:
      UserError: if the warm-up (and the decay of wsd) takes longer than `total_steps`.
    """
    warmup, decay = config.warmup_steps, config.decay_fraction * total_steps if config.schedule == "wsd" else 0
    if warmup + decay > total_steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup}{f' and a decay of {decay:g} steps' if decay else ''} do not fit into "
            f"{total_steps} steps of training; lower optimizer.warmup_steps{' or optimizer.decay_fraction' if decay else ''}"
        )
    numbers = {
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "total_steps": total_steps,
        "warmup_steps": warmup,
        "decay_steps": decay,
        "final_fraction": config.final_fraction,
    }
    return {name: np.float32(value) for name, value in numbers.items()}


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates already made.

    With s = count + 1, so that the first update moves and the last one, s = total, has the final value; W =
    warmup_steps, f = final_fraction, p = (s - W) / (total - W):

        warm-up    s / W                                            while s <= W
        cosine     f + (1 - f) (1 + cos(pi p)) / 2
        linear     f + (1 - f) (1 - p)
        rsqrt      max(f, sqrt(max(W, 1) / s))
        wsd        1, then f + (1 - f) (total - s) / D in the last   D = decay_fraction * total
        constant   1

    all times `learning_rate`; constant at the last value for s > total.

    Raises:
      UserError: if the warm-up (and the decay of wsd) takes longer than `total_steps`.
    """
    return functools.partial(_learning_rate, config.schedule, settings=settings(config, total_steps))


def _learning_rate(shape: str, count: jax.Array, settings: Settings) -> jax.Array:
    total, warmup, decay, final = (
        settings[name] for name in ("total_steps", "warmup_steps", "decay_steps", "final_fraction")
    )
    s = jnp.minimum(jnp.asarray(count, jnp.float32) + 1, total)
    progress = jnp.clip((s - warmup) / jnp.maximum(total - warmup, 1), 0, 1)
    match shape:
        case "cosine":
            share = final + (1 - final) * (1 + jnp.cos(jnp.pi * progress)) / 2
        case "linear":
            share = final + (1 - final) * (1 - progress)
        case "rsqrt":
            share = jnp.maximum(final, jnp.sqrt(jnp.maximum(warmup, 1) / s))
        case "wsd":
            share = final + (1 - final) * jnp.clip((total - s) / jnp.maximum(decay, 1), 0, 1)
        case "constant":
            share = jnp.ones_like(s)
    warm = jnp.minimum(s / jnp.maximum(warmup, 1), 1)
    return settings["learning_rate"] * jnp.where(s <= warmup, warm, share)


def build(config: OptimizerConfig, total_steps: int, metadata: PyTree, scaling: Scaling | None = None) -> Optimizer:
    """Builds the optimiser of a model.

    Args:
      config: the choice.
      total_steps: steps of training, for the schedule.
      metadata: a `training.state.Metadata` for each parameter, in the tree of the parameters.
      scaling: from the base model whose learning rate is used; None without one.

    Raises:
      UserError: if a parameter is in a group that `group_scale` does not have, if there are no tables for a rule of their own,
        for an eps that float32 hardly tells from 0 where Adam divides by it, or as from `settings`.
    """
    if config.name in ("adamw", "adam", "muon"):
        check_range("optimizer.eps", config.eps, _SMALLEST)
    if config.tables != "same" and not any(facts.is_table for facts in jax.tree.leaves(metadata)):
        raise UserError(
            f"optimizer.tables={config.tables!r} has no effect on a model without tables: set it to 'same', or set model.ngrams"
        )
    for path, facts in jax.tree_util.tree_leaves_with_path(metadata):
        if facts.group not in config.group_scale:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"parameter {name} is in learning-rate group {facts.group!r}, which optimizer.group_scale lacks; add "
                f"it there with its multiplier, or {near(facts.group, tuple(config.group_scale))}"
            )
    known = settings(config, total_steps)

    def update(gradients, state, params, settings=known):
        return _transform(config, metadata, scaling, settings).update(gradients, state, params)

    init = _transform(config, metadata, scaling, known).init
    rate = schedule(config, total_steps)

    def left(count, group, settings=known):
        return 1 - rate(count, settings=settings) * settings["weight_decay"] * config.group_scale[group]

    alone = config.tables == "adagrad" and config.name not in ("adam", "sgd")  # whose decay is part of the gradient
    return Optimizer(init, update, rate, known, left if alone else None)


def _transform(
    config: OptimizerConfig, metadata: PyTree, scaling: Scaling | None, settings: Settings
) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(settings["weight_decay"], mask=jax.tree.map(lambda m: m.decay, metadata))
    rules = _rules(config, config.eps if scaling is None else config.eps / scaling.gradients, metadata)
    # In front of the decoupled decay, so that what a step decays by does not depend on the width.
    if scaling is not None:
        rules = (*rules, _transfer(config.name, metadata, scaling.growth))
    rules = (decay, *rules) if config.name in ("adam", "sgd") else (*rules, decay)
    clip = (_clip(config.clip_norm),) if config.clip_norm else ()
    scale = _scale(lambda facts: config.group_scale[facts.group], metadata)
    learning_rate = functools.partial(_learning_rate, config.schedule, settings=settings)
    return optax.chain(*clip, *rules, scale, optax.scale_by_learning_rate(learning_rate))


def _clip(norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as a product with one number, which XLA makes where the gradients are read. Optax divides each
    array, which is then written once more and read again by all that needs it."""

    def clip(gradients, _):
        factor = jnp.minimum(1, norm / optax.tree.norm(gradients))
        return jax.tree.map(lambda g: g * factor, gradients)

    return optax.stateless(clip)


def _scale(factor: Callable[[Any], float], metadata: PyTree) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, facts: u * factor(facts), updates, metadata))


def factors(name: str, metadata: PyTree, growth: PyTree) -> PyTree:
    """For each parameter the factor of its updates that makes a map change its output by as much as in the base model.

    Entries of one size (Adam, Lion), aligned with the input, add up over the inputs. An orthogonal update, as `_resize` leaves
    it, has the norm sqrt(max(inputs, outputs)) where sqrt(outputs / inputs) is wanted.

    Args:
      name: of the optimiser.
      metadata, growth: see `build` and `Scaling`.
    """

    def factor(facts, grown: Growth) -> float:
        (inputs, outputs), (base_inputs, base_outputs) = grown.fans, grown.base_fans
        if name == "muon" and _is_matrix(facts):
            wanted = lambda i, o: math.sqrt(o / i) / math.sqrt(max(i, o))
            return grown.depth * wanted(inputs, outputs) / wanted(base_inputs, base_outputs)
        return grown.depth * base_inputs / inputs

    return jax.tree.map(factor, metadata, growth)


def _transfer(name: str, metadata: PyTree, growth: PyTree) -> optax.GradientTransformation:
    # A factor of 1 is left out, and the program of a model that is its own base is that of one without a base.
    multiply = lambda u, factor: u if factor == 1 else factor * u
    known = factors(name, metadata, growth)
    return optax.stateless(lambda updates, _: jax.tree.map(multiply, updates, known))


def _rules(config: OptimizerConfig, eps: float, metadata: PyTree) -> tuple[optax.GradientTransformation, ...]:
    """What makes updates of gradients, for each kind of parameters that has a rule of its own. Those of Muon and Adam are of
    similar size and share one learning rate."""
    match config.name:
        case "sgd":
            rules = {"other": optax.trace(decay=config.b1)}
        case "lion":
            rules = {"other": optax.scale_by_lion(b1=config.b1, b2=config.b2)}
        case _:
            rules = {"other": optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=eps)}
    if config.name == "muon":
        rules = {"matrix": _muon(config.b1, metadata)} | rules
    if config.tables == "adagrad":
        rules["table"] = optax.chain(optax.scale_by_rss(0.0, eps**2), optax.scale(config.table_scale))
    if len(rules) == 1:
        return tuple(rules.values())

    def kind(facts) -> str:
        found = "table" if facts.is_table else "matrix" if _is_matrix(facts) else "other"
        return found if found in rules else "other"

    kinds = jax.tree.map(kind, metadata)
    return tuple(optax.masked(rules[name], jax.tree.map(name.__eq__, kinds)) for name in rules)


def _muon(momentum: float, metadata: PyTree) -> optax.GradientTransformation:
    matrices = jax.tree.map(_matrix, metadata)
    resize = optax.stateless(lambda updates, _: jax.tree.map(_resize, updates, matrices))
    return optax.chain(contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=matrices), resize)


def _is_matrix(facts) -> bool:
    return isinstance(_matrix(facts), contrib.MuonDimensionNumbers)


def _matrix(facts) -> contrib.MuonDimensionNumbers | optax.MaskedNode:
    """How a parameter is a matrix between the residual stream ("embed") and the inside of a layer, if it is one.

    Embeddings and heads ("vocab"), vectors, filters and whatever does not decay or has its own learning rate are none.
    The dimensions are counted from the end, so that stacked layers are a batch of matrices, as experts are.
    """
    axes = facts.axes
    inside = [axis for axis in axes if axis not in ("embed", "expert", None)]
    if not facts.decay or facts.group != "default" or axes.count("embed") != 1 or not inside or "vocab" in axes:
        return optax.MaskedNode()
    embed = axes.index("embed") - len(axes)
    return contrib.MuonDimensionNumbers(
        (embed,), tuple(i for i in range(-len(axes), 0) if axes[i] not in ("embed", "expert"))
    )


def _resize(update: jax.Array, matrix: contrib.MuonDimensionNumbers) -> jax.Array:
    rows, columns = (math.prod(update.shape[i] for i in side) for side in (matrix.reduction_axis, matrix.output_axis))
    return 0.2 * math.sqrt(max(rows, columns)) * update

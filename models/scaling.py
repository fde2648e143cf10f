"""Learning rates that hold for wider and deeper models: how each parameter has grown since the base model.

A hyperparameter that was found at `model.base_width` and `model.base_depth` holds at other widths and depths if each map changes
its output by as much, at its first value and in an update that is aligned with its input (arXiv 2310.17813; 2203.03466 is the
first of such rules, 2505.01618 has the depth). What differs between parameters is read from their facts and their shapes in both
models: a dimension of one size is none that grows. docs/scaling.md has the rule as a table.
"""

import dataclasses
import math

import jax
from flax import nnx

from common.errors import UserError
from models.config import ModelConfig
from models.params import without_values
from models.sequence_model import SequenceModel


@dataclasses.dataclass(frozen=True)
class Growth:
    """The sizes of a parameter beside those that it has in the base model.

    Attributes:
      fans: number of inputs and of outputs of the map; (1, 1) for what is no map, and for embeddings and heads.
      base_fans: the same in the base model.
      depth: factor of the updates that is due to the depth.
    """

    fans: tuple[int, int]
    base_fans: tuple[int, int]
    depth: float = 1.0


def growth(config: ModelConfig) -> dict[tuple, Growth] | None:
    """How each parameter has grown, by its path; None without a base. Nothing is computed.

    Raises:
      UserError: if the base model has other parameters than the model.
    """
    if not config.transfers:
        return None
    ours, base = _parameters(config), _parameters(config.base)
    if strange := sorted({*ours} ^ {*base}):
        raise UserError(
            f"the models at model.width={config.width} and at model.base_width={config.base.width} have other parameters "
            f"({'/'.join(map(str, strange[0]))} is only in one of them): no learning rate holds for both"
        )
    # What is in the stack learns as fast in sum over the blocks; the branches have depth_ratio^-depth_alpha already.
    depth = config.depth_ratio ** (config.depth_alpha - 1)
    return {
        path: Growth(_fans(variable), _fans(base[path]), depth if path[0] == "stack" else 1.0)
        for path, variable in ours.items()
    }


def _parameters(config: ModelConfig) -> dict[tuple, nnx.Variable]:
    model = without_values(lambda: SequenceModel(config, rngs=nnx.Rngs(jax.random.key(0))))
    return dict(nnx.to_flat_state(nnx.state(model)))


def _fans(variable: nnx.Variable) -> tuple[int, int]:
    """The number of inputs and of outputs of a map; (1, 1) for what is none, and for embeddings and heads."""
    facts = variable.get_metadata()
    axes, inputs = facts["axes"], facts["inputs"]
    if not inputs or "vocab" in axes:
        return 1, 1
    shape = variable.shape[len(variable.shape) - len(axes) :]  # without the dimension of the repeats
    fan_in = math.prod(shape[i] for i in inputs)
    return fan_in, math.prod(shape) // fan_in

"""Channel mixers: what acts on each token by itself."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import UserError
from models.checks import whole
from models.params import dense, param, residual_output, zeros
from models.partitioning import constrain
from ops.elementwise import activate, gate
from ops.projection import project, project_each


def relu2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0)^2 (Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


class MLP(nnx.Module):
    """W_2 f(W_1 x), with a hidden size of `expansion` * width, or `hidden`; `bias` adds one to both maps.

    With `scales` (a, b) it is b W_2 f(a W_1 x).
    """

    def __init__(
        self,
        width: int,
        *,
        activation,
        rngs: nnx.Rngs,
        expansion: float = 4.0,
        hidden: int | None = None,
        bias: bool = False,
        scales: tuple[float, ...] = (),
        depth: int = 1,
    ):
        self.scales = scales
        hidden = whole(expansion * width) if hidden is None else hidden
        self.hidden = _checked(hidden, expansion)
        self.activation = activation
        self.w_in = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_out = residual_output(rngs, (hidden, width), ("mlp", "embed"), depth)
        self.b_in = param(rngs, zeros, (hidden,), ("mlp",)) if bias else None
        self.b_out = param(rngs, zeros, (width,), (None,)) if bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h = constrain(_plus(project(x, self.w_in[...]), self.b_in), "batch", "length", "mlp")
        h = activate(self.activation, _times(self.scales, 0, h))
        return _times(self.scales, 1, _plus(project(h, self.w_out[...]), self.b_out))


class GLU(nnx.Module):
    """W_3 (f(W_1 x) * W_2 x) (arXiv 2002.05202), with 2/3 of the MLP's hidden size, so that it has as many parameters; or
    with `hidden`. `bias` adds one to all three maps. With `scales` (a, b) it is b W_3 (f(a W_1 x) * W_2 x) (Falcon-H1)."""

    def __init__(
        self,
        width: int,
        *,
        activation,
        rngs: nnx.Rngs,
        expansion: float = 4.0,
        hidden: int | None = None,
        bias: bool = False,
        scales: tuple[float, ...] = (),
        depth: int = 1,
    ):
        self.scales = scales
        hidden = whole(expansion * width * 2 / 3) if hidden is None else hidden
        self.hidden = _checked(hidden, expansion)
        self.activation = activation
        self.w_in = dense(rngs, (width, 2, hidden), ("embed", None, "mlp"))
        self.w_out = residual_output(rngs, (hidden, width), ("mlp", "embed"), depth)
        self.b_in = param(rngs, zeros, (2, hidden), (None, "mlp"), decay=False) if bias else None
        self.b_out = param(rngs, zeros, (width,), (None,)) if bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        g, v = project_each(x, self.w_in[...])
        if self.b_in is not None:
            g, v = g + self.b_in[0], v + self.b_in[1]
        h = constrain(gate(self.activation, _times(self.scales, 0, g), v), "batch", "length", "mlp")
        return _times(self.scales, 1, _plus(project(h, self.w_out[...]), self.b_out))


def _checked(hidden: int, expansion: float) -> int:
    if hidden < 1:
        raise UserError(f"model.expansion={expansion} leaves the channel mixer no hidden channel; make it greater")
    return hidden


def _times(scales, i, x):
    return scales[i] * x if scales else x


def _plus(x, bias):
    return x if bias is None else x + bias[...]


CHANNEL_MIXERS = {
    "mlp": functools.partial(MLP, activation=jax.nn.gelu),
    "relu2": functools.partial(MLP, activation=relu2),
    "swiglu": functools.partial(GLU, activation=jax.nn.silu),
    "geglu": functools.partial(GLU, activation=jax.nn.gelu),
}

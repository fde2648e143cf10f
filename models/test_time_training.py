"""The layer around a small network that is trained while the sequence is read: TTT-Linear's and TTT-MLP's."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.checks import at_least, check_rotated, head_size, positive
from models.mixer import Ids, Mixer, Tokens
from models.norms import LayerNorm
from models.params import conv_taps, dense, normal, ones, param, residual_output, zeros
from models.partitioning import constrain
from ops.elementwise import gate
from ops.projection import project
from ops.rotary import rotary
from ops.short_convolution import short_convolution
from ops.ttt import ttt


class TestTimeTraining(Mixer):
    """y = W_o (gelu(W_g x) * LN'(o)), o what `ops.ttt` gives of three views of the tokens (arXiv 2407.04620, section 2.7):

    q = conv(W_qk x) and k = conv'(W_qk x) share a projection and are rotated by the place in the mini-batch; v = W_v x. The step
    size of token j for place i of its mini-batch is base_rate max(1/i + offset_i, 0) sigmoid(w_lr . x_j) / K. The network's first
    weights, its biases and the LN of each head are learned. Weights and w_lr start as N(0, 0.02^2).

    A subclass says in `make_memory` and `memories` of what layers the network is.
    """

    primitive = "ttt"
    sequence_parallel = ()  # a nonlinear recurrence goes batch by batch
    tiny = {"mini_batch": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        depth: int,
        heads: int,
        mini_batch: int,
        base_rate: float,
        conv_size: int,
        rope_base: float,
    ):
        """Makes the parameters; the arguments are those of the mixers."""
        at_least(1, mini_batch=mini_batch)
        at_least(0, base_rate=base_rate)
        positive(rope_base=rope_base)
        size = head_size(width, heads, "width")
        check_rotated(size)
        self.mini_batch = mini_batch
        self.base_rate = base_rate
        self.conv_size = conv_size
        self.rope_base = rope_base
        self.w_qk = dense(rngs, (width, width), ("embed", "heads"))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_g = dense(rngs, (width, width), ("embed", "heads"))
        self.conv_q = conv_taps(rngs, conv_size, width, "heads")
        self.conv_k = conv_taps(rngs, conv_size, width, "heads")
        std = 0.02 * (base_width / width) ** 0.5  # the authors', at the width that a wider model is scaled from
        self.w_lr = param(rngs, normal(std), (width, heads), ("embed", None))
        self.offset = param(rngs, zeros, (mini_batch,), (None,), decay=False, keep_float32=True)
        self.make_memory(rngs, heads, size)
        self.head_norm = param(rngs, ones, (heads, size), ("heads", None), decay=False, keep_float32=True)
        self.head_norm_bias = param(rngs, zeros, (heads, size), ("heads", None), decay=False, keep_float32=True)
        self.norm = LayerNorm(width, rngs=rngs)
        self.w_o = residual_output(rngs, (width, width), ("heads", "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        heads, size = self.head_norm.shape
        new = {}
        shared = constrain(project(x, self.w_qk[...]), "batch", "length", "heads")

        def view(name, taps):
            initial = None if state is None else state[name]
            u, new[name] = short_convolution(shared, taps[...], initial_state=initial, segment_ids=segment_ids)
            u = u.reshape(*u.shape[:2], heads, size)
            return rotary(u, positions % self.mini_batch, base=self.rope_base, layout="interleaved")

        rate = jax.nn.sigmoid(project(x, self.w_lr[...]).astype(jnp.float32))
        place = jnp.maximum(1 / jnp.arange(1.0, self.mini_batch + 1) + self.offset[...], 0)
        o, (new["start"], new["gradient"]) = ttt(
            view("conv_q", self.conv_q),
            view("conv_k", self.conv_k),
            project(x, self.w_v[...]),
            self.base_rate / size * rate,
            place,
            self.first(),
            self.head_norm[...],
            self.head_norm_bias[...],
            positions=None if state is None else positions,
            initial_state=None if state is None else (state["start"], state["gradient"]),
            segment_ids=segment_ids,
        )
        o = self.norm(o.reshape(x.shape))
        return project(gate(jax.nn.gelu, project(x, self.w_g[...]), o), self.w_o[...]), new

    def make_memory(self, rngs: nnx.Rngs, heads: int, size: int) -> None:
        """Makes the network's first weights and biases."""
        raise NotImplementedError

    def memories(self) -> tuple[tuple[nnx.Param, nnx.Param], ...]:
        """The first weight [H, I, O] and bias [H, O] of each layer."""
        raise NotImplementedError

    def first(self) -> tuple[Float[Array, "H _I _O"], ...]:
        """The network before the first token, each layer's weight and bias as one matrix."""
        join = lambda weight, bias: jnp.concatenate([weight[...], bias[...][:, None]], 1).astype(jnp.float32)
        return tuple(join(*layer) for layer in self.memories())

    def initial_state(self, batch: int, capacity: int) -> dict:
        start = tuple(jnp.broadcast_to(layer, (batch, *layer.shape)) for layer in self.first())
        taps = jnp.zeros((batch, self.conv_size - 1, self.w_qk.shape[1]), jnp.float32)
        return {"conv_q": taps, "conv_k": taps, "start": start, "gradient": tuple(map(jnp.zeros_like, start))}


def matrix(rngs: nnx.Rngs, heads: int, inputs: int, outputs: int) -> tuple[nnx.Param, nnx.Param]:
    """The first weight and bias of a layer."""
    weight = param(rngs, normal(0.02), (heads, inputs, outputs), ("heads", None, None))
    return weight, param(rngs, zeros, (heads, outputs), ("heads", None), decay=False)

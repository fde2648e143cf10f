"""DeltaNet."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.mixer import Mixer, head_size
from models.norms import RMSNorm, l2_normalize
from models.params import dense, param, uniform
from models.partitioning import constrain
from ops.delta_rule import delta_rule
from ops.short_convolution import short_convolution


class DeltaNet(Mixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K), y = W_o norm(o)
    (arXiv 2406.06484, section 2.2; first in 2102.11174).

    q, k = l2norm(silu(conv(W x))), v = silu(conv(W x)), beta = sigmoid(W_b x), one for each head: a step of size beta down the
    gradient of |S^T k_t - v_t|^2 / 2. Keys must have unit length, or the state explodes.

    Args:
      heads: number of heads.
      expand_key: size of the keys over the width.
      expand_value: size of the values over the width.
      conv_size: taps of the short convolutions.
      negative_eigenvalues: beta in (0, 2) instead of (0, 1), for state tracking (arXiv 2411.12537).
    """

    paper = "DeltaNet, arXiv 2406.06484"
    primitive = "delta_rule"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        heads: int = 4,
        expand_key: float = 1.0,
        expand_value: float = 1.0,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
    ):
        key = head_size(int(expand_key * width), heads, "the size of the keys")
        value = head_size(int(expand_value * width), heads, "the size of the values")
        self.sizes = (heads, key, value)
        self.conv_size = conv_size
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        self.w_q = dense(rngs, (width, heads * key), ("embed", "heads"))
        self.w_k = dense(rngs, (width, heads * key), ("embed", "heads"))
        self.w_v = dense(rngs, (width, heads * value), ("embed", "heads"))
        tap = uniform(-(conv_size**-0.5), conv_size**-0.5)
        self.conv_q = param(rngs, tap, (conv_size, heads * key), (None, "heads"), decay=False)
        self.conv_k = param(rngs, tap, (conv_size, heads * key), (None, "heads"), decay=False)
        self.conv_v = param(rngs, tap, (conv_size, heads * value), (None, "heads"), decay=False)
        self.w_b = dense(rngs, (width, heads), ("embed", None))
        self.norm = RMSNorm(value, rngs=rngs)
        self.w_o = dense(rngs, (heads, value, width), ("heads", None, "embed"), inputs=2, gain=(2 * depth) ** -0.5)

    def mix(self, x, state, *, segment_ids, positions):
        _, key, value = self.sizes
        new = {}

        def branch(name, w, taps, size):
            initial = None if state is None else state[name]
            u = constrain(x @ w[...], "batch", "length", "heads")
            u, new[name] = short_convolution(u, taps[...], initial_state=initial, segment_ids=segment_ids)
            return jax.nn.silu(u).reshape(*u.shape[:2], -1, size)

        q = l2_normalize(branch("conv_q", self.w_q, self.conv_q, key))
        k = l2_normalize(branch("conv_k", self.w_k, self.conv_k, key))
        v = branch("conv_v", self.w_v, self.conv_v, value)
        beta = self.beta_scale * jax.nn.sigmoid((x @ self.w_b[...]).astype(jnp.float32))
        o, new["memory"] = delta_rule(
            q,
            k,
            v,
            beta,
            scale=1 / math.sqrt(key),
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        return jnp.einsum("bthv,hvd->btd", self.norm(o), self.w_o[...]), new

    def initial_state(self, batch, capacity):
        heads, key, value = self.sizes
        taps = lambda size: jnp.zeros((batch, self.conv_size - 1, heads * size), jnp.float32)
        memory = jnp.zeros((batch, heads, key, value), jnp.float32)
        return {"conv_q": taps(key), "conv_k": taps(key), "conv_v": taps(value), "memory": memory}

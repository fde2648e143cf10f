"""MEGA: moving average equipped gated attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import check_choice
from models.checks import at_least, even, scaled
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens
from models.params import normal, param, zeros
from models.partitioning import constrain
from ops import segments
from ops.attention import attention
from ops.block_attention import block_attention, block_ids, empty_block
from ops.elementwise import silu
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.projection import project
from ops.rotary import rotary
from ops.state_space_scan import state_space_scan


class Mega(Mixer):
    """o = x + u * (h - x), h = silu(W_h m + U_h (r * (A v)) + b_h) (arXiv 2209.10655, equations 5 to 16), where

    m = silu(EMA(x)), v = silu(W_v x + b_v), u = sigmoid(W_u m + b_u), r = silu(W_r m + b_r), z = silu(W_z m + b_z), q and k
    are two scaled and shifted copies of z, and A = f(q k^T) with one head.

    EMA is the damped moving average of every channel in `ema_size` dimensions: h_t = (1 - p a) h_{t-1} + p beta x_t,
    EMA(x)_t = eta . h_t / sqrt(ema_size) + omega x_t, with p = sigmoid(delta) and a = sigmoid(alpha). On whole sequences it is a
    convolution, on streams and packed rows a recurrence. Two-sided: a second one runs backwards, and both read the token
    itself, as in the authors' code.

    f is softmax(q k^T / sqrt(key_size) + b), or laplace(q k^T / n_i + b) with n_i the number of keys that row i sees and no
    denominator. b_ij = rope(a)_i . rope(c)_j with learned a and c: the authors' "rotary" bias (they also have a table).
    With `chunk` (MEGA-chunk) attention stays inside chunks of that many tokens, and the EMA alone passes between them.

    All maps start as N(0, 0.02^2), as in the authors' code.

    The mixer returns o - x. Its x is what the block's norm gives; the authors' code, where the norm comes first, takes the
    residual stream itself for the x beside h. With the norm behind, both are the same.

    Args:
      expansion: size of v and r over the width.
      key_size: size of z.
      ema_size: dimensions of the moving average of each channel.
      activation: f, "softmax" or "laplace".
      chunk: tokens of a chunk; None for attention over the whole sequence.
    """

    bidirectional = True
    constant_carry = False  # on an instance: whether it has chunks
    paper = "MEGA, arXiv 2209.10655"
    primitive = "attention"
    sequence_parallel = ()  # a Fourier transform is of the whole length
    complexity = "T^2 (T chunk)"
    tiny = {"key_size": 16, "ema_size": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        causal: bool = True,
        expansion: float = 2.0,
        key_size: int = 64,
        ema_size: int = 16,
        activation: str = "softmax",
        chunk: int | None = None,
    ):
        check_choice("activation", activation, ("softmax", "laplace"))
        even(key_size=key_size)
        at_least(1, ema_size=ema_size, chunk=chunk)
        hidden = scaled(width, expansion=expansion)
        self.causal = causal
        self.constant_carry = chunk is not None
        self.activation = activation
        self.chunk = chunk
        self.sizes = (width, key_size, hidden)
        facts = {"decay": False, "keep_float32": True}
        shape, axes = (1 if causal else 2, width, ema_size), (None, None, None)
        alternating = lambda *args: normal(0.02)(*args) + (-1.0) ** jnp.arange(ema_size)
        self.delta = param(rngs, normal(0.2), shape, axes, **facts)
        self.alpha = param(rngs, normal(0.2), shape, axes, **facts)
        self.ema_in = param(rngs, alternating, shape, axes, **facts)
        self.ema_out = param(rngs, normal(1.0), shape, axes, **facts)
        self.omega = param(rngs, normal(1.0), (width,), (None,), **facts)
        std = 0.02 * (base_width / width) ** 0.5  # the authors', at the width that a wider model is scaled from
        small = lambda shape, axes: param(rngs, normal(std), shape, axes)
        self.w_v = small((width, hidden), ("embed", "mlp"))
        self.b_v = param(rngs, zeros, (hidden,), ("mlp",))
        self.w_m = small((width, 2 * width + key_size), ("embed", None))
        self.b_m = param(rngs, zeros, (2 * width + key_size,), (None,))
        self.w_r = small((width, hidden), ("embed", "mlp"))
        self.b_r = param(rngs, zeros, (hidden,), ("mlp",))
        self.u_h = small((hidden, width), ("mlp", "embed"))
        self.gamma = param(rngs, normal(0.02), (2, key_size), (None, None), decay=False)
        self.beta = param(rngs, zeros, (2, key_size), (None, None), decay=False)
        self.bias = param(rngs, normal(0.02), (2, key_size), (None, None), decay=False)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        width, key_size, _ = self.sizes
        ema, keys = (None, None) if state is None else (state["ema"], state["keys"])
        if state is not None and self.chunk is None:
            # A carry that grows is not restarted from outside: compare with the segment of the last token that it holds.
            last = jnp.take(keys["segment"], keys["length"] - 1, axis=1, mode="clip")
            ema = jnp.where((last == segment_ids[:, 0])[:, None, None], ema, 0)
        m, ema = self.moving_average(x, ema, segment_ids)
        u, h, z = jnp.split(project(m, self.w_m[...]) + self.b_m[...], (width, 2 * width), axis=-1)
        r = constrain(silu(project(m, self.w_r[...]) + self.b_r[...]), "batch", "length", "mlp")
        v = constrain(silu(project(x, self.w_v[...]) + self.b_v[...]), "batch", "length", "mlp")[:, :, None]
        z = silu(z)[:, :, None]
        q, k = (z * self.gamma[i] + self.beta[i] for i in (0, 1))
        if self.activation == "softmax":
            q = q * key_size**-0.5
        else:
            q = (q / self.count(segment_ids, positions)[..., None, None]).astype(k.dtype)
        a, c = (rotary(jnp.broadcast_to(self.bias[i].astype(q.dtype), q.shape), positions) for i in (0, 1))
        # [q, rope(a)] . [k, rope(c)] = q . k + b
        q, k = jnp.concatenate([q, a], -1), jnp.concatenate([k, c], -1)
        y, keys = self.attend(q, k, v, keys, segment_ids, positions)
        h = silu(h + project(r * y[:, :, 0], self.u_h[...]))
        return jax.nn.sigmoid(u) * (h - x), None if state is None else {"ema": ema, "keys": keys}

    def moving_average(self, x, state, segment_ids):
        """silu(EMA(x)) in x's dtype, and the state [B, ema_size, width]."""
        x32 = constrain(x.astype(jnp.float32), "batch", None, "activation")
        p = jax.nn.sigmoid(self.delta[...])
        log_a = jnp.log1p(-p * jax.nn.sigmoid(self.alpha[...]))
        b = p * self.ema_in[...]
        # The primitives read twice the real part of a complex state.
        c = self.ema_out[...] * (0.5 * self.ema_out.shape[-1] ** -0.5)
        complex_pair = lambda real: (real, jnp.zeros_like(real))
        if state is None and segment_ids is None:
            kernels = [
                vandermonde_kernel(complex_pair(log_a[i]), complex_pair(b[i] * c[i]), x.shape[1]) for i in range(len(c))
            ]
            future = None if self.causal else kernels[1]
            # The primitive takes the token itself from the first kernel only.
            own = self.omega[...] if self.causal else self.omega[...] + future[:, 0]
            y = long_convolution(x32, kernels[0], bidirectional_kernel=future, skip=own)
            return silu(y).astype(x.dtype), None

        def scan(i, x32, state=None):
            system = (complex_pair(value[i]) for value in (jnp.exp(log_a), b, c))
            y, (h, _) = state_space_scan(x32, *system, initial_state=state, segment_ids=segment_ids)
            return y, h

        y, state = scan(0, x32, None if state is None else complex_pair(state))
        if not self.causal:
            y = y + segments.reverse(scan(1, segments.reverse(x32, segment_ids))[0], segment_ids)
        return silu(y + self.omega[...] * x32).astype(x.dtype), state

    def attend(self, q, k, v, state, segment_ids, positions):
        """A v, over the sequence or inside chunks, and the keys and values that later tokens see."""
        form = {"activation": self.activation, "scale": 1.0, "segment_ids": segment_ids}
        if self.chunk is not None:
            form |= {"size": self.chunk, "positions": positions, "causal": self.causal}
            return block_attention(q, k, v, **form, initial_state=state)
        if state is None:
            return attention(q, k, v, **form, causal=self.causal), None
        offset = state["length"]
        state = extend(state, {"key": k, "value": v, "segment": segment_ids})
        k, v = held(state, "key", k.dtype), held(state, "value", v.dtype)
        return attention(q, k, v, **form, key_segment_ids=state["segment"], query_offset=offset), state

    def count(self, segment_ids, positions):
        """Number of keys that each row sees."""
        if self.causal:
            return 1 + (positions if self.chunk is None else positions % self.chunk)
        ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
        if self.chunk is not None:
            ids = block_ids(ids, positions, self.chunk)
        return segments.lengths(ids)

    def initial_state(self, batch: int, capacity: int) -> dict:
        width, key_size, hidden = self.sizes
        if self.chunk is None:
            keys = buffers(batch, capacity, key=(1, 2 * key_size), value=(1, hidden))
        else:
            keys = empty_block(batch, self.chunk, (1, 2 * key_size), (1, hidden))
        return {"ema": jnp.zeros((batch, self.delta.shape[-1], width), jnp.float32), "keys": keys}

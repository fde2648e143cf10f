"""LaCT: test-time training in large chunks, beside a sliding window of attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, check_rotated, head_size, positive, scaled
from models.mixer import Ids, Mixer, Tokens
from models.norms import RMSNorm, l2_normalize
from models.params import constant, dense, inverse_softplus, normal, ones, param, residual_output, time_scale, zeros
from models.partitioning import constrain
from ops.attention import attention
from ops.chunks import matmul
from ops.elementwise import silu, silu_gate
from ops.large_chunk_ttt import FastWeights, empty_state, large_chunk_ttt
from ops.projection import project, project_each
from ops.rotary import rotary


class LaCT(Mixer):
    """y = W_o (window attention(q, k, v) + silu(W_s x) * norm(f(q~; W))), f(x; W) = (silu(x W_0) * (x W_2)) W_1
    (arXiv 2505.23884, the layer for language models).

    The weights W of the network f are trained to map k~ to v~ while the sequence is read: at the end of each chunk they take one
    step along sum_j rate_j d (f(k~_j; W) . v~_j) / dW, with momentum and made orthogonal as by Muon, and each column gets back
    its norm. f is read with the weights at the start of the chunk; what is nearer, the window sees. See `ops.large_chunk_ttt`.

    q, k, v = W x are shared by both. q~ and k~ = l2norm(silu(a * q + b)) with a and b of each channel, per head of f, then turned
    like the queries and keys of the attention; v~ = silu(v). rate = softplus(W_r x + b_r), which starts at 0.001, one for each
    head and matrix; the momentum is the mean over the chunk of sigmoid(W_m x + b_m). W_0 and W_2 begin as products of rank
    `rank` plus I / 2, W_1 as N(0, 1/fan-in); W_r, W_m and W_s as N(0, 0.02^2).

    Departures from the authors' code: chunks count from the start of a document, and the last one trains what follows it when a
    sequence goes on. Newton-Schulz steps are float32 (bfloat16 there). The l2 norm adds 1e-10 to the square (1e-5 to the norm).
    Their chunks and windows have 2048 tokens.

    Args:
      heads: of the attention.
      memory_heads: of f.
      expand: hidden channels of f over the channels of its heads.
      chunk: tokens between two steps of f.
      window: tokens that the attention sees.
      rank: of what W_0 and W_2 begin with; None for N(0, 1/fan-in).
      momentum: whether a step goes on with a share of the last one.
      orthogonal: whether steps are made orthogonal. Rounding errors of a step then come out some hundred times as large, so that
        a sequence that is read in pieces agrees to 1e-4 with the whole one, where all else here agrees to 1e-5.
      qk_norm: whether queries and keys are normalised over the whole width.
      rotary_base: base of the rotary frequencies.
    """

    paper = "LaCT, arXiv 2505.23884"
    primitive = "large_chunk_ttt"
    sequence_parallel = ()  # its memory is updated piece by piece
    complexity = "T (window + chunk)"
    # Orthogonal steps are left out where outputs are compared to rounding, which they make some hundred times as large.
    tiny = {"memory_heads": 2, "chunk": 5, "window": 3, "rank": 3, "qk_norm": True, "orthogonal": False}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        depth: int = 1,
        heads: int = 4,
        memory_heads: int = 4,
        expand: float = 1.0,
        chunk: int = 128,
        window: int = 128,
        rank: int | None = 32,
        momentum: bool = True,
        orthogonal: bool = True,
        qk_norm: bool = False,
        rotary_base: float = 1e6,
    ):
        at_least(1, chunk=chunk, window=window, rank=rank)
        positive(rotary_base=rotary_base, expand=expand)
        size = head_size(width, heads, "width")
        check_rotated(size)
        memory = head_size(width, memory_heads, "width", "memory_heads")
        hidden = scaled(memory, expand=expand)
        self.heads, self.memory_heads, self.chunk, self.window = heads, memory_heads, chunk, window
        self.orthogonal, self.rotary_base = orthogonal, rotary_base
        self.w_qkv = dense(rngs, (width, 3, width), ("embed", None, "heads"))
        self.q_norm = RMSNorm(width, rngs=rngs, axis="heads") if qk_norm else None
        self.k_norm = RMSNorm(width, rngs=rngs, axis="heads") if qk_norm else None
        self.qk_scale = param(rngs, ones, (2, width), (None, "heads"), decay=False, keep_float32=True)
        self.qk_offset = param(rngs, zeros, (2, width), (None, "heads"), decay=False, keep_float32=True)
        axes = ("heads", None, None)
        if rank is None:
            whole = lambda: param(rngs, normal(memory**-0.5), (memory_heads, memory, hidden), axes)
            self.w_0, self.w_2 = whole(), whole()
        else:
            down = lambda: param(rngs, normal(0.5 * memory**-0.5), (memory_heads, memory, rank), axes, inputs=(2,))
            up = lambda: param(rngs, normal(0.5 * rank**-0.5), (memory_heads, rank, hidden), axes, inputs=(1,))
            self.w_0, self.w_2, self.up_0, self.up_2 = down(), down(), up(), up()
        self.rank = rank
        self.w_1 = param(rngs, normal(hidden**-0.5), (memory_heads, hidden, memory), axes)
        # The authors', at the width that a wider model is scaled from.
        small = normal(0.02 * (base_width / width) ** 0.5)
        self.w_rate = param(rngs, small, (width, memory_heads, 3), ("embed", "heads", None))
        self.b_rate = time_scale(rngs, inverse_softplus(constant(0.001)), (memory_heads, 3), ("heads", None))
        self.w_momentum = param(rngs, small, (width, memory_heads), ("embed", "heads")) if momentum else None
        self.b_momentum = time_scale(rngs, zeros, (memory_heads,), ("heads",)) if momentum else None
        self.norm = RMSNorm(memory, rngs=rngs)
        self.w_s = param(rngs, small, (width, memory_heads), ("embed", "heads"))
        self.b_s = param(rngs, zeros, (memory_heads,), ("heads",), decay=False)
        self.w_o = residual_output(rngs, (width, width), ("heads", "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        q, k, v = (constrain(a, "batch", "length", "heads") for a in project_each(x, self.w_qkv[...]))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        split = lambda a, heads: a.reshape(*a.shape[:2], heads, -1)
        turned = lambda a: rotary(split(a, self.heads), positions, base=self.rotary_base)

        def view(i, a):
            a = silu((self.qk_scale[i] * a + self.qk_offset[i]).astype(x.dtype))
            a = l2_normalize(split(a, self.memory_heads), eps=1e-10)
            return split(turned(a), self.memory_heads)

        rates = jax.nn.softplus(project(x, self.w_rate[...]).astype(jnp.float32) + self.b_rate[...])
        momentum = jnp.zeros(rates.shape[:3])
        if self.w_momentum is not None:
            momentum = jax.nn.sigmoid(project(x, self.w_momentum[...]).astype(jnp.float32) + self.b_momentum[...])
        o, memory = large_chunk_ttt(
            view(0, q),
            view(1, k),
            silu(split(v, self.memory_heads)),
            rates,
            momentum,
            self.first(),
            chunk_size=self.chunk,
            orthogonal=self.orthogonal,
            positions=None if state is None else positions,
            initial_state=None if state is None else state["memory"],
            segment_ids=segment_ids,
        )
        share = project(x, self.w_s[...]) + self.b_s[...]
        o = silu_gate(share[..., None], self.norm(o)).reshape(x.shape)
        y, new = self.near(turned(q), turned(k), split(v, self.heads), state, segment_ids)
        return project(y.reshape(x.shape) + o, self.w_o[...]), new | {"memory": memory}

    def near(self, q, k, v, state, segment_ids):
        """Attention to the window, and the keys and values that the next piece still sees."""
        piece = {"key": k, "value": v, "segment": segment_ids}
        if state is not None:
            piece = {name: jnp.concatenate([state[name].astype(a.dtype), a], 1) for name, a in piece.items()}
        y = attention(
            q,
            piece["key"],
            piece["value"],
            window=self.window,
            segment_ids=segment_ids,
            key_segment_ids=piece["segment"],
            query_offset=piece["key"].shape[1] - q.shape[1],
        )
        if state is None:
            return y, {}
        return y, {name: a[:, a.shape[1] - (self.window - 1) :] for name, a in piece.items()}

    def first(self) -> FastWeights:
        """W before the first token."""
        w_0, w_1, w_2 = (w[...].astype(jnp.float32) for w in (self.w_0, self.w_1, self.w_2))
        if self.rank is not None:
            w_0, w_2 = (matmul(w, up[...].astype(jnp.float32)) for w, up in ((w_0, self.up_0), (w_2, self.up_2)))
            half = 0.5 * jnp.eye(*w_0.shape[1:])
            w_0, w_2 = w_0 + half, w_2 + half
        return FastWeights(w_0, w_1, w_2)

    def initial_state(self, batch: int, capacity: int) -> dict:
        near = (batch, self.window - 1, self.heads, self.w_o.shape[0] // self.heads)
        return {
            "key": jnp.zeros(near, jnp.float32),
            "value": jnp.zeros(near, jnp.float32),
            "segment": jnp.zeros(near[:2], jnp.int32),
            "memory": empty_state(self.first(), batch),
        }

"""FLASH: mixed chunk attention."""

import jax.numpy as jnp
from flax import nnx

from models.checks import at_least, even, scaled
from models.kernel_attention import two_sided
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, normal, param, zeros
from models.partitioning import constrain
from ops.block_attention import block_attention, block_ids, empty_block
from ops.dispatch import matmul_precision
from ops.elementwise import silu
from ops.linear_attention import linear_attention
from ops.projection import project
from ops.rotary import rotary


class Flash(Mixer):
    """o = W_o (u * (v_quad + v_lin)) (Transformer Quality in Linear Time, arXiv 2202.10447, section 4), in chunks of C tokens:

    v_quad_i = sum_j relu(q_i . k_j / C + b_ij)^2 v_j over the chunk of i (j <= i if causal),
    v_lin_i = (1 / C) sum_j (q'_i . k'_j) v_j over all chunks before that of i, or over the whole sequence if two-sided.

    u = silu(W_u x) and v = silu(W_v x) have `expansion` times the width; q, k, q' and k' are four scaled and shifted copies of
    the shared z = silu(W_z x), rotated by the position in the sequence; there is one head and no denominator. The bias is
    b_ij = rope(a)_i . rope(c)_j with learned a and c, as in `gau`.

    The 1 / C of v_lin, a constant, is that of the port in OpenNLPLab's fairseq-evo, in both forms; FLASH-pytorch agrees when
    causal and divides by the sequence's length when two-sided. The sum grows with the number of chunks, so that what is
    read far beyond the training length is larger than what was trained on. FLASH-pytorch's token shift is not the paper's.

    Args:
      chunk: C.
      expansion: size of u and v over the width.
      key_size: size of z.
    """

    bidirectional = True
    replaces_channel_mixer = True
    paper = "FLASH, arXiv 2202.10447"
    primitive = "linear_attention"
    sequence_parallel = ()  # blocks are cut along the length
    complexity = "T chunk"
    tiny = {"chunk": 11, "key_size": 16}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        chunk: int = 256,
        expansion: float = 2.0,
        key_size: int = 128,
    ):
        at_least(1, chunk=chunk)
        even(key_size=key_size)
        hidden = scaled(width, expansion=expansion)
        self.causal = causal
        self.chunk = chunk
        self.sizes = (key_size, hidden)
        self.w_u = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_v = dense(rngs, (width, hidden), ("embed", "mlp"))
        self.w_z = dense(rngs, (width, key_size), ("embed", None))
        self.w_o = dense(rngs, (hidden, width), ("mlp", "embed"))
        # In the order q, k, q', k'.
        self.gamma = param(rngs, normal(0.02), (4, key_size), (None, None), decay=False)
        self.beta = param(rngs, zeros, (4, key_size), (None, None), decay=False)
        self.bias = param(rngs, normal(0.02), (2, key_size), (None, None), decay=False)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        u = constrain(silu(project(x, self.w_u[...])), "batch", "length", "mlp")
        v = constrain(silu(project(x, self.w_v[...])), "batch", "length", "mlp")[:, :, None]
        z = silu(project(x, self.w_z[...]))
        # Heads of one [B, T, 6, key_size]: the four copies of z, then a and c of the bias.
        copies = z[:, :, None] * self.gamma[...] + self.beta[...]
        bias = jnp.broadcast_to(self.bias[...].astype(z.dtype), (*z.shape[:2], *self.bias.shape))
        q, k, q_lin, k_lin, a, c = jnp.split(rotary(jnp.concatenate([copies, bias], 2), positions), 6, axis=2)
        # [q / C, rope(a)] . [k, rope(c)] = q . k / C + b
        quadratic, near = block_attention(
            jnp.concatenate([q / self.chunk, a], -1),
            jnp.concatenate([k, c], -1),
            v,
            size=self.chunk,
            positions=positions,
            segment_ids=segment_ids,
            causal=self.causal,
            activation="relu2",
            scale=1.0,
            initial_state=None if state is None else state["near"],
        )
        q_lin, k_lin, v = (array.astype(jnp.float32) for array in (q_lin, k_lin, v))
        far = None
        if not self.causal:
            linear = two_sided(q_lin, k_lin, v, segment_ids)
        elif state is None and segment_ids is None:
            linear = earlier_chunks(q_lin, k_lin, v, self.chunk)
        else:
            # All tokens before, less those of the same chunk.
            whole, chunk = None, None
            if state is not None:
                opens = (positions[:, 0] % self.chunk == 0)[:, None, None, None]
                whole, chunk = state["whole"], jnp.where(opens, 0, state["chunk"])
            blocks = block_ids(segment_ids, positions, self.chunk)
            linear, whole = linear_attention(q_lin, k_lin, v, initial_state=whole, segment_ids=segment_ids)
            own, chunk = linear_attention(q_lin, k_lin, v, initial_state=chunk, segment_ids=blocks)
            linear = linear - own
            far = {"whole": whole, "chunk": chunk}
        y = (quadratic + linear / self.chunk)[:, :, 0].astype(x.dtype)
        return project(u * y, self.w_o[...]), None if state is None else {"near": near, **far}

    def initial_state(self, batch: int, capacity: int) -> dict:
        key, hidden = self.sizes
        zeros = jnp.zeros((batch, 1, key, hidden), jnp.float32)
        near = empty_block(batch, self.chunk, (1, 2 * key), (1, hidden))
        return {"near": near, "whole": zeros, "chunk": zeros}


def earlier_chunks(q, k, v, chunk: int):
    """sum_j (q_i . k_j) v_j over the chunks before i's of an unpacked sequence; arrays [B, T, 1, channels]."""
    length = q.shape[1]
    pad = lambda a: jnp.pad(a[:, :, 0], ((0, 0), (0, -length % chunk), (0, 0)))
    q, k, v = (pad(a).reshape(a.shape[0], -1, chunk, a.shape[-1]) for a in (q, k, v))
    precision = matmul_precision(jnp.float32)
    sums = jnp.einsum("bgjk,bgjv->bgkv", k[:, :-1], v[:, :-1], precision=precision)
    sums = jnp.pad(jnp.cumsum(sums, 1), ((0, 0), (1, 0), (0, 0), (0, 0)))
    y = jnp.einsum("bgik,bgkv->bgiv", q, sums, precision=precision)
    return y.reshape(y.shape[0], -1, 1, y.shape[-1])[:, :length]

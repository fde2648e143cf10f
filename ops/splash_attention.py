"""A TPU kernel of softmax attention: JAX's splash attention, with the laws of `ops.attention`.

Blocks of scores stay in a core's own memory, forwards and backwards (FlashAttention-2, arXiv 2307.08691); blocks in which the
causal mask or the window hide everything are not visited. The kernel is JAX's (`jax.experimental.pallas.ops.tpu`); this file
says what it is given. Elsewhere than on a TPU it is interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float, Int

from ops import dispatch, kept, sequence
from ops.attention_blocks import Form, Inputs

LANES = 128  # of a vector register: rows and columns of a block are multiples
BLOCK = 512  # rows and columns of a block at the most


def takes(form: Form, x: Inputs) -> bool:
    """Whether the kernel computes this call: softmax over a sequence's own tokens, by what is seen and no other bias.

    Every query must see a key, as its own: the kernel does not know of queries that see none.
    """
    plain = form.activation == "softmax" and form.mask is None and x.slopes is None and x.decay is None
    itself = x.q.shape[1] == x.k.shape[1] > 0 and x.segment_ids is x.key_segment_ids
    types = x.q.dtype == x.k.dtype == x.v.dtype and x.q.dtype in (jnp.bfloat16, jnp.float32)
    return plain and itself and types and not sequence.is_split(x.q.shape[1])


def over_heads(form: Form, x: Inputs, block_size: int | None) -> Float[Array, "B T H V"]:
    """`ops.attention_blocks.blockwise` with a query_offset of 0, by the kernel; batch and heads may be split over a mesh.

    Args:
      form, x: what `takes`.
      block_size: at most so many rows and columns of a block, rounded up to `LANES`; at most `BLOCK` if None.
    """
    (B, T, H, K), (G, V) = x.q.shape, x.v.shape[2:]
    most = -(-(block_size or BLOCK) // LANES) * LANES
    size = -(-T // (LANES * -(-T // most))) * LANES  # the shortest that covers T in as many blocks
    excess = -T % size
    ids = x.segment_ids
    if ids is None and excess and not form.causal:  # which hides what is behind the end
        ids = jnp.ones((B, T), jnp.int32)

    def padded(a):
        return jnp.pad(a, ((0, 0), (0, excess)) + ((0, 0),) * (a.ndim - 2))

    # The kernel knows no scale. In bfloat16 this rounds the queries once more, unless it is a power of two.
    q = padded(x.q * jnp.asarray(form.scale, x.q.dtype)).reshape(B, -1, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k, v = (padded(a).transpose(0, 2, 1, 3) for a in (x.k, x.v))
    tokens, keys = ("batch", "kv_heads", "heads", None, None), ("batch", "kv_heads", None, None)
    run = functools.partial(_local, form=form, size=size, interpret=dispatch.current_platform() != "tpu")
    ids = () if ids is None else (padded(ids),)
    attend = dispatch.local(run, [tokens, keys, keys, *(("batch", None) for _ in ids)], tokens, kernel=True)
    y = _exactly(attend, q, k, v, ids)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, -1, H, V)[:, :T]


def _local(
    q: Float[Array, "B G R T K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B G T V"],
    ids: Int[Array, "B T"] | None = None,
    *,
    form: Form,
    size: int,
    interpret: bool,
) -> Float[Array, "B G R T V"]:
    B, G, R, T, _ = q.shape
    if form.window is not None:
        reach = (form.window - 1, 0) if form.causal else (form.window // 2, form.window // 2)
        seen = splash_attention_mask.LocalMask((T, T), reach, 0)
    else:
        seen = (splash_attention_mask.CausalMask if form.causal else splash_attention_mask.FullMask)((T, T))
    of_passes = ("", "_dkv", "_dq")
    blocks = {f"block_{side}{suffix}": size for side in ("q", "kv") for suffix in of_passes}
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([seen]),  # one for all heads
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        attn_logits_soft_cap=form.cap,
        interpret=interpret,
        residual_checkpoint_name=kept.NAME,
    )
    segments = None if ids is None else splash_attention_kernel.SegmentIds(ids, ids)
    y = jax.vmap(kernel)(q.reshape(B, G * R, T, -1), k, v, segments)
    return y.reshape(B, G, R, T, -1)


# The kernel leaves the precision of its products to the context that it is traced in, and its backward pass is traced later.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exactly(attend, q, k, v, ids):
    with _precision(q):
        return attend(q, k, v, *ids)


def _exactly_forward(attend, q, k, v, ids):
    with _precision(q):
        return jax.vjp(lambda q, k, v: attend(q, k, v, *ids), q, k, v)


def _exactly_backward(attend, pull_back, dy):
    with _precision(dy):
        return *pull_back(dy), None


_exactly.defvjp(_exactly_forward, _exactly_backward)


def _precision(x):
    return jax.default_matmul_precision(dispatch.matmul_precision(x.dtype).name.lower())

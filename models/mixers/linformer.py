"""Linformer: attention to a fixed number of mixtures of the keys."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError, check_choice
from models.checks import at_least, head_size
from models.kernel_attention import two_sided
from models.mixer import Context, Ids, Mixer, Tokens
from models.params import dense, normal, param, residual_output
from models.partitioning import constrain
from ops.attention import attention
from ops.projection import project, project_blocks, project_each

SHARING = ("none", "headwise", "kv", "layerwise")


class SharedProjection(nnx.Module):
    """E of all layers, where they share it."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, length: int = 512, rank: int = 128, sharing: str = "headwise"):
        at_least(1, rank=rank)
        shape, axes = (1, 1, length, rank), (None, None, None, None)
        self.e = param(rngs, normal(length**-0.5), shape, axes) if sharing == "layerwise" else None

    def __call__(self, x: Tokens, *, segment_ids: Ids | None, positions: Ids):
        return () if self.e is None else self.e[...].astype(x.dtype)


class Linformer(Mixer):
    """y = softmax(q (E k)^T / sqrt(K)) (F v) (arXiv 2006.04768, section 4): E and F turn T keys and values into `rank`.

    Columns of E and F belong to positions: a document of less than `length` tokens uses the first ones. Keys at padding
    are zero before the projection (the port of the Long Range Arena lets them in).

    In rows with segments the sums E k and F v are those of each token's own document. They are never formed: the scores
    sum_j (q_i . k_j) E_j and the outputs sum_j (p_i . F_j) v_j are two linear attentions, of linear time as well.

    E starts as N(0, 1/T); public code has a `Linear`'s ±T^-0.5 or ±k^-0.5, 0.577 of that deviation where k is T.

    Args:
      heads: number of heads.
      rank: keys and values after the projection.
      sharing: "none" (E and F for each head), "headwise" (one E and one F), "kv" (one E = F) or "layerwise" (one E = F for
        all layers).
    """

    causal = False
    bidirectional = True
    streaming = False
    fixed_length = True
    position_aware = False
    uses_context = True
    Shared: ClassVar[type[nnx.Module]] = SharedProjection
    paper = "Linformer, arXiv 2006.04768"
    primitive = "attention"
    sequence_parallel = ()  # keys are projected along the length
    complexity = "T rank"
    tiny = {"rank": 5, "sharing": "none"}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        length: int = 512,
        heads: int = 4,
        rank: int = 128,
        sharing: str = "headwise",
    ):
        size = head_size(width, heads, "width")
        check_choice("sharing", sharing, SHARING)
        at_least(1, rank=rank)
        self.length = length
        self.heads = heads
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)
        # E and F for each head, or a single one where they are shared.
        shape = (1 if sharing == "kv" else 2, heads if sharing == "none" else 1, length, rank)
        axes = (None, "heads" if sharing == "none" else None, None, None)
        self.e = None if sharing == "layerwise" else param(rngs, normal(length**-0.5), shape, axes)

    def mix(
        self, x: Tokens, state: None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, None, Any]:
        if x.shape[1] > self.length:
            raise UserError(
                f"linformer was built for length {self.length}, got {x.shape[1]}; build the model for a greater one"
            )
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        e = context.stream if self.e is None else self.e[...].astype(x.dtype)
        e = jnp.moveaxis(jnp.broadcast_to(e, (2, self.heads, *e.shape[2:])), 1, 2)
        if segment_ids is None:
            turn = lambda a: jnp.transpose(a, (0, 3, 2, 1))  # tokens last, and back
            e, f = jnp.swapaxes(e[:, : x.shape[1]], 1, 2)
            keys, values = (turn(project_blocks(turn(a), w)) for a, w in ((k, e), (v, f)))
            y = attention(q, keys, values, causal=False)
        else:
            q, k, v, e = (a.astype(jnp.float32) for a in (q, k, v, e))
            e, f = e[:, positions]
            p = jax.nn.softmax(two_sided(q * q.shape[-1] ** -0.5, k, e, segment_ids), -1)
            y = two_sided(p, f, v, segment_ids).astype(x.dtype)
        return project(y, self.w_o[...], inputs=2), state, context.stream

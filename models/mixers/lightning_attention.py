"""Lightning attention: linear attention whose decay is a constant of the head and the layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import check_choice
from models.checks import at_least, head_size
from models.mixer import Context, Ids, MatrixState, Mixer, Tokens
from models.norms import RMSNorm, rms_normalize
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.elementwise import silu
from ops.linear_attention import linear_attention
from ops.projection import project, project_each


class LightningAttention(Mixer):
    """S_t = lambda S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, y = W_o (gate * norm(o)) (arXiv 2307.14995, equations 5 to 7; its
    chunked form is Lightning Attention-2, arXiv 2401.04658).

    lambda = exp(-2^(-8h/H) (1 - l / (L - 1) + 1e-5)) for head h = 1..H of layer l = 0..L-1, so that deep layers remember
    longer; no other position signal, no denominator and no 1/sqrt(K). The norm is over all heads together. l and L count the
    layers of this mixer, or all layers of the model, as MiniMax-01 does with its softmax attention.

    `form="minimax"` (MiniMax-01, arXiv 2501.08313): q, k and v are silu(W x), gate = sigmoid(W_g x), and the norm has a weight.
    `form="transnormer"` (TransNormerLLM, arXiv 2307.14995): v and gate are linear, the norm has none. TransNormerLLM also rotates
    the queries and keys of its first layer (LRPE), which is left out, as MiniMax-01 does.

    Args:
      heads: number of heads.
      head_channels: channels of a head; by default width / heads.
      form: "minimax" or "transnormer", as above.
      counted: the layers that l and L count: "own", of this mixer, or "all".
    """

    uses_context = True
    paper = "Lightning Attention (TransNormerLLM), arXiv 2307.14995"
    primitive = "linear_attention"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        layers: int = 1,
        all_layers: int = 1,
        heads: int = 4,
        head_channels: int | None = None,
        form: str = "minimax",
        counted: str = "own",
    ):
        check_choice("counted", counted, ("own", "all"))
        check_choice("form", form, ("minimax", "transnormer"))
        at_least(1, heads=heads, head_channels=head_channels)
        size = head_size(width, heads, "width") if head_channels is None else head_channels
        self.head_channels = size
        inner = heads * size
        self.counts_all = counted == "all"
        self.layers = all_layers if self.counts_all else layers
        self.sizes = (heads, size, size)
        self.w_qkv = dense(rngs, (width, 3, heads, size), ("embed", None, "heads", None))
        self.w_g = dense(rngs, (width, inner), ("embed", "heads"))
        self.norm = RMSNorm(inner, rngs=rngs, axis="heads") if form == "minimax" else None
        self.w_o = residual_output(rngs, (inner, width), ("heads", "embed"), depth)

    def mix(
        self, x: Tokens, state: MatrixState | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, MatrixState | None, Any]:
        heads = self.sizes[0]
        slope = jnp.asarray(2.0 ** (-8 * np.arange(1, heads + 1) / heads), jnp.float32)
        layer = context.block if self.counts_all else context.layer
        log_decay = -slope * (1 - layer / (self.layers - 1 + 1e-5) + 1e-5)
        q, k, v = (constrain(a, "batch", "length", "heads", None) for a in project_each(x, self.w_qkv[...]))
        gate = constrain(project(x, self.w_g[...]), "batch", "length", "heads")
        q, k = silu(q), silu(k)
        if self.norm is not None:
            v, gate = silu(v), jax.nn.sigmoid(gate)
        o, state = linear_attention(q, k, v, log_decay, initial_state=state, segment_ids=segment_ids)
        o = o.reshape(gate.shape)
        o = rms_normalize(o) if self.norm is None else self.norm(o)
        return project(gate * o, self.w_o[...]), state, context.stream

    def initial_state(self, batch: int, capacity: int) -> MatrixState:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

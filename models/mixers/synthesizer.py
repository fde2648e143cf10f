"""Synthesizer: attention whose weights are not, or not only, products of queries and keys."""

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size
from models.kv_cache import buffers, extend, held
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, normal, param, residual_output, zeros
from models.partitioning import constrain
from ops import segments
from ops.attention import attention
from ops.products import factor_dtype, product
from ops.projection import project

TERMS = ("dense", "random", "factorized_random", "dot_product")


class Synthesizer(Mixer):
    """y_i = sum_j softmax_j(L_ij) v_j with synthetic logits L (arXiv 2005.00743, section 3), a sum of some of

    dense:              L_ij = (W_2 relu(W_1 x_i + b_1) + b_2)_j, a row for each token from that token alone;
    random:             L = R, a learned matrix;
    factorized_random:  L = R_1 R_2^T, of rank `rank`;
    dot_product:        L_ij = q_i . k_j / sqrt(K), ordinary attention.

    Every head has its own L. Indices are positions inside a document, so that everything is tied to a greatest length;
    a stream that runs beyond it turns NaN. All terms but "random" are products of something at i and something at j,
    so they make one attention over concatenated channels and never a [T, T] matrix in memory.

    The paper weighs the terms of a mixture by learned numbers that sum to 1; the authors' code, and this one, add them.
    R has the scale of the authors' code, a dense layer's and not N(0, 1).

    Args:
      logits: terms, joined by "+".
      heads: number of heads.
      rank: of "factorized_random".
      trained: False leaves R, or R_1 and R_2, as they are drawn.
    """

    bidirectional = True
    constant_carry = False
    fixed_length = True
    paper = "Synthesizer, arXiv 2005.00743"
    primitive = "attention"
    sequence_parallel = ()  # scores are a table of the whole length
    complexity = "T^2"
    tiny = {"logits": "dense+factorized_random+dot_product", "rank": 4}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        causal: bool = True,
        depth: int = 1,
        length: int = 512,
        logits: str = "factorized_random",
        heads: int = 4,
        rank: int = 32,
        trained: bool = True,
    ):
        size = head_size(width, heads, "width")
        self.terms = tuple(logits.split("+"))
        self.position_aware = self.terms != ("dot_product",)
        if len(set(self.terms)) < len(self.terms) or not set(self.terms) <= set(TERMS):
            raise UserError(f"`logits` must be a sum like 'dense+random' of {TERMS}, got {logits!r}")
        at_least(1, rank=rank)
        self.causal = causal
        self.length = length
        self.heads = heads
        self.size = size
        self.trained = trained
        table = lambda std, shape: param(
            rngs, normal(std), shape, ("heads", None, None), decay=False, group="default" if trained else "fixed"
        )
        if "dense" in self.terms:
            self.w_1 = dense(rngs, (width, heads, size), ("embed", "heads", None))
            self.b_1 = param(rngs, zeros, (heads, size), ("heads", None), decay=False)
            self.w_2 = param(rngs, normal(size**-0.5), (heads, length, size), ("heads", None, None))
            self.b_2 = param(rngs, zeros, (heads, length), ("heads", None), decay=False)
        # A table is as large in a model that is scaled from one with fewer heads of the same size.
        base_heads = heads * base_width / width
        if "random" in self.terms:
            self.r = table((base_heads * length) ** -0.5, (heads, length, length))
        if "factorized_random" in self.terms:
            self.r_1 = table((base_heads * length) ** -0.5, (heads, length, rank))
            self.r_2 = table((base_heads * rank) ** -0.5, (heads, length, rank))
        if "dot_product" in self.terms:
            self.w_q = dense(rngs, (width, heads, size), ("embed", "heads", None))
            self.w_k = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, dict | None]:
        if x.shape[1] > self.length:
            raise UserError(
                f"synthesizer was built for length {self.length}, got {x.shape[1]}; build the model for a greater one"
            )
        to_heads = lambda w: constrain(project(x, w[...]), "batch", "length", "heads", None)
        new = {"value": to_heads(self.w_v), "position": segments.zero_padding(positions, segment_ids)}
        if "dot_product" in self.terms:
            new["key"] = to_heads(self.w_k)
        keys, offset, key_segments = new, 0, segment_ids
        if state is not None:
            offset = state["length"]
            state = extend(state, new | {"segment": segment_ids})
            keys, key_segments = {name: held(state, name, new[name].dtype) for name in new}, state["segment"]

        q, k = [], []
        if "dense" in self.terms:
            hidden = jax.nn.relu(to_heads(self.w_1) + self.b_1[...])
            q += [hidden, jnp.ones_like(hidden[..., :1])]
            k += [at(self.w_2[...], keys["position"]), at(self.b_2[...][..., None], keys["position"])]
        if "factorized_random" in self.terms:
            q.append(at(self.table("r_1"), positions))
            k.append(at(self.table("r_2"), keys["position"]))
        if "dot_product" in self.terms:
            q.append(to_heads(self.w_q) * self.size**-0.5)
            k.append(keys["key"])
        v = keys["value"]
        if "random" in self.terms:
            rows = at(self.table("r"), positions)
            columns = jnp.broadcast_to(keys["position"][:, None, None], (*rows.shape[:3], v.shape[1]))
            scores = jnp.take_along_axis(rows, columns, -1).astype(jnp.float32)
            for a, b in zip(q, k, strict=True):
                scores += product("bthk,bshk->bths", a, b, factor_dtype(a, b))
            y = weigh(scores, v, self.causal, segment_ids, key_segments, offset)
        else:
            y = attention(
                jnp.concatenate(q, -1),
                jnp.concatenate(k, -1),
                v,
                scale=1.0,
                causal=self.causal,
                segment_ids=segment_ids,
                key_segment_ids=key_segments,
                query_offset=offset,
            )
        return project(y, self.w_o[...], inputs=2), state

    def table(self, name):
        value = getattr(self, name)[...]
        return value if self.trained else jax.lax.stop_gradient(value)

    def initial_state(self, batch: int, capacity: int) -> dict:
        key = {"key": (self.heads, self.size)} if "dot_product" in self.terms else {}
        return buffers(batch, capacity, value=(self.heads, self.size), position=(), **key)


def at(table, positions):
    """Rows of a table [H, L, C] at positions [B, T], as [B, T, H, C]; NaN beyond the table."""
    return jnp.swapaxes(table, 0, 1).at[positions].get(mode="fill", fill_value=jnp.nan)


def weigh(scores, v, causal, segment_ids, key_segment_ids, query_offset):
    """softmax of scores [B, T, H, S] over the visible keys, times the values [B, S, H, V]."""
    T, S = scores.shape[1], scores.shape[3]
    visible = jnp.ones((1, T, S), bool)
    if causal:
        visible &= jnp.arange(S) <= query_offset + jnp.arange(T)[:, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == key_segment_ids[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -1e30), -1)
    return jnp.einsum("bths,bshk->bthk", weights.astype(v.dtype), v)

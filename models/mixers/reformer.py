"""Reformer: attention among the tokens that locality-sensitive hashing puts together."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.errors import UserError
from models.checks import at_least, head_size
from models.kv_cache import buffers, extend, held
from models.mixer import Context, Ids, Mixer, Tokens
from models.norms import rms_normalize
from models.params import dense, residual_output
from models.partitioning import constrain
from ops import segments
from ops.attention import NOTHING, attention_with_logsumexp, merge
from ops.projection import project


class Reformer(Mixer):
    """y_i = sum_j softmax_j(q_i . k_j) v_j, k_j = q_j / |q_j|, over the keys that share a hash (arXiv 2001.04451, section 2).

    Round r hashes h_r(q) = argmax [q R_r; -q R_r] with a random R_r [K, buckets / 2] of each head. Tokens are sorted by
    (bucket, position), and query i sees the keys of its own bucket that are near it in that order: the `window` nearest
    that are not later, or window / 2 to each side. The softmax is over the union of all rounds' keys (a pair that meets in
    several rounds counts once, the paper's appendix A). A token sees itself only where it sees nothing else.
    Gradients do not flow through the hashes.

    The paper cuts the sorted sequence into chunks and lets each see itself and the one before. Where the cuts fall depends
    on all tokens, later ones too; the window, of about as many keys, depends on earlier ones only, so that the
    mixer is causal to the letter, packs and streams. A stream is masked, over all keys so far.

    In training the rotations R are drawn anew in each call; in evaluation, and in streams, which must remember their
    hashes, they are fixed by the seed and the layer. Positions are an embedding at the model's input.

    Args:
      heads: number of heads.
      rounds: number of hashes.
      buckets: of each hash, an even number (or 1, no hashing); by default four for each `window` of the length that the
        model is built for.
      window: number of keys that are seen in each round.
      seed: of the hashes in evaluation.
    """

    bidirectional = True
    constant_carry = False
    position_aware = False
    uses_context = True
    random = True
    paper = "Reformer, arXiv 2001.04451"
    primitive = "attention"
    sequence_parallel = ()  # keys are sorted along the length
    complexity = "T (log T + window) rounds"
    tiny = {"rounds": 3, "buckets": 2, "window": 9}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        causal: bool = True,
        depth: int = 1,
        length: int = 512,
        heads: int = 4,
        rounds: int = 4,
        buckets: int | None = None,
        window: int = 128,
        seed: int = 0,
    ):
        size = head_size(width, heads, "width")
        at_least(1, rounds=rounds)
        at_least(2, window=window)
        buckets = 2 * max(1, 2 * length // window) if buckets is None else buckets
        if buckets < 1 or (buckets > 1 and buckets % 2):
            raise UserError(f"`buckets` must be an even number, or 1, got {buckets}")
        self.causal = causal
        self.rounds = rounds
        self.buckets = buckets
        self.random = buckets > 1
        self.window = window
        self.seed = seed
        self.sizes = (heads, size)
        self.w_qk = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_v = dense(rngs, (width, heads, size), ("embed", "heads", None))
        self.w_o = residual_output(rngs, (heads, size, width), ("heads", None, "embed"), depth)

    def mix(
        self, x: Tokens, state: dict | None, *, segment_ids: Ids | None, positions: Ids, context: Context
    ) -> tuple[Tokens, dict | None, Any]:
        q, v = (constrain(project(x, w[...]), "batch", "length", "heads", None) for w in (self.w_qk, self.w_v))
        k = rms_normalize(q) * q.shape[-1] ** -0.5
        bucket = self.hashes(q, context.layer, context.key if state is None else None)
        order, rank = self.sort(bucket, segment_ids)
        if state is None:
            y, log = self.sorted(q, k, v, bucket, order, rank, segment_ids)
        else:
            rank += self.before(state, bucket, segment_ids)
            new = {"key": k, "value": v, "bucket": bucket, "rank": rank}
            new = {name: segments.zero_padding(a, segment_ids) for name, a in new.items()} | {"segment": segment_ids}
            offset, state = state["length"], extend(state, new)
            split = lambda a: [(a["bucket"][..., r], a["rank"][..., r]) for r in range(self.rounds)]
            values = held(state, "value", v.dtype)
            v = jax.lax.dynamic_slice_in_dim(values, offset, v.shape[1], axis=1)  # NaN if the buffer is full
            y, log = attention_with_logsumexp(
                q,
                held(state, "key", k.dtype),
                values,
                scale=1.0,
                mask=lambda i, j: functools.reduce(jnp.logical_or, map(self.meet, i, j)),
                query_labels=split(new),
                key_labels=split(state),
                segment_ids=segment_ids,
                key_segment_ids=state["segment"],
                query_offset=offset,
            )
        y = jnp.where((log < 0.1 * NOTHING)[..., None], v, y)
        return project(y, self.w_o[...], inputs=2), state, context.stream

    def hashes(self, q, layer, key):
        """The buckets of the tokens [B, T, H, rounds]; without a key, the fixed ones of the layer."""
        key = jax.random.fold_in(jax.random.key(self.seed), layer) if key is None else key
        rotations = jax.random.normal(key, (*self.sizes, self.rounds, (self.buckets + 1) // 2))
        q = jax.lax.stop_gradient(q).astype(jnp.float32)
        turned = jnp.einsum("bthk,hkrn->bthrn", q, rotations, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmax(jnp.concatenate([turned, -turned], -1)[..., : self.buckets], -1).astype(jnp.int32)

    def sort(self, bucket, segment_ids):
        """The tokens in the order of (document, bucket, position), and the rank of each among those of its bucket."""
        if segment_ids is not None:
            document = jnp.cumsum(segments.is_start(segment_ids), axis=1, dtype=jnp.int32)
            bucket = document[:, :, None, None] * self.buckets + bucket
        order = jnp.argsort(bucket, axis=1, stable=True)
        index = jnp.arange(bucket.shape[1], dtype=jnp.int32)[:, None, None]
        new = jnp.diff(take(bucket, order), axis=1, prepend=-1) != 0
        rank = index - jax.lax.cummax(jnp.where(new, index, 0), axis=1)
        return order, take(rank, jnp.argsort(order, axis=1))

    def meet(self, query, key):
        """Whether a query sees a key, by their (bucket, rank) in one round; ranks give the order of positions."""
        (bucket, rank), (key_bucket, key_rank) = query, key
        distance = rank - key_rank if self.causal else jnp.abs(rank - key_rank)
        reach = self.window if self.causal else self.window // 2 + 1
        return (bucket == key_bucket) & (distance > 0) & (distance < reach)

    def sorted(self, q, k, v, bucket, order, rank, segment_ids):
        """Windows of the sorted sequences, all rounds at once as heads; a pair counts in the first round it meets in."""
        (B, T, H, R), K = order.shape, q.shape[-1]
        flat = lambda a: a.reshape(B, T, H * R, *a.shape[4:])
        q, k, v = (flat(take(a[:, :, :, None], order[..., None])) for a in (q, k, v))
        queries = [(flat(take(bucket, order)), flat(take(rank, order)))]
        keys = list(queries)
        for r in range(R - 1):
            theirs, place = (take(a[..., r : r + 1], order) for a in (bucket, rank))
            earlier = r < jnp.arange(R)  # for the others a bucket that is nobody's
            queries.append((flat(jnp.where(earlier, theirs, -1)), flat(place)))
            keys.append((flat(jnp.where(earlier, theirs, -2)), flat(place)))

        def mask(i, j):
            met = functools.reduce(jnp.logical_or, map(self.meet, i[1:], j[1:]), False)
            return self.meet(i[0], j[0]) & ~jnp.asarray(met)

        options = {"causal": self.causal, "window": self.window, "scale": 1.0, "segment_ids": segment_ids}
        y, log = attention_with_logsumexp(q, k, v, mask=mask, query_labels=queries, key_labels=keys, **options)
        back = jnp.argsort(order, axis=1)
        y, log = take(y.reshape(B, T, H, R, K), back[..., None]), take(log.reshape(B, T, H, R), back)
        return merge([(y[:, :, :, r], log[:, :, :, r]) for r in range(R)])

    def before(self, state, bucket, segment_ids):
        """How many tokens of each token's bucket the stream has seen in the token's document, [B, T, H, rounds]."""
        first = segment_ids[:, :1]
        B, _, H, R = bucket.shape
        b, h, r = (a[:, None] for a in jnp.ogrid[:B, :H, :R])
        counts = jnp.zeros((B, H, R, self.buckets), jnp.int32)
        counts = counts.at[b, h, r, state["bucket"]].add((state["segment"] == first)[:, :, None, None])
        return jnp.where((segment_ids == first)[:, :, None, None], counts[b, h, r, bucket], 0)

    def initial_state(self, batch: int, capacity: int) -> dict:
        state = buffers(batch, capacity, key=self.sizes, value=self.sizes)
        labels = jnp.zeros((batch, capacity, self.sizes[0], self.rounds), jnp.int32)
        return state | {"bucket": labels, "rank": labels}


def take(a, index):
    """The entries of a at the places `index` along the length."""
    return jnp.take_along_axis(a, index, axis=1)

"""The token before: the shift of RWKV (arXiv 2305.13048) and of two-term recurrences."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from ops import segments, sequence


def token_shift(
    x: Num[Array, "B T ..."],
    *,
    initial_state: Num[Array, "B ..."] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Num[Array, "B T ..."], Num[Array, "B ..."]]:
    """Shifts a sequence by one token: y_t = x_{t-1}.

    Args:
      x: inputs, or ids.
      initial_state: the input before the first token, of the first token's segment. Zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.

    Returns:
      y in the dtype of `x`, zero at the first token of a segment and on padding; and the input of the last token, or
      `initial_state` if all is padding.
    """
    if initial_state is None:
        initial_state = jnp.zeros_like(x[:, 0])
    initial_state = initial_state.astype(x.dtype)
    if sequence.is_split(x.shape[1]):
        return _over_shards(x, initial_state, segment_ids)
    x = segments.zero_padding(x, segment_ids)
    y = jnp.concatenate([initial_state[:, None], x[:, :-1]], axis=1)
    if segment_ids is None:
        return y, x[:, -1]
    y = jnp.where(segments.expand(segments.is_start(segment_ids), x.ndim), jnp.zeros((), x.dtype), y)
    return segments.zero_padding(y, segment_ids), segments.unless_empty(x[:, -1], initial_state, segment_ids)


def _over_shards(x, initial_state, segment_ids):
    def shard(x, initial_state, segment_ids):
        before = sequence.halo(segments.zero_padding(x, segment_ids)[:, -1:], 1)[:, 0]
        if segment_ids is not None:
            kept = segments.expand(sequence.continues(segment_ids), before.ndim)
            before = jnp.where(kept, before, jnp.zeros((), x.dtype))
        before = jnp.where(sequence.is_first(), initial_state, before)
        y, final = token_shift(x, initial_state=before, segment_ids=segment_ids)
        return y, sequence.of_last(final)

    tokens, state = ("batch", "length", *(None,) * (x.ndim - 2)), ("batch", *(None,) * (x.ndim - 2))
    y, final = sequence.apply(
        shard,
        {"x": x, "initial_state": initial_state, "segment_ids": segment_ids},
        {"x": tokens, "initial_state": state, "segment_ids": ("batch", "length")},
        [(tokens, x.shape), (state, initial_state.shape)],
    )
    return y, segments.unless_empty(final, initial_state, segment_ids)

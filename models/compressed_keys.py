"""What the two compressed attentions of DeepSeek-V4 share: one key, which is its value too, of tokens and of blocks of tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from common.errors import UserError
from models.mixer import Ids
from ops.attention import attention_with_logsumexp
from ops.rotary import rotary


def check_rotated_last(rotary_channels: int, size: int, what: str = "a head", key: str = "rotary_channels") -> None:
    """Raises a UserError where the last `rotary_channels` of `size` channels cannot be rotated in pairs."""
    if not 2 <= rotary_channels <= size or rotary_channels % 2:
        raise UserError(f"`{key}` must be even and from 2 to the {size} of {what}, got {rotary_channels}")


def turned(
    a: Float[Array, "B T H C"], positions: Int[Array, "B T"], channels: int, base: float
) -> Float[Array, "B T H C"]:
    """a with its last `channels` rotated, in neighbouring pairs."""
    rest, last = jnp.split(a, [a.shape[-1] - channels], axis=-1)
    return jnp.concatenate([rest, rotary(last, positions, base=base, layout="interleaved")], axis=-1)


def weighted(
    value: Float[Array, "B M S C"], gate: Float[Array, "B M S C"], seen: Array | None = None
) -> Float[Array, "B M C"]:
    """sum_j softmax_j(gate_j) value_j over the S tokens of each block, channel by channel, in float32.

    Args:
      value, gate: of the tokens of M blocks.
      seen: which of them count, broadcast to these shapes; by default all.
    """
    gate = gate.astype(jnp.float32)
    weights = jax.nn.softmax(gate if seen is None else jnp.where(seen, gate, -jnp.inf), axis=2)
    return jnp.sum(weights * value, axis=2)


def empty_window(batch: int, window: int, size: int) -> dict[str, Array]:
    """The carry of `over_window` before the first token."""
    return {
        "key": jnp.zeros((batch, window - 1, 1, size), jnp.float32),
        "segment": jnp.zeros((batch, window - 1), jnp.int32),
    }


def over_window(
    q: Float[Array, "B T H C"],
    key: Float[Array, "B T 1 C"],
    state: dict[str, Array] | None,
    *,
    window: int,
    segment_ids: Ids | None,
) -> tuple[tuple[Float[Array, "B T H C"], Float[Array, "B T H"]], dict[str, Array] | None]:
    """Attention to the last `window` keys, the query's own included, with its normaliser, and the carry after the piece."""
    near = {"key": key, "segment": segment_ids}
    if state is not None:
        near = {name: jnp.concatenate([state[name].astype(a.dtype), a], 1) for name, a in near.items()}
        state = {name: a[:, a.shape[1] - (window - 1) :] for name, a in near.items()}
    found = attention_with_logsumexp(
        q,
        near["key"],
        near["key"],
        window=window,
        query_offset=near["key"].shape[1] - q.shape[1],
        segment_ids=segment_ids,
        key_segment_ids=near["segment"],
    )
    return found, state

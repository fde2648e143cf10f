"""Depthwise causal convolution with a few taps, as in H3 (arXiv 2212.14052) and Mamba (2312.00752)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops import segments, sequence


def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, "D"] | None = None,
    *,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Computes y_t = sum_{j<W} weight_{W-1-j} x_{t-j} (+ bias), the taps reaching no further back than t's segment.

    Args:
      x: inputs.
      weight: taps; the last one weighs the present token.
      bias: added at every token but padding.
      initial_state: the W-1 inputs before the first token, oldest first. Zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.

    Returns:
      y in the dtype of `x`, zero on padding; and the last W-1 inputs of the last token's segment, oldest first, zeros
      where that segment has fewer, in the dtype of `x`. Computed in float32 (float64 where an input is).

    Raises:
      ValueError: if shapes disagree.
    """
    _check(x, weight, bias, initial_state, segment_ids)
    batch, length, width = x.shape
    before = weight.shape[0] - 1
    if initial_state is None:
        initial_state = jnp.zeros((batch, before, width), x.dtype)
    initial_state = initial_state.astype(x.dtype)
    if sequence.is_split(length) and before <= length // sequence.ways():
        return _over_shards(x, weight, bias, initial_state, segment_ids)
    x = segments.zero_padding(x, segment_ids)
    extended = jnp.concatenate([initial_state, x], axis=1)
    reach = None if segment_ids is None else _reach(segment_ids)
    y = _taps(extended, weight, reach)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    y = segments.zero_padding(y.astype(x.dtype), segment_ids)

    state = extended[:, length:]
    if segment_ids is not None:
        age = before - 1 - jnp.arange(before)  # tokens between an entry of the state and the last token
        state = jnp.where((age <= reach[:, -1:])[..., None], state, jnp.zeros((), x.dtype))
    return y, segments.unless_empty(state, initial_state, segment_ids)


def _over_shards(x, weight, bias, initial_state, segment_ids):
    before = weight.shape[0] - 1

    def shard(x, weight, bias, initial_state, segment_ids):
        halo = sequence.halo(segments.zero_padding(x, segment_ids), before)[:, :before]
        if segment_ids is not None:
            same = sequence.halo(segment_ids, before)[:, :before] == segment_ids[:, :1]
            same = jnp.flip(
                jnp.cumprod(jnp.flip(same, 1), 1), 1
            )  # from there to the first token all are of its segment
            halo = halo * segments.expand(same, halo.ndim).astype(x.dtype)
        halo = jnp.where(sequence.is_first(), initial_state, halo)
        y, final = short_convolution(x, weight, bias, initial_state=halo, segment_ids=segment_ids)
        return y, sequence.of_last(final)

    tokens, state = ("batch", "length", "mlp"), ("batch", None, "mlp")
    arguments = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state, "segment_ids": segment_ids}
    axes = {"x": tokens, "weight": (None, "mlp"), "bias": ("mlp",), "initial_state": state}
    axes["segment_ids"] = ("batch", "length")
    y, final = sequence.apply(shard, arguments, axes, [(tokens, x.shape), (state, initial_state.shape)])
    return y, segments.unless_empty(final, initial_state, segment_ids)


def _check(x, weight, bias, initial_state, segment_ids):
    if x.ndim != 3:
        raise ValueError(f"x must be [B, T, D]; got {x.shape}")
    batch, length, width = x.shape
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(f"weight must be [W, {width}]; got {weight.shape}")
    expected = {
        "bias": (bias, (width,)),
        "initial_state": (initial_state, (batch, weight.shape[0] - 1, width)),
        "segment_ids": (segment_ids, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {array.shape}")


def _reach(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens before each one belong to its segment; no limit in the first one, which the state continues."""
    position = segments.positions(segment_ids)
    index = jnp.arange(segment_ids.shape[1])
    return jnp.where(position == index, jnp.iinfo(position.dtype).max, position)


@jax.checkpoint  # or the backward pass would keep every shifted copy
def _taps(extended, weight, reach):
    """Shift and add: for a few taps this is many times faster on CPU than XLA's depthwise convolution."""
    dtype = jnp.promote_types(jnp.result_type(extended, weight), jnp.float32)
    before = weight.shape[0] - 1
    length = extended.shape[1] - before
    y = 0.0
    for lag in range(before + 1):
        tap = extended[:, before - lag : before - lag + length].astype(dtype)
        if reach is not None and lag > 0:
            tap = jnp.where((reach >= lag)[..., None], tap, 0.0)
        y = y + weight[before - lag].astype(dtype) * tap
    return y

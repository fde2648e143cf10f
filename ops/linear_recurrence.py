"""Diagonal linear recurrence h_t = a_t * h_{t-1} + b_t, real or complex.

The elementwise recurrence of LRU (arXiv 2303.06349), S5 (2208.04933), HGRN (2311.04823), RG-LRU (2402.19427) and minGRU
(2410.01201). Complex numbers are pairs (real, imaginary) of real arrays throughout.

All forms but the reference share one derivative. With g_t the cotangent of h_t, that of b_t is
lambda_t = g_t + conj(a_{t+1}) lambda_{t+1} and that of a_t is lambda_t conj(h_{t-1}): one recurrence backwards in time
over what the forward pass returned, so nothing but a and h is kept.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ops import dispatch, pallas_recurrence, segments, sequence
from ops.kept import keep
from ops.token_loop import Masks, join, segment_masks, split_masked

Real = Float[Array, "..."]
Pair = tuple[Real, Real]
Parts = tuple[Array, ...]  # (x,) for a real number, (re, im) for a complex one

_BLOCK = 16  # tokens of a block, which are one expression
_CHUNK = 1024  # tokens per associative scan: bounds its temporaries, which are several times its inputs


@dispatch.primitive("reference", "sequential", "associative", "blocked", tpu=("pallas",), kept=False)
def linear_recurrence(
    a: Real | Pair,
    b: Real | Pair,
    *,
    initial_state: Real | Pair | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    axis: str | None = None,
    implementation: str = "auto",
) -> tuple[Real | Pair, Real | Pair]:
    """Runs h_t = a_t * h_{t-1} + b_t along axis 1.

    Args:
      a: multipliers, [B, T, ...] like `b`, or [...] (no batch and no time axis) when constant in time. |a| <= 1 is the
        caller's business. A pair (real, imaginary) makes the recurrence complex.
      b: inputs [B, T, ...]; a pair when `a` is one.
      initial_state: h before the first token, [B, ...]; a pair when `b` is one. Zero by default.
      segment_ids: 0 is padding, a change restarts the state; see `ops.segments`.
      axis: the logical name of the channels, or of the first of their axes, by which a mesh may split them
        (`models.partitioning`); for the form "pallas" and for lengths that are split.
      implementation: "reference" (token by token, plain autodiff), "sequential" (token by token, own derivative),
        "associative" (parallel prefix, own derivative), "blocked" (token by token in all blocks of a few tokens at once, own
        derivative) or "pallas" (a TPU kernel, for float32; interpreted elsewhere). "auto" is sequential on a CPU, blocked on a
        GPU, the kernel on a TPU where it applies, and else associative.

    Returns:
      h [B, T, ...] in the dtype of `b`, zero on padding, and the final state [B, ...] in float32 (float64 for float64
      inputs); pairs when the inputs are.

    Raises:
      ValueError: if shapes or kinds (real, pair) disagree, or the implementation is unknown.
    """
    is_pair = isinstance(b, tuple)
    a, b, h0 = _check(a, b, initial_state, segment_ids)
    if sequence.is_split(b[0].shape[1]):
        h, final = _over_shards(a, b, h0, segment_ids, axis, implementation)
        return (tuple(h), final) if is_pair else (h[0], final[0])
    dtype, out_dtype = jnp.promote_types(jnp.result_type(*a, *b), jnp.float32), b[0].dtype

    def time_major(x):
        return jnp.moveaxis(x.astype(dtype), 1, 0)

    constant = a[0].ndim < b[0].ndim
    a = tuple(x.astype(dtype) if constant else time_major(x) for x in a)
    b = tuple(map(time_major, b))
    offered = ("reference", "sequential", "associative", "blocked") + ("pallas",) * pallas_recurrence.supports(b)
    policies = {"cpu": "sequential", "gpu": "blocked", "tpu": "pallas" if "pallas" in offered else "associative"}
    policy = policies.get(dispatch.current_platform(), "associative")
    form = dispatch.choose("linear_recurrence", implementation, policy, offered)
    h, final = time_major_recurrence(
        "reference" if b[0].shape[0] == 1 else form,
        a,
        b,
        tuple(x.astype(dtype) for x in h0),
        segment_masks(segment_ids),
        axis,
    )
    h = tuple(segments.zero_padding(jnp.moveaxis(x, 0, 1), segment_ids).astype(out_dtype) for x in h)
    return (h, final) if is_pair else (h[0], final[0])


def _over_shards(a, b, h0, segment_ids, axis, implementation):
    dtype = jnp.promote_types(jnp.result_type(*a, *b), jnp.float32)
    names = [*(axis,) * (b[0].ndim > 2), *(None,) * (b[0].ndim - 3)]
    tokens = ("batch", "length", *names)

    alone = lambda parts: parts if len(b) == 2 else parts[0]
    parts = lambda x: x if len(b) == 2 else (x,)

    def run(h0, segment_ids, a, b):
        options = {"segment_ids": segment_ids, "axis": axis, "implementation": implementation}
        h, final = linear_recurrence(alone(a), alone(b), initial_state=alone(h0), **options)
        return parts(h), parts(final)

    return sequence.recurrence(
        run,
        lambda segment_ids, a, b: _total(a, b, segment_ids),
        {"a": a, "b": b},
        {"a": tokens if a[0].ndim == b[0].ndim else tuple(names), "b": tokens},
        [(tokens, x.shape) for x in b],
        tuple(x.astype(dtype) for x in h0),
        ("batch", *names),
        segment_ids,
        act=_mul,
        add=_add,
    )


@functools.partial(jax.checkpoint, prevent_cse=False)
def _total(a: Parts, b: Parts, segment_ids: Int[Array, "B T"] | None) -> tuple[Parts, Parts]:
    """What a whole piece does to h: the product of its multipliers, and the last h from nothing. Halved log2(T) times."""
    dtype, constant = jnp.promote_types(jnp.result_type(*a, *b), jnp.float32), a[0].ndim < b[0].ndim
    b = tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in b)
    a = tuple(x.astype(dtype) if constant else jnp.moveaxis(x.astype(dtype), 1, 0) for x in a)
    masks = segment_masks(segment_ids)
    multiplier = tuple(jnp.broadcast_to(x, b[0].shape) for x in _multiplier(a, b, masks))
    inputs = b if masks is None else _where(masks[1], b, _zeros(b))
    while len(inputs[0]) > 1:
        if len(inputs[0]) % 2:  # a step in front that does nothing
            first = lambda x, value: jnp.pad(x, [(1, 0)] + [(0, 0)] * (x.ndim - 1), constant_values=value)
            multiplier = tuple(first(x, 1 - i) for i, x in enumerate(multiplier))
            inputs = tuple(first(x, 0) for x in inputs)
        pairs = lambda parts, i: tuple(x.reshape(-1, 2, *x.shape[1:])[:, i] for x in parts)
        left, right = ((pairs(multiplier, i), pairs(inputs, i)) for i in (0, 1))
        multiplier, inputs = _combine(left, right)
    return tuple(x[0] for x in multiplier), tuple(x[0] for x in inputs)


def time_major_recurrence(
    form: str, a: Parts, b: Parts, h0: Parts, masks: Masks, axis: str | None = None, kept: bool = True
) -> tuple[Parts, Parts]:
    """`linear_recurrence` without its checks, for use inside other scans.

    Args:
      form: "reference", "sequential", "associative", "blocked" or "pallas".
      a, b: one array (real) or two (complex), [T, B, ...]; `a` may be [...].
      h0: likewise [B, ...].
      masks: from `segment_masks`. At a token that is not valid, h repeats the state.
      axis: as of `linear_recurrence`.
      kept: whether h is worth being kept (`ops.kept`).

    Returns:
      h [T, B, ...] and the last h.
    """
    if form == "reference":
        return _reference(a, b, h0, masks)
    return _with_own_derivative(form, axis, kept, a, b, h0, masks)


def _check(a, b, initial_state, segment_ids) -> tuple[Parts, Parts, Parts]:
    if isinstance(a, tuple) != isinstance(b, tuple):
        raise ValueError("a and b must both be arrays or both be (real, imaginary) pairs")
    if not isinstance(b, tuple):
        a, b, initial_state = (a,), (b,), None if initial_state is None else (initial_state,)
    shape = b[0].shape
    if len(shape) < 2 or len({x.shape for x in b}) > 1:
        raise ValueError(f"b must be [B, T, ...], its parts of one shape; got {[x.shape for x in b]}")
    if len({x.shape for x in a}) > 1 or a[0].shape not in (shape, shape[2:]):
        raise ValueError(f"a must be {shape}, or {shape[2:]} when constant in time; got {[x.shape for x in a]}")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (*a, *b)):
        raise ValueError("a and b must be floating point; pass complex numbers as (real, imaginary) pairs")
    if initial_state is None:
        initial_state = tuple(jnp.zeros(shape[:1] + shape[2:], jnp.float32) for _ in b)
    if len(initial_state) != len(b) or any(x.shape != shape[:1] + shape[2:] for x in initial_state):
        raise ValueError(f"initial_state must be {shape[:1] + shape[2:]}, a pair if b is a pair")
    if segment_ids is not None and segment_ids.shape != shape[:2]:
        raise ValueError(f"segment_ids must be {shape[:2]}; got {segment_ids.shape}")
    return a, b, initial_state


def _mul(x: Parts, y: Parts) -> Parts:
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _add(x: Parts, y: Parts) -> Parts:
    return tuple(p + q for p, q in zip(x, y, strict=True))


def _conj(x: Parts) -> Parts:
    return x if len(x) == 1 else (x[0], -x[1])


def _where(mask: Array, x: Parts, y: Parts) -> Parts:
    mask = lax.expand_dims(mask, range(mask.ndim, max(x[0].ndim, y[0].ndim)))
    return tuple(jnp.where(mask, p, q) for p, q in zip(x, y, strict=True))


def _zeros(x: Parts) -> Parts:
    return tuple(jnp.zeros((), p.dtype) for p in x)


def _reset(restart: Array, h: Parts) -> Parts:
    return _where(restart, _zeros(h), h)


def _multiplier(a: Parts, b: Parts, masks: Masks) -> Parts:
    """dh_t/dh_{t-1}, [T, B, ...], or [T, 1, ...] where it is the same for the whole batch."""
    shape = b[0].shape
    if a[0].ndim < len(shape):
        a = tuple(jnp.broadcast_to(x, (shape[0], 1, *shape[2:])) for x in a)
    if masks is None:
        return a
    restart, valid = masks
    one = tuple(jnp.full((), 1.0 - i, x.dtype) for i, x in enumerate(a))
    return _reset(restart, _where(valid, tuple(jnp.broadcast_to(x, shape) for x in a), one))


def _reference(a: Parts, b: Parts, h0: Parts, masks: Masks) -> tuple[Parts, Parts]:
    multiplier = _multiplier(a, b, masks)
    if masks is not None:
        b = _where(masks[1], b, _zeros(b))

    def step(h, ab):
        h = _add(_mul(ab[0], h), ab[1])
        return h, h

    final, h = lax.scan(step, h0, (multiplier, b))
    return h, final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_own_derivative(
    form: str, axis: str | None, kept: bool, a: Parts, b: Parts, h0: Parts, masks: Masks
) -> tuple[Parts, Parts]:
    if form == "pallas":
        return _pallas(axis, a, b, h0, masks)
    return {"sequential": _sequential, "associative": _associative, "blocked": _blocked}[form](a, b, h0, masks)


def _forward(form, axis, kept, a, b, h0, masks):
    h, final = _with_own_derivative(form, axis, kept, a, b, h0, masks)
    h = keep(h) if kept else h
    return (h, final), (a, h, h0, masks)


def _backward(form, axis, kept, residuals, cotangents):
    a, h, h0, masks = residuals
    previous = tuple(jnp.concatenate([p0[None], p[:-1]]) for p0, p in zip(h0, h, strict=True))
    if form == "pallas":
        return *_pallas_backward(axis, a, previous, masks, *cotangents), None
    if form == "sequential":
        return *_sequential_backward(a, previous, masks, *cotangents), None
    return *_parallel_backward(_blocked if form == "blocked" else _associative, a, previous, masks, *cotangents), None


_with_own_derivative.defvjp(_forward, _backward)


def _sequential(a: Parts, b: Parts, h0: Parts, masks: Masks) -> tuple[Parts, Parts]:
    constant = a[0].ndim < b[0].ndim

    def step(h, xs):
        at, bt, mask = xs
        if mask is not None:
            h = _reset(mask[0], h)
        new = _add(_mul(a if constant else at, h), bt)
        if mask is not None:
            new = _where(mask[1], new, h)
        return new, new

    final, h = lax.scan(step, h0, (None if constant else a, b, masks))
    return h, final


def _sequential_backward(a, previous, masks, dh, dfinal):
    constant = a[0].ndim < previous[0].ndim

    def step(carry, xs):
        later, total = carry  # cotangent of this token's h from later tokens; gradient of a constant a
        at, prev, g, mask = xs
        lam = db = _add(g, later)
        earlier = _mul(_conj(a if constant else at), lam)
        if mask is not None:
            restart, valid = mask
            prev, db = _reset(restart, prev), _where(valid, lam, _zeros(lam))
            earlier = _reset(restart, _where(valid, earlier, lam))
        da = _mul(db, _conj(prev))
        if constant:
            total, da = _add(total, da), None
        return (earlier, total), (da, db)

    total = tuple(jnp.zeros_like(x) for x in dfinal) if constant else None
    inputs = (None if constant else a, previous, dh, masks)
    (dh0, total), (da, db) = lax.scan(step, (dfinal, total), inputs, reverse=True)
    return tuple(x.sum(0) for x in total) if constant else da, db, dh0


def _combine(left: tuple[Parts, Parts], right: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
    return _mul(left[0], right[0]), _add(_mul(right[0], left[1]), right[1])


def _associative(a: Parts, b: Parts, h0: Parts, masks: Masks, transpose: bool = False) -> tuple[Parts, Parts]:
    """The recurrence; or, transposed, u_t = conj(m_t) (b_t + u_{t+1}) from u_T = h0, where m_t is dh_t/dh_{t-1}."""
    constant = a[0].ndim < b[0].ndim

    def chunk(h, xs):
        (at, bt), mask = xs
        multiplier = _multiplier(a if constant else at, bt, mask)
        if transpose:
            multiplier = _conj(multiplier)
            bt = _mul(multiplier, bt)
        elif mask is not None:
            bt = _where(mask[1], bt, _zeros(bt))
        decay, inner = lax.associative_scan(_combine, (multiplier, bt), reverse=transpose)
        h = _add(_mul(decay, h), inner)
        return tuple(x[0 if transpose else -1] for x in h), h

    tokens = split_masked((None if constant else a, b), masks, _CHUNK)
    final, h = lax.scan(chunk, h0, tokens, reverse=transpose)
    return join(h, b[0].shape[0]), final


def _blocked(a: Parts, b: Parts, h0: Parts, masks: Masks, transpose: bool = False) -> tuple[Parts, Parts]:
    """As `_associative`."""
    multiplier = _multiplier(a, b, masks)
    if transpose:
        multiplier = _conj(multiplier)
        b = _mul(multiplier, b)
    elif masks is not None:
        b = _where(masks[1], b, _zeros(b))
    return _by_blocks(multiplier, b, h0, transpose)


def _by_blocks(m: Parts, b: Parts, h: Parts, reverse: bool) -> tuple[Parts, Parts]:
    """The recurrence from the state h, or backwards in time, in three steps: what each block does to a state, the states at
    their borders (by the same function), and the states inside. XLA for GPUs makes about one pass over the arrays of each.
    """
    length = len(b[0])
    size, count = min(_BLOCK, length), -(-length // _BLOCK)
    excess = count * size - length  # steps at the end that do nothing
    fill = lambda x, value: jnp.pad(x, [(0, excess)] + [(0, 0)] * (x.ndim - 1), constant_values=value)
    cut = lambda x, value: fill(x, value).reshape(count, size, *x.shape[1:])
    m, b = tuple(cut(x, 1 - i) for i, x in enumerate(m)), tuple(cut(x, 0) for x in b)
    steps = [(tuple(x[:, i] for x in m), tuple(x[:, i] for x in b)) for i in range(size)]
    steps = steps[::-1] if reverse else steps
    before = tuple(x[None] for x in h)
    if count > 1:
        borders, h = _by_blocks(*lax.optimization_barrier(functools.reduce(_combine, steps)), h, reverse)
        order = (lambda x, y: (y[1:], x)) if reverse else (lambda x, y: (x, y[:-1]))
        before = tuple(jnp.concatenate(order(x, y)) for x, y in zip(before, borders))
    inside = []
    for multiplier, inputs in steps:
        before = _add(_mul(multiplier, before), inputs)
        inside.append(before)
    stacked = tuple(jnp.stack(x[::-1] if reverse else x, 1) for x in zip(*inside))
    return tuple(x.reshape(-1, *x.shape[2:])[:length] for x in stacked), h if count > 1 else tuple(x[0] for x in before)


def _gradients(a, previous, masks, later, dh0):
    """The gradients of a, b and h0 from l_t, the cotangent of h_t with what comes from later tokens."""
    db = later
    if masks is not None:
        restart, valid = masks
        db, previous = _where(valid, db, _zeros(db)), _reset(restart, previous)
    da = _mul(db, _conj(previous))
    constant = a[0].ndim < previous[0].ndim
    return tuple(x.sum((0, 1)) for x in da) if constant else da, db, dh0


def _parallel_backward(form, a, previous, masks, dh, dfinal):
    earlier, dh0 = form(a, dh, dfinal, masks, transpose=True)
    later = tuple(jnp.concatenate([x[1:], y[None]]) for x, y in zip(earlier, dfinal, strict=True))
    return _gradients(a, previous, masks, _add(dh, later), dh0)


def _flat(x: Parts, leading: int) -> Parts:
    return tuple(y.reshape(*y.shape[:leading], -1) for y in x)


def _multipliers(a: Parts, b: Parts, masks: Masks) -> Parts:
    """[T, B, D], or [1, 1, D] where the multiplier is the same for all tokens."""
    if a[0].ndim < b[0].ndim and masks is None:
        return tuple(x.reshape(1, 1, -1) for x in a)
    full = tuple(jnp.broadcast_to(x, b[0].shape) for x in _multiplier(a, b, masks))
    return _flat(full, 2)


def _pallas(axis, a, b, h0, masks):
    m = _multipliers(a, b, masks)
    inputs = b if masks is None else _where(masks[1], b, _zeros(b))
    h = pallas_recurrence.recurrence(m, _flat(inputs, 2), _flat(h0, 1), axis=axis)
    h = tuple(x.reshape(b[0].shape) for x in h)
    return h, tuple(x[-1] for x in h)


def _pallas_backward(axis, a, previous, masks, dh, dfinal):
    m = _multipliers(a, dh, masks)
    later = pallas_recurrence.recurrence(m, _flat(dh, 2), _flat(dfinal, 1), reverse=True, axis=axis)
    dh0 = _mul(_conj(tuple(x[0] for x in m)), tuple(x[0] for x in later))
    later, dh0 = (tuple(x.reshape(s.shape) for x, s in zip(y, z)) for y, z in ((later, dh), (dh0, dfinal)))
    return _gradients(a, previous, masks, later, dh0)

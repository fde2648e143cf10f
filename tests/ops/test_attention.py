import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from ops import dispatch
from ops.attention import NOTHING, attention, attention_with_logsumexp, merge
from ops.attention_blocks import exp_below
from tests.traced import equations

TOLERANCE = 1e-5  # of the largest entry expected, float32


def mask_of(B, T, S, *, causal=True, window=None, segments=None, key_segments=None, offset=0):
    mask = np.zeros((B, T, S), bool)
    for b, t, j in itertools.product(range(B), range(T), range(S)):
        i = offset + t
        seen = not causal or j <= i
        if window is not None:
            seen &= i - window < j if causal else abs(i - j) <= window // 2
        if segments is not None:
            seen &= segments[b, t] != 0 and segments[b, t] == key_segments[b, j]
        mask[b, t, j] = seen
    return mask


def oracle(q, k, v, dy, mask, *, activation="softmax", causal=True, scale=None, score_cap=None, slopes=None, offset=0):
    """Output, and gradients of sum(y * dy) to q, k, v and slopes, in float64 from the definition."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    B, T, H, K = q.shape
    S, G, V = v.shape[1:]
    scale = K**-0.5 if scale is None else scale
    distance = offset + np.arange(T)[:, None] - np.arange(S)[None, :]
    distance = distance if causal else np.abs(distance)
    y, dq, dk, dv, dslopes = np.zeros((B, T, H, V)), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(H)
    for b, h in itertools.product(range(B), range(H)):
        g = h // (H // G)
        s, derivative = scale * q[b, :, h] @ k[b, :, g].T, 1
        if score_cap is not None:
            derivative = 1 / np.cosh(s / score_cap) ** 2
            s = score_cap * np.tanh(s / score_cap)
        if slopes is not None:
            s = s - float(slopes[h]) * distance
        dp = dy[b, :, h] @ v[b, :, g].T
        if activation == "softmax":
            top = np.max(np.where(mask[b], s, -np.inf), axis=1, keepdims=True)
            e = np.where(mask[b], np.exp(np.minimum(s - np.where(np.isfinite(top), top, 0), 0)), 0)
            p = e / np.maximum(e.sum(1, keepdims=True), 1e-300)
            ds = p * (dp - (p * dp).sum(1, keepdims=True))
        elif activation == "relu":
            p, ds = np.maximum(s, 0) * mask[b], (s > 0) * mask[b] * dp
        elif activation == "relu2":
            p, slope = np.maximum(s, 0) ** 2, 2 * np.maximum(s, 0)
            p, ds = p * mask[b], slope * mask[b] * dp
        else:
            z = (s - math.sqrt(0.5)) * math.sqrt(2 * math.pi)
            p, slope = 0.5 * (1 + np.vectorize(math.erf)(z)), math.sqrt(2) * np.exp(-z * z)
            p, ds = p * mask[b], slope * mask[b] * dp
        y[b, :, h] = p @ v[b, :, g]
        dq[b, :, h] = scale * (ds * derivative) @ k[b, :, g]
        dk[b, :, g] += scale * (ds * derivative).T @ q[b, :, h]
        dv[b, :, g] += p.T @ dy[b, :, h]
        dslopes[h] -= (ds * distance).sum()
    return y, dq, dk, dv, dslopes


def inputs(B, T, S, H, G, K, V, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def with_gradients(f, dy, *arguments):
    y, pull_back = jax.vjp(f, *arguments)
    return y, *pull_back(dy)


def assert_close(actual, expected, tolerance=TOLERANCE):
    for a, e in zip(actual, expected, strict=True):
        error = np.max(np.abs(np.asarray(a, np.float64) - e))
        assert error <= tolerance * max(np.max(np.abs(e)), 1e-3), f"{error} against {np.max(np.abs(e))}"


PACKED = np.array([[1] * 9 + [2] * 1 + [3] * 11 + [0] * 2, [0] * 3 + [7] * 8 + [0] * 4 + [5] * 8])  # [2, 23]
SLOPES = np.array([0.5, 0.03, -0.1, 0.0], np.float32)

# Name: (B, T, S, H, G, K, V), options of attention. Blocks are 8 x 8.
CASES = {
    "whole blocks": ((2, 24, 24, 2, 2, 4, 4), {}),
    "prime length, grouped queries, K != V, packed": ((2, 23, 23, 4, 2, 3, 5), {"segments": PACKED}),
    "one key head for all queries": ((1, 11, 11, 3, 1, 4, 2), {"causal": False}),
    "one token": ((2, 1, 1, 4, 2, 4, 4), {"slopes": SLOPES}),
    "scale": ((1, 9, 9, 1, 1, 4, 4), {"scale": 0.8}),
    "cap": ((2, 19, 19, 4, 2, 4, 4), {"score_cap": 1.5, "slopes": SLOPES, "segments": PACKED[:, :19]}),
    "slopes": ((2, 19, 19, 4, 2, 4, 4), {"slopes": SLOPES, "segments": PACKED[:, :19]}),
    "slopes both ways": ((1, 19, 19, 4, 4, 4, 4), {"slopes": SLOPES, "causal": False}),
    "relu2": ((2, 23, 23, 4, 2, 3, 5), {"activation": "relu2", "segments": PACKED, "slopes": SLOPES}),
    "relu both ways, window": ((1, 19, 19, 2, 2, 4, 4), {"activation": "relu", "causal": False, "window": 6}),
    "laplace": ((2, 23, 23, 4, 4, 3, 5), {"activation": "laplace", "segments": PACKED, "causal": False}),
    "laplace, window": ((1, 19, 19, 2, 1, 4, 4), {"activation": "laplace", "window": 9, "slopes": SLOPES[:2]}),
    "packed window": ((2, 23, 23, 4, 2, 3, 5), {"window": 6, "segments": PACKED}),
    "cross attention": (
        (2, 10, 23, 2, 1, 4, 3),
        {"causal": False, "segments": np.array([[1] * 6 + [3] * 4, [5] * 6 + [9] * 4]), "key_segments": PACKED},
    ),
    "piece of a sequence": ((1, 5, 24, 2, 2, 4, 4), {"offset": 11, "window": 10, "slopes": SLOPES[:2]}),
    "queries beyond the keys": ((1, 24, 8, 1, 1, 4, 4), {"window": 4}),
}


@functools.cache
def example(name):
    """What the oracle gives for a case, and a function that gives what a form gives."""
    (B, T, S, H, G, K, V), options = CASES[name]
    options = dict(options)
    q, k, v, dy = inputs(B, T, S, H, G, K, V)
    segments = options.pop("segments", None)
    key_segments = options.pop("key_segments", None)
    slopes, offset = options.pop("slopes", None), options.pop("offset", 0)
    masks = {name: options[name] for name in ("causal", "window") if name in options}
    keys = segments if key_segments is None else key_segments
    mask = mask_of(B, T, S, segments=segments, key_segments=keys, offset=offset, **masks)
    rest = {name: value for name, value in options.items() if name != "window"}
    expected = oracle(q, k, v, dy, mask, slopes=slopes, offset=offset, **rest)

    @functools.partial(jax.jit, static_argnums=0)
    def compute(implementation, offset, q, k, v, slopes, dy):
        def f(q, k, v, slopes):
            return attention(
                q, k, v, slopes=slopes, segment_ids=segments, key_segment_ids=key_segments, query_offset=offset,
                implementation=implementation, block_size=8, **options,
            )  # fmt: skip

        return with_gradients(f, dy, q, k, v, slopes)

    def run(form):
        if form == "blockwise":
            return jax.jit(functools.partial(compute.__wrapped__, form, offset))(q, k, v, slopes, dy)
        return compute(form.replace("traced offset", "blockwise"), np.int32(offset), q, k, v, slopes, dy)

    return expected, run


# Cases whose blocks lie elsewhere where the offset is not known to the compiler.
TRACED = {"whole blocks", "slopes both ways", "packed window", "piece of a sequence", "queries beyond the keys"}


@pytest.mark.parametrize(
    "name, form",
    [pytest.param(name, "reference", marks=pytest.mark.thorough) for name in CASES if name not in TRACED]
    + [(name, "reference") for name in sorted(TRACED)]
    + [(name, "blockwise") for name in CASES]
    + [(name, "traced offset") for name in sorted(TRACED)],
)
def test_values_and_gradients(name, form):
    expected, run = example(name)
    actual = run(form)
    if actual[-1] is None:
        actual, expected = actual[:-1], expected[:-1]
    assert_close(actual, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_windows_at_the_edges_of_blocks(causal):
    windows = (1, 2, 7, 8, 9, 15, 16, 17, 40, 2**31 - 5, 2**31)
    q, k, v, dy = inputs(1, 24, 24, 1, 1, 4, 4)

    @jax.jit
    def compute(q, k, v):
        return [attention(q, k, v, causal=causal, window=w, block_size=8, implementation="blockwise") for w in windows]

    for window, y in zip(windows, compute(q, k, v), strict=True):
        mask = mask_of(1, 24, 24, causal=causal, window=window)
        assert_close([y], oracle(q, k, v, dy, mask, causal=causal)[:1])


def dense(q, k, v, mask, slopes):
    """Output and log-sum-exp from the definition, with a mask [B, T, H, S]."""
    q, k, v = (jnp.asarray(x, jnp.float64) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    distance = jnp.arange(q.shape[1])[:, None, None] - jnp.arange(k.shape[1])
    s = jnp.einsum("bthk,bshk->bths", q, k) * q.shape[-1] ** -0.5 - slopes[:, None] * distance
    s = jnp.where(mask, s, -1e9)  # exp(-1e9) = 0
    some, log = jnp.any(mask, -1), jax.nn.logsumexp(s, -1)
    p = jnp.exp(s - log[..., None]) * some[..., None]
    return jnp.einsum("bths,bshv->bthv", p, v), jnp.where(some, log, NOTHING)


def coarse(query, key):
    """A pattern of two labels, of which one differs between heads."""
    (place, group), (key_place, key_group) = query, key
    return ((place - key_place) % 3 == 0) | (group == key_group)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "traced offset"])
def test_masks_and_logsumexp(implementation):
    """Labels of tokens and of heads; queries that see nothing; the gradients of both outputs."""
    B, T, H, G = 2, 23, 4, 2
    q, k, v, dy = inputs(B, T, T, H, G, 4, 3)
    random = np.random.default_rng(3)
    place = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    groups = random.integers(0, 4, (B, T, H)).astype(np.int32)
    key_groups = random.integers(4, 8, (B, T, G)).astype(np.int32) % 5  # 4 or 0, 1, 2
    key_place = np.where(place % 2, place, place + 1).astype(np.int32)
    seen = (place[:, :, None, None] - key_place[:, None, None]) % 3 == 0
    seen = seen | (groups[..., None] == np.repeat(key_groups, H // G, 2).transpose(0, 2, 1)[:, None])
    seen &= mask_of(B, T, T, window=7, segments=PACKED, key_segments=PACKED)[:, :, None]
    weights = (dy, random.standard_normal((B, T, H)).astype(np.float32))
    assert not seen.any(-1)[PACKED != 0].all()
    traced, form = implementation == "traced offset", implementation.replace("traced offset", "blockwise")

    @jax.jit
    def compute(q, k, v, slopes, offset):
        def f(q, k, v, slopes):
            return attention_with_logsumexp(
                q, k, v, slopes=slopes, window=7, mask=coarse, query_labels=(place, groups),
                key_labels=(key_place, key_groups), segment_ids=PACKED, block_size=8, implementation=form,
                query_offset=offset if traced else 0,
            )  # fmt: skip

        y, pull_back = jax.vjp(f, q, k, v, slopes)
        return *y, *pull_back(weights)

    actual = list(compute(q, k, v, SLOPES, np.int32(0)))
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v, SLOPES)]
        y, pull_back = jax.vjp(lambda q, k, v, slopes: dense(q, k, v, seen, slopes), *wide)
        expected = [np.array(x) for x in (*y, *pull_back(tuple(jnp.asarray(w, jnp.float64) for w in weights)))]
    empty = expected[1] == NOTHING  # at padding, too
    actual[1] = np.array(actual[1])
    np.testing.assert_array_equal(actual[1][empty], np.float32(NOTHING))
    actual[1], expected[1] = actual[1][~empty], expected[1][~empty]
    assert_close(actual, expected)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "traced offset"])
def test_decay(implementation):
    """Scores that fall by the log-decays between key and query, of grouped heads, in a piece of a sequence and with a cap; what
    they are at padding does not matter."""
    B, T, S, H, G, offset = 2, 13, 23, 4, 2, 10
    q, k, v, dy = inputs(B, T, S, H, G, 4, 3)
    sums = np.cumsum(np.random.default_rng(3).uniform(-2, 0, (B, S, H)), 1).astype(np.float32)
    mask = mask_of(B, T, S, segments=PACKED[:, offset:], key_segments=PACKED, offset=offset)
    traced, form = implementation == "traced offset", implementation.replace("traced offset", "blockwise")

    @jax.jit
    def compute(q, k, v, sums, start):
        def f(q, k, v, sums):
            return attention(
                q, k, v, decay=sums[:, offset:], key_decay=sums, segment_ids=PACKED[:, offset:], score_cap=2.0,
                key_segment_ids=PACKED, query_offset=start if traced else offset, implementation=form, block_size=8,
            )  # fmt: skip

        return with_gradients(f, dy, q, k, v, sums)

    def definition(q, k, v, sums):
        k, v = (jnp.repeat(a, H // G, axis=2) for a in (k, v))
        s = 2 * jnp.tanh(jnp.einsum("bthk,bshk->bhts", q, k) * 4**-0.5 / 2)
        s = s + (sums[:, offset:, None] - sums[:, None]).transpose(0, 3, 1, 2)
        e = jnp.where(mask[:, None], jnp.exp(jnp.where(mask[:, None], s, 0)), 0)
        p = e / jnp.where(e.sum(-1, keepdims=True) > 0, e.sum(-1, keepdims=True), 1)
        return jnp.einsum("bhts,bshv->bthv", p, v)

    poisoned = np.where((PACKED == 0)[..., None], np.float32(np.nan), sums)
    actual = compute(q, k, v, poisoned, np.int32(offset))
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (dy, q, k, v, sums)]
        assert_close(actual, [np.asarray(a) for a in with_gradients(definition, *wide)])


def test_masks_by_index():
    """Without labels a mask is told the indices, and what is not softmax honours it too."""
    q, k, v, dy = inputs(1, 24, 24, 2, 2, 4, 4)
    mask = mask_of(1, 24, 24) & (np.arange(24)[:, None] % 5 >= np.arange(24) % 5)
    for activation in ("softmax", "relu2"):
        f = functools.partial(
            attention, activation=activation, block_size=8, mask=lambda i, j: i % 5 >= j % 5, implementation="blockwise"
        )
        actual = jax.jit(functools.partial(with_gradients, f))(dy, q, k, v)
        assert_close(actual, oracle(q, k, v, dy, mask, activation=activation)[:4])


def test_merge_is_the_softmax_over_the_union():
    q, k, v, dy = inputs(2, 23, 23, 4, 2, 4, 3)
    dlog = np.random.default_rng(3).standard_normal((2, 23, 4)).astype(np.float32)
    options = {"segment_ids": PACKED, "block_size": 8, "implementation": "blockwise"}
    # Disjoint; the first query of each document is in none of them.
    patterns = [lambda i, j: (i > j) & (j % 2 == 0), lambda i, j: (i > j + 4) & (j % 2 == 1)]
    patterns.append(lambda i, j: (i > j) & (i <= j + 4) & (j % 2 == 1))

    @jax.jit
    def compute(q, k, v):
        def merged(q, k, v):
            return merge([attention_with_logsumexp(q, k, v, mask=mask, **options) for mask in patterns])

        def whole(q, k, v):
            return attention_with_logsumexp(q, k, v, mask=lambda i, j: i > j, **options)

        results = []
        for f in (merged, whole):
            y, pull_back = jax.vjp(f, q, k, v)
            results.append((*y, *pull_back((jnp.asarray(dy), jnp.asarray(dlog)))))
        return results

    merged, whole = compute(q, k, v)
    assert np.all(np.asarray(merged[1])[0, [0, 9, 10]] == np.float32(NOTHING))
    assert np.all(np.asarray(merged[0])[0, [0, 9, 10]] == 0)
    seen = np.asarray(whole[1]) > -1e19
    np.testing.assert_array_equal(seen, np.asarray(merged[1]) > -1e19)
    assert_close([merged[0], *merged[2:]], [np.asarray(x, np.float64) for x in (whole[0], *whole[2:])])
    assert_close([np.asarray(merged[1])[seen]], [np.asarray(whole[1], np.float64)[seen]])


def test_blocks_that_a_mask_hides_are_left_out_of_packed_rows():
    calls = []

    def mask(i, j):
        jax.debug.callback(lambda: calls.append(1))
        return j % 24 // 2 == 2  # in the blocks 0 and 3 of 5

    q, k, v, dy = inputs(1, 40, 40, 2, 1, 4, 4)
    segments = np.repeat([1, 2], [24, 16])[None]
    f = functools.partial(attention, causal=False, mask=mask, segment_ids=segments, block_size=8)
    actual = jax.jit(functools.partial(with_gradients, f))(dy, q, k, v)
    jax.effects_barrier()
    assert len(calls) == 25 + 2 * 5  # to find the 3 + 2 pairs, and to go over them forward and backward
    seen = mask_of(1, 40, 40, causal=False, segments=segments, key_segments=segments) & (np.arange(40) % 24 // 2 == 2)
    assert_close(actual, oracle(q, k, v, dy, seen, causal=False)[:4])


def gradient_jaxpr(T, S, offset=None, **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, T, 1, 4), (1, S, 1, 4), (1, S, 1, 4))]

    def loss(q, k, v, offset):
        return attention(q, k, v, query_offset=offset, **options).sum()

    f = jax.grad(loss, argnums=(0, 1, 2))
    if offset is None:
        return jax.make_jaxpr(lambda *a: f(*a, 0))(*arrays).jaxpr
    return jax.make_jaxpr(f)(*arrays, offset).jaxpr


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"window": 8}, {"causal": False, "window": 18}])
@pytest.mark.parametrize("T, S", [(40, 40), (37, 37), (20, 37), (37, 20)])
def test_only_blocks_with_something_visible_are_visited(options, T, S):
    mask = mask_of(1, T, S, **options)[0]
    tops, lefts = range(0, T, 8), range(0, S, 8)
    active = sum(mask[i : i + 8, j : j + 8].any() for i, j in itertools.product(tops, lefts))
    jaxpr = gradient_jaxpr(T, S, implementation="blockwise", block_size=8, **options)
    lengths = [e.params["length"] for e in equations(jaxpr) if e.primitive.name == "scan"]
    assert lengths == [active, active]  # forward and backward


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "relu2"}, {"offset": jnp.int32(0)}, {"causal": False, "mask": lambda i, j: (i - j) % 7 == 0}],
)
def test_memory_is_linear_in_the_length(options):
    def largest(length):
        jaxpr = gradient_jaxpr(length, length, implementation="auto", block_size=64, **options)
        return max(math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars)

    assert largest(4096) <= 2 * largest(2048)


def test_padding_may_hold_anything():
    segments = PACKED
    q, k, v, dy = inputs(2, 23, 23, 2, 2, 4, 4)
    padding = (segments == 0)[:, :, None, None]
    poisoned = [np.where(padding, np.float32(np.nan), x) for x in (q, k, v)]

    @jax.jit
    def compute(q, k, v):
        results = []
        for activation, implementation in itertools.product(
            ("softmax", "relu2", "laplace"), ("reference", "blockwise", "library")
        ):
            if activation == "softmax" or implementation != "library":
                f = functools.partial(
                    attention, activation=activation, implementation=implementation, block_size=8, segment_ids=segments
                )
                results.append(with_gradients(f, dy, q, k, v))
        return results

    for clean, dirty in zip(compute(q, k, v), compute(*poisoned), strict=True):
        for c, d in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(c, d)
            assert np.all(np.where(padding, d, 0) == 0)
            assert np.all(np.isfinite(d))


def test_a_packed_row_equals_the_separate_documents():
    q, k, v, dy = inputs(1, 23, 23, 2, 1, 4, 4)
    segments = PACKED[:1]
    spans = ((0, 9), (9, 10), (10, 21))

    @jax.jit
    def compute(q, k, v, dy):
        results = []
        for options in ({}, {"window": 4, "slopes": SLOPES[:2]}, {"causal": False, "activation": "relu2"}):
            f = functools.partial(attention, implementation="blockwise", block_size=8, **options)
            packed = with_gradients(functools.partial(f, segment_ids=segments), dy, q, k, v)
            alone = [with_gradients(f, *(x[:, a:b] for x in (dy, q, k, v))) for a, b in spans]
            results.append((packed, alone))
        return results

    for packed, alone in compute(q, k, v, dy):
        assert_close([x[:, :21] for x in packed], [np.concatenate(parts, 1) for parts in zip(*alone, strict=True)])


@pytest.mark.parametrize("window", [None, 6])
def test_decoding_into_a_buffer_equals_the_whole_sequence(window):
    B, T, capacity, prefill = 2, 23, 29, 9
    q, k, v, dy = inputs(B, T, T, 4, 2, 4, 3)
    segments = np.where(PACKED == 0, 4, PACKED)

    def extend(x):
        return np.pad(x, ((0, 0), (0, capacity - T)) + ((0, 0),) * (x.ndim - 2), constant_values=0)

    keys, values, key_segments = extend(k), extend(v), extend(segments)

    @jax.jit
    def compute(q):
        def piece(start, length, segmented):
            here = jax.lax.dynamic_slice_in_dim
            written = jnp.arange(capacity) < start + length
            options = {}
            if segmented:
                options["segment_ids"] = here(jnp.asarray(segments), start, length, 1)
                options["key_segment_ids"] = jnp.where(written, key_segments, 0)
            # What has not been written yet must not be read.
            buffers = (jnp.where(written[:, None, None], x, 1e3) for x in (keys, values))
            return attention(here(q, start, length, 1), *buffers, window=window, query_offset=start, **options)

        results = []
        for segmented in (False, True):
            first = piece(jnp.int32(0), prefill, segmented)
            rest = jax.lax.map(lambda t: piece(t, 1, segmented)[:, 0], jnp.arange(prefill, T))  # noqa: B023
            results.append(jnp.concatenate((first, rest.swapaxes(0, 1)), axis=1))
        return results

    plain, segmented = compute(q)
    assert_close([plain], oracle(q, k, v, dy, mask_of(B, T, T, window=window))[:1])
    mask = mask_of(B, T, T, window=window, segments=segments, key_segments=segments)
    assert_close([segmented], oracle(q, k, v, dy, mask)[:1])


def test_library_agrees():
    q, k, v, dy = inputs(2, 23, 23, 4, 2, 4, 4)
    cases = (
        {},
        {"causal": False},
        {"window": 5, "segments": PACKED},
        {"window": 2**31 - 5},
        {"causal": False, "window": 2**31, "segments": PACKED},
        {"causal": False, "window": 5, "segments": PACKED, "key_segments": np.roll(PACKED, 4, axis=1)},
        {"scale": 0.3},
    )

    @jax.jit
    def compute(q, k, v):
        results = []
        for case in cases:
            names = {"segments": "segment_ids", "key_segments": "key_segment_ids"}
            options = {names.get(name, name): value for name, value in case.items()}
            f = functools.partial(attention, implementation="library", **options)
            results.append(with_gradients(f, dy, q, k, v))
        return results

    for case, actual in zip(cases, compute(q, k, v), strict=True):
        case = {"key_segments": case.get("segments"), **case}
        scale, causal = case.pop("scale", None), case.get("causal", True)
        assert_close(actual, oracle(q, k, v, dy, mask_of(2, 23, 23, **case), scale=scale, causal=causal)[:4])


def test_large_scores():
    # Scores around 450, where the exponential overflows, and each block higher than the ones before it.
    q, k, v, dy = inputs(1, 24, 24, 1, 1, 4, 4)
    q[..., 0], k[..., 0] = 30, 30 + 0.05 * np.arange(24)[:, None]
    f = functools.partial(attention, implementation="blockwise", block_size=8)
    actual = jax.jit(functools.partial(with_gradients, f))(dy, q, k, v)
    # float32 rounds such scores by 3e-5, of which the exponential makes a relative error.
    assert_close(actual, oracle(q, k, v, dy, mask_of(1, 24, 24))[:4], 3e-4)


def test_bfloat16():
    arrays = inputs(2, 23, 23, 4, 2, 8, 8)
    q, k, v, dy = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    cases = [
        {"implementation": implementation, "activation": activation}
        for implementation in ("reference", "blockwise")
        for activation in ("softmax", "relu2")
    ]

    @jax.jit
    def compute(q, k, v):
        partials = [functools.partial(attention, segment_ids=PACKED, block_size=8, **case) for case in cases]
        return [with_gradients(f, dy, q, k, v) for f in partials]

    mask = mask_of(2, 23, 23, segments=PACKED, key_segments=PACKED)
    for case, actual in zip(cases, compute(q, k, v), strict=True):
        assert all(x.dtype == jnp.bfloat16 for x in actual)
        assert_close(actual, oracle(q, k, v, dy, mask, activation=case["activation"])[:4], 2e-2)
    for large in compute(100 * q, 100 * k, 100 * v):
        assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in large)


def test_types_may_differ():
    q, k, v, dy = inputs(1, 9, 9, 2, 1, 4, 4)
    half = jnp.asarray(v, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    f = functools.partial(attention, implementation="blockwise", block_size=8)
    actual = jax.jit(functools.partial(with_gradients, f))(half[1], q, k, half[0])
    assert [x.dtype for x in actual] == [jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16]
    assert_close(actual, oracle(q, k, v, dy, mask_of(1, 9, 9))[:4], 2e-2)


def test_float64():
    with jax.enable_x64(True):
        q, k, v, dy = inputs(2, 23, 23, 4, 2, 3, 5, dtype=np.float64)
        f = functools.partial(attention, implementation="blockwise", block_size=8, segment_ids=PACKED)
        actual = jax.jit(functools.partial(with_gradients, f))(dy, q, k, v)
        assert all(x.dtype == np.float64 for x in actual)
        mask = mask_of(2, 23, 23, segments=PACKED, key_segments=PACKED)
        assert_close(actual, oracle(q, k, v, dy, mask)[:4], 1e-13)


def test_batch_and_heads_can_be_sharded_without_communication():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, k, v, dy = inputs(2, 23, 23, 8, 4, 4, 4)
    heads = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    tokens = jax.NamedSharding(mesh, jax.P("data"))

    def compute(dy, q, k, v, segments):
        f = functools.partial(attention, segment_ids=segments, implementation="blockwise", block_size=8)
        return with_gradients(f, dy, q, k, v)

    lowered = jax.jit(compute, in_shardings=(*[heads] * 4, tokens), out_shardings=heads).lower(dy, q, k, v, PACKED)
    compiled = lowered.compile()
    for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert word not in compiled.as_text()
    actual = compiled(
        *(jax.device_put(x, s) for x, s in zip((dy, q, k, v, PACKED), [heads] * 4 + [tokens], strict=True))
    )
    mask = mask_of(2, 23, 23, segments=PACKED, key_segments=PACKED)
    assert_close(actual, oracle(q, k, v, dy, mask)[:4])


def test_lengths_across_the_chosen_block_size():
    # 130 keys take two blocks of 80, the last of them padded.
    q, k, v, dy = inputs(1, 130, 130, 1, 1, 4, 4)
    actual = jax.jit(functools.partial(with_gradients, attention))(dy, q, k, v)
    assert_close(actual, oracle(q, k, v, dy, mask_of(1, 130, 130))[:4])


def test_the_run_wide_choice_is_obeyed_or_refused():
    def primitives(**options):
        shape = jax.ShapeDtypeStruct((1, 16, 1, 4), jnp.float32)
        jaxpr = jax.make_jaxpr(functools.partial(attention, block_size=8, **options))(shape, shape, shape).jaxpr
        return {e.primitive.name for e in equations(jaxpr)}

    assert "scan" in primitives()
    with dispatch.implementation("reference"):
        assert "scan" not in primitives()
        assert "scan" in primitives(implementation="blockwise")
    with dispatch.implementation("attention=library") as choice:
        assert "scan" not in primitives()
        assert choice.asked == {"attention": ("reference", "blockwise", "library", "splash")}
        with pytest.raises(
            UserError, match="attention has no form 'library' in this model, it offers reference, blockwise;"
        ):
            primitives(activation="relu2")
        assert choice.asked == {"attention": ("reference", "blockwise")}
    with dispatch.matmul_form():
        assert "scan" in primitives()


IDS = np.ones((2, 6), int)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"q": (2, 6, 4)}, "must be"),
        ({"k": (2, 6, 2, 5)}, "do not fit"),
        ({"v": (2, 7, 2, 4)}, "do not fit"),
        ({"q": (2, 6, 3, 4)}, "multiple"),
        ({"activation": "sigmoid"}, "activation"),
        ({"window": 0}, "window"),
        ({"block_size": 0}, "block_size"),
        ({"slopes": np.zeros(2)}, "slopes"),
        ({"key_segment_ids": np.ones((2, 6), int)}, "needs segment_ids"),
        ({"segment_ids": np.ones((2, 5), int)}, "segment_ids must be"),
        ({"q": (2, 5, 4, 4), "segment_ids": np.ones((2, 5), int)}, "key_segment_ids"),
        ({"query_labels": np.ones((2, 6), int)}, "give `mask`"),
        ({"mask": np.equal, "query_labels": np.ones((2, 6, 2), int)}, "labels must be"),
        ({"mask": np.equal, "key_labels": (np.ones((2, 5), int),)}, "labels must be"),
        ({"q": (2, 5, 4, 4), "mask": np.equal, "query_labels": np.ones((2, 5), int)}, "key_labels are needed"),
        ({"implementation": "library", "mask": np.equal}, "not offered"),
        ({"implementation": "chunked"}, "not offered"),
        ({"implementation": "library", "activation": "relu2"}, "not offered"),
        ({"implementation": "library", "slopes": np.zeros(4)}, "not offered"),
        ({"implementation": "library", "v": (2, 6, 2, 5)}, "not offered"),
        ({"implementation": "library", "query_offset": 1}, "not offered"),
        ({"implementation": "splash", "query_offset": 1}, "not offered"),
        ({"implementation": "splash", "slopes": np.zeros(4)}, "not offered"),
        ({"implementation": "splash", "mask": np.equal}, "not offered"),
        ({"implementation": "splash", "q": (2, 5, 4, 4)}, "not offered"),
        ({"implementation": "splash", "segment_ids": IDS, "key_segment_ids": 2 * IDS}, "not offered"),
    ],
)
def test_errors(options, message):
    options = dict(options)
    shapes = {"q": (2, 6, 4, 4), "k": (2, 6, 2, 4), "v": (2, 6, 2, 4)}
    arrays = [np.zeros(options.pop(name, shape), np.float32) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **options)


def test_a_maximum_that_was_rounded_otherwise():
    """The exponential of a difference that rounding makes positive is 1, and has the gradient of one that is 0."""
    s, top = jnp.array([600.0, 0.0, -1.0]), jnp.zeros(1)
    value, gradient = exp_below(s, top), jax.grad(lambda s: jnp.sum(exp_below(s, top)))(s)
    assert jnp.allclose(value, jnp.exp(jnp.array([0.0, 0.0, -1.0]))) and jnp.allclose(gradient, value)

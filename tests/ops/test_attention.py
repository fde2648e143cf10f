import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.attention import attention

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


def oracle(q, k, v, dy, mask, *, activation="softmax", causal=True, scale=None, slopes=None, offset=0):
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
        s = scale * q[b, :, h] @ k[b, :, g].T
        if slopes is not None:
            s = s - float(slopes[h]) * distance
        dp = dy[b, :, h] @ v[b, :, g].T
        if activation == "softmax":
            top = np.max(np.where(mask[b], s, -np.inf), axis=1, keepdims=True)
            e = np.where(mask[b], np.exp(np.minimum(s - np.where(np.isfinite(top), top, 0), 0)), 0)
            p = e / np.maximum(e.sum(1, keepdims=True), 1e-300)
            ds = p * (dp - (p * dp).sum(1, keepdims=True))
        elif activation == "relu2":
            p, slope = np.maximum(s, 0) ** 2, 2 * np.maximum(s, 0)
            p, ds = p * mask[b], slope * mask[b] * dp
        else:
            z = (s - math.sqrt(0.5)) * math.sqrt(2 * math.pi)
            p, slope = 0.5 * (1 + np.vectorize(math.erf)(z)), math.sqrt(2) * np.exp(-z * z)
            p, ds = p * mask[b], slope * mask[b] * dp
        y[b, :, h] = p @ v[b, :, g]
        dq[b, :, h] = scale * ds @ k[b, :, g]
        dk[b, :, g] += scale * ds.T @ q[b, :, h]
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
    "slopes": ((2, 19, 19, 4, 2, 4, 4), {"slopes": SLOPES, "segments": PACKED[:, :19]}),
    "slopes both ways": ((1, 19, 19, 4, 4, 4, 4), {"slopes": SLOPES, "causal": False}),
    "relu2": ((2, 23, 23, 4, 2, 3, 5), {"activation": "relu2", "segments": PACKED, "slopes": SLOPES}),
    "relu2 both ways, window": ((1, 19, 19, 2, 2, 4, 4), {"activation": "relu2", "causal": False, "window": 6}),
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
def results(name):
    """What the oracle gives for a case, and what the implementations give."""
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

    actual = {
        "reference": compute("reference", np.int32(offset), q, k, v, slopes, dy),
        "traced offset": compute("blockwise", np.int32(offset), q, k, v, slopes, dy),
        "blockwise": jax.jit(functools.partial(compute.__wrapped__, "blockwise", offset))(q, k, v, slopes, dy),
    }
    return expected, actual


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "traced offset"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation):
    expected, actual = results(name)
    actual = actual[implementation]
    if actual[-1] is None:
        actual, expected = actual[:-1], expected[:-1]
    assert_close(actual, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_windows_at_the_edges_of_blocks(causal):
    windows = (1, 2, 7, 8, 9, 15, 16, 17, 40)
    q, k, v, dy = inputs(1, 24, 24, 1, 1, 4, 4)

    @jax.jit
    def compute(q, k, v):
        return [attention(q, k, v, causal=causal, window=w, block_size=8, implementation="blockwise") for w in windows]

    for window, y in zip(windows, compute(q, k, v), strict=True):
        mask = mask_of(1, 24, 24, causal=causal, window=window)
        assert_close([y], oracle(q, k, v, dy, mask, causal=causal)[:1])


def jaxprs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from jaxprs(inner)


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
    lengths = [e.params["length"] for x in jaxprs(jaxpr) for e in x.eqns if e.primitive.name == "scan"]
    assert lengths == [active, active]  # forward and backward


@pytest.mark.parametrize("options", [{}, {"activation": "relu2"}, {"offset": jnp.int32(0)}])
def test_memory_is_linear_in_the_length(options):
    def largest(length):
        jaxpr = gradient_jaxpr(length, length, implementation="auto", block_size=64, **options)
        return max(math.prod(v.aval.shape) for x in jaxprs(jaxpr) for e in x.eqns for v in e.outvars)

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


def test_the_run_wide_choice_is_obeyed_where_it_is_offered():
    def primitives(**options):
        shape = jax.ShapeDtypeStruct((1, 16, 1, 4), jnp.float32)
        jaxpr = jax.make_jaxpr(functools.partial(attention, block_size=8, **options))(shape, shape, shape).jaxpr
        return {e.primitive.name for x in jaxprs(jaxpr) for e in x.eqns}

    assert "scan" in primitives()
    with dispatch.implementation("reference"):
        assert "scan" not in primitives()
        assert "scan" in primitives(implementation="blockwise")
    with dispatch.implementation("library"):
        assert "scan" not in primitives()
        assert "scan" in primitives(activation="relu2")
    with dispatch.implementation("chunked"):
        assert "scan" in primitives()


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
        ({"implementation": "chunked"}, "not offered"),
        ({"implementation": "library", "activation": "relu2"}, "not offered"),
        ({"implementation": "library", "slopes": np.zeros(4)}, "not offered"),
        ({"implementation": "library", "v": (2, 6, 2, 5)}, "not offered"),
        ({"implementation": "library", "query_offset": 1}, "not offered"),
    ],
)
def test_errors(options, message):
    options = dict(options)
    shapes = {"q": (2, 6, 4, 4), "k": (2, 6, 2, 4), "v": (2, 6, 2, 4)}
    arrays = [np.zeros(options.pop(name, shape), np.float32) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **options)

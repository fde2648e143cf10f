"""Linear attention: values against a numpy loop, gradients against its complex-step derivatives and the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import chunks, dispatch
from ops.linear_attention import linear_attention
from tests.traced import equations

B, T, H, K, V = 2, 37, 2, 3, 5
CHUNK = 16  # of the chunked form in these tests: three chunks, two levels of halving
SCALE = 0.7
FORMS = ("reference", "sequential", "chunked")
NAMES = ("q", "k", "v", "log_decay", "bonus", "initial_state")

# Boundaries inside a chunk, on its edge (16, 32), documents of one token, padding inside a row and at both ends.
SEGMENTS = np.array(
    [
        [1] * 5 + [2] * 11 + [3] * 1 + [4] * 10 + [0] * 3 + [5] * 7,
        [7] * 20 + [8] * 12 + [9] * 1 + [0] * 4,
    ]
)

LOG_DECAYS = {
    "mild": lambda r, shape: -np.log1p(np.exp(-r.standard_normal(shape) - 3)),
    "zero": lambda r, shape: np.zeros(shape),
    "-20": lambda r, shape: np.full(shape, -20.0),
    "-50": lambda r, shape: np.full(shape, -50.0),
    "spikes": lambda r, shape: np.where(r.random(shape) < 0.2, -50.0, -1e-3),
    "forget": lambda r, shape: np.where(r.random(shape) < 0.2, -np.inf, -0.1),
}
DECAY_SHAPES = {"none": None, "H": (H,), "BTH": (B, T, H), "BTHK": (B, T, H, K)}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def example(decay, kind="mild", bonus=False, length=T, seed=0):
    """Random inputs in float64; None where there is no decay or no bonus."""
    r = np.random.default_rng(seed)
    shape = DECAY_SHAPES[decay]
    if shape is not None and len(shape) > 1:
        shape = (B, length) + shape[2:]
    return {
        "q": r.standard_normal((B, length, H, K)),
        "k": r.standard_normal((B, length, H, K)),
        "v": r.standard_normal((B, length, H, V)),
        "log_decay": None if shape is None else LOG_DECAYS[kind](r, shape),
        "bonus": r.standard_normal((H, K)) if bonus else None,
        "initial_state": r.standard_normal((B, H, K, V)),
    }


def oracle(q, k, v, log_decay, bonus, initial_state, segment_ids=None):
    """The equations, one token of one head at a time. Complex inputs give complex-step derivatives."""
    length = q.shape[1]
    g = np.zeros((1, 1, 1, 1)) if log_decay is None else log_decay
    g = np.broadcast_to(g[..., None] if g.ndim < 4 else g, (B, length, H, K))
    y, final = np.zeros(v.shape, q.dtype), np.zeros(initial_state.shape, q.dtype)
    for b in range(B):
        for h in range(H):
            S = initial_state[b, h]
            for t in range(length):
                padding = segment_ids is not None and segment_ids[b, t] == 0
                if segment_ids is not None and t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]:
                    S = np.zeros_like(S)
                if padding:
                    continue
                write = np.outer(k[b, t, h], v[b, t, h])
                before, S = S, np.exp(g[b, t, h])[:, None] * S + write
                read = S if bonus is None else before + bonus[h][:, None] * write
                y[b, t, h] = SCALE * (q[b, t, h] @ read)
            final[b, h] = S
    return y, final


def apply(form, inputs, segment_ids=None, chunk_size=CHUNK):
    """The op on a dict of inputs."""
    q, k, v, log_decay, bonus, initial_state = (inputs[name] for name in NAMES)
    options = dict(bonus=bonus, initial_state=initial_state, segment_ids=segment_ids, scale=SCALE)
    return linear_attention(q, k, v, log_decay, implementation=form, chunk_size=chunk_size, **options)


@functools.partial(jax.jit, static_argnames="forms")
def with_gradients(forms, inputs, cotangents, segment_ids=None):
    """For each form: outputs, final state and the gradients of all inputs."""
    results = {}
    for form in forms:
        outputs, pull = jax.vjp(lambda x, form=form: apply(form, x, segment_ids), inputs)
        results[form] = (outputs, pull(cotangents)[0])
    return results


def cotangents_like(inputs, seed=1):
    r = np.random.default_rng(seed)
    return r.standard_normal(inputs["v"].shape), r.standard_normal(inputs["initial_state"].shape)


def assert_close(actual, expected, tolerance):
    """Every leaf finite and equal up to `tolerance` times the largest entry of the expected leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.all(np.isfinite(a)), path
        error, largest = np.max(np.abs(a - e)), np.max(np.abs(e))
        assert error <= tolerance * max(largest, 1e-30), (jax.tree_util.keystr(path), error, largest)


CASES = [
    ("none", False, None),
    ("none", True, SEGMENTS),
    ("H", False, SEGMENTS),
    ("H", True, None),
    ("BTH", False, None),
    ("BTH", True, SEGMENTS),
    ("BTHK", False, None),
    ("BTHK", True, SEGMENTS),
]


@pytest.mark.parametrize(
    ("decay", "bonus", "segments"), CASES, ids=lambda x: "packed" if isinstance(x, np.ndarray) else str(x)
)
def test_values_and_all_gradients(decay, bonus, segments, x64):
    for kind in LOG_DECAYS:
        if decay == "none" and kind != "zero":
            continue
        inputs = example(decay, kind, bonus)
        cotangents = cotangents_like(inputs)
        results = with_gradients(FORMS, inputs, cotangents, segments)

        outputs, gradients = results["reference"]
        assert_close(outputs, oracle(**inputs, segment_ids=segments), 1e-13)
        if kind in ("mild", "spikes", "zero"):
            r = np.random.default_rng(2)
            direction = {n: None if x is None else r.standard_normal(x.shape) for n, x in inputs.items()}
            moved = {n: None if x is None else x + 1e-30j * direction[n] for n, x in inputs.items()}
            slope = sum(
                np.sum(c * o.imag / 1e-30)
                for c, o in zip(cotangents, oracle(**moved, segment_ids=segments), strict=True)
            )
            inner = sum(np.sum(d * gradients[n]) for n, d in direction.items() if d is not None)
            np.testing.assert_allclose(inner, slope, rtol=1e-11)

        assert_close(results["sequential"], results["reference"], 1e-12)
        assert_close(results["chunked"], results["reference"], 1e-12)


@pytest.mark.parametrize(("decay", "bonus"), [("BTH", False), ("BTHK", True)])
def test_all_chunks_at_once(decay, bonus, x64):
    """What GPUs and TPUs run."""
    run = jax.jit(lambda *x: with_gradients.__wrapped__(("reference", "chunked"), *x))
    for kind in ("mild", "spikes"):
        inputs = example(decay, kind, bonus)
        with dispatch.platform("tpu"):
            results = run(inputs, cotangents_like(inputs), SEGMENTS)
        assert_close(results["chunked"], results["reference"], 1e-12)


@pytest.mark.parametrize(
    ("decay", "bonus", "segments"),
    [("BTH", True, SEGMENTS), ("BTHK", True, SEGMENTS), pytest.param("H", False, None, marks=pytest.mark.thorough)],
)
def test_kernel(decay, bonus, segments):
    """The TPU's kernel, interpreted, in float32 beside the reference in float64; three chunks, the first of them filled up."""
    inputs, cotangents = {}, {}
    for kind in ("mild", "zero", "-20", "spikes", "forget"):
        inputs[kind] = example(decay, kind, bonus)
        cotangents[kind] = cotangents_like(inputs[kind])
    with jax.enable_x64(True):
        expected = {kind: with_gradients(("reference",), x, cotangents[kind], segments) for kind, x in inputs.items()}
    single = lambda tree: jax.tree.map(lambda x: x.astype(np.float32), tree)
    for kind, x in inputs.items():
        actual = with_gradients(("pallas",), single(x), single(cotangents[kind]), segments)["pallas"]
        assert actual[0][0].dtype == jnp.float32
        # Differences of sums of log-decays are rounded as the sums are, here up to 16 x 110.
        assert_close(actual, expected[kind]["reference"], 1e-5 if kind in ("mild", "zero") else 1e-4)


def test_what_a_tpu_takes():
    """The kernel, for whole chunks, of a type that it knows and heads that fit into a core's memory."""

    def taken(decay, length, dtype, size=4, heads=2, of_values=None):
        shape = lambda *rest: jax.ShapeDtypeStruct((1, length, heads, *rest), dtype)
        with dispatch.platform("tpu"), dispatch.implementation("auto") as choice:
            jax.eval_shape(linear_attention, shape(size), shape(size), shape(of_values or size), shape(*decay))
        return choice.taken["linear_attention"]

    assert taken((), 128, jnp.float32) == taken((4,), 200, jnp.bfloat16) == {"pallas"}
    assert taken((), 64, jnp.float32) == taken((), 128, jnp.float32, size=520) == {"chunked"}
    assert taken((), 128, jnp.bfloat16, 96, 4, 192) == {"pallas"}  # GLA at width 768
    assert taken((), 128, jnp.bfloat16, 100, 4, 200) == {"chunked"}
    with jax.enable_x64(True):
        assert taken((), 128, jnp.float64) == {"chunked"}


@pytest.mark.parametrize("length", [1, 5])
def test_shorter_than_a_chunk(length, x64):
    inputs = example("BTHK", bonus=True, length=length)
    results = with_gradients(FORMS, inputs, cotangents_like(inputs))
    assert_close(results["reference"][0], oracle(**inputs), 1e-13)
    for form in FORMS[1:]:
        assert_close(results[form], results["reference"], 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_cut_anywhere(form, x64):
    inputs = example("BTHK", bonus=True)
    along_time = ("q", "k", "v", "log_decay")
    run = jax.jit(functools.partial(apply, form, chunk_size=4))
    whole = run(inputs, SEGMENTS)
    for cut in (1, 16, 21):
        first = run(inputs | {n: inputs[n][:, :cut] for n in along_time}, SEGMENTS[:, :cut])
        # A state belongs to the segment of the token that follows.
        continues = (SEGMENTS[:, cut - 1] == SEGMENTS[:, cut])[:, None, None, None]
        rest = inputs | {n: inputs[n][:, cut:] for n in along_time}
        second = run(rest | {"initial_state": jnp.where(continues, first[1], 0)}, SEGMENTS[:, cut:])
        assert_close((np.concatenate([first[0], second[0]], 1), second[1]), whole, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_equal_separate_ones(form, x64):
    inputs = example("BTH", "spikes", bonus=True, length=36) | {"initial_state": None}
    run = jax.jit(functools.partial(apply, form, chunk_size=8))
    y, final = run(inputs, np.repeat([[1, 2, 3]], 12, axis=1) * np.ones((B, 1), int))
    alone = {n: inputs[n].reshape(B * 3, 12, *inputs[n].shape[2:]) for n in ("q", "k", "v", "log_decay")}
    y_alone, final_alone = run(inputs | alone)
    assert_close((y, final), (y_alone.reshape(y.shape), final_alone[2::3]), 1e-13)


@pytest.mark.parametrize("decay", ["BTH", "BTHK"])
def test_padding_is_neither_read_nor_written(decay, x64):
    clean = example(decay, bonus=True)
    padding = SEGMENTS == 0
    dirty = dict(clean)
    for name in ("q", "k", "v", "log_decay"):
        dirty[name] = np.where(padding.reshape(padding.shape + (1,) * (clean[name].ndim - 2)), np.nan, clean[name])
    cotangents = cotangents_like(clean)
    expected = with_gradients(FORMS, clean, cotangents, SEGMENTS)
    actual = with_gradients(FORMS, dirty, cotangents, SEGMENTS)
    assert_close(actual, expected, 0)
    for (y, _), gradients in actual.values():
        assert not np.any(y[padding])
        for name in ("q", "k", "v", "log_decay"):
            assert not np.any(gradients[name][padding]), name


def test_padding_first_then_a_document(x64):
    """Left padding, as prompts have it; the state that comes in is empty."""
    inputs = example("BTHK", bonus=True) | {"initial_state": np.zeros((B, H, K, V))}
    segments = np.where(np.arange(T) < 18, 0, 1) * np.ones((B, 1), int)
    results = with_gradients(FORMS, inputs, cotangents_like(inputs), segments)
    assert_close(results["reference"][0], oracle(**inputs, segment_ids=segments), 1e-13)
    for form in FORMS[1:]:
        assert_close(results[form], results["reference"], 1e-12)


@pytest.mark.parametrize("decay", ["BTH", "BTHK"])
def test_float32_gradients_of_the_decay(decay):
    """Relative to themselves where the decay is even, however strong; tiny beside those of q where it is mixed."""
    norm = lambda x: np.linalg.norm(np.ravel(np.asarray(x, np.float64)))
    for kind in ("mild", "zero", "-20", "-50", "spikes"):
        inputs = example(decay, kind, bonus=True)
        cotangents = cotangents_like(inputs)
        with jax.enable_x64(True):
            exact = jax.tree.map(np.asarray, with_gradients(FORMS, inputs, cotangents, SEGMENTS)["reference"][1])
        inputs, cotangents = jax.tree.map(np.float32, (inputs, cotangents))
        results = with_gradients(FORMS, inputs, cotangents, SEGMENTS)
        for form in ("sequential", "chunked"):
            gradients = results[form][1]
            error = {n: norm(np.asarray(gradients[n], np.float64) - exact[n]) for n in NAMES}
            for name in ("q", "k", "v", "bonus", "initial_state"):
                assert error[name] <= 3e-6 * norm(exact[name]), (form, kind, name)
            assert error["log_decay"] <= 1e-6 * norm(exact["q"]), (form, kind)
            if kind != "spikes":
                assert error["log_decay"] <= 1e-5 * norm(exact["log_decay"]), (form, kind)


def test_bfloat16():
    inputs = example("BTHK", bonus=True)
    rounded = {n: jnp.asarray(x, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, x in inputs.items()}
    dy, dstate = cotangents_like(inputs)
    dy, dstate = jnp.asarray(dy, jnp.bfloat16), np.float32(dstate)
    actual = with_gradients(FORMS, rounded, (dy, dstate), SEGMENTS)
    widened = {n: np.asarray(x, np.float32) for n, x in rounded.items()}
    expected = with_gradients(FORMS, widened, (np.asarray(dy, np.float32), dstate), SEGMENTS)
    assert_close(actual, expected, 1e-2)
    for (y, state), gradients in actual.values():
        assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
        assert {n: x.dtype for n, x in gradients.items()} == {n: x.dtype for n, x in rounded.items()}


@pytest.mark.parametrize("form", ["sequential", "chunked"])
@pytest.mark.parametrize("decay", ["H", "BTHK"])
def test_memory_grows_linearly(form, decay):
    """No array of the forward or the backward pass is as large as [T, T] or [T, K, V]."""
    length, size = 1024, 16
    x = jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32)
    g = jax.ShapeDtypeStruct((1,), jnp.float32) if decay == "H" else x

    def loss(q, k, v, g):
        y, state = linear_attention(q, k, v, g, implementation=form, chunk_size=32)
        return jnp.sum(y) + jnp.sum(state)

    gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, x, x, g).jaxpr
    shapes = [x.aval.shape for equation in equations(gradient) for x in equation.outvars]
    assert (size, size) in [shape[-2:] for shape in shapes]  # the loops were looked into
    assert max(np.prod(shape) for shape in shapes) <= 2 * length * size


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strict", [False, True])
def test_decayed_scores(channels, strict):
    r = np.random.default_rng(0)
    a, b = r.standard_normal((2, 2, 3, 16, 3))
    g = LOG_DECAYS["spikes"](r, (2, 1, 16, channels))
    G = np.cumsum(g, axis=-2)
    expected = np.zeros((2, 3, 16, 16))
    for i in range(16):
        for j in range(i if strict else i + 1):
            expected[..., i, j] = np.sum(a[..., i, :] * b[..., j, :] * np.exp(G[..., i, :] - G[..., j, :]), -1)
    run = jax.jit(lambda a, b, g: chunks.decayed_scores(a, b, chunks.cumulative(g), strict=strict))
    assert_close(run(*np.float32((a, b)), np.float32(g)), expected, 1e-6)


@pytest.mark.usefixtures("unchecked")
def test_errors_at_the_door():
    x = jnp.zeros((2, 4, 2, 3))
    for arguments, options, message in (
        ((x, x[:, :2], x), {}, "need q, k"),
        ((x, x, x[:, :, :1]), {}, "need q, k"),
        ((x, x, x, jnp.zeros(3)), {}, "log_decay must be"),
        ((x, x, x, jnp.zeros((2, 4, 2, 1))), {}, "log_decay must be"),
        ((x, x, x), dict(bonus=jnp.zeros(3)), "bonus must have"),
        ((x, x, x), dict(initial_state=jnp.zeros((2, 2, 3, 4))), "initial_state must have"),
        ((x, x, x), dict(segment_ids=jnp.ones((2, 3), int)), "segment_ids must have"),
        ((x, x, x), dict(implementation="associative"), "not offered"),
        ((x, x, x), dict(implementation="chunked", chunk_size=48), "power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_attention(*arguments, **options)

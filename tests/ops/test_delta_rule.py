"""The delta rule: the reference against a numpy loop, the fast forms against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import delta_rule as module
from ops import dispatch, pallas_chunks
from ops.delta_rule import delta_rule

B, T, H, K, V = 2, 41, 2, 5, 3
CHUNK = 16  # three chunks: the inverse is merged once, the scores are halved twice
SCALE = 0.7
KINDS = ("beta", "ab")

# Boundaries inside a chunk and on its edge (16, 32), documents of one token, padding inside a row and at both ends.
SEGMENTS = np.array(
    [
        [1] * 5 + [2] * 11 + [3] + [4] * 10 + [0] * 3 + [5] * 11,
        [0] * 2 + [7] * 20 + [8] * 10 + [9] + [0] * 8,
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
DECAY_SHAPES = {"none": None, "head": (H,), "channel": (H, K)}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Two chunks to a group, so that three chunks fill one group and half of another."""
    monkeypatch.setattr(module, "_GROUP", 2)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def example(kind, decay="channel", log_decay="mild", length=T, seed=0):
    """Random inputs in float64, and cotangents of y and of the final state."""
    r = np.random.default_rng(seed)
    x = {
        "q": r.standard_normal((B, length, H, K)),
        "k": unit(r.standard_normal((B, length, H, K))),
        "v": r.standard_normal((B, length, H, V)),
        "initial_state": r.standard_normal((B, H, K, V)),
    }
    if kind == "beta":
        x["beta"] = 1.9 * r.random((B, length, H))
    else:
        x["b"] = unit(r.standard_normal((B, length, H, K)))
        x["a"] = -x["b"] * r.random((B, length, H, K))
    if DECAY_SHAPES[decay] is not None:
        x["log_decay"] = LOG_DECAYS[log_decay](r, (B, length, *DECAY_SHAPES[decay]))
    return x, (r.standard_normal((B, length, H, V)), r.standard_normal((B, H, K, V)))


def oracle(x, segment_ids=None):
    """The definitions, one token of one head at a time. Complex inputs give complex-step derivatives."""
    q, k, v = x["q"], x["k"], x["v"]
    g = x.get("log_decay", np.zeros(q.shape))
    g = np.broadcast_to(g[..., None] if g.ndim == 3 else g, q.shape)
    dtype = np.result_type(*x.values())
    y, final = np.zeros(v.shape, dtype), np.zeros((q.shape[0], *q.shape[2:], v.shape[-1]), dtype)
    for i in range(q.shape[0]):
        for h in range(q.shape[2]):
            S = x["initial_state"][i, h]
            for t in range(q.shape[1]):
                if segment_ids is not None and t > 0 and segment_ids[i, t] != segment_ids[i, t - 1]:
                    S = np.zeros_like(S)
                if segment_ids is not None and segment_ids[i, t] == 0:
                    continue
                if "beta" in x:
                    S = np.diag(np.exp(g[i, t, h])) @ S
                    S = S + x["beta"][i, t, h] * np.outer(k[i, t, h], v[i, t, h] - S.T @ k[i, t, h])
                else:
                    transition = np.diag(np.exp(g[i, t, h])) + np.outer(x["a"][i, t, h], x["b"][i, t, h])
                    S = transition @ S + np.outer(k[i, t, h], v[i, t, h])
                y[i, t, h] = SCALE * (S.T @ q[i, t, h])
            final[i, h] = S
    return y, final


@functools.partial(jax.jit, static_argnums=(0, 4))
def _outputs_and_gradients(form, x, cotangents, segment_ids, chunk):
    def f(x):
        implementation = "chunked" if form == "grouped" else form
        return delta_rule(**x, scale=SCALE, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk)

    (y, state), vjp = jax.vjp(f, x)
    cotangents = cotangents[0].astype(y.dtype), cotangents[1].astype(state.dtype)
    return {"y": y, "state": state} | {"d" + name: dx for name, dx in vjp(cotangents)[0].items()}


def run(form, x, cotangents, segment_ids=None, dtype=np.float64, chunk=CHUNK):
    """y, the final state and all gradients of a form; "grouped" is the chunked form as it runs on an accelerator."""
    cast = functools.partial(jax.tree.map, lambda z: jnp.asarray(z, dtype))
    with dispatch.platform("tpu" if form == "grouped" else "cpu"):
        return _outputs_and_gradients(form, cast(x), cast(cotangents), segment_ids, chunk)


def error(actual, expected):
    """Norm of the error relative to the norm of what is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.linalg.norm(expected)
    return np.linalg.norm(actual - expected) / (scale if scale > 0 else 1)


def assert_close(actual, expected, tolerance):
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_definition(kind, x64):
    h = 1e-30
    for decay, log_decay, segment_ids in (("none", "", None), ("head", "mild", SEGMENTS), ("channel", "-20", SEGMENTS)):
        x, cotangents = example(kind, decay, log_decay)
        result = run("reference", x, cotangents, segment_ids)
        y, state = oracle(x, segment_ids)
        assert_close(result, {"y": y, "state": state}, 1e-13)
        for name in x:  # the derivative along one random direction
            direction = np.random.default_rng(1).standard_normal(x[name].shape)
            y, state = oracle(x | {name: x[name] + 1j * h * direction}, segment_ids)
            expected = (np.sum(y.imag * cotangents[0]) + np.sum(state.imag * cotangents[1])) / h
            actual = np.sum(np.asarray(result["d" + name]) * direction)
            np.testing.assert_allclose(actual, expected, rtol=1e-11, err_msg=name)


@pytest.mark.parametrize("decay", DECAY_SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forms_agree_in_float64(kind, decay, x64):
    """To rounding, the gradient of a strong decay included, which is e^-50 times as large as the other gradients."""
    segment_ids = None if decay == "none" else SEGMENTS
    for log_decay in ("mild", "zero", "-20", "-50", "spikes", "forget"):
        x, cotangents = example(kind, decay, log_decay)
        expected = run("reference", x, cotangents, segment_ids)
        for form in ("sequential", "grouped" if decay == "head" else "chunked"):
            assert_close(run(form, x, cotangents, segment_ids), expected, 1e-12)
        if decay == "none":
            break


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_forms_in_float32(kind):
    for log_decay in ("mild", "-20", "-50", "spikes", "forget"):
        x, cotangents = example(kind, "channel", log_decay)
        x = {name: z.astype(np.float32) for name, z in x.items()}
        with jax.enable_x64(True):
            expected = run("reference", x, cotangents, SEGMENTS)
        for form in ("sequential", "chunked"):
            assert_close(run(form, x, cotangents, SEGMENTS, dtype=np.float32), expected, 1e-5)


@pytest.mark.parametrize(("decay", "heads"), (("head", 1), ("channel", 2)))
def test_kernel(decay, heads, monkeypatch):
    """The TPU's kernel, interpreted, in float32 beside the reference in float64; three chunks, the first of them filled up."""
    monkeypatch.setattr(pallas_chunks, "LANES", heads)
    assert pallas_chunks.heads_at_once(H, K, V) == heads
    padding = SEGMENTS == 0
    mixed = 5e-5 if decay == "head" else 1e-5  # one float32 has the sums of weak decays behind strong ones of a head
    for log_decay, tolerance in (("mild", 1e-5), ("zero", 1e-5), ("-20", 1e-5), ("spikes", mixed), ("forget", mixed)):
        x, cotangents = example("beta", decay, log_decay)
        x = {name: z.astype(np.float32) for name, z in x.items()}
        with jax.enable_x64(True):
            expected = run("reference", x, cotangents, SEGMENTS)
        for name in set(x) - {"initial_state"}:
            x[name][padding] = np.nan
        assert_close(run("pallas", x, cotangents, SEGMENTS, dtype=np.float32), expected, tolerance)


@pytest.mark.parametrize("beta", (1.0, 1.9))
def test_repeated_keys(beta):
    """The inverse of a chunk's triangle stays accurate where a power series of the triangle loses everything."""
    x, cotangents = example("beta", "none")
    noise = np.random.default_rng(2).standard_normal(x["k"].shape)
    x["k"], x["beta"] = unit(x["k"][:, :1] + 1e-3 * noise), np.full((B, T, H), beta)
    x = {name: z.astype(np.float32) for name, z in x.items()}
    with jax.enable_x64(True):
        expected = run("reference", x, cotangents)
    for form in ("sequential", "chunked", "pallas"):
        assert_close(run(form, x, cotangents, dtype=np.float32, chunk=64), expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_separate_and_padding_is_inert(kind, x64):
    x, cotangents = example(kind)
    padding = SEGMENTS == 0
    poisoned = {name: np.array(z) for name, z in x.items()}
    for name in set(x) - {"initial_state"}:
        poisoned[name][padding] = np.nan
    for form in ("reference", "sequential", "chunked"):
        clean, result = run(form, x, cotangents, SEGMENTS), run(form, poisoned, cotangents, SEGMENTS)
        for name, z in result.items():
            np.testing.assert_array_equal(z, clean[name], err_msg=name)
            if z.shape[:2] == (B, T):
                assert np.all(np.asarray(z)[padding] == 0), name
    for row in range(B):
        edges = np.flatnonzero(np.diff(SEGMENTS[row])) + 1
        for span in np.split(np.arange(T), edges):
            if padding[row, span[0]]:
                continue
            document = {name: z[row : row + 1] for name, z in x.items()}
            document |= {name: z[:, span] for name, z in document.items() if name != "initial_state"}
            if span[0] > 0:
                document["initial_state"] = np.zeros((1, H, K, V))
            np.testing.assert_allclose(result["y"][row, span], oracle(document)[0][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "form"), (("ab", "sequential"), ("ab", "chunked"), ("beta", "chunked")))
def test_a_sequence_can_be_cut_anywhere(kind, form):
    x, _ = example(kind)
    x = {name: jnp.asarray(z, jnp.float32) for name, z in x.items()}
    state = x.pop("initial_state")
    rule = functools.partial(delta_rule, scale=SCALE, implementation=form, chunk_size=CHUNK)

    @jax.jit
    def pieces(x, state, segment_ids):
        results = [rule(**x, initial_state=state, segment_ids=segment_ids)]
        for cut in (16, 29, 40):  # on a chunk's edge, inside padding, before the last token
            first, second = ({name: z[:, s] for name, z in x.items()} for s in (slice(cut), slice(cut, None)))
            left, middle = rule(**first, initial_state=state, segment_ids=segment_ids[:, :cut])
            # The caller clears a state that does not belong to the segment that follows.
            same = segment_ids[:, cut] == segment_ids[:, cut - 1]
            middle = jnp.where(same[:, None, None, None], middle, 0)
            right, end = rule(**second, initial_state=middle, segment_ids=segment_ids[:, cut:])
            results.append((jnp.concatenate([left, right], 1), end))
        return results

    for segment_ids in (np.ones((B, T), int), SEGMENTS):
        (y, final), *others = pieces(x, state, jnp.asarray(segment_ids))
        for other_y, other_final in others:
            assert_close({"y": other_y, "state": other_final}, {"y": y, "state": final}, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_short_sequences(kind, x64):
    """Shorter than a chunk, down to the single step."""
    examples = {length: example(kind, "head", length=length)[0] for length in (1, 2, 7)}

    @jax.jit
    def both(examples):
        rule = functools.partial(delta_rule, scale=SCALE)
        return {
            length: [rule(**x, implementation=form) for form in ("sequential", "chunked")]
            for length, x in examples.items()
        }

    for length, results in both(examples).items():
        y, state = oracle(examples[length])
        for result in results:
            assert_close(dict(zip(("y", "state"), result, strict=True)), {"y": y, "state": state}, 1e-13)


@pytest.mark.parametrize(("kind", "form"), (("ab", "sequential"), ("beta", "chunked"), ("beta", "pallas")))
def test_bfloat16(kind, form):
    x, cotangents = example(kind)
    x, cotangents = jax.tree.map(lambda z: jnp.asarray(z, jnp.bfloat16), (x, cotangents))
    with jax.enable_x64(True):
        expected = run("reference", x, cotangents, SEGMENTS)
    result = run(form, x, cotangents, SEGMENTS, dtype=jnp.bfloat16)
    assert_close(result, expected, 1e-2)
    assert result["state"].dtype == jnp.float32
    assert all(z.dtype == jnp.bfloat16 for name, z in result.items() if name != "state")


@pytest.mark.parametrize("form", ("sequential", "chunked"))
def test_memory_of_training(form):
    """Neither a state per token [B, T, H, K, V] nor scores [T, T]."""
    length, size = 1024, 32
    names = ("q", "k", "v", "a", "b", "log_decay")
    x = {name: jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32) for name in names}
    loss = lambda x: jnp.sum(delta_rule(**x, implementation=form, chunk_size=16)[0] ** 2)
    memory = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * size * size * 4 * 0.75


def test_auto_goes_by_platform_and_size(monkeypatch):
    chosen = []

    def stub(name):
        def f(q, k, v, beta, g, a, b, state, *_):
            chosen.append(name)
            return v, state

        return f

    for name in ("sequential", "chunked"):
        monkeypatch.setattr(module, "_" + name, stub(name))
    for platform in ("cpu", "gpu"):
        for size in (64, 65):
            q = jnp.zeros((1, 2, 1, 64))
            with dispatch.platform(platform):
                delta_rule(q, q, jnp.zeros((1, 2, 1, size)), jnp.zeros((1, 2, 1)))
    assert chosen == ["sequential", "chunked", "chunked", "chunked"]


def test_what_a_tpu_takes():
    """The kernel with beta, for whole chunks, of a type that it knows and heads that fit into a core's memory."""

    def taken(length, dtype, size, *names):
        shape = lambda *rest: jax.ShapeDtypeStruct((1, length, 2, *rest), dtype)
        rest = {name: shape() if name == "beta" else shape(size) for name in names}
        with dispatch.platform("tpu"), dispatch.implementation("auto") as choice:
            jax.eval_shape(delta_rule, shape(size), shape(size), shape(size), **rest)
        return choice.taken["delta_rule"]

    assert taken(128, jnp.float32, 4, "beta") == taken(200, jnp.bfloat16, 4, "beta", "log_decay") == {"pallas"}
    assert taken(64, jnp.float32, 4, "beta") == taken(128, jnp.float32, 4, "a", "b") == {"chunked"}
    assert taken(128, jnp.float32, 520, "beta") == {"chunked"}
    with jax.enable_x64(True):
        assert taken(128, jnp.float64, 4, "beta") == {"chunked"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((B, T, H, K + 1))}, "q and k"),
        ({"v": jnp.zeros((B, T, H + 1, V))}, "q and k"),
        ({"beta": None}, "either beta or both"),
        ({"a": jnp.zeros((B, T, H, K))}, "either beta or both"),
        ({"a": jnp.zeros((B, T, H, K)), "b": jnp.zeros((B, T, H, K))}, "either beta or both"),
        ({"beta": None, "b": jnp.zeros((B, T, H, K))}, "either beta or both"),
        ({"beta": jnp.zeros((B, T, H, 1))}, "beta"),
        ({"log_decay": jnp.zeros((H,))}, "log_decay"),
        ({"initial_state": jnp.zeros((B, H, V, K))}, "initial_state"),
        ({"segment_ids": jnp.zeros((B, T + 1), int)}, "segment_ids"),
        ({"chunk_size": 48}, "chunk_size"),
        ({"implementation": "associative"}, "associative"),
    ],
)
def test_errors_name_the_argument(change, message):
    x = {name: jnp.asarray(z, jnp.float32) for name, z in example("beta")[0].items()}
    with pytest.raises(ValueError, match=message):
        delta_rule(**(x | change))

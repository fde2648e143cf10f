"""The law that every mixer obeys, and what it declares about itself.

    mixer(concat(a, b), c0) == concat(mixer(a, c0) -> c1, mixer(b, c1))

Mixers are collected from `models/mixers/`. What one cannot do, its class attributes say; then the test is that asking
for it is an error.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from ops import dispatch
from tests.tolerance import FLOAT32, assert_close

WIDTH, BATCH, LENGTH = 32, 2, 23
PIECES = (1, 7, 1, 2, 12)
# Two packed rows: documents of several lengths (1 included), then padding; the second row is a single document.
SEGMENTS = np.array([[1] * 9 + [2] + [3] * 10 + [0] * 3, [1] * LENGTH], np.int32)


@functools.lru_cache(maxsize=2)
def build(name: str, causal: bool = True):
    mixer = mixers.create(name, WIDTH, rngs=nnx.Rngs(0), causal=causal, **mixers.find(name).tiny)
    # Some initialisers (gains of zero, tiny scales) would hide errors: move every parameter off its initial value.
    graph, params = nnx.split(mixer)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    return graph, params


def inputs(scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))


def able(capability: str) -> list:
    """One test parameter per mixer that has the capability."""
    return [name for name in mixers.names() if getattr(mixers.find(name), capability)]


def unable(*capabilities: str) -> list:
    return [(n, c) for n in mixers.names() for c in capabilities if not getattr(mixers.find(n), c)]


def forms(name: str) -> list[tuple[bool, ...]]:
    """The values of `causal` with which a mixer can be built (any causal one also two-sided, through the wrapper)."""
    return [True, False] if mixers.find(name).causal else [False]


def in_pieces(mixer, x, carry, segment_ids=None):
    start, outputs = 0, []
    for length in PIECES:
        piece = slice(start, start + length)
        ids = None if segment_ids is None else segment_ids[:, piece]
        y, carry = mixer(x[:, piece], carry, segment_ids=ids)
        outputs.append(y)
        start += length
    assert start == LENGTH
    return jnp.concatenate(outputs, 1), carry


def by_token(mixer, x, carry, segment_ids=None):
    ids = jnp.ones((BATCH, LENGTH), jnp.int32) if segment_ids is None else segment_ids

    def step(carry, token):
        x, ids = token
        y, carry = mixer(x[:, None], carry, segment_ids=None if segment_ids is None else ids[:, None])
        return carry, y[:, 0]

    carry, y = jax.lax.scan(step, carry, (jnp.moveaxis(x, 1, 0), jnp.moveaxis(ids, 1, 0)))
    return jnp.moveaxis(y, 0, 1), carry


@pytest.mark.parametrize("name", able("streaming"))
def test_law(name):
    """Cut anywhere, pieces of length 1 included: the outputs and the final carry are the same."""
    graph, params = build(name)
    packing = mixers.find(name).packing

    @jax.jit
    def run(params, x):
        mixer = nnx.merge(graph, params)
        start = mixer.initial_carry(BATCH, LENGTH)
        results = {
            "whole": mixer(x)[0],
            "one piece": mixer(x, start),
            "pieces": in_pieces(mixer, x, start),
            "tokens": by_token(mixer, x, start),
        }
        if packing:
            results["packed"] = mixer(x, segment_ids=SEGMENTS)[0]
            results["packed pieces"] = in_pieces(mixer, x, start, jnp.asarray(SEGMENTS))
            results["packed tokens"] = by_token(mixer, x, start, jnp.asarray(SEGMENTS))
        return results

    r = run(params, inputs())
    scale = float(jnp.abs(r["whole"]).max())
    assert np.isfinite(scale) and scale > 0
    for form in ("one piece", "pieces", "tokens"):
        assert_close(r[form][0], r["whole"], what=form)
    for other in ("pieces", "tokens"):
        for a, b in zip(jax.tree.leaves(r[other][1]), jax.tree.leaves(r["one piece"][1])):
            assert_close(a, b, what=f"carry after {other}")
    if packing:
        for form in ("packed pieces", "packed tokens"):
            assert_close(r[form][0], r["packed"], what=form)


@pytest.mark.parametrize("name", able("streaming"))
def test_carry_size(name):
    """A constant carry does not depend on the capacity; one that grows does."""
    graph, params = build(name)
    size = lambda capacity: sum(
        a.size
        for a in jax.tree.leaves(jax.eval_shape(lambda p: nnx.merge(graph, p).initial_carry(1, capacity), params))
    )
    assert (size(64) == size(1024)) == mixers.find(name).constant_carry


@pytest.mark.parametrize("name", [name for name in able("streaming") if not mixers.find(name).constant_carry])
def test_overfull_carry(name):
    """A carry that is asked to hold more than its capacity says so with NaN instead of forgetting silently."""
    graph, params = build(name)
    mixer = nnx.merge(graph, params)
    y, carry = mixer(inputs()[:, :3], mixer.initial_carry(BATCH, 4))
    assert np.isfinite(y).all()
    y, carry = mixer(inputs()[:, 3:4], carry)
    assert np.isfinite(y).all()
    y, _ = mixer(inputs()[:, 4:5], carry)
    assert np.isnan(y).all()


@pytest.mark.parametrize("name,causal", [(n, c) for n in able("packing") for c in forms(n)])
def test_packing_and_padding(name, causal):
    """A packed row gives the separate documents' outputs; padding, even NaN, enters neither outputs nor gradients."""
    graph, params = build(name, causal)
    x = np.array(inputs())
    x[SEGMENTS == 0] = np.nan
    weight = jax.random.normal(jax.random.key(3), x.shape)

    @jax.jit
    def run(params, x):
        def objective(params, x):
            y, _ = nnx.merge(graph, params)(x, segment_ids=SEGMENTS)
            return jnp.sum(y * weight), y

        (_, y), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, x)
        mixer = nnx.merge(graph, params)
        documents = [mixer(x[:1, SEGMENTS[0] == i])[0] for i in (1, 2, 3)]
        return y, gradients, documents, mixer(x[1:])[0]

    y, gradients, documents, single = run(params, x)
    for i, document in enumerate(documents, 1):
        assert_close(y[:1, SEGMENTS[0] == i], document, what=f"document {i}")
    assert_close(y[1:], single, what="unpadded row")
    assert not np.asarray(y[SEGMENTS == 0]).any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert not np.asarray(gradients[1][SEGMENTS == 0]).any()


@pytest.mark.parametrize("name,causal", [(n, c) for n in mixers.names() for c in forms(n)])
def test_dependence(name, causal):
    """Causal: y_t depends on x_1..x_t and on nothing later. Two-sided: on both sides."""
    graph, params = build(name, causal)
    t = LENGTH // 2

    @jax.jit
    def influence(params, x):
        y = lambda x: nnx.merge(graph, params)(x)[0][:, t]
        _, pullback = jax.vjp(y, x)
        return jnp.abs(pullback(jax.random.normal(jax.random.key(4), (BATCH, WIDTH)))[0]).sum((0, 2))

    found = np.asarray(influence(params, inputs()))
    assert found[t] > 0 and found[t - 1] > 0
    if causal:
        assert found[t + 1 :].max() <= FLOAT32 * found.max()  # transforms leave rounding errors everywhere
    else:
        assert found[t + 1] > 0


@pytest.mark.parametrize("name", able("causal"))
def test_implementations_agree(name):
    """The forms of the primitives are the same function, gradients included."""
    graph, params = build(name)
    segment_ids = SEGMENTS if mixers.find(name).packing else None
    weight = jax.random.normal(jax.random.key(3), (BATCH, LENGTH, WIDTH))

    def run(params, x):
        return jnp.sum(nnx.merge(graph, params)(x, segment_ids=segment_ids)[0] * weight)

    expected = None
    for implementation in ("reference", "sequential", "chunked"):
        with dispatch.implementation(implementation):
            found = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(params, inputs())
        found = jnp.concatenate([g.ravel() / (1e-30 + jnp.abs(g).max()) for g in jax.tree.leaves(found)])
        expected = found if expected is None else expected
        assert_close(found, expected, 1e-4, what=implementation)


@pytest.mark.parametrize("name,causal", [(n, c) for n in mixers.names() for c in forms(n)])
def test_bfloat16(name, causal):
    """Outputs and gradients are finite in bfloat16 at two input scales, and close to float32's at the first."""
    graph, params = build(name, causal)
    low = jax.tree.map(
        lambda p: p.replace(p[...] if p.get_metadata()["keep_float32"] else p[...].astype(jnp.bfloat16)),
        params,
        is_leaf=lambda p: isinstance(p, nnx.Variable),
    )

    @jax.jit
    def run(params, x):
        def objective(params, x):
            y, _ = nnx.merge(graph, params)(x)
            return jnp.sum(y.astype(jnp.float32)), y

        (_, y), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, x)
        return y, gradients

    for scale in (1.0, 100.0):
        y, gradients = run(low, inputs(scale).astype(jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        for leaf in jax.tree.leaves((y, gradients)):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
        if scale == 1.0:
            assert_close(y.astype(jnp.float32), run(params, inputs())[0], 0.1)


def test_refusals():
    """Asking for what is not there names the mixer and the capability."""
    x = jnp.zeros((1, 4, WIDTH))
    for name, capability in unable("streaming", "packing"):
        graph, params = build(name, causal=mixers.find(name).causal)
        mixer = nnx.merge(graph, params)
        with pytest.raises(ValueError, match=f"{name}.*{capability}"):
            if capability == "streaming":
                mixer.initial_carry(1, 4)
            else:
                mixer(x, segment_ids=jnp.ones((1, 4), jnp.int32))
    for name, _ in unable("causal"):
        with pytest.raises(ValueError, match=f"{name}.*not causal"):
            mixers.create(name, WIDTH, rngs=nnx.Rngs(0))
    for name in mixers.names():
        graph, params = build(name, causal=False)
        with pytest.raises(ValueError, match="causal=True"):
            mixer = nnx.merge(graph, params)
            mixer(x, {"segment": jnp.zeros(1, jnp.int32)}) if isinstance(
                mixer, mixers.Bidirectional
            ) else mixer.initial_carry(1, 4)


def test_declared_lacks_are_refused(monkeypatch):
    """A mixer that declares that it lacks something is not asked for it, whatever its equations would do."""
    graph, params = build("gla")
    for capability, call in (
        ("packing", lambda mixer, x: mixer(x, segment_ids=jnp.ones((1, 4), jnp.int32))),
        ("streaming", lambda mixer, x: mixer.initial_carry(1, 4)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(mixers.find("gla"), capability, False)
            with pytest.raises(ValueError, match=f"'gla' has {capability}=False"):
                call(nnx.merge(graph, params), jnp.zeros((1, 4, WIDTH)))
    monkeypatch.setattr(mixers.find("gla"), "causal", False)
    with pytest.raises(ValueError, match="'gla' is not causal"):
        mixers.create("gla", WIDTH, rngs=nnx.Rngs(0))


def test_finding():
    """Unknown mixers and hyperparameters are errors that name the near ones."""
    with pytest.raises(ValueError, match="mamba"):
        mixers.find("mambo")
    with pytest.raises(ValueError, match="did you mean 'state'"):
        mixers.create("mamba", WIDTH, rngs=nnx.Rngs(0), sate=4)
    with pytest.raises(ValueError, match="heads"):
        mixers.create("attention", 30, rngs=nnx.Rngs(0), heads=4)


@pytest.mark.parametrize("name", mixers.names())
def test_declaration(name):
    """Every mixer says where it comes from, and its defaults are complete and typed."""
    cls = mixers.find(name)
    assert "arXiv" in cls.paper and cls.primitive and cls.complexity and cls.__doc__
    config = mixers.defaults(name)
    for key, value in config.items():
        kind = config.get_type(key)
        assert kind in (int, float, bool, str, tuple), f"{name}.{key} = {value!r}"

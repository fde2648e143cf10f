"""Training on rows in shards over several devices: the numbers of one device, and what the compiled program sends."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from compilation import findings, hlo
from configs import lm
from models import mixer as mixers
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from tests.tolerance import assert_close
from training import config, setup, sharding, state, step

LENGTH, WIDTH, ROWS = 96, 16, 2

# Documents over one border and over several, a short one, padding over a border and at the end.
SEGMENTS = np.array([[1] * 11 + [2] * 40 + [0] * 3 + [3] * 41 + [4], [7] * 60 + [8] * 18 + [0] * 18], np.int32)

# One mixer of each primitive that passes something on.
PATTERNS = [
    ("gla",),
    ("attention", "min_gru"),
    ("mamba", "local_attention"),
    ("delta_net", "lru"),
    ("rwkv7", "forgetting_attention"),
    ("rwkv4", "mlstm"),
]


def model(pattern, rngs: nnx.Rngs) -> SequenceModel:
    tiny = {name: mixers.find(name).tiny for name in pattern}
    return SequenceModel(ModelConfig(16, 16, width=WIDTH, depth=len(pattern), pattern=pattern, mixer=tiny), rngs=rngs)


def batch():
    tokens = np.random.default_rng(0).integers(0, 16, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = (SEGMENTS != 0).astype(np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "segment_ids": SEGMENTS}


def loss_and_gradients(pattern, sizes, params=None):
    """Parameters, the compiled program, the mesh, and what it computes."""
    count = math.prod(sizes.values())
    built = state.build(functools.partial(model, pattern), None, sharding.make_mesh(sizes, jax.devices()[:count]))

    def loss(params, batch):
        sums = step.score(functools.partial(built.apply, params), sharding.lay_out(batch, built.mesh), loss_chunks=2)
        return sums["nats"] / sums["weight"]

    def both(params, batch):
        with sharding.tracing(built.mesh):
            return jax.value_and_grad(loss)(params, batch)

    with jax.set_mesh(built.mesh):
        params = built.init(jax.random.key(0))["params"] if params is None else params
        params = jax.device_put(params, built.shardings["params"])
        placed = jax.device_put(batch(), sharding.batch_sharding(built.mesh))
        compiled = jax.jit(both).lower(params, placed).compile()
        return jax.device_get(params), compiled, built.mesh, jax.device_get(compiled(params, placed))


@functools.cache
def alone(pattern):
    return loss_and_gradients(pattern, {"data": 1})


@pytest.mark.parametrize(
    ("pattern", "ways"),
    [
        pytest.param(pattern, ways, marks=[pytest.mark.thorough] * ((pattern, ways) not in ((PATTERNS[0], 4),)))
        for pattern in PATTERNS
        for ways in (2, 4, 8)
    ],
)
def test_shards_train_like_the_whole(pattern, ways):
    """The loss and all gradients of packed rows; and no device gets a number for each token of whole rows."""
    params, *_, expected = alone(pattern)
    _, compiled, mesh, found = loss_and_gradients(pattern, {"sequence": ways, "data": 2 if ways < 8 else 1}, params)
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, 2e-5, what=jax.tree_util.keystr(path))
    sent = hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    sizes = {leaf.size for leaf in jax.tree.leaves(params)}
    assert not list(findings.of_whole_rows(sent, ROWS // mesh.shape["data"] * LENGTH, sizes))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "causal"),
    [
        (name, causal)
        for name in mixers.names()
        for causal in (True, False)
        if ("causal" if causal else "two-sided") in mixers.find(name).sequence_parallel
        and getattr(mixers.find(name), "causal" if causal else "bidirectional")
    ],
)
def test_mixers_are_in_shards_if_they_say_so(name, causal):
    """Forwards and backwards, no device gets a number for each token of whole rows."""
    mesh = sharding.make_mesh({"sequence": 4, "data": 2}, jax.devices())
    length, options = 1024, mixers.find(name).tiny
    make = lambda: mixers.create(name, WIDTH, causal=causal, length=length, rngs=nnx.Rngs(0), **options)
    graph, params = nnx.split(nnx.eval_shape(make))

    def gradients(params, x, ids):
        with sharding.tracing(mesh):
            y, pull = jax.vjp(lambda params, x: nnx.merge(graph, params)(x, segment_ids=ids)[0], params, x)
            return y, pull(jnp.cos(y))

    place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
        shape, dtype, sharding=sharding.sharding(axes, shape, mesh)
    )
    params = jax.tree.map(lambda p: place(p.shape, p.dtype, *(None,) * p.ndim), params)
    x = place((2, length, WIDTH), jnp.float32, "batch", "length", None)
    ids = place((2, length), jnp.int32, "batch", "length") if mixers.find(name).packing else None
    program = hlo.Program(jax.jit(gradients).lower(params, x, ids).compile().as_text())
    sizes = {leaf.size for leaf in jax.tree.leaves(params)}
    assert not list(findings.of_whole_rows(program.sent(dict(mesh.shape)), length, sizes))


def test_the_guard_sees_what_is_gathered():
    """A long convolution, whose transform needs the whole row."""
    mesh = sharding.make_mesh({"sequence": 4}, jax.devices()[:4])
    place = sharding.sharding(("batch", "length", None), (2, 64, 8), mesh)
    x = jax.ShapeDtypeStruct((2, 64, 8), jnp.float32, sharding=place)
    compiled = jax.jit(lambda x: jnp.fft.rfft(x, axis=1).real).lower(x).compile()
    sent = hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    assert list(findings.of_whole_rows(sent, 2 * 64))
    assert not list(findings.of_whole_rows(sent, 2 * 64 * 8 + 1))


def resolved(arg, **mesh):
    described = lm.get_config(arg)
    described.mesh.update(mesh)
    return config.resolve(described)


def test_what_cannot_lie_in_shards_is_named():
    with pytest.raises(UserError, match=r"mesh\.sequence=4 is not for mixer 'hyena': its causal form"):
        setup.check_shards(resolved("mixer=gla+hyena"), 4)
    with pytest.raises(UserError, match=r"multiple of 96 positions.*mesh\.sequence"):
        setup.check_shards(resolved("mixer=gla"), 48)
    setup.check_shards(resolved("mixer=gla+hyena"), 1)
    setup.check_shards(resolved("mixer=gla+attention"), 4)

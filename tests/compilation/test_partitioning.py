"""What the compiler of this machine sends between eight devices for what each of them could do alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from compilation import hlo
from models import mixer
from ops import dispatch
from ops.attention import attention
from ops.block_recurrence import block_recurrence
from ops.delta_rule import delta_rule
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.long_convolution import long_convolution
from ops.selected_attention import group_scores, select, selected_attention
from ops.selective_scan import selective_scan
from ops.state_space_scan import state_space_scan
from tests.collection import one_of_each_primitive
from tests.training.test_every_mixer import model as tiny_model
from training import sharding, state


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())


def convolved(mesh, x, kernel):
    with sharding.tracing(mesh):
        y, vjp = jax.vjp(long_convolution, x, kernel)
        return y, *vjp(jnp.cos(y))


def mixed(mesh, x, kernel):
    with sharding.tracing(mesh):
        model = mixer.create("fnet", x.shape[2], causal=False, rngs=nnx.Rngs(0))
        y, vjp = jax.vjp(lambda x: model(x)[0], x)
        return y, *vjp(jnp.cos(y))


@pytest.mark.parametrize("function", [convolved, mixed])
def test_transforms_stay_with_their_rows(mesh, function):
    """Forwards and backwards nothing is gathered; gradients of a kernel are summed over the devices that have other rows."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    random = np.random.default_rng(0)
    x = jax.device_put(random.standard_normal((8, 16, 6)).astype(np.float32), rows)
    kernel = jax.device_put(random.standard_normal((6, 16)).astype(np.float32), sharding.replicated(mesh))
    compiled = jax.jit(lambda x, kernel: function(mesh, x, kernel)).lower(x, kernel).compile()
    sent = hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    assert {one.kind for one in sent} == ({"all-reduce"} if function is convolved else set())
    assert all(set(one.axes.split(",")) <= {"data", "fsdp"} for one in sent)
    alone = sharding.make_mesh({}, jax.devices()[:1])
    x, kernel = (jax.device_put(np.asarray(a), jax.devices()[0]) for a in (x, kernel))
    for whole, split in zip(function(alone, x, kernel), compiled(*map(np.asarray, (x, kernel))), strict=True):
        np.testing.assert_allclose(split, whole, atol=2e-5 * float(jnp.max(jnp.abs(whole))))


def test_a_kernel_runs_on_rows_and_channels_of_its_own(mesh):
    """With the channels named, nothing is sent between devices, and the numbers are those of one device."""

    def run(mesh, a, b):
        with sharding.tracing(mesh):
            f = lambda a, b: linear_recurrence(a, b, axis="mlp", implementation="pallas")[0]
            h, vjp = jax.vjp(f, a, b)
            return h, *vjp(jnp.cos(h))

    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 6)).astype(np.float32)
    split = [jax.device_put(x, place) for x in (a, b)]
    compiled = jax.jit(lambda a, b: run(mesh, a, b)).lower(*split).compile()
    assert not hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    alone = sharding.make_mesh({}, jax.devices()[:1])
    for x, y in zip(run(alone, a, b), compiled(*split), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-6)


def attended(g, q, k, v):
    return linear_attention(q, k, v, g, implementation="pallas", chunk_size=16)


def corrected(g, q, k, v):
    g = jnp.broadcast_to(g, q.shape[:3])
    return delta_rule(q, k, v, 0.3 * jnp.exp(g), g, implementation="pallas", chunk_size=16)


@pytest.mark.parametrize("function", [attended, corrected])
def test_a_kernel_of_heads_runs_on_rows_and_heads_of_its_own(mesh, function):
    """Nothing is sent between devices but what is summed for a decay that all rows share; numbers are those of one device."""

    def run(mesh, g, *arrays):
        with sharding.tracing(mesh):
            (y, state), vjp = jax.vjp(function, g, *arrays)
            return y, state, *vjp((jnp.cos(y), state))

    g, arrays = np.float32([-0.1, -0.2]), np.random.default_rng(0).standard_normal((3, 4, 24, 2, 4)).astype(np.float32)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    split = jax.device_put(g, sharding.replicated(mesh)), *(jax.device_put(x, place) for x in arrays)
    compiled = jax.jit(lambda *x: run(mesh, *x)).lower(*split).compile()
    sent = hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    assert max(one.bytes for one in sent) <= 2 * 24 * 4  # the decays of heads, or of their tokens
    alone = sharding.make_mesh({}, jax.devices()[:1])
    for x, y in zip(run(alone, g, *arrays), compiled(*split), strict=True):
        np.testing.assert_allclose(y, x, atol=2e-6 * float(jnp.max(jnp.abs(x))))


def test_attention_by_a_kernel_runs_on_rows_and_heads_of_its_own(mesh):
    """Where devices have query heads of one key head, the gradients of keys and values are summed, and no more is sent."""

    def run(mesh, q, k, v):
        with sharding.tracing(mesh):
            y, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, implementation="splash"), q, k, v)
            return y, *vjp(jnp.cos(y))

    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((4, 12, heads, 4)).astype(np.float32) for heads in (2, 1, 1))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, *spec))
    split = jax.device_put(q, place("tensor")), jax.device_put(k, place()), jax.device_put(v, place())
    compiled = jax.jit(lambda q, k, v: run(mesh, q, k, v)).lower(*split).compile()
    sent = hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    assert {(one.kind, one.axes) for one in sent} == {("all-reduce", "tensor")}
    alone = sharding.make_mesh({}, jax.devices()[:1])
    q, k, v = (jax.device_put(x, jax.devices()[0]) for x in (q, k, v))
    for x, y in zip(run(alone, q, k, v), compiled(*split), strict=True):
        np.testing.assert_allclose(y, x, atol=2e-6 * float(jnp.max(jnp.abs(x))))


@pytest.mark.parametrize("form", ["sequential", "chunked", "blocked", "pallas"])
def test_a_selective_scan_sums_over_devices_once(mesh, form):
    """Gradients of what all channels share are summed over the channels' devices behind the loop over chunks, or the kernel."""
    names = ("x", "dt", "B", "C")

    def run(mesh, A, arrays):
        with sharding.tracing(mesh):
            f = lambda A, arrays: selective_scan(
                arrays["x"],
                arrays["dt"],
                A,
                arrays["B"],
                arrays["C"],
                axis="mlp",
                implementation=form,
                chunk_size=4,
            )[0]
            y, vjp = jax.vjp(f, A, arrays)
            return y, *vjp(jnp.cos(y))

    random = np.random.default_rng(0)
    arrays = {name: random.uniform(0.1, 1, (8, 16, 6 if name in "xdt" else 3)).astype(np.float32) for name in names}
    A = -random.uniform(0.5, 2, (6, 3)).astype(np.float32)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    rows = ("data", "fsdp")
    split = {n: jax.device_put(x, place(rows, None, "tensor" if n in "xdt" else None)) for n, x in arrays.items()}
    compiled = (
        jax.jit(lambda A, arrays: run(mesh, A, arrays)).lower(jax.device_put(A, place("tensor")), split).compile()
    )
    sent = hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    assert {one.kind for one in sent} == {"all-reduce"} and all(one.executions == 1 for one in sent)
    alone = sharding.make_mesh({}, jax.devices()[:1])
    expected, found = run(alone, A, arrays), compiled(jax.device_put(A, place("tensor")), split)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(y, x, atol=2e-6 * float(jnp.max(jnp.abs(x))))


def oscillated(form, m, f):
    return block_recurrence(m, f, implementation=form)[0]


def scanned(form, coefficients, x):
    a, b, c = ((z, 0.5 * z) for z in coefficients)
    return state_space_scan(x, a, b, c, implementation=form)[0]


@pytest.mark.parametrize(
    "function, form",
    [(oscillated, "sequential"), (oscillated, "associative"), (scanned, "sequential"), (scanned, "chunked")],
)
def test_coefficients_of_all_rows_are_summed_behind_the_loop(mesh, function, form):
    """Rows stay where they are, and the gradients of what they share are sent once."""

    def run(mesh, shared, x):
        with sharding.tracing(mesh):
            y, vjp = jax.vjp(functools.partial(function, form), shared, x)
            return y, *vjp(jnp.cos(y))

    random = np.random.default_rng(0)
    shared = random.uniform(0.1, 0.5, (2, 2, 3) if function is oscillated else (3, 5, 4)).astype(np.float32)
    x = random.standard_normal((8, 70, 2, 3) if function is oscillated else (8, 70, 5)).astype(np.float32)
    split = jax.device_put(shared, sharding.replicated(mesh)), jax.device_put(x, sharding.batch_sharding(mesh))
    compiled = jax.jit(lambda *arrays: run(mesh, *arrays)).lower(*split).compile()
    sent = hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    assert {one.kind for one in sent} == {"all-reduce"} and all(one.executions == 1 for one in sent)
    alone = sharding.make_mesh({}, jax.devices()[:1])
    for y, z in zip(run(alone, shared, x), compiled(*split), strict=True):
        np.testing.assert_allclose(z, y, atol=2e-6 * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize("form", ["masked", "gathered"])
def test_keys_are_selected_where_their_rows_are(mesh, form):
    """Neither scores are sent in order to be sorted, nor marks of what was chosen."""

    def run(mesh, q, k, v):
        def attend(q, k, v):
            places = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
            chosen = select(group_scores, q, k, 3, places=places, key_places=places)
            return selected_attention(q, k, v, chosen, implementation=form)[0]

        with sharding.tracing(mesh):
            y, vjp = jax.vjp(attend, q, k, v)
            return y, *vjp(jnp.cos(y))

    arrays = np.random.default_rng(0).standard_normal((3, 8, 12, 2, 4)).astype(np.float32)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    split = [jax.device_put(a, place) for a in arrays]
    compiled = jax.jit(lambda *arrays: run(mesh, *arrays)).lower(*split).compile()
    assert not hlo.Program(compiled.as_text()).sent(dict(mesh.shape))
    alone = sharding.make_mesh({}, jax.devices()[:1])
    for y, z in zip(run(alone, *arrays), compiled(*split), strict=True):
        np.testing.assert_allclose(z, y, atol=2e-6 * float(jnp.max(jnp.abs(y))))


@pytest.mark.thorough
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", one_of_each_primitive(mixer.names()))
def test_rows_of_every_mixer_stay_with_their_devices(name, packed, monkeypatch):
    """With the forms of a GPU, devices that share parameters sum the gradients of a layer once, and no more is sent."""
    platform = dispatch.platform
    monkeypatch.setattr(dispatch, "platform", lambda _: platform("gpu"))
    built = state.build(functools.partial(tiny_model, name, length=64), None, sharding.make_mesh({"data": 8}))

    def loss(params, ids, segment_ids):
        logits, _ = built.apply(params, ids, segment_ids=segment_ids)
        return jnp.sum(jnp.square(logits))

    params, ids = built.abstract["params"], jax.ShapeDtypeStruct((16, 64), jnp.int32)
    of_rows = sharding.batch_sharding(built.mesh)
    with jax.set_mesh(built.mesh), sharding.tracing(built.mesh):
        gradient = jax.jit(
            jax.grad(loss),
            in_shardings=(built.shardings["params"], of_rows, of_rows),
            out_shardings=built.shardings["params"],
        )
        compiled = gradient.lower(params, ids, ids if packed else None).compile()
    sent = hlo.Program(compiled.as_text()).sent(dict(built.mesh.shape))
    odd = [one for one in sent if one.kind != "all-reduce" or one.executions > 2]
    assert not odd

"""State and step: the same numbers on every mesh, exact weighting, skipped updates, precision."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from data.metrics import ACCURACY, training_summary
from data.task import Spec
from models.partitioning import constrain
from training import optimizer, sharding, state
from training.optimizer import OPTIMIZERS, OptimizerConfig
from training.step import class_sums, class_sums_in_chunks, make_eval_step, make_train_step

VOCAB, WIDTH, HIDDEN, LAYERS, ROWS, LENGTH = 16, 8, 12, 3, 8, 6


def param(rngs, shape, axes, scale=0.5, decay=True, group="default", keep_float32=False, active=1.0):
    value = scale * jax.random.normal(rngs.params(), shape)
    facts = {"decay": decay, "group": group, "keep_float32": keep_float32, "active": active}
    return nnx.Param(value, axes=axes, inputs=(), **facts)


class Layer(nnx.Module):
    """h_t = sigmoid(a) h_{t-1} + W x_t; x + V h."""

    def __init__(self, rngs):
        self.w_in = param(rngs, (WIDTH, HIDDEN), ("embed", "mlp"))
        self.a = param(rngs, (HIDDEN,), ("mlp",), decay=False, group="ssm", keep_float32=True)
        self.w_out = param(rngs, (HIDDEN, WIDTH), ("mlp", "embed"))

    def __call__(self, x):
        u = constrain(x @ self.w_in[...], "batch", "length", "mlp")
        a = jax.nn.sigmoid(self.a[...]).astype(u.dtype)
        move = lambda h, u: (a * h + u, a * h + u)
        _, h = jax.lax.scan(move, jnp.zeros_like(u[:, 0]), u.swapaxes(0, 1))
        return constrain(x + h.swapaxes(0, 1) @ self.w_out[...], "batch", "length", "activation")


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embedding = param(rngs, (VOCAB, WIDTH), ("vocab", "embed"))
        self.layers = jax.vmap(lambda key: Layer(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), LAYERS))
        self.gains = nnx.List([param(rngs, (), (), decay=False) for _ in range(2)])

    def __call__(self, ids, carry=None, *, segment_ids=None, positions=None, key=None, reduce=None):
        x = constrain(self.embedding[...][ids], "batch", "length", "activation")
        if key is not None:
            x = x * jax.random.bernoulli(key, 0.5, x.shape)
        if segment_ids is not None:
            x = jnp.where((segment_ids != 0)[..., None], x, 0)
        x, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)
        x = x * (1 + self.gains[0][...]) * (1 + self.gains[1][...])
        head = lambda x: constrain(x @ self.embedding[...].T, "batch", "length", "vocab")
        return (head(x) if reduce is None else reduce(head, x)), None


class Tabled(Model):
    """With a table of the two last tokens."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.tables = nnx.List([param(rngs, (VOCAB**2, 6), ("vocab", "embed"), active=1 / VOCAB**2)])
        self.back = param(rngs, (6, VOCAB), (None, "vocab"))

    def rows_read(self, ids, carry=None, segment_ids=None):
        return ids.at[:, 1:].add(VOCAB * ids[:, :-1])[..., None]

    def __call__(self, ids, reduce=None, places=None, **kwargs):
        places = self.rows_read(ids) if places is None else places
        table = constrain(self.tables[0][...], "vocab", "activation")
        return super().__call__(ids, **kwargs)[0] + table[places[..., 0]] @ self.back[...], None


def make_mesh(**sizes):
    return sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def build(mesh, model=Model, **config):
    usual = {"learning_rate": 0.01, "schedule": "linear", "final_fraction": 0.1, "group_scale": {"ssm": 0.5}}
    config = OptimizerConfig(**(usual | config))
    return state.build(model, functools.partial(optimizer.build, config, 10), mesh)


@functools.cache
def built_on(**sizes):
    """The model on a mesh, and its plain step."""
    built = build(make_mesh(**sizes))
    return built, make_train_step(built, metrics=(ACCURACY,))


def start(built, seed=0):
    """The same first state on every mesh, in arrays of its own."""
    made = built_on(data=1)[0].init(jax.random.key(seed))
    return jax.device_put(host(made), built.shardings)


def batch(seed=0, weights=None):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH + 1))
    weights = rng.uniform(size=(ROWS, LENGTH)) * (rng.uniform(size=(ROWS, 1)) > 0.4) if weights is None else weights
    return {
        "inputs": jnp.asarray(ids[:, :-1]),
        "targets": jnp.asarray(ids[:, 1:]),
        "weights": jnp.asarray(weights, jnp.float32),
        "segment_ids": jnp.ones((ROWS, LENGTH), jnp.int32),
    }


def host(tree):
    return jax.tree.map(np.asarray, tree)


def train(built, step):
    """Three steps: their metrics and the last state."""
    current, metrics = start(built), []
    for i in range(3):
        current, new = step(current, jax.device_put(batch(i), sharding.batch_sharding(built.mesh)))
        metrics.append(host(new))
    assert step.function._cache_size() == 1
    return metrics, current


def test_learning_rates_decays_and_schedules_share_one_program():
    mesh = make_mesh(data=1)
    one, other = (
        build(mesh, schedule="wsd", **settings)
        for settings in ({}, {"learning_rate": 0.03, "weight_decay": 0.5, "warmup_steps": 2, "decay_fraction": 0.4})
    )
    step, expected = make_train_step(one), make_train_step(other)
    text = [s.function.lower(start(one), batch(), s.settings).as_text() for s in (step, expected)]
    assert text[0] == text[1]
    changed = dataclasses.replace(step, settings=expected.settings)
    (a, ours), (b, theirs), (c, _) = (s(start(one), batch()) for s in (changed, expected, step))
    assert ours["learning_rate"] == theirs["learning_rate"] == np.float32(0.015)
    jax.tree.map(np.testing.assert_array_equal, a["params"], b["params"])
    assert not np.array_equal(a["params"]["embedding"], c["params"]["embedding"])


@functools.cache
def trained_on_one_device():
    metrics, current = train(*built_on(data=1))
    return metrics, host(current)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "sequence": 2}],
    ids=str,
)
def test_every_mesh_trains_alike_and_compiles_once(sizes):
    built, step = built_on(**sizes)
    metrics, current = train(built, step)
    expected, final = trained_on_one_device()
    for new, old in zip(metrics, expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, old)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), current["params"], final["params"]
    )
    assert jax.tree.map(lambda x: x.sharding, current) == built.shardings


def test_init_is_sharded_and_the_same_on_every_mesh():
    built = build(make_mesh(data=2, fsdp=2, tensor=2))
    made = built.init(jax.random.key(0))
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    assert describe(made) == describe(built.abstract)
    w_in = made["params"]["layers"]["w_in"]
    assert w_in.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert w_in.addressable_shards[0].data.shape == (LAYERS, WIDTH // 2, HIDDEN // 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), host(made), host(start(built)))
    other = start(built, seed=1)
    assert not np.array_equal(other["params"]["embedding"], made["params"]["embedding"])
    assert not np.array_equal(other["key"], made["key"])


def test_loss_in_chunks():
    """The same sums and gradients, of a length that the chunks do not divide, without the logits of all tokens."""
    r = np.random.default_rng(0)
    x, w, targets = r.standard_normal((2, 7, 5)), r.standard_normal((5, 400)), r.integers(0, 400, (2, 7))
    weights = np.where(r.uniform(size=(2, 7)) < 0.3, 0, r.uniform(size=(2, 7)))

    def loss(x, w, chunks):
        if chunks == 1:
            sums = class_sums(x @ w, targets, weights, (ACCURACY,))
        else:
            sums = class_sums_in_chunks(lambda x: x @ w, x, targets, weights, (ACCURACY,), chunks)
        return sums["nats"] + 0.1 * sums["squared_log_z"], sums

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    with jax.enable_x64(True):
        for a, b in zip(*(jax.tree.leaves(run(x, w, chunks)) for chunks in (1, 3)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # the sums are in float32
    jaxpr = str(jax.make_jaxpr(functools.partial(run, chunks=7))(x, w))
    assert "[2,1,400]" in jaxpr and "[2,7,400]" not in jaxpr


def test_loss_in_chunks_on_a_mesh():
    built, _ = built_on(fsdp=2, tensor=2)
    metrics, current = train(built, make_train_step(built, metrics=(ACCURACY,), loss_chunks=4))
    expected, final = trained_on_one_device()
    for found, known in zip(jax.tree.leaves((metrics, host(current))), jax.tree.leaves((expected, final)), strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_where_their_parameters_lie(name):
    built = build(make_mesh(data=2, fsdp=2, tensor=2), name=name)
    flatten = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }
    params = flatten(built.abstract["params"])
    moments = {key: leaf for key, leaf in flatten(built.abstract["opt"]).items() if leaf.ndim > 1}
    assert {key.split("/", 1)[0] for key in params} == {"embedding", "layers", "gains"}
    owners = set()
    for key, leaf in moments.items():
        (owner,) = [p for p in params if key.endswith("/" + p)]
        assert (leaf.shape, leaf.sharding) == (params[owner].shape, params[owner].sharding), key
        owners.add(owner)
    assert owners == {p for p, leaf in params.items() if leaf.ndim > 1}
    assert params["layers/w_out"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")


def test_tables_of_adagrad_are_split_and_train_as_on_one_device():
    """The sums of squares lie where the table does; rows that no token has looked up stay as they are. One device goes by the
    rows that are read, several over all of a table in shards."""
    results = []
    for sizes in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        built = build(make_mesh(**sizes), Tabled, tables="adagrad", weight_decay=0.0)
        first = host(built.init(jax.random.key(0)))
        current, step = jax.device_put(first, built.shardings), make_train_step(built)
        for i in range(3):
            current, _ = step(current, jax.device_put(batch(i), sharding.batch_sharding(built.mesh)))
        (sums,) = [leaf for leaf in jax.tree.leaves(current["opt"]) if leaf.shape == (VOCAB**2, 6)]
        assert sums.sharding == current["params"]["tables"]["0"].sharding
        results.append(host(current["params"]))
        idle = np.all(host(sums) == 0, -1)
        moved = np.any(results[-1]["tables"]["0"] != first["params"]["tables"]["0"], -1)
        assert 0 < idle.sum() < len(idle) and np.array_equal(moved, ~idle)
    assert sums.sharding.spec == PartitionSpec("tensor", "fsdp")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_metrics_are_those_of_numpy():
    built, step = built_on(data=1)
    first, rows = start(built), batch(1)
    params = host(first["params"])
    logits, _ = jax.jit(built.apply)(first["params"], rows["inputs"], segment_ids=rows["segment_ids"])
    logits, weights = np.asarray(logits, np.float64), np.asarray(rows["weights"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, np.asarray(rows["targets"])[..., None], -1)[..., 0]
    right = logits.argmax(-1) == np.asarray(rows["targets"])
    sums = make_eval_step(built, metrics=(ACCURACY,))(first["params"], rows)
    new, metrics = step(first, rows)
    metrics |= training_summary(Spec(VOCAB, None, VOCAB, "causal_lm", LENGTH), metrics.pop("sums"))
    expected = {
        "loss": (weights * nats).sum() / weights.sum(),
        "accuracy": (weights * right).sum() / weights.sum(),
        "bits_per_byte": (weights * nats).sum() / weights.sum() / math.log(2),
        "tokens": weights.sum(),
        "learning_rate": 0.01 * (1 - 0.9 / 10),
        "skipped": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert metrics["grad_norm"] > 0
    assert int(new["step"]) == 1
    assert not np.array_equal(params["embedding"], new["params"]["embedding"])
    np.testing.assert_allclose(sums["nats"], (weights * nats).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["weight"], weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["correct"], (weights * right).sum(), rtol=1e-6)


def test_accumulation_does_not_change_the_step():
    built, step = built_on(data=2)
    rows = batch(2)
    assert len({float(w) for w in rows["weights"].reshape(2, 4, -1).sum((0, 2))}) == 4  # microbatches differ in weight
    whole, expected = step(start(built), rows)
    new, metrics = make_train_step(built, metrics=(ACCURACY,), accumulation=4)(start(built), rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), metrics, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new["params"], whole["params"])


def test_gradient_is_that_of_the_weighted_mean():
    """Plain SGD against autodiff of the formula, z-loss included."""
    config = {
        "name": "sgd",
        "b1": 0.0,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "schedule": "constant",
        "learning_rate": 1.0,
    }
    built = build(make_mesh(data=1), **config, group_scale={"ssm": 1.0})
    rows = batch(3)

    def loss(params):
        logits, _ = built.apply(params, rows["inputs"], segment_ids=rows["segment_ids"])
        log_z = jnp.log(jnp.exp(logits).sum(-1))
        nats = log_z - jnp.take_along_axis(logits, rows["targets"][..., None], -1)[..., 0]
        return (rows["weights"] * (nats + 0.1 * log_z**2)).sum() / rows["weights"].sum()

    first = built.init(jax.random.key(0))
    params = host(first["params"])
    grads = host(jax.jit(jax.grad(loss))(params))
    new, _ = make_train_step(built, z_loss=0.1)(first, rows)
    jax.tree.map(
        lambda a, b, g: np.testing.assert_allclose(a - b, g, rtol=1e-4, atol=1e-6), params, host(new["params"]), grads
    )


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    built, step = built_on(data=1)
    good, first = step(start(built), batch(0))
    kept = host(good)
    bad = batch(1, np.full((ROWS, LENGTH), np.inf))
    empty = batch(1, np.zeros((ROWS, LENGTH)))
    current = good
    for count, (rows, finite) in enumerate([(bad, False), (empty, True)], 1):
        current, metrics = step(current, rows)
        assert np.isfinite(metrics["loss"]) == finite
        assert int(current["skipped"]) == metrics["skipped"] == count
        assert int(current["step"]) == 1 + count
        for part in ("params", "opt"):
            jax.tree.map(np.testing.assert_array_equal, host(current[part]), kept[part])
    # The schedule counts updates: the next one goes on where the last one that was made stopped.
    _, metrics = step(current, batch(2))
    np.testing.assert_allclose([first["learning_rate"], metrics["learning_rate"]], [0.0091, 0.0082], rtol=1e-5)
    assert metrics["skipped"] == 2


def test_a_finite_loss_with_a_gradient_that_overflows_is_skipped():
    built, step = built_on(data=1)
    huge = start(built)
    huge["params"]["gains"] = {"0": jnp.float32(1e30), "1": jnp.float32(-1.0)}  # scores 0, their derivatives 1e30
    kept = host(huge["params"])
    new, metrics = step(huge, batch(0))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert int(new["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, host(new["params"]), kept)


def test_bfloat16_respects_keep_float32_and_leaves_the_state_in_float32():
    built, step = built_on(data=1)
    dtypes = jax.eval_shape(lambda p: state.cast(p, built.metadata, "bfloat16"), built.abstract["params"])
    dtypes = jax.tree.map(lambda p: p.dtype.name, dtypes)
    assert dtypes["layers"] == {"w_in": "bfloat16", "a": "float32", "w_out": "bfloat16"}
    assert dtypes["embedding"] == "bfloat16"
    seen = {}

    class Spy(Model):
        def __call__(self, *args, **kwargs):
            seen["w_in"], seen["a"] = self.layers.w_in.dtype, self.layers.a.dtype
            return super().__call__(*args, **kwargs)

    spied = state.build(Spy, functools.partial(optimizer.build, OptimizerConfig(), 10), built.mesh)
    _, full = step(start(built), batch(0))
    new, metrics = make_train_step(spied, compute_dtype="bfloat16")(start(built), batch(0))
    assert seen == {"w_in": jnp.bfloat16, "a": jnp.float32}
    assert {leaf.dtype for leaf in jax.tree.leaves(new["params"])} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics["loss"], full["loss"], rtol=0.02)
    assert metrics["loss"] != full["loss"]
    assert metrics["loss"].dtype == jnp.float32


def test_dropout_depends_on_key_step_and_microbatch():
    built, plain = built_on(data=1)
    step = make_train_step(built, random=True, accumulation=2)
    first, second = (np.arange(ROWS)[:, None] % 2 == i for i in range(2))  # the rows of each microbatch

    def loss(run, rows, **changes):
        same = jax.tree.map(lambda x: jnp.repeat(x[:1], ROWS, 0), batch(0))
        weights = jnp.asarray(np.broadcast_to(rows, (ROWS, LENGTH)), jnp.float32)
        return float(run({**start(built), **changes}, {**same, "weights": weights})[1]["loss"])

    once = loss(step, first)
    assert loss(step, first) == once
    others = [
        loss(step, second),
        loss(step, first, step=jnp.int32(1)),
        loss(step, first, key=jnp.array([1, 2], jnp.uint32)),
        loss(plain, first),
    ]
    assert len({once, *others}) == 5
    np.testing.assert_allclose(loss(plain, first), loss(plain, second), rtol=1e-6)


def test_merge_gives_the_model():
    built, _ = built_on(data=1)
    params = start(built)["params"]
    assert built.metadata["layers"]["a"] == state.Metadata(("mlp",), False, "ssm", True)
    assert set(params["gains"]) == {"0", "1"}
    model = built.merge(params)
    assert isinstance(model, Model)
    np.testing.assert_array_equal(model.gains[1][...], params["gains"]["1"])
    np.testing.assert_array_equal(model.layers.w_in[...], params["layers"]["w_in"])


def test_a_state_for_evaluation_needs_no_optimizer():
    built = state.build(Model, None, make_mesh(data=2))
    assert not jax.tree.leaves(built.abstract["opt"])
    params = jax.device_put(host(start(built_on(data=1)[0])["params"]), built.shardings["params"])
    assert make_eval_step(built)(params, batch(0))["weight"] > 0
    with pytest.raises(ValueError, match="without an optimizer"):
        make_train_step(built)


class Bare(nnx.Module):
    def __init__(self, rngs, make):
        self.inner = nnx.List([Layer(rngs)])
        make(self, rngs)


class Buffer(nnx.Variable):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda m, r: setattr(m, "b", nnx.Param(jnp.ones(3))),
            ("parameter b", "axes, decay, group, keep_float32, inputs"),
        ),
        (lambda m, r: setattr(m, "b", Buffer(jnp.ones(3))), ("no parameter: b (Buffer)", "stop_gradient")),
        (lambda m, r: setattr(m.inner[0], "b", jnp.ones(3)), ("no parameter: inner/0/b",)),
        (lambda m, r: setattr(m, "b", np.ones(3)), ("no parameter: b",)),
        (lambda m, r: setattr(m, "rngs", r), ("no parameter: rngs",)),
        (lambda m, r: setattr(m, "b", param(r, (3,), ("embed", "mlp"))), ("parameter b", "more axis names")),
        (lambda m, r: setattr(m, "b", param(r, (3,), ("width",))), ("'width'",)),
        (lambda m, r: setattr(m, "b", param(r, (3,), (None,), scale=1j)), ("complex64", "pairs of reals")),
    ],
)
def test_models_that_cannot_be_trained_are_refused(make, words):
    with pytest.raises(ValueError) as error:
        state.build(lambda rngs: Bare(rngs, make), None, make_mesh(data=1))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_rows_and_shapes_that_do_not_fit_are_refused():
    built, _ = built_on(data=2)
    with pytest.raises(ValueError, match="multiple of 16"):
        make_train_step(built, accumulation=8)(start(built), batch(0))
    with pytest.raises(ValueError, match="accumulation must be 1 or more"):
        make_train_step(built, accumulation=0)
    with pytest.raises(ValueError, match=r"weights \(2,\)"):
        class_sums(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), int), jnp.zeros(2))


def test_a_tie_and_a_target_out_of_range():
    sums = class_sums(jnp.zeros((4, 5)), jnp.array([0, 1, -1, 9]), jnp.array([1.0, 2.0, 0.0, 0.0]), (ACCURACY,))
    np.testing.assert_allclose(sums["nats"], 3 * math.log(5), rtol=1e-6)
    assert sums["correct"] == 1

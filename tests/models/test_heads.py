"""Regression losses: the flow's density, the formulas, their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.heads import GRID, LOSSES, Regression, log_overlap
from models.real_nvp import COUPLINGS, HIDDEN, RealNVP
from tests.tolerance import assert_close

WIDTH = 8


def scaled_flow(seed=0, gain=1.5):
    """A flow whose density is further from a Gaussian than the initial one."""
    flow = RealNVP(rngs=nnx.Rngs(seed))
    for parameter in jax.tree.leaves(nnx.state(flow), is_leaf=lambda p: isinstance(p, nnx.Variable)):
        parameter[...] = gain * parameter[...]
    return flow


def masked_reference(flow):
    """log_prob in float64 in the authors' form: networks 2 -> 64 -> 64 -> 2 with masked inputs and outputs."""
    get = lambda name: np.asarray(getattr(flow, name)[...], np.float64)
    w_1, b_1, w_2, b_2, w_3, b_3 = map(get, ("w_1", "b_1", "w_2", "b_2", "w_3", "b_3"))
    masks = np.array([[0, 1], [1, 0]] * 3, float)
    junk = np.random.default_rng(0).normal(size=HIDDEN)
    leaky = lambda x: np.where(x > 0, x, 0.01 * x)

    def network(i, n, x):
        first = np.where(masks[i][:, None] == 1, w_1[i, n], junk)
        last = np.where(masks[i] == 0, w_3[i, n][:, None], junk[:, None])
        return leaky(leaky(x @ first + b_1[i, n]) @ w_2[i, n] + b_2[i, n]) @ last + b_3[i, n]

    def log_prob(x):
        z, log_det = np.asarray(x, np.float64), 0
        for i in reversed(range(COUPLINGS)):
            m = masks[i]
            s = np.tanh(network(i, 0, m * z)) * (1 - m)
            t = network(i, 1, m * z) * (1 - m)
            z = (1 - m) * (z - t) * np.exp(-s) + m * z
            log_det = log_det - s.sum(-1)
        return log_det - (z**2).sum(-1) / 2 - np.log(2 * np.pi)

    return log_prob


def plane(limit, n):
    """Midpoints of an n x n grid of [-limit, limit]^2 and the area of a cell."""
    axis = (np.arange(n) + 0.5) / n * 2 * limit - limit
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), (2 * limit / n) ** 2


def test_flow_starts_as_torch_linear_layers_do():
    flow = RealNVP(rngs=nnx.Rngs(0))
    for names, bound in ((("w_1", "b_1"), 2**-0.5), (("w_2", "b_2", "w_3", "b_3"), HIDDEN**-0.5)):
        for name in names:
            parameter = getattr(flow, name)
            values = np.asarray(parameter[...])
            assert np.abs(values).max() <= bound and np.abs(values).max() > 0.8 * bound, name
            assert abs(values.std() - bound / 3**0.5) < 0.25 * bound, name
            assert not parameter.get_metadata("decay") and parameter.get_metadata("keep_float32")


def test_flow_is_the_masked_one():
    flow = scaled_flow()
    x = np.random.default_rng(1).normal(size=(5, 3, 2)) * 2
    assert_close(flow.log_prob(jnp.asarray(x)), masked_reference(flow)(x))


def test_flow_inverts_itself():
    flow = scaled_flow()
    z = jax.random.normal(jax.random.key(0), (7, 2))
    assert_close(jax.jit(lambda z: flow.to_noise(flow.from_noise(z))[0])(z), z)


def test_flow_log_determinant_is_that_of_the_jacobian():
    flow = scaled_flow()
    x = 2 * jax.random.normal(jax.random.key(0), (16, 2))
    jacobian = jax.vmap(jax.jacfwd(lambda x: flow.to_noise(x)[0]))(x)
    expected = np.linalg.slogdet(np.asarray(jacobian, np.float64))[1]
    assert_close(flow.to_noise(x)[1], expected)


def test_flow_density_integrates_to_one():
    flow = scaled_flow()
    points, area = plane(15, 300)
    total = np.exp(np.asarray(jax.jit(flow.log_prob)(jnp.asarray(points, jnp.float32)), np.float64)).sum() * area
    assert abs(total - 1) < 1e-3


@pytest.mark.parametrize("seed", [0, 2])
def test_overlap_with_laplace(seed):
    flow = scaled_flow(seed)
    points, area = plane(15, 300)
    log_g = np.asarray(jax.jit(flow.log_prob)(jnp.asarray(points, jnp.float32)), np.float64)
    exact = np.log((np.exp(log_g - np.abs(points).sum(-1)) / 4).sum() * area)
    assert GRID == 32 and abs(float(log_overlap(flow)) - exact) < 0.01


def test_rle_is_a_density():
    """exp(-loss) over all targets of one input integrates to 1: the loss is a likelihood."""
    head = Regression(WIDTH, 2, "rle", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (WIDTH,))
    points, area = plane(12, 240)
    loss = jax.jit(lambda t: head(jnp.broadcast_to(x, (*t.shape[:-1], WIDTH)), t)[1])(jnp.asarray(points, jnp.float32))
    assert abs(np.exp(-np.asarray(loss, np.float64)).sum() * area - 1) < 0.01


def test_laplace_is_a_density():
    head = Regression(WIDTH, 1, "laplace", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (WIDTH,))
    targets = jnp.linspace(-30, 30, 60_001)[:, None]
    loss = head(jnp.broadcast_to(x, (len(targets), WIDTH)), targets)[1]
    assert abs(np.exp(-np.asarray(loss, np.float64)).sum() * 1e-3 - 1) < 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_equal_their_formulas(loss):
    head = Regression(WIDTH, 6, loss, rngs=nnx.Rngs(3))
    draw = np.random.default_rng(0).normal
    x, targets = draw(size=(4, WIDTH)), draw(size=(4, 6))
    for name in ("w", "b", "w_scale", "b_scale"):
        if hasattr(head, name):
            parameter = getattr(head, name)
            parameter[...] = jnp.asarray(draw(size=parameter.shape) / 3)
    get = lambda name: np.asarray(getattr(head, name)[...], np.float64)
    mean = x @ get("w") + get("b")
    error = targets - mean
    if loss == "squared":
        expected = (error**2).sum(-1)
    elif loss == "absolute":
        expected = np.abs(error).sum(-1)
    else:
        sigma = np.log1p(np.exp(x @ get("w_scale") + get("b_scale"))) + 1e-3
        q = np.exp(-np.abs(error) / sigma) / 2
        if loss == "laplace":
            expected = -np.log(q / sigma).sum(-1)
        elif loss == "rle_authors":
            # As their code has it: prediction less target, and a log-density that broadcasts over both coordinates.
            sigma = 1 / (1 + np.exp(-(x @ get("w_scale") + get("b_scale")))).reshape(4, 3, 2)
            bar = -error.reshape(4, 3, 2) / sigma
            nf = np.log(sigma) - masked_reference(head.flow)(bar)[..., None]
            log_q = np.log(sigma / (1 / np.sqrt(2 * np.pi))) + np.abs(bar * sigma) / (np.sqrt(2) * sigma + 1e-9)
            expected = (nf + log_q).sum((1, 2))
        else:
            g = np.exp(masked_reference(head.flow)((error / sigma).reshape(4, 3, 2)))
            s = np.exp(-float(log_overlap(head.flow)))
            expected = np.log(sigma).sum(-1) - np.log(s * q.reshape(4, 3, 2).prod(-1) * g).sum(-1)
    predictions, found = head(jnp.asarray(x), jnp.asarray(targets))
    assert_close(predictions, mean)
    assert_close(head(jnp.asarray(x)), mean)
    assert found.shape == (4,)
    assert_close(found, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_and_reach_every_parameter(loss):
    head = Regression(WIDTH, 4, loss, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 5, WIDTH))
    # An exact fit, an ordinary one and an outlier.
    targets = head(x) + jnp.asarray([0.0, 0.5, 100.0])[:, None, None]
    graph, state = nnx.split(head)
    values, grads = jax.jit(jax.value_and_grad(lambda s: nnx.merge(graph, s)(x, targets)[1].mean()))(state)
    assert np.isfinite(values)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path


def test_bfloat16_inputs_score_in_float32():
    head = Regression(WIDTH, 2, "rle", rngs=nnx.Rngs(0))
    predictions, loss = jax.eval_shape(head, jnp.ones((3, WIDTH), jnp.bfloat16), jnp.ones((3, 2)))
    assert predictions.dtype == loss.dtype == jnp.float32


def test_errors():
    with pytest.raises(ValueError, match="loss='huber' must be one of squared, absolute, laplace, rle"):
        Regression(WIDTH, 2, "huber", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="3 targets are no pairs; use loss='laplace'"):
        Regression(WIDTH, 3, "rle", rngs=nnx.Rngs(0))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import block_recurrence as module
from ops.block_recurrence import block_recurrence
from tests.tolerance import assert_close

IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 3, 3, 3, 3], [0, 0, 4, 4, 4, 4, 5, 6, 6, 6, 6, 0, 0]])


def draw():
    random = np.random.default_rng(0)
    m = 0.5 * random.standard_normal((2, 2, 3))
    m[..., 0] = [[1, 1], [0, 1]]  # has one eigenvector only
    f, h0, dh = (random.standard_normal(shape) for shape in ((2, 13, 2, 3), (2, 2, 3), (2, 13, 2, 3)))
    return [np.asarray(x, np.float32) for x in (m, f, h0, dh)]


def oracle(m, f, h, ids):
    """Token by token, in float64."""
    out, h = np.zeros(f.shape), h.astype(np.float64)
    for t, i in np.ndindex(ids.shape[::-1]):
        if t and ids[i, t] != ids[i, t - 1]:
            h[i] = 0
        if ids[i, t]:
            h[i] = out[i, t] = np.einsum("ijn,jn->in", m, h[i]) + f[i, t]
    return out, h


@pytest.mark.parametrize("implementation", ["reference", "sequential", "associative"])
@pytest.mark.parametrize("packed", [True, False])
def test_against_oracle(implementation, packed, monkeypatch):
    """Outputs, final states and gradients (by differences), over borders of chunks."""
    monkeypatch.setattr(module, "_CHUNK", {"sequential": 4, "associative": 4})
    ids = IDS if packed else np.ones_like(IDS)
    m, f, h0, dh = draw()

    @jax.jit
    def run(m, f, h0):
        call = lambda m, f, h0: block_recurrence(
            m, f, initial_state=h0, segment_ids=jnp.asarray(ids) if packed else None, implementation=implementation
        )
        (h, final), pull_back = jax.vjp(call, m, f, h0)
        return h, final, pull_back((dh, jnp.ones_like(final)))

    h, final, gradients = run(m, f, h0)
    expected, expected_final = oracle(m, f, h0, ids)
    assert_close(h, expected)
    assert_close(final, expected_final)

    def objective(m, f, h0):
        h, final = oracle(m, f, h0, ids)
        return np.sum(h * dh) + np.sum(final)

    arguments = [x.astype(np.float64) for x in (m, f, h0)]
    random = np.random.default_rng(1)
    for i, gradient in enumerate(gradients):
        direction = random.standard_normal(arguments[i].shape)
        above, below = list(arguments), list(arguments)
        above[i], below[i] = arguments[i] + 1e-5 * direction, arguments[i] - 1e-5 * direction
        slope = (objective(*above) - objective(*below)) / 2e-5
        assert_close(np.sum(np.asarray(gradient) * direction), slope, 1e-4)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    m, f, h0, _ = draw()
    with pytest.raises(ValueError, match="m \\[2, 2, N\\]"):
        block_recurrence(m[..., :2], f)
    with pytest.raises(ValueError, match="initial_state"):
        block_recurrence(m, f, initial_state=h0[:1])

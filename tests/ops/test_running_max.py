"""The running maximum against its definition max_s (i_s + g_{s+1} + ... + g_t), and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.running_max import NOTHING, running_max
from tests.tolerance import assert_close

LENGTH = 13
IDS = jnp.array([[1] * 5 + [2] + [3] * 5 + [0] * 2, [4] * 13])
FORMS = ("sequential", "associative")  # "reference" is the program of "sequential"


def inputs():
    g = -jnp.abs(jax.random.normal(jax.random.key(0), (2, LENGTH, 3)))
    return g, 5 * jax.random.normal(jax.random.key(1), (2, LENGTH, 3))


@pytest.mark.parametrize("form", FORMS)
def test_definition(form):
    """With segments: the maximum before a token is that of the token before, and of nothing at a start."""
    g, i = inputs()
    found = running_max(g, i, segment_ids=IDS, implementation=form)
    expected = np.full(i.shape, NOTHING)
    for row, t in np.ndindex(2, LENGTH):
        for s in range(t + 1):
            if IDS[row, s] == IDS[row, t] != 0:
                total = np.asarray(i[row, s], np.float64) + np.asarray(g[row, s + 1 : t + 1], np.float64).sum(0)
                expected[row, t] = np.maximum(expected[row, t], total)
    token = np.asarray(IDS != 0)
    assert_close(found.maximum[token], expected[token])
    start = np.asarray(IDS != np.pad(IDS, ((0, 0), (1, 0)))[:, :-1])
    assert_close(found.before[token & ~start], np.roll(expected, 1, 1)[token & ~start])
    assert (np.asarray(found.before)[start] == np.float32(NOTHING)).all()
    assert_close(found.final[1], expected[1, -1])
    assert np.asarray(found.log_weight)[token].max() <= 0
    assert (np.asarray(found.log_weight)[~token] == np.float32(NOTHING)).all()


@pytest.mark.parametrize("form", FORMS)
def test_infinities(form):
    """A token that forgets all, one that weighs nothing, and both at once, at first and later: sums are those of the others."""
    g = np.float32([[0, -np.inf, -0.5, -np.inf, -0.5, -np.inf], [-np.inf, -0.5, -np.inf, -0.5, -0.5, -0.5]])
    i = np.float32([[1, -np.inf, 2, 300, -np.inf, -np.inf], [-np.inf, 3, -np.inf, -np.inf, -300, 3]])
    found = running_max(g, i, implementation=form)
    assert all(np.isfinite(a).all() for a in found)
    s, x = np.zeros(2), np.arange(1.0, 7.0)
    expected, sums = np.zeros(2), []
    for t in range(6):
        s = np.exp(np.asarray(found.log_decay[:, t])) * s + np.exp(np.asarray(found.log_weight[:, t])) * x[t]
        expected = np.exp(g[:, t].astype(np.float64)) * expected + np.exp(i[:, t].astype(np.float64)) * x[t]
        sums.append((s * np.exp(np.asarray(found.maximum[:, t], np.float64)), expected))
    for ours, theirs in sums:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_pieces(form):
    """A constant decay, in two pieces."""
    g, i = inputs()
    whole = running_max(g[0, 0], i, implementation=form)
    first = running_max(g[0, 0], i[:, :4], implementation=form)
    rest = running_max(g[0, 0], i[:, 4:], initial_state=first.final, implementation=form)
    for name in ("log_decay", "log_weight", "maximum", "before"):
        a, b = (np.asarray(getattr(part, name))[:, 1 - k :] for k, part in enumerate((first, rest)))
        assert_close(np.concatenate([a, b], 1), getattr(whole, name)[:, 1:], what=name)
    assert_close(rest.final, whole.final)
    assert_close(rest.before[:, 0], first.final)


def test_scaled_sum():
    """The scaled recurrence is the sum that it stands for, gradients included, in range though exp(i) is not."""
    g, i = inputs()

    def scaled(g, i):
        found = running_max(g, i + 200)
        s = 0.0
        for t in range(LENGTH):
            s = jnp.exp(found.log_decay[:, t]) * s + jnp.exp(found.log_weight[:, t])
        return jnp.sum(jnp.log(s) + found.final - 200)

    def direct(g, i):
        total = jnp.cumsum(g, 1)
        return jnp.sum(jax.nn.logsumexp(i + total[:, -1:] - total, axis=1))

    both = lambda f: jax.tree.leaves(jax.jit(jax.value_and_grad(f, (0, 1)))(g, i))
    for a, b in zip(both(scaled), both(direct), strict=True):
        assert_close(a, b)

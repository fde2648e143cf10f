"""Stick-breaking attention against its definition by products, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.stick_breaking import stick_breaking_attention
from tests.ops.test_attention import PACKED, inputs, mask_of
from tests.tolerance import assert_close
from tests.traced import equations

H, G, K, V = 4, 2, 4, 3


def by_products(q, k, v, mask, scale):
    """The keys of a query from the nearest on, each with its share of what the nearer ones left."""
    k, v = (jnp.repeat(a, H // G, axis=2) for a in (k, v))
    share = jax.nn.sigmoid(scale * jnp.einsum("bthk,bshk->bhts", q, k)) * mask[:, None]
    left, y = jnp.ones(share.shape[:3], q.dtype), 0
    for j in reversed(range(k.shape[1])):
        y = y + (share[..., j] * left)[..., None] * v[:, j, :, None]
        left = left * (1 - share[..., j])
    return y.transpose(0, 2, 1, 3), left.transpose(0, 2, 1)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "traced offset"])
@pytest.mark.parametrize("current, offset, scale", [(False, 0, 0.5), (True, 10, 0.5), (False, 10, 6.0)])
def test_values_and_gradients(implementation, current, offset, scale):
    """Grouped heads, packed rows, pieces of a sequence, and scores that use up the stick in a few keys."""
    B, S = PACKED.shape
    T = S - offset
    q, k, v, dy = inputs(B, T, S, H, G, K, V)
    drest = np.random.default_rng(1).standard_normal((B, T, H)).astype(np.float32)
    mask = mask_of(B, T, S, segments=PACKED[:, offset:], key_segments=PACKED, offset=offset)
    if not current:
        mask &= offset + np.arange(T)[:, None] != np.arange(S)
    traced, form = implementation == "traced offset", implementation.replace("traced offset", "blockwise")

    def with_gradients(f, q, k, v, dy, drest):
        y, pull_back = jax.vjp(f, q, k, v)
        return *y, *pull_back((dy, drest))

    @jax.jit
    def compute(start, *arrays):
        def f(q, k, v):
            return stick_breaking_attention(
                q, k, v, scale=scale, attend_current=current, segment_ids=PACKED[:, offset:], key_segment_ids=PACKED,
                query_offset=start if traced else offset, implementation=form, block_size=8,
            )  # fmt: skip

        return with_gradients(f, *arrays)

    found = compute(np.int32(offset), q, k, v, dy, drest)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (q, k, v, dy, drest)]
        expected = with_gradients(lambda q, k, v: by_products(q, k, v, mask, scale), *wide)
        expected = [np.asarray(a) for a in expected]
    for name, a, b in zip(("y", "rest", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(a, b, what=name)


def test_blocks_are_left_out_where_the_stick_is_used_up():
    """Far values that are no numbers are not read, forward nor backward, where the scores of the nearer keys are high."""
    q, k, v, dy = inputs(1, 64, 64, 1, 1, 4, 4)
    q, k = np.ones_like(q), np.where(np.arange(64)[:, None, None] < 24, k, 10).astype(np.float32)
    v = np.where(np.arange(64)[:, None, None] < 8, np.float32(np.nan), v)

    @jax.jit
    def late(q, k, v, dy):  # the queries whose nearest sixteen keys have high scores
        f = lambda q: stick_breaking_attention(q, k, v, block_size=8, query_offset=40)[0]
        y, pull_back = jax.vjp(f, q[:, 40:])
        return y, pull_back(dy[:, 40:])[0]

    assert all(np.isfinite(a).all() for a in late(q, k, v, dy))


def test_memory():
    """No array of the forward and the backward pass has an entry for each pair of tokens."""
    f = lambda *qkv: stick_breaking_attention(*qkv, block_size=16)[0].sum()
    arrays = [jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)] * 3
    found = equations(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(*arrays).jaxpr)
    assert max(v.aval.size for e in found for v in e.outvars) <= 1024 * 2 * 16

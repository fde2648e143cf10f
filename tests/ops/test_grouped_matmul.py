"""All forms beside a loop over the groups in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import accounting
from ops import dispatch
from ops.grouped_matmul import grouped_matmul
from tests.tolerance import assert_close

FORMS = dispatch.offered()["grouped_matmul"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(3, 0, 7, 2), (0, 0, 13, 0), (1, 1, 0, 0), (4, 3, 3, 3), (0, 0, 0, 0)])
def test_every_group_has_its_matrix(form, sizes):
    """Also where a group has all rows or none, and where rows belong to none, which may hold anything."""
    numbers = np.random.default_rng(0)
    x, w, weight = (np.float32(numbers.standard_normal(shape)) for shape in ((13, 5), (4, 5, 3), (13, 3)))
    group = np.repeat(np.arange(4), sizes)
    expected, dx, dw = np.zeros((13, 3)), np.zeros((13, 5)), np.zeros((4, 5, 3))
    for r, g in enumerate(group):
        expected[r] = x[r].astype(np.float64) @ w[g]
        dx[r] = w[g].astype(np.float64) @ weight[r]
        dw[g] += np.outer(x[r].astype(np.float64), weight[r])
    x[len(group) :] = np.nan
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), implementation=form), x, w)
    for found, wanted, what in zip((y, *back(weight)), (expected, dx, dw), ("y", "dx", "dw"), strict=True):
        assert_close(found + 1, wanted + 1, what=what)


@pytest.mark.parametrize("rows,groups", [(1, 4), (4, 4), (7, 4), (8, 3), (9, 1), (3, 8)])
def test_blocks_hold_every_division_into_groups(rows, groups):
    """The static number of blocks is enough for any sizes."""
    x, w = jnp.arange(1.0, rows + 1)[:, None], jnp.arange(1.0, groups + 1)[:, None, None]
    run = jax.jit(lambda sizes: grouped_matmul(x, w, sizes, implementation="blocks"))
    for seed in range(12):
        numbers = np.random.default_rng(seed)
        group = np.sort(numbers.choice(groups, rows, p=numbers.dirichlet([0.3] * groups)))
        y = run(np.bincount(group, minlength=groups))
        np.testing.assert_allclose(np.asarray(y)[:, 0], np.arange(1, rows + 1) * (group + 1), rtol=1e-6)


def test_counted_operations_are_those_of_the_rows():
    """In matmul form, a row is multiplied once."""
    x, w, sizes = jnp.zeros((13, 5)), jnp.zeros((4, 5, 3)), jnp.zeros(4, jnp.int32)
    with dispatch.matmul_form():
        assert accounting.flops(lambda *a: grouped_matmul(*a), x, w, sizes).total == 2 * 13 * 5 * 3

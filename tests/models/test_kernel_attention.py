"""What the kernelised linear attentions share, against definitions; its causal and two-sided sums are tested in the mixers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernel_attention import kernel_attention, running_scale, segment_scale
from tests.tolerance import assert_close

IDS = jnp.array([[1] * 5 + [2] + [3] * 5 + [0] * 2, [0] * 3 + [4] * 10])


@pytest.mark.parametrize("causal", [True, False])
def test_without_denominator(causal):
    """The plain sums, in rows with several segments."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, *IDS.shape, 2, 4))
    y, _ = kernel_attention(q, k, v, causal=causal, normalize=False, segment_ids=IDS)
    mask = (IDS[:, :, None] == IDS[:, None]) & (IDS[:, :, None] != 0)
    mask = jnp.tril(mask) if causal else mask
    assert_close(y, jnp.einsum("bthk,bshk,bts,bshv->bthv", q, k, mask, v))


def test_scales():
    """The maximum so far, and over the whole segment; the decay is that of a sum in its units, none at a start."""
    x = 5 * jax.random.normal(jax.random.key(0), (*IDS.shape, 3))
    m, decay = running_scale(x, None, IDS)
    whole = segment_scale(x, IDS)
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 4)):
        here = np.flatnonzero(IDS[row] == segment)
        expected = np.maximum.accumulate(np.asarray(x[row, here]), 0)
        assert_close(m[row, here], expected)
        assert_close(whole[row, here], np.broadcast_to(expected[-1:], expected.shape))
        assert_close(decay[row, here], -np.diff(expected, axis=0, prepend=expected[:1]))
    one, _ = running_scale(x)
    assert_close(one[:, -1:], segment_scale(x, None))

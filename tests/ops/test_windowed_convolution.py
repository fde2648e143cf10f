import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.windowed_convolution import windowed_convolution
from tests.tolerance import assert_close


@pytest.mark.parametrize("lags", [1, 2, 5, 30])
def test_pieces(lags):
    """Any pieces, single tokens included, give the convolution of the whole, from the definition in float64."""
    random = np.random.default_rng(lags)
    x, kernel = random.standard_normal((2, 17, 3)), random.standard_normal((3, lags))
    expected = np.zeros_like(x)
    for t, j in np.ndindex(17, lags):
        if j <= t:
            expected[:, t] += kernel[:, j] * x[:, t - j]

    @jax.jit
    def run(x, kernel):
        state, outputs = jnp.zeros((2, lags - 1, 3), jnp.float32), []
        for piece in jnp.split(x, (1, 8, 9), axis=1):
            y, state = windowed_convolution(piece, kernel, state)
            outputs.append(y)
        return jnp.concatenate(outputs, 1), state

    y, state = run(x.astype(np.float32), kernel.astype(np.float32))
    assert_close(y, expected)
    padded = np.concatenate([np.zeros((2, lags - 1, 3)), x], 1)
    np.testing.assert_allclose(state, padded[:, 17:], rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_refusal():
    with pytest.raises(ValueError, match="state must be"):
        windowed_convolution(jnp.zeros((2, 4, 3)), jnp.zeros((3, 5)), jnp.zeros((2, 5, 3)))

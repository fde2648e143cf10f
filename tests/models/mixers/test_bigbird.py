import jax
import jax.numpy as jnp
import numpy as np

from models.mixers.bigbird import random_blocks


def test_random_blocks():
    """Distinct, none that is seen anyway, all of the rest where it is few, and uniform."""
    for last in (2, 4, 7, 12):
        i = np.arange(1, last)
        draws = np.asarray(
            random_blocks(jax.random.bits(jax.random.key(last), (2000, last - 1, 3)), jnp.asarray(i), last)
        )
        for row, block in enumerate(i):
            rest = set(range(last + 1)) - {0, last, block - 1, block, block + 1}
            drawn = draws[:, row]
            assert ((drawn >= 0).sum(1) == min(3, len(rest))).all()
            assert all(len(set(d[d >= 0])) == (d >= 0).sum() and set(d[d >= 0]) <= rest for d in drawn)
            if len(rest) > 3:
                frequency = np.bincount(drawn.ravel(), minlength=last + 1)[sorted(rest)] / 2000
                assert np.abs(frequency - 3 / len(rest)).max() < 0.05

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixer import Context
from tests.tolerance import assert_close

LENGTHS = (9, 1, 13)


@pytest.mark.parametrize("pattern, combine", [("strided", "heads"), ("fixed", "alternate")])
def test_folded_and_masked_forms_agree(pattern, combine):
    """Documents alone, packed, and as pieces of a stream: the forms that the contract's tests, on defaults, leave out."""
    model = mixers.create(
        "sparse_attention", 16, rngs=nnx.Rngs(0), heads=2, pattern=pattern, combine=combine, stride=4, summary=2
    )
    ids = np.repeat([1, 2, 3], LENGTHS)[None]
    x = jax.random.normal(jax.random.key(0), (1, ids.size, 16))
    context = Context(jnp.int32(1))

    @jax.jit
    def run(x):
        packed = model(x, segment_ids=ids, context=context)[0]
        alone = jnp.concatenate([model(x[:, ids[0] == i], context=context)[0] for i in (1, 2, 3)], 1)
        carry, pieces = model.initial_carry(1, ids.size), []
        for piece in (slice(0, 11), slice(11, 12), slice(12, None)):
            y, carry, _ = model(x[:, piece], carry, segment_ids=ids[:, piece], context=context)
            pieces.append(y)
        return packed, alone, jnp.concatenate(pieces, 1)

    packed, alone, pieces = run(x)
    assert_close(packed, alone)
    assert_close(pieces, alone)


def test_refusals():
    for options in (
        {"pattern": "random"},
        {"combine": "sum"},
        {"stride": 4, "summary": 5},
        {"combine": "heads", "heads": 1},
    ):
        with pytest.raises(ValueError, match="sparse_attention"):
            mixers.create("sparse_attention", 16, rngs=nnx.Rngs(0), **options)

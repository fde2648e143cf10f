"""What the law does not say of MoBA: what it is where it leaves nothing out, and that it leaves something out."""

import jax
import numpy as np
from flax import nnx

from models import mixer as mixers
from tests.tolerance import assert_close, error

X = np.random.default_rng(0).standard_normal((2, 12, 16)).astype(np.float32)
IDS = np.array([[1] * 7 + [2] * 5, [0] * 2 + [3] * 9 + [0]], np.int32)


def test_all_blocks():
    """With as many blocks as there are, it is attention; with the own block alone, it is that as far as this block goes."""
    build = lambda name, **options: mixers.create(name, 16, rngs=nnx.Rngs(0), kv_heads=2, **options)
    every, own, plain = build("moba", block=4, top_k=3), build("moba", block=4, top_k=1), build("attention")
    for name in ("w_q", "w_k", "w_v", "w_o"):
        for model in (every, own):
            getattr(model, name)[...] = getattr(plain, name)[...]
    found, near, expected = jax.jit(lambda: [m(X, segment_ids=IDS)[0] for m in (every, own, plain)])()
    assert_close(found, expected)
    assert_close(near[0, :4], expected[0, :4])
    assert error(near[0, 4:7], expected[0, 4:7]) > 0.01

"""JAX's kernel for TPUs under the laws of attention, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.attention import attention
from tests.ops.test_attention import assert_close, inputs, mask_of, oracle, with_gradients
from tests.traced import equations

CASES = {  # 150 tokens are two blocks, the last of them padded
    "packed": {"score_cap": 1.5, "segments": np.repeat([[1, 2, 0], [0, 0, 0]], [70, 60, 20], axis=1)},
    "both ways, window": {"causal": False, "window": 60, "scale": 0.3},
}


@pytest.mark.parametrize("name", ["packed", pytest.param("both ways, window", marks=pytest.mark.thorough)])
def test_values_and_gradients(name):
    """The kernel, interpreted, with gradients: grouped queries, K != V, a row of padding."""
    options = {"segments": None, **CASES[name]}
    q, k, v, dy = inputs(2, 150, 150, 2, 1, 4, 3)
    segments, rest = options.pop("segments"), {key: value for key, value in options.items() if key != "window"}
    masks = {key: options[key] for key in ("causal", "window") if key in options}
    f = functools.partial(attention, segment_ids=segments, implementation="splash", block_size=128, **options)
    actual = jax.jit(functools.partial(with_gradients, f))(dy, q, k, v)
    mask = mask_of(2, 150, 150, segments=segments, key_segments=segments, **masks)
    assert_close(actual, oracle(q, k, v, dy, mask, **rest)[:4])
    if segments is not None:
        assert not np.any(np.asarray(actual[0])[segments == 0])


@pytest.mark.parametrize("options", [{"window": 60}, {"causal": False}])
def test_what_is_seen(options):
    q, k, v, dy = inputs(1, 150, 150, 1, 1, 4, 4)
    y = jax.jit(functools.partial(attention, implementation="splash", block_size=128, **options))(q, k, v)
    causal = options.get("causal", True)
    assert_close([y], oracle(q, k, v, dy, mask_of(1, 150, 150, **options), causal=causal)[:1])


@pytest.mark.parametrize("dtype, precision", [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
def test_it_is_what_a_tpu_takes_at_full_precision(dtype, precision):
    x = jax.ShapeDtypeStruct((1, 256, 2, 8), dtype)
    with dispatch.platform("tpu"):
        traced = jax.make_jaxpr(functools.partial(with_gradients, attention))(x, x, x, x).jaxpr
    found = list(equations(traced))
    kernels = [e for e in found if e.primitive.name == "pallas_call"]
    assert len(kernels) == 3 and not any(e.params["interpret"] for e in kernels)
    asked = [p.name for e in found if e.primitive.name == "dot_general" for p in e.params["precision"]]
    assert len(asked) >= 18 and set(asked) == {precision}  # two products forward, three and four backward

"""Attention along paths against products of matrices, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.attention import NOTHING
from ops.path_attention import Path, path_attention
from tests.ops.test_attention import PACKED, mask_of
from tests.tolerance import assert_close
from tests.traced import equations

B, T, H, G, K, V = *PACKED.shape, 4, 2, 4, 3


def example():
    r = np.random.default_rng(0)
    w = r.standard_normal((B, T, G, K))
    return {
        "q": r.standard_normal((B, T, H, K)),
        "k": r.standard_normal((B, T, G, K)),
        "v": r.standard_normal((B, T, G, V)),
        "w": w / np.linalg.norm(w, axis=-1, keepdims=True),
        "beta": r.uniform(0, 2, (B, T, G)),
        "decay": np.cumsum(r.uniform(-1, 0, (B, T, H)), 1),
    }


def by_products(q, k, v, w, beta, decay):
    """The products of all pairs as matrices: H_i ... H_{j+1} for each j in the carry, and H_i ... H_1; padding has no map."""
    valid = PACKED != 0
    q, k, v, beta = (jnp.where(valid.reshape(B, T, *[1] * (a.ndim - 2)), a, 0) for a in (q, k, v, beta))
    maps = jnp.eye(K) - beta[..., None, None] * w[..., :, None] * w[..., None, :]  # [B, T, G, K, K]
    eye = jnp.broadcast_to(jnp.eye(K), (T + 1, B, G, K, K))

    def token(products, x):
        i, H_i = x
        products = jnp.where((jnp.arange(-1, T) < i)[:, None, None, None, None], H_i @ products, eye)
        return products, products

    products = jax.lax.scan(token, eye, (jnp.arange(T), jnp.moveaxis(maps, 1, 0)))[1]
    from_start, products = products[:, 0], products[:, 1:]
    seen = jnp.repeat(jnp.einsum("ijbgkl,bjgl->bgijk", products, k), H // G, 1)
    s = K**-0.5 * jnp.einsum("bihk,bhijk->bhij", q, seen) + (decay[:, :, None] - decay[:, None]).transpose(0, 3, 1, 2)
    mask = mask_of(B, T, T, segments=PACKED, key_segments=PACKED)[:, None]
    s = jnp.where(mask, s, -1e9)
    y = jnp.einsum("bhts,bshv->bthv", jnp.where(mask, jax.nn.softmax(s, -1), 0), jnp.repeat(v, H // G, 2))
    log = jnp.where(valid[..., None], jax.nn.logsumexp(s, -1).transpose(0, 2, 1), 0)
    queries = jnp.einsum("bthk,tbhkl->bthl", q, jnp.repeat(from_start, H // G, 2))
    return Path(y, log, queries, jnp.einsum("jbgkl,bjgl->bjgk", products[-1], k), from_start[-1])


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_values_and_gradients(implementation):
    """Grouped heads, decays, documents that end inside of chunks; what leaves the piece, too. Padding may hold anything, and sees
    nothing."""
    x = example()
    padding = jnp.asarray(PACKED == 0)[..., None]

    def with_gradients(f, x):
        y, pull_back = jax.vjp(lambda x: f(**x), x)
        r = np.random.default_rng(1)
        weights = [jnp.asarray(r.standard_normal(a.shape), a.dtype) for a in y]
        return y, pull_back(Path(*weights))[0]

    def ours(**x):
        path = path_attention(**x, segment_ids=jnp.asarray(PACKED), implementation=implementation, chunk_size=8)
        return path._replace(log=path.log - jnp.where(padding, NOTHING, 0))

    poisoned = {
        n: np.float32(np.where(padding[..., None] if a.ndim == 4 else padding, np.nan, a)) for n, a in x.items()
    }
    y, gradients = jax.jit(lambda x: with_gradients(ours, x))(poisoned)
    with jax.enable_x64(True):
        expected, expected_gradients = jax.jit(lambda x: with_gradients(by_products, x))(x)
        expected, expected_gradients = jax.tree.map(np.asarray, (expected, expected_gradients))
    for name, a, b in zip(Path._fields, y, expected, strict=True):
        assert_close(a, b, what=name)
    for name in x:
        assert_close(gradients[name], expected_gradients[name], what=f"gradient to {name}")


def test_memory():
    """No array of the forward and the backward pass has an entry for each pair of tokens."""
    f = lambda *a: path_attention(*a, chunk_size=16).y.sum()
    arrays = [jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)] * 4 + [
        jax.ShapeDtypeStruct((1, 2048, 2), jnp.float32)
    ]
    found = equations(jax.make_jaxpr(jax.grad(f, range(5)))(*arrays).jaxpr)
    assert max(v.aval.size for e in found for v in e.outvars) <= 2048 * 2 * (16 + 8)

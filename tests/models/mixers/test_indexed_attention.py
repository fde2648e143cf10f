"""What the law does not say of the indexer: what it is where it leaves nothing out, and what its loss moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import lightning_indexer
from models import mixer as mixers
from models.mixer import Context
from tests.tolerance import assert_close

INDEXER = {"w_qi", "w_ki", "w_w", "ki_norm"}
OF_BLOCKS = {"rate": 2, "top_k": 2, "window": 3, "index_heads": 3, "index_channels": 4, "rotary_channels": 4}
X = np.random.default_rng(0).standard_normal((2, 12, 16)).astype(np.float32)
IDS = np.array([[1] * 7 + [2] * 5, [0] * 2 + [3] * 9 + [0]], np.int32)


def build(**options):
    options = {"kv_heads": 2, "index_heads": 3, "index_channels": 4, "index_rotated": 2} | options
    return mixers.create("indexed_attention", 16, rngs=nnx.Rngs(0), **options)


def test_short_documents():
    """With as many keys as there are, it is attention."""
    model = build(top_k=9)
    plain = mixers.create("attention", 16, rngs=nnx.Rngs(1), kv_heads=2)
    for name in ("w_q", "w_k", "w_v", "w_o"):
        getattr(plain, name)[...] = getattr(model, name)[...]
    found, expected = jax.jit(lambda: [m(X, segment_ids=IDS)[0] for m in (model, plain)])()
    assert_close(found, expected)


@pytest.mark.parametrize("blocks", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_loss(blocks):
    """The objective has gradients to the indexer alone, the output to all but it; padding and other documents count nowhere.
    So in `compressed_sparse_attention`, with blocks for keys."""
    if blocks:
        name, indexer = "compressed_sparse_attention", {"index", "w_qi", "w_w"}
        model = mixers.create(name, 16, rngs=nnx.Rngs(0), index_loss=3.0, **OF_BLOCKS)
    else:
        model, indexer = build(top_k=4, index_loss=3.0), INDEXER
    graph, params = nnx.split(model)

    def run(params, x, ids):
        context = Context(key=jax.random.key(0))
        y, _, _, scalars = nnx.merge(graph, params)(x, segment_ids=ids, context=context)
        return jnp.sum(y**2), scalars["objective"], scalars["index_kl"]

    @jax.jit
    def both(params):
        (_, objective, divergence), pull_back = jax.vjp(lambda params: run(params, X, IDS), params)
        alone = [(7, run(params, X[:1, :7], None)[2]), (5, run(params, X[:1, 7:], None)[2])]
        alone.append((9, run(params, X[1:, 2:11], None)[2]))
        return objective, divergence, alone, pull_back((1.0, 0.0, 0.0))[0], pull_back((0.0, 1.0, 0.0))[0]

    objective, divergence, alone, of_output, of_objective = both(params)
    assert divergence > 0
    assert_close(divergence, sum(count * found for count, found in alone) / 21)
    assert_close(objective, 3 * divergence)
    for gradients, moved in ((of_output, False), (of_objective, True)):
        for path, gradient in nnx.to_flat_state(gradients):
            assert np.any(gradient[...]) == ((path[0] in indexer) == moved), path


@pytest.mark.parametrize("few", [True, False])
def test_divergence_of_few_keys_and_of_many(few, monkeypatch):
    """Keys that are copied for each query, and all keys under a mask: the sum over the chosen ones, written out in float64."""
    monkeypatch.setattr(lightning_indexer, "are_few", lambda chosen, keys: few)
    random = np.random.default_rng(0)
    (B, T, S, H, G, K, I, D, N), scale = (2, 5, 9, 4, 2, 3, 2, 4, 3), 0.6
    q, k, qi, ki = (random.standard_normal(shape) for shape in ((B, T, H, K), (B, S, G, K), (B, T, I, D), (B, S, D)))
    w = random.standard_normal((B, T, I))
    chosen = np.stack([[random.permutation(S)[:N] for _ in range(T)] for _ in range(B)])
    chosen[0, 1, 2], chosen[1, 3] = -1, -1
    valid = np.any(chosen >= 0, -1)
    log, terms = np.zeros((B, T, H)), []
    for b, t in np.ndindex(B, T):
        at = chosen[b, t][chosen[b, t] >= 0]
        scores = scale * np.einsum("hk,nhk->hn", q[b, t], np.repeat(k[b, at], H // G, 1))
        log[b, t] = np.log(np.exp(scores).sum(-1)) if len(at) else 0
        if len(at):
            p = np.exp(scores - log[b, t][:, None]).mean(0)
            index = np.maximum(np.einsum("id,nd->in", qi[b, t], ki[b, at]), 0)
            index = w[b, t] @ index
            terms.append(np.sum(p * (np.log(p) - index + np.log(np.exp(index).sum()))))
    arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, log, qi, ki, w)]
    found = lightning_indexer.index_divergence(*arrays, jnp.asarray(chosen), jnp.asarray(valid), scale=scale)
    assert_close(found, np.mean(terms))

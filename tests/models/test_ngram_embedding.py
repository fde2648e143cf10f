"""Embeddings of n-grams, beside whole numbers of Python."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.ngram_embedding import NGramEmbedding
from tests.tolerance import assert_close

ROWS, SIZE = 1009, 8


def expected(tables, documents, ngrams):
    """The rows for each token of documents, which are lists of ids, side by side."""
    found = []
    for tokens in documents:
        for t in range(len(tokens)):
            rows = []
            for table, n in zip(tables, ngrams):
                last = [tokens[t - i] + 1 if i <= t else 0 for i in range(n)]
                h = sum(token * 0x9E3779B1 ** (i + 1) for i, token in enumerate(last)) % 2**32
                h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
                h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
                rows.append(table[(h ^ h >> 16) % ROWS])
            found.append(np.concatenate(rows))
    return np.stack(found)


def test_rows_of_packed_documents():
    """Tables in any order of n, one of them far from 2; n-grams end at the borders of documents; padding takes no part."""
    ngrams = (5, 2)
    model = NGramEmbedding(ngrams, ROWS, SIZE, 5, rngs=nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(1), (1, 20), 0, 50_000)
    segments = jnp.asarray([[1] * 3 + [0] * 2 + [1] * 9 + [2] * 6])
    y, past = jax.jit(lambda model: model(ids, None, segments))(model)
    row = np.asarray(ids[0]).tolist()
    tables = [np.asarray(table[...]) for table in model.tables]
    valid = np.asarray(segments[0]) > 0
    rows = expected(tables, [row[:3], row[5:14], row[14:]], ngrams)
    assert_close(y[0][valid], rows @ np.asarray(model.map[...]))
    np.testing.assert_array_equal(past, [[id + 1 for id in row[:-5:-1]]])


def test_n_grams_are_spread_over_the_rows():
    """As many n-grams as rows use 1 - 1/e of these: neither order nor single tokens are lost, whatever the vocabulary."""
    for vocabulary in (2, 256, 65_536):
        model = NGramEmbedding((24,), 4096, 1, 1, rngs=nnx.Rngs(0))
        model.tables[0].set_value(jnp.arange(4096.0)[:, None])
        model.map.set_value(jnp.ones((1, 1)))
        ids = jax.random.randint(jax.random.key(vocabulary), (1, 4096), 0, vocabulary)
        rows, _ = jax.jit(lambda model, ids: model(ids, None, None))(model, ids)
        assert abs(np.unique(rows).size / 4096 - (1 - np.exp(-1))) < 0.02

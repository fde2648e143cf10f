"""Selection of keys and attention to them, against loops over queries in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch
from ops.attention import NOTHING, attention_with_logsumexp
from ops.selected_attention import select, selected_attention
from tests.tolerance import assert_close

B, T, H, G, K, V = 2, 13, 4, 2, 3, 5
IDS = np.array([[1] * 6 + [2] * 7, [0] * 2 + [3] + [4] * 5 + [0] * 2 + [5] * 2 + [0]], np.int32)


def arrays():
    numbers = np.random.default_rng(0)
    return [np.float32(numbers.standard_normal((B, T, *size))) for size in ((H, K), (G, K), (G, V))]


def random_starts(heads, size, count):
    """Spans that do not overlap, some of them of other documents, behind the query or behind the last key; some are none."""
    numbers = np.random.default_rng(1)
    choices = size * np.arange(-(-T // size))
    starts = np.stack([numbers.permutation(choices)[:count] for _ in range(B * T * heads)])
    return np.where(numbers.random(starts.shape) < 0.2, -1, starts).reshape(B, T, heads, count).astype(np.int32)


def expected(q, k, v, starts, size):
    """One query after the other."""
    y, log = np.zeros((B, T, H, V)), np.full((B, T, H), NOTHING)
    for b, t, h in np.ndindex(B, T, H):
        chosen = starts[b, t, h * starts.shape[2] // H]
        seen = [
            j for i in chosen if i >= 0 for j in range(i, min(i + size, T)) if j <= t and IDS[b, j] == IDS[b, t] != 0
        ]
        if seen:
            g = h * G // H
            s = k[b, seen, g].astype(np.float64) @ q[b, t, h] / K**0.5
            log[b, t, h] = np.log(np.sum(np.exp(s)))
            y[b, t, h] = np.exp(s - log[b, t, h]) @ v[b, seen, g]
    return y, log


@pytest.mark.parametrize("heads,size,count", [(1, 1, 5), (G, 4, 2), (H, 3, 3)])
def test_forms(heads, size, count):
    """Values of all forms, and gradients beside those of dense attention with the same mask; many keys are seen by several."""
    q, k, v = arrays()
    starts = random_starts(heads, size, count)
    numbers = np.random.default_rng(2)
    weights = [np.float32(numbers.standard_normal(shape)) for shape in ((B, T, H, V), (B, T, H))]

    def differentiated(f):
        y, pull_back = jax.vjp(f, q, k, v)
        return y, pull_back((weights[0], jnp.where(y[1] == NOTHING, 0, weights[1])))

    def dense(q, k, v):
        # The label of a key is its place, that of a query its spans; with a head of keys for each of queries.
        labels = [jnp.asarray(np.repeat(starts[..., i], H // heads, 2)) for i in range(count)]
        mask = lambda query, key: functools.reduce(
            jnp.logical_or, [(i >= 0) & (i <= key) & (key < i + size) for i in query]
        )
        key = jnp.broadcast_to(jnp.arange(T), (B, T))
        k, v = (jnp.repeat(a, H // G, 2) for a in (k, v))
        return attention_with_logsumexp(
            q, k, v, mask=mask, query_labels=labels, key_labels=key, segment_ids=IDS, implementation="reference"
        )

    _, by_dense = jax.jit(lambda: differentiated(dense))()
    for form in dispatch.offered()["selected_attention"]:
        f = functools.partial(
            selected_attention, starts=starts, size=size, segment_ids=IDS, implementation=form, block_size=4
        )
        (y, log), gradients = jax.jit(lambda f=f: differentiated(f))()
        for found, theirs in zip((y, log), expected(q, k, v, starts, size), strict=True):
            seen = theirs > NOTHING
            assert ((found > NOTHING) == seen).all()
            assert_close(np.where(seen, found, 0), np.where(seen, theirs, 0), what=form)
        for found, theirs in zip(gradients, by_dense, strict=True):
            assert_close(found, theirs, what=form)


def test_decoding():
    """A query at a traced offset in a buffer; and in one that is full, where the NaN of its last slot is seen."""
    q, k, v = arrays()
    starts = random_starts(H, 3, 3)
    whole, _ = selected_attention(q, k, v, starts, size=3, segment_ids=IDS)

    @jax.jit
    def step(q, k, starts, ids, offset):
        where = {"segment_ids": ids, "key_segment_ids": IDS, "query_offset": offset}
        return selected_attention(q, k, v, starts, size=3, **where)[0]

    for t in (4, 10):
        one = slice(t, t + 1)
        assert_close(step(q[:, one], k, starts[:, one], IDS[:, one], t), whole[:, one])
    k = k.copy()
    k[:, -1] = np.nan
    full = np.full((B, 1, 1, 1), T, np.int32)
    assert np.isnan(step(q[:, :1], k, full, IDS[:, -1:], T)[0]).all()


@pytest.mark.parametrize("form", dispatch.offered()["selected_attention"])
def test_spans_behind_all_keys(form):
    """Wherever they begin, and however long they are, they are the last key's, as those of a buffer that is full."""
    q, k, v = arrays()
    ids = np.ones((B, T), np.int32)
    largest = np.iinfo(np.int32).max
    f = functools.partial(selected_attention, segment_ids=ids, causal=False, implementation=form, block_size=4)
    log = np.einsum("bthk,bhk->bth", q.astype(np.float64), np.repeat(k[:, -1], H // G, 1)) / K**0.5
    for start, size in ((T - 1, 3), (T, 1), (T + 5, 3), (largest, largest), (T - 1, largest)):
        y, found = f(q, k, v, np.full((B, T, 1, 1), start, np.int32), size=size)
        assert_close(found, log)
        assert_close(y, np.broadcast_to(np.repeat(v[:, -1:], H // G, 2), y.shape))


@pytest.mark.parametrize("form", dispatch.offered()["select"])
def test_select(form):
    """The greatest scores among what is seen, the earlier of equal ones; with more or fewer of them than there are."""
    numbers = np.random.default_rng(0)
    q, k = (numbers.integers(-2, 3, (B, n, 2)).astype(np.float32) for n in (T, 7))  # many scores are equal
    key_ids = np.array([[1, 1, 1, 2, 2, 2, 0], [3, 4, 4, 4, 5, 0, 5]], np.int32)
    places, key_places = (
        np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        np.tile(2 * np.arange(7, dtype=np.int32), (B, 1)),
    )
    score = lambda q, k: jnp.einsum("bck,bnk->bcn", q, k)[:, :, None]
    for count in (2, 9):
        found = select(
            score, q, k, count, places=places, key_places=key_places, segment_ids=IDS, key_segment_ids=key_ids,
            implementation=form, block_size=4,
        )  # fmt: skip
        assert found.shape == (B, T, 1, min(count, 7))
        for b, t in np.ndindex(B, T):
            seen = [n for n in range(7) if key_places[b, n] <= t and key_ids[b, n] == IDS[b, t] != 0]
            best = sorted(seen, key=lambda n: (-(q[b, t] @ k[b, n]), n))[:count]
            assert [n for n in np.asarray(found[b, t, 0]) if n >= 0] == best
            assert (np.asarray(found[b, t, 0, len(best) :]) == -1).all()


def test_refusals():
    q, k, v = (jnp.asarray(a) for a in arrays())
    starts = jnp.zeros((B, T, 1, 1), jnp.int32)
    for arguments, message in (
        ((q[:, :, :3], k, v, starts), "multiple"),
        ((q, k, v, jnp.zeros((B, T, 3, 1), jnp.int32)), "of 1, of 2 or of 4 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            selected_attention(*arguments)

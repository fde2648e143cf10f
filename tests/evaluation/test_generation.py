"""What is drawn from logits, beside distributions that are reckoned token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from evaluation.generation import Generator, draw, filter_logits

SIZE = 7
SETTINGS = [
    {},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": SIZE + 2},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.97},
    {"top_p": 1e-300},  # 0 in float32
    {"temperature": 1.7, "top_k": 5, "top_p": 0.7},
    {"temperature": 0.6, "top_k": 2, "top_p": 0.9},
]


def logits() -> np.ndarray:
    """Rows in general position, with ties, and all equal."""
    rng = np.random.default_rng(0)
    ties = rng.integers(-1, 2, (4, SIZE))
    return np.concatenate([rng.normal(size=(4, SIZE)), ties, np.zeros((1, SIZE))]).astype(np.float32)


def distribution(row, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """What is documented, by the most simple means: tokens are taken one by one, the likeliest first, of equals the lowest id."""
    weights = [np.exp(float(x) / temperature) for x in row]
    kept = []
    for _ in range(top_k or len(row)):
        left = [i for i in range(len(row)) if i not in kept]
        if left:
            kept.append(max(left, key=lambda i: (weights[i], -i)))
    total, nucleus = sum(weights[i] for i in kept), []
    for i in kept:
        if sum(weights[j] for j in nucleus) / total < top_p:
            nucleus.append(i)
    total = sum(weights[i] for i in nucleus)
    return np.array([weights[i] / total if i in nucleus else 0.0 for i in range(len(row))])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distributions(settings):
    expected = np.stack([distribution(row, **settings) for row in logits()])
    found = jax.nn.softmax(filter_logits(jnp.asarray(logits()), **{"temperature": 1.0} | settings), -1)
    np.testing.assert_array_equal(np.asarray(found) > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS[1:9:3] + SETTINGS[-2:-1], ids=str)
def test_frequencies(settings):
    """Draws have that distribution, within what chance allows."""
    count, row = 20_000, logits()[1]
    keys = jax.random.split(jax.random.key(0), count)
    tokens = draw(jnp.broadcast_to(row, (count, SIZE)), keys, **{"temperature": 1.0} | settings)
    expected = distribution(row, **settings)
    found = np.bincount(tokens, minlength=SIZE) / count
    assert not found[expected == 0].any()
    assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-12).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-39, 9e-7])
def test_cold_is_greedy(temperature):
    rows = jnp.asarray(logits())
    keys = jax.random.split(jax.random.key(0), len(rows))
    expected = [max(range(SIZE), key=lambda i: (row[i], -i)) for row in logits()]
    np.testing.assert_array_equal(draw(rows, keys, temperature), expected)
    np.testing.assert_array_equal(draw(rows, keys, 1e-6), expected[:4] + list(draw(rows, keys, 1e-6)[4:]))


def generator(scores, **settings):
    """Of a model that says `scores[token]` of what follows a token, whatever was before."""
    call = lambda params, ids, carry, segment_ids: (params[ids], carry)
    return Generator(call, lambda params, batch, capacity: jnp.zeros(batch), **settings), jnp.asarray(scores)


def test_rows_have_their_own_draws():
    """A row's tokens depend on its prompt and seed, and on no other row."""
    model, params = generator(np.zeros((5, 5), np.float32))
    tokens, _ = model(params, np.array([[1], [1], [1]]), 12, [0, 1, 0])
    assert (tokens[0] == tokens[2]).all() and (tokens[0] != tokens[1]).any()
    alone, _ = model(params, np.array([[1]]), 12, [1])
    assert (alone[0] == tokens[1]).all()


def test_the_end_of_all_rows():
    model, params = generator(np.roll(np.eye(5, dtype=np.float32), 1, 1), temperature=0.0)
    seen = []
    see = lambda tokens: seen.append(tokens.tolist()) or len(seen) == 3
    tokens, _ = model(params, np.array([[0], [3]]), 9, [0, 0], see=see)
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 1]] and seen == np.transpose(tokens).tolist()


def test_more_tokens_than_there_is_memory_for():
    """The carry has room for all of them from the beginning: 8 PB here."""
    call = lambda params, ids, carry, segment_ids: (params[ids], carry)
    model = Generator(call, lambda params, batch, capacity: jnp.zeros((batch, capacity, 2**20)))
    params = jnp.zeros((5, 5))
    with pytest.raises(
        UserError, match=r"no memory for 1 rows of 2,000,000,001 tokens, .* 8,388,608\.0 GB: lower --length"
    ):
        model(params, np.array([[1]]), 2_000_000_000, [0])
    tokens, _ = model(params, np.array([[1]]), 2, [0])
    assert tokens.shape == (1, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers(temperature):
    scores = np.roll(np.eye(5, dtype=np.float32), 1, 1) * 1e4
    scores[3, 0] = np.nan
    model, params = generator(scores, temperature=temperature)
    assert model(params, np.array([[0]]), 3, [0])[0].tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match="scores of new token 4 are no numbers"):
        model(params, np.array([[0], [4]]), 4, [0, 0])

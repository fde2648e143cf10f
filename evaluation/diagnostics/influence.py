"""How much the outputs at some tokens depend on the inputs at all tokens, and over what distances."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from evaluation.diagnostics.probing import Tapped
from models.sequence_model import SequenceModel


def query_positions(length: int, count: int, causal: bool) -> np.ndarray:
    """Evenly spaced tokens; of a causal model only those with at least half of the sequence before them."""
    first = length // 2 if causal else 0
    return np.unique(np.linspace(first, length - 1, count).astype(np.int32))


def mixer_outputs(x: Float[Array, "B T D"], mixer: nnx.Module, call: dict[str, Any]) -> Float[Array, "B T D"]:
    """y = f(x) for `influence`: a mixer with the other arguments of its call."""
    return mixer(x, **call)[0]


def model_logits(
    added: Float[Array, "B T D"], model: SequenceModel, ids: Int[Array, "B T"], where: dict[str, Array]
) -> Float[Array, "B T E"]:
    """y = f(x) for `influence`: the logits of a model, x added to its embedded tokens."""
    own = nnx.clone(model)
    own.stack = Tapped(own.stack, lambda x, *_, **__: x + added)
    # Where rows are scored and not tokens: what the pooling reads of each token.
    return own(ids, **where)[0] if model.kind == "token" and model.regression is None else own.encode(ids, **where)[0]


@functools.partial(jax.jit, static_argnames=("f", "probes"))
def influence(
    f, args: tuple, x: Float[Array, "B T D"], at: Int[Array, "Q"], key: Key[Array, ""], probes: int
) -> Float[Array, "B Q T"]:
    """|d y_t / d x_s| for the tokens t in `at` and all s, where y = f(x, *args) is [B, T, E].

    It is the Frobenius norm, estimated: for u ~ N(0, I), E |u^T J|^2 = |J|^2. Zeros are exact.

    Args:
      f: `mixer_outputs`, `model_logits` or another function of x.
      args: the other arguments of f.
      x: where the Jacobian is taken.
      at: the tokens t.
      key: the source of the directions u.
      probes: the number of directions for each t.
    """
    y, pull = jax.vjp(lambda x: f(x, *args), x)

    def one(inputs):
        t, key = inputs
        u = jax.random.normal(key, (y.shape[0], y.shape[-1]), y.dtype)
        return jnp.sum(jnp.square(pull(jnp.zeros_like(y).at[:, t].set(u))[0]), -1)

    times = jnp.repeat(jnp.asarray(at), probes)
    # As many at once as fit into some 256 MB.
    squares = jax.lax.map(one, (times, jax.random.split(key, len(times))), batch_size=max(1, min(16, 2**26 // y.size)))
    squares = squares.reshape(len(at), probes, *x.shape[:2]).mean(1)
    return jnp.sqrt(squares).swapaxes(0, 1)


def locality(
    found: Float[Array, "B Q T"], at: Int[Array, "Q"], weights: Float[Array, "B T"], causal: bool
) -> dict[str, Any]:
    """Where the influence on a token comes from.

    Each token's influences are divided by their sum; that is the mass. Tokens of weight 0 are left out.

    Returns:
      profile: mean influence, not divided, by distance |t - s|; s <= t if `causal`.
      mass: mean mass by distance.
      within: mass within the distances 0, 1, 2, 4, ...
      cover: the least distance within which 50, 90 and 99 % of the mass are.
      mean_distance, entropy (in nats; that of equal masses on n tokens is log n); None where there is no influence at all.
    """
    found, at = np.asarray(found, np.float64), np.asarray(at)
    length = found.shape[-1]
    real = (np.asarray(weights)[:, at] > 0) & (found.sum(-1) > 0)
    distance = np.abs(at[:, None] - np.arange(length))
    raw, count, mass = np.zeros(length), np.zeros(length), np.zeros(length)
    entropy = []
    for b, q in zip(*np.nonzero(real)):
        share = found[b, q] / found[b, q].sum()
        np.add.at(raw, distance[q], found[b, q])
        np.add.at(count, distance[q], np.arange(length) <= at[q] if causal else 1)
        np.add.at(mass, distance[q], share / real.sum())
        entropy.append(-np.sum(share * np.log(np.where(share > 0, share, 1))))
    reach = np.cumsum(mass)
    steps = [0, *(2**i for i in range(length.bit_length()) if 2**i < length - 1), length - 1]
    cover = {
        str(percent): int(np.searchsorted(reach, percent / 100 * (1 - 1e-9))) if entropy else None
        for percent in (50, 90, 99)
    }
    return {
        "profile": (raw / np.maximum(count, 1))[: int(np.flatnonzero(count).max(initial=0)) + 1].tolist(),
        "mass": mass.tolist(),
        "within": {str(d): float(reach[d]) for d in dict.fromkeys(steps)},
        "cover": cover,
        "mean_distance": float(mass @ np.arange(length)) if entropy else None,
        "entropy": float(np.mean(entropy)) if entropy else None,
    }

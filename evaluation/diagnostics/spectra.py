"""Eigenvalues of d state_t / d state_{t-1} of recurrent mixers, at the tokens of a real sequence."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from evaluation.diagnostics.probing import calls_with_carry
from models.sequence_model import SequenceModel

CHUNK = 256
ZERO = 1e-6  # eigenvalues below are those of buffers that only shift
KEPT = 2000
STREAMS = "it needs a causal model, all of whose mixers stream"
GROWS = "its state grows with the sequence"
EMPTY = "its state holds no numbers: it sees one token alone"


def layer_spectra(
    model: SequenceModel, mixers: list, batch: dict, causal: bool, tokens: int, limit: int, seed: int
) -> list[dict[str, Any]]:
    """What `describe` says of each layer, at `tokens` tokens of the first row; {"skipped": why} where there is no spectrum."""
    if not causal or not all(mixer.streaming for mixer in mixers):
        return [{"skipped": STREAMS} for _ in mixers]
    keys = [key for key in ("inputs", "segment_ids") if key in batch]
    row = {key: jnp.asarray(batch[key][:1]) for key in keys}
    length = row["inputs"].shape[1]
    chosen = _inside(np.asarray(batch.get("segment_ids", np.ones((1, length))))[0], tokens)
    carry, found = model.initial_carry(1, length), [[] for _ in mixers]
    rng = np.random.default_rng(seed)
    for t in range(max(chosen, default=-1) + 1):
        token = {key: value[:, t : t + 1] for key, value in row.items()}
        if t in chosen:
            for layer, (x, state, call) in enumerate(calls_with_carry(model, token, carry)):
                if not mixers[layer].constant_carry:
                    continue
                size = _floats(state)[0].size
                rows = functools.partial(_jacobian_rows, mixers[layer], x, state, call)
                found[layer].append((size, *eigenvalues(rows, size, limit, rng)))
        carry = _advance(model, token, carry)
    return [describe(one) if one else {"skipped": GROWS} for one in found]


def eigenvalues(
    rows: Callable[[np.ndarray], np.ndarray], size: int, limit: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Eigenvalues of a matrix A, of a sample of its parts if it is large.

    The graph with an edge from i to j where A_ij != 0 falls into strongly connected parts; ordered by them, A is block
    triangular, so its eigenvalues are those of the diagonal blocks (a buffer that shifts has blocks of size 1 and eigenvalues
    0, exactly). A block is complete once all rows that are reached from one of its own are known.

    Args:
      rows: `rows(indices)` [n, size].
      size: of A.
      limit: how many rows to ask for, about; enough for all if size <= limit.
      rng: chooses the rows to begin with.

    Returns:
      the eigenvalues, and the number of rows in blocks that were larger than the limit allowed and are left out.
    """
    order = iter(rng.permutation(size) if size > limit else np.arange(size))
    known = np.zeros(size, bool)
    reached = np.zeros(size, bool)
    parts = []
    while known.sum() < min(size, limit):
        waiting = np.flatnonzero(reached & ~known)[:CHUNK]
        room = min(CHUNK, size, limit - known.sum()) if not len(waiting) else 0
        while len(waiting) < room:
            i = next(order, None)
            if i is None:
                break
            if not known[i]:
                waiting = np.append(waiting, i)
        if not len(waiting):
            break
        # Always as many rows, so that they are compiled for once.
        padded = np.resize(waiting, min(CHUNK, size)).astype(np.int32)
        values = np.asarray(rows(padded), np.float64)[: len(waiting)]
        i, j = np.nonzero(values)
        parts.append((waiting[i], j, values[i, j]))
        known[waiting] = True
        reached[waiting] = True
        reached[j] = True
    if not parts:  # a state without numbers
        return np.zeros(0, complex), 0
    row, column, value = (np.concatenate(arrays) for arrays in zip(*parts))
    matrix = sparse.csr_array((value, (row, column)), shape=(size, size))
    complete = known & ~_reaching(matrix != 0, reached & ~known)
    count, label = connected_components(matrix, connection="strong")
    sizes = np.bincount(label[complete], minlength=count)
    single = complete & (sizes[label] == 1)
    found = [matrix.diagonal()[single].astype(complex)]
    for part in np.flatnonzero(sizes > 1):
        inside = np.flatnonzero(label == part)
        found.append(np.linalg.eigvals(matrix[inside][:, inside].toarray()).astype(complex))
    return np.concatenate(found), int(known.sum() - complete.sum())


def _reaching(edges: sparse.csr_array, target: np.ndarray) -> np.ndarray:
    """The nodes from which a target can be reached."""
    while True:
        more = target | (edges @ target.astype(np.float64) > 0)
        if (more == target).all():
            return target
        target = more


def describe(found: list[tuple[int, np.ndarray, int]]) -> dict[str, Any]:
    """Eigenvalues at several tokens, as numbers to report.

    Args:
      found: for each token the size of the state and what `eigenvalues` returned.

    Returns:
      state (its size), sampled and left_out (rows, on average over the tokens), zeros (share of eigenvalues of buffers);
      of the others: modulus and time_scale -1 / log |lambda| in tokens (None: never forgets) as quantiles, the share beyond
      1, histograms of the modulus over [0, 1] and of the phase over [-pi, pi], and some of them as [real, imaginary].
      {"skipped": why} if there are none.
    """
    all_of = np.concatenate([values for _, values, _ in found])
    if not found[0][0]:
        return {"skipped": EMPTY}
    if not len(all_of):
        return {"skipped": f"no part of its state of {found[0][0]} numbers is small enough to be taken alone"}
    values = all_of[np.abs(all_of) > ZERO]
    result = {
        "state": found[0][0],
        "sampled": float(np.mean([len(values) for _, values, _ in found])),
        "left_out": float(np.mean([left for _, _, left in found])),
        "zeros": float(1 - len(values) / max(1, len(all_of))),
    }
    if not len(values):
        return result
    modulus, phase = np.abs(values), np.angle(values)
    percents = (0, 5, 25, 50, 75, 95, 100)
    radii = np.percentile(modulus, percents)
    picked = values[:: -(-len(values) // KEPT)]
    return result | {
        "modulus": dict(zip(map(str, percents), radii.tolist())),
        "time_scale": {str(p): time_scale(r) for p, r in zip(percents, radii)},
        "beyond_1": float(np.mean(modulus > 1 + 1e-6)),
        "modulus_histogram": np.histogram(np.minimum(modulus, 1), 40, (0, 1))[0].tolist(),
        "phase_histogram": np.histogram(phase, 40, (-np.pi, np.pi))[0].tolist(),
        "eigenvalues": np.stack([picked.real, picked.imag], -1).tolist(),
    }


def time_scale(modulus: float) -> float | None:
    """-1 / log |lambda|: tokens after which 1/e is left; None where nothing is ever forgotten."""
    return float(-1 / np.log(modulus)) if modulus < 1 - 1e-7 else None


def _inside(segment_ids: np.ndarray, count: int) -> list[int]:
    """Evenly spaced tokens of a row that continue a document."""
    inside = 1 + np.flatnonzero((segment_ids[1:] > 0) & (segment_ids[1:] == segment_ids[:-1]))
    return sorted(
        {int(inside[i]) for i in np.linspace(0, len(inside) - 1, count + 1).astype(int)[1:]} if len(inside) else []
    )


@jax.jit
def _advance(model, token, carry):
    return model(token["inputs"], carry, segment_ids=token.get("segment_ids"))[1]


def _floats(carry):
    """The real numbers in a carry's state as one vector, and the function that puts others in their place."""
    leaves, tree = jax.tree.flatten(carry["state"])
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    flat, unravel = ravel_pytree([leaf for leaf, is_real in zip(leaves, real) if is_real])

    def put(flat):
        new = iter(unravel(flat))
        return carry | {"state": tree.unflatten([next(new) if r else leaf for leaf, r in zip(leaves, real)])}

    return flat, put


@jax.jit
def _jacobian_rows(mixer, x, carry, call, rows):
    flat, put = _floats(carry)
    _, pull = jax.vjp(lambda flat: _floats(mixer(x, put(flat), **call)[1])[0], flat)
    return jax.vmap(lambda i: pull(jnp.zeros_like(flat).at[i].set(1))[0])(rows)

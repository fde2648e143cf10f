"""What the mixers of a trained model do with a few sequences, as plain numbers.

    locality          how far a mixer reaches at each depth: attention dilution (TransNormer, arXiv 2210.10340, section 3),
                      measured on |d y_t / d x_s| so that it means the same for every mixer
    score gradients   |d p_ij / d s_ij| of attention maps: at most 1/4 under a softmax, unbounded under s / sum s (the same paper)
    token gradients   how unequal |d loss / d x_t| of each mixer's inputs x_t is over the tokens
    receptive field   |d logits_t / d embedding_s| of the whole model by distance
    spectra           eigenvalues of d state_t / d state_{t-1} of recurrent mixers, and the time scales that they stand for

Everything is computed in float32, in evaluation mode and on one device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from data.rows import shown
from data.task import Task
from evaluation.diagnostics.influence import influence, locality, mixer_outputs, model_logits, query_positions
from evaluation.diagnostics.probing import observe, unstack
from evaluation.diagnostics.spectra import layer_spectra
from models.parallel import Parallel
from models.sequence_model import SequenceModel

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


def measure(
    model: SequenceModel,
    names: list[str],
    batch: dict[str, np.ndarray],
    *,
    causal: bool,
    queries: int = 32,
    probes: int = 4,
    tokens: int = 4,
    limit: int = 1024,
    seed: int = 0,
) -> dict[str, Any]:
    """All diagnostics of a model.

    Args:
      model: the model, its parameters on one device.
      names: the names of the mixers, layer by layer.
      batch: "inputs", "targets", "weights" [B, T], and "segment_ids" and "positions" or neither.
      causal: whether the model is causal.
      queries: number of tokens t at which the influence of others is measured.
      probes: random directions in y_t for each of them.
      tokens: number of tokens of the first row at which spectra are taken.
      limit: rows of a state's Jacobian that are computed; of larger states the spectrum is that of a sample.
      seed: the source of the probes and samples.

    Returns:
      {"length", "sequences", "receptive_field", "layers": one dict for each layer}; nested dicts and lists of numbers.
    """
    rows, length = batch["inputs"].shape[:2]
    scored = tokens_of(batch)
    where = {key: jnp.asarray(batch[key]) for key in ("segment_ids", "positions") if key in batch}
    at = query_positions(length, queries, causal)
    mixers = unstack(model)
    inputs, gradients = observe(model, batch, where)
    key = jax.random.key(seed)
    embed = jax.eval_shape(lambda: inputs[0][0])
    logits = influence(model_logits, (model, batch["inputs"], where), jnp.zeros(embed.shape), at, key, probes)
    layers = []
    for layer, (name, mixer, (x, call)) in enumerate(zip(names, mixers, inputs)):
        found = influence(mixer_outputs, (mixer, call), x, at, jax.random.fold_in(key, layer), probes)
        norms = np.linalg.norm(gradients[layer], axis=-1)[_real(batch)]
        layers.append(
            {
                "mixer": name,
                "locality": locality(found, at, scored, causal),
                "token_gradient": spread(norms),
                "score_gradient": None,
            }
        )
        parts = mixer.branches(x) if isinstance(mixer, Parallel) else [(name, mixer, x)]
        attention = next((part for part in parts if hasattr(part[1], "attention_scores")), None)
        if attention is not None:
            values, kind = score_gradients(*attention[1:], call["segment_ids"], call["positions"])
            layers[-1]["score_gradient"] = {"normalization": kind} | spread(values)
    for layer, found in enumerate(layer_spectra(model, mixers, batch, causal, tokens, limit, seed)):
        layers[layer]["spectrum"] = found
    field = locality(logits, at, scored, causal)
    return {"length": length, "sequences": rows, "receptive_field": field, "layers": layers}


def rows_of(task: Task, split: str, count: int) -> dict[str, np.ndarray]:
    """`count` rows spread over a split, with segments only where the task has them."""
    total = task.num_examples(split)
    rows = [task.example(split, i) for i in np.unique(np.linspace(0, total - 1, count).astype(int))]
    return shown({key: np.stack([row[key] for row in rows]) for key in rows[0]}, task.spec.segmented)


def tokens_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B, T], not 0 at the tokens that count: those that are scored, or where rows are scored all but padding."""
    if np.ndim(batch["weights"]) == 2:
        return batch["weights"]
    shape = batch["inputs"].shape[:2]
    return (batch["segment_ids"] != 0).astype(np.float32) if "segment_ids" in batch else np.ones(shape, np.float32)


def score_gradients(
    mixer: nnx.Module, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, positions: Int[Array, "B T"]
) -> tuple[np.ndarray, str]:
    """|d p_ij / d s_ij| of every pair that sees each other, and how p is made of the scores s.

    softmax: p_ij (1 - p_ij), at most 1/4. sum: (1 - p_ij) / sum_j s_ij, which has no bound. none: 1.
    """
    scores, kind = mixer.attention_scores(x, segment_ids=segment_ids, positions=positions)
    if kind not in ("softmax", "sum", "none"):
        raise ValueError(f"attention_scores must say 'softmax', 'sum' or 'none', got {kind!r}")
    scores = np.asarray(scores, np.float64)
    seen = scores > -np.inf
    if mixer.causal:
        seen &= np.tri(x.shape[1], dtype=bool)
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        seen &= ((ids[:, :, None] == ids[:, None]) & (ids[:, None] > 0))[:, None]
    real = seen.any(-1, keepdims=True)
    if kind == "softmax":
        top = np.max(np.where(seen, scores, -np.inf), -1, keepdims=True, initial=-np.inf)
        weight = np.where(seen, np.exp(np.where(seen, scores - np.where(real, top, 0), 0)), 0)
        p = weight / np.where(real, weight.sum(-1, keepdims=True), 1)
        gradient = p * (1 - p)
    elif kind == "sum":
        total = np.where(seen, scores, 0).sum(-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            gradient = np.abs(1 - scores / total) / np.abs(total)
    else:
        gradient = np.ones_like(scores)
    return gradient[seen], kind


def spread(values: np.ndarray) -> dict[str, Any]:
    """Mean, max, std / mean, max / mean, and quantiles in percent; what is not finite (a row of zero scores) is only counted."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        finite = np.zeros(1)
    mean = float(finite.mean())
    return {
        "mean": mean,
        "max": float(finite.max()),
        "relative_std": float(finite.std() / mean) if mean else None,
        "max_over_mean": float(finite.max() / mean) if mean else None,
        "quantiles": dict(zip(map(str, QUANTILES), np.percentile(finite, QUANTILES).tolist())),
        "not_finite": int(values.size - np.isfinite(values).sum()),
    }


def _real(batch: dict) -> np.ndarray:
    return np.asarray(tokens_of(batch) > 0 if "segment_ids" not in batch else batch["segment_ids"] > 0)

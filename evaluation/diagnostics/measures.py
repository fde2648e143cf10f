"""What the mixers of a trained model do with a few sequences, as plain numbers.

    locality          how far a mixer reaches at each depth: attention dilution (TransNormer, arXiv 2210.10340, section 3),
                      measured on |d y_t / d x_s| so that it means the same for every mixer
    score gradients   |d p_ij / d s_ij| of attention maps: at most 1/4 under a softmax, unbounded under s / sum s (the same paper)
    token gradients   how unequal |d loss / d x_t| of each mixer's inputs x_t is over the tokens
    receptive field   |d logits_t / d embedding_s| of the whole model by distance
    spectra           eigenvalues of d state_t / d state_{t-1} of recurrent mixers, and the time scales that they stand for

All is in float32, in evaluation mode and on one device.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from common.console import say
from common.errors import UserError
from data import task as tasks
from evaluation.diagnostics import plots
from evaluation.diagnostics.probing import Tapped, observe, unstack
from evaluation.diagnostics.spectra import spectra
from evaluation.scoring import Loaded, at_length
from models.sequence_model import SequenceModel
from ops import dispatch

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
LONGEST = 512  # by default


def run(model: Loaded, lengths: list[int], sequences: int = 4) -> dict[str, Any]:
    """Diagnoses a checkpoint on its validation split; writes JSON and plots into the run's `diagnostics/` and prints a table.

    Raises:
      UserError: for several lengths, or where the folder holds the diagnostics of another step.
    """
    if model.config.model.head == "pair":
        raise UserError("there are no diagnostics of models of pairs")
    if len(lengths) > 1:
        raise UserError(f"diagnostics are of one length, --lengths has {len(lengths)}")
    config, folder = model.config, model.workdir / "diagnostics"
    refuse_another(folder, model.step)
    length = config.task.spec.length
    if lengths:
        length = lengths[0]
    elif "length" in tasks.defaults(config.raw["task"]["name"]):
        length = min(LONGEST, length)
    task = config.task if length == config.task.spec.length else at_length(config, length)
    batch = rows_of(task, "valid", sequences)
    pattern = config.model.pattern
    with jax.default_device(jax.local_devices()[0]), dispatch.implementation(config.train.implementation):
        whole = model.built.merge(jax.tree.map(jnp.asarray, jax.device_get(model.params)))
        names = [pattern[i % len(pattern)] for i in range(config.model.depth)]
        result = diagnose(whole, names, batch, causal=config.model.causal)
    result = {"step": model.step, "task": config.task.name, **result}
    if jax.process_index() == 0:
        say(table(result))
        say(plots.save(result, folder))
    return result


def refuse_another(folder: Path, step: int) -> None:
    """Raises a UserError where `folder` holds the diagnostics of another step."""
    file = folder / plots.FILE
    if file.exists() and (other := json.loads(file.read_text()).get("step")) != step:
        raise UserError(f"{file} is of step {other}, this is step {step}; move or delete {folder} to go on")


def table(result: dict[str, Any]) -> str:
    """A line for each layer."""
    steps = [str(d) for d in (1, 8, 64) if str(d) in result["layers"][0]["locality"]["within"]]
    lines = [
        f"{'layer':<24}" + "".join(f"{'<= ' + d:>8}" for d in steps) + f"{'distance':>10}{'tokens':>8}"
        f"{'grad std':>10}{'score std':>11}{'max':>10}{'time scale':>12}"
    ]
    number = lambda value, form: "-" if value is None else format(value, form)
    for i, layer in enumerate(result["layers"]):
        local, scores = layer["locality"], layer["score_gradient"] or {"normalization": "none"}
        scores = {} if scores["normalization"] == "none" else scores
        tokens = None if local["entropy"] is None else np.exp(local["entropy"])
        scale = layer["spectrum"].get("time_scale", {"50": None})["50"]
        lines.append(
            f"{plots.label(i, layer):<24}"
            + "".join(f"{100 * local['within'][d]:>6.1f} %" for d in steps)
            + f"{number(local['mean_distance'], '.1f'):>10}{number(tokens, '.1f'):>8}"
            + f"{number(layer['token_gradient']['relative_std'], '.2f'):>10}"
            + f"{number(scores.get('relative_std'), '.2f'):>11}{number(scores.get('max'), '.3g'):>10}"
            + f"{number(scale, '.1f'):>12}"
        )
    cover = ", ".join(f"{percent} % within {d}" for percent, d in result["receptive_field"]["cover"].items())
    lines += [f"receptive field of the model: {cover}", LEGEND]
    for i, layer in enumerate(result["layers"]):
        spectrum = layer["spectrum"]
        if "skipped" in spectrum:
            lines.append(f"{plots.label(i, layer)} has no spectrum: {spectrum['skipped']}")
        elif spectrum["sampled"] < spectrum["state"]:
            share = f"{spectrum['sampled']:.0f} of the {spectrum['state']} numbers of its state"
            lines.append(f"{plots.label(i, layer)} has the spectrum of a sample, {share}")
    return "\n".join(lines)


LEGEND = """<= d: influence from within d tokens; distance: its mean; tokens: exp(entropy) of where it comes from
grad std: std / mean of |d loss / d x_t| over tokens; score std, max: of |d p / d s| of the attention map
time scale: median of -1 / log |eigenvalue| of the state's step, in tokens"""


def diagnose(
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
      model: with its parameters on one device.
      names: of the mixers, layer by layer.
      batch: "inputs", "targets", "weights" [B, T], and "segment_ids" and "positions" or neither.
      causal: whether the model is.
      queries: number of tokens t at which the influence of others is measured.
      probes: random directions in y_t for each of them.
      tokens: number of tokens of the first row at which spectra are taken.
      limit: rows of a state's Jacobian that are computed; of larger states the spectrum is that of a sample.
      seed: of the probes and samples.

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
    logits = influence(_logits, (model, batch["inputs"], where), jnp.zeros(embed.shape), at, key, probes)
    layers = []
    for layer, (name, mixer, (x, call)) in enumerate(zip(names, mixers, inputs)):
        found = influence(_outputs, (mixer, call), x, at, jax.random.fold_in(key, layer), probes)
        norms = np.linalg.norm(gradients[layer], axis=-1)[_real(batch)]
        layers.append(
            {
                "mixer": name,
                "locality": locality(found, at, scored, causal),
                "token_gradient": spread(norms),
                "score_gradient": None,
            }
        )
        if hasattr(mixer, "attention_scores"):
            values, kind = score_gradients(mixer, x, call["segment_ids"], call["positions"])
            layers[-1]["score_gradient"] = {"normalization": kind} | spread(values)
    for layer, found in enumerate(spectra(model, mixers, batch, causal, tokens, limit, seed)):
        layers[layer]["spectrum"] = found
    field = locality(logits, at, scored, causal)
    return {"length": length, "sequences": rows, "receptive_field": field, "layers": layers}


def rows_of(task: tasks.Task, split: str, count: int) -> dict[str, np.ndarray]:
    """`count` rows spread over a split, with segments only where the task has them."""
    total = task.num_examples(split)
    rows = [task.example(split, i) for i in np.unique(np.linspace(0, total - 1, count).astype(int))]
    drop = () if task.spec.segmented else ("segment_ids", "positions")
    return {key: np.stack([row[key] for row in rows]) for key in rows[0] if key not in drop}


def tokens_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B, T], not 0 at the tokens that count: those that are scored, or where rows are scored all but padding."""
    if np.ndim(batch["weights"]) == 2:
        return batch["weights"]
    shape = batch["inputs"].shape[:2]
    return (batch["segment_ids"] != 0).astype(np.float32) if "segment_ids" in batch else np.ones(shape, np.float32)


def query_positions(length: int, count: int, causal: bool) -> np.ndarray:
    """Evenly spaced tokens; of a causal model only those with at least half of the sequence before them."""
    first = length // 2 if causal else 0
    return np.unique(np.linspace(first, length - 1, count).astype(np.int32))


def _outputs(x, mixer, call):
    return mixer(x, **call)[0]


def _logits(added, model, ids, where):
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
    cover = lambda part: int(np.searchsorted(reach, part * (1 - 1e-9))) if entropy else None
    return {
        "profile": (raw / np.maximum(count, 1))[: int(np.flatnonzero(count).max(initial=0)) + 1].tolist(),
        "mass": mass.tolist(),
        "within": {str(d): float(reach[d]) for d in dict.fromkeys(steps)},
        "cover": {str(percent): cover(percent / 100) for percent in (50, 90, 99)},
        "mean_distance": float(mass @ np.arange(length)) if entropy else None,
        "entropy": float(np.mean(entropy)) if entropy else None,
    }


def score_gradients(
    mixer: nnx.Module, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, positions: Int[Array, "B T"]
) -> tuple[np.ndarray, str]:
    """|d p_ij / d s_ij| of every pair that sees each other, and how p is made of the scores s.

    softmax: p_ij (1 - p_ij), at most 1/4. sum: (1 - p_ij) / sum_j s_ij, which has no bound. none: 1.
    """
    scores, kind = mixer.attention_scores(x, segment_ids=segment_ids, positions=positions)
    if kind not in ("softmax", "sum", "none"):
        raise UserError(f"attention_scores must say 'softmax', 'sum' or 'none', got {kind!r}")
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

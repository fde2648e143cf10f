"""What the mixers of a checkpoint do, as a table, as numbers and as plots in the run's `diagnostics/`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.console import say
from common.errors import UserError
from data import task as tasks
from evaluation.diagnostics import record
from evaluation.diagnostics.measures import measure, rows_of
from evaluation.diagnostics.plots import label
from evaluation.loading import LoadedRun
from evaluation.scoring import at_length
from ops import dispatch

LONGEST = 512  # tokens, where no length is given
LEGEND = """<= d: influence from within d tokens; distance: its mean; tokens: exp(entropy) of where it comes from
grad std: std / mean of |d loss / d x_t| over tokens; score std, max: of |d p / d s| of the attention map
time scale: median of -1 / log |eigenvalue| of the state's step, in tokens"""


def diagnose(run: LoadedRun, lengths: Sequence[int] = (), sequences: int = 4) -> dict[str, Any]:
    """Diagnoses a checkpoint on the validation split; writes JSON and plots into the run's `diagnostics/` and prints a table.

    Args:
      run: the run and its checkpoint.
      lengths: one length of the sequences at most; by default the one of training, or `LONGEST` where that is less.
      sequences: the number of sequences, spread over the split.

    Returns:
      what `measures.measure` returns, with "step", "data", "task" and, where the run was trained on other data, that one's
      fingerprint.

    Raises:
      UserError: for a model of pairs, for several lengths, where the folder holds diagnostics of another step, length or data,
        and where it cannot be written.
    """
    config, folder = run.config, run.workdir / "diagnostics"
    if config.model.head == "pair":
        raise UserError("there are no diagnostics of models of pairs")
    if len(lengths) > 1:
        raise UserError(f"diagnostics are of one length, --lengths has {len(lengths)}")
    length = config.task.spec.length
    if lengths:
        (length,) = lengths
    elif "length" in tasks.defaults(config.raw["task"]["name"]):
        length = min(LONGEST, length)
    origin = {**run.origin, "length": length}
    record.check(folder, origin)
    batch = rows_of(at_length(config, length), "valid", sequences)
    names = ["|".join(item.mixers) for item in config.model.items]
    with jax.default_device(jax.local_devices()[0]), dispatch.implementation(config.train.implementation):
        whole = run.built.merge(jax.tree.map(jnp.asarray, jax.device_get(run.params)))
        result = measure(whole, names, batch, causal=config.model.causal)
    result = {**origin, "task": config.task.name, **result}
    if jax.process_index() == 0:
        say(layer_table(result))
        say(record.save(result, folder))
    return result


def layer_table(result: dict[str, Any]) -> str:
    """A line for each layer."""
    steps = [str(d) for d in (1, 8, 64) if str(d) in result["layers"][0]["locality"]["within"]]
    lines = [
        f"{'layer':<24}" + "".join(f"{'<= ' + d:>8}" for d in steps) + f"{'distance':>10}{'tokens':>8}"
        f"{'grad std':>10}{'score std':>11}{'max':>10}{'time scale':>12}"
    ]
    for i, layer in enumerate(result["layers"]):
        local, scores = layer["locality"], layer["score_gradient"] or {"normalization": "none"}
        scores = {} if scores["normalization"] == "none" else scores
        tokens = None if local["entropy"] is None else np.exp(local["entropy"])
        scale = layer["spectrum"].get("time_scale", {"50": None})["50"]
        lines.append(
            f"{label(i, layer):<24}"
            + "".join(f"{100 * local['within'][d]:>6.1f} %" for d in steps)
            + f"{_number(local['mean_distance'], '.1f'):>10}{_number(tokens, '.1f'):>8}"
            + f"{_number(layer['token_gradient']['relative_std'], '.2f'):>10}"
            + f"{_number(scores.get('relative_std'), '.2f'):>11}{_number(scores.get('max'), '.3g'):>10}"
            + f"{_number(scale, '.1f'):>12}"
        )
    cover = ", ".join(f"{percent} % within {d}" for percent, d in result["receptive_field"]["cover"].items())
    lines += [f"receptive field of the model: {cover}", LEGEND]
    for i, layer in enumerate(result["layers"]):
        spectrum = layer["spectrum"]
        if "skipped" in spectrum:
            lines.append(f"{label(i, layer)} has no spectrum: {spectrum['skipped']}")
        elif spectrum["sampled"] < spectrum["state"]:
            share = f"{spectrum['sampled']:.0f} of the {spectrum['state']} numbers of its state"
            lines.append(f"{label(i, layer)} has the spectrum of a sample, {share}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

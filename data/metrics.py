"""Metrics: what the outputs of a model are scored by, each one object.

A task names its metrics in its `Spec`, the one that it is judged by first; a task file may define a `Metric` of its own and put
the object there. Which checkpoint is best, how a number is shown, what a step must add up: all others ask the object.

A metric is computed in two steps. `sums` turns a batch into weighted sums, in the compiled step; they are added over batches and
microbatches; `value` turns the totals into the metric, on the host. Every batch gives the sums of the loss, so that a metric may
need none of its own: "nats", the weighted loss (of classes the cross-entropy in nats), and "weight", the amount that is scored.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from common.errors import UserError, check_choice, near
from data.gaze_geometry import angle

Sums = dict[str, Float[Array, "..."]]
Totals = Mapping[str, Any]  # the same names; floats, or arrays of float64

CLASSES, NUMBERS, ANY = "classes", "real numbers", "any"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Display:
    """How the values of a metric are named, compared and shown: what is kept beside a result that is written down.

    Attributes:
      name: in results and records, such as "row_accuracy".
      higher_is_better: whether a larger value is better.
      unit: of the values as they are shown, such as "%"; where it is the name in words, it is said once.
      scale: what values are multiplied by to be shown.
      digits: decimals that are shown.
    """

    name: str
    higher_is_better: bool
    unit: str = ""
    scale: float = 1.0
    digits: int = 4

    @property
    def words(self) -> str:
        """The name in words, such as "row accuracy"."""
        return self.name.replace("_", " ")

    @property
    def label(self) -> str:
        """The name with the unit, for the head of a table or an axis, such as "row accuracy, %"."""
        return self.words if self.unit in ("", self.words) else f"{self.words}, {self.unit}"

    def number(self, value: float, beside: float | None = None) -> str:
        """A value without its unit: with the metric's decimals, or with as many significant digits where it is tiny or huge, or
        where the value is that it stands beside, such as the mean whose interval it is."""
        shown, size = self.scale * value, abs(self.scale * (value if beside is None else beside))
        plain = size == 0 or 10.0 ** (1 - self.digits) <= size < 1e6
        return f"{shown:.{self.digits}f}" if plain else f"{shown:.{max(self.digits, 2)}g}"

    def show(self, value: float) -> str:
        """A value in words: "accuracy 97.90 %", "1.4440 bits per byte", "rmse 0.1234"."""
        if self.unit == self.words:
            return f"{self.number(value)} {self.unit}"
        return " ".join(filter(None, (self.words, self.number(value), self.unit)))

    def describe(self) -> dict[str, Any]:
        """What `read` needs, as JSON holds it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Display)}
        return {"metric": fields.pop("name"), **fields}

    @staticmethod
    def read(record: Mapping[str, Any]) -> "Display":
        """What `describe` wrote into a record; fields that it lacks have their defaults."""
        names = {field.name for field in dataclasses.fields(Display)}
        return Display(name=record["metric"], **{name: record[name] for name in names - {"name"} if name in record})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric(Display):
    """A metric.

    Attributes:
      value: the metric of summed sums; from Python floats (arrays of float64 where a sum is no scalar) to a float.
      sums: the sums that it needs beside the loss's, or None. Called as (outputs, targets, weights) in the compiled step, with
        outputs in float32 (scores of classes [B, *T, V] or predictions [B, *T, K]), targets [B, *T] or [B, *T, K], and
        weights [B, *T] in float32. Where a weight is 0, target and output may be anything (see `weighted`). Metrics that need the
        same sums have the same function; those of different functions have different names.
      of: what targets it is of: "classes", "real numbers" or "any".
      targets: how many numbers a target must have, or None.
      whole_rows: whether the sums need all tokens of a row at once; the sums of others are added over pieces of rows, too.
    """

    value: Callable[[Totals], float]
    sums: Callable[[Array, Array, Array], Sums] | None = None
    of: str = ANY
    targets: int | None = None
    whole_rows: bool = False

    def __post_init__(self):
        check_choice(f"of (metric {self.name!r})", self.of, (CLASSES, NUMBERS, ANY))


def weighted(values: Num[Array, "B *T"], weights: Float[Array, "B *T"]) -> Float[Array, ""]:
    """sum(weights * values), without the values of weight 0, which may be no numbers at all."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0))


def is_correct(scores, targets):
    """Whether the target has the highest score (the first of equals)."""
    return jnp.argmax(scores, axis=-1) == targets


def correct_sums(scores, targets, weights):
    """The weight of the targets that have the highest score."""
    return {"correct": weighted(is_correct(scores, targets), weights)}


def row_sums(scores, targets, weights):
    """The number of rows with any weight, and of those of them in which all that is scored is correct."""
    scored = (weights > 0).reshape(len(weights), -1)
    rows = scored.any(1)
    right = rows & (is_correct(scores, targets).reshape(scored.shape) | ~scored).all(1)
    return {"rows": jnp.sum(rows, dtype=jnp.float32), "rows_correct": jnp.sum(right, dtype=jnp.float32)}


def squared_sums(predictions, targets, weights):
    """The squared errors, means over the numbers of a target."""
    return {"squared": weighted(jnp.mean(jnp.square(predictions - targets), -1), weights)}


def absolute_sums(predictions, targets, weights):
    """The absolute errors, means over the numbers of a target."""
    return {"absolute": weighted(jnp.mean(jnp.abs(predictions - targets), -1), weights)}


def angle_sums(predictions, targets, weights):
    """The angles, in degrees, between the directions that (pitch, yaw), in radians, point to."""
    return {"angle": weighted(angle(predictions, targets), weights)}


def mean_loss(sums: Totals) -> float:
    return sums["nats"] / sums["weight"]


def mean_bits(sums: Totals) -> float:
    return mean_loss(sums) / math.log(2)


def exp_of_loss(sums: Totals) -> float:
    return math.exp(min(mean_loss(sums), 700.0))  # a larger one would overflow


def share_correct(sums: Totals) -> float:
    return sums["correct"] / sums["weight"]


def share_of_rows(sums: Totals) -> float:
    return sums["rows_correct"] / sums["rows"]


def share_containing(sums: Totals) -> float:
    return sums.get("contained", sums["rows_correct"]) / sums["rows"]


def root_mean_square(sums: Totals) -> float:
    return math.sqrt(sums["squared"] / sums["weight"])


def mean_absolute(sums: Totals) -> float:
    return sums["absolute"] / sums["weight"]


def mean_angle(sums: Totals) -> float:
    return sums["angle"] / sums["weight"]


def bits_per(unit: str) -> Metric:
    """The cross-entropy in bits for each of what a weight of 1 stands for, such as "byte"."""
    name = f"bits_per_{unit}"
    return Metric(name=name, higher_is_better=False, unit=name.replace("_", " "), value=mean_bits, of=CLASSES)


PERCENT: dict[str, Any] = {"higher_is_better": True, "unit": "%", "scale": 100.0, "digits": 2}

# The loss is reported of every task: what training makes small, in nats where it is a likelihood.
LOSS = Metric(name="loss", higher_is_better=False, value=mean_loss)
PERPLEXITY = Metric(name="perplexity", higher_is_better=False, digits=3, value=exp_of_loss, of=CLASSES)
ACCURACY = Metric(name="accuracy", **PERCENT, value=share_correct, sums=correct_sums, of=CLASSES)
# The share of rows of which all that is scored is right.
ROW_ACCURACY = Metric(name="row_accuracy", **PERCENT, value=share_of_rows, sums=row_sums, of=CLASSES, whole_rows=True)
# The share of rows of which what is wanted occurs in what is generated: "contained", which is counted where a text is generated
# (`evaluation.completions`). Where none is, in training, a row counts of which all that is scored is right.
CONTAINS = Metric(name="contains", **PERCENT, value=share_containing, sums=row_sums, of=CLASSES, whole_rows=True)
RMSE = Metric(name="rmse", higher_is_better=False, value=root_mean_square, sums=squared_sums, of=NUMBERS)
MAE = Metric(name="mae", higher_is_better=False, value=mean_absolute, sums=absolute_sums, of=NUMBERS)
ANGULAR_ERROR = Metric(
    name="angular_error",
    higher_is_better=False,
    unit="degrees",
    digits=3,
    value=mean_angle,
    sums=angle_sums,
    of=NUMBERS,
    targets=2,
)


@functools.cache
def at_positions(positions: tuple[int, ...]) -> tuple[Metric, ...]:
    """The cross-entropy at positions of the row alone, in bits: "bits_at_50" is that of the target behind 50 inputs.

    Of two and more positions also "in_context_score", the nats at the last of them less those at the first (Olsson et al., arXiv
    2209.11895, have positions 50 and 500): what context is worth to the model, the more negative the better.
    """

    def sums(scores, targets, weights):
        """The weighted nats and the weights at each of the positions [N]."""
        places = jnp.array(positions) - 1
        nats = -jnp.take_along_axis(jax.nn.log_softmax(scores[:, places]), targets[:, places, None], -1)[..., 0]
        weights = weights[:, places]
        return {"nats_at": jnp.where(weights > 0, weights * nats, 0).sum(0), "weight_at": weights.sum(0)}

    def nats(totals, i):
        return totals["nats_at"][i] / totals["weight_at"][i] if totals["weight_at"][i] else math.nan

    shared = {"higher_is_better": False, "sums": sums, "of": CLASSES, "whole_rows": True}
    found = [
        Metric(
            name=f"bits_at_{position}", unit="bits", value=lambda totals, i=i: nats(totals, i) / math.log(2), **shared
        )
        for i, position in enumerate(positions)
    ]
    score = Metric(
        name="in_context_score", unit="nats", value=lambda totals: nats(totals, -1) - nats(totals, 0), **shared
    )
    return (*found, score) if len(positions) > 1 else tuple(found)


NAMED = (LOSS, PERPLEXITY, ACCURACY, ROW_ACCURACY, CONTAINS, RMSE, MAE, ANGULAR_ERROR)

# Of texts, whatever the tokeniser: those whose weight is not the tokens that are scored but what they stand for, by its name in
# `Task.text_sizes`.
WORD_PERPLEXITY = dataclasses.replace(PERPLEXITY, name="word_perplexity")
TEXT = {"bytes": bits_per("byte"), "words": WORD_PERPLEXITY}


def choose(asked: Iterable[Metric | str], *, unit: str, of: str, targets: int) -> tuple[Metric, ...]:
    """The metrics that a task asks for, each once.

    Args:
      asked: metrics, or names of those of this file.
      unit: what a weight of 1 stands for, for the name "bits_per_<unit>".
      of: what the task's targets are, "classes" or "real numbers".
      targets: size of the model's output.

    Raises:
      UserError: for an unknown name, with the near ones; for a metric that such targets cannot have.
    """
    known = {metric.name: metric for metric in (*NAMED, bits_per(unit))}
    fitting = [name for name, metric in known.items() if _fits(metric, of, targets)]
    chosen: dict[str, Metric] = {}
    for metric in asked:
        if isinstance(metric, str):
            if metric not in known:
                raise UserError(f"metric={metric!r} is unknown; {near(metric, fitting)}")
            metric = known[metric]
        if not _fits(metric, of, targets):
            needs = metric.of if metric.targets is None else f"{metric.targets} {metric.of}"
            raise UserError(
                f"metric {metric.name!r} is of targets that are {needs}, and the task's are {targets} {of}; "
                f"choose one of {', '.join(fitting)}"
            )
        if metric.name in ("tokens", "step", "split") or (metric.name == LOSS.name and metric != LOSS):
            raise UserError(f"a metric cannot be named {metric.name!r}: records have another number of this name")
        chosen.setdefault(metric.name, metric)
    return tuple(chosen.values())


def _fits(metric: Metric, of: str, targets: int) -> bool:
    return metric.of in (ANY, of) and metric.targets in (None, targets)


def batch_sums(metrics: Iterable[Metric], outputs: Array, targets: Array, weights: Array) -> Sums:
    """The sums of a batch that metrics need beside the loss's, without gradients; see `Metric.sums` for the arguments.

    Raises:
      ValueError: if different functions give sums of the same name.
    """
    outputs, found = jax.lax.stop_gradient(outputs), {}
    for function in dict.fromkeys(metric.sums for metric in metrics if metric.sums is not None):
        new = function(outputs, targets, weights)
        if clash := {"nats", "weight", "squared_log_z", *found} & set(new):
            raise ValueError(
                f"{function.__name__} of a metric gives a sum {clash.pop()!r}, as something else does: rename it"
            )
        found |= new
    return found


# Of the functions below, `spec` is the task's, a `data.task.Spec`.


def summary(spec, sums: Totals) -> dict[str, float]:
    """All that is reported of summed sums: "loss", the task's metrics, and "tokens", the amount that is scored.

    Args:
      spec: of the task.
      sums: totals of "nats", "weight" and what `batch_sums` of the spec's metrics gives; the weight is not 0.
    """
    found = {metric.name: float(metric.value(sums)) for metric in (LOSS, *spec.metrics)}
    return found | {"tokens": float(sums["weight"])}


def training_summary(spec, sums: Totals) -> dict[str, float]:
    """What is reported of a step of training beside its loss: the metric that the task is judged by and those with sums of their
    own (the others say of the loss what it says itself). Nothing, where nothing is scored."""
    if not sums["weight"]:
        return {}
    told = [metric for metric in spec.metrics if metric is spec.metric or metric.sums is not None]
    return {metric.name: float(metric.value(sums)) for metric in told}


def text_scores(result: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Scores that do not depend on the tokeniser and are not in a result already: "bits_per_byte" and "word_perplexity".

    Args:
      result: of `summary`.
      sizes: `Task.text_sizes` of the split; the perplexity is by the data set's own number of words.
    """
    if not sizes:
        return {}
    nats = result["loss"] * sizes["tokens"]
    return {
        metric.name: float(metric.value({"nats": nats, "weight": sizes[what]}))
        for what, metric in TEXT.items()
        if sizes.get(what) and metric.name not in result
    }


def reported(spec) -> dict[str, Metric]:
    """By name, the metrics that may be in a result, the one that the task is judged by first."""
    own = {metric.name: metric for metric in (*spec.metrics, LOSS)}
    return own | {metric.name: metric for metric in TEXT.values() if metric.name not in own}


def describe(spec, result: Mapping[str, float]) -> str:
    """One line of scores, the one that the task is judged by first: "accuracy 97.90 %  loss 0.0712  (12,345 rows)"."""
    known = reported(spec)
    names = dict.fromkeys([spec.metric.name, *(name for name in result if name in known)])
    shown = "  ".join(known[name].show(result[name]) for name in names)
    return f"{shown}  ({result['tokens']:,.0f} {spec.unit}s)"

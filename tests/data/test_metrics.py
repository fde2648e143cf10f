"""Metrics: what they are against NumPy, how they are shown, which of them a task can have, and one that only its task knows."""

import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import metrics
from data.metrics import Display, Metric, bits_per
from data.task import OBJECTIVES, Spec
from evaluation import report as printed
from models.sequence_model import ModelConfig, SequenceModel
from sweeps import report
from sweeps.request import Request
from training import sharding, state
from training.metrics import Progress
from training.step import class_sums, make_eval_step, real_sums
from training.validation import evaluate


def totals(sums):
    return {name: np.asarray(value, np.float64) for name, value in sums.items()}


@pytest.fixture
def labels():
    """Scores, targets and weights of 6 rows of 5 labels; rows 1 and 2 are all right, and row 5 has no weight."""
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(6, 5, 7)), rng.integers(0, 7, (6, 5))
    weights = rng.uniform(0.5, 2, (6, 5)) * (rng.uniform(size=(6, 5)) > 0.3)
    targets[1:3] = scores[1:3].argmax(-1)
    weights[5] = 0
    targets[weights == 0] = -7
    return scores.astype(np.float32), targets, weights.astype(np.float32)


def test_metrics_of_classes(labels):
    scores, targets, weights = labels
    spec = Spec(
        7,
        None,
        7,
        "token_labels",
        5,
        unit="letter",
        metrics=("bits_per_letter", "perplexity", "accuracy", "row_accuracy"),
    )
    found = metrics.summary(spec, totals(jax.jit(lambda *a: class_sums(*a, spec.metrics))(scores, targets, weights)))
    x, w = scores.astype(np.float64), weights.astype(np.float64)
    losses = np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, np.maximum(targets, 0)[..., None], -1)[..., 0]
    loss = np.average(losses, weights=w)
    right = x.argmax(-1) == targets
    rows = [all(right[i][w[i] > 0]) for i in range(6) if w[i].any()]
    assert len(rows) == 5 and 2 <= sum(rows) < 5
    expected = {
        "loss": loss,
        "bits_per_letter": loss / math.log(2),
        "perplexity": math.exp(loss),
        "accuracy": np.average(right, weights=w),
        "row_accuracy": np.mean(rows),
        "tokens": w.sum(),
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6)
    assert {type(value) for value in found.values()} == {float}


def test_metrics_of_numbers():
    """What has no weight may be no number; the angle is that of the arc cosine, and exact where gazes agree."""
    rng = np.random.default_rng(1)
    predictions, targets = rng.uniform(-0.7, 0.7, (2, 8, 2))
    weights = np.array([1, 2, 0.5, 1, 1, 3, 0, 0])
    predictions[0] = targets[0]
    predictions[6], targets[7] = np.nan, np.inf
    spec = Spec(None, 1, 2, "regression", 4, metric="angular_error")
    sums = jax.jit(lambda *a: real_sums(*a, spec.metrics))(predictions, np.abs(predictions[:, 0]), targets, weights)
    found = metrics.summary(spec, totals(sums))
    p, t, w = predictions[:6], targets[:6], weights[:6]

    def vector(angles):
        pitch, yaw = angles.T
        return -np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], 1)

    angles = np.degrees(np.arccos(np.clip((vector(p) * vector(t)).sum(1), -1, 1)))
    expected = {
        "loss": np.average(np.abs(p[:, 0]), weights=w),
        "angular_error": np.average(angles, weights=w),
        "rmse": math.sqrt(np.average(((p - t) ** 2).mean(1), weights=w)),
        "mae": np.average(np.abs(p - t).mean(1), weights=w),
        "tokens": 8.5,
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-5)
    alone = real_sums(p[:1], p[:1, 0], t[:1], w[:1], spec.metrics)
    assert alone["angle"] < 1e-5, "the arc cosine is exact to 0.03 degrees in float32"


def test_text_scores():
    """Nats of the whole split for each byte and word of it; what a result has already, it keeps."""
    result = {"loss": 2.0, "bits_per_token": 2 / math.log(2), "tokens": 10.0}
    sizes = {"tokens": 30, "bytes": 100, "words": 20}
    found = metrics.text_scores(result, sizes)
    assert found == pytest.approx(
        {"bits_per_byte": 60 / (100 * math.log(2)), "word_perplexity": math.exp(3)}, rel=1e-12
    )
    assert list(metrics.text_scores(result | {"bits_per_byte": 1.0}, sizes)) == ["word_perplexity"]
    assert list(metrics.text_scores(result, {"tokens": 30, "bytes": 100})) == ["bits_per_byte"]
    assert metrics.text_scores(result, {}) == {}


def test_a_huge_loss_has_a_perplexity():
    assert metrics.PERPLEXITY.value({"nats": 1e9, "weight": 1.0}) == math.exp(700)
    assert math.isnan(metrics.PERPLEXITY.value({"nats": math.nan, "weight": 1.0}))


@pytest.mark.parametrize(
    "metric, value, shown",
    [
        (metrics.ACCURACY, 0.979, "accuracy 97.90 %"),
        (metrics.ROW_ACCURACY, 1 / 90_000, "row accuracy 0.0011 %"),
        (metrics.ACCURACY, 0.0, "accuracy 0.00 %"),
        (bits_per("byte"), 1.444, "1.4440 bits per byte"),
        (metrics.PERPLEXITY, 24.1, "perplexity 24.100"),
        (metrics.PERPLEXITY, math.exp(700), "perplexity 1.01e+304"),
        (metrics.RMSE, 0.12344, "rmse 0.1234"),
        (metrics.RMSE, 1.5e-5, "rmse 1.5e-05"),
        (metrics.ANGULAR_ERROR, 3.2144, "angular error 3.214 degrees"),
        (metrics.LOSS, math.nan, "loss nan"),
        (metrics.LOSS, -math.inf, "loss -inf"),
    ],
)
def test_how_values_are_shown(metric, value, shown):
    assert metric.show(value) == shown
    assert Display.read(json.loads(json.dumps(metric.describe() | {"test": 1}))).show(value) == shown


def test_labels_of_tables_say_the_unit_once():
    shown = [metric.label for metric in (metrics.ROW_ACCURACY, bits_per("byte"), metrics.RMSE, metrics.ANGULAR_ERROR)]
    assert shown == ["row accuracy, %", "bits per byte", "rmse", "angular error, degrees"]


def spec(objective, **options):
    real = objective in ("regression", "token_regression")
    return Spec(None if real else 5, 1 if real else None, options.pop("targets", 5), objective, 4, **options)


def test_metrics_by_objective():
    found = {name: [metric.name for metric in spec(name).metrics] for name in OBJECTIVES}
    assert found == {
        "causal_lm": ["bits_per_byte", "perplexity", "accuracy"],
        "token_labels": ["accuracy", "row_accuracy"],
        "classification": ["accuracy"],
        "pair_classification": ["accuracy"],
        "regression": ["rmse", "mae"],
        "token_regression": ["rmse", "mae"],
    }
    made = [spec(name) for name in OBJECTIVES]
    assert all(one.metric is one.metrics[0] for one in made)
    assert not any(metric.name == "angular_error" for metric in spec("regression", targets=2).metrics)
    judged = spec("causal_lm", metric="accuracy")
    assert judged.metric is metrics.ACCURACY
    assert [metric.name for metric in judged.metrics] == ["accuracy", "bits_per_byte", "perplexity"]
    assert [metric.name for metric in spec("causal_lm", metrics=("row_accuracy",)).metrics] == ["row_accuracy"]
    assert spec("causal_lm", unit="token") == spec("causal_lm", unit="token") != spec("causal_lm")


@pytest.mark.parametrize(
    "objective, options, message",
    [
        ("classification", {"metric": "acuracy"}, "metric='acuracy' is unknown; did you mean 'accuracy'"),
        ("regression", {"metrics": ("rsme",)}, "metric='rsme' is unknown; did you mean 'rmse'"),
        ("causal_lm", {"metric": "bits_per_bite"}, "metric='bits_per_bite' is unknown; did you mean 'bits_per_byte'"),
        (
            "regression",
            {"metric": "accuracy"},
            "'accuracy' is of targets that are classes, and the task's are 5 real numbers",
        ),
        ("token_regression", {"metric": "perplexity"}, "choose one of loss, rmse, mae$"),
        ("classification", {"metric": metrics.RMSE}, "'rmse' is of targets that are real numbers"),
        (
            "regression",
            {"metric": "angular_error", "targets": 6},
            "that are 2 real numbers, and the task's are 6 real numbers",
        ),
        ("regression", {"metric": Metric(name="tokens", higher_is_better=True, value=len)}, "cannot be named 'tokens'"),
        ("regression", {"metric": Metric(name="loss", higher_is_better=True, value=len)}, "cannot be named 'loss'"),
    ],
)
def test_metrics_that_a_task_cannot_have(objective, options, message):
    with pytest.raises(ValueError, match=message):
        spec(objective, **options)


def test_sums_of_one_name_are_of_one_function():
    other = Metric(
        name="other", higher_is_better=True, value=len, sums=lambda outputs, targets, weights: {"correct": 0.0}
    )
    arguments = (jnp.zeros((2, 3)), jnp.zeros(2, int), jnp.ones(2))
    with pytest.raises(ValueError, match="a sum 'correct', as something else does"):
        metrics.batch_sums((metrics.ACCURACY, other), *arguments)
    assert set(metrics.batch_sums((metrics.ACCURACY, metrics.ACCURACY), *arguments)) == {"correct"}
    assert metrics.batch_sums((bits_per("byte"), metrics.PERPLEXITY), *arguments) == {}, "these need the loss alone"


def f1_sums(scores, targets, weights):
    """Of each class, what was found and is so, what was found and is not, and what is so and was not found."""
    found = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1])
    true = jax.nn.one_hot(targets, scores.shape[-1])
    total = lambda x: jnp.einsum("...c,...->c", x, weights)
    return {"tp": total(found * true), "fp": total(found * (1 - true)), "fn": total(true * (1 - found))}


def f1_value(sums):
    """The mean of the classes' F1."""
    return np.mean(2 * sums["tp"] / (2 * sums["tp"] + sums["fp"] + sums["fn"]))


F1 = Metric(name="f1", higher_is_better=True, unit="%", scale=100, digits=1, value=f1_value, sums=f1_sums, of="classes")


def test_a_metric_that_only_its_task_knows(capsys):
    """Evaluation, the lines of training, floors, lengths and a sweep's report: no other file knows the name."""
    own = Spec(5, None, 2, "classification", 6, metric=F1)
    task = types.SimpleNamespace(spec=own, name="own", floors=lambda split: {"all": 0.3})
    config = ModelConfig(
        vocab_size=5, targets=2, head="pooled", causal=False, width=8, depth=1, pattern=("lru",), tie_embeddings=False
    )
    built = state.build(
        lambda rngs: SequenceModel(config, rngs=rngs), None, sharding.make_mesh({"data": 1}, jax.devices()[:1])
    )
    rng = np.random.default_rng(2)
    batches = [
        {
            "inputs": jnp.asarray(rng.integers(0, 5, (16, 6))),
            "targets": jnp.asarray(rng.integers(0, 2, 16)),
            "weights": jnp.asarray(rng.uniform(size=16) * (rng.uniform(size=16) > 0.2), jnp.float32),
        }
        for _ in range(2)
    ]
    with jax.set_mesh(built.mesh):
        params = built.init(jax.random.key(0))["params"]
        result = evaluate(make_eval_step(built, metrics=own.metrics), params, batches, own)
        guesses = [np.argmax(built.apply(params, batch["inputs"])[0], -1) for batch in batches]
    guess, true, weight = (
        np.concatenate(x) for x in (guesses, *([b[k] for b in batches] for k in ("targets", "weights")))
    )
    each = []
    for label in range(2):
        precision = weight[(guess == label) & (true == label)].sum() / max(weight[guess == label].sum(), 1e-9)
        recall = weight[(guess == label) & (true == label)].sum() / weight[true == label].sum()
        each.append(2 * precision * recall / max(precision + recall, 1e-9))
    assert result["f1"] == pytest.approx(np.mean(each), rel=1e-5) and 0 < result["f1"] < 1
    assert list(result) == ["loss", "f1", "accuracy", "tokens"] and type(result["f1"]) is float
    shown = f"f1 {100 * result['f1']:.1f} %"
    assert metrics.describe(own, result).startswith(f"{shown}  loss ")
    assert metrics.describe(own, result).endswith(f"({weight.sum():,.0f} rows)")
    assert own.metric.higher_is_better, "what the best checkpoint is chosen by"
    sums = {"nats": 3.0, "weight": 2.0, "tp": np.ones(2), "fp": np.ones(2), "fn": np.zeros(2), "correct": 1.0}
    assert metrics.training_summary(own, sums) == pytest.approx({"f1": 2 / 3, "accuracy": 0.5})
    assert metrics.training_summary(own, sums | {"weight": 0.0}) == {}
    assert shown in Progress(10, 16, metrics=own.metrics).line(1, result)

    printed.floors(task, "test", result)
    printed.lengths(own, [(6, result), (12, result)], 6)
    head, worst, best, *table = capsys.readouterr().out.strip().splitlines()
    assert head == "f1, % on the test split of own, length 6"
    rows = {"all": "30.0", "model": f"{100 * result['f1']:.1f}"}
    assert [line.split()[:2] for line in (worst, best)] == sorted(
        map(list, rows.items()), key=lambda row: float(row[1])
    )
    assert table[1].split()[1:3] == ["f1,", "%"] and table[2].split()[1] == rows["model"]

    kept = json.loads(json.dumps({"task": "own", **own.metric.describe(), "floors": {"all": 0.3}, "length": 6}))
    groups = report.sections([swept("worse", kept, 0.5), swept("better", kept, 0.75)])
    asked = Request("configs/lm.py", {"mixer": ["worse", "better"]}, pathlib.Path("runs"))
    text = "\n".join(report._section(asked, groups[0], False, (), ()))
    assert "| test f1, % |" in text and "higher is better" in text
    assert [text.index(word) for word in ("`better` | 75.0", "`worse` | 50.0", "*all* | *30.0*")] == sorted(
        text.index(word) for word in ("`better` | 75.0", "`worse` | 50.0", "*all* | *30.0*")
    )


def swept(name, kept, value):
    """A finished row of a sweep."""
    cell = types.SimpleNamespace(config={"model": {"width": 8}}, diverged=lambda: None)
    cost = types.SimpleNamespace(parameters=1, flops_per_token=1.0, carry_bytes=None)
    result = kept | {"valid": value, "test": {"6": value}}
    return report.Row({"mixer": name}, [cell], [result], [None], [[]], cost, None)


def test_positions_of_a_row_by_themselves():
    """The nats at two places, by hand; the score is their difference, and rows that do not reach a place are left out."""
    draw = np.random.default_rng(0)
    scores, targets = draw.normal(size=(3, 5, 4)), draw.integers(4, size=(3, 5))
    weights = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], np.float32)
    found = metrics.at_positions((2, 4))
    assert [metric.name for metric in found] == ["bits_at_2", "bits_at_4", "in_context_score"]
    assert found is metrics.at_positions((2, 4))
    sums = metrics.batch_sums(found, jnp.asarray(scores), jnp.asarray(targets), jnp.asarray(weights))
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    second, fourth = nats[:, 1].mean(), nats[[0, 2], 3].mean()
    values = [metric.value({name: np.float64(value) for name, value in sums.items()}) for metric in found]
    np.testing.assert_allclose(values, [second / np.log(2), fourth / np.log(2), fourth - second], rtol=1e-5)

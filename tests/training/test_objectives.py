"""Tasks of every objective through the whole loop, and what is scored of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from configs import lm, lra, recall
from data import metrics
from data.task import Spec
from models import mixer as mixers
from models.config import ModelConfig
from models.heads import pool
from models.sequence_model import SequenceModel
from tests.tolerance import assert_close
from training import loop, setup
from training.config import resolve
from training.step import class_sums, real_sums

RUNS = {
    "classification": lambda: lra.get_config("task=listops,mixer=lru"),
    "token_labels": lambda: recall.get_config("task=mqar,mixer=lru"),
    "regression": lambda: recall.get_config("task=adding,mixer=lru"),
    "token_regression": lambda: recall.get_config("task=hippo_delay,mixer=lru"),
}


SOME = ("classification", "token_regression")


@pytest.mark.parametrize(
    "objective", [name if name in SOME else pytest.param(name, marks=pytest.mark.thorough) for name in RUNS]
)
def test_run(objective, tmp_path):
    """A few steps of training, scored by the task's own metric; the run directory is complete."""
    config = RUNS[objective]()
    for section, options in {
        "model": {"width": 8, "depth": 1, "norm": "batchnorm"},
        "train": {"steps": 3, "batch_size": 16, "accumulation": 2, "eval_batches": 2},
        "optimizer": {"warmup_steps": 1},
    }.items():
        config[section].update(options)
    resolved = resolve(config)
    assert resolved.task.spec.objective == objective
    result = loop.train(resolved, tmp_path / "run").result
    assert np.isfinite(result[resolved.task.spec.metric.name]) and np.isfinite(result["loss"])
    assert (tmp_path / "run" / "config.json").exists()


def test_pooling_and_pairs():
    """Padding is in no pooled row; a pair's rows are encoded by one model, each alone."""
    x = jnp.arange(24.0).reshape(2, 4, 3)
    ids = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    expected = {"mean": (x[0, :3].mean(0), x[1, 1:].mean(0)), "last": (x[0, 2], x[1, 3]), "first": (x[0, 0], x[1, 1])}
    for how, rows in expected.items():
        assert_close(pool(x, ids, how), jnp.stack(rows))
    config = ModelConfig(
        vocab_size=7, targets=2, head="pair", causal=False, width=8, depth=1, pattern=("lru",), tie_embeddings=False
    )
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    pairs = jax.random.randint(jax.random.key(0), (3, 2, 5), 0, 7)
    ids = jnp.ones((3, 2, 5), jnp.int32).at[:, 1, 3:].set(0)
    run = jax.jit(lambda pairs, ids: model(pairs, segment_ids=ids)[0])
    logits = run(pairs, ids)
    assert logits.shape == (3, 2)
    changed = pairs.at[:, 1, 3:].set(0)
    assert_close(run(changed, ids), logits)  # what is padding does not matter
    assert np.abs(run(pairs[:, ::-1], ids[:, ::-1]) - logits).max() > 0  # the order does


def test_sums_of_rows():
    """A row is right if all of its labelled positions are; rows without any label count for nothing."""
    logits = jnp.zeros((3, 2, 4)).at[:, :, 1].set(1.0)
    targets = jnp.array([[1, 1], [1, 0], [0, 0]])
    weights = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    spec = Spec(vocab_size=4, channels=None, targets=4, objective="token_labels", length=2, causal=True)
    sums = class_sums(logits, targets, weights, spec.metrics)
    assert sums["rows"] == 2 and sums["rows_correct"] == 1 and sums["correct"] == 3
    result = metrics.summary(spec, {key: float(value) for key, value in sums.items()})
    assert result["accuracy"] == 0.75 and result["row_accuracy"] == 0.5


def test_angles():
    """The angle between two gazes, against the arc cosine of their vectors; exact where they agree."""
    found, true = np.array([[0.1, -0.4], [0.3, 0.2]]), np.array([[0.2, 0.3], [0.3, 0.2]])
    vector = lambda a: (
        -np.stack([np.cos(a[:, 0]) * np.sin(a[:, 1]), np.sin(a[:, 0]), np.cos(a[:, 0]) * np.cos(a[:, 1])], 1)
    )
    expected = np.degrees(np.arccos((vector(found) * vector(true)).sum(1)[0]))
    sums = real_sums(jnp.asarray(found), jnp.zeros(2), jnp.asarray(true), jnp.ones(2), (metrics.ANGULAR_ERROR,))
    np.testing.assert_allclose(sums["angle"], expected, rtol=1e-5)


def test_models_that_do_not_fit_their_task():
    config = recall.get_config("task=mqar,mixer=lru")
    config.model.causal = False
    with pytest.raises(ValueError, match="needs a causal model"):
        resolve(config)
    config = recall.get_config("task=mqar,mixer=lru")
    config.model.loss = "squared"
    with pytest.raises(ValueError, match="has classes"):
        resolve(config)


def test_mixers_that_do_not_fit_the_rows(monkeypatch):
    """Padded rows are for mixers that honour padding, packed rows for those that keep segments apart."""
    padded = lra.get_config("task=listops,mixer=hyena")
    setup.check_capabilities(resolve(padded))
    monkeypatch.setattr(mixers.find("hyena"), "padding", False)
    with pytest.raises(ValueError, match="are padded, and mixer 'hyena' has padding=False"):
        setup.check_capabilities(resolve(padded))
    packed = lm.get_config("mixer=hyena,corpus=stdlib")
    packed.task.packing = "documents"
    with pytest.raises(ValueError, match="hold several segments, and mixer 'hyena' has packing=False"):
        setup.check_capabilities(resolve(packed))


@pytest.mark.parametrize(
    "config, message",
    [
        (recall.get_config("task=mqar,mixer=lru"), "its metric 'row_accuracy' is of whole rows"),
        (lra.get_config("task=listops,mixer=lru"), "it does not score tokens by logits"),
        (lm.get_config("mixer=lru,corpus=stdlib"), "more pieces than the 256 positions"),
    ],
    ids=["rows", "classes of rows", "short"],
)
def test_a_loss_that_has_no_chunks(config, message):
    config.train.loss_chunks = 257
    with pytest.raises(UserError, match=message):
        setup.check_capabilities(resolve(config))

"""Truncated back-propagation: contiguous rows, the state that goes on with them, and one text scored from end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from configs import lm, recall
from data.loader import Lanes
from evaluation import loading, scoring, streaming
from training import loop, setup
from training.actions import Action, every
from training.checkpoints import Checkpoints
from training.config import resolve
from training.step import class_sums

SCORED = ("targets", "weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of several lengths, some of them shorter than a row."""
    path = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice("the quick brown fox jumps over lazy dogs".split(), 2 + 3 * i)
        (path / f"{i:02}.txt").write_text(" ".join(words))
    return path


def small(folder, packing="documents", mixer="gla+local_attention", **train):
    config = lm.get_config(f"mixer={mixer}")
    config.task.update({"corpus": f"file:{folder}", "length": 16, "packing": packing})
    config.model.update({"width": 16, "depth": len(config.model.pattern)})
    options = {"steps": 6, "batch_size": 4, "eval_every": 0, "checkpoint_every": 0, "eval_batches": 1, "carry": True}
    config.train.update(options | train)
    config.optimizer.update({"warmup_steps": 2, "learning_rate": 0.01})
    return config


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_rows_go_on(folder, packing):
    """Each lane is a piece of the text, in order; its documents keep their ids; and it begins anew after its end."""
    task = resolve(small(folder, packing)).task
    lanes = Lanes(task, 4, 0)
    batches = [jax.device_get(lanes[step]) for step in range(lanes.steps + 1)]
    assert ("segment_ids" in batches[0]) == (packing == "documents") and "positions" not in batches[0]
    assert [batch["restart"].tolist() for batch in batches] == [
        [step in (0, lanes.steps)] * 4 for step in range(lanes.steps + 1)
    ]
    text, ends = task.tokens.splits["train"].data, np.asarray(task.tokens.splits["train"].ends)
    for row in range(4):
        inputs = np.concatenate([batch["inputs"][row] for batch in batches[:-1]])
        targets = np.concatenate([batch["targets"][row] for batch in batches[:-1]])
        weights = np.concatenate([batch["weights"][row] for batch in batches[:-1]])
        begin = row * ((len(text) - 1) // 4)
        start = next(i for i in range(begin, begin + 16) if np.array_equal(text[i : i + len(inputs)], inputs))
        assert np.array_equal(targets[weights > 0], np.asarray(text[start + 1 : start + 1 + len(inputs)])[weights > 0])
        if packing == "documents":
            ids = np.concatenate([batch["segment_ids"][row] for batch in batches[:-1]])
            document = np.searchsorted(ends, np.arange(start, start + len(inputs)), "right")
            assert np.array_equal(ids, document + 1) and len(set(ids)) > 3


@pytest.fixture(scope="module")
def small_run(folder):
    """A configuration, its model on one device, its batches and its step. Nothing is learned: the learning rate is 0."""
    config = small(folder)
    config.optimizer.learning_rate = 0.0
    config.mesh.data = 1
    config = resolve(config)
    built = setup.build(config, devices=jax.devices()[:1])
    batches = setup.batches(config, built, "train", config.train.batch_size, for_training=True)
    return config, built, batches, setup.train_step(config, built)


def test_a_step_goes_on_where_the_last_one_ended(small_run, tmp_path):
    """While nothing is learned, the losses of a lane are those of its text in one piece, and so is the carry; a state that was
    saved and read in between goes on bit for bit."""
    _, built, batches, step = small_run
    whole, state, nats = {}, built.init(jax.random.key(0)), []
    checkpoints = Checkpoints(tmp_path)
    for i in range(3):
        if i == 2:
            checkpoints.save(2, state, {})
            checkpoints.close()
        state, metrics = step(state, batches[i])
        nats.append(float(metrics["sums"]["nats"]))
    again, metrics = step(checkpoints.restore(built.abstract).state, batches[2])
    assert float(metrics["sums"]["nats"]) == nats[2]
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(state)))

    whole = {key: jnp.concatenate([batches[i][key] for i in range(3)], 1) for key in ("inputs", *SCORED, "segment_ids")}
    call = jax.jit(lambda params, carry, ids, segments: built.apply(params, ids, carry, segment_ids=segments))
    empty = built.merge(state["params"]).initial_carry(4, 0)
    logits, carry = call(state["params"], empty, whole["inputs"], whole["segment_ids"])
    cut = lambda a, i: a[:, 16 * i : 16 * (i + 1)]
    expected = [float(class_sums(cut(logits, i), *(cut(whole[key], i) for key in SCORED))["nats"]) for i in range(3)]
    np.testing.assert_allclose(nats, expected, rtol=1e-5)
    for found, right in zip(jax.tree.leaves(state["carry"]), jax.tree.leaves(carry), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5 * (1 + float(jnp.abs(right).max())))


def test_a_text_is_scored_as_by_one_forward_pass(small_run, tmp_path):
    """Whatever the pieces are that it is read in; and otherwise than in rows."""
    config, built, _, _ = small_run
    params = built.init(jax.random.key(0))["params"]
    params["stack"] = jax.tree.map(lambda leaf: 3 * leaf, params["stack"])  # so that the context matters
    run = loading.LoadedRun(config, built, params, tmp_path, 0, "")
    found = streaming.stream(run, "valid", 100)
    assert streaming.stream(run, "valid", 10**12)["loss"] == pytest.approx(found["loss"], rel=1e-6), (
        "no longer than it is"
    )
    row = config.task.stretch("valid", 0, config.task.num_tokens("valid"))
    call = jax.jit(lambda params, ids, segments: built.apply(params, ids, segment_ids=segments)[0])
    logits = call(params, row["inputs"][None], row["segment_ids"][None])
    sums = class_sums(logits, *(row[key][None] for key in SCORED))
    assert found["tokens"] == row["weights"].sum()
    assert found["loss"] == pytest.approx(float(sums["nats"] / sums["weight"]), rel=1e-5)


def test_the_split_of_training_is_scored_row_by_row(small_run, tmp_path):
    """As of a run without lanes: each row once and alone, whatever the number of devices."""
    config, built, _, _ = small_run
    params = built.init(jax.random.key(0))["params"]
    params["stack"] = jax.tree.map(lambda leaf: 10 * leaf, params["stack"])  # so that the context matters
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, carry=False))
    found, expected = (
        scoring.score_task(loading.LoadedRun(one, built, params, tmp_path, 0, ""), one.task, "train")
        for one in (config, alone)
    )
    assert found.rows == found.all_rows and found.result == expected.result
    example = config.task.example("train", 0, config.seed)
    batch = setup.batches(config, built, "train", 4)[0]
    assert all(np.array_equal(batch[key][0], example[key]) for key in ("inputs", *SCORED))


@pytest.mark.thorough
def test_resume(folder, tmp_path):
    """A run of eight devices that was stopped goes on bit for bit, microbatches and all."""
    seen = {"whole": {}, "parts": {}}
    for name in seen:
        note = Action(every(1), lambda run, name=name: seen[name].update({run.step: float(run.metrics["loss"])}))
        stop = Action(lambda run: run.step == 3, lambda run, name=name: run.stop() if name == "parts" else None)
        config = resolve(small(folder, accumulation=2, batch_size=16))
        for actions in ((note, stop), (note,)):
            loop.train(config, tmp_path / name, *actions)
    assert len(seen["whole"]) == 6 and seen["whole"] == seen["parts"]


def test_what_is_refused(folder):
    """A carry that grows, rows that stand alone, and a text that is too short: one message each."""
    refused = {
        "config.train.carry is not for mixer 'attention': its carry grows": small(folder, mixer="attention"),
        "config.train.carry is for contiguous text": recall.get_config("task=mqar,mixer=gla"),
    }
    for message, config in refused.items():
        config.train.carry = True
        with pytest.raises(UserError, match=message):
            setup.check_capabilities(resolve(config))
    with pytest.raises(UserError, match=r"for each of 1024 rows, and train\.carry needs 32"):
        Lanes(resolve(small(folder)).task, 1024, 0)

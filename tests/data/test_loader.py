"""Batches: the same rows whatever the sharding, the order of asking and the thread that makes them."""

import concurrent.futures.process
import itertools
import threading
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common.errors import UserError
from data import task
from data.loader import Loader, prefetch
from data.task import Spec, Task
from data.workers import Workers

LENGTH, VOCAB = 4, 11


class Counting(Task):
    """Row i of a split is filled with i modulo the vocabulary; training rows are renamed by epoch and seed."""

    name = "counting"

    def __init__(self, rows=10, vocab_size=VOCAB, packed=True):
        self.rows = rows
        self.spec = Spec(vocab_size, None, vocab_size, "causal_lm", LENGTH, packed=packed)
        self.read = []

    def num_examples(self, split):
        return self.rows

    def row(self, split, index, epoch, seed):
        self.read.append(index)
        ids = np.full(LENGTH, index % VOCAB, np.int32)
        ones = np.ones(LENGTH, np.int32)
        return {
            "inputs": ids,
            "targets": ids,
            "weights": np.ones(LENGTH, np.float32),
            "segment_ids": ones,
            "positions": np.arange(LENGTH, dtype=np.int32) + 100 * epoch,
        }

    def floors(self, split="test"):
        return {}

    def fingerprint(self):
        return ""

    def encode(self, text):
        return np.zeros(0, np.int32)

    def decode(self, ids):
        return ""


def sharding(*spec):
    devices = np.array(jax.devices()).reshape(4, 2)
    return NamedSharding(jax.sharding.Mesh(devices, ("data", "sequence")), PartitionSpec(*spec))


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


@pytest.mark.parametrize("spec", [("data",), ("data", "sequence"), (("data", "sequence"),), (None, "sequence"), ()])
def test_a_sharded_batch_equals_the_plain_one(spec):
    plain = Loader(Counting(), "train", 8, seed=3)
    task = Counting()
    sharded = Loader(task, "train", 8, 3, sharding(*spec))
    task.read.clear()
    for step in (0, 5, 1):
        batch = sharded[step]
        assert all(array.sharding == sharding(*spec) and array.shape == (8, LENGTH) for array in batch.values())
        assert_equal(batch, plain[step])
    assert len(task.read) == 3 * 8  # devices that hold the same row share one reading of it


def test_training_is_random_access_and_endless():
    loader = Loader(Counting(), "train", 4, seed=0)
    assert len(loader) == 3
    forward = [loader[step] for step in range(10)]
    again = Loader(Counting(), "train", 4, seed=0)
    for step in reversed(range(10)):
        assert_equal(again[step], forward[step])
    rows = np.concatenate([batch["inputs"][:, 0] for batch in forward])
    epochs = np.concatenate([batch["positions"][:, 0] for batch in forward]) // 100
    np.testing.assert_array_equal(epochs, np.arange(40) // 10)
    for epoch in range(4):
        assert sorted(rows[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert len({tuple(rows[epoch * 10 : epoch * 10 + 10].tolist()) for epoch in range(4)}) == 4
    other = [Loader(Counting(), "train", 4, seed=1)[step]["inputs"] for step in range(3)]
    assert not np.array_equal(np.concatenate(other), np.concatenate([batch["inputs"] for batch in forward[:3]]))
    with pytest.raises(IndexError):
        loader[-1]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 16])
def test_every_evaluation_row_counts_once(batch_size):
    loader = Loader(Counting(), "test", batch_size, seed=5)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-10 // batch_size)
    rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    assert rows["inputs"].shape == (len(loader) * batch_size, LENGTH)
    np.testing.assert_array_equal(rows["inputs"][:10, 0], np.arange(10))
    assert (rows["weights"][:10] == 1).all() and all((value[10:] == 0).all() for value in rows.values())
    with pytest.raises(IndexError, match=f"batches 0 to {len(loader) - 1}"):
        loader[len(loader)]


def test_bad_batches_say_what_to_change():
    with pytest.raises(
        ValueError,
        match="batch_size=6 does not divide over the 4 parts that the mesh cuts it into; make it a multiple of 4",
    ):
        Loader(Counting(), "train", 6, 0, sharding("data"))
    with pytest.raises(ValueError, match="length=4 does not divide over the 8 parts"):
        Loader(Counting(), "train", 8, 0, sharding(None, ("data", "sequence")))
    with pytest.raises(ValueError, match="batch_size=0"):
        Loader(Counting(), "train", 0, 0)
    with pytest.raises(ValueError, match="split='training' is unknown; did you mean 'train'"):
        Loader(Counting(), "training", 1, 0)


def test_ids_outside_the_vocabulary_are_an_error():
    loader = Loader(Counting(vocab_size=9), "test", 5, seed=0)
    assert loader[0]["inputs"].max() == 4
    with pytest.raises(ValueError, match="counting: inputs of test row 9 hold the id 9, outside 0 to 8"):
        loader[1]


@pytest.mark.parametrize("spec", [None, ("data",)])
def test_places_are_left_out_where_rows_are_whole(monkeypatch, spec):
    """They are not even placed on the devices."""
    placed = []
    put, make = jax.device_put, jax.make_array_from_callback
    monkeypatch.setattr(jax, "device_put", lambda *args, **kwargs: placed.append(0) or put(*args, **kwargs))
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *args: placed.append(0) or make(*args))
    for packed, keys in ((False, {"inputs", "targets", "weights"}), (True, set(Counting().row("train", 0, 0, 0)))):
        placed.clear()
        batch = Loader(Counting(packed=packed), "test", 4, 0, spec and sharding(*spec))[2]
        assert set(batch) == keys and len(placed) == len(keys)
        assert batch["weights"].sum() == 2 * LENGTH


def running():
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_prefetch_yields_the_same_batches_from_any_step():
    loader = Loader(Counting(), "train", 4, 0, sharding("data"))
    for start, depth in ((0, 1), (7, 2), (2, 5)):
        ahead = prefetch(loader, start, depth)
        for step, batch in enumerate(itertools.islice(ahead, 6), start):
            assert_equal(batch, loader[step])
            assert batch["inputs"].sharding == loader.sharding
        ahead.close()
    finite = Loader(Counting(), "valid", 4, 0)
    assert len(list(prefetch(finite, 1))) == 2 and list(prefetch(finite, 3)) == []
    assert running() == 0
    with pytest.raises(ValueError, match="depth=0"):
        next(prefetch(loader, 0, 0))


def test_prefetch_works_ahead_by_its_depth():
    task, depth = Counting(rows=100), 3
    loader = Loader(task, "test", 1, 0)
    task.read.clear()
    ahead = prefetch(loader, 0, depth)
    next(ahead)
    for _ in range(500):
        if len(task.read) == 1 + depth:
            break
        threading.Event().wait(0.01)
    assert task.read == list(range(1 + depth))
    next(ahead)
    ahead.close()
    assert 2 + depth >= len(task.read) and running() == 0


def test_prefetch_raises_the_error_where_the_batch_would_be():
    ahead = prefetch(Loader(Counting(vocab_size=9), "test", 1, 0), 0, 4)
    assert [int(next(ahead)["inputs"][0, 0]) for _ in range(9)] == list(range(9))
    with pytest.raises(ValueError, match="row 9 hold the id 9"):
        next(ahead)
    assert running() == 0
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_killed_worker_is_one_message():
    made = concurrent.futures.Future()
    made.set_exception(concurrent.futures.process.BrokenProcessPool())
    loader = Loader(Counting(), "train", 4, 0)
    loader.workers = types.SimpleNamespace(count=1, rows=lambda *_: made)
    with pytest.raises(UserError, match=r"a process that makes rows has ended: .*train\.data_workers"):
        loader[0]


def test_what_a_worker_cannot_build_is_said(tmp_path):
    """Such as a file that was taken away since: the message of the task."""
    loader = Loader(Counting(), "train", 4, 0)
    loader.workers = Workers("lambada", {"data_dir": str(tmp_path)}, 1)
    try:
        with pytest.raises(UserError, match=r"holds 0 \.jsonl files: give the folder of the passages"):
            loader[0]
    finally:
        loader.workers.close()


def test_workers_make_the_same_batches():
    """In the same order from any step; and what a task refuses in a worker is raised where it is asked for."""
    name, options = "mqar", {"length": 32, "num_kv_pairs": 4}
    alone = Loader(task.create(name, **options), "train", 8, 3, sharding("data"))
    workers = Workers(name, options, 2)
    try:
        helped = Loader(alone.task, "train", 8, 3, sharding("data"), workers)
        for step, batch in zip((5, 6, 7, 2), itertools.chain(itertools.islice(prefetch(helped, 5), 3), [helped[2]])):
            assert_equal(alone[step], batch)
        with pytest.raises(ValueError, match="split"):
            workers.rows("nothing", [0], 0).result()
    finally:
        workers.close()

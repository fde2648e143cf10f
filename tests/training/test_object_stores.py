"""Runs on object stores: s3:// and gs:// of emulators on this machine."""

import os
import threading

import jax
import numpy as np
import pytest

from common import appended, lease, remote
from common.errors import UserError
from common.files import read_json, write_atomically
from common.lock import locked
from configs import lm
from evaluation import scoring
from evaluation.loading import load
from tests import processes, texts
from tests.training.object_stores import BUCKET, started
from training import loop
from training.actions import Action, every
from training.checkpoints import Checkpoints
from training.config import resolve
from training.metrics import read_metrics

pytestmark = pytest.mark.cloud


@pytest.fixture(scope="module", params=["gs", "s3"])
def store(request):
    """The address of a bucket."""
    with started(request.param) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"{request.param}://{BUCKET}"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return texts.words(tmp_path_factory.mktemp("corpus") / "text.txt")


def config(text):
    made = lm.get_config("mixer=gla")
    made.task.update({"corpus": f"file:{text}", "length": 24})
    made.model.update({"width": 16, "depth": 1})
    made.train.update({"steps": 12, "batch_size": 8, "log_every": 1, "eval_every": 5, "checkpoint_every": 4})
    made.train.update({"eval_batches": 2})
    made.optimizer.update({"warmup_steps": 2})
    return resolve(made)


def numbers(workdir):
    """What is recorded, but for speeds."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_metrics(workdir)]


def test_a_run(store, text, tmp_path):
    """Stopped and resumed, a run on a store has the numbers and the parameters of one on a disk, bit for bit; a checkpoint that
    was not finished does not count, and is written again; and it is scored as the other one is."""
    loop.train(config(text), tmp_path / "run")
    workdir = f"{store}/runs/{tmp_path.name}"
    assert not loop.train(config(text), workdir, Action(every(6), lambda run: run.stop())).finished
    checkpoints = Checkpoints(remote.at(workdir) / "checkpoints")
    assert checkpoints.steps()[-1] == 6
    (checkpoints.directory / "6" / remote.COMMITTED).unlink()
    assert checkpoints.steps()[-1] < 6
    assert loop.train(config(text), workdir).finished
    assert numbers(workdir) == numbers(tmp_path / "run")
    assert checkpoints.steps() == Checkpoints(tmp_path / "run" / "checkpoints").steps()
    here, there = load(tmp_path / "run"), load(workdir)
    assert here.step == there.step
    for one, other in zip(jax.tree.leaves(here.params), jax.tree.leaves(there.params), strict=True):
        np.testing.assert_array_equal(one, other)
    one, other = (scoring.score_task(run, run.config.task, "valid", 2) for run in (here, there))
    assert one.result == other.result
    assert not (remote.at(workdir) / ".lock").exists()


def test_a_damaged_checkpoint_is_set_aside(store, text, tmp_path):
    workdir = f"{store}/runs/{tmp_path.name}"
    loop.train(config(text), workdir)
    checkpoints = Checkpoints(remote.at(workdir) / "checkpoints")
    files, name = remote.files(checkpoints.directory / "12" / "state")
    for path in files.find(name):
        if "/d/" in path:
            files.pipe_file(path, b"nothing")
    loop.train(config(text), workdir)
    assert {"12", "12.damaged"} <= {path.name for path in checkpoints.directory.iterdir()}


def test_one_of_several_has_the_lock(store, monkeypatch):
    """Of eight that come at once one has it; it keeps it while it lives; and one that gives no sign of life loses it."""
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    folder = remote.at(f"{store}/locks")
    inside, ended, refused = [], threading.Event(), []

    def come(number):
        try:
            with locked(folder, "run"):
                inside.append(number)
                ended.wait()
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(1200):
        if len(inside) + len(refused) == 8:
            break
        ended.wait(0.05)
        assert not ended.is_set()
    ended_now = len(inside), len(refused)
    ended.set()
    for thread in threads:
        thread.join()
    assert ended_now == (1, 7)
    assert f"another run is at work in {folder} (process {os.getpid()}" in refused[0]
    assert read_json(folder / ".lock") is None
    monkeypatch.setattr(lease, "PATIENCE", 2.0)
    write_atomically(folder / ".lock", '{"host": "gone", "process": 1, "since": "then", "token": "x"}')
    with locked(folder, "run"):
        assert read_json(folder / ".lock")["process"] == os.getpid()


def test_what_is_added_is_read_in_order(store, monkeypatch):
    """In pieces, each as soon as it is due; a later process adds to what is there, and `replace` leaves one object."""
    path = remote.at(f"{store}/lines/record.jsonl")
    appended.replace(path, "0\n")
    for launch in range(2):
        file = appended.Appended(path)
        file.write(f"{2 * launch + 1}\n")
        monkeypatch.setattr(appended, "PIECE", 0.0)
        file.write(f"{2 * launch + 2}\n")
        assert appended.read(path)[-1] == f"{2 * launch + 2}"
        monkeypatch.undo()
        file.close()
    for number in range(5, 14):
        file = appended.Appended(path, lasting=True)
        file.write(f"{number}\n")
    assert appended.read(path) == [f"{number}" for number in range(14)]
    appended.replace(path, "a\nb\n")
    assert appended.read(path) == ["a", "b"] and len(list(path.parent.iterdir())) == 1


def test_a_sweep(store, text, tmp_path):
    """Its cells, its report and its plots are there, and the same command finds nothing left to do."""
    workdir = f"{store}/sweeps/{tmp_path.name}"
    command = ["sweep.py", "--config=configs/lm.py:mixer=gla", "--over", "seed=0", f"--workdir={workdir}", "--set"]
    command += [f"task.corpus=file:{text}", "task.length=16", "model.width=8", "model.depth=1", "train.steps=4"]
    command += ["train.batch_size=4", "optimizer.warmup_steps=1", "train.eval_batches=1"]
    for words in ("1 cells, 1 to run", "1 cells, 0 to run"):
        (end,) = processes.run([command])
        assert end.status == 0 and words in end.out, end
    there = remote.at(workdir)
    assert {"report.md", "results.csv", "learning.png", "seed=0"} <= {path.name for path in there.iterdir()}
    assert any("step 4/4" in line for line in appended.read(there / "seed=0" / "log.txt"))
    (end,) = processes.run([["sweep.py", "--status", f"--workdir={workdir}"]])
    assert end.status == 0 and "1 finished" in end.out, end


def test_several_processes(store, text, tmp_path):
    """Two processes write a run to gs:// together; s3:// is refused before anything is written."""
    workdir = f"{store}/runs/{tmp_path.name}"
    flags = {"task.corpus": f"file:{text}", "task.length": 16, "model.width": 8, "model.depth": 1, "train.steps": 4}
    flags |= {
        "train.batch_size": 8,
        "train.eval_batches": 1,
        "optimizer.warmup_steps": 1,
        "mesh.fsdp": 2,
        "mesh.data": 1,
    }
    command = ["train.py", "--distributed", "--config=configs/lm.py:mixer=gla", f"--workdir={workdir}"]
    ends = processes.run([[*command, *(f"--config.{key}={value}" for key, value in flags.items())]] * 2)
    if store.startswith("s3"):
        assert [end.status for end in ends] == [1, 1] and "several processes write no checkpoint" in ends[0].err, ends
        assert not remote.at(workdir).exists()
        return
    assert [end.status for end in ends] == [0, 0], ends
    run = load(workdir)
    assert run.step == 4 and np.isfinite(jax.tree.leaves(run.params)[0]).all()

"""Sweeps on SLURM: on a real cluster of one node, which the tests start and stop (make slurm)."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import sweep as entry
from common.command import STOPPED
from common.errors import UserError
from sweeps import cells, jobs
from sweeps.driver import drive
from sweeps.engine import Resources
from sweeps.engines.slurm import Slurm
from tests.sweeps import slurm_cluster
from training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
    "mixer": "min_gru",
    "task.length": "16",
    "model.width": "16",
    "model.depth": "1",
    "train.batch_size": "8",
    "train.log_every": "2",
    "train.eval_every": "0",
    "train.eval_batches": "2",
    "optimizer.warmup_steps": "1",
}


def test_what_is_submitted(tmp_path):
    """Every option of sbatch may be given, and takes the place of ours; a cell's name stays one word."""
    engine = Slurm(tmp_path, Resources(2, "a100:4", 30), {"partition": "gpu", "exclusive": "", "nodes": "1"}, workers=3)
    arguments = engine.arguments(5)
    wanted = ["--array=0-4%3", "--nodes=1", "--gpus-per-node=a100:4", "--time=30", "--signal=TERM@120", "--requeue"]
    assert {*wanted, "--partition=gpu", "--exclusive"} <= set(arguments)
    odd = [tmp_path / "it's, $HOME", tmp_path / "b"]
    script = engine.script(odd, 2)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    listed = "\n".join(script.splitlines()[:2]) + '\nprintf "%s\\n" "${cells[@]}"'
    shown = subprocess.run(["bash"], input=listed, text=True, capture_output=True).stdout
    assert shown.splitlines() == [str(path) for path in odd]
    assert "srun --ntasks=2 " in script


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs sbatch, which is not here"):
        Slurm(tmp_path).submit([tmp_path / "a"], 0)


def until_past(step, cell, seconds=1200):
    """Waits for a step of a cell."""
    end = time.monotonic() + seconds
    while steps(cell) <= step:
        if time.monotonic() > end:
            log = cell.workdir / "log.txt"
            queue = subprocess.run(["squeue"], capture_output=True, text=True).stdout
            pytest.fail(f"no step {step}: {queue}{log.read_text()[-3000:] if log.exists() else 'it has no log'}")
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster():
    if missing := slurm_cluster.missing():
        pytest.skip(f"SLURM is not here: {', '.join(missing)} (apt-get install munge slurmctld slurmd slurm-client)")
    with slurm_cluster.cluster() as environment, pytest.MonkeyPatch.context() as patch:
        for key in ("PATH", "SLURM_CONF"):
            patch.setenv(key, environment[key])
        patch.setenv("XLA_FLAGS", "")  # one device for each process
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8)))
    return folder


def asked(place, name, axes, *more):
    """The arguments of a sweep on the cluster."""
    settings = [f"corpus=file:{place / 'text.txt'}", *(f"{k}={v}" for k, v in SETTINGS.items())]
    given = ["--config=configs/lm.py", "--engine=slurm", f"--workdir={place / name}"]
    return [*given, *(["--over", *axes] if axes else []), *more, "--set", *settings]


def planned(arguments):
    """Its cells, to be driven from here."""
    return cells.plan(entry.requested(entry.parser().parse_args(arguments)))


@pytest.fixture
def command():
    """Starts `sweep.py`; what is still there at the end of the test is killed."""
    started = []

    def start(arguments):
        program = [sys.executable, str(ROOT / "sweep.py"), *arguments]
        started.append(subprocess.Popen(program, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def steps(cell):
    return max((line["step"] for line in read_metrics(cell.workdir)), default=0)


@pytest.mark.slurm
def test_an_array_that_is_left_and_collected(cluster, place, command):
    """One cell finishes, one fails, one is killed; nothing is submitted twice, and each is told once."""
    listed = place / "cells.py"
    text = "[{'mesh.data': data, 'train.steps': steps} for data, steps in ((1, 4), (1, 10**6), (3, 4))]"
    listed.write_text(f"def cells():\n    return {text}\n")
    arguments = asked(place, "array", [], f"--cells={listed}")
    left = command([*arguments, "--detach"])
    assert left.wait() == STOPPED
    good, long, bad = grid = cells.here(place / "array")
    ids = [jobs.submitted(cell.workdir).id for cell in grid]
    assert len({name.partition("_")[0] for name in ids}) == 1 and ids[2].endswith("_2")
    until_past(100, long)
    os.kill(json.loads((jobs.folder(long.workdir) / ".lock").read_text())["process"], signal.SIGKILL)
    collected = command(arguments)
    said = collected.communicate()[0]
    assert collected.returncode == 1, said
    assert "killed by SIGKILL, perhaps for want of memory" in said and "mesh" in said
    assert "2 of 3 cells are not finished (2 failed)" in said
    assert [jobs.submitted(cell.workdir).id for cell in grid] == ids
    assert [len(jobs.attempts(cell.workdir)) for cell in grid] == [1] * 3
    assert good.result()["step"] == 4 and jobs.attempts(bad.workdir)[0].status == "failed"
    assert "killed by SIGKILL" in (place / "array" / "report.md").read_text()


@pytest.mark.slurm
def test_preemption_and_a_lost_login(cluster, place, command):
    """What is preempted saves, is requeued, and goes on; a command that comes later adopts it, and waits for its end."""
    arguments = asked(place, "requeue", ["seed=0"], "--set", "train.steps=3000")
    lost = command(arguments)
    (cell,) = planned(arguments)
    until_past(100, cell)
    lost.kill()
    lost.wait()
    (first,) = jobs.attempts(cell.workdir)
    assert first.status is None, "it goes on without its command"
    preempting = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(preempting, check=True, stdout=subprocess.DEVNULL)
    before = jobs.submitted(cell.workdir)
    (outcome,) = drive(Slurm(place / "requeue"), [cell])
    assert outcome.status == "finished" and jobs.submitted(cell.workdir).id == before.id
    assert [attempt.status for attempt in jobs.attempts(cell.workdir)] == ["interrupted", "finished"]
    assert "resuming" in (cell.workdir / "log.txt").read_text()


@pytest.mark.slurm
def test_a_cell_of_two_processes(cluster, place):
    """Its losses are those of one process."""
    axes, settings = ["seed=0"], ("--set", "train.steps=4")
    (one,) = planned(asked(place, "one", axes, *settings))
    (two,) = planned(asked(place, "two", axes, *settings, "--hosts=2"))
    options = {"nodes": "1", "ntasks-per-node": "2"}
    engines = Slurm(place / "one"), Slurm(place / "two", Resources(hosts=2), options)
    for cell, engine in zip((one, two), engines):
        cell.save()
        (outcome,) = drive(engine, [cell])
        assert outcome.status == "finished", outcome.error
    assert jobs.attempts(two.workdir)[0].devices == 2
    losses = [[line["loss"] for line in read_metrics(cell.workdir) if line["split"] == "train"] for cell in (one, two)]
    assert len(losses[0]) == 2 and np.allclose(*losses, rtol=1e-5)
    assert np.allclose(one.result()["test"]["16"], two.result()["test"]["16"], rtol=1e-5)

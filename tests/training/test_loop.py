"""Runs from end to end: exact resume, evaluation, sampling, and what bad input gets."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import lm
from evaluation import scoring
from models import mixer as mixers
from training import loop
from training.config import resolve

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = "the quick brown fox jumps over the lazy dog while seven wizards box".split()
    rng = np.random.default_rng(0)
    path.write_text(" ".join(words[i] for i in rng.integers(0, len(words), 3000)))
    return path


def small(text, arg="mixer=gla", **train):
    config = lm.get_config(arg)
    config.task.update({"corpus": f"file:{text}", "length": 24})
    config.model.update({"width": 16, "depth": 2 * len(config.model.pattern)})
    options = {"steps": 12, "batch_size": 8, "log_every": 1, "eval_every": 5, "checkpoint_every": 4, "eval_batches": 2}
    config.train.update(options | train)
    config.optimizer.update({"warmup_steps": 2, "learning_rate": 0.03})
    return config


def losses(workdir) -> dict[int, float]:
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, loop.train(resolve(small(text)), workdir)


def test_a_run_leaves_everything(finished):
    """The run directory holds the configuration, the environment, metrics and checkpoints; the loss went down."""
    workdir, result = finished
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoints"} <= {p.name for p in workdir.iterdir()}
    found = losses(workdir)
    assert sorted(found) == list(range(1, 13))
    assert found[12] < found[1] - 0.5
    assert 0 < result["bits_per_byte"] < 8
    assert list(workdir.glob("events.out.tfevents.*")) or list(workdir.glob("*/events.out.tfevents.*"))


def test_resume_is_bit_for_bit(finished, text, tmp_path):
    """Stopped at any checkpoint and resumed, a run computes the very numbers of the undisturbed one."""
    workdir = tmp_path / "run"
    config = small(text)
    with config.unlocked():
        config.train.steps = 12

    class Killed(Exception):
        pass

    def die(self, step):
        if step == 7:
            raise Killed
        return False

    original = loop.GracefulStop.requested
    loop.GracefulStop.requested = die
    try:
        with pytest.raises(Killed):
            loop.train(resolve(config), workdir)
    finally:
        loop.GracefulStop.requested = original
    loop.train(resolve(config), workdir)
    expected, _ = finished
    assert losses(workdir) == losses(expected)


def command(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return [sys.executable, *map(str, arguments)], {"cwd": ROOT, "env": environment, "text": True}


def flags(text, workdir, **train):
    options = {"steps": 12, "batch_size": 8, "log_every": 1, "eval_every": 5, "checkpoint_every": 4, "eval_batches": 2}
    return [
        "train.py",
        "--config=configs/lm.py:mixer=gla",
        f"--workdir={workdir}",
        f"--config.task.corpus=file:{text}",
        "--config.task.length=24",
        "--config.model.width=16",
        "--config.model.depth=2",
        "--config.optimizer.warmup_steps=2",
        "--config.optimizer.learning_rate=0.03",
        *(f"--config.train.{key}={value}" for key, value in (options | train).items()),
    ]


def test_kill_and_terminate(finished, text, tmp_path):
    """SIGTERM saves and exits cleanly, kill -9 loses nothing but time: the losses are those of the undisturbed run."""
    workdir = tmp_path / "run"
    arguments, options = command(*flags(text, workdir))

    def launch_until(count, sent):
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        metrics = workdir / "metrics.jsonl"
        for _ in range(1200):
            if process.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) >= count):
                break
            time.sleep(0.05)
        process.send_signal(sent)
        return process, process.communicate()[0]

    process, output = launch_until(3, signal.SIGTERM)
    assert process.returncode == 0, output
    assert "run the same command to go on" in output or "step      12" in output
    launch_until(8, signal.SIGKILL)
    last = subprocess.run(arguments, capture_output=True, **options)
    assert last.returncode == 0, last.stderr
    assert losses(workdir) == losses(finished[0])


def test_evaluation_and_sampling(finished, capsys):
    """A checkpoint is scored at several lengths beside its floors, and sampled from, reproducibly."""
    workdir, result = finished
    model = scoring.load(workdir, "latest")
    assert model.step == 12
    (length, at_training), _ = scoring.score(model, "valid", [24, 48], batches=2)
    assert length == 24
    assert at_training["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "uniform" in printed and "5-gram" in printed and "model" in printed
    scoring.score(model, "test", [48], batches=1)
    assert "5-gram" in capsys.readouterr().out, "the floors are beside every score, at any length"
    first, again, other = (scoring.sample(model, "the quick", 20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first.startswith("the quick")
    assert (workdir / "samples" / "step12-seed0.txt").read_text() == first
    greedy = scoring.sample(model, "the quick", 5, temperature=0.0)
    # The likeliest token, from the whole sequence at once, is what the carry gives step by step.
    ids = model.config.task.encode(greedy)
    logits, _ = jax.jit(model.built.apply)(model.params, ids[None, :-1])
    assert (np.argmax(logits[0], -1)[-5:] == ids[-5:]).all()


def test_documents(tmp_path):
    """Packed documents train too, through the forms that honour segments, and are scored as many bytes as they have."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"document number {i} " * (3 + i % 5))
    config = small(folder, "mixer=s4d+local_attention", steps=3, eval_batches=0, profile_step=2)
    config.task.update({"corpus": f"file:{folder}", "packing": "documents"})
    resolved = resolve(config)
    assert resolved.task.spec.packed
    result = loop.train(resolved, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    valid = loop.Batches(resolved, loop.build(resolved), "valid", 8)
    assert max(int(valid[i]["segment_ids"].max()) for i in range(len(valid))) > 1
    assert result["tokens"] == sum(float(valid[i]["weights"].sum()) for i in range(len(valid)))


def test_workdir_of_another_run(finished, text):
    """A work directory that holds another configuration's run is refused, and stays as it is."""
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    config = small(text)
    config.model.width = 32
    with pytest.raises(ValueError, match=r"model\.width"):
        loop.train(resolve(config), workdir)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_bad_input_before_anything_is_written(text, tmp_path, monkeypatch):
    """Too few rows for the devices, a mesh that does not fit, and a mixer that cannot do what the task needs."""
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match="multiple of 8"):
        loop.train(resolve(small(text, batch_size=4)), workdir)
    config = small(text)
    config.mesh.data = 3
    with pytest.raises(ValueError, match="but there are 8"):
        loop.train(resolve(config), workdir)
    config = small(text)
    config.task.packing = "documents"
    monkeypatch.setattr(mixers.find("gla"), "packing", False)
    with pytest.raises(ValueError, match="'gla' has packing=False"):
        loop.train(resolve(config), workdir)
    assert not workdir.exists()


def test_command_line_errors(text, tmp_path):
    """The user sees one message, not a traceback."""
    cases = [
        (["train.py", "--config=configs/lm.py:mixer=mambo", f"--workdir={tmp_path}"], "mamba"),
        (["eval.py", f"--workdir={tmp_path}"], "is not a run directory"),
        ([*flags(text, tmp_path), "--config.model.widht=3"], "width"),
    ]
    for arguments, message in cases:
        arguments, options = command(*arguments)
        result = subprocess.run(arguments, capture_output=True, **options)
        assert result.returncode != 0
        assert message in result.stderr
        assert "Traceback" not in result.stderr, result.stderr

"""Runs from end to end: exact resume, evaluation, sampling, and what bad input gets."""

import errno
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from common.errors import UserError
from configs import lm
from models import mixer as mixers
from tests import texts
from training import loop, setup
from training.actions import Action, every
from training.checkpoints import Checkpoints
from training.config import resolve
from training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return texts.words(tmp_path_factory.mktemp("corpus") / "text.txt")


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
    return workdir, loop.train(resolve(small(text)), workdir).result


@pytest.mark.xdist_group("finished")
def test_a_run_leaves_everything(finished):
    """The run directory holds the configuration, the environment, metrics and checkpoints; the loss went down."""
    workdir, result = finished
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoints"} <= {p.name for p in workdir.iterdir()}
    found = losses(workdir)
    assert sorted(found) == list(range(1, 13))
    assert found[12] < found[1] - 0.5
    assert 0 < result["bits_per_byte"] < 8
    assert list(workdir.glob("events.out.tfevents.*")) or list(workdir.glob("*/events.out.tfevents.*"))


@pytest.mark.xdist_group("finished")
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


@pytest.mark.xdist_group("finished")
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
    assert process.returncode == 75 and "run the same command to go on" in output, output
    launch_until(8, signal.SIGKILL)
    last = subprocess.run(arguments, capture_output=True, **options)
    assert last.returncode == 0, last.stderr
    assert losses(workdir) == losses(finished[0])


@pytest.mark.xdist_group("finished")
def test_a_signal_amid_an_evaluation(finished, text, tmp_path, monkeypatch):
    """The run is saved at once, and the next launch begins with the evaluation: the record and the best are as undisturbed."""

    def requested(self, step):
        self._requested = step in (10, 12)  # while what follows the step is done
        return False

    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop.GracefulStop, "requested", requested)
        for step in (10, 12):
            assert not loop.train(resolve(small(text)), workdir).finished
            assert Checkpoints(workdir / "checkpoints").steps()[-1] == step
            assert ("valid", step) not in {(line["split"], line["step"]) for line in read_metrics(workdir)}
    assert loop.train(resolve(small(text)), workdir).finished
    told = [[(line["split"], line["step"], line["loss"]) for line in read_metrics(at)] for at in (workdir, finished[0])]
    assert told[0] == told[1]
    best = [Checkpoints(at / "checkpoints").best_step() for at in (workdir, finished[0])]
    assert best[0] == best[1] == 12


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
    result = loop.train(resolved, tmp_path / "run").result
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    valid = setup.batches(resolved, setup.build(resolved), "valid", 8)
    assert max(int(valid[i]["segment_ids"].max()) for i in range(len(valid))) > 1
    assert result["tokens"] == sum(float(valid[i]["weights"].sum()) for i in range(len(valid)))


def test_best_is_the_best_evaluation(text, tmp_path):
    """Wherever checkpoints fall, the evaluation that is best is one, after a resume, too."""
    seen = {}

    def spoil(run):
        """After step 6, whose evaluation is the best then, the model forgets everything."""
        if run.step == 7:
            run.state = {**run.state, "params": jax.tree.map(jnp.zeros_like, run.state["params"])}

    config = resolve(small(text, eval_every=2, checkpoint_every=5, steps=9))
    note = Action(every(1), lambda run: seen.update({run.scored: run.result.get("bits_per_byte")}))
    loop.train(config, tmp_path / "run", Action(every(1), spoil), note)
    best = min((step for step in seen if step), key=seen.get)
    assert best == 6
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.best_step() == 6 and checkpoints.steps() == [6, 9]


def test_actions_of_ones_own(text, tmp_path):
    """They see each step that they are due at, may write to the record, and may end the run, which then is saved; what is
    then said to be its last step is evaluated."""
    steps = []

    def act(run):
        steps.append(run.step)
        run.record.write(run.step, "mine", {"twice": 2 * float(run.metrics["loss"])})
        if run.step == 6:
            run.stop()

    ended = loop.train(resolve(small(text)), tmp_path / "run", Action(every(3), act))
    assert steps == [3, 6] and not ended.finished
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 6
    lines = read_metrics(tmp_path / "run")
    found = {(line["split"], line["step"]): line for line in lines}
    assert found["mine", 6]["twice"] == pytest.approx(2 * found["train", 6]["loss"], rel=1e-6)
    shutil.copytree(tmp_path / "run", tmp_path / "ended")
    assert loop.train(resolve(small(text, steps=6)), tmp_path / "ended").finished
    assert ("valid", 6) in {(line["split"], line["step"]) for line in read_metrics(tmp_path / "ended")}
    assert loop.train(resolve(small(text)), tmp_path / "run").finished


def test_a_run_that_cannot_learn_has_diverged(text, tmp_path):
    """All its updates are left out: that is an error at its end, and when it is asked for again; its record is whole."""
    config = small(text, steps=4, log_every=2)
    config.optimizer.update({"learning_rate": 1e30, "clip_norm": 0.0, "warmup_steps": 0, "name": "sgd"})
    for _ in range(2):
        with pytest.raises(loop.Diverged, match=r"diverged: .*run"):
            loop.train(resolve(config), tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 4]
    assert [line["step"] for line in lines if line["split"] == "valid"] == [4]


@pytest.mark.parametrize(
    "skipped, why",
    [
        ({10: 0, 20: 0}, None),
        ({10: 3, 18: 3, 20: 4}, None),
        ({10: 0, 18: 0, 19: 1, 20: 2}, "after step 18"),
        ({10: 10, 20: 20}, "after step 10"),
        ({20: 20}, "after step 0"),
        ({20: 19}, None),
    ],
)
def test_which_runs_have_diverged(tmp_path, skipped, why):
    lines = [{"step": step, "split": "train", "skipped": count} for step, count in skipped.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = loop.diverged(tmp_path, 20, "accuracy")
    assert (found is None) if why is None else why in found
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "split": "valid", "accuracy": "NaN"}) + "\n")
    assert "accuracy on the validation split is nan" in loop.diverged(tmp_path, 20, "accuracy")
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "split": "valid", "accuracy": 0.5, "loss": "NaN"}\n')
    assert "loss on the validation split is nan" in loop.diverged(tmp_path, 20, "accuracy")


def test_a_full_disk_is_one_error(text, tmp_path, monkeypatch):
    """What closing the files has to say after it is not said."""

    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        path = pathlib.Path("metrics.jsonl")
        close = flush

    def fill(run):
        run.record._file = Full()

    with pytest.raises(UserError, match=r"cannot write to metrics\.jsonl: No space left on device"):
        loop.train(resolve(small(text)), tmp_path / "run", Action(every(2), fill))


@pytest.mark.xdist_group("finished")
def test_other_data_is_refused(finished, text, tmp_path):
    """A text that was cut since is not resumed with."""
    workdir, _ = finished
    other = tmp_path / "text.txt"
    other.write_text(text.read_text()[:9000])
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"}
    with pytest.raises(UserError, match="is not the data that is here now"):
        loop.train(resolve(small(other)), workdir)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"} == before


def test_choices_of_forms(text, tmp_path):
    """A form that the model's primitives do not have is refused before anything is written."""
    for choice, message in {
        "attention=reference": "does not use attention",
        "linear_attention=associative": "associative",
    }.items():
        with pytest.raises(UserError, match=message):
            loop.train(resolve(small(text, implementation=choice)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert loop.train(
        resolve(small(text, implementation="linear_attention=reference", steps=2)), tmp_path / "run"
    ).finished


@pytest.mark.xdist_group("finished")
def test_workdir_of_another_run(finished, text):
    """A work directory that holds another configuration's run is refused, and stays as it is."""
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"}
    config = small(text)
    config.model.width = 32
    with pytest.raises(ValueError, match=r"model\.width"):
        loop.train(resolve(config), workdir)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"} == before


def test_bad_input_before_anything_is_written(text, tmp_path, monkeypatch):
    """Too few rows for the devices, a mesh that does not fit, and a mixer that cannot do what the task needs."""
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match="multiple of 8"):
        loop.train(resolve(small(text, batch_size=4)), workdir)
    with pytest.raises(ValueError, match="multiple of 16"):
        loop.train(resolve(small(text, accumulation=2)), workdir)
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
        ([*flags(text, tmp_path), "--config.model.widht=3"], "width"),
    ]
    for arguments, message in cases:
        arguments, options = command(*arguments)
        result = subprocess.run(arguments, capture_output=True, **options)
        assert result.returncode != 0
        assert message in result.stderr
        assert "Traceback" not in result.stderr, result.stderr


@pytest.mark.thorough
def test_rows_of_workers(text, tmp_path):
    """Begun with processes that make the rows and gone on with without them, a run has the numbers of one that never had them."""
    stop = Action(every(6), lambda run: run.stop())
    assert not loop.train(resolve(small(text, data_workers=2)), tmp_path / "run", stop).finished
    for workdir in ("run", "alone"):
        assert loop.train(resolve(small(text)), tmp_path / workdir).finished
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")
    with pytest.raises(UserError, match=r"train\.data_workers"):
        resolve(small(text, data_workers=-1))

"""The run directory: complete records, and no run overwritten by another."""

import json
import subprocess

import jax
import pytest

from common.files import write_atomically
from training import run_directory
from training.run_directory import RunDirectoryError, open_run, read_config

CONFIG = {
    "model": {"mixer": {"state": 16, "name": "s4d"}, "pattern": ("a", "b"), "extra": {}},
    "train": {"steps": 100, "log_every": 10, "batch_size": 8},
    "mesh": {"data": -1},
    "seed": 0,
}


def changed(**values):
    config = json.loads(json.dumps(CONFIG))
    for path, value in values.items():
        *sections, key = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        if value is None:
            del section[key]
        else:
            section[key] = value
    return config


def content(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def launches(run):
    return json.loads(run.environment.read_text())


def test_new_run(tmp_path):
    run = open_run(tmp_path / "a" / "b", CONFIG, environment_extra={"data": {"sha256": "1f"}})
    assert read_config(run.root) == json.loads(json.dumps(CONFIG))
    assert set(content(run.root)) == {"config.json", "environment.json"}
    (launch,) = launches(run)
    assert launch["data"] == {"sha256": "1f"} and launch["config_changes"] == {}
    assert launch["packages"]["jax"] == jax.__version__ and launch["packages"]["orbax-checkpoint"]
    assert launch["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert launch["time"].endswith("+00:00") and launch["command"][0] and launch["python"].count(".") == 2
    paths = (run.checkpoints, run.metrics, run.samples, run.profile)
    names = ["checkpoints", "metrics.jsonl", "samples", "profile"]
    assert [path.relative_to(run.root).as_posix() for path in paths] == names


def test_resume_adds_a_launch(tmp_path):
    first = content(open_run(tmp_path, CONFIG).root)["config.json"]
    run = open_run(tmp_path, CONFIG)
    assert len(launches(run)) == 2 and content(tmp_path)["config.json"] == first


def test_resumable_changes(tmp_path, capsys):
    open_run(tmp_path, CONFIG)
    run = open_run(tmp_path, changed(train__steps=200, train__log_every=5, mesh={"data": 2, "fsdp": 4}))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "train.steps: 100 -> 200" in printed
    assert read_config(tmp_path)["train"]["steps"] == 200
    changes = launches(run)[1]["config_changes"]
    assert changes["train.steps"] == {"from": 100, "to": 200} and changes["mesh.fsdp"] == {"from": "absent", "to": 4}
    assert set(changes) == {"train.steps", "train.log_every", "mesh.data", "mesh.fsdp"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model__mixer__state": 32}, ["model.mixer.state: 16 -> 32"]),
        ({"seed": 1, "train__batch_size": 16, "train__steps": 7}, ["seed: 0 -> 1", "train.batch_size: 8 -> 16"]),
        ({"model__pattern": ["a"]}, ["model.pattern: ['a', 'b'] -> ['a']"]),
        ({"model__mixer__name": None}, ["model.mixer.name: 's4d' -> 'absent'"]),
        ({"model__extra": {"new": 1}}, ["model.extra.new: 'absent' -> 1"]),
        ({"train__steps_per_epoch": 3}, ["train.steps_per_epoch: 'absent' -> 3"]),
    ],
)
def test_other_configuration(tmp_path, change, said):
    open_run(tmp_path, CONFIG)
    before = content(tmp_path)
    with pytest.raises(RunDirectoryError) as info:
        open_run(tmp_path, changed(**change))
    message = str(info.value)
    assert str(tmp_path) in message and all(text in message for text in said) and "\n" not in message
    assert "train.steps:" not in message
    assert content(tmp_path) == before


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirectoryError, match=r"cannot write to .*file.*: choose another --workdir"):
            open_run(workdir, CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


def test_unreadable_records(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        read_config(tmp_path)
    run = open_run(tmp_path / "run", CONFIG)
    run.environment.write_text("[{")
    with pytest.raises(RunDirectoryError, match=r"environment\.json cannot be read as JSON"):
        open_run(run.root, CONFIG)
    run.config.write_text("{")
    with pytest.raises(RunDirectoryError, match=r"config\.json cannot be read as JSON"):
        open_run(run.root, CONFIG)
    run.config.unlink()
    run.checkpoints.mkdir()
    with pytest.raises(RunDirectoryError, match=r"has checkpoints but no config\.json"):
        open_run(run.root, CONFIG)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert open_run(tmp_path / "run", CONFIG).root == tmp_path / "run"
    assert not (tmp_path / "run").exists()


def test_atomic_write(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)  # the machine stops in the middle
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_git(tmp_path):
    assert run_directory._git(tmp_path) is None
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    state = run_directory._git(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert run_directory._git(tmp_path) == {"commit": state["commit"], "dirty": True}

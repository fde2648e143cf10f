"""The run directory: complete records, and no run overwritten by another."""

import errno
import json
import re
import subprocess
import types

import jax
import pytest

from common.errors import UserError
from common.files import write_atomically
from configs import recall
from data import task
from tests.data.small_data import write_table
from training import run_directory
from training.config import resolve
from training.run_directory import RunDirectoryError, check_data, locate, read_config, recorded_data


def changed(**values):
    """A resolved configuration of a small task, with some of its keys changed."""
    config = recall.get_config("task=adding,mixer=s4d")
    config.train.update({"steps": 100, "log_every": 10, "batch_size": 8})
    config.optimizer.warmup_steps = 2
    for path, value in values.items():
        *sections, key = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    return resolve(config)


CONFIG = changed()


def open_run(workdir, config, **options):
    """Opens a run and closes it again."""
    with run_directory.open_run(config, workdir, **options) as run:
        return run


def content(root):
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file() and path.name != ".lock"}


def launches(run):
    return json.loads(run.environment.read_text())


def test_new_run(tmp_path):
    run = open_run(tmp_path / "a" / "b", CONFIG)
    assert read_config(run.root) == json.loads(json.dumps(CONFIG.raw))
    assert set(content(run.root)) == {"config.json", "environment.json"}
    (launch,) = launches(run)
    assert launch["fingerprint"] == CONFIG.task.fingerprint() and launch["config_changes"] == {}
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
    run = open_run(tmp_path, changed(train__steps=200, train__log_every=5, mesh__data=2, mesh__fsdp=4))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "train.steps: 100 -> 200" in printed
    assert read_config(tmp_path)["train"]["steps"] == 200
    changes = launches(run)[1]["config_changes"]
    assert changes["train.steps"] == {"from": 100, "to": 200} and changes["mesh.fsdp"] == {"from": 1, "to": 4}
    assert set(changes) == {"train.steps", "train.log_every", "mesh.data", "mesh.fsdp"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model__mixer__s4d__state": 32}, ["model.mixer.s4d.state: 64 -> 32"]),
        ({"seed": 1, "train__batch_size": 16, "train__steps": 70}, ["seed: 0 -> 1", "train.batch_size: 8 -> 16"]),
        ({"task__length": 9}, ["task.length: "]),
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


def test_the_record_of_older_code(tmp_path):
    """A key that did not exist then, and a value that was left to be derived, are what they are now by default; a key that
    does not exist any more is another configuration."""
    run = open_run(tmp_path, CONFIG)
    old = read_config(tmp_path)
    del (
        old["train"]["profile_step"],
        old["model"]["remat"],
        old["model"]["mixer"]["s4d"]["dt_min"],
        old["mesh"]["tensor"],
    )
    del old["optimizer"]["group_scale"]
    old["model"].update({"causal": None, "norm_eps": None, "channel_size": None})
    old["model"] |= {"channel_mixer": "auto", "position_embedding": "auto"}
    run.environment.write_text(json.dumps([{"data": "made in another way"}]))
    run.config.write_text(json.dumps(old))
    open_run(tmp_path, CONFIG)
    assert launches(run)[1]["config_changes"] == {}
    run.config.write_text(json.dumps(old | {"model": old["model"] | {"gone": 3}}))
    with pytest.raises(RunDirectoryError, match=r"model\.gone: 3 -> 'absent'"):
        open_run(tmp_path, CONFIG)
    run.config.write_text(json.dumps(old | {"model": old["model"] | {"remat": "full"}}))
    with pytest.raises(RunDirectoryError, match=r"model\.remat: 'full' -> 'none'"):
        open_run(tmp_path, CONFIG)


def test_a_run_goes_on_where_its_record_names_the_file_in_another_way(tmp_path):
    """The same data, which its fingerprint says; the record of older code has the name without the folders before it."""
    (tmp_path / "below").mkdir()
    write_table(tmp_path / "below")
    config = recall.get_config("task=adding,mixer=s4d")
    config.task = task.defaults("forecasting")
    config.task.name, config.task.file, config.task.length = "forecasting", f"{tmp_path}/below/small.csv", 8
    run = open_run(tmp_path / "run", resolve(config))
    old = read_config(run.root)
    run.config.write_text(json.dumps(old | {"task": old["task"] | {"file": "small.csv"}}))
    open_run(run.root, resolve(config))
    assert read_config(run.root) == old and list(launches(run)[1]["config_changes"]) == ["task.file"]


def test_steps_of_a_run_that_has_some(tmp_path, capsys):
    """With more steps the learning rate goes back up, which is said; with fewer nothing is touched."""
    run = open_run(tmp_path, CONFIG)
    (run.checkpoints / "100").mkdir(parents=True)
    before = content(tmp_path).keys(), read_config(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"has step 100 already, and train\.steps=50 asks for fewer"):
        open_run(tmp_path, changed(train__steps=50))
    assert (content(tmp_path).keys(), read_config(tmp_path)) == before
    capsys.readouterr()
    open_run(tmp_path, changed(train__steps=400))
    assert re.search(r"the learning rate goes back up at step 100, from 6e-05 to 0\.00\d+: ", capsys.readouterr().out)


def test_data_is_identity(tmp_path, monkeypatch, capsys):
    """Other data is refused before anything is written, or gone on with and recorded."""
    own = CONFIG.task.fingerprint()
    run = open_run(tmp_path, CONFIG)
    assert recorded_data(tmp_path) == own
    monkeypatch.setattr(CONFIG.task, "fingerprint", lambda: "f" * 64)
    before = content(tmp_path)
    with pytest.raises(RunDirectoryError, match=rf"{own[:12]}.*ffffffffffff.*--allow_other_data"):
        open_run(tmp_path, CONFIG)
    assert content(tmp_path) == before
    open_run(tmp_path, CONFIG, allow_other_data=True)
    assert "going on with it" in capsys.readouterr().out
    assert launches(run)[1]["fingerprint"] == "f" * 64 and launches(run)[1]["fingerprint_before"] == own
    assert recorded_data(tmp_path) == "f" * 64 and check_data(tmp_path, "f" * 64, False) is None
    assert check_data(tmp_path / "elsewhere", own, False) is None  # there is no record to compare with
    (tmp_path / "elsewhere" / "checkpoints" / "3").mkdir(parents=True)
    assert check_data(tmp_path / "elsewhere", own, False) is None
    assert "elsewhere has no record of its data" in capsys.readouterr().out


def test_the_tokenizer_is_identity(tmp_path, monkeypatch, capsys):
    """Of token ids the data does not know it. A run of older code, which has no record of it, goes on."""
    own = CONFIG.task.fingerprint()
    tokenizer = types.SimpleNamespace(fingerprint="a" * 64)
    open_run(tmp_path, CONFIG)
    monkeypatch.setattr(CONFIG.task, "tokenizer", tokenizer, raising=False)
    run = open_run(tmp_path, CONFIG)
    assert [launch.get("tokenizer") for launch in launches(run)] == [None, "a" * 64]
    assert recorded_data(tmp_path, "tokenizer") == "a" * 64
    before = content(tmp_path)
    tokenizer.fingerprint = "b" * 64
    with pytest.raises(
        RunDirectoryError, match=r"the tokenizer .*aaaaaaaaaaaa.*bbbbbbbbbbbb.*was replaced.*--allow_other_data"
    ):
        open_run(tmp_path, CONFIG)
    assert content(tmp_path) == before and check_data(tmp_path, own, False, "a" * 64) is None
    open_run(tmp_path, CONFIG, allow_other_data=True)
    assert "going on with it" in capsys.readouterr().out and recorded_data(tmp_path, "tokenizer") == "b" * 64


def test_one_writer(tmp_path):
    """A run that is being written is refused to others; the lock of a process that is gone is none."""
    with run_directory.open_run(CONFIG, tmp_path):
        before = content(tmp_path)
        with pytest.raises(UserError, match=rf"another run is at work in {tmp_path} \(process \d+ on "):
            open_run(tmp_path, CONFIG)
        assert content(tmp_path) == before
    open_run(tmp_path, CONFIG)
    (tmp_path / ".lock").write_text("{")
    open_run(tmp_path, CONFIG)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be opened \(Is a directory\)"):
        open_run(tmp_path, CONFIG)


@pytest.mark.parametrize("workdir", ["", "  ", "az://bucket/run", "gs://bucket", "gs:/bucket/run", "~nobody_here/run"])
def test_workdirs_that_are_none(workdir):
    with pytest.raises(RunDirectoryError, match="--workdir"):
        locate(workdir)


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/x") == tmp_path / "x"
    assert locate("runs/x").is_absolute()


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirectoryError, match=r"cannot write to .*file.*: choose another --workdir"):
            open_run(workdir, CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_has_no_room_for_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UserError, match=r"cannot write to .*\.lock: No space left on device"):
        open_run(tmp_path, CONFIG)
    monkeypatch.undo()
    open_run(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["a[b]", "a\\b", "a\udcff", "gs:/b"])
def test_paths_whose_checkpoints_could_not_be_read_again(tmp_path, name):
    """Nothing is trained there; what else is strange in a name does no harm."""
    with pytest.raises(RunDirectoryError, match=r"there can be no checkpoints in a directory with '"):
        open_run(tmp_path / name / "run", CONFIG)
    assert not list(tmp_path.iterdir())
    assert open_run(tmp_path / "a] b[*?,=:%#\n~中" / "run", CONFIG).config.exists()


def test_no_run_within_the_checkpoints_of_another(tmp_path):
    """Old ones are deleted, and it would be with them."""
    run = open_run(tmp_path / "run", CONFIG)
    (run.checkpoints / "3").mkdir(parents=True)
    for workdir in (run.checkpoints, run.checkpoints / "3", run.checkpoints / "4" / "run"):
        with pytest.raises(RunDirectoryError, match=r"lies in the checkpoints of the run .*--init_from"):
            open_run(workdir, CONFIG)
    assert [path.name for path in run.checkpoints.rglob("*")] == ["3"]
    open_run(tmp_path / "checkpoints" / "run", CONFIG)


def test_a_file_is_not_the_folder_of_checkpoints(tmp_path):
    run = open_run(tmp_path / "run", CONFIG)
    run.checkpoints.touch()
    with pytest.raises(RunDirectoryError, match="checkpoints is no directory"):
        open_run(run.root, CONFIG)


def test_unreadable_records(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        read_config(tmp_path)
    run = open_run(tmp_path / "run", CONFIG)
    run.environment.write_text("[{")
    with pytest.raises(RunDirectoryError, match=r"environment\.json cannot be read as JSON"):
        open_run(run.root, CONFIG)
    for damaged in ("{}", "[1]"):
        run.environment.write_text(damaged)
        for read in (lambda: open_run(run.root, CONFIG), lambda: check_data(run.root, "f" * 64, False)):
            with pytest.raises(RunDirectoryError, match=r"environment\.json is damaged"):
                read()
    run.environment.unlink()
    sections = json.loads(run.config.read_text())
    for damaged in ([], sections | {"model": []}, {key: value for key, value in sections.items() if key != "model"}):
        run.config.write_text(json.dumps(damaged))
        with pytest.raises(RunDirectoryError, match=r"config\.json is damaged: it has no section .*model"):
            open_run(run.root, CONFIG)
    run.config.write_text('{"model_type": "mamba"}')
    with pytest.raises(RunDirectoryError, match=r"is no run but .*--init_from=hf:.*run, and eval\.py as --hf=/.*run$"):
        read_config(run.root)
    run.config.write_text(json.dumps(sections | {"model": sections["model"] | {"mixer": []}}))
    with pytest.raises(RunDirectoryError, match=r"another configuration \(model\.mixer"):
        open_run(run.root, CONFIG)
    run.config.write_text("{")
    with pytest.raises(RunDirectoryError, match=r"config\.json cannot be read as JSON"):
        open_run(run.root, CONFIG)
    run.config.unlink()
    run.checkpoints.mkdir()
    with pytest.raises(RunDirectoryError, match=r"has checkpoints but no config\.json"):
        open_run(run.root, CONFIG)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("of another program")
    with pytest.raises(RunDirectoryError, match=r"has metrics\.jsonl but no config\.json"):
        open_run(tmp_path / "mine", CONFIG)
    assert content(tmp_path / "mine") == {"metrics.jsonl": b"of another program"}


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(run_directory, "_wait", lambda: None)
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

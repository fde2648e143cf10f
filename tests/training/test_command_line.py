"""The command line of a configuration: every key can be set, and what cannot is told apart and named."""

import os
import subprocess
import sys

import pytest

import train
from common.errors import UserError
from training import command_line
from training.command_line import ROOT, parse
from training.config import SECTIONS, resolve

FILE = "--config=configs/lm.py:corpus=stdlib"


def test_keys_are_set_with_their_types():
    config = parse(
        [
            "--config.train.steps=7",
            FILE,
            "--config.optimizer.learning_rate",
            "1e-3",
            "--noconfig.model.channel_bias",
            "--config.model.tie_embeddings",
            "--config.model.mixer.local_attention.kv_heads=2",
            "--config.optimizer.group_scale.ssm=0.5",
            "--config.seed",
            "3",
        ]
    )
    assert config.train.steps == 7 and config.optimizer.learning_rate == 1e-3 and config.seed == 3
    assert config.model.channel_bias is False and config.model.tie_embeddings is True
    assert config.model.mixer.local_attention.kv_heads == 2 and config.optimizer.group_scale.ssm == 0.5


def test_none_for_what_is_optional():
    """Also where the experiment's file has set a value."""
    lru = ["--config=configs/papers/lru_lra.py:task=listops"]
    assert parse(lru).model.causal is True and parse([*lru, "--config.model.causal=None"]).model.causal is None
    assert parse([FILE, "--config.model.norm_eps=None"]).model.norm_eps is None
    for key, kind in {"train.steps": "int", "task.corpus": "str"}.items():
        with pytest.raises(UserError, match=rf"config\.{key} takes {kind}, and not None"):
            parse([FILE, f"--config.{key}=None"])


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            "optimizer.lr=1e-3",
            r"configs/lm\.py.* has no key config\.optimizer\.lr; did you mean config\.optimizer\.learning_rate\?",
        ),
        ("model.heads=4", r"config\.model\.heads; did you mean config\.model\.mixer\.local_attention\.heads\?"),
        ("model.mixer.mamba.stat=3", r"did you mean config\.model\.mixer\.mamba\.state\?"),
        ("optmizer.name=adam", r"did you mean config\.optimizer\.name\?"),
        ("train.zzz=1", r"config\.train has accumulation, batch_size, "),
        ("zzz=1", r"config has mesh, model, optimizer, seed, task, train"),
        ("train=3", r"config\.train is a section: set one of its keys, such as config\.train\."),
        ("model.pattern=mamba", r"--config=configs/lm\.py:mixer="),
        ("task.name=mqar", r"--config=configs/lm\.py:task="),
        ("train.steps=abc", r"config\.train\.steps takes int, got 'abc'"),
        ("train.steps=1.5", r"config\.train\.steps takes int, got '1\.5'"),
        ("model.norm_eps=abc", r"config\.model\.norm_eps takes float, got 'abc'"),
        ("model.tie_embeddings=maybe", r"config\.model\.tie_embeddings takes bool, got 'maybe'"),
    ],
)
def test_what_cannot_be_set(setting, message):
    with pytest.raises(UserError, match=message):
        parse([FILE, "--config.train.steps=3", f"--config.{setting}"])


def test_the_last_of_two_values_counts():
    config = parse([FILE, *(f"--config.model.norm_eps={value}" for value in ("None", "1e-3"))])
    assert config.model.norm_eps == 1e-3
    config = parse([FILE, *(f"--config.model.norm_eps={value}" for value in ("1e-3", "None"))])
    assert config.model.norm_eps is None


@pytest.mark.parametrize("name, text", [("a.py", "x = 1"), ("a.txt", "some words")])
def test_a_file_that_is_no_configuration(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} is no configuration file: it defines no function get_config\(\)"):
        parse([f"--config={tmp_path / name}"])


@pytest.mark.parametrize("left", ["16", "--nonsense=3", "king"])
def test_left_over_arguments(left):
    with pytest.raises(UserError, match=rf"'{left}' belongs to no option"):
        parse([FILE, left])
    with pytest.raises(UserError, match="belongs to no option"):
        parse([FILE, "--config.train.steps=3", left])


def test_the_file_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse([FILE]).task.name == "language_model"
    with pytest.raises(UserError, match=r"no configuration file 'configs/lmm\.py'; did you mean 'configs/lm\.py'"):
        parse(["--config=configs/lmm.py"])
    os.mkdir("configs")
    (tmp_path / "configs" / "lm.py").write_text("def get_config(arg):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):  # a file of the user's own, and its bug
        parse([FILE])


def test_show_has_every_key_with_what_it_is():
    """And what is shown can be given again."""
    config = resolve(parse(["--config=configs/recall.py:task=adding,mixer=s4d"]))
    shown = [line for line in command_line.show(config).splitlines() if line.removeprefix("# ").startswith("--")]
    keys = {line.removeprefix("# ").partition("=")[0].removeprefix("--config.") for line in shown}
    assert keys == set(command_line.flatten(config.raw))
    given = [line.partition("  # ")[0] for line in shown if line.startswith("--")]
    assert len(keys) - len(given) == 3, "what comes with the file, and what nothing moves"
    assert resolve(parse(["--config=configs/recall.py:task=adding,mixer=s4d", *given])).raw == config.raw
    assert "--config.train.keep=2  # number of latest checkpoints that are kept, beside the best." in shown
    assert all("  # " in line for line in shown)


def test_help_names_the_sections(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"    {name:<10} {text}\n" in printed for name, text in SECTIONS.items())


def test_help_waits_for_nothing():
    """Command lines are read before anything is imported that takes seconds."""
    program = (
        "import sys, train, eval, sweep; train.parser(), eval.parser(), sweep.parser(); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)

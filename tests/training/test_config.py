"""Configurations: complete, typed, and nothing in them ignored."""

import importlib
import json
import re

import pytest

from common.errors import UserError
from data import task as tasks
from models import mixer as mixers
from training.config import resolve


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    config = importlib.import_module("configs.lm").get_config("mixer=mamba+local_attention")
    config.task.corpus = f"file:{tmp_path / 'text.txt'}"
    config.task.length = 16
    return config


def test_resolved_config_is_complete(config):
    """Every hyperparameter of every section is in the configuration, so that config.json is the whole truth."""
    resolved = resolve(config)
    assert resolved.model.pattern == ("mamba", "local_attention")
    assert resolved.model.vocab_size == 256 and resolved.model.causal
    for name in resolved.model.pattern:
        assert set(resolved.raw["model"]["mixer"][name]) == set(mixers.defaults(name))
    assert set(resolved.raw["task"]) - {"name"} <= set(tasks.defaults("language_model"))
    for part in ("model", "optimizer", "train"):
        from_the_task = {"vocab_size", "channels", "targets", "head"}
        fields = set(type(getattr(resolved, part)).__dataclass_fields__) - from_the_task
        assert set(resolved.raw[part]) == fields
    assert resolve(resolved.raw).model == resolved.model


def test_what_is_resolved_is_what_is_used(config):
    """Nothing is left to be derived: what was None has its value, and the same configuration comes of it."""
    config.model.update(
        {"causal": None, "length": None, "tie_embeddings": None, "norm_eps": None, "channel_size": None}
    )
    raw = resolve(config).raw
    found = {key: raw["model"][key] for key in ("causal", "length", "tie_embeddings", "norm_eps", "channel_size")}
    assert found == {"causal": True, "length": 16, "tie_embeddings": True, "norm_eps": 1e-6, "channel_size": 341}
    assert raw["model"]["position_embedding"] == "none" and raw["model"]["mixer"]["mamba"]["dt_rank"] == 8
    assert raw["task"]["corpus"].startswith("file:/") and raw["optimizer"]["group_scale"]["default"] == 1.0
    assert json.loads(json.dumps(raw)) == raw == resolve(raw).raw


def test_placeholders_are_typed(config):
    """A hyperparameter whose default is None can be set from a flag, with its type checked."""
    config.lock()
    config.model.mixer.mamba.dt_rank = 3
    with pytest.raises(TypeError):
        config.model.mixer.mamba.dt_rank = "three"


def test_locked_typo_suggests(config):
    """A flag that does not exist names the one that does."""
    config.lock()
    with pytest.raises(AttributeError, match="width"):
        config.model.widht = 3


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("model.widht", 3, "nobody reads config.model.widht; did you mean 'width'"),
        ("optimizer.learning_rat", 1.0, "did you mean 'learning_rate'"),
        ("extra", 1, "nobody reads config.extra"),
        ("mesh.dta", 1, "did you mean 'data'"),
        ("task.name", "language_modle", "language_model"),
        ("task.corpus", "file:/nowhere/text.txt", "/nowhere/text.txt"),
        ("task.lenght", 4, "length"),
        ("train.compute_dtype", "float16", "did you mean 'bfloat16' or 'float32'"),
        ("train.accumulation", 3, "not divisible"),
        ("optimizer.schedule", "cosin", "cosine"),
        ("optimizer.learning_rate", float("nan"), "config.optimizer.learning_rate must be a finite number, got nan"),
        ("optimizer.warmup_steps", -1, "optimizer.warmup_steps must be"),
        ("train.steps", 0, "train.steps must be at least 1, got 0"),
        ("train.eval_batches", -1, "train.eval_batches must be at least 0, got -1"),
        ("train.log_every", -1, "train.log_every must be at least 0, got -1"),
        ("train.z_loss", -0.1, "train.z_loss must be at least 0"),
        ("train.implementation", "chunkd", "chunked"),
        ("model.width", 0, "model.width must be at least 1"),
        ("model.depth", 0, "model.depth must be at least 1"),
        ("train.steps", 2**31, "train.steps must be from 1 to 2147483647"),
        ("train.batch_size", 10**20, "train.batch_size must be from 1 to 16777216"),
        ("train.profile_step", 10**6, "train.profile_step=1000000 is behind the last"),
        ("train.watchdog_minutes", float("inf"), "config.train.watchdog_minutes must be a finite number, got inf"),
        ("optimizer.group_scale.default", -1.0, "optimizer.group_scale.default must be at least 0"),
        ("optimizer.group_scale.fixed", 0.5, 'in the group "fixed" never moves'),
        ("model.moe.balance", float("inf"), "model.moe.balance must be a finite number"),
        ("seed", -1, "config.seed must be a whole number from 0 to 4294967295, got -1"),
        ("seed", 2**32, "config.seed must be"),
        ("mesh.data", 0, "mesh"),
        ("model.mixer.mamba.sate", 4, None),
    ],
)
def test_bad_values(config, path, value, message):
    """One clear error each, before anything is built or written."""
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with node.unlocked():
        node[last] = value
    if message is None:  # a mixer's own keys are checked by its constructor
        from training.setup import build

        with pytest.raises(ValueError, match="did you mean 'state'"):
            build(resolve(config))
    else:
        with pytest.raises(ValueError, match=message):
            resolve(config)


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("train", "steps", "6", "config.train.steps takes int, got '6'"),
        ("train", "steps", True, "config.train.steps takes int, got True"),
        ("train", "steps", None, "config.train.steps takes int, got None"),
        ("model", "width", 8.0, "config.model.width takes int, got 8.0"),
        ("model", "norm_eps", "small", "config.model.norm_eps takes float or None, got 'small'"),
        ("model", "pattern", "gla", "config.model.pattern takes tuple[str, ...], got 'gla'"),
        ("model", "mixer", {"mamba": {"state": "4"}}, "mixer 'mamba': `state` takes int, got '4'"),
        ("model", "moe", {"top_k": 1.5}, "model.moe.top_k takes int, got 1.5"),
        ("task", "length", "16", "`length` takes int, got '16'"),
        ("task", "name", 5, "config.task.name takes str, got 5"),
        ("mesh", "data", "2", "whole numbers"),
    ],
)
def test_types_of_a_file(config, section, key, value, message):
    """A config.json, which no command line has checked."""
    raw = json.loads(json.dumps(resolve(config).raw))
    raw[section][key] = value
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(raw)


@pytest.mark.parametrize(
    "arg,message",
    [
        ("mixr=mamba", "mixer"),
        ("mixer=mambo", "mamba"),
        ("size=tiny", "small"),
        ("size=small,size=large", "size twice"),
    ],
)
def test_bad_arguments(arg, message):
    """The config file's argument is checked like any flag."""
    with pytest.raises(ValueError, match=message):
        importlib.import_module("configs.lm").get_config(arg)


def test_depth_is_whole_patterns():
    """A pattern of three fits a size whose depth is no multiple of it."""
    config = importlib.import_module("configs.lm").get_config("mixer=gla+gla+local_attention")
    assert config.model.depth % 3 == 0


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_has_a_config(name):
    """configs/lm.py takes any causal mixer without being told about it."""
    if mixers.find(name).causal:
        config = importlib.import_module("configs.lm").get_config(f"mixer={name}")
        assert config.model.pattern == (name,)


@pytest.mark.parametrize("section,value", [("optimizer", "adamw"), ("task", None), ("mesh", 8)])
def test_values_in_place_of_sections(config, section, value):
    with pytest.raises(
        UserError, match=f"config.{section} is a section, which holds keys and their values; got {value!r}"
    ):
        resolve(config.to_dict() | {section: value})

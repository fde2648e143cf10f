"""What the experiment files have in common: the argument's syntax and the sections of a configuration."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from common.errors import UserError
from data import task as tasks
from models.mixer import defaults, find


def parse(arg: str, file: str, **choice: str) -> dict[str, str]:
    """Reads "key=value,key=value".

    Args:
      arg: what follows the colon of `--config=FILE:`.
      file: the experiment file, for the error.
      **choice: the keys and their defaults.

    Raises:
      UserError: for a key that does not exist.
    """
    for item in filter(None, arg.split(",")):
        key, _, value = item.partition("=")
        if key not in choice:
            example = ",".join(f"{k}={v}" for k, v in list(choice.items())[:2])
            raise UserError(f"{file} takes {', '.join(choice)} (as in '{example}'), not {item!r}")
        choice[key] = value
    return choice


def choose(what: str, value: str, known: Mapping[str, Any]):
    """known[value].

    Raises:
      UserError: if there is none.
    """
    if value not in known:
        raise UserError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def blocks(pattern: tuple[str, ...], depth: int) -> int:
    """The number of blocks that stands for `depth` blocks of a token mixer and a channel mixer: two for each where the mixers
    replace the channel mixer, in whole patterns."""
    if all(find(name).replaces_channel_mixer for name in pattern):
        depth *= 2
    return -(-depth // len(pattern)) * len(pattern)


def model(pattern: tuple[str, ...], width: int, depth: int, **options) -> ConfigDict:
    """The model section: all options of `models.sequence_model.ModelConfig`, those given in place of the defaults."""
    known = {
        "length": placeholder(int),  # for mixers that are built for one; left out, the task's
        "causal": placeholder(bool),  # left out, what the task needs
        "width": width,
        "depth": blocks(pattern, depth),
        "pattern": pattern,
        "mixer": {name: defaults(name) for name in dict.fromkeys(pattern)},
        "channel_mixer": "auto",
        "expansion": 4.0,
        "channel_size": placeholder(int),
        "channel_bias": False,
        "norm": "rmsnorm",
        "norm_eps": placeholder(float),
        "norm_position": "pre",
        "embedding_norm": False,
        "embedding_scale": 1.0,
        "position_embedding": "auto",
        "pooling": "mean",
        "loss": placeholder(str),  # of real targets; left out, squared
        "tie_embeddings": placeholder(bool),  # left out, for language models only
        "logit_cap": 0.0,
        "dropout": 0.0,
        "remat": "none",
    }
    return ConfigDict(_replace(known, options))


def optimizer(learning_rate: float, steps: int, name: str = "adamw", **options) -> ConfigDict:
    """The optimizer section, with a warm-up of a fortieth of the steps and a cosine."""
    known = {
        "name": name,
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "warmup_steps": steps // 40,
        "decay_fraction": 0.2,
        "final_fraction": 0.02,
        "weight_decay": 0.1,
        "b1": 0.95 if name == "muon" else 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "group_scale": {"default": 1.0, "ssm": 0.25},
    }
    return ConfigDict(_replace(known, options))


def train(steps: int, batch_size: int, **options) -> ConfigDict:
    """The train section."""
    known = {
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": 1,
        "z_loss": 0.0,
        "compute_dtype": "float32",
        "implementation": "auto",
        "log_every": max(1, steps // 24),
        "eval_every": max(1, steps // 2),
        "eval_batches": 0,  # 0: the whole validation split
        "checkpoint_every": max(1, steps // 4),
        "keep": 2,
        "profile_step": 0,
    }
    return ConfigDict(_replace(known, options))


def task_section(name: str, **options) -> ConfigDict:
    """The task section: all hyperparameters of a task with their defaults, those given in place of them. The seed is the
    experiment's."""
    section = tasks.defaults(name)
    section.name = name
    section.update(options)
    if "seed" in section:
        del section.seed
    return section


def experiment(task: ConfigDict, model: ConfigDict, optimizer: ConfigDict, train: ConfigDict) -> ConfigDict:
    """A whole configuration."""
    config = ConfigDict()
    config.seed = 0
    config.task = task
    config.model = model
    config.optimizer = optimizer
    config.train = train
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})
    return config


def _replace(known: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    for key in options:
        if key not in known:
            raise UserError(f"there is no option {key!r} among {', '.join(known)}")
    return known | dict(options)

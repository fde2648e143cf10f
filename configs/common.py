"""What the experiment files have in common: the argument's syntax and the sections of a configuration."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from common import signatures
from common.errors import UserError, near
from data import task as tasks
from models.config import ModelConfig
from models.mixer import defaults, find
from models.pattern import expand, mixers_of
from training.config import FROM_TASK, LEFT_TO_TASK, TrainConfig
from training.optimizer import OptimizerConfig
from training.sharding import AXES


def parse(arg: str, file: str, **choice: str) -> dict[str, str]:
    """Reads "key=value,key=value".

    Args:
      arg: what follows the colon of `--config=FILE:`.
      file: the experiment file, for the error.
      **choice: the keys and their defaults.

    Raises:
      UserError: for a key that does not exist, or stands twice.
    """
    given = set()
    for item in filter(None, arg.split(",")):
        key, _, value = item.partition("=")
        if key not in choice:
            example = ",".join(f"{k}={v}" for k, v in list(choice.items())[:2])
            raise UserError(f"{file} takes {', '.join(choice)} (as in '{example}'), not {item!r}")
        if key in given:
            raise UserError(f"{file}:{arg} says {key} twice; keep one")
        given.add(key)
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


def pattern(text: str) -> tuple[str, ...]:
    """The pattern that the key "mixer" of an argument names, see `models.pattern`.

    Raises:
      UserError: if it is none.
    """
    return expand([text], "mixer")


def blocks(pattern: tuple[str, ...], depth: int) -> int:
    """The number of blocks that stands for `depth` blocks of a token mixer and a channel mixer: two for each where the mixers
    replace the channel mixer, in whole patterns."""
    if all(find(name).replaces_channel_mixer for name in mixers_of(pattern)):
        depth *= 2
    return -(-depth // len(pattern)) * len(pattern)


def model(pattern: tuple[str, ...], width: int, depth: int, **options) -> ConfigDict:
    """The model section: the defaults of `models.config.ModelConfig`, but for what is given. What is None is left to the
    task, or to the norm and the channel mixer."""
    section = signatures.defaults(ModelConfig, FROM_TASK)
    for key in LEFT_TO_TASK:
        section[key] = placeholder(type(section[key]))
    section.update(width=width, depth=blocks(pattern, depth), pattern=pattern)
    around = (*options.get("prefix", ()), *options.get("suffix", ()))
    section.mixer = ConfigDict({name: defaults(name) for name in mixers_of((*pattern, *around))})
    return _set(section, options)


def optimizer(learning_rate: float, steps: int, name: str = "adamw", **options) -> ConfigDict:
    """The optimizer section: the defaults of `training.optimizer.OptimizerConfig`, a warm-up of a fortieth of the steps, and
    Muon's usual momentum."""
    section = signatures.defaults(OptimizerConfig)
    section.update(name=name, learning_rate=learning_rate, warmup_steps=steps // 40)
    if name == "muon":
        section.b1 = 0.95
    return _set(section, options)


def train(steps: int, batch_size: int, **options) -> ConfigDict:
    """The train section: the defaults of `training.config.TrainConfig`, with records, evaluations and checkpoints as often as
    suits the number of steps."""
    section = signatures.defaults(TrainConfig)
    section.update(steps=steps, batch_size=batch_size, log_every=max(1, steps // 24))
    section.update(eval_every=max(1, steps // 2), checkpoint_every=max(1, steps // 4))
    return _set(section, options)


def task_section(name: str, **options) -> ConfigDict:
    """The task section: all hyperparameters of a task with their defaults, but for what is given."""
    section = tasks.defaults(name)
    section.name = name
    return _set(section, options)


def experiment(task: ConfigDict, model: ConfigDict, optimizer: ConfigDict, train: ConfigDict) -> ConfigDict:
    """A whole configuration."""
    config = ConfigDict()
    config.seed = 0
    config.task = task
    config.model = model
    config.optimizer = optimizer
    config.train = train
    config.mesh = ConfigDict({"data": -1} | dict.fromkeys(AXES[1:], 1))
    return config


def _set(section: ConfigDict, options: Mapping[str, Any]) -> ConfigDict:
    for key, value in options.items():
        if key not in section:
            raise UserError(f"there is no option {key!r}; {near(key, section)}")
        section[key] = value
    return section

"""From the command line to the dataclasses that the program reads. Nothing is ignored: an unknown key is an error."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from common import signatures
from common.errors import UserError, check_choice, check_range, near
from common.files import absolute
from data import task as tasks
from models.config import ModelConfig
from ops import dispatch
from training.optimizer import OptimizerConfig, schedule
from training.sharding import AXES, check_sizes

SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to train.

    Attributes:
      steps: optimiser steps.
      batch_size: rows of a step, over all devices.
      accumulation: microbatches that a step is computed in.
      loss_chunks: pieces of the length that logits and their loss are computed in, one after the other; for large vocabularies,
        whose logits would take more memory than the model.
      z_loss: weight of the squared log-partition in the objective.
      carry: whether a row goes on with the text, and the state of the mixers, where the same row of the step before has ended
        (truncated back-propagation: gradients do not go back there); for language models of mixers that stream.
      compute_dtype: "float32" or "bfloat16"; parameters and optimiser are float32.
      implementation: of the primitives: "auto", or a choice for some of them, see `ops.dispatch`.
      log_every: steps from one record of the training's metrics to the next; 0 is never (the last step is always recorded).
      eval_every: steps from one evaluation to the next; 0 is never (the last step is always evaluated).
      checkpoint_every: steps from one checkpoint to the next; 0 is never (the last step, and each new best, are always saved).
      eval_batches: batches of the validation split in an evaluation; 0 is all.
      keep: number of latest checkpoints that are kept, beside the best.
      profile_step: the three steps from this one on are traced into the run's `profile/`; 0 is never.
      watchdog_minutes: that a process may be without a step, an evaluation, or a checkpoint, before it is named and the run is
        ended, to be run again; 0 is for ever.
      data_workers: processes of each host that make the rows of training, in place of a thread; the rows are the same. 0 is none.
      init_from: whose weights to start from: a run, or "hf:" and a folder in Hugging Face's format; "" for none.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    loss_chunks: int = 1
    z_loss: float = 0.0
    carry: bool = False
    compute_dtype: str = "float32"
    implementation: str = "auto"
    log_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    eval_batches: int = 0
    keep: int = 2
    profile_step: int = 0
    watchdog_minutes: float = 0.0
    data_workers: int = 0
    init_from: str = ""

    def __post_init__(self):
        object.__setattr__(self, "init_from", locate(self.init_from))
        check_choice("train.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        dispatch.check(self.implementation)
        for key in ("steps", "batch_size", "accumulation", "loss_chunks", "keep"):
            check_range(f"train.{key}", getattr(self, key), 1)
        check_range("train.steps", self.steps, 1, 2**31 - 1)  # they are counted in 32 bits
        # All rows of a step are made before any of it is computed.
        check_range("train.batch_size", self.batch_size, 1, 2**24)
        for key in (
            "log_every",
            "eval_every",
            "checkpoint_every",
            "eval_batches",
            "profile_step",
            "z_loss",
            "watchdog_minutes",
        ):
            check_range(f"train.{key}", getattr(self, key), 0)
        check_range("train.data_workers", self.data_workers, 0, 1024)  # all are started at once
        if self.profile_step > self.steps:
            raise UserError(
                f"train.profile_step={self.profile_step} is behind the last of train.steps={self.steps}; lower it"
            )
        if self.batch_size % self.accumulation:
            raise UserError(f"train.batch_size={self.batch_size} is not divisible by accumulation={self.accumulation}")
        if self.carry and self.data_workers:
            raise UserError("train.data_workers makes rows that stand alone, and train.carry has none: set it to 0")


@dataclasses.dataclass(frozen=True)
class Expect:
    """The published number that a configuration is to find again.

    Attributes:
      metric: a score of the task, see `data.metrics`.
      value: the number, in the score's unit; None where none is verified.
      tolerance: how far from it, to either side, a run's score may be.
      source: of the number: arXiv id and table, and how far it is verified.
      seeds: runs, of config.seed 0, 1, ..., that it takes to say that the number was found again.
      hours: estimate for one run; on what hardware, the configuration's file says.
      length: of the rows that are scored; None for those of training.
    """

    metric: str
    value: float | None
    tolerance: float
    source: str
    seeds: int
    hours: float
    length: int | None = None

    def __post_init__(self):
        if not self.metric or not self.source:
            raise UserError("config.expect needs a metric and a source")
        check_range("expect.tolerance", self.tolerance, 0)
        check_range("expect.seeds", self.seeds, 1)
        if not self.hours > 0:
            raise UserError(f"expect.hours must be more than 0, got {self.hours}")
        if self.length is not None:
            check_range("expect.length", self.length, 1)


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved configuration.

    Attributes:
      task: the task, built.
      model, optimizer, train: the sections.
      mesh: sizes of the named mesh axes.
      seed: of the parameters and of the order of the data.
      expect: the published number that is to be found again, if the configuration has one.
      raw: everything as it is used, as plain dicts, which is what `config.json` holds.
    """

    task: tasks.Task
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: Mapping[str, int]
    seed: int
    expect: Expect | None
    raw: dict[str, Any]


HF = "hf:"


def locate(init_from: str) -> str:
    """Where initial weights are, with an absolute path; empty where there are none."""
    prefix = HF if init_from.startswith(HF) else ""
    path = init_from.removeprefix(prefix)
    if prefix and not path:
        raise UserError("train.init_from='hf:' names no folder")
    return prefix + absolute(path) if path else ""


# What the sections of a configuration are about, as the help tells.
SECTIONS = {
    "seed": "of the parameters and of the order of the data",
    "task": "what is learned: the data and how its rows are made",
    "model": "width, depth, the pattern of mixers and their hyperparameters",
    "optimizer": "rule, learning rate and schedule",
    "train": "steps, batch, precision, and when to log, evaluate and save",
    "mesh": "how the devices are arranged",
}
# Fields of `ModelConfig` that the task decides.
FROM_TASK = ("vocab_size", "channels", "targets", "head")
# Fields that are None in a configuration until the task decides them.
LEFT_TO_TASK = ("causal", "length", "tie_embeddings")


def resolve(config: ConfigDict | Mapping[str, Any], with_data: bool = True) -> Config:
    """Checks a configuration and builds what it describes, up to the task.

    Args:
      config: from a config file and flags, or a `config.json` that was read back. What it leaves out has its default.
      with_data: False for a model that is only compiled: the task is an outline, and nothing is read or downloaded.

    Raises:
      UserError: for a key that nobody reads, one that is missing, or a value that does not fit; the message says which.
    """
    raw = _plain(config)
    check_keys(raw, (*SECTIONS, "expect"), SECTIONS, "config")
    for key, value in raw.items():
        if key != "seed" and not isinstance(value, Mapping) and (key, value) != ("expect", None):
            raise UserError(f"config.{key} is a section, which holds keys and their values; got {value!r}")
    check_sizes(raw["mesh"])
    check_seed(raw["seed"])
    name = raw["task"].get("name")
    if name is None:
        raise UserError("config.task.name is missing: it says which task to train on")
    if not isinstance(name, str):
        raise UserError(f"config.task.name takes str, got {name!r}")
    name = tasks.full(name)
    make = tasks.create if with_data else tasks.outline
    task = make(name, **{key: value for key, value in raw["task"].items() if key != "name"})
    model = section(ModelConfig, _fill(raw["model"], task), "config.model", _from_task(task.spec)).as_used()
    optimizer = section(OptimizerConfig, raw["optimizer"], "config.optimizer")
    if model.transfers and optimizer.name == "sgd":
        raise UserError(
            "config.optimizer.name='sgd' has no rule for config.model.base_width and base_depth: its updates are as large as the "
            "gradients; choose adamw, adam, lion or muon, or set both to 0"
        )
    train = section(TrainConfig, raw["train"], "config.train")
    if train.z_loss and task.spec.objective in tasks.REAL:
        raise UserError(
            f"config.train.z_loss={train.z_loss} is of classes, and task {name!r} has real targets: set it to 0"
        )
    schedule(optimizer, train.steps)  # refuses a warm-up that does not fit into them
    expect = section(Expect, raw["expect"], "config.expect") if raw.get("expect") is not None else None
    mesh = {axis: 1 for axis in AXES} | raw["mesh"]
    model_raw = {key: value for key, value in dataclasses.asdict(model).items() if key not in FROM_TASK}
    used = {
        "seed": raw["seed"],
        "task": {"name": name, **task.hyperparameters},
        "model": model_raw,
        "optimizer": dataclasses.asdict(optimizer),
        "train": dataclasses.asdict(train),
        "mesh": mesh,
    }
    if expect is not None:
        used["expect"] = dataclasses.asdict(expect)
    return Config(task, model, optimizer, train, mesh, raw["seed"], expect, _plain(used))


def check_seed(seed: Any) -> None:
    """Raises a UserError for a seed that is no whole number of 32 bits: parameters and the order of the data would disagree."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise UserError(f"config.seed must be a whole number from 0 to {SEEDS - 1}, got {seed!r}")


def complete(raw: Mapping[str, Any], used: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier record of a configuration in the words of today's.

    Args:
      raw: what a `config.json` holds, perhaps of older code: keys that did not exist then had what is now their default, and what
        was left to be derived (None, "auto") was derived as today.
      used: the configuration, resolved by today's code, that it is to be compared with.
    """
    standards = {
        "task": tasks.defaults(raw["task"]["name"]).to_dict()
        if raw.get("task", {}).get("name") in (*tasks.names(), used["task"]["name"])
        else {},
        "model": signatures.defaults(ModelConfig, FROM_TASK).to_dict(),
        "optimizer": signatures.defaults(OptimizerConfig).to_dict(),
        "train": signatures.defaults(TrainConfig).to_dict(),
        "mesh": dict.fromkeys(AXES, 1),
    }
    standards, result = _plain(standards), {}
    for name in {*raw, *used}:
        values = raw.get(name, {} if name in standards else None)
        if isinstance(values, Mapping) and isinstance(used.get(name), Mapping):
            derived = (None, "auto") if name in ("model", "task") else (None,)
            values = _completed(values, used[name], standards.get(name, {}), derived)
        if values is not None:
            result[name] = values
    return result


def _completed(
    values: Mapping[str, Any], used: Mapping[str, Any], standard: Mapping[str, Any], derived: tuple[str | None, ...]
) -> dict[str, Any]:
    result = dict(values)
    for key, now in used.items():
        old = values.get(key)
        if isinstance(now, Mapping) and (old is None or isinstance(old, Mapping)):
            result[key] = _completed(old or {}, now, standard.get(key) or now, derived)
        elif key in values and old not in derived:
            result[key] = old
        elif (old if key in values else standard.get(key)) in derived:
            result[key] = now  # it was derived
        else:
            result[key] = standard[key]
    return result


def _from_task(spec: tasks.Spec) -> dict[str, Any]:
    return {"vocab_size": spec.vocab_size, "channels": spec.channels, "targets": spec.targets, "head": head(spec)}


def _fill(options: Mapping[str, Any], task: tasks.Task) -> dict[str, Any]:
    """The model's options with what was left to the task (None) filled in."""
    spec = task.spec
    model = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    derived = {"length": spec.length, "causal": bool(spec.causal), "tie_embeddings": spec.objective == "causal_lm"}
    if spec.objective in ("regression", "token_regression"):
        derived["loss"] = "squared"
    elif model.get("loss") is not None:
        raise UserError(f"config.model.loss is for real targets; task {task.name!r} has classes: leave it out")
    for key, value in derived.items():
        if model.get(key) is None:
            model[key] = value
    if spec.causal is not None and model["causal"] != spec.causal:
        form = "causal" if spec.causal else "two-sided"
        raise UserError(f"task {task.name!r} needs a {form} model: leave config.model.causal out")
    return model


def head(spec: tasks.Spec) -> str:
    """The kind of head that a task's objective needs."""
    kinds = {"classification": "pooled", "regression": "pooled", "pair_classification": "pair"}
    return kinds.get(spec.objective, "token")


def section(cls: type, values: Mapping[str, Any], where: str, given: Mapping[str, Any] | None = None):
    """Builds a dataclass from a section of the configuration; `given` are fields that do not come from it."""
    given = given or {}
    parameters = {k: p for k, p in inspect.signature(cls).parameters.items() if k not in given}
    required = [k for k, p in parameters.items() if p.default is inspect.Parameter.empty]
    check_keys(values, tuple(parameters), required, where)
    signatures.check(cls, values, lambda key: f"{where}.{key}")
    return cls(**values, **given)


def check_keys(values: Mapping[str, Any], known, required, where: str) -> None:
    """Raises a UserError for a key that nobody reads (with the near ones), or one that is missing."""
    for key in values:
        if key not in known:
            raise UserError(f"nobody reads {where}.{key}; {near(key, known)}")
    for key in required:
        if key not in values:
            raise UserError(f"{where}.{key} is missing")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; lists and empty sections count as values."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value):
    """The same in dicts and lists, as JSON holds it."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value

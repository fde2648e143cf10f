"""From the flags' ConfigDict to the dataclasses that the program reads. Nothing is ignored: an unknown key is an error."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from common.errors import UserError, near
from data import task as tasks
from evaluation.expect import Expect
from models.sequence_model import ModelConfig
from training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to train.

    Attributes:
      steps: optimiser steps.
      batch_size: rows of a step, over all devices.
      accumulation: microbatches that a step is computed in.
      z_loss: weight of the squared log-partition in the objective.
      compute_dtype: "float32" or "bfloat16"; parameters and optimiser are float32.
      implementation: of the primitives: "auto", or one that those which offer it use ("reference", "sequential", "chunked").
      log_every, eval_every, checkpoint_every: in steps; 0 is never (a run always ends with both).
      eval_batches: batches of the validation split in an evaluation; 0 is all.
      keep: number of latest checkpoints that are kept, beside the best.
      profile_step: the three steps from this one on are traced into the run's `profile/`; 0 is never.
    """

    steps: int
    batch_size: int
    accumulation: int = 1
    z_loss: float = 0.0
    compute_dtype: str = "float32"
    implementation: str = "auto"
    log_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    eval_batches: int = 0
    keep: int = 2
    profile_step: int = 0

    def __post_init__(self):
        choices = {
            "compute_dtype": ("float32", "bfloat16"),
            "implementation": ("auto", "reference", "sequential", "chunked"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"train.{key} must be one of {', '.join(allowed)}; got {getattr(self, key)!r}")
        for key in ("steps", "batch_size", "accumulation", "keep"):
            if getattr(self, key) < 1:
                raise UserError(f"train.{key} must be at least 1, got {getattr(self, key)}")
        if self.batch_size % self.accumulation:
            raise UserError(f"train.batch_size={self.batch_size} is not divisible by accumulation={self.accumulation}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved configuration.

    Attributes:
      task: the task, built.
      model, optimizer, train: the sections.
      mesh: sizes of the named mesh axes.
      seed: of the parameters and of the order of the data.
      expect: the published number that is to be found again, if the configuration has one.
      raw: everything as plain dicts, which is what `config.json` holds.
    """

    task: tasks.Task
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: Mapping[str, int]
    seed: int
    expect: Expect | None
    raw: dict[str, Any]


SECTIONS = ("task", "model", "optimizer", "train", "mesh", "seed")
OPTIONAL_SECTIONS = ("expect",)
MESH_AXES = ("data", "fsdp", "tensor", "sequence")


def resolve(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Checks a configuration and builds what it describes, up to the task.

    Args:
      config: from a config file and flags, or a `config.json` that was read back.

    Raises:
      UserError: for a key that nobody reads, one that is missing, or a value that does not fit; the message says which.
    """
    raw = _plain(config)
    check_keys(raw, (*SECTIONS, *OPTIONAL_SECTIONS), SECTIONS, "config")
    check_keys(raw["mesh"], MESH_AXES, (), "config.mesh")
    raw["task"] = dict(raw["task"])
    name = raw["task"].get("name")
    if name is None:
        raise UserError("config.task.name is missing: it says which task to train on")
    options = {key: value for key, value in raw["task"].items() if key != "name"}
    options.setdefault("seed", raw["seed"])
    task = tasks.create(name, **options)
    spec = task.spec
    given = {"vocab_size": spec.vocab_size, "channels": spec.channels, "targets": spec.targets, "head": head(spec)}
    model = dict(raw["model"]) | {"pattern": tuple(raw["model"].get("pattern", ()))}
    fill(model, "length", spec.length)
    fill(model, "causal", bool(spec.causal))
    if spec.causal is not None and model["causal"] != spec.causal:
        raise UserError(
            f"task {task.name!r} needs a {'causal' if spec.causal else 'two-sided'} model: leave config.model.causal out"
        )
    real = spec.objective in ("regression", "token_regression")
    if real:
        fill(model, "loss", "squared")
    elif model.get("loss") is not None:
        raise UserError(f"config.model.loss is for real targets; task {task.name!r} has classes: leave it out")
    # The head can be the embedding only where what is scored are the ids that are read.
    fill(model, "tie_embeddings", spec.objective == "causal_lm")
    return Config(
        task=task,
        model=section(ModelConfig, model, "config.model", given),
        optimizer=section(OptimizerConfig, raw["optimizer"], "config.optimizer"),
        train=section(TrainConfig, raw["train"], "config.train"),
        mesh={axis: 1 for axis in MESH_AXES} | raw["mesh"],
        seed=raw["seed"],
        expect=section(Expect, raw["expect"], "config.expect") if "expect" in raw else None,
        raw=raw,
    )


def head(spec: tasks.Spec) -> str:
    """The kind of head that a task's objective needs."""
    return {"classification": "pooled", "regression": "pooled", "pair_classification": "pair"}.get(
        spec.objective, "token"
    )


def fill(options: dict[str, Any], key: str, value) -> None:
    """Sets an option that was left out (None)."""
    if options.get(key) is None:
        options[key] = value


def section(cls: type, values: Mapping[str, Any], where: str, given: Mapping[str, Any] | None = None):
    """Builds a dataclass from a section of the configuration; `given` are fields that do not come from it."""
    given = given or {}
    parameters = {k: p for k, p in inspect.signature(cls).parameters.items() if k not in given}
    required = [k for k, p in parameters.items() if p.default is inspect.Parameter.empty]
    check_keys(values, tuple(parameters), required, where)
    return cls(**values, **given)


def check_keys(values: Mapping[str, Any], known, required, where: str) -> None:
    """Raises a UserError for a key that nobody reads (with the near ones), or one that is missing."""
    for key in values:
        if key not in known:
            raise UserError(f"nobody reads {where}.{key}; {near(key, known)}")
    for key in required:
        if key not in values:
            raise UserError(f"{where}.{key} is missing")


def _plain(value):
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value

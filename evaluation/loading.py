"""A run with one of its checkpoints, as everything in this folder starts from."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from common import hosts
from common.console import say
from common.errors import UserError, near
from common.files import absolute
from data import tokenizers, vocabularies
from models import import_hf
from models.sequence_model import SequenceModel
from ops import dispatch
from training import setup, sharding, state
from training.checkpoints import Checkpoints
from training.config import Config, TrainConfig, complete, flatten, resolve
from training.optimizer import OptimizerConfig
from training.run_directory import RunDirectory, check_data, described, locate, read_config, recorded_data

NAMED = ("best", "latest")


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run and the model of one of its checkpoints.

    Attributes:
      config: of the run, on a mesh of this machine's devices.
      built: the model's functions.
      params: the parameters.
      workdir: the run's directory, as an absolute path.
      step: of the checkpoint.
      data: the fingerprint of the data that is here.
      other_data: the fingerprint of the data that the run was trained on where it is not that which is here, else None.
      other_tokenizer: the same of its tokenizer.

    Of a checkpoint in Hugging Face's format `config.task` is None, there is no fingerprint, and `step` is 0.
    """

    config: Config
    built: state.Built
    params: Any
    workdir: Path
    step: int
    data: str
    other_data: str | None = None
    tokenizer: tokenizers.Subword | None = None  # of a checkpoint in Hugging Face's format
    other_tokenizer: str | None = None

    @property
    def reader(self) -> Any:
        """What cuts texts as the model was trained: the task of a run, or the tokenizer of a checkpoint; None without one."""
        return self.tokenizer if self.config.task is None else self.config.task

    def encode(self, text: str) -> list[int] | None:
        """The token ids that the model was trained on for a text; None where it was trained on none."""
        ids = vocabularies.encode(self.reader, text)
        return None if ids is None else ids.tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        Raises:
          UserError: where the model is of no text, or of one whose tokenizer is not there.
        """
        if self.config.task is not None:
            return self.config.task.decode(ids)
        if self.tokenizer is None:
            if (file := vocabularies.unread(self.workdir)) is not None:
                raise UserError(vocabularies.how_to_read(file))
            raise UserError(f"{self.workdir} has no tokenizer.json, which says what text its tokens are")
        return self.tokenizer.decode(ids)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The `config.json` of a checkpoint in Hugging Face's format; of a run nothing."""
        return json.loads((self.workdir / "config.json").read_text()) if self.config.task is None else {}

    @functools.cached_property
    def steps(self) -> dict[Any, Any]:
        """Compiled functions of the model that are used again, by what they are of."""
        return {}

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text; of a run none."""
        return ids_of(self.facts.get("eos_token_id"))

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """On the run's mesh, with its choice of the primitives' implementations."""
        with jax.set_mesh(self.built.mesh), dispatch.implementation(self.config.train.implementation):
            yield

    @property
    def origin(self) -> dict[str, Any]:
        """What is written beside everything that is made from the run: the step and the data, and the run's own data and
        tokenizer if those were others."""
        of_the_run = {"data_of_the_run": self.other_data, "tokenizer_of_the_run": self.other_tokenizer}
        found = {"step": self.step, "data": self.data, **of_the_run}
        if self.other_tokenizer is not None:
            found["tokenizer"] = self.config.task.tokenizer.fingerprint
        return {key: value for key, value in found.items() if value is not None}


def configuration(workdir: str | Path, with_data: bool = True, **sections: Any) -> Config:
    """The configuration of a run, `sections` in place of its own.

    Args:
      workdir: the run's directory.
      with_data: False reads no data, see `training.config.resolve`.
      **sections: what takes the place of sections of the run's configuration.

    Raises:
      UserError: if the directory holds no run, its `config.json` is damaged, or its data is not here.
    """
    return resolve({**read_config(workdir), **sections}, with_data)


def load(
    workdir: str | Path, checkpoint: str = "best", allow_other_data: bool = False, alone: bool = False
) -> LoadedRun:
    """Loads a checkpoint of a run onto this machine's devices, whatever it was trained on.

    Args:
      workdir: the run's directory.
      checkpoint: "best", "latest" or a step.
      allow_other_data: go on where the data that is here is not the data that the run was trained on.
      alone: take one device, for what has one row.

    Raises:
      UserError: if the directory holds no run, its data is another or not here, or its `config.json` is of another model than its
        checkpoint.
      CheckpointError: if there is no such intact checkpoint.
    """
    run = RunDirectory(locate(workdir))
    config = configuration(run.root, mesh={"data": 1 if alone else -1})
    checkpoints = Checkpoints(run.checkpoints, higher_is_better=config.task.spec.metric.higher_is_better)
    which = _which(checkpoint, checkpoints, run.root)
    data = config.task.fingerprint()
    hosts.agree("run and data", described(config, data) | {"checkpoint": str(which)}, {"task": config.task.name})
    here, trained = getattr(config.task.tokenizer, "fingerprint", None), recorded_data(run.root, "tokenizer")
    other = check_data(run.root, data, allow_other_data, here)
    built = setup.build(config, for_training=False, devices=jax.local_devices()[:1] if alone else None)
    restored = checkpoints.restore_params(built.abstract["params"], which)
    _check_model(config, restored.metadata.get("config"), run.config)
    say(f"{run.root}: checkpoint of step {restored.step}")
    other_tokenizer = trained if None not in (trained, here) and trained != here else None
    return LoadedRun(
        config, built, restored.state, run.root, restored.step, data, other, other_tokenizer=other_tokenizer
    )


def load_hf(directory: str | Path) -> LoadedRun:
    """Loads a checkpoint in Hugging Face's format, of an architecture that `models.import_hf` knows, onto this machine's devices.

    Raises:
      UserError: if there is none, or our model does not have what it needs.
    """
    directory = Path(absolute(directory))
    if not (directory / "config.json").is_file():
        raise UserError(f"--hf={directory} holds no config.json: give the directory of a checkpoint")
    checkpoint = import_hf.load(directory)
    mesh = sharding.make_mesh({axis: 1 for axis in sharding.AXES} | {"data": -1})
    built = state.build(lambda rngs: SequenceModel(checkpoint.config, rngs=rngs), None, mesh)
    params: dict[str, Any] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(checkpoint.model)):
        *parents, last = map(str, path)
        inner = params
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = leaf[...]
    params = jax.device_put(params, built.shardings["params"])
    raw = {"task": {}, "model": dataclasses.asdict(checkpoint.config)}
    config = Config(None, checkpoint.config, OptimizerConfig(), TrainConfig(), {"data": -1}, 0, None, raw)
    name = vocabularies.of_checkpoint(directory)
    tokenizer = None if name is None else tokenizers.alone(name)
    say(f"{directory}: a {checkpoint.hf_config['model_type']} model")
    return LoadedRun(config, built, params, directory, 0, "", tokenizer=tokenizer)


def ids_of(value: int | list[int] | None) -> list[int]:
    """What a key of `config.json` for one token or several holds."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _check_model(config: Config, trained: Mapping[str, Any] | None, file: Path) -> None:
    """Raises a UserError where a run's `config.json` has another model than its checkpoint was trained with: one whose parameters
    have the same shapes would be scored as if nothing was."""
    if trained is None:
        return
    then, now = (flatten(raw["model"]) for raw in (complete(trained, config.raw), config.raw))
    if different := [key for key in sorted({*then, *now}) if then.get(key, "absent") != now.get(key, "absent")]:
        told = ", ".join(f"model.{key}: {then.get(key, 'absent')!r} -> {now.get(key, 'absent')!r}" for key in different)
        raise UserError(
            f"{file} has another model than the checkpoint was trained with ({told}): give back the one of the run"
        )


def _which(checkpoint: str, checkpoints: Checkpoints, root: Path) -> str | int:
    """The checkpoint that a user asks for, as `Checkpoints.restore_params` takes it."""
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{root} has no checkpoint yet: train on first")
    if checkpoint.isdecimal():
        return int(checkpoint)
    if checkpoint not in NAMED:
        there = ", ".join(map(str, steps))
        raise UserError(
            f"--checkpoint={checkpoint} is unknown, and no step (there are {there}); {near(checkpoint, NAMED)}"
        )
    return checkpoint

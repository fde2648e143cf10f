"""What a run starts from: the weights of another run, or a checkpoint in Hugging Face's format.

    train.py --init_from=hf:DIR ...        config.json and model.safetensors, see `models.import_hf`
    train.py --init_from=RUN ...           the latest checkpoint of a run
    train.py --init_from=RUN/checkpoints/STEP ...

A parameter of the new model that has a namesake of its shape there starts from it. All others start as in any run, and are said
by name.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from common import remote
from common.console import say
from common.errors import UserError
from data import task as tasks
from data import tokenizers, vocabularies
from models import import_hf
from training.checkpoints import Checkpoints
from training.checksums import checksums, named_leaves
from training.config import FROM_TASK, HF, Config, locate
from training.run_directory import RunDirectory, read_config, recorded_data, recorded_launches, saved_steps
from training.state import Built, State

# Tokenizers that are made from the corpus: of another corpus, the same name is another vocabulary.
TRAINED = ("bpe:", "character")
# A vocabulary is often padded to a round number; a table with so many more rows gives its first ones.
PADDING = 0.1


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights come from, before they are read.

    Attributes:
      address: as it stands in config.json, its path absolute.
      model: the model section of its configuration.
      tokenizer: of its text, as `data.tokenized.load` takes it; None if there is none.
      task: the task section of a run's configuration; empty for other checkpoints.
      data: the fingerprint of a run's data, where it is known.
      trained: the same of its tokenizer.
      earlier: whether the model is that of the run which goes on, what was set on its command line included, because older code
        has kept no record of the source's.
    """

    address: str
    model: Mapping[str, Any]
    tokenizer: str | None = None
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: str | None = None
    trained: str | None = None
    earlier: bool = False


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a run takes over.

    Attributes:
      params: arrays by path, on the devices where the run's parameters lie.
      record: where they come from and what is taken, for `environment.json`.
    """

    params: Mapping[str, jax.Array]
    record: Mapping[str, Any]

    def into(self, state: State) -> State:
        """The state with the parameters that are taken over in place of its own."""
        flat, tree = jax.tree.flatten(state["params"])
        values = [self.params.get(path, leaf) for path, leaf in zip(named_leaves(state["params"]), flat, strict=True)]
        return {**state, "params": jax.tree.unflatten(tree, values)}


def find(address: str, workdir: str | Path | None = None) -> Source:
    """What there is at an address.

    Args:
      address: of a run, one of its checkpoints, or "hf:" and a folder.
      workdir: of the run that starts from it. Where that has checkpoints already, nothing else is read: it goes on with the model
        that it has found when it began, whatever has become since of what it has started from.

    Raises:
      UserError: if there is neither a checkpoint nor a run.
    """
    if not address.strip():
        raise UserError("--init_from is empty: give the directory of a run, or hf: and a folder")
    address = locate(address)
    if workdir is not None and saved_steps(RunDirectory(remote.at(workdir)).checkpoints):
        raw = read_config(workdir)
        if raw["train"].get("init_from") == address:
            records = [launch["init_from"] for launch in recorded_launches(workdir) if "init_from" in launch]
            if records and "model" in records[-1]:
                return Source(address, records[-1]["model"], records[-1]["tokenizer"])
            return Source(address, raw["model"], raw["task"].get("tokenizer"), raw["task"], earlier=True)
    if address.startswith(HF):
        folder = Path(address.removeprefix(HF))
        model = dataclasses.asdict(import_hf.read_config(folder))
        own = {key: value for key, value in model.items() if key not in FROM_TASK}
        return Source(address, own, vocabularies.of_checkpoint(folder))
    root, step = _run(address)
    if not root.exists():
        raise UserError(f"there is no run {root}; --init_from takes the directory of a run, or hf: and a folder")
    raw = read_config(root)
    if step is not None:
        Checkpoints(RunDirectory(root).checkpoints).check_there(step)
    recorded = recorded_data(root), recorded_data(root, "tokenizer")
    return Source(address, raw["model"], raw["task"].get("tokenizer"), raw["task"], *recorded)


def read_weights(address: str, config: Config, built: Built) -> Weights:
    """Reads what fits a model, and prints what does not.

    Args:
      address: as of `find`.
      config: of the run that starts from it.
      built: its model.

    Raises:
      UserError: if there is no such checkpoint, or nothing of it fits the model's blocks.
    """
    source = find(address)
    if source.address.startswith(HF):
        model = import_hf.load(source.address.removeprefix(HF)).model
        flat = nnx.to_flat_state(nnx.state(model))
        there, step = {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}, None
    else:
        root, step = _run(source.address)
        restored = Checkpoints(RunDirectory(root).checkpoints).restore_any_params(
            NamedSharding(built.mesh, PartitionSpec()), "latest" if step is None else step
        )
        there, step = named_leaves(restored.state), restored.step
    other_vocabulary = _other_vocabulary(source, config)
    taken, kept = {}, {}
    facts = named_leaves(built.metadata)
    for path, target in named_leaves(built.abstract["params"]).items():
        axes = facts[path].axes
        if path not in there:
            kept[path] = "it is not there"
        elif other_vocabulary and "vocab" in axes:
            kept[path] = other_vocabulary
        elif (value := _fitting(there[path], target.shape, axes)) is None:
            kept[path] = f"{list(there[path].shape)} there, {list(target.shape)} here"
        else:
            taken[path] = jax.device_put(value.astype(target.dtype), target.sharding)
    unused = sorted(set(there) - set(taken) - set(kept))
    if not any(path.startswith("stack/") for path in taken):
        reasons = "; ".join(f"{path}: {why}" for path, why in itertools.islice(kept.items(), 4))
        raise UserError(f"nothing of {source.address} fits the blocks of this model ({reasons})")
    say(
        f"{len(taken)} of {len(taken) + len(kept)} parameters start from {source.address}"
        + (f", step {step}" if step else "")
    )
    for path, why in kept.items():
        say(f"  {path} starts anew: {why}")
    if unused:
        say(f"  not used: {', '.join(unused)}")
    record = {
        "address": source.address,
        "step": step,
        "model": source.model,
        "tokenizer": source.tokenizer,
        "taken": sorted(taken),
        "anew": kept,
        "not_used": unused,
        "checksums": checksums(taken),
    }
    return Weights(taken, json.loads(json.dumps(record)))


def _run(address: str) -> tuple[Path, int | None]:
    """The directory of a run and the step that is asked for."""
    path = remote.at(address)
    if path.name.isdecimal() and path.parent.name == "checkpoints":
        return path.parent.parent, int(path.name)
    return path, None


def _other_vocabulary(source: Source, config: Config) -> str | None:
    """Why the source's ids mean something else than this run's, where that is known."""
    theirs, ours, here = source.tokenizer, config.raw["task"].get("tokenizer"), config.task
    if not source.task and theirs is None:
        file = vocabularies.unread(Path(source.address.removeprefix(HF)))
        of_text = vocabularies.encode(here, vocabularies.PROBE) is not None
        return vocabularies.how_to_read(file) if file is not None and of_text else None
    if (theirs, ours) == (None, None) and source.task["name"] == config.raw["task"]["name"]:
        return None
    if source.trained is not None and source.trained == getattr(here.tokenizer, "fingerprint", None):
        return None
    there = _reader(source)
    if theirs is not None and (why := _replaced(source, there)) is not None:
        return why
    same = vocabularies.same(there, here)
    if same:
        return None
    corpora = source.task.get("corpus"), config.raw["task"].get("corpus")
    if None in (theirs, ours):
        kinds = source.task.get("name", "a text"), config.raw["task"]["name"]
        return f"its ids are there those of {kinds[0]}, here of {kinds[1]}"
    if theirs == ours and theirs.startswith(TRAINED) and corpora[0] != corpora[1]:
        return f"the tokenizer {theirs} is there made from {corpora[0]}, here from {corpora[1]}"
    # Ids whose text nobody knows go with a tokenizer of somebody else, not with one that was made here.
    if same is False or theirs.startswith(TRAINED) or ours.startswith(TRAINED):
        return f"the tokenizer there is {theirs}, here it is {ours}"
    return None


def _reader(source: Source) -> Any:
    """The tokenizer of a source, or else its task, as `vocabularies.same` takes them; None where it is not here any more."""
    try:
        if source.tokenizer is not None and not source.tokenizer.startswith((*TRAINED, "ids:")):
            return tokenizers.alone(source.tokenizer)
        return tasks.create(**source.task)
    except UserError:
        return None


def _replaced(source: Source, there: Any) -> str | None:
    """Why a run's tokenizer is not here any more under its name, where that is known."""
    corpus, now = source.task.get("corpus"), getattr(getattr(there, "tokenizer", there), "fingerprint", None)
    if source.trained is not None:
        same = now in (None, source.trained)
    else:
        same = not source.tokenizer.startswith(TRAINED) or source.data is None or source.data == _data_now(source)
    if same:
        return None
    if source.tokenizer.startswith(TRAINED):
        return (
            f"the tokenizer {source.tokenizer} is there made from what {corpus} was then, and that is another text now"
        )
    return f"the tokenizer {source.tokenizer} is another one now than when the weights there were trained"


def _data_now(source: Source) -> str | None:
    """The fingerprint that the data of a run has today; None where its task cannot be built any more."""
    try:
        return tasks.create(**source.task).fingerprint()
    except UserError:
        return None


def _fitting(value: np.ndarray | jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...]):
    """The value, or the part of it without the padding of its vocabulary, in a shape; None if it does not fit."""
    if value.ndim != len(shape):
        return None
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    for axis, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if have != want and not (axes[axis] == "vocab" and want < have <= (1 + PADDING) * want):
            return None
    return value[tuple(slice(size) for size in shape)]

"""Checkpoints in Hugging Face's format (config.json and safetensors): into our model and back.

    checkpoint = import_hf.load("path/to/mamba-130m-hf")
    logits, _ = checkpoint.model(ids)
    import_hf.save("somewhere/else", checkpoint)

Reading and writing follow the same table of an architecture (`architectures.py`), so a round trip changes no bit.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.errors import UserError
from models.config import ModelConfig
from models.import_hf.architectures import ARCHITECTURES, Architecture, Options, Part
from models.sequence_model import SequenceModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model and what is needed to write it back.

    Attributes:
      model: our model, its parameters in float32.
      config: its configuration.
      hf_config: the content of config.json.
      dtypes: numpy dtype of every tensor in the files.
    """

    model: SequenceModel
    config: ModelConfig
    hf_config: dict[str, Any]
    dtypes: Mapping[str, np.dtype]


def load(directory: str | os.PathLike) -> Checkpoint:
    """Reads a checkpoint directory of one of the `ARCHITECTURES`.

    Args:
      directory: holds config.json and model.safetensors, or the pieces that model.safetensors.index.json lists.

    Raises:
      UserError: for an architecture or an option of it that our model does not have; for tensors that are missing, left
        over or of another shape (named); for files in another format.
      UserError: if a file is not there.
    """
    directory = pathlib.Path(directory)
    hf = json.loads((directory / "config.json").read_text())
    architecture = _architecture(hf, directory)
    config = architecture.config(Options(hf, directory / "config.json"))
    graph, params = nnx.split(nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(params))
    values = {_dotted(path): np.full(leaf.shape, np.nan, np.float32) for path, leaf in flat.items()}
    tied = {"lm_head.weight"} if config.tie_embeddings else set()  # some writers repeat the embedding under this name
    files = _files(directory)
    tensors = dict(architecture.tensors(config))
    _check_names(set(tensors), set(files) - tied, directory)
    dtypes = {}
    for name, parts in tensors.items():
        tensor = _read(files[name], name)
        dtypes[name] = tensor.dtype
        views = [_view(values, part, config) for part in parts]
        pieces = [einops.rearrange(view, part.axes) for view, part in zip(views, parts, strict=True)]
        expected = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        if tensor.shape != expected:
            raise UserError(f"tensor {name!r} in {files[name]} has the shape {tensor.shape}; expected {expected}")
        start = 0
        for view, piece, part in zip(views, pieces, parts, strict=True):
            ours, _, theirs = part.axes.partition(" -> ")
            sizes = dict(zip(ours.split(), view.shape, strict=True))
            content = tensor[start : start + piece.shape[0]].astype(np.float32)
            view[...] = einops.rearrange(content, f"{theirs} -> {ours}", **sizes)
            start += piece.shape[0]
    state = nnx.from_flat_state(
        [(path, leaf.replace(jnp.asarray(values[_dotted(path)]))) for path, leaf in flat.items()]
    )
    return Checkpoint(nnx.merge(graph, state), config, hf, dtypes)


def save(directory: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint as `load` reads it, with the parameters that `checkpoint.model` has now.

    Raises:
      FileExistsError: if the directory exists.
    """
    directory = pathlib.Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists; choose a directory that does not")
    config = checkpoint.config
    values = {_dotted(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(checkpoint.model))}
    tensors = {}
    for name, parts in _architecture(checkpoint.hf_config, directory).tensors(config):
        pieces = [einops.rearrange(_view(values, part, config), part.axes) for part in parts]
        tensors[name] = np.ascontiguousarray(np.concatenate(pieces).astype(checkpoint.dtypes[name]))
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        (temporary / "config.json").write_text(json.dumps(checkpoint.hf_config, indent=2) + "\n")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        temporary.chmod(0o755)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _architecture(hf: Mapping[str, Any], where: pathlib.Path) -> Architecture:
    kind = hf.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{where} holds a model of type {kind!r}; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _view(values: Mapping[str, np.ndarray], part: Part, config: ModelConfig) -> np.ndarray:
    """The slice of a parameter that a part is, not copied."""
    if part.block is None:
        return values[part.path][part.index]
    repeat, place = divmod(part.block, len(config.pattern))
    return values[f"stack.stacked.blocks.{place}.{part.path}"][(repeat, *part.index)]


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of every tensor."""
    if (directory / INDEX).exists():
        names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS]
    files = {}
    for name in names:
        path = directory / name
        if not path.exists():
            others = sorted(p.name for p in directory.glob("*.bin"))
            hint = (
                f"; {', '.join(others)} are pickles, which are not read: convert them to safetensors" if others else ""
            )
            raise UserError(f"{path} is missing{hint}")
        try:
            with safe_open(path, framework="np") as file:
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file or is damaged: {error}") from None
    return files


def _read(path: pathlib.Path, name: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        return file.get_tensor(name)


def _check_names(expected: set[str], found: set[str], directory: pathlib.Path) -> None:
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (("missing", expected - found), ("left over", found - expected))
        if names
    ]
    if problems:
        raise UserError(f"the tensors in {directory} do not fit its config.json; {'; '.join(problems)}")

"""Checkpoints in Hugging Face's format (config.json and safetensors): into our model and back.

    checkpoint = import_hf.load("path/to/mamba-130m-hf")
    logits, _ = checkpoint.model(ids)
    import_hf.save("somewhere/else", checkpoint)
    import_hf.save("a/model/of/ours", import_hf.from_ours(model, config))

Reading and writing follow the same table of an architecture (a file of `families/`), so a round trip changes no bit; but what is
stored in fewer bits is written in bfloat16.
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
from common.files import absolute, read_bytes
from models.checks import whole
from models.config import SECTIONS, ModelConfig
from models.import_hf import mxfp4
from models.import_hf.architecture import Architecture, Options, Part
from models.import_hf.architectures import ARCHITECTURES
from models.params import without_values
from models.sequence_model import SequenceModel
from ops import rotary_scaling

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What travels along with the weights: how text becomes ids and back.
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# What a configuration says of initial values and of training, or of parts that a language model does not have.
WITHOUT_EFFECT = (
    *("model.dropout", "model.remat", "model.length", "model.pooling", "model.expansion"),
    *("model.moe.balance", "model.moe.z_loss", "model.moe.bias_update"),
)
OF_INITIAL_VALUES = ("dt_min", "dt_max", "r_min", "r_max")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model and what is needed to write it back.

    Attributes:
      model: our model, its parameters in float32.
      config: its configuration.
      hf_config: the content of config.json, but for how tensors were stored in fewer bits.
      dtypes: numpy dtype of every tensor in the files; bfloat16 of those in fewer bits.
      names: of tensors in the files, where they are spelled otherwise.
      files: content of the tokenizer's files, by name.
    """

    model: SequenceModel
    config: ModelConfig
    hf_config: dict[str, Any]
    dtypes: Mapping[str, np.dtype]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def load(directory: str | os.PathLike) -> Checkpoint:
    """Reads a checkpoint directory of one of the `ARCHITECTURES`.

    What config.json leaves out is what the library's class has by default. A stored head that is not the embedding is the head,
    whatever config.json says.

    Args:
      directory: holds config.json and model.safetensors, or the pieces that model.safetensors.index.json lists.

    Raises:
      UserError: for an architecture or an option of it that our model does not have, or that nobody reads; for tensors that are
        missing, left over or of another shape (named); for files that are not there or in another format.
    """
    directory = pathlib.Path(absolute(directory))
    hf, architecture, config = _described(directory)
    files = {
        name: file
        for name, file in _files(directory).items()
        if not name.endswith(architecture.buffers) and not name.startswith(architecture.unused)
    }
    config = _with_stored_head(config, architecture, files)
    graph, params = nnx.split(without_values(lambda: SequenceModel(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(params))
    values = {_dotted(path): np.full(leaf.shape, np.nan, np.float32) for path, leaf in flat.items()}
    tensors = dict(architecture.tensors(config))
    repeated = (
        {architecture.head} if config.tie_embeddings else set()
    )  # some writers repeat the embedding under this name
    found = set(files)
    if hf.get("quantization_config"):
        found = mxfp4.joined(found)
        hf = {key: value for key, value in hf.items() if key != "quantization_config"}
    stored = architecture.stored_names(tensors, found)
    _check_names(set(stored.values()), found - repeated, directory)
    dtypes = {}
    for name, parts in tensors.items():
        tensor = _tensor(files, stored[name])
        dtypes[name] = tensor.dtype
        views = [_view(values, part, config) for part in parts]
        pieces = [einops.rearrange(view, part.axes) for view, part in zip(views, parts, strict=True)]
        expected = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        if tensor.shape != expected:
            where = files.get(stored[name], directory)
            raise UserError(f"tensor {stored[name]!r} in {where} has the shape {tensor.shape}; expected {expected}")
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
    others = {name: (directory / name).read_bytes() for name in TOKENIZER if (directory / name).is_file()}
    spelled = {name: other for name, other in stored.items() if other != name}
    return Checkpoint(nnx.merge(graph, state), config, hf, dtypes, spelled, others)


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """The configuration of a checkpoint, as `load` gives it; no weights are read but those of a head that may be tied.

    Raises:
      UserError: as `load`.
    """
    directory = pathlib.Path(absolute(directory))
    _, architecture, config = _described(directory)
    return _with_stored_head(config, architecture, _files(directory))


def from_ours(model: SequenceModel, config: ModelConfig, files: Mapping[str, bytes] | None = None) -> Checkpoint:
    """A checkpoint of a model of ours, to be written by `save`, if the library has its architecture.

    Args:
      model: the model.
      config: its configuration.
      files: content of the tokenizer's files, by name.

    Returns:
      the checkpoint; its tensors are float32.

    Raises:
      UserError: if the library has no such architecture; the message says what differs from the nearest.
    """
    if config.vocab_size is None or config.head != "token" or config.loss is not None:
        what = "whose inputs are real numbers" if config.vocab_size is None else "that gives no scores of tokens"
        raise UserError(f"transformers' architectures that we know are language models, and this is a model {what}")
    mixers = frozenset(config.names)
    fits = lambda architecture: (
        mixers == architecture.mixers or (mixers < architecture.mixers and not architecture.all_mixers)
    )
    candidates = {kind: architecture for kind, architecture in ARCHITECTURES.items() if fits(architecture)}
    if not candidates:
        known = "; ".join(f"{kind}: {' and '.join(sorted(a.mixers))}" for kind, a in ARCHITECTURES.items())
        raise UserError(
            f"transformers has no model of the mixers {', '.join(sorted(mixers))} that we know; it has {known}"
        )
    used, found, refused = config.as_used(), {}, []
    # What has other mixers besides comes last: a Llama is a Granite 4 without Mamba-2, too.
    for kind, architecture in sorted(candidates.items(), key=lambda candidate: len(candidate[1].mixers)):
        hf = {
            "model_type": kind,
            "architectures": [architecture.name],
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "tie_word_embeddings": config.tie_embeddings and architecture.ties,
            "torch_dtype": "float32",
            **architecture.options(used),
        }
        try:
            theirs = architecture.config(Options(hf, pathlib.Path("config.json"), architecture)).as_used()
            if not architecture.ties:  # then its head is written as a copy of the embedding
                theirs = dataclasses.replace(theirs, tie_embeddings=used.tie_embeddings)
        except UserError as error:  # without the mixers that the model lacks, it is none of this architecture's
            refused.append(f"{kind}: {error}")
            continue
        found[kind] = _differences(used, theirs)
        if not found[kind]:
            names = [name for name, _ in architecture.tensors(used)]
            return Checkpoint(model, used, hf, dict.fromkeys(names, np.dtype(np.float32)), files=files or {})
    if not found:
        raise UserError(f"transformers has no such model: {'; '.join(refused)}")
    kind = min(found, key=lambda kind: len(found[kind]))
    raise UserError(f"transformers' {kind} is another model: {'; '.join(found[kind])}")


def save(directory: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint as `load` reads it, with the parameters that `checkpoint.model` has now.

    Raises:
      UserError: if the directory exists.
    """
    directory = pathlib.Path(directory)
    if directory.exists():
        raise UserError(f"{directory} exists; choose a directory that does not")
    config, architecture = checkpoint.config, _architecture(checkpoint.hf_config, directory)
    values = {_dotted(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(checkpoint.model))}
    tensors = {}
    for name, parts in architecture.tensors(config):
        pieces = [einops.rearrange(_view(values, part, config), part.axes) for part in parts]
        tensors[checkpoint.names.get(name, name)] = np.ascontiguousarray(
            np.concatenate(pieces).astype(checkpoint.dtypes[name])
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        (temporary / "config.json").write_text(json.dumps(checkpoint.hf_config, indent=2) + "\n")
        for name, content in checkpoint.files.items():
            (temporary / name).write_bytes(content)
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


def _described(directory: pathlib.Path) -> tuple[dict[str, Any], Architecture, ModelConfig]:
    """What config.json says: its content, the architecture, and our configuration."""
    path = directory / "config.json"
    hf = _object(path)
    if all(isinstance(hf.get(section), dict) for section in ("task", "model", "train")):
        raise UserError(
            f"{directory} is no checkpoint in Hugging Face's format but a run: train.py takes it as --init_from={directory}, "
            f"without hf:, and eval.py as --workdir={directory}"
        )
    architecture = _architecture(hf, directory)
    return hf, architecture, architecture.config(Options(hf, path, architecture))


def _object(path: pathlib.Path) -> dict[str, Any]:
    """The object that a file of JSON holds."""
    content = read_bytes(path)
    try:
        found = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object but {str(found)[:40]!r}")
    return found


def _with_stored_head(
    config: ModelConfig, architecture: Architecture, files: Mapping[str, pathlib.Path]
) -> ModelConfig:
    """The configuration, untied where the files hold a head that is not the embedding."""
    embedding = next(name for name, parts in architecture.tensors(config) if parts[0].path == "embedding")
    if not config.tie_embeddings or architecture.head not in files or embedding not in files:
        return config
    head, table = (_read(files[name], name) for name in (architecture.head, embedding))
    same = head.shape == table.shape and head.dtype == table.dtype and head.tobytes() == table.tobytes()
    return config if same else dataclasses.replace(config, tie_embeddings=False)


def _differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """What a configuration has otherwise than another, by name."""
    ours, theirs = _flat(ours), _flat(theirs)
    return [
        f"{key}={ours.get(key)!r} where it has {theirs.get(key)!r}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]


def _flat(config: ModelConfig) -> dict[str, Any]:
    """What has an effect, by key, with sizes in channels."""
    one = lambda found: found[0] if len(set(found)) == 1 else found
    blocks = {
        "pattern": tuple("|".join(item.mixers) for item in config.items),
        "channel_mixer": one(tuple(config.channel_mixer_of(item) for item in config.items)),
        "norm_position": one(tuple(item.norm_position or config.norm_position for item in config.items)),
    }
    options = dataclasses.asdict(config) | blocks
    sections = {f"{name}.{key}": value for name in SECTIONS for key, value in options[name].items()}
    flat = {
        f"model.{key}": value
        for key, value in (options | sections).items()
        if key not in ("mixer", "prefix", "suffix", *SECTIONS)
    }
    for name, options in config.mixer.items():
        for key, value in options.items():
            if key in ("expand", "expand_key", "expand_value", "expansion"):
                value = whole(value * config.width)
            if key == "rotary_scaling":
                value = rotary_scaling.complete(value)
            if key not in OF_INITIAL_VALUES:
                flat[f"model.mixer.{name}.{key}"] = value
    return {key: value for key, value in flat.items() if key not in WITHOUT_EFFECT}


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _view(values: Mapping[str, np.ndarray], part: Part, config: ModelConfig) -> np.ndarray:
    """The slice of a parameter that a part is, not copied."""
    if part.block is None:
        return values[part.path][part.index]
    block, index = config.place(part.block)
    return values[f"stack.{block}.{part.path}"][(*index, *part.index)]


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of every tensor that holds something. One file for all comes before pieces, as in the library."""
    if (directory / INDEX).exists() and not (directory / WEIGHTS).exists():
        pieces = _object(directory / INDEX).get("weight_map")
        if not isinstance(pieces, dict) or not all(isinstance(name, str) for name in pieces.values()):
            raise UserError(f"{directory / INDEX} has no 'weight_map', the file of each tensor: it is damaged")
        names = sorted(set(pieces.values()))
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
                files |= {name: path for name in file.keys() if 0 not in file.get_slice(name).get_shape()}
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file or is damaged: {error}") from None
    return files


def _read(path: pathlib.Path, name: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        try:
            return file.get_tensor(name)
        except (AttributeError, TypeError):  # NumPy has no such type
            kind = file.get_slice(name).get_dtype()
            raise UserError(
                f"tensor {name!r} in {path} is of type {kind}, which is not read: convert it to bfloat16"
            ) from None


def _tensor(files: Mapping[str, pathlib.Path], name: str) -> np.ndarray:
    """A tensor, which may be stored in two parts."""
    if name in files:
        return _read(files[name], name)
    parts = (f"{name}_{part}" for part in mxfp4.PARTS)
    return mxfp4.dequantised(*(_read(files[part], part) for part in parts), name)


def _check_names(expected: set[str], found: set[str], directory: pathlib.Path) -> None:
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (("missing", expected - found), ("left over", found - expected))
        if names
    ]
    if problems:
        raise UserError(f"the tensors in {directory} do not fit its config.json; {'; '.join(problems)}")

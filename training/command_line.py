"""The command line of a configuration: `--config=FILE[:ARGUMENT] --config.KEY=VALUE ...`, and how a configuration is shown."""

import inspect
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from common import signatures
from common.errors import UserError, near, nearest
from common.files import absolute
from common.plugins import program
from data import task as tasks
from models import config as models
from models import mixer as mixers
from models.config import ModelConfig
from models.pattern import expand, mixers_of
from training.config import FROM_TASK, LEFT_TO_TASK, SECTIONS, Config, Expect, TrainConfig, flatten, locate
from training.initial import Source
from training.optimizer import OptimizerConfig

ROOT = Path(__file__).parent.parent

MESH = {
    "data": "ways that the rows of a batch are split; -1 takes the devices that are left",
    "fsdp": "ways that rows and parameters are split",
    "tensor": "ways that heads and hidden units are split",
    "sequence": "ways that the length is split",
    "expert": "ways that rows and the experts of a mixture are split",
}


# Keys that name blocks beside those of the file's argument.
AROUND = ("model.prefix", "model.suffix")
# Of the model section, what the task and the training decide, also where weights come from elsewhere.
OF_THE_FILE = (*LEFT_TO_TASK, "loss", "pooling", "dropout", "remat")


def parse(arguments: Sequence[str], source: Source | None = None) -> ConfigDict:
    """The configuration that a command line asks for.

    Args:
      arguments: `--config=FILE[:ARGUMENT]`, and `--config.KEY=VALUE` or `--config.KEY VALUE` for any key, in any order; of a
        key that is given twice the last value counts. A file that is not below the current directory is looked for beside this
        program. An optional key takes None.
      source: where the weights come from: its model (and tokenizer) stand in place of the file's, and keys that are set on the
        command line in place of the source's.

    Raises:
      UserError: for a file that is not there, a key that the configuration does not have, with the near ones, a value of another
        type, and arguments that are left over; what the file itself refuses; and an argument of the file that chooses
        another model than the source's.
    """
    file, settings = _split(arguments)
    settings = list({setting[0]: setting for setting in settings}.values())
    config = _load(file)
    where = file
    if source is not None:
        _begin_from(source, config, file, {key for key, _, _ in settings})
        where = f"{file} with the model of {source.address}"
    _add_mixers(config, {key: value for key, value, _ in settings if key in AROUND})
    rest = []
    for key, value, argument in settings:
        _check_key(config, key, file, where)
        if value == "None":
            _set_none(config, key)
        else:
            rest += argument
    values = flags.FlagValues()
    line = ["train.py", *rest]
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
    try:
        left = values(line)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_explained(config, settings, error)) from error
    if left:
        raise UserError(f"{' '.join(left)!r} belongs to no option; a value with spaces needs quotes")
    if source is not None and locate(holder.value.train.init_from) != source.address:
        given = holder.value.train.init_from
        raise UserError(
            f"--init_from={source.address} and --config.train.init_from={given} say where the weights come from: leave one of "
            "them out (--config.train.init_from alone takes weights into the model that is configured)"
        )
    return holder.value


def _add_mixers(config: ConfigDict, given: Mapping[str, str | None]) -> None:
    """Gives the mixers that only the given prefix and suffix name their hyperparameters, which can then be set, too."""
    parser = tuple_parser.TupleParser()
    with config.unlocked():
        for key, value in given.items():
            for name in mixers_of(expand(map(str, parser.parse(value or "()")), key)):
                if name not in config.model.mixer:
                    config.model.mixer[name] = mixers.defaults(name)


def _begin_from(source: Source, config: ConfigDict, file: str, given: Collection[str]) -> None:
    """Puts the model of a source, and the tokenizer of its text, into the configuration of FILE[:ARGUMENT], before the given keys
    are set."""
    section = signatures.defaults(ModelConfig, FROM_TASK)
    for key, value in source.model.items():
        if key not in section:
            raise UserError(f"{source.address} has model.{key}, which nobody reads")
        if value is not None and key not in ("mixer", "pattern", "prefix", "suffix"):
            section[key] = value
    for key in OF_THE_FILE:
        section[key] = config.model.get_ref(key)
    if source.model.get("tie_embeddings") is False:
        section.tie_embeddings = False
    for key in ("pattern", "prefix", "suffix"):
        section[key] = tuple(source.model.get(key, ()))
    names = mixers_of(section.pattern + section.prefix + section.suffix)
    section.mixer = ConfigDict({name: mixers.defaults(name) for name in names})
    with section.mixer.ignore_type():
        for name, options in source.model["mixer"].items():
            section.mixer[name].update({key: value for key, value in options.items() if value is not None})
    if not source.earlier:
        _check_argument(file, config.model, section, source.address, given)
    with config.unlocked():
        config.model = section
        config.train.init_from = source.address
        if source.tokenizer is not None and "tokenizer" in config.task:
            config.task.tokenizer = source.tokenizer
    config.lock()


def _check_argument(file: str, chosen: ConfigDict, taken: ConfigDict, address: str, given: Collection[str]) -> None:
    """Raises a UserError if the argument of a file chooses something of the model that is not so in the model that is taken.

    Args:
      file: FILE[:ARGUMENT].
      chosen: its model section.
      taken: the model section that stands in its place.
      address: where that comes from.
      given: keys of the command line, which come after both.
    """
    path, _, argument = file.partition(":")
    of_task = ",".join(item for item in argument.split(",") if item.startswith("task="))  # brings a model along
    if of_task == argument:
        return
    try:
        standard = _load(f"{path}:{of_task}").model
    except (LookupError, TypeError, ValueError):
        return  # a file that cannot do without its argument: what that chooses is not known
    chosen, standard, taken = (flatten(section.to_dict()) for section in (chosen, standard, taken))
    other = {
        key: value
        for key, value in chosen.items()
        # The hyperparameters of a mixer that only the argument names are its defaults.
        if key.partition(".")[0] not in OF_THE_FILE
        and f"model.{key}" not in given
        and value not in (None, standard.get(key, value), taken.get(key))
    }
    if other:
        first = sorted(other, key=lambda key: key != "pattern")[:4]
        told = "; ".join(f"model.{k}={_literal(other[k])}, there {_literal(taken.get(k, 'absent'))}" for k in first)
        raise UserError(
            f"--config={file} chooses another model than that of {address}, which --init_from takes ({told}): leave this out of "
            f"the file's argument, or give --config.train.init_from={address} in place of --init_from, which takes the weights "
            "and leaves the model as it is configured"
        )


def _split(arguments: Sequence[str]) -> tuple[str, list[tuple[str, str | None, list[str]]]]:
    """The file, and for each setting its key, its value (None for --config.flag alone) and its arguments."""
    source, settings, waiting = None, [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, separator, value = argument.partition("=")
        stripped = name.lstrip("-")
        if stripped == "config" and name.startswith("-"):
            source = value if separator else (waiting.pop(0) if waiting else None)
        elif name.startswith("-") and stripped.removeprefix("no").startswith("config."):
            given = [argument]
            if not separator and waiting and not waiting[0].startswith("--"):
                given, value, separator = [f"{argument}={waiting[0]}"], waiting.pop(0), "="
            settings.append((stripped.removeprefix("no").removeprefix("config."), value if separator else None, given))
        else:
            raise UserError(f"{argument!r} belongs to no option; a value with spaces needs quotes")
    if source is None:
        raise UserError("--config=FILE is missing")
    return source, settings


def _load(source: str) -> ConfigDict:
    """The configuration of FILE[:ARGUMENT]."""
    file, _, argument = source.partition(":")
    path = next((p for p in (Path(absolute(file)), ROOT / file) if p.is_file()), None)
    if path is None:
        known = [
            str(p.relative_to(ROOT))
            for p in sorted((ROOT / "configs").rglob("*.py"))
            if "def get_config" in p.read_text()
        ]
        raise UserError(f"there is no configuration file {file!r}; {near(file, known)}")
    config = program(path, "get_config", f"--config={file} is no configuration file")(argument)
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} returns {type(config).__name__}; it must return a ConfigDict")
    config.lock()
    return config


WITH_THE_FILE = ("model.pattern", "task.name")


def _check_key(config: ConfigDict, key: str, file: str, where: str) -> None:
    """Raises a UserError for a key that the configuration does not have, or that is chosen elsewhere; `where` names it."""
    if key in WITH_THE_FILE:
        what = "mixer" if key == "model.pattern" else "task"
        raise UserError(
            f"config.{key} is chosen with the file's argument, which brings the hyperparameters along: "
            f"--config={file.partition(':')[0]}:{what}=..."
        )
    known = flatten(config.to_dict())
    sections = {name[:i] for name in known for i in range(len(name)) if name[i] == "."}
    if key in known:
        return
    if key in sections:
        raise UserError(
            f"config.{key} is a section: set one of its keys, such as config.{next(k for k in known if k.startswith(f'{key}.'))}"
        )
    # The key is right up to `parent`, and `wrong` is not below it.
    parts = key.split(".")
    depth = next(i for i in range(len(parts)) if ".".join(parts[: i + 1]) not in sections)
    parent, wrong = ".".join([*parts[:depth], ""]), parts[depth]
    below = sorted({name.removeprefix(parent).partition(".")[0] for name in known if name.startswith(parent)})
    spelt_alike = [parent + name for name in nearest(wrong, below)]
    spelt_alike = [".".join([name, *parts[depth + 1 :]]) for name in spelt_alike] + spelt_alike
    spelt_alike = [name for name in spelt_alike if name in known] or spelt_alike
    elsewhere = [name for name in known if name.rpartition(".")[2] == parts[-1]]
    misspelt_elsewhere = [name for name in known if name.rpartition(".")[2] in nearest(parts[-1], _leaves(known))]
    if wrong == parts[-1]:
        found = elsewhere or spelt_alike or misspelt_elsewhere
    else:
        found = spelt_alike or elsewhere or misspelt_elsewhere
    if found:
        hint = f"did you mean {' or '.join(f'config.{name}' for name in dict.fromkeys(found[:3]))}?"
    else:
        hint = f"{f'config.{parent}'.rstrip('.')} has {', '.join(below)}"
    raise UserError(f"{where} has no key config.{key}; {hint}")


def _leaves(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".")[2] for key in keys))


def _set_none(config: ConfigDict, key: str) -> None:
    """Sets an optional key to None. Raises a UserError for one that is not optional."""
    annotation = _annotations(config).get(key)
    left_to_task = key in [f"model.{name}" for name in LEFT_TO_TASK]
    if not (left_to_task or signatures.is_optional(annotation)):
        kind = getattr(annotation, "__name__", annotation)
        raise UserError(f"config.{key} takes {kind}, and not None")
    parent, _, leaf = key.rpartition(".")
    section = config
    for part in filter(None, parent.split(".")):
        section = section[part]
    with config.ignore_type():
        section[leaf] = None


def _annotations(config: ConfigDict) -> dict[str, Any]:
    """The annotated type of each key that a dataclass or a constructor reads."""
    return {key: parameter.annotation for key, (_, parameter, _) in _readers(config).items()}


def _readers(config: ConfigDict) -> dict[str, tuple[Any, inspect.Parameter, str]]:
    """By key who reads it, the parameter that takes it, and the docstring's heading that describes it."""
    readers = {"model": ModelConfig, "optimizer": OptimizerConfig, "train": TrainConfig, "expect": Expect}
    places = [(name, cls, inspect.signature(cls), "Attributes") for name, cls in readers.items() if name in config]
    task = tasks.find(config.task.name)
    places.append(("task", task, inspect.signature(task), "Args"))
    for name, (_, cls) in models.SECTIONS.items():
        places.append((f"model.{name}", cls, inspect.signature(cls.__init__), "Args"))
    for name in config.model.get("mixer", {}):
        mixer = mixers.find(name)
        places.append((f"model.mixer.{name}", mixer, inspect.signature(mixer.__init__), "Args"))
    return {
        f"{where}.{key}": (cls, parameter, heading)
        for where, cls, signature, heading in places
        for key, parameter in signature.parameters.items()
    }


def _explained(config: ConfigDict, settings: Sequence[tuple[str, str | None, list[str]]], error: Exception) -> str:
    """What is wrong with a value, by its key."""
    for key, value, _ in settings:
        if value is not None and f"config.{key}={value}:" in str(error):
            annotation = _annotations(config).get(key)
            if signatures.is_optional(annotation):
                annotation = signatures.optional_type(key, annotation)
            kind = annotation or type(flatten(config.to_dict()).get(key))
            return f"config.{key} takes {getattr(kind, '__name__', kind)}, got {value!r}"
    return str(error).splitlines()[0]


def show(config: Config) -> str:
    """The resolved configuration: a flag for each key, with a comment that says what it is."""
    comments = {f"mesh.{axis}": text for axis, text in MESH.items()}
    comments["seed"], comments["task.name"] = SECTIONS["seed"], "the task, a file of data/tasks/"
    for key, (cls, _, heading) in _readers(ConfigDict(config.raw)).items():
        comments[key] = signatures.descriptions(cls, heading).get(key.rpartition(".")[2], "")
    lines, section = [], None
    flat = flatten(config.raw)
    for key in sorted(
        flat, key=lambda key: list(SECTIONS).index(key.partition(".")[0]) if key.partition(".")[0] in SECTIONS else 9
    ):
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines += ["", f"# {section}: {SECTIONS.get(section, 'the published number that is to be found again')}"]
        comment = comments.get(key) or comments.get(key.rpartition(".")[0], "")
        line = f"--config.{key}={_literal(flat[key])}" + (f"  # {comment}" if comment else "")
        lines.append(f"# {line}" if key in (*WITH_THE_FILE, "optimizer.group_scale.fixed") else line)  # no flags
    return "\n".join(lines[1:])


def _literal(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value)
    return str(value)

"""Which tasks a checkpoint is asked, and under which settings: lists of values make a grid."""

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from common import signatures
from common.errors import UserError, check_choice, near
from data import task as tasks
from data import vocabularies
from evaluation import suite
from evaluation.loading import LoadedRun

# Where a model's texts lie and how they are cut, which other tasks of texts take over from its own.
TEXTS = ("corpus", "tokenizer", "cache_dir", "data_dir", "download")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task and its hyperparameters.

    Attributes:
      task: its name.
      options: all hyperparameters that are not left at their defaults.
      named: those of them that were asked for, which tell the settings of a grid apart.
    """

    task: str
    options: Mapping[str, Any]
    named: Mapping[str, Any]


def check(task: str, values: Sequence[str], chosen: str, own: str | None) -> None:
    """Raises a UserError for what `asked` would refuse, as far as that can be told without the checkpoint.

    Args:
      task, values, chosen: as of `asked`.
      own: the name of the checkpoint's own task; None where it has none, and empty where it is not known.
    """
    if chosen:
        check_choice("--suite", chosen, suite.names())
        if task or values:
            raise UserError("--suite says its tasks and settings itself: leave --task and --set out")
    elif task:
        parse(values, [tasks.full(name) for name in task.split(",")])
    elif own is None:
        raise UserError("a checkpoint in Hugging Face's format has no task of its own: give --task or --suite")
    elif values and own:
        parse(values, [own])


def asked(run: LoadedRun, task: str, values: Sequence[str], chosen: str, lengths: Sequence[int]) -> list[Setting]:
    """The settings that a command line asks for.

    Args:
      run: the run and its checkpoint.
      task: names of tasks with commas between; empty for the run's own.
      values: see `parse`.
      chosen: the name of a suite, or empty.
      lengths: in place of what else is said of the lengths.

    Returns:
      the settings; none where only the run's own task is asked, as it is.
    """
    if chosen:
        grids = list(suite.find(chosen).tasks)
    elif task or values:
        names = [tasks.full(name) for name in task.split(",")] if task else [run.config.raw["task"]["name"]]
        grids = list(parse(values, names).items())
    else:
        return []
    if lengths:
        grids = [(name, {**keys, "length": lengths}) for name, keys in grids]
    return [setting for name, keys in grids for setting in grid(run, name, keys)]


def parse(asked: Sequence[str], names: Sequence[str], option: str = "--set") -> dict[str, dict[str, list[Any]]]:
    """What `--set` asks of each task.

    Args:
      asked: `task.KEY=VALUE,VALUE,...` for all tasks that are asked, or `NAME.KEY=...` for one of them, which goes before.
      names: of the tasks.
      option: that asks, for messages.

    Returns:
      by task and key the values, of the key's type.

    Raises:
      UserError: for what is none of this or is said twice, an unknown task or key, or a value of another type.
    """
    for name in names:
        tasks.find(name)
    found: dict[str, dict[str, list[Any]]] = {name: {} for name in names}
    places = [item.partition("=")[0] for item in asked]
    if twice := [place for place in places if places.count(place) > 1]:
        raise UserError(f"{option} {twice[0]} is given twice: write its values once, with commas between")
    for item in sorted(asked, key=lambda item: not item.startswith("task.")):
        place, separator, text = item.partition("=")
        owner, dot, key = place.partition(".")
        if not (separator and dot and key):
            raise UserError(f"{option} takes task.KEY=VALUE or task.KEY=VALUE,VALUE, got {item!r}")
        if owner != "task" and owner not in names:
            raise UserError(f"{option} {item}: {owner!r} is not asked; {near(owner, ['task', *names])}")
        for name in names if owner == "task" else [owner]:
            annotations = {k: p.annotation for k, p in inspect.signature(tasks.find(name)).parameters.items()}
            if key not in annotations:
                raise UserError(f"task {name!r} has no hyperparameter {key!r}; {near(key, annotations)}")
            values = [_value(f"{option} {place}", part.strip(), annotations[key]) for part in text.split(",")]
            found[name][key] = list(dict.fromkeys(values))
    return found


def _value(place: str, text: str, annotation: Any) -> Any:
    if signatures.is_optional(annotation):
        if text == "None":
            return None
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    kind = getattr(annotation, "__supertype__", annotation)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float) or (kind is str and text):
            return kind(text)
    except (ValueError, KeyError):
        pass
    raise UserError(f"{place} takes {getattr(kind, '__name__', kind)}, got {text!r}")


def grid(run: LoadedRun, name: str, asked: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """The settings of a task that values for some of its keys make, the last key the fastest.

    The run's own task keeps the hyperparameters that it was trained with. Another one has its defaults, but for the texts, which
    are those of the run where both have them.

    Args:
      run: the run and its checkpoint.
      name: of the task.
      asked: by key its values.
    """
    known = tasks.defaults(name)
    own = {} if run.config.task is None else dict(run.config.raw["task"])
    if own.pop("name", None) != name:
        own = {key: own[key] for key in TEXTS if key in own and key in known}
        if run.tokenizer is not None and "tokenizer" in known:
            own["tokenizer"] = vocabularies.of_checkpoint(run.workdir)
    return combinations(name, own, asked)


def combinations(name: str, options: Mapping[str, Any], asked: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """The settings of a task that values for some of its keys make, the last key the fastest, beside its other options."""
    found = []
    for values in itertools.product(*asked.values()):
        named = dict(zip(asked, values))
        base = tasks.find(name).at_length(options, named["length"]) if "length" in named else dict(options)
        found.append(Setting(name, base | named, named))
    return found


def check_some(asked: Sequence[str], sections: Sequence[Mapping[str, Any]], option: str) -> None:
    """Raises a UserError for a setting that none of several tasks takes, and for what `parse` refuses.

    Args:
      asked: as `parse` takes it.
      sections: "name" and hyperparameters of each task.
      option: that asks.
    """
    taken, refused, unknown = set(), {}, False
    for section in sections:
        name, own = section["name"], {key: value for key, value in section.items() if key != "name"}
        keys = parse(asked, [name], option)[name]
        try:
            tasks.outline(name, **own)
        except UserError:
            unknown = True  # only its data say what it is
        for values in itertools.product(*keys.values()) if keys else ():
            named = dict(zip(keys, values))
            try:
                (whole,) = combinations(name, own, {key: [value] for key, value in named.items()})
                tasks.outline(name, **whole.options)
            except UserError as error:
                refused.setdefault(str(named), error)
            else:
                taken.add(str(named))
    for named, error in refused.items():
        if named not in taken and not unknown:
            raise UserError(f"{option} {named}: {error}")

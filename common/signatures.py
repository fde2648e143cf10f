"""Options read from the signature and the docstring of what takes them, so that a default and its description stand once."""

import dataclasses
import inspect
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from common.errors import UserError


def defaults(function: Callable, omit: Iterable[str] = ()) -> config_dict.ConfigDict:
    """The keywords of a function (or a class) and their defaults; for None a placeholder of the annotated type.

    Args:
      function: what is called with the options.
      omit: keywords that are no options.

    Raises:
      TypeError: if an option has no default, or None without an annotation `type | None`.
    """
    config = config_dict.ConfigDict()
    fields = dataclasses.fields(function) if dataclasses.is_dataclass(function) else ()
    factories = {f.name: f.default_factory for f in fields if f.default_factory is not dataclasses.MISSING}
    for key, parameter in inspect.signature(function).parameters.items():
        if key in omit:
            continue
        value = factories[key]() if key in factories else parameter.default
        if value is inspect.Parameter.empty:
            raise TypeError(f"option {key!r} of {function.__qualname__} needs a default")
        config[key] = config_dict.placeholder(optional_type(key, parameter.annotation)) if value is None else value
    return config


def optional_type(key: str, annotation) -> type:
    """The type of an option that may be None. Raises a TypeError where the annotation is not `type | None`."""
    if not is_optional(annotation):
        raise TypeError(f"option {key!r}, whose default is None, is annotated `type | None`, got {annotation}")
    (kind,) = (a for a in typing.get_args(annotation) if a is not type(None))
    return getattr(kind, "__supertype__", kind)  # of a `common.files.Folder`, str


def check(function: Callable, options: Mapping[str, Any], name: Callable[[str], str] = str) -> None:
    """Checks the types of options: what a file or a program gives has been seen by no command line.

    A tuple may be a list, as JSON has it, and a number with a fraction may be a whole one; True is no number.

    Args:
      function: what is called with the options. One whose annotation is not of bool, int, float, str, None, tuples, mappings and
        unions of these may be anything.
      options: values by key; what `function` does not take is left out.
      name: how the message calls a key.

    Raises:
      UserError: for a value of another type, and for a number that is not finite.
    """
    parameters = inspect.signature(function).parameters
    for key, value in options.items():
        if key in parameters and not _fits(value, annotation := parameters[key].annotation):
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name(key)} must be a finite number, got {value}")
            raise UserError(f"{name(key)} takes {kind(annotation)}, got {value!r}")


def kind(annotation: Any) -> str:
    """A type in words: "int", "float or None"."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(kind, typing.get_args(annotation)))
    if annotation is types.NoneType:
        return "None"
    if typing.get_origin(annotation) is not None:
        return str(annotation).removeprefix("collections.abc.").replace("typing.", "")
    return getattr(getattr(annotation, "__supertype__", annotation), "__name__", str(annotation))


def _fits(value: Any, annotation: Any) -> bool:
    annotation = getattr(annotation, "__supertype__", annotation)
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        each = inner[0] if len(inner) == 2 and inner[1] is Ellipsis else Any
        return isinstance(value, tuple | list) and all(_fits(item, each) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, inner[1]) for item in value.values())
    if annotation is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, annotation) if annotation in (bool, str, types.NoneType) else True


def is_optional(annotation) -> bool:
    """Whether an annotation is `type | None`."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return union and type(None) in typing.get_args(annotation) and len(typing.get_args(annotation)) == 2


def descriptions(thing: Any, heading: str) -> dict[str, str]:
    """What the docstring of a class or function says of each name under a heading ("Args", "Attributes"), each in one line.

    What a class does not say of a name, its bases say.
    """
    found, names, margin = {}, [], None
    for base in reversed(thing.__bases__) if inspect.isclass(thing) else ():
        found |= descriptions(base, heading)
    lines = (inspect.getdoc(thing) or "").splitlines()
    if f"{heading}:" not in lines:
        return found
    for line in lines[lines.index(f"{heading}:") + 1 :]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            break
        margin = indent if margin is None else margin
        begins = re.match(r"\s*([\w, ]+?): (.*)", line) if indent == margin else None
        if begins:
            names = [name.strip() for name in begins[1].split(",")]
            found |= dict.fromkeys(names, begins[2].strip())
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found

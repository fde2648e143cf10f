"""Options read from the signature and the docstring of what takes them, so that a default and its description stand once."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import config_dict


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

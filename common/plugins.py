"""Plugins: one class in one file of a folder, chosen by the file's name; its constructor's keywords are its hyperparameters.

There is no list of plugins: the folder is looked into. Mixers and tasks are plugins.
"""

import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterable

from ml_collections import config_dict

from common.errors import UserError, near


class Plugins:
    """The plugins of a folder.

    Args:
      kind: what they are, in messages.
      package: that holds their files, such as "models.mixers".
      base: each file defines one subclass of it.
      surroundings: arguments of constructors that are no hyperparameters.
    """

    def __init__(self, kind: str, package: str, base: type, surroundings: Iterable[str] = ()):
        self.kind = kind
        self.package = package
        self.base = base
        self.surroundings = ("self", *surroundings)
        self.find = functools.cache(self._find)

    def names(self) -> list[str]:
        """The names of all: those of the files."""
        return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__))

    def _find(self, name: str) -> type:
        """The class of a plugin.

        Raises:
          UserError: if there is none of that name; the message has the near ones.
          TypeError: if its file does not define one subclass of the base.
        """
        if name not in self.names():
            raise UserError(f"there is no {self.kind} {name!r}; {near(name, self.names())}")
        module = importlib.import_module(f"{self.package}.{name}")
        classes = (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__)
        found = [c for c in classes if issubclass(c, self.base)]
        if len(found) != 1:
            file = f"{self.package.replace('.', '/')}/{name}.py"
            raise TypeError(f"{file} must define one subclass of {self.base.__name__}, it defines {len(found)}")
        return found[0]

    def defaults(self, name: str) -> config_dict.ConfigDict:
        """The hyperparameters of a plugin and their defaults, read from its constructor's signature.

        Raises:
          TypeError: if a hyperparameter has no default, or None without an annotation `type | None`.
        """
        config = config_dict.ConfigDict()
        for key, parameter in inspect.signature(self.find(name).__init__).parameters.items():
            if key in self.surroundings:
                continue
            if parameter.default is inspect.Parameter.empty:
                raise TypeError(f"hyperparameter {key!r} of {self.kind} {name!r} needs a default")
            if parameter.default is None:
                config[key] = config_dict.placeholder(_optional_type(key, parameter.annotation))
            else:
                config[key] = parameter.default
        return config

    def check(self, name: str, hyperparameters: Iterable[str]) -> None:
        """Raises a UserError, with the near names, for a hyperparameter that a plugin does not have."""
        known = list(self.defaults(name))
        for key in hyperparameters:
            if key not in known:
                raise UserError(f"{self.kind} {name!r} has no hyperparameter {key!r}; {near(key, known)}")


def _optional_type(key: str, annotation) -> type:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        raise TypeError(f"hyperparameter {key!r}, whose default is None, is annotated `type | None`, got {annotation}")
    (kind,) = (a for a in typing.get_args(annotation) if a is not type(None))
    return kind

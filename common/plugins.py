"""Plugins: one class in one file of a folder, chosen by the file's name; its constructor's keywords are its hyperparameters.

There is no list of plugins: the folder is looked into. Mixers and tasks are plugins.
"""

import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from common import signatures
from common.errors import UserError, near
from common.files import Folder, absolute


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
        return signatures.defaults(self.find(name).__init__, self.surroundings)

    def check(self, name: str, hyperparameters: Iterable[str]) -> None:
        """Raises a UserError, with the near names, for a hyperparameter that a plugin does not have."""
        known = list(self.defaults(name))
        for key in hyperparameters:
            if key not in known:
                raise UserError(f"{self.kind} {name!r} has no hyperparameter {key!r}; {near(key, known)}")

    def complete(self, name: str, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters of a plugin: those given, the others with their defaults, and folders as absolute paths.

        Raises:
          UserError: with the near names, for a hyperparameter that it does not have.
        """
        self.check(name, hyperparameters)
        result = {}
        for key, parameter in inspect.signature(self.find(name).__init__).parameters.items():
            if key in self.surroundings:
                continue
            value = hyperparameters.get(key, parameter.default)
            kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
            result[key] = absolute(value) if value is not None and Folder in kinds else value
        return result

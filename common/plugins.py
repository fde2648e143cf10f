"""Plugins: one class in one file of a folder, chosen by the file's name; its constructor's keywords are its hyperparameters.

There is no list of plugins: the folder is looked into. Mixers and tasks are plugins. A name of a task that ends with .py is the
path of a file of the user's.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import sys
import types
import typing
import zlib
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
      root: the folder of the program where the user's own files are plugins, too: their paths are looked for from the current
        directory, then from there. None where they are not.
    """

    def __init__(
        self, kind: str, package: str, base: type, surroundings: Iterable[str] = (), root: pathlib.Path | None = None
    ):
        self.kind = kind
        self.package = package
        self.base = base
        self.surroundings = ("self", *surroundings)
        self.root = root
        self._found = functools.cache(self._find)

    def names(self) -> list[str]:
        """The names of all: those of the files."""
        return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__))

    def full(self, name: str) -> str:
        """The name, that of a file of the user's with its whole path.

        Raises:
          UserError: if there is no such file.
        """
        if self.root is None or not name.endswith(".py"):
            return name
        path = next((place for place in (absolute(name), str(self.root / name)) if os.path.isfile(place)), None)
        if path is None:
            raise UserError(f"there is no file {name} with a {self.kind}")
        return path

    def find(self, name: str) -> type:
        """The class of a plugin.

        Raises:
          UserError: if there is none of that name; the message has the near ones.
          TypeError: if its file does not define one subclass of the base; a UserError for a file of the user's.
        """
        return self._found(self.full(name))

    def _find(self, name: str) -> type:
        file = f"{self.package.replace('.', '/')}/{name}.py"
        if name.endswith(".py") and self.root is not None:
            module, file = _loaded(name), name
        elif name in self.names():
            module = importlib.import_module(f"{self.package}.{name}")
        else:
            own = ", or the path of a file with one, ending with .py" if self.root is not None else ""
            raise UserError(f"there is no {self.kind} {name!r}; {near(name, self.names())}{own}")
        classes = (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__)
        found = [c for c in classes if issubclass(c, self.base)]
        if len(found) != 1:
            error = UserError if name.endswith(".py") else TypeError
            raise error(f"{file} must define one subclass of {self.base.__name__}, it defines {len(found)}")
        return found[0]

    def defaults(self, name: str) -> config_dict.ConfigDict:
        """The hyperparameters of a plugin and their defaults, read from its constructor's signature.

        Raises:
          TypeError: if a hyperparameter has no default, or None without an annotation `type | None`.
        """
        return signatures.defaults(self.find(name).__init__, self.surroundings)

    def check(self, name: str, hyperparameters: Mapping[str, Any]) -> None:
        """Raises a UserError for a hyperparameter that a plugin does not have, with the near names, or of another type."""
        known = list(self.defaults(name))
        for key in hyperparameters:
            if key not in known:
                raise UserError(f"{self.kind} {name!r} has no hyperparameter {key!r}; {near(key, known)}")
        signatures.check(self.find(name).__init__, hyperparameters, lambda key: f"{self.kind} {name!r}: `{key}`")

    def complete(self, name: str, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters of a plugin: those given, the others with their defaults, and folders as absolute paths.

        Raises:
          UserError: as `check` does.
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


def program(path: pathlib.Path, function: str, option: str) -> typing.Callable:
    """A function of a Python file of the user's.

    Raises:
      UserError: if there is no such function, or the file is no Python; the message begins with the option that names it.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = None if spec is None else importlib.util.module_from_spec(spec)
    if module is not None:
        spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"{option}: it defines no function {function}()")
    return getattr(module, function)


def _loaded(path: str) -> types.ModuleType:
    """The module that a file is."""
    name = f"{pathlib.Path(path).stem}_{zlib.crc32(path.encode()):08x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

"""Files that other processes may read while they are made, and the folder of what is kept between runs."""

import json
import os
import pathlib
import tempfile
import uuid
from collections.abc import Callable
from typing import Any, NewType

from common.errors import UserError

# The annotation of a hyperparameter that is a path, which `common.plugins` makes absolute.
Folder = NewType("Folder", str)


def cache_folder(cache_dir: str | None = None) -> pathlib.Path:
    """`cache_dir`, else the environment's MIXOLOGY_CACHE, else ~/.cache/mixology."""
    return pathlib.Path(cache_dir or os.environ.get("MIXOLOGY_CACHE") or "~/.cache/mixology").expanduser()


def absolute(path: str | pathlib.Path) -> str:
    """The path without ~ and from the root, links as they are: what it means whatever the current directory is.

    An address ("gs://...") stays as it is.
    """
    return str(path) if "://" in str(path) else os.path.abspath(pathlib.Path(path).expanduser())


def check_can_write(what: str, path: str | pathlib.Path) -> None:
    """Raises a UserError where no file can be written at a path: before the work whose result it is to hold.

    Args:
      what: the option that names the file, in the message.
      path: of the file. Its folder must be there.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{what}={path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{what}={path}: there is no folder {path.parent}; make it first")
    # The file is written beside itself first, so the folder's permissions decide.
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{what}={path}: the folder {path.parent} may not be written to")


def read_bytes(path: str | pathlib.Path) -> bytes:
    """What a file of the user's holds.

    Raises:
      UserError: where it cannot be read; the message names it.
    """
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def write_atomically(path: str | pathlib.Path, content: bytes | str) -> None:
    """Writes a file, its folder included, so that a reader, or a crash at any time, sees its old content or all of the new."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(folder: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Makes a folder, if it is not there, so that other processes see all of what `fill` writes into it or nothing."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = pathlib.Path(temporary, "made")
        made.mkdir()
        fill(made)
        try:
            made.rename(folder)
        except OSError:  # another process was first; what it made is the same
            if not folder.exists():
                raise


def read_json(path: pathlib.Path) -> Any:
    """What a file holds; None if there is no such file, or a crash has cut it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None

"""Files that other processes may read while they are made, and the folder of what is kept between runs."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NewType

from common import remote
from common.errors import UserError


class NoHome(UserError):
    """A path begins in a home that this machine does not know."""


# The annotation of a hyperparameter that is a path, which `common.plugins` makes absolute.
Folder = NewType("Folder", str)


# The folders of what is kept between runs; beside them lie what was fetched, and what a user has put there.
KEPT = ("compiled", "corpora", "drawn", "ngram", "retrieval", "tokenizers", "tokens")


def cache_folder(cache_dir: str | None = None) -> pathlib.Path:
    """`cache_dir`, else the environment's MIXOLOGY_CACHE, else ~/.cache/mixology.

    Raises:
      UserError: for an address.
      NoHome: where the user has no home.
    """
    path = cache_dir or os.environ.get("MIXOLOGY_CACHE") or "~/.cache/mixology"
    if remote.is_address(path):
        raise UserError(
            f"{path} is no folder of this machine, as cache_dir or the environment's MIXOLOGY_CACHE must be: give one, such as a "
            "mounted bucket"
        )
    try:
        return pathlib.Path(absolute(path))
    except NoHome as error:
        raise NoHome(
            f"{error}: give a folder for what is kept between runs, as cache_dir or in the environment's MIXOLOGY_CACHE"
        ) from None


def absolute(path: str | pathlib.Path) -> str:
    """The path without ~ and from the root, links as they are: what it means whatever the current directory is.

    An address ("gs://...") stays as it is.

    Raises:
      NoHome: for the home of a user whom this machine does not know.
    """
    try:
        return str(path) if remote.is_address(path) else os.path.abspath(pathlib.Path(path).expanduser())
    except RuntimeError as error:
        raise NoHome(f"{path}: {str(error).rstrip('.')}") from None


def check_can_write(what: str, path: str | pathlib.Path) -> None:
    """Raises a UserError where no file can be written at a path: before the work whose result it is to hold.

    Args:
      what: the option that names the file, in the message.
      path: of the file. Its folder must be there.
    """
    path = pathlib.Path(absolute(path))
    if path.is_dir():
        raise UserError(f"{what}={path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{what}={path}: there is no folder {path.parent}; make it first")
    # The file is written beside itself first, so the folder's permissions decide.
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{what}={path}: the folder {path.parent} may not be written to")


def check_can_make(folder: pathlib.Path, option: str) -> None:
    """Raises a UserError where a folder may not be written to, or cannot be made: before the work whose results it is to hold. Of
    addresses nothing is said.

    Args:
      folder: the folder.
      option: with which another one is given.
    """
    if remote.is_address(folder):
        return
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is no folder"
        raise UserError(f"cannot write to {folder}: {there} {why}; give another folder as {option}")


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
    """Writes a file, its folder included, so that a reader, or a crash at any time, sees its old content or all of the new.

    At an address (`common.remote`) the store sees to that.
    """
    content = content.encode() if isinstance(content, str) else content
    if remote.is_address(path):
        with remote.spoken(path):
            remote.at(path).write_bytes(content)
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it has no room for
        raise


def make_folder(folder: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Makes a folder, if it is not there: one process, while the others that want it wait.

    Other processes see all of what `fill` writes into it or nothing. What a process that died has left of it is taken away.

    Raises:
      UserError: where the folder cannot be written or the disk is full.
    """
    if folder.exists():
        return
    with in_cache(folder), alone(folder) as locked:
        if folder.exists():
            return
        if locked:
            for left in folder.parent.glob(f".{folder.name}.*.part"):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part") as temporary:
            made = pathlib.Path(temporary, "made")
            made.mkdir()
            fill(made)
            # A power cut could leave the folder with files that are empty.
            for path in [path for path in made.rglob("*") if path.is_file()]:
                with path.open("rb") as file:
                    os.fsync(file)
            try:
                made.rename(folder)
            except OSError:  # where there are no locks, another process may have been first; what it made is the same
                if not folder.exists():
                    raise


def damaged(path: pathlib.Path) -> UserError:
    """The error of what lies in the cache and is not what was put there, as after a power cut."""
    return UserError(f"{path}, which is kept between runs, is damaged: delete it and run again")


def make_file(path: pathlib.Path, content: Callable[[], bytes | str]) -> None:
    """Makes a file, if it is not there: one process, while the others that want it wait.

    Raises:
      UserError: where the file cannot be written or the disk is full.
    """
    if path.exists():
        return
    with in_cache(path), alone(path):
        if not path.exists():
            write_atomically(path, content())


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of what is to be made at a path; waits while another process holds it, and says for whom.

    It is a lock of the operating system on a file beside the path, which network file systems pass on to their other hosts and
    which ends with its process.

    Yields:
      whether it is held: where a file system has no locks, several processes may do the same work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with lock.open("a+") as file:
            locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                print(f"waiting for {holder} to make {path}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                locked = False
            # Who held the lock has taken its file away, and others may have made it anew.
            if locked and not _is_at(file.fileno(), lock):
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield locked
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def in_cache(path: pathlib.Path) -> Iterator[None]:
    """Turns errors of writing at a path into those that say what to do. Errors at other places are left as they are."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        refused = error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and _below(error.filename, path.parent)
        # A file stands where one of the folders that lead there is to be, or nobody can make them (in /proc, say).
        no_folder = error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT) and _leads_to(
            error.filename, path.parent
        )
        if not (full or refused or no_folder):
            raise
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room, or give another folder for what is kept between runs, as "
            "cache_dir or in the environment's MIXOLOGY_CACHE"
        ) from error


def _below(name: object, folder: pathlib.Path) -> bool:
    """Whether an error's file lies in a folder, or is one of those that lead to it."""
    if not isinstance(name, str | os.PathLike):
        return False
    return pathlib.Path(name).is_relative_to(folder) or _leads_to(name, folder)


def _leads_to(name: object, folder: pathlib.Path) -> bool:
    return isinstance(name, str | os.PathLike) and folder.is_relative_to(pathlib.Path(name))


def read_json(path: pathlib.Path) -> Any:
    """What a file holds; None if there is no such file, or a crash has cut it."""
    try:
        return json.loads(remote.read(path) if remote.is_address(path) else path.read_text())
    except (OSError, ValueError):
        return None


def modified(path: pathlib.Path) -> float | None:
    """When a file was last written, in seconds since 1970; None if it is not there."""
    if remote.is_address(path):
        return remote.modified(path)
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def make_directory(path: pathlib.Path) -> None:
    """Makes a directory and those above it; at an address there are none to be made."""
    if not remote.is_address(path):
        path.mkdir(parents=True, exist_ok=True)


def touch(path: pathlib.Path) -> None:
    """Makes an empty file, or has it as written now."""
    if remote.is_address(path):
        path.write_bytes(b"")
    else:
        path.touch()


def write_figure(path: pathlib.Path, figure: Any, dpi: int) -> None:
    """Writes a figure of matplotlib as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    write_atomically(path, picture.getvalue())

"""Object stores: what a run keeps at an address, gs://BUCKET/... or s3://BUCKET/..., in place of a directory.

An address is an `etils.epath.Path`, which has the methods of `pathlib.Path` that read, write, list and delete. What is
otherwise there is here: an object appears whole or not at all, it cannot be appended to, what is like a folder cannot be
renamed at once, and there are no locks. The credentials are those that gcsfs and s3fs find by themselves;
STORAGE_EMULATOR_HOST and AWS_ENDPOINT_URL are those of another server.
"""

import contextlib
import functools
import importlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError

# By the scheme of an address, the package that speaks to the store.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
# The object that says that all others of its folder are there; Orbax has the same name for it.
COMMITTED = "commit_success.txt"


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is one of an object store, and not of a file system."""
    return "://" in str(path)


def scheme(path: str | os.PathLike) -> str:
    """ "gs", "s3", ...; empty for a path of a file system."""
    return str(path).partition("://")[0] if is_address(path) else ""


def at(path: str | os.PathLike) -> Path:
    """The path, absolute, or the address, as an object with the methods of `pathlib.Path`.

    Raises:
      UserError: for an address of a store that is not known, or without a bucket, or whose package is not installed.
    """
    if not is_address(path):
        return pathlib.Path(path).expanduser().absolute()
    kind, _, rest = str(path).partition("://")
    if kind not in PACKAGES:
        raise UserError(
            f"{path} is an address of no store that is known: {' and '.join(f'{k}://' for k in PACKAGES)} are"
        )
    if not re.match(r"[^/\s]+/[^/\s]", rest):
        raise UserError(f"{path} names no folder of a bucket: give {kind}://BUCKET/FOLDER")
    _prepare(kind)
    from etils import epath  # takes long to import

    return epath.Path(str(path).rstrip("/"))


@functools.cache
def _prepare(kind: str) -> None:
    try:
        importlib.import_module(PACKAGES[kind])
    except ImportError:
        raise UserError(f"{kind}:// needs {PACKAGES[kind]}: pip install -r requirements-cloud.txt") from None
    import fsspec

    os.environ["EPATH_USE_TF"] = "0"  # one way to the store, whether TensorFlow is installed or not
    for protocol in ("gcs", "s3"):  # what other processes write is to be seen
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False


def files(path: Path) -> tuple[Any, str]:
    """The fsspec file system of an address, and its path there."""
    import fsspec

    _prepare(scheme(path))
    return fsspec.core.url_to_fs(str(path))


@contextlib.contextmanager
def spoken(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a store's package raises where it cannot be reached, or does not let one in, into an OSError."""
    if not is_address(path):
        yield
        return
    import aiohttp

    known: tuple[type[Exception], ...] = (aiohttp.ClientError,)
    if scheme(path) == "gs":
        import gcsfs.retry
        import google.auth.exceptions

        known += (gcsfs.retry.HttpError, google.auth.exceptions.GoogleAuthError)
    else:
        import botocore.exceptions

        known += (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
    try:
        yield
    except known as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def read(path: Path) -> bytes:
    """An object as it is at one moment. (Opened as a file it is asked for its size first, and may be another one then.)

    Raises:
      FileNotFoundError: if it is not there.
    """
    store, name = files(path)
    return store.cat_file(name)


def create(path: Path, content: bytes) -> bool:
    """Makes an object if there is none, which is asked and done by the store in one; False where there is one."""
    store, name = files(path)
    try:
        store.pipe_file(name, content, mode="create")
    except FileExistsError:
        return False
    return True


def modified(path: Path) -> float | None:
    """When an object was last written, in seconds since 1970 by the clock of the store; None if it is not there."""
    store, name = files(path)
    try:
        found = store.info(name)
    except FileNotFoundError:
        return None
    moment = found.get("mtime") or found.get("LastModified")
    return None if moment is None else moment.timestamp()


def upload(folder: Path, to: Path) -> None:
    """Copies a folder of this machine to an address, `COMMITTED` last: without it there is nothing that counts."""
    store, name = files(to)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put_file(str(path), f"{name}/{path.relative_to(folder)}")
    (to / COMMITTED).write_bytes(b"")


def move(folder: Path, to: Path) -> None:
    """Copies all that lies below an address to another one, and then deletes it."""
    (store, name), (_, target) = files(folder), files(to)
    for path in store.find(name):
        store.copy(path, target + path.removeprefix(name))
    store.rm(name, recursive=True)


@contextlib.contextmanager
def fetched(folder: Path) -> Iterator[Path]:
    """A copy on this machine of what lies at an address, for as long as the context lasts."""
    store, name = files(folder)
    with tempfile.TemporaryDirectory(prefix="mixology-") as temporary:
        store.get(f"{name}/", f"{temporary}/", recursive=True)
        yield Path(temporary)

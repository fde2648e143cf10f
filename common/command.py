"""What the entry points share: their command lines, start-up, and how they end.

Exit status: 0, done; 1, an error, which is one message where the user can mend it and a traceback where it is a bug; 75, stopped
before the end and to be run again (EX_TEMPFAIL of sysexits.h, by which schedulers know to start a job anew).
"""

import argparse
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import hosts, roll_call
from common.errors import UserError, check_range

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # for what is imported from here on

STOPPED = hosts.AGAIN
DAY = 86_400  # seconds
# What the machine refuses, wherever that is met: the reason and, where it is known, the file are all that there is to say.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE)
REFUSED_BY_NAME = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class _Once(argparse.Action):
    """Stores the value of an option that is given once at most: a second value would silently take the place of the first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self.dest in parser._given:
            raise argparse.ArgumentError(self, "it is given twice; keep one")
        parser._given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A command line without abbreviations, whose errors are `UserError`s and whose help begins with the module's docstring."""

    def __init__(self, description: str, **options):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

        self._given: set[str] = set()
        for name in (None, "store"):
            self.register("action", name, _Once)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's. Raises a UserError for an option of one value that is given twice, too."""
        self._given.clear()
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """Raises a UserError."""
        if message.startswith("unrecognized arguments"):
            message += "; a value with spaces needs quotes"
        raise UserError(f"{message} ({self.prog} --help tells what there is)")


def new_file(text: str) -> Path | None:
    """The type of an option that names a file to be written, whose folder must be there before anything is computed; None for no
    text."""
    if not text:
        return None
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} for {text!r}: make it first")
    if not path.name or path.is_dir():
        raise argparse.ArgumentTypeError(f"takes the name of a file; got {text!r}")
    return path


def whole_numbers(text: str) -> list[int]:
    """The type of an option that takes whole numbers of at least 1, as in "128,256"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"takes whole numbers of at least 1, as in 128,256; got {text!r}")
    return [int(part) for part in parts]


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(arguments)`, whose result is the exit status (None for 0). Does not return.

    A `UserError`, and what the machine refuses (a full disk, a name that is too long, an output that nobody reads), is printed as
    one message and ends with status 1. Ctrl-C and SIGTERM, where nothing has to be saved, end with `STOPPED`. Every other
    exception keeps its traceback. One of several processes tells the others why it ends, and they end, too.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _open_standard_streams()
    try:
        _check_directory()
        status = main(sys.argv[1:])
        hosts.leave()
        sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        status, text, consequence = 1, f"error: {error}", hosts.is_consequence(error)
    except KeyboardInterrupt:
        status, text, consequence = STOPPED, "stopped", False
    except Exception as error:
        if (refused := _refusal(error)) is not None:
            status, text, consequence = 1, f"error: {refused}", False
        elif hosts.joined():
            status, text, consequence = 1, traceback.format_exc(), hosts.is_consequence(error)
        else:
            raise
    if hosts.joined():
        hosts.end(status, text, consequence)
    print(text, file=sys.stderr)
    sys.exit(status)


class _Stream(io.TextIOWrapper):
    """A standard stream. What its encoding does not have is printed as its code. What cannot be written, since the disk is full
    or nobody reads it, is a `UserError` of standard output, once, and is dropped of standard error: nobody would see it."""

    lost = False

    def write(self, text: str) -> int:
        return self._tried(super().write, text)

    def flush(self) -> None:
        self._tried(super().flush)

    def _tried(self, do: Callable, *arguments: str) -> Any:
        try:
            return None if self.lost else do(*arguments)
        except OSError as error:
            self.lost = True
            if self is sys.stdout:
                raise UserError(f"what is printed cannot be written ({error.strerror})") from error


def _open_standard_streams() -> None:
    """Has the standard streams lead somewhere: where one is closed (`2>&-`), the next file that is opened would get its number,
    and what libraries print would be written into a checkpoint."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
        elif number and (stream := getattr(sys, name)) is getattr(sys, f"__{name}__"):
            options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, _Stream(stream.buffer, stream.encoding, "backslashreplace", **options))


def _check_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory is not there any more: change to another one") from None


def _refusal(error: Exception) -> str | None:
    """What the machine has refused, in words; None for every other error."""
    if not isinstance(error, OSError):
        return None
    if error.filename is not None and error.errno in (*REFUSED, *REFUSED_BY_NAME):
        return f"{error.filename}: {error.strerror}"
    return error.strerror if error.errno in REFUSED else None


def start(distributed: bool | Mapping[str, Any] = False, platform: str | None = None, cache: bool = True) -> None:
    """Prepares JAX; to be called before anything else uses a device.

    Args:
      distributed: whether this process is one of several (a pod, several hosts), or the options of a command that say so and may
        say who and where they are: "distributed", "start_seconds" and the keys of `roll_call.NAMES`.
      platform: of the devices, such as "cpu"; None for JAX's own choice.
      cache: whether what is compiled is kept for later processes.

    Raises:
      UserError: if the processes do not find each other, or run different things; see `hosts.join`.
    """
    options = distributed if isinstance(distributed, Mapping) else {"distributed": distributed}
    given = {key: options[key] for key in roll_call.NAMES if options.get(key) is not None}
    if given and not options.get("distributed"):
        raise UserError(f"--{next(iter(given))} is for one of several processes: give --distributed, too")
    seconds = roll_call.START if options.get("start_seconds") is None else options["start_seconds"]
    check_range("--start_seconds", seconds, 1, DAY)
    # The help of a command is there at once: what takes seconds to import comes after the command line has been read.
    import jax
    from absl import flags, logging

    from common import allocator, compilation_cache, cpu_compiler

    cpu_compiler.avoid_wrong_products()
    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    logging.set_verbosity(logging.WARNING)  # checkpointing tells of every file that it touches
    if platform is not None:
        jax.config.update("jax_platforms", platform)
    if allocator.only_cpu(jax.config.jax_platforms):
        allocator.keep_freed_memory()
    if cache:
        compilation_cache.use()
    if options.get("distributed"):
        hosts.join(roll_call.find(given, seconds), seconds)

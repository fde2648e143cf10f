"""What the entry points share: start-up, and errors as one clear message."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from common.errors import UserError

flags.DEFINE_bool("traceback", False, "show where an error was raised, not only what it says")


def start(distributed: bool = False) -> None:
    """Prepares JAX; call it before anything else uses a device.

    Args:
      distributed: whether this process is one of several (a pod, several hosts).
    """
    import jax

    if distributed:
        jax.distributed.initialize()


def run(main: Callable) -> None:
    """Runs an entry point.

    Bad input (a ValueError, a flag that does not fit, a missing or foreign checkpoint, a download that fails) is printed as
    one message, and the exit status is 1; `--traceback` shows where it came from.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.set_verbosity(logging.WARNING)  # checkpointing tells of every file that it touches; --verbosity=0 for that
    # ml_collections wants the file before its keys, wherever the user puts it.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: not argument.startswith("--config="))
    try:
        app.run(main, flags_parser=_parse)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if not is_bad_input(error) or flags.FLAGS.traceback:
            raise
        sys.exit(f"error: {error}")


def is_bad_input(error: Exception) -> bool:
    """Whether an error says what a user must change, so that its message is enough; any other is a bug of ours."""
    return isinstance(error, UserError)


def flag_error(error: Exception) -> str:
    """What went wrong when flags, or the configuration that they name, were read.

    An error in a configuration's file comes as a whole traceback, of which the last line is what the file said.
    """
    text = str(error).strip()
    if isinstance(error, AttributeError):  # as ml_collections quotes it: a representation of a representation
        text = text.replace("\\n", ": ").replace("\\'", "").strip("'\"")
    return text.splitlines()[-1].strip().removeprefix("ValueError: ") if "Traceback" in text else text


def _parse(arguments: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        if "--traceback" in arguments:
            raise
        sys.exit(f"error: {flag_error(error)}")

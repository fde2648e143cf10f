"""What the entry points share: start-up, and errors as one clear line."""

import os
import sys
from collections.abc import Callable

from absl import app, flags

_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error was raised, not only what it says")


def start(distributed: bool = False) -> None:
    """Prepares JAX; call it before anything else uses a device.

    Args:
      distributed: whether this process is one of several (a pod, several hosts).
    """
    import jax

    if distributed:
        jax.distributed.initialize()


def run(main: Callable) -> None:
    """Runs an entry point. A ValueError, a missing or foreign checkpoint, or a flag that does not fit is printed as one message
    and exits with 2; `--traceback` shows where it came from."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        app.run(main)
    except (ValueError, AttributeError, flags.Error, OSError, RuntimeError) as error:
        parsed = flags.FLAGS.is_parsed()
        expected = isinstance(error, ValueError | flags.Error) or type(error).__name__ == "CheckpointError" or not parsed
        if not expected or (parsed and _TRACEBACK.value) or "--traceback" in sys.argv:
            raise
        sys.exit(f"error: {error}")

"""What the entry points share: their command lines, start-up, and how they end.

Exit status: 0, done; 1, an error, which is one message where the user can mend it and a traceback where it is a bug; 75, stopped
before the end and to be run again (EX_TEMPFAIL of sysexits.h, by which schedulers know to start a job anew).
"""

import argparse
import os
import sys
from collections.abc import Callable

from common.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # for what is imported from here on

STOPPED = 75


class Parser(argparse.ArgumentParser):
    """A command line without abbreviations, whose errors are `UserError`s and whose help begins with the module's docstring."""

    def __init__(self, description: str, **options):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str):
        """Raises a UserError."""
        if message.startswith("unrecognized arguments"):
            message += "; a value with spaces needs quotes"
        raise UserError(f"{message} ({self.prog} --help tells what there is)")


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(arguments)`, whose result is the exit status (None for 0). Does not return.

    A `UserError` is printed as one message and ends with status 1. Ctrl-C, where nothing has to be saved, ends with
    `STOPPED`. Every other exception keeps its traceback.
    """
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = STOPPED
    sys.exit(status)


def start(distributed: bool = False, platform: str | None = None, cache: bool = True) -> None:
    """Prepares JAX; to be called before anything else uses a device.

    Args:
      distributed: whether this process is one of several (a pod, several hosts). JAX finds the others on TPU pods and under
        SLURM; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say where and who they are.
      platform: of the devices, such as "cpu"; None for JAX's own choice.
      cache: whether what is compiled is kept for later processes.
    """
    # The help of a command is there at once: what takes seconds to import comes after the command line has been read.
    import jax
    from absl import flags, logging

    from common import compilation_cache

    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    logging.set_verbosity(logging.WARNING)  # checkpointing tells of every file that it touches
    if platform is not None:
        jax.config.update("jax_platforms", platform)
    if cache:
        compilation_cache.use()
    if distributed:
        numbers = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}  # JAX reads the address alone
        jax.distributed.initialize(
            **{key: int(os.environ[name]) for key, name in numbers.items() if name in os.environ}
        )

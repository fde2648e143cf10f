"""What Orbax prints of failures that are raised as one error, too, is not printed."""

import contextlib
import gc
import io
import logging
import os
import sys
from collections.abc import Iterator

from absl import logging as absl_logging


def _told_later(record: logging.LogRecord) -> bool:
    """Whether a line of the log is to be printed: orbax's threads write pages on a failure that `wait` raises as one error."""
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


absl_logging.get_absl_logger().addFilter(_told_later)


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Drops what is printed by orbax's reads that are still under way when another one fails: pages of tracebacks."""
    printed, hook = io.StringIO(), sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with contextlib.redirect_stderr(printed):
            try:
                yield
            except Exception as error:
                error.__traceback__ = None
                gc.collect()
                raise
    finally:
        sys.unraisablehook = hook
    print(printed.getvalue(), end="", file=sys.stderr)

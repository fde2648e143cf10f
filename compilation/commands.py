"""What `--compile_for` does: compiles, prints the page, keeps the JSON."""

from collections.abc import Callable, Sequence
from pathlib import Path

from common.console import say
from compilation import report
from compilation.findings import compile_step
from compilation.steps import Step
from compilation.targets import Target
from training.config import Config

DOES_NOT_FIT = 1


def show(
    config: Config, target: Target, makers: Sequence[Callable[[Config, Target], Step | None]], workdir: Path | None
) -> int:
    """Compiles steps of a model, prints a page for each and, where a directory is given, writes them below it as JSON.

    Args:
      config: without data.
      target: the devices.
      makers: of the steps, see `compilation.steps`.
      workdir: made if it is not there; None keeps nothing.

    Returns:
      the exit status: 0 where all steps fit, else `DOES_NOT_FIT`.
    """
    fit = True
    for number, make in enumerate(makers):
        step = make(config, target)
        if step is None:
            continue
        found = compile_step(step, target)
        say(("\n" if number else "") + report.page(found))
        if workdir is not None:
            say(f"kept as {report.write(found, workdir)}")
        fit &= found.memory.fits
    return 0 if fit else DOES_NOT_FIT

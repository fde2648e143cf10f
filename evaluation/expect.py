"""Compares a finished run with the number that its configuration expects.

    python -m evaluation.expect --workdir=runs/s4d_image

The checkpoint that was best on the validation split is scored on the test split. Exit status 0: the score is within the
tolerance. 1: it is not. 2: there is nothing to compare, as the line that is printed says: the run expects nothing, is not
finished, or cannot be read.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from common import command
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Expect:
    """The published number that a configuration is to find again.

    Attributes:
      metric: a score, as `training.validation.summary` names it.
      value: the number, in the score's unit; None where none is verified.
      tolerance: how far from it, to either side, a run's score may be.
      source: of the number: arXiv id and table, and how far it is verified.
      seeds: runs, of config.seed 0, 1, ..., that it takes to say that the number was found again.
      hours: estimate for one run; on what hardware, the configuration's file says.
    """

    metric: str
    value: float | None
    tolerance: float
    source: str
    seeds: int
    hours: float

    def __post_init__(self):
        if not self.metric or not self.source:
            raise UserError("config.expect needs a metric and a source")
        if not (self.tolerance >= 0 and self.seeds >= 1 and self.hours > 0):
            raise UserError(f"config.expect needs tolerance >= 0, seeds >= 1 and hours > 0, got {self}")


def compare(workdir: Path) -> bool:
    """Scores a run, prints the score beside what was expected, and says whether it is within the tolerance.

    Raises:
      UserError: if there is nothing to compare.
      CheckpointError: if there is no intact checkpoint.
      UserError: if the data of the run is not here.
    """
    # They read configurations, of which `Expect` is a part.
    from evaluation import scoring
    from training.checkpoints import Checkpoints
    from training.run_directory import read_config

    raw = read_config(workdir)
    if "expect" not in raw:
        raise UserError(f"{workdir} expects nothing: its configuration has no section 'expect' (see configs/papers/)")
    step, steps = max(Checkpoints(workdir / "checkpoints").steps(), default=0), raw["train"]["steps"]
    if step < steps:
        raise UserError(f"{workdir} is not finished: its last checkpoint is of step {step} of {steps}; train on first")
    model = scoring.load(workdir)
    expect, seed = model.config.expect, model.config.seed
    ((_, scores),) = scoring.score(model, "test", [])
    if expect.metric not in scores:
        raise UserError(f"config.expect.metric={expect.metric!r} is no score of this task: {', '.join(scores)}")
    found = scores[expect.metric]
    print(f"\nfound     {expect.metric} {found:.4f}  (test split, step {model.step}, seed {seed})")
    if expect.value is None:
        raise UserError(f"there is no verified number to compare with ({expect.source})")
    print(f"expected  {expect.metric} {expect.value:.4f} +- {expect.tolerance:g}  ({expect.source})")
    difference = found - expect.value
    within = abs(difference) <= expect.tolerance + 1e-9  # 1 - 0.99 is more than 0.01
    print(f"{'within' if within else 'OUTSIDE'} the tolerance: {difference:+.4f}  (one run of {expect.seeds})")
    return within


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.expect", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="directory of the run")
    workdir = parser.parse_args(argv).workdir
    try:
        return 0 if compare(workdir) else 1
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        if not command.is_bad_input(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from absl import flags, logging

    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    logging.set_verbosity(logging.WARNING)
    sys.exit(main())

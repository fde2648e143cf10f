"""Compares a finished run with the number that its configuration expects.

    python -m evaluation.expect --workdir=runs/s4d_image

The checkpoint that was best on the validation split is scored on the test split, at `expect.length` if the configuration has
one. Exit status: 0, the score is within the tolerance; 1, it is not, or there is nothing to compare, as the line that is
printed says (the run expects nothing, is not finished, or cannot be read).
"""

from pathlib import Path

from common import command
from common.errors import UserError
from evaluation import scoring
from evaluation.loading import load
from training.checkpoints import Checkpoints
from training.run_directory import RunDirectory


def compare(workdir: str | Path, allow_other_data: bool = False) -> bool:
    """Scores a run, prints the score beside what was expected, and says whether it is within the tolerance.

    Args:
      workdir: the run's directory.
      allow_other_data: score also where the data that is here is not the data that the run was trained on.

    Raises:
      UserError: if there is nothing to compare, or the data of the run is another or not here.
      CheckpointError: if there is no intact checkpoint.
    """
    run = load(workdir, allow_other_data=allow_other_data)
    expect, steps = run.config.expect, run.config.train.steps
    if expect is None:
        raise UserError(
            f"{run.workdir} expects nothing: its configuration has no section 'expect' (see configs/papers/)"
        )
    last = Checkpoints(RunDirectory(run.workdir).checkpoints).steps()[-1]
    if last < steps:
        raise UserError(
            f"{run.workdir} is not finished: its last checkpoint is of step {last} of {steps}; train on first"
        )
    lengths = () if expect.length is None else (expect.length,)
    ((length, scores),) = scoring.score(run, "test", lengths)
    if expect.metric not in scores:
        raise UserError(f"config.expect.metric={expect.metric!r} is no score of this task: {', '.join(scores)}")
    found = scores[expect.metric]
    at = "" if expect.length is None else f" at length {length}"
    print(f"\nfound     {expect.metric} {found:.4f}  (test split{at}, step {run.step}, seed {run.config.seed})")
    if run.other_data is not None:
        print("          on other data than the run was trained on")
    if expect.value is None:
        raise UserError(f"there is no verified number to compare with ({expect.source})")
    print(f"expected  {expect.metric} {expect.value:.4f} +- {expect.tolerance:g}  ({expect.source})")
    difference = found - expect.value
    within = abs(difference) <= expect.tolerance + 1e-9  # 1 - 0.99 is more than 0.01
    print(f"{'within' if within else 'OUTSIDE'} the tolerance: {difference:+.4f}  (one run of {expect.seeds})")
    return within


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = command.Parser(__doc__, prog="python -m evaluation.expect")
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument(
        "--allow_other_data",
        action="store_true",
        help="score also where the data that is here is not the data of the run",
    )
    options = parser.parse_args(arguments)
    command.start()
    return 0 if compare(options.workdir, options.allow_other_data) else 1


if __name__ == "__main__":
    command.run(main)

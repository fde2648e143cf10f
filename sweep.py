"""Trains a grid of models that differ in what is asked for and in nothing else, and compares them.

    python sweep.py --config=configs/lm.py --over mixer=attention,mamba,s4d seed=0,1,2 --match=params --workdir=runs/sweep

Axes and settings whose key has a dot, and `seed`, are keys of the configuration (`--over optimizer.learning_rate=1e-3,3e-3`,
`--set train.steps=200`); all others (mixer, task, size, corpus) go into the experiment file's argument. The same command goes
on with a sweep that was interrupted, retries what failed, and writes report.md, results.csv and plots anew.
"""

import argparse
import os
import pathlib
import shlex
import sys

from common import command
from common.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", metavar="FILE[:ARGUMENT]", help="experiment file, as for train.py")
    add("--over", nargs="+", action="extend", default=[], metavar="KEY=A,B", help="axes of the grid")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for all cells")
    add("--workdir", type=pathlib.Path, help="directory of the sweep")
    add("--workers", type=int, default=1, help="cells at the same time; they share the cores")
    matched = "size all mixers, by their width, to the parameters, FLOPs per token or carry of the first one"
    add("--match", choices=("params", "flops", "state"), help=matched)
    add("--budget", type=float, help="of --match, instead of the first mixer's")
    add("--lengths", default="", metavar="N,N", help="that the test split is scored at beside the one of training")
    add("--score", type=pathlib.Path, metavar="RUN", help="only score a run (what a sweep calls)")
    options = parser.parse_args(arguments)
    if not options.score and not (options.config and options.workdir):
        parser.error("--config and --workdir are needed")
    return options


def request(options: argparse.Namespace):
    """What the command line asks for, as a `sweeps.cells.Request`."""
    from sweeps.cells import Request

    return Request(
        config=options.config,
        axes={key: value.split(",") for key, value in pairs("--over", options.over).items()},
        workdir=options.workdir,
        settings=pairs("--set", options.set),
        match=options.match,
        budget=options.budget,
        lengths=lengths(options.lengths),
    )


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    start(cpu=options.score is None)
    from sweeps import sweep
    from sweeps.engines import local

    if options.score:
        sweep.score(options.score, lengths(options.lengths))
        return 0
    engine = local.LocalLauncher(options.workers, options.workdir / ".lock")
    return 0 if sweep.run(request(options), engine, shlex.join(["python", "sweep.py", *arguments])) else 1


def start(cpu: bool) -> None:
    """Prepares JAX; a sweep itself needs no device, and leaves those that there are to its runs."""
    import jax
    from absl import flags, logging

    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    logging.set_verbosity(logging.WARNING)
    if cpu:
        jax.config.update("jax_platforms", "cpu")


def pairs(what: str, items: list[str]) -> dict[str, str]:
    """KEY=VALUE, ... as a dict."""
    found = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UserError(f"{what} takes KEY=VALUE, not {item!r}")
        if key in found:
            raise UserError(f"{what} has {key} twice")
        found[key] = value
    return found


def lengths(text: str) -> tuple[int, ...]:
    """N,N,... as numbers."""
    items = [item for item in text.split(",") if item]
    if not all(item.isdigit() and int(item) for item in items):
        raise UserError(f"--lengths takes whole numbers joined by commas, not {text!r}")
    return tuple(sorted({int(item) for item in items}))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if not command.is_bad_input(error):
            raise
        sys.exit(f"error: {error}")

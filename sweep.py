"""Trains a grid of models that differ in what is asked for and in nothing else, and compares them.

    python sweep.py --config=configs/lm.py --over mixer=attention,mamba,s4d seed=0,1,2 --match=params --workdir=runs/sweep

Keys with a dot, and `seed`, are keys of the configuration (--over optimizer.learning_rate=1e-3,3e-3, --set train.steps=200);
all others (mixer, task, size, corpus) go into the experiment file's argument. Commas in brackets or quotes do not separate
values: --over "model.group=(1,2),(3,4)". What is set for a mixer (--set model.mixer.s4d.state=32) goes to the cells that have it.

The same command goes on with a sweep that was interrupted, retries what has failed, and writes report.md, results.csv and
plots anew. What has been run keeps its configuration: other settings need another --workdir.

Exit status: 0, all cells are finished; 1, an error, or cells that have failed or diverged; 75, stopped before the end: run the
same command again.
"""

import argparse
import signal

from common import command
from sweeps import engine, request, result, sweep
from training import run_directory


def parser() -> command.Parser:
    """The command line."""
    made = command.Parser(__doc__, usage="sweep.py --config=FILE --over KEY=A,B --workdir=DIR [options]")
    add = made.add_argument
    add("--config", metavar="FILE[:ARGUMENT]", help="experiment file, as for train.py")
    add("--over", nargs="+", action="extend", default=[], metavar="KEY=A,B", help="axes of the grid")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="one value for all cells")
    add("--workdir", metavar="DIR", help="directory of the sweep: a run directory for each cell, and the report")
    add(
        "--match",
        metavar="MEASURE",
        help="size all mixers, by their width, to the same params, flops (per token) or state",
    )
    add("--budget", type=float, metavar="N", help="of --match; by default what the first mixer has")
    add("--lengths", default="", metavar="N,N", help="score the test split at these lengths, too")
    add(
        "--engine",
        default="local",
        metavar="NAME",
        help="what starts the cells, a file of sweeps/engines/ (default: local)",
    )
    add(
        "--workers", type=int, default=1, metavar="N", help="cells at the same time, which share the cores (default: 1)"
    )
    add("--show_config", action="store_true", help="print what would be run for each cell and exit")
    add(
        "--allow_other_data",
        action="store_true",
        help="go on with cells although their data has changed; it is recorded",
    )
    add("--score", metavar="RUN", help="only score a run (what a sweep calls for each cell)")
    return made


def main(arguments: list[str]) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if options.score is None and not (options.config and options.workdir is not None):
        made.error("--config=FILE and --workdir=DIR are needed")
    if options.score is not None and (options.config or options.workdir or options.over or options.set):
        made.error("--score=RUN is of a run that is there, and goes with --lengths alone")
    # A sweep itself needs no device, and leaves those that there are to its runs.
    command.start(platform="cpu" if options.score is None else None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both signals end a sweep in the same way
    lengths = request.whole_numbers("--lengths", options.lengths)
    try:
        if options.score is not None:
            result.write(options.score, lengths, options.allow_other_data)
            return 0
        asked = requested(options, lengths)
        chosen = engine.find(options.engine)(asked.workdir, options.workers)
        if options.show_config:
            sweep.show(asked, chosen)
            return 0
        return sweep.run(asked, chosen, arguments)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return command.STOPPED


def requested(options: argparse.Namespace, lengths: tuple[int, ...]) -> request.Request:
    """What the command line asks for."""
    return request.Request(
        config=options.config,
        axes={key: request.split_values(values) for key, values in request.pairs("--over", options.over).items()},
        workdir=run_directory.locate(options.workdir),
        settings=request.pairs("--set", options.set),
        match=options.match,
        budget=options.budget,
        lengths=lengths,
        allow_other_data=options.allow_other_data,
    )


if __name__ == "__main__":
    command.run(main)

"""Trains a grid of models that differ in what is asked for and in nothing else, and compares them.

    python sweep.py --config=configs/lm.py --over mixer=attention,mamba,s4d seed=0,1,2 --match=params --workdir=runs/sweep

Keys with a dot, and `seed`, are keys of the configuration (--over optimizer.learning_rate=1e-3,3e-3, --set train.steps=200);
all others (mixer, task, size, corpus) go into the experiment file's argument. Commas in brackets or quotes do not separate
values: --over "model.group=(1,2),(3,4)". log:1e-4..1e-2:5, lin:0..0.3:4 and pow2:64..512 stand for values. What is set for a
mixer (--set model.mixer.s4d.state=32) goes to the cells that have it.

The same command goes on with a sweep that was interrupted, retries what has failed, and writes report.md, results.csv and
plots anew. What has been run keeps its configuration: other settings need another --workdir. docs/sweeps.md has the rest: tuning,
clusters, what is tried again.

Exit status: 0, all cells are finished; 1, an error, or cells that have failed or diverged; 75, stopped before the end, or cells
are still at work: run the same command again.
"""

import argparse

from common import command
from common.errors import UserError, check_range

# What is done instead of running, and the options that say where.
ALONE = {
    "cell": (),
    "status": ("workdir",),
    "cancel": ("workdir", "engine", "option", "hosts", "accelerators", "minutes", "workers"),
}
# The help is there at once: what takes seconds to import is imported when the command line has been read.


def parser() -> command.Parser:
    """The command line."""
    made = command.Parser(__doc__, usage="sweep.py --config=FILE --over KEY=A,B --workdir=DIR [options]")
    add = made.add_argument
    add("--config", metavar="FILE[:ARGUMENT]", help="experiment file, as for train.py")
    add("--over", nargs="+", action="extend", default=[], metavar="KEY=A,B", help="axes of the grid")
    add("--cells", metavar="FILE.py", help="a program whose cells() lists values by key, instead of or beside --over")
    add("--draw", type=int, metavar="N", help="N points for axes that are ranges, such as KEY=log:1e-4..1e-2")
    add("--draw_seed", type=int, default=0, metavar="N", help="of --draw (default: 0)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="one value for all cells")
    add("--workdir", metavar="DIR", help="directory of the sweep: a run directory for each cell, and the report")
    add(
        "--match", metavar="MEASURE", help="size all mixers, by their width, to the same params, active, flops or state"
    )
    add("--budget", type=float, metavar="N", help="of --match; by default what the first mixer has")
    add("--ladder", default="", metavar="N,N", help="widths of models that are scaled from the first one")
    add("--budgets", default="", metavar="N,N", help="operations that each model is trained for, by its steps")
    add("--fit", default="", metavar="lr,scaling", help="curves that the report has, through what was found")
    add("--best_of", "--best-of", default="", metavar="KEY,KEY", help="axes that are tuned on validation for each row")
    add("--seeds_of_best", "--seeds-of-best", type=int, metavar="N", help="tune with one seed, then run N of the best")
    add("--reference", metavar="MIXER", help="or KEY=VALUE: what the rows are compared with (default: the best)")
    add("--lengths", default="", metavar="N,N", help="score the test split at these lengths, too")
    score = "score the test split under these settings of the task, too; lists make a grid, as of eval.py --set"
    add("--score", nargs="+", action="extend", default=[], metavar="task.KEY=A,B", help=score)
    add("--show_config", action="store_true", help="print what would be run for each cell and exit")
    add("--allow_other_data", action="store_true", help="go on with cells whose data has changed; it is recorded")
    add = made.add_argument_group("where and when it is run").add_argument
    add("--engine", default="local", metavar="NAME", help="what starts the cells: a file of sweeps/engines/")
    add("--workers", type=int, metavar="N", help="cells at the same time; those on this machine share it (default: 1)")
    add("--hosts", type=int, default=1, metavar="N", help="that run each cell together (default: 1)")
    add("--accelerators", metavar="[KIND:]N", help="of each host")
    add("--minutes", type=int, metavar="N", help="after which a cell is stopped, saved and tried again")
    add("--retries", type=int, default=2, metavar="N", help="of a cell that was stopped or lost (default: 2)")
    add("--option", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the engine: partition, image")
    add("--detach", action="store_true", help="submit and leave; the same command later collects and goes on")
    add = made.add_argument_group("instead of running").add_mutually_exclusive_group().add_argument
    add("--status", action="store_true", help="print how far the cells in --workdir are and exit")
    add("--cancel", action="store_true", help="stop the jobs of the cells in --workdir and exit")
    cell = "run a cell where it is (what engines start for each cell), or several, one after the other in one process"
    add("--cell", nargs="+", metavar="DIR", help=cell)
    return made


def main(arguments: list[str]) -> int:
    made = parser()
    options = made.parse_args(arguments)
    alone = next((name for name in ALONE if getattr(options, name) not in (None, False)), None)
    if (options.cell is None and options.workdir is None) or not (alone or options.config):
        made.error("--workdir=DIR is needed" if alone else "--config=FILE and --workdir=DIR are needed")
    given = [name for name, value in vars(options).items() if value != made.get_default(name)]
    if alone and (other := [name for name in given if name not in (alone, *ALONE[alone])]):
        made.error(f"--{alone} is of a sweep that is there and asks for nothing anew: no --{other[0]} goes with it")
    check_range("--retries", options.retries, 0)
    from sweeps import driver, engine, request, sweep
    from training import run_directory

    if options.cell is not None:
        return run_cells(options.cell)
    command.start(platform="cpu")  # a sweep itself needs no device, and leaves those that there are to its runs
    workdir = run_directory.locate(options.workdir)
    if options.status:
        return sweep.status(workdir)
    resources = engine.Resources(options.hosts, options.accelerators, options.minutes)
    settings = request.pairs("--option", options.option)
    try:
        if options.cancel:
            chosen = engine.find(options.engine)(workdir, resources, settings, options.workers)
            print(f"{driver.cancel(chosen, sweep.there(workdir))} jobs of {options.engine} are told to stop")
            return 0
        asked = requested(options)
        chosen = engine.find(options.engine)(workdir, resources, settings, options.workers)
        if options.show_config:
            sweep.show(asked, chosen)
            return 0
        if options.detach and not chosen.lasting:
            made.error(
                f"jobs of --engine={options.engine} end with the command: run it under nohup or tmux instead of --detach"
            )
        return sweep.run(asked, chosen, arguments, retries=options.retries, detach=options.detach)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return command.STOPPED


def run_cells(directories: list[str]) -> int:
    """Runs cells one after the other. Returns the exit status: 1 where any has failed or diverged, else 0; or that of a stop,
    behind which no other cell begins."""
    from sweeps import cells, runner

    given = [cells.load(directory) for directory in directories]
    if len(given) > 1 and any(cell.hosts > 1 for cell in given):
        raise UserError("--cell takes one cell of several hosts at a time: the processes of a cell begin together")
    command.start(distributed=given[0].hosts > 1)
    failed = 0
    for cell in given:
        if (status := runner.run(cell)) == command.STOPPED:
            return status
        failed = max(failed, status)
    return failed


def requested(options: argparse.Namespace):
    """What the command line asks for, a `sweeps.request.Request`."""
    from sweeps import axes, fits, ladder, request
    from training import run_directory

    over, points = axes.expand(request.pairs("--over", options.over), options.draw, options.draw_seed)
    if options.cells is not None:
        points = axes.listed(options.cells, points)
    settings, widths = request.pairs("--set", options.set), request.whole_numbers("--ladder", options.ladder)
    if widths:
        over, settings = ladder.rungs(widths, over, settings)
    asked = request.Request(
        config=options.config,
        axes=over,
        points=points,
        workdir=run_directory.locate(options.workdir),
        settings=settings,
        match=options.match,
        budget=options.budget,
        lengths=request.whole_numbers("--lengths", options.lengths),
        score=tuple(options.score),
        allow_other_data=options.allow_other_data,
        hosts=options.hosts,
        best_of=request.names("--best_of", options.best_of),
        seeds_of_best=options.seeds_of_best,
        reference=options.reference,
        fit=fits.names(options.fit),
        base_width=widths[0] if widths else None,
    )
    budgets = ladder.numbers("--budgets", options.budgets)
    return ladder.climb(asked, budgets) if budgets else asked


if __name__ == "__main__":
    command.run(main)

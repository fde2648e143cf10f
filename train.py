"""Trains a sequence model.

    python train.py --config=configs/lm.py --workdir=runs/first
    python train.py --config=configs/lm.py:mixer=mamba --workdir=runs/mamba --config.train.steps=2000
    python train.py --config=configs/lm.py:size=medium --config.mesh.fsdp=16 --compile_for=v5e:16x16

Any key of the configuration is an option: --config.KEY=VALUE. Given twice, the last counts. Its sections are

    seed       of the parameters and of the order of the data
    task       what is learned: the data and how its rows are made
    model      width, depth, the pattern of mixers and their hyperparameters
    optimizer  rule, learning rate and schedule
    train      steps, batch, precision, and when to log, evaluate and save
    mesh       how the devices are arranged

and --show_config prints all keys, their values and what they are. The same command goes on with the run in --workdir.
--compile_for compiles the step for devices that need not be here and says what they would need and send; it reads no data.
Exit status: 0, all steps are done; 1, an error, or a step that does not fit; 75, stopped before the end: run it again.
"""

from common import command, hosts, roll_call
from common.errors import UserError

# The help is there at once: what takes seconds to import is imported when the command line has been read.


def parser() -> command.Parser:
    """The command line, but for the keys of the configuration."""
    made = command.Parser(__doc__, usage="train.py [options] [--config.KEY=VALUE ...]")
    add = made.add_argument
    add("--config", default="configs/lm.py", metavar="FILE[:ARGUMENT]", help="experiment file (default: configs/lm.py)")
    add("--workdir", metavar="DIR", help="directory of the run: configuration, metrics, checkpoints")
    add(
        "--init_from",
        metavar="RUN|hf:DIR",
        help="start from the weights, and with the model, of a run or of a checkpoint in Hugging Face's format",
    )
    add("--show_config", action="store_true", help="print the resolved configuration and exit")
    add(
        "--allow_other_data", action="store_true", help="go on with a run although its data has changed; it is recorded"
    )
    add(
        "--compile_for",
        metavar="DEVICES",
        help="compile and print a page instead of training: for TPUs, as in v5e:16x16, or GPUs, as in h100:8",
    )
    add = made.add_argument_group("several hosts (docs/pods.md)").add_argument
    add("--distributed", action="store_true", help="join the other processes of a pod or of several hosts")
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, where JAX does not find it by itself")
    add("--num_processes", metavar="N", help="how many processes there are")
    add("--process_id", metavar="I", help="which of them this one is, from 0")
    add("--start_seconds", type=float, metavar="N", help="that all processes have to come (300)")
    return made


def main(arguments: list[str]) -> int:
    made = parser()
    options, keys = made.parse_known_args(arguments)
    if options.compile_for is not None:
        return compile_for(options, keys)
    import jax

    from evaluation import report
    from training import command_line, config, initial, loop, run_directory

    command.start(vars(options))
    source = None if options.init_from is None else initial.find(options.init_from, options.workdir)
    chosen = command_line.parse([f"--config={options.config}", *keys], source)
    if not options.show_config:
        if options.workdir is None:
            made.error("--workdir=DIR is missing: it says where the run is to be")
        run_directory.locate(options.workdir)
    resolved = config.resolve(chosen)
    if options.show_config:
        print(command_line.show(resolved))
        return 0
    ended = loop.train(resolved, options.workdir, allow_other_data=options.allow_other_data)
    if not ended.finished:
        return command.STOPPED
    scored = resolved.train.eval_batches * resolved.train.batch_size
    hosts.leave()  # floors may take long, and one process finds them
    # They are those of the whole split.
    if jax.process_index() == 0 and (not scored or scored >= resolved.task.num_examples("valid")):
        report.floors(resolved.task, "valid", ended.result)
    return 0


def compile_for(options, keys: list[str]) -> int:
    """What --compile_for does instead of training."""
    from compilation import commands, steps, targets
    from training import command_line, config, initial, run_directory

    for name in ("show_config", "allow_other_data", "distributed", *roll_call.NAMES, "start_seconds"):
        if getattr(options, name) not in (None, False):
            raise UserError(f"--{name} does not go with --compile_for: leave it out")
    targets.parse(options.compile_for)
    command.start(platform="cpu", cache=False)
    workdir = None if options.workdir is None else run_directory.locate(options.workdir)
    source = None if options.init_from is None else initial.find(options.init_from, workdir)
    chosen = command_line.parse([f"--config={options.config}", *keys], source)
    target = targets.find(options.compile_for)
    return commands.show(config.resolve(chosen, with_data=False), target, [steps.train], workdir)


if __name__ == "__main__":
    command.run(main)

"""Scores a checkpoint, samples from it, or diagnoses its mixers.

    python eval.py --workdir=runs/first
    python eval.py --workdir=runs/first --split=valid --checkpoint=latest --lengths=128,256,512,1024
    python eval.py --workdir=runs/first --task=passkey --set task.depth=0.1,0.5,0.9 task.length=256,1024
    python eval.py --workdir=runs/first --suite=recall
    python eval.py --hf=mamba-130m-hf --task=language_model --set task.corpus=shakespeare
    python eval.py --workdir=runs/first --sample="KING HENRY:" --length=400 --temperature=0.8 --top_p=0.95
    python eval.py --workdir=runs/first --prompts=prompts.txt --samples=3 --stop=$'\\n\\n'
    python eval.py --hf=mamba-130m-hf --sample="The capital of France is"
    python eval.py --workdir=runs/first --stream --split=valid
    python eval.py --workdir=runs/first --diagnose
    python eval.py --workdir=runs/first --compile_for=v5e:2x4
    python eval.py --config=configs/lm.py:size=medium --compile_for=h100:8
    python eval.py --workdir=runs/first --show_config

The data of a run is part of it: where other data is here, nothing is done unless --allow_other_data is given.
--compile_for compiles the steps of scoring and of decoding for devices that need not be here, and says what they would need; it
needs no checkpoint and no data. Exit status 1 is then also that of a step that does not fit.
Exit status: 0, done (also where a sample is printed and cannot be kept, which is said); 1, an error.
"""

import argparse

from common import command
from common.errors import UserError, check_choice, check_range

# The help is there at once: what takes seconds to import is imported when the command line has been read.

# The options of each action, and what they are where they are not given.
SCORING = {"split": "test", "lengths": [], "batches": 0}
SCORING |= {"task": "", "set": [], "suite": "", "hf": "", "output": None}
SAMPLING = {"length": 400, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}
SAMPLING |= {"samples": 1, "stop": [], "batch_size": 16}
DIAGNOSING = {"lengths": []}
STREAMING = {"split": "test", "lengths": []}
COMPILING = {"config": None}
JOINING = ("distributed", "coordinator_address", "num_processes", "process_id", "start_seconds")
LOADING = {"checkpoint": "best", "allow_other_data": False}


def parser() -> command.Parser:
    """The command line. What is not given is not in the result, so that it can be told from what is."""
    parser = command.Parser(__doc__, argument_default=argparse.SUPPRESS, usage="eval.py --workdir=DIR [options]")
    add = parser.add_argument_group("the run").add_argument
    add("--workdir", metavar="DIR", help="the run's directory")
    add("--hf", metavar="DIR", help="a checkpoint in Hugging Face's format, in place of a run, to score or sample")
    add("--checkpoint", metavar="STEP", help="best (the default), latest or a step")
    add("--allow_other_data", action="store_true", help="go on where the data that is here is not the data of the run")
    add = parser.add_argument_group("several hosts (docs/pods.md)").add_argument
    add("--distributed", action="store_true", help="this process is one of several (a pod, several hosts)")
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0, where JAX does not find it by itself")
    add("--num_processes", metavar="N", help="how many processes there are")
    add("--process_id", metavar="I", help="which of them this one is, from 0")
    add("--start_seconds", type=float, metavar="N", help="that all processes have to come (300)")
    add = parser.add_argument_group("scoring, which is done if nothing else is asked for").add_argument
    add("--split", help=f"what is scored: train, valid or test (the default is {SCORING['split']})")
    add(
        "--lengths",
        type=command.whole_numbers,
        metavar="N,N,...",
        help="context lengths, by default the one of training; for --diagnose one, by default at most 512; for --stream "
        "one, of the pieces",
    )
    add(
        "--task",
        metavar="NAME,...",
        help="tasks to score in place of the run's own: files of data/tasks/, or paths that end with .py",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        metavar="task.KEY=VALUE,...",
        help="hyperparameters of the tasks (NAME.KEY for one of several); values with commas between make a grid",
    )
    add("--suite", metavar="NAME", help="tasks and settings that are scored together, a file of evaluation/suites/")
    add("--output", metavar="DIR", help="where grids are written; by default the run's evaluations/")
    add("--batches", type=int, metavar="N", help="score only the first N batches; 0, the default, is the whole split")
    add = parser.add_argument_group("other actions, one at a time").add_mutually_exclusive_group().add_argument
    add("--sample", metavar="PROMPT", help="continue a text, print it and keep it in the run's samples/")
    add("--prompts", metavar="FILE", help="continue each line of a file, or each prompt of a .jsonl file, likewise")
    add("--stream", action="store_true", help="score the split as one text, read from end to end with the carry")
    add("--diagnose", action="store_true", help="measure reach, gradients and spectra of the mixers, into diagnostics/")
    add(
        "--compile_for",
        metavar="DEVICES",
        help="compile for TPUs, as in v5e:2x4, or GPUs, as in h100:8",
    )
    add("--show_config", action="store_true", help="print the run's resolved configuration, with comments")
    add = parser.add_argument_group("with --sample and --prompts").add_argument
    add("--length", type=int, metavar="N", help=f"number of tokens to generate ({SAMPLING['length']})")
    add("--temperature", type=float, help=f"divides the logits; 0 takes the likeliest ({SAMPLING['temperature']})")
    add("--top_k", type=int, metavar="K", help="sample from the K likeliest tokens; 0, the default, from all")
    add("--top_p", type=float, metavar="P", help="sample from the likeliest tokens that reach this probability (1)")
    add("--seed", type=int, help="the source of the draws of the first sample; the next has the next seed (0)")
    add("--samples", type=int, metavar="N", help="texts of each prompt (1)")
    add("--stop", action="append", metavar="TEXT", help="end a text before this one; may be given several times")
    add("--batch_size", type=int, metavar="N", help=f"texts that are made together ({SAMPLING['batch_size']})")
    add = parser.add_argument_group("with --compile_for").add_argument
    add("--config", metavar="FILE[:ARGUMENT]", help="an experiment file, and --config.KEY=VALUE, where there is no run")
    return parser


def choose(given: dict) -> tuple[str, dict]:
    """The action that is asked for and all its options. Raises a UserError for an option of another action."""
    actions = {
        "sample": SAMPLING | {"hf": ""},
        "prompts": SAMPLING | {"hf": ""},
        "diagnose": DIAGNOSING,
        "stream": STREAMING,
        "compile_for": COMPILING,
        "show_config": {},
    }
    action = next((name for name in actions if name in given), "score")
    options = actions.get(action, SCORING)
    if action not in ("show_config", "compile_for"):
        options = LOADING | options
    joining = () if action == "compile_for" else JOINING  # nothing runs
    for name in given:
        if name not in (action, "workdir", *joining, *options):
            raise UserError(f"--{name} does not go with {'scoring' if action == 'score' else f'--{action}'}")
        if name in LOADING and given.get("hf"):
            raise UserError(f"--{name} does not go with --hf, which holds one checkpoint and no data")
    return action, options | given


def check(action: str, options: dict) -> None:
    """Raises a UserError for options that are out of range or do not go together."""
    from data.task import Task
    from evaluation import settings
    from training.run_directory import read_config

    if ("workdir" in options) == bool(options.get("hf")):
        raise UserError("give --workdir=DIR, a run, or --hf=DIR, a checkpoint in Hugging Face's format")
    if action == "stream" and (len(options["lengths"]) > 1 or options.get("distributed") or "workdir" not in options):
        raise UserError(
            "--stream goes with --workdir, one of --lengths (of the pieces) and one process, which has one row"
        )
    if action == "score":
        check_choice("--split", options["split"], Task.splits)
        check_range("--batches", options["batches"], 0)
        if options["output"] is not None and not (options["task"] or options["set"] or options["suite"]):
            raise UserError("--output is where grids are written: it goes with --task, --set or --suite")
        if options["lengths"] and any(item.partition("=")[0].endswith(".length") for item in options["set"]):
            raise UserError("--lengths and --set task.length say the same: keep one")
        own = None
        if not options["hf"]:
            # The run is looked at only where its task must be known.
            known = not options["set"] or options["task"] or options["suite"]
            own = "" if known else read_config(options["workdir"])["task"].get("name", "")
        settings.check(options["task"], options["set"], options["suite"], own)


def main(arguments: list[str]) -> int | None:
    made = parser()
    given, keys = made.parse_known_args(arguments)
    action, options = choose(vars(given))
    if action == "compile_for":
        return compile_for(options, keys)
    if keys:
        made.error(f"unrecognized arguments: {' '.join(keys)}")
    check(action, options)
    from evaluation import diagnosing, grids, sampling, scoring, settings, streaming
    from evaluation.loading import configuration, load, load_hf
    from training.command_line import show

    chosen = {name: options[name] for name in SAMPLING if name in options}
    prompts = []
    if action in ("sample", "prompts"):
        sampling.check(**chosen)
        prompts = [options["sample"]] if action == "sample" else sampling.read_prompts(options["prompts"])
    command.start(options)
    if action == "show_config":
        print(show(configuration(options["workdir"])))
        return None
    if options.get("hf"):
        run = load_hf(options["hf"])
    else:
        run = load(options["workdir"], options["checkpoint"], options["allow_other_data"], alone=action == "stream")
    if prompts:
        sampling.sample(run, prompts, **chosen)
    elif action == "stream":
        streaming.stream(run, options["split"], sum(options["lengths"]))
    elif action == "diagnose":
        diagnosing.diagnose(run, options["lengths"])
    elif grid := settings.asked(run, options["task"], options["set"], options["suite"], options["lengths"]):
        leave_out = bool(options["suite"])
        grids.score_settings(run, grid, options["split"], options["batches"], options["output"], leave_out)
    else:
        scoring.score(run, options["split"], options["lengths"], options["batches"])
    return None


def compile_for(options: dict, keys: list[str]) -> int:
    """What --compile_for does: the model is that of a run, on all devices by rows, or of a configuration on its own mesh."""
    from compilation import commands, steps, targets
    from evaluation.loading import configuration
    from training import command_line
    from training.config import resolve
    from training.run_directory import locate

    if "workdir" not in options and options["config"] is None:
        raise UserError("give --workdir=DIR, a run, or --config=FILE, an experiment file")
    targets.parse(options["compile_for"])
    command.start(platform="cpu", cache=False)
    workdir = options.get("workdir")
    if options["config"] is not None:
        config = resolve(command_line.parse([f"--config={options['config']}", *keys]), with_data=False)
    elif keys:
        raise UserError(f"{' '.join(keys)!r} belongs to no option: a run has its configuration already")
    else:
        config = configuration(workdir, with_data=False, mesh={"data": -1})
    target = targets.find(options["compile_for"])
    return commands.show(config, target, [steps.score, steps.decode], workdir and locate(workdir))


if __name__ == "__main__":
    command.run(main)

"""The headlines of papers by their shape, on this machine: each is a ratio that one command measures, with a plot.

    python -m benchmarks.headlines --folder=headlines                     all, with pictures and headlines.json in the folder
    python -m benchmarks.headlines --what=flash,decode --folder=headlines
    python -m benchmarks.headlines --tiny --folder=/tmp/headlines         seconds, to see that it runs; its ratios say nothing

flash      a training step of FLASH and of GAU beside a Transformer of the same width and number of parameters, as many tokens in
           a batch at each context (arXiv 2202.10447)
decode     a token of attention, linear attention and Mamba after a context, and the bytes of their carries (2006.16236,
           2312.00752); the cache has room for the context, and its places count as read
generate   a token of a state space as a recurrence, by the convolution over all that was before, and of attention with its cache
           (S4, 2111.00396; the layer is S4D)
performer  Performer beside attention, forward and backward, time and temporary memory by length (2009.14794)
sparse     Reformer, the Sparse Transformer, Longformer and local attention beside attention, the same (2001.04451, 1904.10509,
           2004.05150)
linear     mixers that are said to be linear in the length, the same, to longer lengths
dilution   how much of what a layer reads is near, of softmax, linear and TransNormer's attention in small language models
           that are trained alike on Python's standard library (2210.10340)

Times are CPU time of one core, medians over rounds in which the alternatives take turns. A slope is that of the logarithm of the
time or the memory over that of the length between the two longest lengths: 1 is linear, 2 quadratic.
"""

import functools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks.timing import Clock, environment, settle_process
from common import command
from common.errors import UserError, check_choice, check_range
from configs import common, lm
from evaluation.diagnostics.measures import measure, rows_of
from evaluation.loading import load
from models import mixer as mixers
from training import config, loop, setup
from training.step import make_train_step

# Panel -> series -> length -> value.
Curves = dict[str, dict[str, dict[int, float]]]

SPARSE = ("reformer", "sparse_attention", "longformer", "local_attention")
LINEAR = ("linear_attention", "gla", "gated_delta_net", "mamba", "lru", "based")


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--what", default=",".join(HEADLINES), help="of: " + ", ".join(HEADLINES))
    parser.add_argument("--folder", type=Path, default=Path("headlines"), help="for the pictures and the numbers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--longest", type=int, default=4096, help="length, of `linear` four times as much")
    parser.add_argument("--steps", type=int, default=300, help="of training, for `dilution`")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, one round, this process as it is")
    options = parser.parse_args(arguments)
    names = options.what.split(",")
    for name in names:
        check_choice("--what", name, HEADLINES)
    check_range("--rounds", options.rounds, 1)
    if options.tiny:
        options.rounds, options.width, options.longest, options.steps = 1, 32, 128, 2
    elif options.longest < 64:
        raise UserError(f"--longest={options.longest} must be at least 64")
    else:
        settle_process()
    flags.FLAGS(sys.argv[:1])  # the input pipeline reads absl's flags
    options.folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        curves, lines = HEADLINES[name](options)
        found[name] = {"curves": curves, "ratios": lines}
        print(f"\n{name}")
        for panel, series in curves.items():
            print(table(panel, series))
        print("\n".join(lines), flush=True)
        draw(options.folder / f"{name}.png", name, curves)
        kept = {
            "options": {**vars(options), "folder": str(options.folder)},
            "environment": environment(("jax", "flax")),
        }
        (options.folder / "headlines.json").write_text(json.dumps(kept | {"found": found}, indent=1))


def lengths(options, longest: int | None = None) -> list[int]:
    """Four powers of two up to the longest; two where sizes are tiny."""
    last = int(math.log2(longest or options.longest))
    return [2**i for i in range(last - (1 if options.tiny else 3), last + 1)]


def take_turns(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds of each call, the median over the rounds."""
    clock, samples = Clock(), {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(clock.per_call(call, 1))
    return {name: statistics.median(values) for name, values in samples.items()}


def slope(series: dict[int, float]) -> float:
    """Of the logarithm of the value, between the two longest lengths."""
    (t0, y0), (t1, y1) = sorted(series.items())[-2:]
    return math.log(y1 / y0) / math.log(t1 / t0) if y0 > 0 and y1 > 0 else math.nan


def forward_and_backward(name: str, length: int, width: int):
    """(call, bytes of temporaries) of one mixer, of one row."""
    mixer = mixers.create(name, width, rngs=nnx.Rngs(0), causal=mixers.find(name).causal, length=length)
    graph, params = nnx.split(mixer)
    x, weight = jax.random.normal(jax.random.key(0), (2, 1, length, width))
    loss = lambda params, x: jnp.sum(nnx.merge(graph, params)(x)[0] * weight)
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    return functools.partial(program, params, x), program.memory_analysis().temp_size_in_bytes


def by_length(options, names: tuple[str, ...], longest: int | None = None) -> tuple[Curves, list[str]]:
    """Time and temporary memory of mixers, forward and backward."""
    curves: Curves = {"milliseconds": {name: {} for name in names}, "megabytes": {name: {} for name in names}}
    for length in lengths(options, longest):
        programs = {name: forward_and_backward(name, length, options.width) for name in names}
        seconds = take_turns({name: call for name, (call, _) in programs.items()}, options.rounds)
        for name in names:
            curves["milliseconds"][name][length] = 1e3 * seconds[name]
            curves["megabytes"][name][length] = programs[name][1] / 1e6
        jax.clear_caches()
    lines = []
    for name in names:
        time, memory = (curves[panel][name] for panel in curves)
        line = f"{name}: slope of the time {slope(time):.2f}, of the memory {slope(memory):.2f}"
        if name != "attention" and "attention" in names:
            line += "; attention takes " + over(curves["milliseconds"]["attention"], time) + " times its time"
        lines.append(line)
    return curves, lines


def over(one: dict[int, float], other: dict[int, float]) -> str:
    """ "0.52 (at 512) to 3.10 (at 4096)": a ratio at the shortest and the longest length."""
    first, last = min(one), max(one)
    return f"{one[first] / other[first]:.2f} (at {first}) to {one[last] / other[last]:.2f} (at {last})"


def flash(options) -> tuple[Curves, list[str]]:
    """Training steps of whole models. Two blocks of GAU or FLASH stand for one of attention and one of an MLP."""
    tokens, seconds, sizes = options.longest, {name: {} for name in ("attention", "gau", "flash")}, {}
    for length in lengths(options):
        calls = {}
        for name in seconds:
            calls[name], sizes[name] = training_step(name, length, tokens // length, options)
        for name, value in take_turns(calls, options.rounds).items():
            seconds[name][length] = 1e3 * value
        jax.clear_caches()
    lines = [f"parameters: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}"]
    for name in ("gau", "flash"):
        lines.append(f"a Transformer's step takes {over(seconds['attention'], seconds[name])} times that of {name}")
    return {"milliseconds of a step": seconds}, lines


def training_step(mixer: str, length: int, batch: int, options):
    """(call, parameters) of a step with AdamW; each call is the first step of the same state."""
    chosen = common.experiment(
        common.task_section("language_model", corpus="stdlib", length=length),
        common.model((mixer,), options.width, 2),
        common.optimizer(1e-3, 1000),
        common.train(1000, batch),
    )
    if mixer != "attention":  # about as much of the width as the papers' 128 of 768; more would be more parameters
        chosen.model.mixer[mixer].key_size = options.width // 4
    resolved = config.resolve(chosen)
    built = setup.build(resolved)
    with jax.set_mesh(built.mesh):
        state = built.init(jax.random.key(0))
        rows = setup.batches(resolved, built, "train", batch, for_training=True)[0]
        step = make_train_step(built, random=resolved.model.random)
        program = step.function.lower(state, rows, step.placed).compile()
    kept = [state]

    def call():  # the step takes the buffers of the state that it is given
        with jax.set_mesh(built.mesh):
            kept[0], metrics = program(kept[0], rows, step.placed)
        return metrics

    return call, sum(x.size for x in jax.tree.leaves(state["params"]))


def one_token(name: str, context: int, width: int):
    """(call, bytes of the carry) of a mixer that reads a token behind a context of zeros."""
    mixer = mixers.create(name, width, rngs=nnx.Rngs(0), length=context)
    graph, params = nnx.split(mixer)
    carry = mixer.initial_carry(1, context)
    x = jax.random.normal(jax.random.key(0), (1, 1, width))
    program = jax.jit(lambda params, x, carry: nnx.merge(graph, params)(x, carry)).lower(params, x, carry).compile()
    return functools.partial(program, params, x, carry), sum(leaf.nbytes for leaf in jax.tree.leaves(carry))


def decode(options) -> tuple[Curves, list[str]]:
    names = ("attention", "linear_attention", "mamba")
    curves: Curves = {
        "milliseconds of a token": {n: {} for n in names},
        "kilobytes of the carry": {n: {} for n in names},
    }
    for context in lengths(options, 4 * options.longest):
        programs = {name: one_token(name, context, options.width) for name in names}
        seconds = take_turns({name: call for name, (call, _) in programs.items()}, 10 * options.rounds)
        for name in names:
            curves["milliseconds of a token"][name][context] = 1e3 * seconds[name]
            curves["kilobytes of the carry"][name][context] = programs[name][1] / 1e3
    lines = []
    for panel, series in curves.items():
        lines += [f"{panel}: attention {over(series['attention'], series[name])} times {name}" for name in names[1:]]
    return curves, lines


def generate(options) -> tuple[Curves, list[str]]:
    names = {"recurrence": "s4d", "attention with its cache": "attention"}
    series = {name: {} for name in (*names, "convolution")}
    for context in lengths(options, 4 * options.longest):
        calls = {name: one_token(mixer, context, options.width)[0] for name, mixer in names.items()}
        layer = mixers.create("s4d", options.width, rngs=nnx.Rngs(0), length=context)
        graph, params = nnx.split(layer)
        x = jax.random.normal(jax.random.key(0), (1, context, options.width))
        run = jax.jit(lambda params, x, graph=graph: nnx.merge(graph, params)(x)[0][:, -1])
        calls["convolution"] = functools.partial(run, params, x)
        for name, seconds in take_turns(calls, options.rounds).items():
            series[name][context] = 1e3 * seconds
    others = ("convolution", "attention with its cache")
    lines = [f"{name}: {over(series[name], series['recurrence'])} times the recurrence" for name in others]
    return {"milliseconds of a token": series}, lines


def dilution(options) -> tuple[Curves, list[str]]:
    """The share of the influence on a token that comes from at most d tokens before it, in the first layer."""
    names, series, spread = ("attention", "linear_attention", "diag_attention+norm_attention"), {}, {}
    for name in names:
        chosen = lm.get_config(f"mixer={name},corpus=stdlib")
        chosen.model.update({"width": options.width // 2, "depth": 2})
        chosen.optimizer.warmup_steps = options.steps // 10
        chosen.train.update({"steps": options.steps, "eval_every": 0, "checkpoint_every": options.steps})
        chosen.train.log_every = max(1, options.steps // 4)
        with tempfile.TemporaryDirectory() as folder:
            loop.train(config.resolve(chosen), folder)
            run = load(folder, "latest")
            batch = rows_of(run.config.task, "valid", 2)
            whole = run.built.merge(jax.tree.map(jnp.asarray, jax.device_get(run.params)))
            layers = measure(whole, list(name.split("+")) * (2 // len(name.split("+"))), batch, causal=True)["layers"]
        local = layers[0]["locality"]
        series[name] = {int(d): share for d, share in local["within"].items() if int(d)}
        spread[name] = math.exp(local["entropy"])
    lines = [f"{name}: influence as even as over {value:.1f} tokens" for name, value in spread.items()]
    lines.append(f"linear over softmax attention: {spread['linear_attention'] / spread['attention']:.2f}")
    return {"share within d tokens": series}, lines


HEADLINES = {
    "flash": flash,
    "decode": decode,
    "generate": generate,
    "performer": lambda options: by_length(options, ("attention", "performer")),
    "sparse": lambda options: by_length(options, ("attention", *SPARSE)),
    "linear": lambda options: by_length(options, LINEAR, 4 * options.longest),
    "dilution": dilution,
}


def table(panel: str, series: dict[str, dict[int, float]]) -> str:
    """A row for each series."""
    columns = sorted(next(iter(series.values())))
    lines = [f"| {panel} | " + " | ".join(map(str, columns)) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, values in series.items():
        lines.append(f"| {name} | " + " | ".join(f"{values[x]:.3g}" for x in columns) + " |")
    return "\n".join(lines)


def draw(path: Path, title: str, curves: Curves) -> None:
    """A picture with a panel for each; none, and that is said, where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no {path.name}: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), constrained_layout=True)
    for axes, (panel, series) in zip(np.atleast_1d(panels), curves.items(), strict=True):
        for name, values in series.items():
            axes.plot(*zip(*sorted(values.items()), strict=True), "o-", label=name)
        axes.set(xscale="log", xlabel="d" if title == "dilution" else "length", ylabel=panel)
        if title != "dilution":
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    command.run(main)

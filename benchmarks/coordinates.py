"""Coordinate check: how the size of what a model computes, and of how much training changes it, follows the width.

    python -m benchmarks.coordinates --config=configs/lm.py:mixer=mamba --widths=64,128,256
    python -m benchmarks.coordinates --config=configs/lm.py:mixer=gla --config.optimizer.name=adamw --learning_rate=3e-3
    python -m benchmarks.coordinates --config=configs/lm.py:mixer=attention --over=depth --sizes=2,4,8,16 --png=depth.png

Trains each size for a few steps with a constant and large learning rate, without the rule of docs/scaling.md and with it (the
smallest size is the base), and looks at the same held-out batch before and after. A learning rate can hold for all widths only
if the change is as large at all of them (arXiv 2203.03466, appendix D.1). Printed is the slope of log2 RMS over log2 size,
of each quantity at its first value and of its change: every map's output, by its parameter and the layer; the residual stream
behind each repeat of the pattern; what mixers that stream carry on; the logits. Heads have the base's size at every width.

With the rule, changes within +-0.15 are flat, in 3 steps or more. Logits may fall: those of the first values do, as width^-0.5,
and it takes some steps until what is learned outweighs them. A state may follow the sample of time constants that few heads draw.
"""

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.extend.core import Literal, jaxprs_in_params
from ml_collections import ConfigDict

from common import command
from common.errors import UserError, check_range
from models.sequence_model import SequenceModel
from sweeps import sizing
from training import command_line, setup
from training.config import Config, resolve

FLAT = 0.15  # the largest slope that passes
LOOPS = ("scan", "while", "cond")


class Seen(nnx.Module):
    """`models.stack.Stack` without its scan, which shows the stream and the carries behind each repeat to `see(name, x)`."""

    def __init__(self, stack, see):
        self.stack = stack
        self.see = see

    def __call__(self, x, carry=None, *, segment_ids=None, positions=None, key=None):
        where = {"segment_ids": segment_ids, "positions": positions}
        streams = {name: shared(x, **where) for name, shared in self.stack.shared.items()}
        for i, (run, repeat) in enumerate(self.stack.runs()):
            x, own, streams, *_ = run(x, None if carry is None else carry[i], streams, repeat=repeat, **where)
            self.see(f"stream {i + 1}", x)
            for path, leaf in jax.tree_util.tree_leaves_with_path(own):
                name = jax.tree_util.keystr(path[2:], simple=True, separator="/")
                if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 1:
                    self.see(f"carry {i + 1} {path[0].idx}/{name}", leaf)
        return x, carry, None, {}


def observer(merge: Callable[[dict], SequenceModel], params: dict, inputs: jax.Array, streams: bool) -> Callable:
    """What is looked at, as a function of the parameters: arrays by name.

    Args:
      merge: of `training.state.Built`.
      params: arrays or shapes.
      inputs: of the batch that is looked at.
      streams: whether the model takes a carry.
    """

    def forward(params):
        found = {}
        model = merge(params)
        carry = model.initial_carry(*inputs.shape) if streams else None
        model.stack = Seen(model.stack, found.__setitem__)
        found["logits"], _ = model(inputs, carry)
        return found

    closed, shape = jax.make_jaxpr(forward, return_shape=True)(params)
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(params))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]

    def look(params):
        maps = []
        results = _run(closed.jaxpr, closed.consts, list(zip(jax.tree.leaves(params), names)), maps)
        found, counts = {}, {}
        for name, value in maps:
            if name in ("embedding", "head"):
                continue  # the logits, but for their factor
            counts[name] = counts.get(name, 0) + 1
            found[f"{name.removeprefix('stack/stacked/blocks/')} {counts[name]}"] = value
        return found | jax.tree.unflatten(jax.tree.structure(shape), [value for value, _ in results])

    return jax.jit(look, compiler_options=quick())


def quick() -> dict | None:
    """Compiling for the CPU takes longer than some steps do, optimised or not."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def _run(jaxpr, consts, arguments, maps) -> list[tuple]:
    """Computes a jaxpr, and adds the products with parameters to `maps`; values go with the parameter that they are made of."""
    known = {var: (value, None) for var, value in zip(jaxpr.constvars, consts)}
    known |= dict(zip(jaxpr.invars, arguments))
    read = lambda var: (var.val, None) if isinstance(var, Literal) else known[var]
    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        inner = list(jaxprs_in_params(eqn.params))
        if eqn.primitive.name not in LOOPS and inner and len(inner[0].invars) == len(operands):
            closed = [p for p in eqn.params.values() if getattr(p, "jaxpr", None) is inner[0]]
            outputs = _run(inner[0], closed[0].consts if closed else [], operands, maps)
        else:
            values = eqn.primitive.bind(*(v for v, _ in operands), **eqn.primitive.get_bind_params(eqn.params))
            values = values if eqn.primitive.multiple_results else [values]
            parameters = {name for _, name in operands if name}
            if eqn.primitive.name == "dot_general" and len(parameters) == 1:
                maps.append((*parameters, values[0]))
            # What is no larger than the parameter that it is made of is the parameter in another form.
            size = max((v.size for v, name in operands if name), default=0)
            same = len(parameters) == 1 and eqn.primitive.name != "dot_general"
            same = same and all(np.size(v) <= size for v in [*(v for v, _ in operands), *values])
            outputs = [(value, *parameters) if same else (value, None) for value in values]
        known |= dict(zip(eqn.outvars, outputs))
    return [read(var) for var in jaxpr.outvars]


def sized(chosen: ConfigDict, key: str, size: int, base: int, rule: bool, steps: int) -> Config:
    """The configuration at a width or depth, its heads as large as those of the base."""
    config = copy.deepcopy(chosen)
    config.model[key] = size
    if rule:
        config.model[f"base_{key}"] = base
    if key == "width":
        config.update_from_flattened_dict(sizing.heads(config.model, base))
    config.optimizer.update({"schedule": "constant", "warmup_steps": 0})
    config.train.steps = steps
    return resolve(config)


def trajectory(config: Config, steps: int, seed: int) -> dict[str, tuple[float, float]]:
    """By quantity its RMS at first, and the RMS of its change over the steps."""
    built = setup.build(config, devices=jax.devices()[:1])
    loader = setup.batches(config, built, "train", config.train.batch_size, for_training=True)
    held = setup.batches(config, built, "valid", config.train.batch_size)
    state, probe = built.init(jax.random.key(seed)), next(iter(held))
    look = observer(built.merge, built.abstract["params"], probe["inputs"], config.model.streams)
    step = setup.train_step(config, built)
    run = jax.jit(step.function, compiler_options=quick())
    before, batches = jax.device_get(look(state["params"])), iter(loader)
    for _ in range(steps):
        state, _ = run(state, next(batches), step.placed)
    after = jax.device_get(look(state["params"]))
    rms = lambda x: math.sqrt(np.mean(np.square(x, dtype=np.float64)))
    return {name: (rms(value), rms(after[name] - value)) for name, value in before.items()}


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of log2 of the values over log2 of the sizes, by least squares; 0 where all values are 0."""
    if not any(values):
        return 0.0
    return float(np.polyfit(np.log2(sizes), np.log2(np.maximum(values, 1e-30)), 1)[0])


def check(chosen: ConfigDict, key: str, sizes: Sequence[int], steps: int, seeds: int = 1) -> list[dict[str, dict]]:
    """The coordinate check of a configuration, without the rule and with it.

    Args:
      chosen: as of `command_line.parse`.
      key: "width" or "depth".
      sizes: of the models; the first is the base.
      steps: of training.
      seeds: that RMS values are means over.

    Returns:
      for both, by quantity that all sizes have: "first" and "change", each a list of RMS values by size, and their slopes
      "first_slope" and "change_slope".
    """
    run = lambda size, rule: [
        trajectory(sized(chosen, key, size, sizes[0], rule, steps), steps, n) for n in range(seeds)
    ]
    base = run(sizes[0], False)  # which the rule leaves as it is
    results = []
    for rule in (False, True):
        runs, found = [base, *(run(size, rule) for size in sizes[1:])], {}
        for name in base[0]:
            if all(name in seen for own in runs for seen in own):
                first, change = ([math.fsum(seen[name][i] for seen in own) / seeds for own in runs] for i in (0, 1))
                slopes = {"first_slope": slope(sizes, first), "change_slope": slope(sizes, change)}
                found[name] = {"first": first, "change": change, **slopes}
        results.append(found)
    return results


def passes(name: str, change_slope: float) -> bool:
    """Whether the change of a quantity is as large at every size; logits may fall."""
    return change_slope <= FLAT and (change_slope >= -FLAT or name == "logits")


def draw(results: dict[str, dict], key: str, sizes: Sequence[int], path: Path) -> None:
    """A panel for each of the two: the change of every quantity over the size, over that at the first size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"maps": "C0", "stream": "C1", "carry": "C2", "logits": "C3"}
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for panel, (title, found) in zip(panels, results.items()):
        for name, line in found.items():
            kind = next((kind for kind in kinds if name.startswith(kind)), "maps")
            if line["change"][0]:
                grown = [value / line["change"][0] for value in line["change"]]
                wide = 2.5 if kind == "logits" else 1
                panel.plot(sizes, grown, color=kinds[kind], linewidth=wide, alpha=0.7, marker=".")
        panel.set(xscale="log", xlabel=key, title=title)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xticks(sizes, sizes)
        panel.minorticks_off()
        panel.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    panels[0].set_ylabel(f"RMS of the change, over that at {key} {sizes[0]}")
    panels[1].legend(handles=[pyplot.Line2D([], [], color=c, label=k) for k, c in kinds.items()], frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--over", default="width", choices=("width", "depth"), help="what grows (default: width)")
    parser.add_argument(
        "--widths",
        "--sizes",
        dest="sizes",
        type=command.whole_numbers,
        default=[64, 128, 256],
        help="the first is the base",
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, help="by default the configuration's")
    parser.add_argument("--json", type=command.new_file, help="where to write all numbers")
    parser.add_argument("--png", type=command.new_file, help="where to draw them")
    options, keys = parser.parse_known_args(arguments)
    flags.FLAGS(sys.argv[:1])  # the input pipeline reads absl's flags
    chosen = command_line.parse(keys)
    if options.learning_rate is not None:
        chosen.optimizer.learning_rate = options.learning_rate
    sizes = options.sizes
    if len(set(sizes)) < max(2, len(sizes)):
        raise UserError(f"a slope is over two different sizes or more; got --sizes={','.join(map(str, sizes))}")
    check_range("--steps", options.steps, 1)
    check_range("--seeds", options.seeds, 1)
    plain, scaled = check(chosen, options.over, sizes, options.steps, options.seeds)
    results = {"without the rule": plain, "with the rule": scaled}
    longest = max(map(len, plain))
    print(
        f"{options.over} {sizes}, {options.steps} steps of {chosen.optimizer.name} at {chosen.optimizer.learning_rate:g}"
    )
    print("slopes of the RMS at first and of the RMS of the change; * above what is flat")
    print(f"{'':<{longest}}{'without':>10}{'the rule':>10}{'with':>10}{'the rule':>10}   changes with the rule")
    for name in plain:
        line = f"{name:<{longest}}"
        for found in (plain[name], scaled[name]):
            mark = " " if passes(name, found["change_slope"]) else "*"
            line += f"{found['first_slope']:>+10.2f}{found['change_slope']:>+9.2f}{mark}"
        print(line + "   " + " ".join(f"{value:.2g}" for value in scaled[name]["change"]))
    if options.json:
        about = {"over": options.over, "sizes": sizes, "steps": options.steps, "seeds": options.seeds}
        options.json.write_text(json.dumps({**about, "config": chosen.to_dict(), **results}, indent=1))
    if options.png:
        draw(results, options.over, sizes, options.png)


if __name__ == "__main__":
    command.run(main)

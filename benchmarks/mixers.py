"""Puts every mixer into one table: exactness, size, speed, and what it learns from the same budget of text.

    python -m benchmarks.mixers                                     every mixer
    python -m benchmarks.mixers --mixers=mamba,gla --steps=2000     some, trained for longer
    python -m benchmarks.mixers --json=mixers.json                  goes on with the rows that the file lacks

Language models (causal mixers only) differ in nothing but the mixer: width, depth (twice the blocks for mixers that replace
the channel mixer), data, order, optimiser are the same, and the score is that of the whole validation split after the last
step. Speed is that of one mixer by itself, forward and backward: tokens for each second of one CPU core, or of the device.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.timing import Clock, earlier, environment
from common import command
from models import accounting
from models import mixer as mixers
from models.params import without_values

BATCH, LENGTH, ROUNDS = 8, 256, 5
COLUMNS = ("mixer", "error", "against", "lines", "tokens/s", "parameters", "carry bytes", "valid bits/byte")


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--mixers", default="", help="names joined by commas; all by default")
    parser.add_argument("--steps", type=int, default=200, help="of training; 0 for none")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--corpus", default="auto")
    parser.add_argument("--figures", default="", help="file of `make parity ARGS=--figures=FILE`")
    parser.add_argument("--json", type=command.new_file, help="file for the results; what it has is not measured again")
    options = parser.parse_args(arguments)
    names = options.mixers.split(",") if options.mixers else mixers.names()
    path = options.json
    rows = earlier(path, {key: getattr(options, key) for key in ("steps", "width", "depth", "corpus")}, "options")
    for name in names:
        mixers.find(name)
    for name in names:
        row = rows.setdefault(name, {"lines": count_lines(name)})
        steps = [("tokens/s", measure)]
        if options.steps and mixers.find(name).causal:
            steps.append(("valid bits/byte", train))
        for key, step in steps:
            if key not in row:
                try:
                    row |= step(name, options)
                except Exception as error:  # a failure is a row of the table, too
                    row[key] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
                print(f"{name}: {key} {row[key]}", flush=True)
        if path:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(
                json.dumps(
                    {"options": vars(options), "environment": environment(("jax", "flax")), "rows": rows},
                    indent=1,
                    default=str,
                )
            )
            temporary.replace(path)
    figures = json.loads(pathlib.Path(options.figures).read_text()) if options.figures else {}
    print(table({name: row | figures.get(name, {}) for name, row in rows.items() if name in names}))


def count_lines(name: str) -> int:
    """Lines of the mixer's file."""
    return len(pathlib.Path(sys.modules[mixers.find(name).__module__].__file__).read_text().splitlines())


def measure(name: str, options) -> dict:
    """Speed and size of one mixer."""
    cls = mixers.find(name)
    make = lambda: mixers.create(name, options.width, rngs=nnx.Rngs(0), causal=cls.causal, length=LENGTH)
    graph, params = nnx.split(make())
    shape = (BATCH, LENGTH, options.width)
    x, weight = jax.random.normal(jax.random.key(0), (2, *shape))
    loss = lambda params, x: jnp.sum(nnx.merge(graph, params)(x)[0] * weight)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
    jax.block_until_ready(run(params, x))
    clock = Clock()
    seconds = statistics.median(clock.per_call(lambda: run(params, x), 2) for _ in range(ROUNDS))
    abstract = jax.ShapeDtypeStruct((1, LENGTH, options.width), jnp.float32)
    mixer = without_values(make)
    cost = accounting.summarize(name, mixer, abstract, LENGTH, LENGTH if mixer.streams else None)
    jax.clear_caches()
    return {
        "tokens/s": round(BATCH * LENGTH / seconds),
        "parameters": cost.parameters,
        "carry bytes": cost.carry_bytes,
    }


def train(name: str, options) -> dict:
    """Bits per byte of a small language model."""
    depth = options.depth * (2 if mixers.find(name).replaces_channel_mixer else 1)
    flags = {
        "model.width": options.width,
        "model.depth": depth,
        "train.steps": options.steps,
        "train.log_every": max(1, options.steps // 10),
        "train.eval_every": 0,
        "train.checkpoint_every": 0,
        "optimizer.warmup_steps": options.steps // 10,
    }
    with tempfile.TemporaryDirectory() as workdir:
        program = [sys.executable, "train.py", f"--config=configs/lm.py:mixer={name},corpus={options.corpus}"]
        program += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in flags.items())]
        run = subprocess.run(program, capture_output=True, text=True, env=os.environ)
        if run.returncode:
            raise RuntimeError(run.stderr.strip().splitlines()[-1])
        lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    score = [record["bits_per_byte"] for record in records if record["split"] == "valid"][-1]
    if score != score:
        raise RuntimeError("the loss is not a number")
    return {"valid bits/byte": round(score, 4)}


def table(rows: dict) -> str:
    """A Markdown table, the best score first, then what has none."""
    order = sorted(rows, key=lambda name: (score(rows[name]), name))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name in order:
        row = {"mixer": f"`{name}`", **rows[name]}
        lines.append("| " + " | ".join(show(key, row.get(key)) for key in COLUMNS) + " |")
    return "\n".join(lines)


def score(row: dict) -> float:
    value = row.get("valid bits/byte")
    return value if isinstance(value, float) else float("inf")


def show(key: str, value) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return {"error": "{:.0e}", "valid bits/byte": "{:.3f}"}.get(key, "{:,}").format(value)


if __name__ == "__main__":
    command.run(main)

"""What an accelerator does with this code: whether all forms agree on it, and how fast steps, primitives and decoding are.

    python -m benchmarks.device --minutes=8 --json=device.json --page=docs/devices.md
    JAX_PLATFORMS=cpu python -m benchmarks.device --tiny --minutes=3

The most important comes first, each part is a process of its own that ends at a limit of its own (but for --tiny), and parts that
the minutes do not leave time for are named. A part that fails costs itself alone.

- forms: every form of every primitive on the device against the reference form on this machine's processor, in float32: outputs
  and all gradients, relative to the norm of the reference's; and in bfloat16, of inputs that are rounded for both.
- train: tokens per second of the training step of `configs/lm.py:size=130m`, with the share of the chip's peak that the model's
  FLOPs come to (MFU: three times those of the forward pass in matmul form), and the most memory in use beside what the
  compiler planned, which is what `train.py --compile_for` says.
- ops: forward and backward of a primitive in bfloat16, its forms and peers in turns. "GB/s" counts each input, output and
  gradient once, "TFLOP/s" the products of the matmul form; both beside the chip's limits.
- decode: tokens per second of the 130m model, with a carry for 2,048 tokens.
"""

import functools
import importlib
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ops import PRIMITIVES
from common import command
from common.errors import UserError
from common.files import write_atomically
from compilation.findings import planned
from compilation.targets import GPUS

ROOT = Path(__file__).parent.parent
MIXERS = ("attention", "gla", "mamba", "mamba2", "gated_delta_net", "rglru", "rwkv7", "hyena")
# Memory bandwidth of a device in bytes per second, by its kind; of the vendors' data sheets.
BANDWIDTH = {
    "TPU v4": 1.23e12,
    "TPU v5 lite": 8.2e11,
    "TPU v5e": 8.2e11,
    "TPU v5": 2.765e12,
    "TPU v5p": 2.765e12,
    "TPU v6 lite": 1.64e12,
    "TPU v6e": 1.64e12,
    **{gpu.name: gpu.bandwidth for gpu in GPUS.values()},
}


class Sizes(NamedTuple):
    """What is run. `tiny` is for a machine without an accelerator, and shows that everything runs.

    Attributes:
      agree: tokens, for the comparison of the forms.
      lengths, batch: of the primitives' timings.
      config: of the model.
      rows: at which training is tried, the largest first: what does not fit is halved.
      decode: rows that decode together.
      rounds: of each timing.
    """

    agree: int
    lengths: tuple[int, ...]
    batch: int
    config: dict[str, Any]
    rows: tuple[int, ...]
    decode: int
    rounds: int


SIZES = {
    False: Sizes(512, (2048, 8192), 8, {"size": "130m", "tokenizer": "bpe:50304"}, (32, 16, 8, 4), 64, 5),
    True: Sizes(24, (32,), 2, {"size": "default", "tokenizer": "byte"}, (2,), 2, 1),
}


class Part(NamedTuple):
    """One process: `forms`, `train`, `ops` or `decode` of a primitive or a mixer, and the seconds that it may take."""

    what: str
    name: str
    seconds: int


def parts() -> list[Part]:
    """All parts, the most important first."""
    first, rest = MIXERS[:4], MIXERS[4:]
    return [
        *(Part("forms", name, 60) for name in PRIMITIVES[:5]),
        *(Part("train", name, 75) for name in first),
        *(Part("ops", name, 60) for name in PRIMITIVES[:4]),
        *(Part("decode", name, 45) for name in first[:3]),
        *(Part("train", name, 75) for name in rest),
        *(Part("forms", name, 60) for name in PRIMITIVES[5:]),
        *(Part("ops", name, 60) for name in PRIMITIVES[4:]),
        *(Part("decode", name, 45) for name in (*first[3:], *rest)),
    ]


# What a part does, in its own process.


def forms(name: str, sizes: Sizes) -> Iterator[dict]:
    """Rows of the comparison of a primitive's forms."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.cases import CASES, case_arrays

    processor, device = jax.devices("cpu")[0], jax.devices()[0]

    def outputs(case, form, arrays, cotangents, place):
        """The leaves of the outputs and of the gradients, in float64."""

        def program(arrays, cotangents):
            y, pull_back = jax.vjp(lambda *arrays: jax.tree.leaves(case.function(form, sizes.agree, *arrays)), *arrays)
            return [*y, *pull_back([c.astype(x.dtype) for c, x in zip(cotangents, y, strict=True)])]

        found = jax.jit(program)(*jax.device_put((arrays, cotangents), place))
        return [np.asarray(x, np.float64) for x in found]

    for case in [case for case in CASES if case.primitive == name]:
        inputs, cotangents = case_arrays(case, sizes.agree)
        for dtype in (jnp.float32, jnp.bfloat16):
            arrays = [jnp.asarray(x, dtype) for x in inputs]
            exact = [x.astype(jnp.float32) for x in arrays]
            with jax.default_device(processor):
                reference = "reference" if "reference" in case.implementations else "auto"
                expected = outputs(case, reference, exact, cotangents, processor)
            for form in dict.fromkeys(("auto", *case.implementations)):
                row = {"variant": case.variant, "form": form, "dtype": jnp.dtype(dtype).name}
                try:
                    jax.eval_shape(functools.partial(case.function, form, sizes.agree), *arrays)
                except ValueError:  # not offered
                    continue
                try:
                    found = outputs(case, form, arrays, cotangents, device)
                    count = len(cotangents)
                    error = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in zip(found, expected)]
                    row |= {"outputs": max(error[:count]), "gradients": max(error[count:])}
                except Exception as failure:
                    row["failed"] = _reason(failure)
                yield row


def ops(name: str, sizes: Sizes) -> Iterator[dict]:
    """Rows of the timings of a primitive."""
    import jax
    import jax.numpy as jnp
    import ml_dtypes
    import numpy as np

    from benchmarks.cases import CASES, case_arrays
    from benchmarks.ops import differentiated, jax_rows
    from benchmarks.peers import PEERS, torch_program
    from benchmarks.timing import Clock, Program, measure
    from models import accounting
    from ops import dispatch

    def wide(x, length):
        """Rows of sequences, as many as the batch has."""
        return np.repeat(x[:1], sizes.batch, 0) if x.ndim >= 3 and x.shape[1] == length else x

    for case in [case for case in CASES if case.primitive == name]:
        for length in sizes.lengths:
            inputs, cotangents = ([wide(x, length) for x in arrays] for arrays in case_arrays(case, length))
            half = [[x.astype(ml_dtypes.bfloat16) for x in arrays] for arrays in (inputs, cotangents)]
            rows = jax_rows(case, length, "fwdbwd", *half, with_peers=True)
            programs = [row.program for row in rows]
            for peer in (*PEERS[case.primitive, case.variant], *fused(case.primitive, case.variant)):
                if peer.uses_torch and not peer.missing and _torch_device() is not None:
                    prepare = functools.partial(
                        torch_program, peer, length, "fwdbwd", inputs, cotangents, _torch_device(), "bfloat16"
                    )
                    programs.append(Program(peer.name, True, lambda prepare=prepare: (prepare(), None)))
            for program in programs:
                program.is_peer = True  # what fails is noted, and the others go on
            measure(programs, sizes.rounds, 10.0, Clock())
            with dispatch.matmul_form():
                abstract = lambda arrays: [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays]
                both = differentiated(functools.partial(case.function, "auto"), length, "fwdbwd")
                flops = accounting.flops(both, abstract(cotangents), *abstract(inputs))
            moved = sum(2 * x.size for x in (*inputs, *inputs, *cotangents, *cotangents))
            for program in programs:
                names = next((row.names for row in rows if row.program is program), [program.name])
                row = {"variant": case.variant, "length": length, "batch": sizes.batch, "form": "/".join(names)}
                if program.samples:
                    seconds = statistics.median(program.samples)
                    row |= {"milliseconds": 1e3 * seconds, "gb_per_second": moved / seconds / 1e9}
                    row["tflop_per_second"] = flops.total / seconds / 1e12
                    row["temporary_bytes"], row["difference"] = program.temporary_bytes, program.difference
                if program.note:
                    row["failed" if not program.samples else "note"] = program.note
                yield row


def train(name: str, sizes: Sizes) -> Iterator[dict]:
    """The row of a model in training, with as many rows a batch as the device has memory for."""
    import jax
    import numpy as np

    from compilation import steps
    from compilation.targets import Target
    from ops import dispatch
    from training import setup
    from training.metrics import peak_flops

    device = jax.devices()[0]
    for rows in sizes.rows:
        resolved = _config(name, sizes, rows)
        step = steps.train(resolved, Target("here", [device], math.inf))
        random = np.random.default_rng(0)
        row = {"rows": rows, "length": resolved.task.spec.length}
        try:
            with jax.set_mesh(step.built.mesh), dispatch.implementation(resolved.train.implementation):
                begin = time.perf_counter()
                compiled = step.function.lower(*step.arguments).compile()
                row["compile_seconds"] = time.perf_counter() - begin
                plan = compiled.memory_analysis()
                state = step.built.init(jax.random.key(0))
                batch = {
                    key: jax.device_put(_numbers(random, x, resolved), x.sharding)
                    for key, x in step.arguments[1].items()
                }
                state, metrics = compiled(state, batch)
                jax.block_until_ready(metrics)
                samples = []
                for _ in range(sizes.rounds):
                    begin = time.perf_counter()
                    for _ in range(3):
                        state, metrics = compiled(state, batch)
                    loss = float(metrics["loss"])
                    samples.append((time.perf_counter() - begin) / 3)
        except jax.errors.JaxRuntimeError as failure:
            if "RESOURCE_EXHAUSTED" not in str(failure) or rows == sizes.rows[-1]:
                raise
            state = batch = compiled = None
            continue
        seconds = statistics.median(samples)
        tokens = rows * resolved.task.spec.length
        cost = setup.cost(resolved.model, resolved.task.spec)
        peak = peak_flops(device)
        used = device.memory_stats() or {}
        yield row | {
            "parameters": cost.parameters,
            "loss": loss,
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": None if peak is None else 3 * cost.flops_per_token * tokens / seconds / peak,
            "planned_bytes": planned(plan),
            "peak_bytes": used.get("peak_bytes_in_use"),
        }
        return


def decode(name: str, sizes: Sizes) -> Iterator[dict]:
    """The row of a model that decodes."""
    import jax
    import jax.numpy as jnp

    from compilation import steps
    from compilation.targets import Target
    from evaluation.generation import of_model
    from ops import dispatch
    from training.state import cast

    device = jax.devices()[0]
    resolved = _config(name, sizes, sizes.decode)
    step = steps.decode(resolved, Target("here", [device], math.inf))
    if step is None:
        raise UserError(f"{name} does not stream")
    built, length = step.built, resolved.task.spec.length
    with jax.set_mesh(built.mesh), dispatch.implementation(resolved.train.implementation):
        params = cast(built.init(jax.random.key(0))["params"], built.metadata, resolved.train.compute_dtype)
        carry = jax.jit(of_model(built)[1], static_argnums=(1, 2))(params, sizes.decode, length)
        token, keys = jnp.zeros(sizes.decode, jnp.int32), jax.random.split(jax.random.key(1), sizes.decode)
        samples, made, calls = [], 0, min(64, length // (sizes.rounds + 2))
        for _ in range(sizes.rounds + 1):  # the first compiles
            begin = time.perf_counter()
            for _ in range(calls):
                token, carry = step.function(params, token, carry, keys, jnp.int32(made))
                made += 1
            jax.block_until_ready(token)
            samples.append((time.perf_counter() - begin) / calls)
    seconds = statistics.median(samples[1:])
    yield {
        "rows": sizes.decode,
        "carry_bytes": sum(x.nbytes for x in jax.tree.leaves(carry)),
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": sizes.decode / seconds,
    }


def _config(name: str, sizes: Sizes, rows: int):
    """The resolved configuration of the model, without its data."""
    from configs import lm
    from training import config

    chosen = lm.get_config(f"mixer={name},size={sizes.config['size']}")
    with chosen.unlocked():
        chosen.task.tokenizer = sizes.config["tokenizer"]
        chosen.train.batch_size = rows
        chosen.model.remat = "dots"
    return config.resolve(chosen, with_data=False)


def _numbers(random, shape, resolved):
    """An array of a batch: tokens at random, and ones for weights and segments."""
    import numpy as np

    if np.issubdtype(shape.dtype, np.integer) and len(shape.shape) == 2:
        return random.integers(resolved.task.spec.vocab_size, size=shape.shape).astype(shape.dtype)
    return np.ones(shape.shape, shape.dtype)


def _torch_device() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def fused(primitive: str, variant: str) -> list:
    """Peers that are kernels for GPUs: flash-linear-attention's and Mamba's, by their documented calls."""
    from benchmarks.peers import Peer

    def layer(module: str, name: str, order: Callable) -> Peer:
        package = module.partition(".")[0]

        def function(length, *inputs):
            y = order(getattr(importlib.import_module(module), name), *inputs)
            return y[0] if isinstance(y, tuple) else y

        return Peer(f"{package} {name}", ("torch", package), function)

    kernels = {
        ("linear_attention", "decay per head"): layer(
            "fla.ops.simple_gla", "chunk_simple_gla", lambda f, q, k, v, g: f(q, k, v, g.float())
        ),
        ("linear_attention", "decay per channel"): layer("fla.ops.gla", "chunk_gla", lambda f, *inputs: f(*inputs)),
        ("delta_rule", "decay per head"): layer(
            "fla.ops.gated_delta_rule",
            "chunk_gated_delta_rule",
            lambda f, q, k, v, beta, g: f(q, k, v, g=g.float(), beta=beta),
        ),
        ("delta_rule", "decay per channel"): layer(
            "fla.ops.kda", "chunk_kda", lambda f, q, k, v, beta, g: f(q, k, v, g=g.float(), beta=beta)
        ),
        ("selective_scan", "Mamba"): layer(
            "mamba_ssm.ops.selective_scan_interface",
            "selective_scan_fn",
            lambda f, x, dt, A, B, C: f(
                *(z.transpose(1, 2) for z in (x, dt)), A.float(), *(z.transpose(1, 2) for z in (B, C))
            ).transpose(1, 2),
        ),
    }
    return [kernels[primitive, variant]] if (primitive, variant) in kernels else []


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip()}".splitlines()[0][:200]


WORK = {"forms": forms, "train": train, "ops": ops, "decode": decode}


def work(what: str, name: str, tiny: bool) -> None:
    """A part, in its own process: prints a line of JSON for each row."""
    command.start()
    import jax

    from training.metrics import peak_flops

    device = jax.devices()[0]
    facts = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "peak": peak_flops(device),
    }
    print(json.dumps(facts | {"bandwidth": BANDWIDTH.get(device.device_kind)}), flush=True)
    for row in WORK[what](name, SIZES[tiny]):
        print(json.dumps(row), flush=True)


# The parent: starts the parts, and shows what they found.


def start(part: Part, seconds: float, tiny: bool) -> dict:
    """Runs a part; its rows, what the device is, and why it ended early where it did."""
    arguments = ["-m", "benchmarks.device", "--work", part.what, part.name, *["--tiny"] * tiny]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    failed = None
    try:
        out, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, complaints = process.communicate()
        failed = f"not done after {seconds:.0f} s"
    if process.returncode and failed is None:
        lines = complaints.strip().splitlines() or ["ended without a word"]
        failed = next((line for line in reversed(lines) if re.match(r"[\w.]+: ", line)), lines[-1])[:300]
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    facts, rows = (lines[0], lines[1:]) if lines else ({}, [])
    return {
        "what": part.what,
        "name": part.name,
        "facts": facts,
        "rows": rows,
        "failed": failed,
        "seconds": time.perf_counter() - begin,
    }


COLUMNS = {
    "forms": ("primitive", "variant", "form", "dtype", "outputs", "gradients"),
    "train": ("mixer", "rows", "tokens/s", "MFU", "ms", "GiB in use", "GiB planned", "compiles in s"),
    "ops": ("primitive", "variant", "T", "form", "ms", "GB/s", "of peak", "TFLOP/s", "of peak", "MiB", "difference"),
    "decode": ("mixer", "rows", "tokens/s", "ms", "MiB of carry"),
}


def cells(what: str, name: str, row: dict, facts: dict) -> list[str]:
    """A row of the table of `COLUMNS[what]`."""
    show = lambda key, form, scale=1.0: "" if row.get(key) is None else format(row[key] * scale, form)
    share = lambda key, unit, limit: (
        f"{row[key] * unit / facts[limit]:.0%}" if facts.get(limit) and row.get(key) else ""
    )
    failed = row.get("failed")
    if what == "forms":
        return [
            name,
            row["variant"],
            row["form"],
            row["dtype"],
            failed or show("outputs", ".1e"),
            show("gradients", ".1e"),
        ]
    if what == "ops":
        return [
            name,
            row["variant"],
            f"{row['length']:,}",
            row["form"],
            failed or show("milliseconds", ".2f"),
            show("gb_per_second", ",.0f"),
            share("gb_per_second", 1e9, "bandwidth"),
            show("tflop_per_second", ".1f"),
            share("tflop_per_second", 1e12, "peak"),
            show("temporary_bytes", ",.0f", 2**-20),
            show("difference", ".0e"),
        ]
    if what == "decode":
        return [
            name,
            str(row["rows"]),
            show("tokens_per_second", ",.0f"),
            show("milliseconds", ".2f"),
            show("carry_bytes", ",.1f", 2**-20),
        ]
    return [
        name,
        f"{row['rows']} x {row['length']:,}",
        show("tokens_per_second", ",.0f"),
        show("mfu", ".1%"),
        show("milliseconds", ",.1f"),
        show("peak_bytes", ".1f", 2**-30),
        show("planned_bytes", ".1f", 2**-30),
        show("compile_seconds", ".0f"),
    ]


def page(results: list[dict], left_out: list[Part], call: str) -> str:
    """All tables, in Markdown."""
    facts = next((result["facts"] for result in results if result["facts"]), {})
    lines = [f"## {facts.get('device', 'no device answered')}", ""]
    lines += [f"`{call}` on {time.strftime('%Y-%m-%d')}, jax {facts.get('jax', '?')}.", ""]
    for what, head in COLUMNS.items():
        found = [result for result in results if result["what"] == what]
        rows = [cells(what, result["name"], row, result["facts"]) for result in found for row in result["rows"]]
        if rows:
            lines += [
                f"### {what}",
                "",
                *(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)),
                "",
            ]
        lines += [f"- {what} {result['name']}: {result['failed']}" for result in found if result["failed"]]
        if any(result["failed"] for result in found):
            lines.append("")
    if left_out:
        lines += ["Left out, since the time was over: " + ", ".join(f"{p.what} {p.name}" for p in left_out) + ".", ""]
    return "\n".join(lines)


TITLE = """# What accelerators do with this code

Written by `python -m benchmarks.device`, whose docstring says what the tables show: a section for each device that it ran on.
"""


def inserted(whole: str, section: str) -> str:
    """The page with a section put in, in place of that of the same device."""
    title = section.partition("\n")[0]
    head, *sections = re.split(r"(?m)^(?=## )", whole)
    kept = [other.rstrip() for other in sections if other.partition("\n")[0] != title]
    return "\n\n".join([head.rstrip(), *kept, section.rstrip()]) + "\n"


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="after which no part begins, and those that run end")
    add("--tiny", action="store_true", help="sizes for a machine without an accelerator")
    add("--only", default="", help="parts such as train or ops:delta_rule, joined by commas; by default all")
    add("--json", type=Path, help="where to write all numbers")
    add("--page", type=Path, help="where to write the tables, in Markdown")
    add("--work", nargs=2, help="for its own use")
    options = parser.parse_args(arguments)
    if options.work:
        return work(*options.work, options.tiny)
    chosen = [p for p in parts() if not options.only or {p.what, f"{p.what}:{p.name}"} & set(options.only.split(","))]
    if not chosen:
        raise UserError(f"--only={options.only}: there are {', '.join(WORK)}, each also as in ops:delta_rule")
    call = "python -m benchmarks.device " + " ".join(arguments)
    end = time.perf_counter() + 60 * options.minutes
    results, left_out = [], []
    for part in chosen:
        left = end - time.perf_counter()
        if left < 5:
            left_out.append(part)
            continue
        result = start(part, left if options.tiny else min(part.seconds, left), options.tiny)
        results.append(result)
        how = result["failed"] or f"{len(result['rows'])} rows"
        print(f"{part.what} {part.name}: {how}, {result['seconds']:.0f} s", flush=True)
        if options.json:  # after each part, so that a run that is cut short leaves what it had
            write_atomically(options.json, json.dumps({"results": results}, indent=1))
    text = page(results, left_out, call)
    if options.page:
        write_atomically(options.page, inserted(options.page.read_text() if options.page.exists() else TITLE, text))
    print("\n" + text)


if __name__ == "__main__":
    command.run(main)

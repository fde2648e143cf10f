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

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import device_parts
from benchmarks.ops import PRIMITIVES
from common import command
from common.errors import UserError
from common.files import write_atomically
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


WORK = {
    "forms": device_parts.forms,
    "train": device_parts.train,
    "ops": device_parts.ops,
    "decode": device_parts.decode,
}


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
    for row in WORK[what](name, device_parts.SIZES[tiny]):
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
    add("--json", type=command.new_file, help="where to write all numbers")
    add("--page", type=command.new_file, help="where to write the tables, in Markdown")
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

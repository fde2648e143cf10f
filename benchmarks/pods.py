"""Whole training steps compiled for devices that are not here: what each mixer needs and sends, by the compilers' word.

    python -m benchmarks.pods --workdir=/tmp/pods
    python -m benchmarks.pods --workdir=/tmp/pods --sizes=130m --devices=v5e:16x16 --mixers=attention,gla

Each cell is `train.py --compile_for` in a process of its own, whose JSON is kept in --workdir: the same command goes on where it
was stopped. It needs requirements-aot.txt. A cell takes from half a minute to some minutes. There are no times of steps, which a
compiler does not know.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from common import command
from common.console import say
from common.errors import UserError, check_choice
from compilation import report
from models import mixer

ROOT = Path(__file__).parent.parent
MIXERS = (
    "attention",
    "local_attention",
    "retnet",
    "gla",
    "mamba2",
    "gated_delta_net",
    "rwkv7",
    "mamba",
    "rglru",
    "s5",
    "hyena",
    "s4d",
)
SIZES = ("130m", "1.3b")
MESHES = {
    "v5e:16x16": {"data": 8, "fsdp": 16, "tensor": 2},
    "v5p:4x4x4": {"data": 2, "fsdp": 16, "tensor": 2},
    "h100:8": {"data": 1, "fsdp": 8, "tensor": 1},
}
TOKENIZER = "bpe:50304"
LIMIT = 1200  # seconds of a cell


def compiled(workdir: Path, size: str, name: str, devices: str) -> dict | str:
    """The record of a cell, from an earlier call or made now; where it failed, what was said last."""
    folder = workdir / size / name
    path = folder / report.FOLDER / f"train-{devices.replace(':', '-')}.json"
    if not path.exists():
        arguments = [
            f"--config=configs/lm.py:mixer={name},size={size}",
            f"--config.task.tokenizer={TOKENIZER}",
            *(f"--config.mesh.{axis}={ways}" for axis, ways in MESHES[devices].items()),
            f"--compile_for={devices}",
            f"--workdir={folder}",
        ]
        begin = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return f"compiles for more than {LIMIT} s"
        say(f"{size} {name} {devices}: {time.perf_counter() - begin:.0f} s")
        if not path.exists():
            return (done.stderr.strip().splitlines() or ["no record"])[-1]
    return json.loads(path.read_text())


def row(name: str, found: dict | str) -> list[str]:
    """A line of the table."""
    if isinstance(found, str):
        return [name, "", found, "", "", "", "", ""]
    memory = found["memory"]
    peak = "more" if memory["peak"] is None else f"{memory['peak'] / 2**30:.1f}"
    work = sum(p["flops"] for p in found["products"]) or 1
    full = sum(p["flops"] for p in found["products"] if p["operands"] != "bf16") / work
    sent = sum(t["bytes"] for t in found["traffic"]) / 2**20
    between = sum(s["bytes"] for s in found["gathered"]) / 2**20
    calls = sum(t["executions"] for t in found["traffic"])
    refused = bool(found["refusal"])
    return [
        name,
        f"{found['parameters'] / 1e6:,.0f} M",
        f"{peak} of {memory['capacity'] / 2**30:.1f}{'' if found['fits'] else ': does not fit'}",
        "" if refused else f"{calls:,}",
        "" if refused else f"{sent:,.0f}",
        "" if refused else f"{between:,.0f}",
        "" if refused else f"{100 * full:.0f} %",
        f"{found['seconds']['processor']:.0f}",
    ]


HEAD = (
    "mixer",
    "parameters",
    "GiB of a device",
    "collectives",
    "MiB sent",
    "of it activations",
    "FLOPs not of bf16",
    "CPU s",
)


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="where records are kept")
    add("--mixers", default=",".join(MIXERS), help="comma-separated")
    add("--sizes", default=",".join(SIZES), help="comma-separated sizes of configs/lm.py")
    add("--devices", default=",".join(MESHES), help="comma-separated")
    options = parser.parse_args(arguments)
    workdir = Path(options.workdir).expanduser().absolute()
    mixers, sizes, devices = (x.split(",") for x in (options.mixers, options.sizes, options.devices))
    for name in mixers:
        mixer.find(name)
    for name in devices:
        check_choice("--devices", name, MESHES)
    if not all(sizes):
        raise UserError("--sizes is empty")
    for size in sizes:
        for target in devices:
            rows = [row(name, compiled(workdir, size, name, target)) for name in mixers]
            mesh = " ".join(f"{axis}={ways}" for axis, ways in MESHES[target].items())
            print(f"\n{size} on {target}, mesh {mesh}\n")
            for cells in (HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *rows):
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    command.run(main)

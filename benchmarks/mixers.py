"""Trains a small language model with each mixer on the same budget of tokens, and prints one table.

    python -m benchmarks.mixers                                     every causal mixer
    python -m benchmarks.mixers --mixers=mamba,gla --steps=2000     some, for longer

Everything but the mixer is the same: width, depth (twice the blocks for mixers that replace the channel mixer), data, order,
optimiser. The score is that of the whole validation split after the last step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from models import mixer as mixers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", default="", help="names joined by commas; all causal mixers by default")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--corpus", default="auto")
    parser.add_argument("--json", default="", help="file for the results")
    options = parser.parse_args()
    names = options.mixers.split(",") if options.mixers else [n for n in mixers.names() if mixers.find(n).causal]
    rows = []
    for name in names:
        depth = options.depth * (2 if mixers.find(name).replaces_channel_mixer else 1)
        with tempfile.TemporaryDirectory() as workdir:
            flags = {
                "model.width": options.width,
                "model.depth": depth,
                "train.steps": options.steps,
                "train.log_every": max(1, options.steps // 10),
                "train.eval_every": 0,
                "train.checkpoint_every": 0,
                "optimizer.warmup_steps": options.steps // 10,
            }
            command = [sys.executable, "train.py", f"--config=configs/lm.py:mixer={name},corpus={options.corpus}"]
            command += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in flags.items())]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                reason = run.stderr.strip().splitlines()[-1]
                rows.append({"mixer": name, "error": reason})
                print(f"{name}: {reason}", flush=True)
                continue
            lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
            valid = [line for line in lines if line["split"] == "valid"][-1]
            speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
            cost = next(line.split() for line in run.stdout.splitlines() if line.startswith("model "))
            rows.append(
                {
                    "mixer": name,
                    "bits_per_byte": valid["bits_per_byte"],
                    "tokens_per_second": speeds[len(speeds) // 2],
                    "parameters": int(cost[1].replace(",", "")),
                    "flops_per_token": int(cost[2].replace(",", "")),
                    "carry_bytes": int(cost[3].replace(",", "")),
                }
            )
            print(f"{name}: {rows[-1]['bits_per_byte']:.3f} bits per byte", flush=True)
    print(
        "\n| mixer | valid bits/byte | tokens/s | parameters | forward FLOPs/token | carry bytes |\n|---|---|---|---|---|---|"
    )
    for row in sorted(rows, key=lambda row: row.get("bits_per_byte", float("inf"))):
        if "error" in row:
            print(f"| `{row['mixer']}` | failed: {row['error']} | | | | |")
        else:
            print(
                f"| `{row['mixer']}` | {row['bits_per_byte']:.3f} | {row['tokens_per_second']:,.0f} | {row['parameters']:,} "
                f"| {row['flops_per_token']:,} | {row['carry_bytes']:,} |"
            )
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()

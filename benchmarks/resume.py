"""Kills a run at random moments and checks that nothing but time is lost.

    python -m benchmarks.resume --kills=20

One run trains undisturbed; another of the same configuration is killed (SIGKILL) again and again, 1 to 12 seconds after its
start (which takes some of them), and started again with the same command until it ends. Every recorded loss must be the
same number, bit for bit.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import command

FLAGS = [
    "--config=configs/lm.py:mixer=gla,corpus=stdlib",
    "--config.task.length=64",
    "--config.model.width=32",
    "--config.model.depth=2",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
    "--config.train.eval_every=50",
    "--config.train.eval_batches=2",
    "--config.train.checkpoint_every=7",
]


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "train.py", *FLAGS, f"--config.train.steps={options.steps}"]
        begin = time.perf_counter()
        undisturbed = Path(folder) / "undisturbed"
        subprocess.run([*program, f"--workdir={undisturbed}"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        print(f"undisturbed: {options.steps} steps in {seconds:.0f} s", flush=True)

        workdir, kills = Path(folder) / "killed", 0
        while True:
            process = subprocess.Popen(
                [*program, f"--workdir={workdir}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            try:
                process.wait(chance.uniform(1, 12) if kills < options.kills else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                print(f"kill {kills}: {last_step(workdir)} steps recorded, checkpoints {saved(workdir)}", flush=True)
                continue
            if process.returncode:
                sys.exit(f"the run failed by itself:\n{process.stderr.read()}")
            break
        expected, found = losses(undisturbed), losses(workdir)
        same = expected == found
        print(
            f"{kills} kills; {len(found)} losses recorded; last {found[max(found)]!r}, undisturbed {expected[max(expected)]!r}"
        )
        print("bit for bit the same" if same else "DIFFERENT")
        sys.exit(not same)


def losses(workdir: Path) -> dict[int, float]:
    """The training losses by step."""
    path = workdir / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # a kill cut the line
            continue
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def last_step(workdir: Path) -> int:
    """The last step that was recorded."""
    return max(losses(workdir), default=0)


def saved(workdir: Path) -> list[str]:
    """The finished and unfinished checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


if __name__ == "__main__":
    command.run(main)

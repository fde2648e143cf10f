"""What a large text costs: time and memory of its conversion, of a start, and of reading rows.

    python -m benchmarks.corpora
    python -m benchmarks.corpora --megabytes=20,2000 --tokenizer=bpe:4096 --folder=/scratch

Texts are generated in a temporary folder, which is taken away again. Each line is a process of its own: what it does, its seconds
of CPU, and the most memory that it had, all of it (rss) and beyond what an empty one has (more), in MB.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from common import command

ROWS = 10_000


def write(path: pathlib.Path, megabytes: int) -> None:
    """Words of a made-up language, in lines: the same million in ever other orders."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9)).astype(np.uint8)) for _ in range(20_000)]
    lines = [b" ".join(words[i] for i in line) + b"\n" for line in (rng.zipf(1.3, (100_000, 10)) % 20_000).tolist()]
    with open(path, "wb") as file:
        while file.tell() < megabytes * 1e6:
            file.write(b"".join(lines[i] for i in rng.permutation(len(lines)).tolist()))
        file.truncate(int(megabytes * 1e6))


def stage(name: str, folder: str, tokenizer: str) -> dict[str, float]:
    """What one process does; its seconds and its largest size in MB."""
    from data import task

    flags.FLAGS(sys.argv[:1])  # the input pipeline reads absl's flags
    start = time.process_time()
    if name != "nothing":
        options = {
            "corpus": f"file:{folder}/text",
            "cache_dir": f"{folder}/cache",
            "tokenizer": tokenizer,
            "length": 2048,
        }
        lm = task.create("language_model", **options)
        if name == "rows":
            start = time.process_time()
            for index in range(ROWS):
                lm.example("train", index)
    seconds = time.process_time() - start
    return {"seconds": seconds, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument(
        "--megabytes", type=command.whole_numbers, default=[20, 2000], help="sizes of texts, joined by commas"
    )
    parser.add_argument("--tokenizer", default="byte", help="see data/tokenizers.py")
    parser.add_argument("--folder", help="where the text and its copy are written; by default that of temporary files")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        print(json.dumps(stage(options.stage, options.folder, options.tokenizer)))
        return
    print(f"{'text':>8}  {'what':<14}{'CPU s':>9}{'rss':>8}{'more':>8}")
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write(pathlib.Path(folder, "text"), megabytes)
            empty = None
            for name, what in {
                "nothing": "nothing",
                "convert": "convert",
                "start": "start again",
                "rows": f"{ROWS:,} rows",
            }.items():
                program = [sys.executable, "-m", "benchmarks.corpora", f"--stage={name}", f"--folder={folder}"]
                ended = subprocess.run([*program, f"--tokenizer={options.tokenizer}"], capture_output=True, text=True)
                if ended.returncode:
                    sys.exit(ended.stderr)
                found = json.loads(ended.stdout.splitlines()[-1])
                empty = found["rss"] if empty is None else empty
                print(
                    f"{megabytes:>5} MB  {what:<14}{found['seconds']:>9.2f}{found['rss']:>8.0f}{found['rss'] - empty:>8.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    command.run(main)

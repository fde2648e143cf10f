"""The first steps of the default run, smaller, number by number.

The other tests compare the code with itself or with an oracle, a part at a time. This one notices when the whole (initial values,
data order, forward and backward pass, optimiser, schedule) computes something else than it did, so that numbers that were
published with an earlier version can no longer be found again.

When the numbers move on purpose, say so in CHANGELOG.md, since every run of the default configuration moves with them, and put
what this prints in place of `GOLDEN`:

    python -m tests.training.test_golden_step
"""

import hashlib
import pathlib
import tempfile

import pytest

from configs import lm
from training import loop
from training.config import resolve
from training.metrics import read_metrics

# By step, as `metrics.jsonl` has them.
GOLDEN = {
    1: {"loss": 5.600124, "grad_norm": 2.862291, "param_norm": 114.9561},
    2: {"loss": 5.323298, "grad_norm": 3.922033, "param_norm": 114.9509},
    3: {"loss": 4.815165, "grad_norm": 3.529324, "param_norm": 114.9504},
}
# Relative. Releases of jax, the number of devices and compiler options change the order of float32 sums, which moves these
# numbers by some 1e-6. Another draw of the initial values, or another rule of the optimiser, moves them by 1e-2 or more.
TOLERANCE = 1e-4


def text(path: pathlib.Path) -> pathlib.Path:
    """Writes 40,000 words that depend on nothing but SHA-256: the texts of real corpora differ between machines."""
    words = ["mixer", "carry", "decay", "state", "gate", "of", "the", "and", "a", "key\n"]
    digits = "".join(str(int(hashlib.sha256(str(i).encode()).hexdigest(), 16))[-60:] for i in range(667))
    path.write_text(" ".join(words[int(digit)] for digit in digits))
    return path


def first_steps(folder: pathlib.Path) -> dict[int, dict[str, float]]:
    """Three steps of configs/lm.py, narrower than its default, which makes them cheap, and soon at the full learning rate."""
    config = lm.get_config(f"corpus=file:{text(folder / 'text.txt')}")
    config.task.length = 64
    config.model.update({"width": 64, "depth": 2})
    config.optimizer.warmup_steps = 1
    config.train.update({"steps": 3, "log_every": 1, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 0})
    loop.train(resolve(config), folder / "run")
    lines = [line for line in read_metrics(folder / "run") if line["split"] == "train"]
    return {line["step"]: {key: line[key] for key in ("loss", "grad_norm", "param_norm")} for line in lines}


def test_first_steps(tmp_path):
    """See above for what to do when this fails."""
    found = first_steps(tmp_path)
    assert list(found) == list(GOLDEN)
    for step, numbers in GOLDEN.items():
        assert found[step] == pytest.approx(numbers, rel=TOLERANCE), f"step {step}"


if __name__ == "__main__":
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    with tempfile.TemporaryDirectory() as folder:
        for step, numbers in first_steps(pathlib.Path(folder)).items():
            shown = ", ".join(f'"{key}": {value:.7g}' for key, value in numbers.items())
            print(f"    {step}: {{{shown}}},")

"""What the training loop costs beside the compiled step.

    python -m benchmarks.loop --config=configs/lm.py:mixer=gla

In one process: rounds of the bare compiled step on one fixed batch, then the same number of steps of everything that the loop
does (making batches, reading metrics, logging, writing a checkpoint in the background), then rounds of the bare step again.
Prints the medians of their tokens per second and the ratio.
"""

import statistics
import tempfile
import time

import jax
from absl import flags
from ml_collections import config_flags

from common import command

_CONFIG = config_flags.DEFINE_config_file("config", "configs/lm.py", "what to train", lock_config=True)
_STEPS = flags.DEFINE_integer("steps", 100, "steps in a round")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds of each")


def main(_):
    command.start()
    from ops import dispatch
    from training import config, loop
    from training.metrics import read_metrics
    from training.step import make_train_step

    chosen = _CONFIG.value
    with chosen.unlocked():
        total = _STEPS.value * _ROUNDS.value
        chosen.train.update({"steps": total, "eval_every": 10 * total, "eval_batches": 1})
        chosen.train.checkpoint_every = max(1, total // 2)
        chosen.optimizer.warmup_steps = 1
    resolved = config.resolve(chosen)
    built = loop.build(resolved)
    step = make_train_step(
        built,
        accumulation=resolved.train.accumulation,
        compute_dtype=resolved.train.compute_dtype,
        z_loss=resolved.train.z_loss,
    )
    tokens = resolved.train.batch_size * resolved.task.spec.length

    def bare() -> list[float]:
        with jax.set_mesh(built.mesh), dispatch.implementation(resolved.train.implementation):
            batch = loop.Batches(resolved, built, "train", resolved.train.batch_size)[0]
            state, metrics = step(built.init(jax.random.key(0)), batch)
            jax.block_until_ready(metrics)
            rates = []
            for _ in range(_ROUNDS.value):
                begin = time.perf_counter()
                for _ in range(_STEPS.value):
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
                rates.append(tokens * _STEPS.value / (time.perf_counter() - begin))
            return rates

    first = bare()
    with tempfile.TemporaryDirectory() as folder:
        # The loop's own clock leaves out compilation and evaluations, and nothing else.
        loop.train(resolved, folder)
        whole = [line["tokens_per_second"] for line in read_metrics(folder) if "tokens_per_second" in line]
    a, b = statistics.median(first + bare()), statistics.median(whole)
    print(f"\nbare step {a:,.0f} tokens/s, whole loop {b:,.0f} tokens/s, ratio {b / a:.3f}")


if __name__ == "__main__":
    command.run(main)

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

from common import command
from common.errors import check_range
from ops import dispatch
from training import command_line, config, loop, setup
from training.metrics import read_metrics


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each")
    options, keys = parser.parse_known_args(arguments)
    check_range("--steps", options.steps, 1)
    check_range("--rounds", options.rounds, 1)
    command.start()
    chosen = command_line.parse(keys)
    with chosen.unlocked():
        total = options.steps * options.rounds
        chosen.train.update({"steps": total, "eval_every": 10 * total, "eval_batches": 1})
        chosen.train.checkpoint_every = max(1, total // 2)
        chosen.optimizer.warmup_steps = 1
    resolved = config.resolve(chosen)
    built = setup.build(resolved)
    step = setup.train_step(resolved, built)
    tokens = resolved.train.batch_size * resolved.task.spec.length

    def bare() -> list[float]:
        with jax.set_mesh(built.mesh), dispatch.implementation(resolved.train.implementation):
            batch = setup.batches(resolved, built, "train", resolved.train.batch_size, for_training=True)[0]
            state, metrics = step(built.init(jax.random.key(0)), batch)
            jax.block_until_ready(metrics)
            rates = []
            for _ in range(options.rounds):
                begin = time.perf_counter()
                for _ in range(options.steps):
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
                rates.append(tokens * options.steps / (time.perf_counter() - begin))
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

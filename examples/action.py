"""Something of one's own in the training loop: actions that look at the run, record numbers, and end it.

    python -m examples.action --workdir=runs/action

An action is a pair: when it is due, and what is done with the run. Here one records how long the rows of the embedding are (as
`embedding`, beside `train` and `valid`, in metrics.jsonl and in TensorBoard), and the other ends the run, with a checkpoint,
as soon as the loss is low enough. The same call goes on with a run that was ended.
"""

import jax.numpy as jnp

from common import command
from configs import recall
from training.config import resolve
from training.loop import Action, Run, every, train


def record_norms(run: Run) -> None:
    """Norms of the rows of the embedding: their mean and their largest."""
    norms = jnp.linalg.norm(run.state["params"]["embedding"], axis=-1)
    run.record.write(run.step, "embedding", {"mean_norm": norms.mean(), "largest_norm": norms.max()})


def is_good_enough(run: Run) -> bool:
    """Whether the loss of this step, in nats, is below 0.75. To look at it waits for the device."""
    return float(run.metrics["loss"]) < 0.75


def stop(run: Run) -> None:
    print(f"step {run.step}: the loss is {float(run.metrics['loss']):.3f}, which is good enough")
    run.stop()


def main(workdir: str, task: str, steps: int) -> None:
    chosen = recall.get_config(f"task={task},mixer=min_gru")
    chosen.model.update({"width": 16, "depth": 1})
    chosen.optimizer.warmup_steps = 2
    chosen.train.update({"steps": steps, "batch_size": 8, "log_every": 10, "eval_every": 0, "eval_batches": 2})
    train(resolve(chosen), workdir, Action(every(2), record_norms), Action(is_good_enough, stop))


def run(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--task", default="flip_flop", help="a generated task of data/tasks/")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    command.start()
    main(**vars(options))


if __name__ == "__main__":
    command.run(run)  # what a user can mend ends as one message, and a signal as docs/runs.md says

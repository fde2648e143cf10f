"""Tasks of real numbers read off an image: noise on the training labels, and floors."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from common.errors import check_choice
from data.generated import GeneratedTask

NOISES = ("clean", "heavy-tailed")
OUTLIERS = 0.2
# Floors are fitted on the first rows of train.
FIT_ROWS = 4_096


def noisy(
    rng: np.random.Generator, targets: Float[np.ndarray, "K"], noise: str, spread: float, shift: float
) -> Float[np.ndarray, "K"]:
    """Labels as an annotator gives them.

    Args:
      rng: random numbers; nothing is drawn for "clean".
      targets: the truth.
      noise: "clean", or "heavy-tailed": Laplace noise on all, and a fifth of the numbers too large on top, as where a label
        belongs to another point.
      spread: scale of the Laplace noise.
      shift: mean of the exponentially distributed excess.

    Raises:
      UserError: for an unknown noise.
    """
    check_choice("label_noise", noise, NOISES)
    if noise == "clean":
        return targets
    outlier = rng.random(targets.shape) < OUTLIERS
    return targets + rng.laplace(0, spread, targets.shape) + outlier * rng.exponential(shift, targets.shape)


def floors(
    task: GeneratedTask,
    split: str,
    score: Callable[[Float[np.ndarray, "N K"], Float[np.ndarray, "N K"]], float],
) -> dict[str, float]:
    """score(predictions, targets) on valid or test of what fits the training labels without a network.

    "mean label" and "median label" are constants; "linear regression" is ridge regression on the inputs (penalty 1).
    """
    inputs, targets = _stacked(task.row("train", i, 0, 0) for i in range(FIT_ROWS))
    new, truth = _stacked(task.rows(split))
    center, mean = inputs.mean(0), targets.mean(0)
    x = inputs - center
    weight = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (targets - mean))
    predictions = {
        "mean label": mean,
        "median label": np.median(targets, 0),
        "linear regression": (new - center) @ weight + mean,
    }
    return {name: score(np.broadcast_to(value, truth.shape), truth) for name, value in predictions.items()}


def _stacked(rows: Iterable[dict[str, np.ndarray]]) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N K"]]:
    """The inputs and the targets of rows."""
    rows = list(rows)
    inputs = np.stack([row["inputs"].ravel() for row in rows])
    return inputs, np.stack([row["targets"] for row in rows]).astype(np.float64)

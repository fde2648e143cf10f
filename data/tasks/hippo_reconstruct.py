"""Reconstruction from the final state: say the last `window` inputs, all at the end ("How to Train Your HiPPO", arXiv
2206.12037; state-spaces/s4, src/dataloaders/datasets/reconstruct.py).

The input is band-limited white noise that starts at 0. It is a test of memory where the answer is read from the last position,
and needs some 2 * cutoff * window numbers of state. One linear layer is the paper's model.

The source counts time in seconds: its dt 1e-3 and band limit 100 are a cutoff of 0.1 cycles per sample.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask
from data.rows import real_row
from data.signals import white_noise
from data.task import Spec


class HippoReconstruct(GeneratedTask):
    """The last inputs, from the final state.

    Args:
      length: samples of a row.
      window: samples to say.
      cutoff: highest frequency of the signal in cycles per sample, up to 0.5.

    Raises:
      UserError: for a window that is longer than the row, and a cutoff that leaves no frequency.
    """

    sizes: dict[str, int] = {"train": 16_384, "valid": 1_024, "test": 1_024}
    paper_size: ClassVar[dict] = {"length": 4000, "window": 1000, "cutoff": 0.1}

    def __init__(self, length: int = 256, window: int = 64, cutoff: float = 0.1):
        if not 1 <= window <= length:
            raise UserError(f"window={window} must be at least 1 and at most length={length}")
        self.name = "hippo_reconstruct"
        self.spec = Spec(None, 1, window, "regression", length, causal=True)
        white_noise(np.random.default_rng(0), length, cutoff)  # refuses what it cannot make
        self._window, self._cutoff = window, cutoff

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        signal = white_noise(rng, self.spec.length, self._cutoff)
        return real_row(signal[:, None], signal[-self._window :], np.ones((), np.float32))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Root mean squared error of 0, of the last input, and of the inputs' mean.

        The last is low because the noise is centred at some value other than 0.
        """
        squares, rows = np.zeros(3), 0
        for row in self.rows(split):
            inputs, targets = np.float64(row["inputs"][:, 0]), np.float64(row["targets"])
            squares += [np.mean(np.square(targets - guess)) for guess in (0, inputs[-1], inputs.mean())]
            rows += 1
        return dict(zip(("zero", "last input", "mean"), np.sqrt(squares / rows).tolist(), strict=True))

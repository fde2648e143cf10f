"""A delay line: say the input of `delay` samples ago ("How to Train Your HiPPO", arXiv 2206.12037; state-spaces/s4,
src/dataloaders/datasets/delay.py).

The input is band-limited white noise that starts at 0; the target of position t is the input of t - delay, and 0 before there
is one, which is scored too, as in the source. A model needs some 2 * cutoff * delay numbers of state. One linear layer is the
paper's model.

The source counts time in seconds: its dt 2.5e-4 and band limit 1000 are a cutoff of 0.25 cycles per sample.
"""

from typing import ClassVar

import numpy as np

from common.errors import UserError
from data.generated import GeneratedTask
from data.rows import real_row
from data.signals import white_noise
from data.task import Spec


class HippoDelay(GeneratedTask):
    """The input, delayed.

    Args:
      length: samples of a row.
      delay: in samples.
      cutoff: highest frequency of the signal in cycles per sample, up to 0.5.

    Raises:
      UserError: for a delay that is longer than the row, and a cutoff that leaves no frequency.
    """

    sizes: dict[str, int] = {"train": 16_384, "valid": 1_024, "test": 1_024}
    paper_size: ClassVar[dict] = {"length": 4000, "delay": 1000, "cutoff": 0.25}

    def __init__(self, length: int = 256, delay: int = 64, cutoff: float = 0.25):
        if not 1 <= delay < length:
            raise UserError(f"delay={delay} must be at least 1 and less than length={length}")
        self.name = "hippo_delay"
        self.spec = Spec(None, 1, 1, "token_regression", length, causal=True)
        white_noise(np.random.default_rng(0), length, cutoff)  # refuses what it cannot make
        self._delay, self._cutoff = delay, cutoff

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        signal = white_noise(rng, self.spec.length, self._cutoff)[:, None]
        delayed = np.zeros_like(signal)
        delayed[self._delay :] = signal[: -self._delay]
        return real_row(signal, delayed, np.ones(self.spec.length, np.float32))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Root mean squared error of 0, of the input itself, and (once there is something to say) of the inputs' mean so far.

        The last is low because the noise is centred at some value other than 0.
        """
        squares, rows = np.zeros(3), 0
        for row in self.rows(split):
            inputs, targets = np.float64(row["inputs"][:, 0]), np.float64(row["targets"][:, 0])
            mean = np.cumsum(inputs) / np.arange(1, len(inputs) + 1)
            mean[: self._delay] = 0
            squares += [np.mean(np.square(targets - guess)) for guess in (0, inputs, mean)]
            rows += 1
        return dict(zip(("zero", "input", "mean so far"), np.sqrt(squares / rows).tolist(), strict=True))

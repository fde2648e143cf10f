"""A delay line: say the input of `delay` samples ago ("How to Train Your HiPPO", arXiv 2206.12037; state-spaces/s4,
src/dataloaders/datasets/delay.py).

The input is band-limited white noise that starts at 0; the target of position t is the input of t - delay, and 0 before there
is one, which is scored too, as in the source. A model needs some 2 * cutoff * delay numbers of state. One linear layer is the
paper's model.

With `num_lags` n the targets of a position are the inputs of `delay`, 2 `delay`, ..., n `delay` ago. The paper's printed
numbers are of four lags, as a comment in the source says (delay=1000 in rows of 4000).

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
      num_lags: targets of a position.

    Raises:
      UserError: for a delay that is longer than the row, a cutoff that leaves no frequency, and lags that go beyond the row.
    """

    sizes: dict[str, int] = {"train": 16_384, "valid": 1_024, "test": 1_024}
    paper_size: ClassVar[dict] = {"length": 4000, "delay": 1000, "cutoff": 0.25}

    def __init__(self, length: int = 256, delay: int = 64, cutoff: float = 0.25, num_lags: int = 1):
        if not 1 <= delay < length:
            raise UserError(f"delay={delay} must be at least 1 and less than length={length}")
        if not 1 <= num_lags <= max(1, length // delay):
            raise UserError(
                f"num_lags={num_lags} must be 1 to length={length} divided by delay={delay}, {max(1, length // delay)}"
            )
        self.name = "hippo_delay"
        self.spec = Spec(None, 1, num_lags, "token_regression", length, causal=True)
        white_noise(np.random.default_rng(0), length, cutoff)  # refuses what it cannot make
        self._delay, self._cutoff, self._lags = delay, cutoff, num_lags

    def draw(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        signal = white_noise(rng, self.spec.length, self._cutoff)[:, None]
        delayed = np.zeros((self.spec.length, self._lags))
        for lag in range(self._lags):
            by = self._delay * (lag + 1)
            delayed[by:, lag] = signal[:-by, 0]
        return real_row(signal, delayed, np.ones(self.spec.length, np.float32))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Root mean squared error of 0, of the input itself, and (once there is something to say) of the inputs' mean so far.

        The last is low because the noise is centred at some value other than 0.
        """
        squares, rows = np.zeros(3), 0
        for row in self.rows(split):
            inputs, targets = np.float64(row["inputs"]), np.float64(row["targets"])
            mean = np.repeat(np.cumsum(inputs)[:, None] / np.arange(1, len(inputs) + 1)[:, None], self._lags, 1)
            for lag in range(self._lags):
                mean[: self._delay * (lag + 1), lag] = 0
            squares += [np.mean(np.square(targets - guess)) for guess in (0, inputs, mean)]
            rows += 1
        return dict(zip(("zero", "input", "mean so far"), np.sqrt(squares / rows).tolist(), strict=True))

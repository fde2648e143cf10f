"""Random signals."""

import numpy as np
from jaxtyping import Float64

from common.errors import UserError

RMS = 0.5


def white_noise(rng: np.random.Generator, length: int, cutoff: float) -> Float64[np.ndarray, "T"]:
    """Band-limited white noise that starts at 0, as in state-spaces/s4 (src/dataloaders/utils/signal.py, after Nengo).

    Its Fourier coefficients are complex Gaussian up to the cutoff and 0 above it and at frequency 0. The root mean square is
    0.5 before its first value is subtracted from all, and sqrt(2) times that after.

    Args:
      rng: random numbers.
      length: samples, at least 2.
      cutoff: highest frequency in cycles per sample, 1 / length to 0.5.

    Raises:
      UserError: where no frequency is below the cutoff.
    """
    if length < 2 or not 1 / length <= cutoff <= 0.5:
        raise UserError(
            f"cutoff={cutoff} must be 1 / length={1 / max(length, 1):.3g} to 0.5 cycles per sample; "
            f"length={length}, at least 2"
        )
    half = (length + 1) // 2
    real, imaginary = rng.normal(0, RMS * np.sqrt(0.5), (2, half + 1))
    imaginary[-1] = 0
    coefficients = real + 1j * imaginary
    outside = np.fft.rfftfreq(2 * half) > cutoff
    outside[0] = True
    coefficients[outside] = 0
    # The power of what is cut off goes to the rest.
    power = 1 - (np.sum(outside) - 1) / half
    signal = np.fft.irfft(coefficients * np.sqrt(2 * half / power))[:length]
    return signal - signal[0]

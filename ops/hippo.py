"""HiPPO: the coefficients of a signal's past on a basis of functions, kept online (arXiv 2008.07669).

Under a measure on the past, c(t) holds the coefficients of the best approximation of f until t by N basis functions. It obeys
c' = A c + B f or, where the measure grows with t ("legs"), t c' = A c + B f. The measures:

    legs     all the past, uniformly; Legendre polynomials stretched over [0, t]
    legt     the last unit of time, uniformly; Legendre polynomials (the Legendre memory unit)
    lagt     all the past, fading exponentially; Laguerre polynomials times exp(-age / 2)
    fourier  the last unit of time, uniformly; cosines and sines

Everything here is a constant: numpy in float64.
"""

import functools

import numpy as np
import scipy.linalg
from jaxtyping import Complex, Float

from common.errors import UserError, check_choice

MEASURES = ("legs", "legt", "lagt", "fourier")
METHODS = ("forward", "backward", "bilinear", "zoh")

Vector = Float[np.ndarray, "N"]
Matrix = Float[np.ndarray, "N N"]


def transition(measure: str, size: int) -> tuple[Matrix, Vector]:
    """A and B of a measure (appendix D of the paper; "lagt" with its tilted, orthonormal basis; "fourier" of arXiv 2206.12037).

    Raises:
      UserError: for an unknown measure, or a size that the measure does not have.
    """
    _check(measure, size)
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    below = n[:, None] > n
    if measure == "legs":
        return -np.outer(root, root) * below - np.diag(n + 1.0), root
    if measure == "legt":
        sign = np.where(n[:, None] >= n, 1.0, (-1.0) ** (n[:, None] - n))
        return -np.outer(root, root) * sign, root
    if measure == "lagt":
        return -1.0 * below - np.eye(size) / 2, np.ones(size)
    # What leaves the window is taken from the reconstruction, which at its border is the mean of both ends.
    ends = basis(measure, size, np.zeros(1))[0]
    turn = np.zeros((size, size))
    even = 2 * np.arange(size // 2)
    turn[even, even + 1] = np.pi * even
    return turn - turn.T - 2 * np.outer(ends, ends), 2 * ends


def discretize(A: Matrix, B: Vector, dt: float, method: str = "bilinear") -> tuple[Matrix, Vector]:
    """Abar and Bbar of c_t = Abar c_{t-1} + Bbar f_t for steps of `dt`.

    Args:
      A, B: of the continuous system.
      dt: size of a step; 1 / w makes a unit of time last w steps.
      method: "forward" or "backward" (Euler), "bilinear" (trapezoid) or "zoh" (exact for f that is constant in a step).

    Raises:
      UserError: for an unknown method.
    """
    check_choice("discretisation", method, METHODS)
    identity = np.eye(len(A))
    if method == "zoh":
        # exp of [[A, B], [0, 0]] dt is [[exp(A dt), int_0^dt exp(A s) B ds], [0, 1]].
        both = scipy.linalg.expm(dt * np.block([[A, B[:, None]], [np.zeros((1, len(A) + 1))]]))
        return both[:-1, :-1], both[:-1, -1]
    explicit = {"forward": 1.0, "backward": 0.0, "bilinear": 0.5}[method]
    left = identity - (1 - explicit) * dt * A
    return np.linalg.solve(left, identity + explicit * dt * A), np.linalg.solve(left, dt * B)


def discretize_scaled(A: Matrix, B: Vector, t: int, method: str = "bilinear") -> tuple[Matrix, Vector]:
    """Abar and Bbar of step t = 1, 2, ... for t c' = A c + B f.

    "zoh" goes from t - 1 to t and is exact from the start (c_1 holds a constant); the authors' code goes from t to t + 1.
    The other methods take 1/t as the size of the step, as the paper does.
    """
    if method != "zoh":
        return discretize(A, B, 1 / t, method)
    if t == 1:
        return np.zeros_like(A), -np.linalg.solve(A, B)
    return discretize(A, B, np.log(t / (t - 1)), method)


@functools.cache
def normal_plus_low_rank(
    measure: str, size: int
) -> tuple[Complex[np.ndarray, "N"], Complex[np.ndarray, "N N"], Complex[np.ndarray, "N R"], Complex[np.ndarray, "N"]]:
    """Splits A = V (Diag(L) - P P*) V* and B = V b with V unitary (S4, arXiv 2111.00396, theorem 1 and appendix C).

    Returns:
      L, in the order of its imaginary parts (so that the second half has one of each conjugate pair); V; P, of rank R = 1, or
      2 for "legt"; and b. They are kept, so that they cannot be written to.
    """
    A, B = transition(measure, size)
    n = np.arange(size)
    if measure == "legs":
        P = np.sqrt(n + 0.5)[None]
    elif measure == "legt":
        P = np.sqrt(2 * n + 1) * (n % 2 == np.arange(2)[:, None])
    elif measure == "lagt":
        P = np.full((1, size), 0.5**0.5)
    else:
        P = B[None] / 2**0.5
    normal = A + P.T @ P  # a multiple of the identity and a skew matrix
    imaginary, V = np.linalg.eigh(-0.5j * (normal - normal.T))
    parts = (np.mean(np.diag(normal)) + 1j * imaginary, V, V.conj().T @ P.T, V.conj().T @ B)
    for part in parts:
        part.flags.writeable = False
    return parts


def basis(measure: str, size: int, x: Float[np.ndarray, "X"]) -> Float[np.ndarray, "X N"]:
    """The basis functions.

    Args:
      measure: one of `MEASURES`.
      size: number of functions.
      x: for "lagt", ages (0 is now); else places in the window, from 0 (its oldest) to 1 (now).
    """
    _check(measure, size)
    if measure == "lagt":
        functions = [np.exp(-x / 2), np.exp(-x / 2) * (1 - x)]  # L_0 and L_1; then the three-term recurrence
        for n in range(1, size - 1):
            functions.append(((2 * n + 1 - x) * functions[n] - n * functions[n - 1]) / (n + 1))
        return np.stack(functions[:size], -1)
    if measure == "fourier":
        phase = 2 * np.pi * x[:, None] * np.arange(size // 2)
        functions = 2**0.5 * np.stack([np.cos(phase), np.sin(phase)], -1).reshape(len(x), size)
        return functions * np.where(np.arange(size) == 0, 0.5**0.5, 1.0)
    return np.polynomial.legendre.legvander(2 * x - 1, size - 1) * np.sqrt(2 * np.arange(size) + 1)


def memory(
    measure: str, signal: Float[np.ndarray, "T"], size: int, window: float = 1.0, method: str = "bilinear"
) -> Float[np.ndarray, "T N"]:
    """The coefficients after each step of a signal.

    Args:
      measure: one of `MEASURES`.
      signal: f_1 .. f_T, f_t being the value between t - 1 and t.
      size: N.
      window: number of steps that last a unit of time; without meaning for "legs".
      method: one of `METHODS`.
    """
    A, B = transition(measure, size)
    steps = discretize(A, B, 1 / window, method)
    c, history = np.zeros(size), []
    for t, f in enumerate(signal, 1):
        a_bar, b_bar = discretize_scaled(A, B, t, method) if measure == "legs" else steps
        c = a_bar @ c + b_bar * f
        history.append(c)
    return np.stack(history)


def reconstruct(
    measure: str, c: Float[np.ndarray, "N"], times: Float[np.ndarray, "X"], now: float, window: float = 1.0
) -> Float[np.ndarray, "X"]:
    """The signal at some times (in steps) as the coefficients `c` of the time `now` tell it."""
    if measure == "legs":
        x = times / now
    elif measure == "lagt":
        x = (now - times) / window
    else:
        x = 1 - (now - times) / window
    return basis(measure, len(c), x) @ c


def _check(measure: str, size: int) -> None:
    check_choice("measure", measure, MEASURES)
    if size < 1 or (measure == "fourier" and size % 2):
        raise UserError(
            f"measure {measure!r} has no size {size}; take a positive {'even ' * (measure == 'fourier')}number"
        )

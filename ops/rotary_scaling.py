"""Rotary frequencies for sequences longer than those of pretraining, by the rules that published checkpoints name.

A rule is written as text, `"yarn:factor=32,original_length=4096"`: its name, and the arguments of the function below of that
name. Every rule is fixed when a model is built. The authors of "dynamic" and "longrope" choose by the length of the sequence at
hand instead, so that a token's output would depend on how much follows it.
"""

import inspect
import math

import numpy as np

from common.errors import UserError, check_choice


def frequencies(channels: int, base: float, scaling: str = "none") -> tuple[np.ndarray, float]:
    """The frequencies of `ops.rotary.rotary` under a rule.

    Args:
      channels: number of rotated channels, R.
      base: theta_i = base^(-2i/R) without a rule.
      scaling: "none", or a rule and its arguments; numbers of a list are separated by spaces.

    Returns:
      the frequencies [R / 2] in float64, and the factor of rotated queries and keys.

    Raises:
      UserError: as `parse`, and for a list of another length than there are frequencies.
    """
    name, given = parse(scaling)
    return (_plain(channels, base), 1.0) if name == "none" else RULES[name](channels, base, **given)


def parse(scaling: str) -> tuple[str, dict[str, float | np.ndarray]]:
    """The name of a rule and all of its arguments.

    Raises:
      UserError: for an unknown rule or argument, a number that is none or not positive, or an argument that is missing.
    """
    name, _, text = scaling.partition(":")
    check_choice("rotary_scaling", name, ("none", *RULES))
    keywords = inspect.signature(RULES[name]).parameters.values() if name in RULES else ()
    known = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
    given = {}
    for entry in filter(None, text.split(",")):
        key, _, value = (part.strip() for part in entry.partition("="))
        if key not in known:
            takes = ", ".join(known) or "no arguments"
            raise UserError(f"rotary_scaling={scaling!r}: {name} has no {key!r}, it takes {takes}")
        try:
            numbers = [float(number) for number in value.split()]
        except ValueError:
            numbers = []
        if not numbers or not all(0 <= n < math.inf for n in numbers):
            raise UserError(f"rotary_scaling={scaling!r}: {key} must be a number, 0 or more, got {value!r}")
        given[key] = np.array(numbers) if key == "factors" else numbers[0]
    if missing := [key for key, default in known.items() if default is inspect.Parameter.empty and key not in given]:
        raise UserError(f"rotary_scaling={scaling!r}: {name} needs {', '.join(missing)}")
    for key in ("factor", "factors", "original_length", "beta_fast", "beta_slow"):
        if key in given and not np.all(given[key] > 0):
            raise UserError(f"rotary_scaling={scaling!r}: {key} must be positive")
    return name, {key: given.get(key, default) for key, default in known.items()}


def complete(scaling: str) -> str:
    """The text of a rule with all of its arguments, in their order: what is equal is the same rule."""
    name, given = parse(scaling)
    values = {key: " ".join(repr(float(number)) for number in np.atleast_1d(value)) for key, value in given.items()}
    return f"{name}:{','.join(f'{key}={value}' for key, value in values.items())}" if given else name


def _plain(channels, base):
    return base ** (-np.arange(0, channels, 2) / channels)


def linear(channels: int, base: float, *, factor: float) -> tuple[np.ndarray, float]:
    """Positions divided by `factor` (arXiv 2306.15595)."""
    return _plain(channels, base) / factor, 1.0


def dynamic(
    channels: int, base: float, *, factor: float, original_length: float, length: float
) -> tuple[np.ndarray, float]:
    """The base that fits sequences of `length` tokens, where a model was trained with `original_length` of them.

    base' = base (factor length / original_length - (factor - 1))^(R / (R - 2)), and base up to the original length; with
    factor 1, the "NTK-aware" rule. The authors put the length of the sequence at hand for `length`.
    """
    growth = max(factor * length / original_length - (factor - 1), 1.0)
    # Of two channels, the only frequency is 1 with every base.
    return _plain(channels, base * growth ** (channels / max(channels - 2, 1))), 1.0


def yarn(
    channels: int,
    base: float,
    *,
    factor: float,
    original_length: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: float = 1.0,
    magnitude: float = 0.0,
) -> tuple[np.ndarray, float]:
    """Slow frequencies are divided by `factor`, fast ones stay, with a ramp between them (arXiv 2309.00071, section 3).

    The ramp reaches, over the index i, from the frequency that makes `beta_fast` turns in `original_length` tokens to the one
    that makes `beta_slow`; its ends are rounded outwards to whole indices unless `truncate` is 0. Queries and keys are scaled by
    `magnitude`, which 0 leaves at 0.1 ln(factor) + 1.
    """
    if base <= 1:
        raise UserError(f"rotary_scaling: yarn needs a base of more than 1, got {base}")
    index = lambda turns: channels * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(base))
    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    high += 0.001 if high == low else 0
    ramp = np.clip((np.arange(channels // 2) - low) / (high - low), 0, 1)
    plain = _plain(channels, base)
    found = plain / factor * ramp + plain * (1 - ramp)
    return found, magnitude or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)


def llama3(
    channels: int,
    base: float,
    *,
    factor: float,
    original_length: float,
    low_factor: float = 1.0,
    high_factor: float = 4.0,
) -> tuple[np.ndarray, float]:
    """Llama 3.1's rule (arXiv 2407.21783): frequencies of less than `low_factor` turns in `original_length` tokens are divided by
    `factor`, those of more than `high_factor` stay, and those between are mixed by their number of turns."""
    if not low_factor < high_factor:
        raise UserError(f"rotary_scaling: llama3 needs low_factor < high_factor, got {low_factor} and {high_factor}")
    plain = _plain(channels, base)
    turns = original_length * plain / (2 * math.pi)
    share = np.clip((turns - low_factor) / (high_factor - low_factor), 0, 1)
    return plain * (share + (1 - share) / factor), 1.0


def longrope(
    channels: int, base: float, *, factors: np.ndarray, factor: float = 1.0, original_length: float = 2.0
) -> tuple[np.ndarray, float]:
    """Each frequency is divided by its own of `factors` (arXiv 2402.13753).

    Queries and keys are scaled by sqrt(1 + ln(factor) / ln(original_length)), where the context was made `factor` times as long.
    Checkpoints hold two lists of factors, for sequences up to the original length and for longer ones; give one of them.
    """
    if len(factors) != channels // 2:
        raise UserError(
            f"rotary_scaling: longrope needs {channels // 2} factors, one per frequency, got {len(factors)}"
        )
    if factor > 1 and original_length <= 1:
        raise UserError(f"rotary_scaling: longrope needs an original_length of more than 1, got {original_length}")
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
    return _plain(channels, base) / factors, magnitude


RULES = {rule.__name__: rule for rule in (linear, dynamic, yarn, llama3, longrope)}

"""Tensors in four bits, as gpt-oss's release has its experts: MXFP4 of the Microscaling Formats (MX) specification 1.0 of the
Open Compute Project.

A tensor NAME [experts, in, out] is stored as NAME_blocks, uint8 [experts, out, in / 32, 16], and NAME_scales, uint8 [experts,
out, in / 32]: 32 neighbours share the factor 2^(scale - 127), and a byte has two of them, the first in its lower half.
"""

from collections.abc import Iterable

import ml_dtypes
import numpy as np

from common.errors import UserError

METHOD = "mxfp4"  # in config.json
PARTS = ("blocks", "scales")

# A sign, two bits of exponent and one of mantissa.
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def joined(names: Iterable[str]) -> set[str]:
    """The names of tensors, those in two parts under the name of the whole."""
    names = set(names)
    whole = {name.removesuffix("_blocks") for name in names if name.endswith("_blocks")}
    whole = {name for name in whole if f"{name}_scales" in names}
    return names - {f"{name}_{part}" for name in whole for part in PARTS} | whole


def dequantised(blocks: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    """The tensor [experts, in, out] in bfloat16, which holds its numbers exactly.

    Args:
      blocks: uint8 [experts, out, in / 32, 16].
      scales: uint8 [experts, out, in / 32].
      name: of the tensor, for the message.

    Raises:
      UserError: for other shapes or types.
    """
    if blocks.ndim != 4 or blocks.shape[-1] != 16 or scales.shape != blocks.shape[:-1]:
        raise UserError(f"{name}: blocks {blocks.shape} and scales {scales.shape} are not those of a tensor in MXFP4")
    if not blocks.dtype == scales.dtype == np.uint8:
        raise UserError(f"{name}: blocks and scales in MXFP4 are bytes, got {blocks.dtype} and {scales.dtype}")
    experts, rows, groups, _ = blocks.shape
    whole = np.empty((experts, groups * 32, rows), ml_dtypes.bfloat16)
    for e in range(experts):  # one at a time, for the sake of memory
        numbers = VALUES[np.stack([blocks[e] & 15, blocks[e] >> 4], -1)].reshape(rows, groups, 32)
        numbers = np.ldexp(numbers, scales[e][..., None].astype(np.int32) - 127)
        whole[e] = numbers.reshape(rows, groups * 32).T.astype(ml_dtypes.bfloat16)
    return whole

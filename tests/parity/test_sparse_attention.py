"""Sparse Transformer against the paper's equations: dense attention, in float64, to the sets of section 4.3."""

import functools

import numpy as np
import pytest

from models.mixer import Context
from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"
L, C = 9, 2  # does not divide the length


def factors(pattern):
    masks = np.zeros((2, LENGTH, LENGTH), bool)
    for i in range(LENGTH):
        for j in range(i + 1):
            if pattern == "strided":
                masks[:, i, j] = i - L < j, (i - j) % L == 0
            else:
                masks[:, i, j] = j // L == i // L, j % L in range(L - C, L)
    return masks


# Each factor alone, and each union.
@pytest.mark.parametrize(
    "pattern, combine, layer",
    [("strided", "merged", 0), ("fixed", "merged", 0), ("strided", "heads", 0), ("fixed", "alternate", 1)],
)
def test_pattern(pattern, combine, layer):
    torch = load("torch")
    ours, arguments = mixer("sparse_attention", pattern=pattern, combine=combine, stride=L, summary=C)
    first, second = factors(pattern)
    sets = {"merged": [first | second] * 4, "alternate": [(first, second)[layer]] * 4}
    mask = np.stack(sets.get(combine, [first, first, second, second]))

    def theirs(a):
        q, k, v = (torch.einsum("btd,dhk->bhtk", a["x"], a[f"w_{name}"]) for name in "qkv")
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~torch.tensor(mask), -torch.inf)
        p = torch.nan_to_num(torch.softmax(scores.masked_fill(torch.tensor(~mask.any(-1))[..., None], 0), -1))
        y = (p * torch.tensor(mask)) @ v
        return torch.einsum("bhtk,hkd->btd", y, a["w_o"])

    assert_parity(functools.partial(ours, context=Context(layer)), theirs, arguments, dtype="float64")

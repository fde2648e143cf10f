"""Linformer against the paper's equation with the projections as matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("sharing", ["none", "headwise", "kv", "layerwise"])
def test_equation(sharing):
    """Whole sequences, and (once) documents in rows: 30 and 40 tokens, and 50 amid padding."""
    torch = load("torch")
    both, arguments = mixer("linformer", causal=False, sharing=sharing, rank=5, length=LENGTH + 2)
    ids = np.array([[1] * 30 + [2] * 40, [0] * 7 + [1] * 50 + [0] * 13], np.int32)
    assert ids.shape == (BATCH, LENGTH)
    ours = (lambda a: (both(a), both(a, segment_ids=jnp.asarray(ids)))) if sharing == "none" else both

    def theirs(a):
        projections = a["shared.e" if sharing == "layerwise" else "e"]
        E, F = projections[0], projections[-1]

        def attend(x):
            q, k, v = torch.einsum("td,dshk->shtk", x, a["w_qkv"])
            keys, values = E[:, : len(x)].mT @ k, F[:, : len(x)].mT @ v
            y = torch.softmax(q @ keys.mT / q.shape[-1] ** 0.5, -1) @ values
            return torch.einsum("htk,hkd->td", y, a["w_o"])

        whole = torch.stack([attend(x) for x in a["x"]])
        if sharing != "none":
            return whole
        rows = []
        for x, row in zip(a["x"], ids, strict=True):
            pieces = [attend(x[row == i]) if i else torch.zeros_like(x[row == i]) for i in dict.fromkeys(row.tolist())]
            order = np.concatenate([np.flatnonzero(row == i) for i in dict.fromkeys(row.tolist())])
            rows.append(torch.cat(pieces)[np.argsort(order)])
        return whole, torch.stack(rows)

    assert_parity(ours, theirs, arguments, dtype="float64")

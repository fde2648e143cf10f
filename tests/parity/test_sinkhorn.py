"""Sinkhorn attention against the paper's equations block by block, normalising probabilities and not logarithms."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"

BLOCK, ITERATIONS = 14, 3  # five blocks


@pytest.mark.parametrize("causal", [True, False])
def test_blocks(causal):
    torch = load("torch")
    options = {"block": BLOCK, "iterations": ITERATIONS, "temperature": 0.5, "length": LENGTH + BLOCK}
    ours, arguments = mixer("sinkhorn", causal=causal, **options)
    blocks = LENGTH // BLOCK

    def permutation(k, w):
        """P of one row and head, from keys [T, K]."""
        if causal:
            summary = torch.stack([k[: i * BLOCK + 1].mean(0) for i in range(blocks)])
        else:
            summary = torch.stack([k[i * BLOCK : (i + 1) * BLOCK].mean(0) for i in range(blocks)])
        P = torch.exp(summary @ w[:, :blocks] / 0.5)
        if causal:
            P = P.tril(-1)
            return P / P.sum(1, keepdim=True).clamp(min=1e-300)
        for _ in range(ITERATIONS):
            P = P / P.sum(1, keepdim=True)
            P = P / P.sum(0, keepdim=True)
        return P

    def attend(q, k, v, mask=0.0):
        return torch.softmax(q @ k.T / q.shape[-1] ** 0.5 + mask, -1) @ v

    def head(q, k, v, w):
        P, outputs = permutation(k, w), []
        future = torch.full((BLOCK, BLOCK), -torch.inf).triu(1) if causal else 0.0
        parts = [[a[i * BLOCK : (i + 1) * BLOCK] for i in range(blocks)] for a in (q, k, v)]
        for i in range(blocks):
            q_i, k_i, v_i = (part[i] for part in parts)
            moved = [sum(P[i, j] * part[j] for j in range(blocks)) for part in parts[1:]]
            outputs.append(attend(q_i, k_i, v_i, future) + attend(q_i, *moved))
        return torch.cat(outputs)

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        rows = [
            torch.stack([head(*parts, w) for *parts, w in zip(*row, a["w_sort"], strict=True)])
            for row in zip(q, k, v, strict=True)
        ]
        return torch.einsum("bhtk,hkd->btd", torch.stack(rows), a["w_o"])

    assert_parity(ours, theirs, arguments, dtype="float64")

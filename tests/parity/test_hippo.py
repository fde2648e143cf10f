"""HiPPO against the paper's equations: matrices written entry by entry, discretised by matrix exponentials, in float64."""

import math

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "the paper's equations in float64"

SIZE, WINDOW = 6, 16


def entry(measure, n, k):
    """A_nk of arXiv 2008.07669, theorems 1 and 2, and (lagt) of appendix D.2 with alpha = beta = 0."""
    if measure == "legs":
        return -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0.0
    if measure == "legt":
        return -math.sqrt((2 * n + 1) * (2 * k + 1)) * (1 if n >= k else (-1) ** (n - k))
    return -1.0 if n > k else -0.5 if n == k else 0.0


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_equation(measure):
    """Whole sequences, and a row that is packed twice."""
    torch = load("torch")
    both, arguments = mixer("hippo", measure=measure, state=SIZE, signals=3, window=WINDOW)
    ids = jnp.asarray([[1] * 40 + [2] * (LENGTH - 40)] * BATCH)
    ours = lambda a: (both(a), both(a, segment_ids=ids))
    A = torch.tensor([[entry(measure, n, k) for k in range(SIZE)] for n in range(SIZE)], dtype=torch.float64)
    B = torch.tensor([1.0 if measure == "lagt" else math.sqrt(2 * n + 1) for n in range(SIZE)], dtype=torch.float64)

    def hold(duration):
        """exp(A s) and int_0^s exp(A r) dr B."""
        a = torch.matrix_exp(A * duration)
        return a, torch.linalg.solve(A, (a - torch.eye(SIZE, dtype=A.dtype)) @ B)

    def memory(f):
        c, history = torch.zeros(f.shape[0], f.shape[2], SIZE, dtype=f.dtype), []
        for t in range(1, f.shape[1] + 1):
            if measure == "legs" and t == 1:
                a, b = torch.zeros_like(A), -torch.linalg.solve(A, B)  # exp(A s) as s = log(1/0) grows
            else:
                a, b = hold(math.log(t / (t - 1)) if measure == "legs" else 1 / WINDOW)
            c = c @ a.T + f[:, t - 1, :, None] * b
            history.append(c)
        return torch.stack(history, 1)

    def theirs(a):
        f = a["x"] @ a["w_f"]
        packed = torch.cat([memory(f[:, :40]), memory(f[:, 40:])], 1)
        return tuple(torch.einsum("bthn,hnd->btd", c, a["w_o"]) for c in (memory(f), packed))

    assert_parity(ours, theirs, arguments, dtype="float64")

"""Hyena against its paper's operator, written as products of dense matrices in float64."""

import math

import pytest

from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("order,length", [(2, 100), (3, 50)])
def test_matrices(order, length):
    """Arxiv 2302.10866: gates as diagonal matrices, filters as Toeplitz matrices; models longer and shorter than the input."""
    torch = load("torch")
    ours, arguments = mixer(
        "hyena", length=length, order=order, filter_size=16, features=5, frequency=2.0, filter_layers=1
    )

    def filters(a):
        """[length, D, order - 1], token by token."""
        rows = []
        for i in range(length):
            angle = [torch.tensor(2 * math.pi * i / length * f, dtype=torch.float64) for f in (1e-4, 1.0)]
            t = i / (length - 1)
            z = torch.stack([torch.tensor(t, dtype=torch.float64), *map(torch.cos, angle), *(-s.sin() for s in angle)])
            for w, b in (
                (a["filter_in"], a["filter_in_bias"]),
                (a["filter_hidden"][0], a["filter_hidden_bias"][0]),
            ):
                z = torch.sin(a["omega"] * (z @ w + b))
            slow, fast = math.log(0.01) / 1.5, math.log(0.01) / 0.3
            delta = torch.linspace(slow, fast, WIDTH * (order - 1), dtype=torch.float64).reshape(WIDTH, order - 1)
            rows.append(torch.einsum("f,fdn->dn", z, a["filter_out"]) * torch.exp(-t * delta.abs()))
        return torch.stack(rows)

    def theirs(a):
        u = a["x"] @ a["w_in"] + a["b_in"]
        padded = torch.nn.functional.pad(u, (0, 0, 2, 0))
        u = sum(padded[:, j : j + LENGTH] * a["conv"][j] for j in range(3)) + a["conv_bias"]
        x, v = u.split(WIDTH, -1)[:-1], u.split(WIDTH, -1)[-1]
        h = torch.nn.functional.pad(filters(a), (0, 0, 0, 0, 0, LENGTH))
        lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        for n in range(order - 1):
            matrix = torch.where((lag >= 0)[..., None], h[lag.clamp(min=0), :, n], 0.0)
            v = x[order - 1 - n] * v
            v = torch.einsum("tsd,bsd->btd", matrix, v) + a["d"][n] * v
        return (x[0] * v) @ a["w_out"] + a["b_out"]

    assert_parity(ours, theirs, arguments, dtype="float64")

"""SGConv against PyTorch's interpolation and the convolution as a dense matrix in float64."""

import math

import pytest

from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "torch interpolate and a dense Toeplitz matrix in float64"


@pytest.mark.parametrize("causal,length", [(True, 50), (True, 100), (False, 100)])
def test_matrix(causal, length):
    """Arxiv 2210.09298, section 3, with kernels shorter and longer than the sequence, one-sided and two-sided."""
    torch = load("torch")
    F = torch.nn.functional
    size, alpha = 8, torch.linspace(2, 3, WIDTH, dtype=torch.float64)[:, None]
    ours, arguments = mixer("sgconv", causal=causal, length=length, kernel_size=size, decay_max=3.0)

    def kernel(pieces, z):
        """[D, LENGTH], lag 0 first."""
        scales = len(pieces)
        assert scales == 1 + math.ceil(math.log2(length / size))
        parts = [
            F.interpolate(piece[None], scale_factor=2 ** max(0, i - 1), mode="linear")[0] * alpha ** (scales - 1 - i)
            for i, piece in enumerate(pieces)
        ]
        whole = (torch.cat(parts, -1) / z[:, None])[:, :length]
        return F.pad(whole, (0, max(0, LENGTH - length)))[:, :LENGTH]

    def theirs(a):
        lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        matrix = torch.where(lag >= 0, kernel(a["pieces"][0], a["z"][0])[:, lag.clamp(min=0)], 0.0)
        if not causal:
            ahead = kernel(a["pieces"][1], a["z"][1])[:, (-lag - 1).clamp(min=0)]
            matrix = matrix + torch.where(lag < 0, ahead, 0.0)
        y = torch.einsum("dts,bsd->btd", matrix, a["x"]) + a["d"] * a["x"]
        y = F.gelu(y, approximate="tanh")
        return F.glu(torch.einsum("btd,dge->btge", y, a["w_out"]).flatten(2))

    assert_parity(ours, theirs, arguments, dtype="float64", constant=("z",))

"""minLSTM against the paper's log-space form in float64."""

import pytest

from tests.parity.oracles import assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's log-space form in float64"


@pytest.mark.parametrize("conv_size,forms", [(4, ("auto",)), (0, ("sequential", "associative"))])
def test_log_space(conv_size, forms):
    """Arxiv 2410.01201, appendix B: with A the sum of log f', h_t = exp(A_t + logsumexp_{s<=t}(log i'_s + log g_s - A_s))."""
    torch = load("torch")
    F = torch.nn.functional
    ours, arguments = mixer("min_lstm", expand=1.5, conv_size=conv_size, forget_bias=0.5)

    def theirs(a):
        u = a["x"]
        if conv_size:
            padded = F.pad(u.mT, (conv_size - 1, 0))
            u = F.conv1d(padded, a["conv"].T[:, None], groups=u.shape[-1]).mT
        f, i, candidate = (u @ a["w_in"][:, j] + a["b_in"][j] for j in (0, 1, 2))
        difference = F.softplus(-f) - F.softplus(-i)
        log_g = torch.where(candidate >= 0, torch.log(F.relu(candidate) + 0.5), -F.softplus(-candidate))
        decay = torch.cumsum(-F.softplus(difference), 1)
        h = torch.exp(decay + torch.logcumsumexp(-F.softplus(-difference) + log_g - decay, 1))
        return h @ a["w_o"]

    assert_parity(ours, theirs, arguments, forms=forms, dtype="float64")

"""DeltaNet against flash-linear-attention's recurrence, in a layer written out."""

import numpy as np
import pytest

from ops.delta_rule import delta_rule
from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "fla delta_rule_recurrence"
FORMS = ("sequential", "chunked")


def test_operation():
    """Final state and beta up to 2 included."""
    load("torch")
    fla = load_fla("delta_rule")
    arguments = {name: normal(BATCH, LENGTH, 3, size, seed=i) for i, (name, size) in enumerate(zip("qkv", (8, 8, 12)))}
    arguments["k"] /= np.linalg.norm(arguments["k"], axis=-1, keepdims=True)
    arguments["beta"] = np.random.default_rng(6).uniform(0, 2, (BATCH, LENGTH, 3)).astype(np.float32)
    arguments["state"] = normal(BATCH, 3, 8, 12, seed=4)

    def ours(a):
        return delta_rule(a["q"], a["k"], a["v"], a["beta"], scale=8**-0.5, initial_state=a["state"])

    def theirs(a):
        y, state = fla.delta_rule_recurrence(*(a[name].transpose(1, 2) for name in ("q", "k", "v", "beta")), a["state"])
        return y.transpose(1, 2), state

    assert_parity(ours, theirs, arguments, forms=FORMS)


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_layer(negative_eigenvalues):
    """The layer, short convolutions and norm included."""
    torch = load("torch")
    fla = load_fla("delta_rule")
    ours, arguments = mixer("delta_net", negative_eigenvalues=negative_eigenvalues)
    heads = arguments["w_o"].shape[0]

    def branch(a, name):
        x = torch.nn.functional.pad(a["x"] @ a[f"{name}.weight"], (0, 0, 3, 0)).mT
        taps = a[f"{name}.taps"]
        x = torch.nn.functional.silu(torch.nn.functional.conv1d(x, taps.T[:, None], groups=taps.shape[1]))
        return x.unflatten(1, (heads, -1)).mT  # [B, H, T, K]

    def theirs(a):
        q, k, v = (branch(a, name) for name in "qkv")
        q, k = (u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt() for u in (q, k))
        beta = (2 if negative_eigenvalues else 1) * torch.sigmoid(a["x"] @ a["w_b"]).mT
        o, _ = fla.delta_rule_recurrence(q, k, v, beta)
        o = torch.nn.functional.rms_norm(o, o.shape[-1:], a["norm.weight"], 1e-6)
        return torch.einsum("bhtv,hvd->btd", o, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=FORMS)

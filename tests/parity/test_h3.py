"""H3 against the paper's two state spaces stepped token by token in float64."""

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"
STATE = 8


@pytest.mark.parametrize("size", [1, 4])
def test_recurrences(size):
    """Arxiv 2212.14052, algorithm 1: the convolutions of whole sequences and the recurrences of packed rows."""
    torch = load("torch")
    both, arguments = mixer("h3", state=STATE, head_size=size)
    one_segment = jnp.ones((BATCH, LENGTH), jnp.int32)
    ours = lambda a: (both(a), both(a, segment_ids=one_segment))
    heads = WIDTH // size

    def theirs(a):
        q, k, v = torch.einsum("btd,dge->gbte", a["x"], a["w_qkv"])
        # The shift: its state is the last inputs, the newest first.
        shift, window, keys = a["shift"].flip(0), torch.zeros(BATCH, STATE, WIDTH, dtype=k.dtype), []
        for t in range(LENGTH):
            window = torch.cat([k[:, t, None], window[:, :-1]], 1)
            keys.append((shift * window).sum(1) + a["d_k"] * k[:, t])
        k = torch.stack(keys, 1)
        # The diagonal system, (1 - dt A / 2) h_t = (1 + dt A / 2) h_{t-1} + dt u_t.
        A = torch.complex(-torch.exp(a["log_a_real"]), a["a_imag"])
        dt = torch.exp(a["log_dt"])[:, None]
        h, outputs = torch.zeros(BATCH, size, size, heads, STATE // 2, dtype=A.dtype), []
        for t in range(LENGTH):
            q_t, k_t, v_t = (z[:, t].reshape(BATCH, heads, size).permute(0, 2, 1) for z in (q, k, v))
            kv = k_t[:, :, None] * v_t[:, None]
            h = ((1 + dt * A / 2) * h + dt * kv[..., None]) / (1 - dt * A / 2)
            y = 2 * (torch.complex(a["c"][0], a["c"][1]) * h).sum(-1).real + a["d"] * kv
            outputs.append((q_t[:, :, None] * y).sum(1).permute(0, 2, 1).reshape(BATCH, WIDTH))
        o = torch.stack(outputs, 1) @ a["w_o"]
        return o, o

    assert_parity(ours, theirs, arguments, dtype="float64")

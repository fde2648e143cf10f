"""LaCT against its equations in float64, the inner gradient by autograd."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64, the inner gradient by autograd"
CHUNK, WINDOW = 32, 20


def test_layer():
    """Heads of attention and of memory that differ in size, low-rank first weights, and momentum."""
    torch = load("torch")
    functional = torch.nn.functional
    ours, arguments = mixer("lact", memory_heads=2, heads=4, chunk=CHUNK, window=WINDOW, rank=16, orthogonal=False)

    def rotate(x):
        """Channels i and i + K/2 of [B, T, H, K], turned by the position."""
        size = x.shape[-1]
        angle = torch.arange(LENGTH, dtype=x.dtype)[:, None, None] * 1e6 ** (
            -torch.arange(0, size, 2, dtype=x.dtype) / size
        )
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def trained(W, k, v, rates, i):
        """The sum over tokens of the derivatives of f(k) . v to matrix i, each with its rate."""
        value = lambda w: (f([*W[:i], w, *W[i + 1 :]], k) * v).sum(-1)
        return torch.func.vjp(value, W[i])[1](rates[..., i])[0]

    def f(W, x):
        return (functional.silu(x @ W[0]) * (x @ W[2])) @ W[1]

    def theirs(a):
        q, k, v = (a["x"] @ a["w_qkv"][:, i] for i in range(3))
        heads = lambda z, n: z.unflatten(2, (n, -1))
        s = torch.einsum("bthk,bshk->bhts", *(rotate(heads(z, 4)) for z in (q, k))) / 8**0.5
        seen = torch.ones(LENGTH, LENGTH).tril().triu(1 - WINDOW).bool()
        p = torch.softmax(s.masked_fill(~seen, -torch.inf), -1)
        near = torch.einsum("bhts,bshk->bthk", p, heads(v, 4)).flatten(2)

        def view(z, i):
            z = heads(functional.silu(z * a["qk_scale"][i] + a["qk_offset"][i]), 2)
            z = z / z.norm(dim=-1, keepdim=True)
            return heads(rotate(heads(z.flatten(2), 4)).flatten(2), 2).transpose(1, 2)

        q, k, v = view(q, 0), view(k, 1), heads(functional.silu(v), 2).transpose(1, 2)
        rates = functional.softplus(torch.einsum("btd,dhi->bhti", a["x"], a["w_rate"]) + a["b_rate"][:, None])
        m = torch.sigmoid(a["x"] @ a["w_momentum"] + a["b_momentum"]).transpose(1, 2)
        half = torch.eye(16, dtype=q.dtype) / 2
        W = [a["w_0"] @ a["up_0"] + half, a["w_1"], a["w_2"] @ a["up_2"] + half]
        W = [w.expand(len(q), -1, -1, -1) for w in W]
        norms, steps, outputs = [w.norm(dim=-2, keepdim=True) for w in W], [0, 0, 0], []
        for t in range(0, LENGTH, CHUNK):
            here = slice(t, t + CHUNK)
            outputs.append(f(W, q[:, :, here]))
            share = m[:, :, here].mean(-1)[..., None, None]

            chunk = [z[:, :, here] for z in (k, v, rates)]
            gradients = [trained(W, *chunk, i) for i in range(3)]
            steps = [g + share * d for g, d in zip(gradients, steps)]
            W = [w + d for w, d in zip(W, steps)]
            W = [w / (w.norm(dim=-2, keepdim=True) + 1e-5) * n for w, n in zip(W, norms)]
        o = torch.cat(outputs, 2).transpose(1, 2)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * a["norm.weight"]
        o = o * functional.silu(a["x"] @ a["w_s"] + a["b_s"])[..., None]
        return (near + o.flatten(2)) @ a["w_o"]

    assert_parity(ours, theirs, arguments, dtype="float64")

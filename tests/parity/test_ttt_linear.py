"""TTT-Linear against its definition: an inner model trained token by token, gradients by autograd, in float64."""

import pytest

from tests.parity.oracles import WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64, the inner gradient by autograd"


def test_layer():
    """The layer with the paper's mini-batches of 16, learned rates included."""
    torch = load("torch")
    ours, arguments = mixer("ttt_linear", base_rate=0.7)
    heads, size, _ = arguments["memory"].shape
    functional = torch.nn.functional

    def rotate(x):
        """Pairs (2i, 2i + 1) of [B, T, H, K] as complex numbers, turned by the place in the mini-batch."""
        place = torch.arange(x.shape[1], dtype=x.dtype) % 16
        angle = place[:, None, None] * 10000 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.view_as_real(turned).flatten(-2)

    def view(a, name):
        x = functional.pad(a["x"] @ a["w_qk"], (0, 0, 3, 0)).mT
        x = functional.conv1d(x, a[f"conv_{name}"].T[:, None], groups=WIDTH).mT
        return rotate(x.unflatten(2, (heads, size)))

    def theirs(a):
        q, k, v = view(a, "q"), view(a, "k"), torch.einsum("btd,dhk->bthk", a["x"], a["w_v"])
        token_rate = 0.7 * torch.sigmoid(a["x"] @ a["w_lr"]) / size
        place_rate = torch.clamp(1 / torch.arange(1, 17) + a["offset"], min=0)

        def f(W, b, x):
            z = torch.einsum("bhk,bhkv->bhv", x, W) + b
            return x + functional.layer_norm(z, (size,), eps=1e-6) * a["head_norm"] + a["head_norm_bias"]

        loss = lambda W, b, k, v: (f(W, b, k) - v).square().sum() / 2
        gradient = torch.func.grad(loss, argnums=(0, 1))
        W, b = a["memory"].expand(len(q), -1, -1, -1), a["memory_bias"].expand(len(q), -1, -1)
        outputs = []
        for t in range(q.shape[1]):
            if t % 16 == 0:
                start, total = (W, b), (0, 0)
            c = token_rate[:, t, :, None]
            dW, db = gradient(*start, k[:, t], v[:, t])
            total = total[0] + c[..., None] * dW, total[1] + c * db
            W, b = (s - place_rate[t % 16] * g for s, g in zip(start, total))
            outputs.append(f(W, b, q[:, t]))
        o = functional.layer_norm(torch.stack(outputs, 1).flatten(2), (WIDTH,), a["norm.weight"], a["norm.bias"], 1e-6)
        return (functional.gelu(a["x"] @ a["w_g"], approximate="tanh") * o) @ a["w_o"]

    assert_parity(ours, theirs, arguments, dtype="float64")

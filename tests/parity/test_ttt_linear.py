"""TTT-Linear against its definition: an inner model trained token by token, gradients by autograd, in float64."""

import pytest

from tests.parity.oracles import WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64, the inner gradient by autograd"


def layer(torch, a, base_rate, names, network):
    """The layer with the paper's mini-batches of 16, learned rates included.

    Args:
      a: the arguments.
      base_rate: the largest step size.
      names: of the inner model's first parameters, each [H, ...].
      network: (x [B, H, K], the parameters [B, H, ...]) -> what is normalised, [B, H, K].
    """
    heads, size = a["head_norm"].shape
    functional = torch.nn.functional

    def rotate(x):
        """Pairs (2i, 2i + 1) of [B, T, H, K] as complex numbers, turned by the place in the mini-batch."""
        place = torch.arange(x.shape[1], dtype=x.dtype) % 16
        angle = place[:, None, None] * 10000 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.view_as_real(turned).flatten(-2)

    def view(name):
        x = functional.pad(a["x"] @ a["w_qk"], (0, 0, 3, 0)).mT
        x = functional.conv1d(x, a[f"conv_{name}"].T[:, None], groups=WIDTH).mT
        return rotate(x.unflatten(2, (heads, size)))

    q, k, v = view("q"), view("k"), torch.einsum("btd,dhk->bthk", a["x"], a["w_v"])
    token_rate = base_rate * torch.sigmoid(a["x"] @ a["w_lr"]) / size
    place_rate = torch.clamp(1 / torch.arange(1, 17) + a["offset"], min=0)

    def f(x, *parameters):
        z = network(x, *parameters)
        return x + functional.layer_norm(z, (size,), eps=1e-6) * a["head_norm"] + a["head_norm_bias"]

    loss = lambda k, v, *parameters: (f(k, *parameters) - v).square().sum() / 2
    gradient = torch.func.grad(loss, argnums=tuple(range(2, 2 + len(names))))
    now = [a[name].expand(len(q), *a[name].shape) for name in names]
    outputs = []
    for t in range(q.shape[1]):
        if t % 16 == 0:
            start, total = now, [0] * len(names)
        rate = token_rate[:, t]
        total = [
            old + rate.reshape(*rate.shape, *[1] * (new.ndim - 2)) * new
            for old, new in zip(total, gradient(k[:, t], v[:, t], *start))
        ]
        now = [first - place_rate[t % 16] * change for first, change in zip(start, total)]
        outputs.append(f(q[:, t], *now))
    o = functional.layer_norm(torch.stack(outputs, 1).flatten(2), (WIDTH,), a["norm.weight"], a["norm.bias"], 1e-6)
    return (functional.gelu(a["x"] @ a["w_g"], approximate="tanh") * o) @ a["w_o"]


def test_layer():
    torch = load("torch")
    ours, arguments = mixer("ttt_linear", base_rate=0.7)
    network = lambda x, W, b: torch.einsum("bhk,bhkv->bhv", x, W) + b
    theirs = lambda a: layer(torch, a, 0.7, ("memory", "memory_bias"), network)
    assert_parity(ours, theirs, arguments, dtype="float64")

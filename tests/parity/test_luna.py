"""Luna against the paper's equations: two layers of the two-sided form, and the causal form token by token."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixer import Context
from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"

MEMORY, HEADS = 5, 4


def test_two_sided():
    """Twice the same layer, the second with the P of the first; then the stream that leaves it."""
    torch = load("torch")
    graph, params = nnx.split(mixers.create("luna", WIDTH, rngs=nnx.Rngs(0), causal=False, memory=MEMORY, alone=False))
    flat = nnx.to_flat_state(params)
    arguments = {".".join(path): normal(*value.shape, seed=i) / 3 for i, (path, value) in enumerate(flat)}
    arguments |= {"x": normal(BATCH, LENGTH, WIDTH, seed=8), "p": normal(BATCH, MEMORY, WIDTH, seed=9)}

    def ours(a):
        layer = nnx.merge(
            graph, nnx.from_flat_state([(path, value.replace(a[".".join(path)])) for path, value in flat])
        )
        first, _, p = layer(a["x"], context=Context(layer=0, stream=a["p"]))
        second, _, p = layer(a["x"], context=Context(layer=1, stream=p))
        return first, second, p

    def attend(q, c):
        return torch.softmax(q @ c.mT * q.shape[-1] ** -0.5, -1) @ c

    def theirs(a):
        split = lambda x, w: torch.einsum("btd,dhk->bhtk", x, a[w])
        x, p, outputs = a["x"], a["p"], []
        for _ in range(2):
            y_p = attend(split(p, "w_pq"), split(x, "w_pc")).transpose(1, 2).flatten(2)
            y = attend(split(x, "w_q"), split(y_p, "w_c"))
            outputs.append(torch.einsum("bhtk,hkd->btd", y, a["w_o"]))
            p = torch.nn.functional.layer_norm(p + y_p, (WIDTH,), a["norm.weight"], a["norm.bias"], 1e-6)
        return (*outputs, p)

    assert_parity(ours, theirs, arguments, dtype="float64")


def test_causal():
    """Token by token, the sums over the past as they stand."""
    torch = load("torch")
    ours, arguments = mixer("luna", memory=MEMORY)

    def theirs(a):
        x, scale = a["x"], (WIDTH // HEADS) ** -0.5
        split = lambda w: torch.einsum("btd,dhk->bthk", x, a[w])
        q, packed, c = split("w_q"), split("w_pc"), split("w_c")
        memory = torch.einsum("ld,dhk->hlk", a["shared.p"], a["w_pq"])
        weights = torch.log2(1 + 2 ** (scale * torch.einsum("bthk,hlk->bthl", packed, memory)))
        outputs = []
        for t in range(1, LENGTH + 1):
            past, keys = weights[:, :t], c[:, :t]
            similarity = scale * torch.einsum("bhk,bshk->bsh", q[:, t - 1], keys)
            w = torch.softmax((similarity[..., None] * past).mean(1), -1)
            outputs.append((torch.einsum("bhl,bshl->bsh", w, past)[..., None] * keys).mean(1))
        return torch.einsum("bthk,hkd->btd", torch.stack(outputs, 1), a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked"), dtype="float64")


def test_large_inputs():
    """Finite where scores leave float32's resolution and XLA fuses a product into the difference to the maximum. (The other
    tests run without its fusions.)"""
    module = mixers.create("luna", 32, rngs=nnx.Rngs(0), causal=False)
    x = 1e5 * jax.random.normal(jax.random.key(1), (2, 70, 32))
    assert jnp.isfinite(nnx.jit(lambda module, x: module(x)[0])(module, x)).all()

"""The options of `attention` and `local_attention` together, against the equation in float64: whole, packed, and in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from models import mixer as mixers
from models.config import ModelConfig
from tests.tolerance import assert_close

WIDTH, BATCH, LENGTH, HEADS, SIZE = 12, 2, 17, 4, 6
PACKED = np.array([[1] * 11 + [2] * 4 + [0] * 2, [3] * LENGTH], np.int32)
EVERYTHING = {
    "kv_heads": 2, "head_channels": SIZE, "rotary_base": 30.0, "rotary_fraction": 0.7, "qk_norm": True,
    "qk_norm_offset": 1.0, "qk_norm_eps": 1e-2, "qkv_bias": True, "bias": True, "scale": 0.7, "score_cap": 1.5,
    "sinks": True, "rotary_scaling": "yarn:factor=4,original_length=9,beta_fast=2",
}  # fmt: skip
LOCAL = {"window": 4, "sink_tokens": 2, "output_gate": "head"}
CASES = {
    "attention": ("attention", {**EVERYTHING, "output_gate": "full"}, True),
    "attention both ways": ("attention", {**EVERYTHING, "output_gate": "head"}, False),
    "local": ("local_attention", {**EVERYTHING, **LOCAL, "qk_norm_span": "all"}, True),
    "local both ways": ("local_attention", {**EVERYTHING, **LOCAL}, False),
}


def document(p, options, causal, x):
    """The outputs of one document [length, width], and all gates and norms, from the definitions."""
    T, theta, reach = len(x), 30.0 ** (-np.arange(0, 4, 2) / 4), options.get("window", T := len(x))
    # The ramp of yarn over two frequencies, from index floor(-0.20) to ceil(0.21): the second is divided by 4.
    theta = theta * np.array([1, 1 / 4])
    magnitude = 0.1 * np.log(4) + 1
    angle = np.arange(T)[:, None, None] * theta

    def rotated(a):
        first, second, rest = a[..., :2], a[..., 2:4], a[..., 4:]
        cos, sin = magnitude * np.cos(angle), magnitude * np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def normalised(a, w):
        if options.get("qk_norm_span") == "all":
            return (1 + w.reshape(a.shape[1:])) * a / np.sqrt(np.mean(a**2, (-2, -1), keepdims=True) + 1e-2)
        return (1 + w) * a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-2)

    q, k, v = (np.einsum("td,dhk->thk", x, p[f"w_{n}"]) + p[f"b_{n}"] for n in "qkv")
    q, k = (rotated(normalised(a, p[f"{n}_norm.weight"])) for a, n in ((q, "q"), (k, "k")))
    k, v = (np.repeat(a, 2, axis=1) for a in (k, v))
    s = 1.5 * np.tanh(0.7 * np.einsum("ihk,jhk->hij", q, k) / 1.5)
    i, j = np.arange(T)[:, None], np.arange(T)
    seen = np.tri(T, dtype=bool) if causal else np.ones((T, T), bool)
    if "window" in options:
        near = i - j < reach if causal else np.abs(i - j) <= reach // 2
        seen &= near | (j < options["sink_tokens"])
    e = np.where(seen, np.exp(s), 0)
    y = np.einsum("hij,jhk->ihk", e / (e.sum(-1, keepdims=True) + np.exp(p["sinks"])[:, None, None]), v)
    y = y / (1 + np.exp(-np.einsum("td,dhk->thk", x, p["w_g"])))
    return np.einsum("thk,hkd->td", y, p["w_o"]) + p["b_o"]


@pytest.mark.parametrize("case", CASES)
def test_options(case):
    name, options, causal = CASES[case]
    mixer = mixers.create(name, WIDTH, rngs=nnx.Rngs(0), causal=causal, heads=HEADS, **options)
    graph, params = nnx.split(mixer)
    numbers = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + np.float32(0.3 * numbers.standard_normal(p.shape)), params)
    flat = {".".join(path): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(params)}
    x = np.float32(numbers.standard_normal((BATCH, LENGTH, WIDTH)))
    expected = np.zeros(x.shape)
    for row, part in ((0, slice(0, 11)), (0, slice(11, 15)), (1, slice(0, LENGTH))):
        expected[row, part] = document(flat, options, causal, np.float64(x[row, part]))

    @jax.jit
    def run(x, carry=None, ids=None):
        return nnx.merge(graph, params)(x, carry, segment_ids=ids)

    assert_close(run(x, None, PACKED)[0], expected)
    assert_close(run(x)[0][1], expected[1])
    if causal:
        for pieces in ((7, 7, 1, 1, 1), (1,) * LENGTH):
            found, carry, at = [], mixer.initial_carry(BATCH, LENGTH), 0
            for length in pieces:
                y, carry = run(x[:, at : at + length], carry, PACKED[:, at : at + length])
                found.append(y)
                at += length
            assert_close(jnp.concatenate(found, 1), expected)


def test_no_positions_can_be_asked_for():
    """A model of attention without positions gets sinusoids, unless "nope" says that none are wanted."""
    config = lambda positions: ModelConfig(vocab_size=9, targets=9, mixer={"attention": {"positions": positions}})
    assert config("none").sinusoidal and not config("nope").sinusoidal and not config("rotary").sinusoidal


@pytest.mark.parametrize(
    "name,options,idle",
    [
        ("attention", {"positions": "alibi", "rotary_fraction": 0.5}, "rotary_fraction"),
        ("local_attention", {"positions": "nope", "rotary_scaling": "linear:factor=2"}, "rotary_scaling"),
        ("attention", {"qk_norm_eps": 1e-5}, "qk_norm_eps"),
        ("mla", {"positions": "none", "rotary_base": 500.0}, "rotary_base"),
        ("forgetting_attention", {"rotary_base": 500.0}, "rotary_base"),
    ],
)
def test_hyperparameters_without_effect_are_refused(name, options, idle):
    with pytest.raises(UserError, match=f"`{idle}` has no effect"):
        mixers.sketch(name, WIDTH, **options)

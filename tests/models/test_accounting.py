"""Operations against hand counts, parameters and carries against their definitions."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from models import accounting
from models.accounting import Flops, flops
from training import sharding

B, D, H, LAYERS = 8, 16, 32, 5


def matmul_flops(fn, *args):
    return accounting.flops(fn, *args).matmul


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def mlp(x, w1, w2):
    return jax.nn.relu(x @ w1) @ w2


def stack(x, w1, w2):
    return jax.lax.scan(lambda x, w: (mlp(x, *w), None), x, (w1, w2))[0]


def test_dense_ragged_and_batched_products():
    assert flops(jnp.matmul, array(B, D), array(D, H)) == Flops(matmul=2 * B * D * H)
    attend = lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k)
    assert flops(attend, array(2, 7, 3, 5), array(2, 9, 3, 5)).matmul == 2 * 2 * 3 * 7 * 9 * 5
    ragged = array(B, D), array(4, D, H), array(4, dtype=jnp.int32)
    assert flops(jax.lax.ragged_dot, *ragged).matmul == 2 * B * D * H
    grad = jax.grad(lambda *args: jnp.sum(jax.lax.ragged_dot(*args) ** 2), argnums=(0, 1))
    assert flops(grad, *ragged).matmul == 3 * 2 * B * D * H


def test_convolutions_and_solves():
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1,), padding="SAME")
    layout = ("NWC", "WIO", "NWC")
    dense = lambda x, w: conv(x, w, dimension_numbers=layout)
    assert flops(dense, array(2, 10, 6), array(4, 6, 7)).matmul == 2 * (2 * 10 * 7) * (4 * 6)
    depthwise = lambda x, w: conv(x, w, dimension_numbers=layout, feature_group_count=6)
    assert flops(depthwise, array(2, 10, 6), array(4, 1, 6)).matmul == 2 * (2 * 10 * 6) * 4
    solve = lambda a, b: jax.scipy.linalg.solve_triangular(a, b, lower=True)
    assert flops(solve, array(3, 8, 8), array(3, 8, 2)).matmul == 3 * 8 * 8 * 2


def test_fourier_transforms_are_counted_apart():
    half = round(2.5 * 16 * math.log2(16))
    assert flops(jnp.fft.rfft, array(3, 16)) == Flops(fft=3 * half)
    assert flops(lambda x: jnp.fft.irfft(x, 16), array(3, 9, dtype=jnp.complex64)) == Flops(fft=3 * half)
    assert flops(jnp.fft.fft, array(3, 16, dtype=jnp.complex64)) == Flops(fft=3 * 2 * half)


def test_scanned_stacks_count_every_layer():
    x, w1, w2 = array(B, D), array(LAYERS, D, H), array(LAYERS, H, D)
    one = 2 * B * D * H
    assert matmul_flops(stack, x, w1, w2) == LAYERS * 2 * one
    nested = lambda x, w1, w2: jax.lax.scan(lambda x, _: (stack(x, w1, w2), None), x, None, length=3)[0]
    assert matmul_flops(nested, x, w1, w2) == 3 * LAYERS * 2 * one
    mapped = jax.vmap(stack, in_axes=(0, None, None))
    assert matmul_flops(mapped, array(4, B, D), w1, w2) == 4 * LAYERS * 2 * one


def test_gradients_count_what_is_used():
    """Forward 2 products, backward 4, fewer where an input's gradient is not asked for, none for unused results."""
    one = 2 * B * D * H
    x, w1, w2 = array(B, D), array(D, H), array(H, D)
    loss = lambda x, w1, w2: jnp.sum(mlp(x, w1, w2) ** 2)
    assert matmul_flops(jax.grad(loss, argnums=(0, 1, 2)), x, w1, w2) == 6 * one
    assert matmul_flops(jax.grad(loss, argnums=(1, 2)), x, w1, w2) == 5 * one
    assert matmul_flops(lambda *args: (mlp(*args), loss(*args))[0], x, w1, w2) == 2 * one
    linear = lambda x, w: jnp.sum(x @ w)
    assert matmul_flops(jax.grad(linear, argnums=1), x, w1) == one  # the forward product is not used


def test_remat_is_counted_again_and_wrappers_once():
    one = 2 * B * D * H
    x, w1, w2 = array(B, D), array(D, H), array(H, D)
    loss = lambda *args: jnp.sum(jax.checkpoint(mlp)(*args) ** 2)
    assert matmul_flops(loss, x, w1, w2) == 2 * one
    assert matmul_flops(jax.grad(loss, argnums=(0, 1, 2)), x, w1, w2) == (2 + 1 + 4) * one
    assert matmul_flops(jax.jit(jax.jit(mlp)), x, w1, w2) == 2 * one

    own = jax.custom_vjp(jnp.matmul)
    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert matmul_flops(own, x, w1) == one
    grad = jax.grad(lambda x, w: jnp.sum(own(x, w) ** 2), argnums=(0, 1))
    assert matmul_flops(grad, x, w1) == 3 * one


def test_conditionals_count_as_their_most_expensive_branch_and_while_loops_are_flagged():
    square = array(4, 4)
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x)
    assert flops(branch, square) == Flops(matmul=2 * 2 * 4**3)
    loop = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)
    assert flops(loop, square) == Flops(matmul=2 * 4**3, unknown_loops=1)
    twice = lambda x: jax.lax.scan(lambda x, _: (loop(x), None), x, None, length=2)[0]
    assert flops(twice, square) == Flops(matmul=2 * 2 * 4**3, unknown_loops=1)
    counted = lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ x, x)
    assert flops(counted, square) == Flops(matmul=7 * 2 * 4**3)


def test_devices_and_grids_multiply():
    x, w, one = array(B, D), array(D, H), 2 * B * D * H
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    rows = PartitionSpec("data")
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert matmul_flops(split, x, w) == one

    def kernel(x, w, y):
        y[...] = x[...] @ w[...]

    tiles = [pl.BlockSpec((2, D), lambda i: (i, 0)), pl.BlockSpec((D, H), lambda i: (0, 0))]
    out = pl.BlockSpec((2, H), lambda i: (i, 0))
    tiled = pl.pallas_call(kernel, grid=(B // 2,), in_specs=tiles, out_specs=out, out_shape=array(B, H))
    assert matmul_flops(tiled, x, w) == one


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (D, D)))
        self.h0 = nnx.Param(jnp.zeros(D))

    def initial_carry(self, batch, capacity):
        keys = jnp.zeros((batch, capacity, D), jnp.bfloat16)
        return {"h": jnp.broadcast_to(self.h0[...], (batch, D)), "keys": keys, "position": jnp.zeros(batch, jnp.int32)}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Param(jnp.zeros((11, D)))
        self.layers = jax.vmap(lambda key: Layer(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), LAYERS))

    def __call__(self, ids):
        x, _ = jax.lax.scan(lambda x, layer: (x @ layer.w[...], None), self.embedding[...][ids], self.layers)
        return x @ self.embedding[...].T, None

    def initial_carry(self, batch, capacity):
        return jax.vmap(lambda layer: layer.initial_carry(batch, capacity))(self.layers)


@pytest.mark.parametrize("abstract", [True, False])
def test_summary_of_a_model(abstract):
    make = lambda: Model(nnx.Rngs(0))
    model = nnx.eval_shape(make) if abstract else make()
    parameters = 11 * D + LAYERS * (D * D + D)
    carry = lambda batch, capacity: LAYERS * batch * (4 * D + 2 * capacity * D + 4)
    assert accounting.parameter_count(nnx.state(model)) == accounting.parameter_count(model) == parameters
    assert accounting.carry_bytes(model, 3, 7) == carry(3, 7)
    summary = accounting.summarize("toy", model, array(2, 6, dtype=jnp.int32), 12, capacity=100)
    per_token = LAYERS * 2 * D * D + 2 * D * 11
    assert summary == accounting.Summary("toy", parameters, parameters, per_token, carry(1, 100))
    assert accounting.summarize("toy", model, array(2, 6, dtype=jnp.int32), 12, capacity=None).carry_bytes is None


def test_table_is_aligned():
    rows = [
        accounting.Summary("a", 1234567, 1234567, 2.5e6, 4096),
        accounting.Summary("longer name", 5, 5, 1.4, None),
    ]
    lines = accounting.table(rows).split("\n")
    assert lines == [
        "name         parameters  FLOPs per token  carry bytes per sequence",
        "a             1,234,567        2,500,000                     4,096",
        "longer name           5                1                         -",
    ]
    sparse = accounting.table([accounting.Summary("a", 1234567, 12345, 2.5e6, 4096)]).split("\n")
    assert sparse == [
        "name  parameters  active  FLOPs per token  carry bytes per sequence",
        "a      1,234,567  12,345        2,500,000                     4,096",
    ]

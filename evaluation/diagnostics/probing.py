"""A sequence model taken apart: what each of its mixers is called with."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.sequence_model import SequenceModel
from training.step import score


class Tapped(nnx.Module):
    """A module that shows each call to `tap(x, *args, **kwargs)` and takes what it returns for x."""

    def __init__(self, module, tap):
        self.module = module
        self.tap = tap

    def __call__(self, x, *args, **kwargs):
        return self.module(self.tap(x, *args, **kwargs), *args, **kwargs)


class Unrolled(nnx.Module):
    """`models.stack.Stack` without its scan, its mixers tapped: `tap(layer, x, carry, **where)`."""

    def __init__(self, stack, tap):
        self.stack = stack
        self.tap = tap

    def __call__(self, x, carry=None, *, segment_ids=None, positions=None, key=None):
        where = {"segment_ids": segment_ids, "positions": positions}
        streams = {name: shared(x, **where) for name, shared in self.stack.shared.items()}
        layer = 0
        for i, (run, repeat) in enumerate(self.stack.runs()):
            for block in run.blocks:
                block.mixer = Tapped(block.mixer, functools.partial(self.tap, layer))
                block.recompute_mixer = False  # what is tapped is to leave it
                layer += 1
            x, _, streams, *_ = run(x, None if carry is None else carry[i], streams, repeat=repeat, **where)
        return x, None, None, {}


@jax.jit
def unstack(model: SequenceModel) -> list[nnx.Module]:
    """The mixers, layer by layer."""
    return [block.mixer for run, _ in model.stack.runs() for block in run.blocks]


@jax.jit
def observe(
    model: SequenceModel, batch: dict[str, Array], where: dict[str, Array]
) -> tuple[list, Float[Array, "L B T D"]]:
    """For each mixer its input and the other arguments of its call; and the gradients of the loss by the inputs."""
    layers = sum(len(run.blocks) for run, _ in nnx.eval_shape(lambda: model.stack.runs()))
    width = model.embedding.shape[-1]

    def loss(added):
        calls, own = [], nnx.clone(model)

        def tap(layer, x, carry, **call):
            calls.append((x, call))
            return x + added[layer]

        own.stack = Unrolled(own.stack, tap)
        sums = score(own, {**batch, **where})
        return sums["nats"] / jnp.maximum(sums["weight"], 1), calls

    gradients, calls = jax.grad(loss, has_aux=True)(jnp.zeros((layers, *batch["inputs"].shape[:2], width)))
    return calls, gradients


@jax.jit
def calls_with_carry(model: SequenceModel, token: dict[str, Array], carry) -> list[tuple]:
    """For each mixer the input, the carry and the other arguments of its call, in a piece of a sequence."""
    calls, own = [], nnx.clone(model)

    def tap(layer, x, carry, **call):
        calls.append((x, carry, call))
        return x

    own.stack = Unrolled(own.stack, tap)
    own(token["inputs"], carry, segment_ids=token.get("segment_ids"))
    return calls

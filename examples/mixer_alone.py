"""A mixer by itself in Python: make it, give it a sequence, cut the sequence anywhere, decode step by step.

    python -m examples.mixer_alone
    python -m examples.mixer_alone --mixer=attention --length=30

Prints how far the pieces' outputs are from the whole sequence's, relative to the largest of them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common import command
from common.errors import check_range
from models import mixer as mixers


def main(mixer: str, width: int, length: int, cut: int) -> None:
    # Hyperparameters are keywords: mixers.create("gla", 64, rngs=..., heads=8). These are all, with their defaults:
    print(f"{mixer}: {dict(mixers.defaults(mixer))}")
    layer = mixers.create(mixer, width, rngs=nnx.Rngs(0))

    # It is a Flax module. Its parameters are a tree, and jax.jit, jax.grad and jax.vmap take functions of them.
    graph, params = nnx.split(layer)

    @jax.jit
    def apply(params, x, carry=None, segment_ids=None):
        return nnx.merge(graph, params)(x, carry, segment_ids=segment_ids)

    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

    # The whole sequence, as in training: no carry goes in, and none comes out.
    x = jax.random.normal(jax.random.key(1), (2, length, width))  # [batch, length, width]
    whole, _ = apply(params, x)

    # The same sequence in two pieces. `capacity` is how many tokens the carry must be able to hold; only a carry that grows, such
    # as attention's keys and values, depends on it.
    carry = layer.initial_carry(batch=2, capacity=length)
    first, carry = apply(params, x[:, :cut], carry)
    second, carry = apply(params, x[:, cut:], carry)
    print(f"cut at {cut}: {difference(jnp.concatenate([first, second], 1), whole):.1e}")

    # Decoding is pieces of one token.
    carry, outputs = layer.initial_carry(batch=2, capacity=length), []
    for t in range(length):
        y, carry = apply(params, x[:, t : t + 1], carry)
        outputs.append(y)
    print(f"token by token: {difference(jnp.concatenate(outputs, 1), whole):.1e}")

    if not layer.packing:  # what a mixer can do is an attribute, see models/mixer.py
        return
    # Two documents packed into one row: the state restarts where segment_ids change; 0 is padding.
    ids = jnp.where(jnp.arange(length) < cut, 1, 2)[None].repeat(2, 0)
    packed, _ = apply(params, x, segment_ids=ids)
    alone, _ = apply(params, x[:, cut:])
    print(f"a packed document beside the same one alone: {difference(packed[:, cut:], alone):.1e}")


def difference(found: jax.Array, expected: jax.Array) -> float:
    """The largest difference, relative to the largest value."""
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def run(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--mixer", default="gla", help="a file of models/mixers/ that is causal, streams and packs")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--cut", type=int, default=7)
    options = parser.parse_args(arguments)
    check_range("--length", options.length, 2)
    check_range("--cut", options.cut, 1, options.length - 1)
    main(**vars(options))


if __name__ == "__main__":
    command.run(run)

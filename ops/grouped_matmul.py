"""Products of the rows of several groups, each with the matrix of its group: the experts of a mixture.

y_r = x_r w_g    for the rows r of group g, which stand one behind the other
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops.dispatch import choose, current_platform, matmul_precision, primitive


@primitive("reference", "blocks", "ragged", tokens=False, matmul="ragged")
def grouped_matmul(
    x: Float[Array, "R D"],
    w: Float[Array, "E D F"],
    sizes: Int[Array, "E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "R F"]:
    """Multiplies each row with the matrix of its group.

    All shapes are static, whatever the sizes are, and no row is left out.

    Args:
      x: [rows, D], those of group 0, then those of group 1, and so on.
      w: [groups, D, F]; in float32 products are of full precision on every platform, in bfloat16 they have sums in float32.
      sizes: [groups], the number of rows of each; their sum is at most R.
      implementation: "reference" (a copy of its matrix for each row); "blocks" (rows in blocks of one group each, about as many
        rows as a group has on average: twice the products that are needed and two copies of each matrix at most); "ragged"
        (`jax.lax.ragged_dot`, the products that are needed where the platform has a kernel for it: TPUs; elsewhere, those of
        all groups); or "auto": ragged on TPUs, else blocks.

    Returns:
      y [rows, F] of x's dtype; 0 in rows that belong to no group.

    Raises:
      ValueError: for an unknown implementation.
    """
    implementation = choose("grouped_matmul", implementation, "ragged" if current_platform() == "tpu" else "blocks")
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")
    form = {"reference": _reference, "blocks": _blocks, "ragged": _ragged}[implementation]
    y = form(x, w.astype(x.dtype), sizes, jnp.minimum(group, w.shape[0] - 1))
    return jnp.where((group < w.shape[0])[:, None], y, 0).astype(x.dtype)


def _product(equation, x, w):
    return jnp.einsum(
        equation,
        x,
        w,
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )


def _reference(x, w, sizes, group):
    x = jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], x, 0)  # the others are no part of w's gradient
    return _product("rd,rdf->rf", x, w[group])


def _ragged(x, w, sizes, group):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    precision = matmul_precision(x.dtype)
    return jax.lax.ragged_dot(x, w, sizes.astype(jnp.int32), precision=precision, preferred_element_type=wide)


def _blocks(x, w, sizes, group):
    rows, groups = x.shape[0], w.shape[0]
    size = max(1, rows // groups)
    filled = min(groups, rows)  # so many groups have rows at most
    count = (rows - filled) // size + filled
    blocks = -(-sizes // size)
    first_block, first_row = jnp.cumsum(blocks) - blocks, jnp.cumsum(sizes) - sizes
    owner = jnp.minimum(jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(count), side="right"), groups - 1)
    # Where the rows of a block are in x; those that the last block of a group lacks are read as 0.
    inside = (jnp.arange(count) - first_block[owner])[:, None] * size + jnp.arange(size)
    where = jnp.where(inside < sizes[owner][:, None], first_row[owner][:, None] + inside, rows)
    y = _product("nbd,ndf->nbf", x.at[where].get(mode="fill", fill_value=0), w[owner])
    place = jnp.arange(rows) - first_row[group]
    return y[jnp.minimum(first_block[group] + place // size, count - 1), place % size]

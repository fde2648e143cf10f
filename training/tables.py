"""Tables of which a batch reads a few rows: a step cuts these out, trains them as if there were no others, and puts them back.

Where a row without a gradient does no more than decay, and what the optimiser knows of it stays (Adagrad), this is the step over
whole tables. It saves making their gradients, and going over them and what is known of them again and again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from training import sharding
from training.state import Built, like_params

NONE = jnp.iinfo(jnp.int32).max  # behind the last row of any table


class Read(NamedTuple):
    """What a batch reads of the tables.

    Attributes:
      rows: for each table the different rows in their order; behind them, where there are fewer than tokens, `NONE`.
      places: where in `rows` each position's row is.
    """

    rows: Int[Array, "tables N"]
    places: Int[Array, "B *T tables"]


def by_rows(built: Built, tokens: int) -> bool:
    """Whether a step on a batch of so many tokens goes by the rows that it reads: if each device has whole tables (of others rows
    would be sent), if they have an optimiser that leaves other rows alone, and a few times as many rows as are read."""
    parts = (built.metadata, built.abstract["params"], built.shardings["params"])
    leaves = zip(*map(jax.tree.leaves, parts), strict=True)
    fit = [
        4 * tokens <= shape.shape[0] and place.is_fully_replicated for facts, shape, place in leaves if facts.is_table
    ]
    return built.optimizer.left is not None and bool(fit) and all(fit)


def read(rows: Int[Array, "B *T tables"], mesh: Mesh) -> Read:
    """The different ones of the rows that a batch reads, which all devices find, of the tokens of all."""
    everywhere = sharding.replicated(mesh)
    flat = jax.lax.with_sharding_constraint(rows.reshape(-1, rows.shape[-1]).T, everywhere)
    find = lambda row: jnp.unique(row, return_inverse=True, size=row.size, fill_value=NONE)
    different, places = jax.vmap(find)(flat)
    return Read(jax.lax.with_sharding_constraint(different, everywhere), places.T.reshape(rows.shape))


def cut(built: Built, state: dict[str, Any], rows: Int[Array, "tables N"]) -> dict[str, Any]:
    """The parameters and the optimiser's state ("params", "opt") with the read rows of the tables in place of the tables."""
    pick = lambda leaf, table: leaf if table < 0 else leaf.at[rows[table]].get(mode="fill", fill_value=0)
    return jax.tree.map(pick, state, _numbers(built, state))


def put(
    built: Built,
    state: dict[str, Any],
    new: dict[str, Any],
    rows: Int[Array, "tables N"],
    left: Callable[[str], Float[Array, ""]],
) -> dict[str, Any]:
    """`new`, which is of the form of `cut`, with whole tables: those of `state` with the new rows in place of the old, and of the
    others the share that `left` gives for their learning-rate group."""
    others = lambda leaf, facts: left(facts.group) * leaf if facts.is_table and facts.decay else leaf
    state = {**state, "params": jax.tree.map(others, state["params"], built.metadata)}
    back = lambda old, new, table: (
        new if table < 0 else old.at[rows[table]].set(new, mode="drop", indices_are_sorted=True)
    )
    return jax.tree.map(back, state, new, _numbers(built, state))


def _numbers(built: Built, state: dict[str, Any]) -> dict[str, Any]:
    """For each leaf the number of the table that it is, or is of; -1 for none."""
    number = lambda path, facts: int(path[-1].key) if facts.is_table else -1
    of_params = jax.tree_util.tree_map_with_path(number, built.metadata)
    return {"params": of_params, "opt": like_params(built.optimizer.init, state["opt"], of_params, -1)}

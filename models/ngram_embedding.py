"""Embeddings of the tokens that end at each position, read from hashed tables (arXiv 2412.09871, section 3.2.1; 2501.16975)."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.params import dense, normal, param
from models.partitioning import constrain
from ops.projection import project
from ops.token_shift import token_shift

BASE = 0x9E3779B1  # odd, so that all of its powers are, and no token is lost modulo 2^32


class NGramEmbedding(nnx.Module):
    """[E_n[hash(x_{t-n+1}, ..., x_t)] for each n] W: rows for the last n tokens of the document, side by side, and one map.

    The hash is a polynomial of the ids modulo 2^32, mixed and taken modulo the rows, so that n-grams share rows where there are
    more of them than rows. What is before a document counts as a token of its own. Tables start at N(0, 0.02^2), as the tokens'
    does, and so does what is added to it. Departures: 2412.09871 has tables of the model's width and adds them; 2501.16975 has
    several tables for each n, with other numbers of rows.

    Args:
      ngrams: the numbers of tokens n, each at least 2.
      rows: of each table.
      size: numbers of each row.
    """

    def __init__(self, ngrams: Sequence[int], rows: int, size: int, width: int, *, rngs: nnx.Rngs):
        self.ngrams, self.rows = tuple(ngrams), rows
        table = lambda: param(rngs, normal(0.02), (rows, size), ("vocab", "embed"), inputs=(), active=1 / rows)
        self.tables = nnx.List([table() for _ in self.ngrams])
        self.map = dense(rngs, (len(self.ngrams) * size, width), (None, "embed"))

    def __call__(
        self,
        ids: Int[Array, "B T"],
        past: Int[Array, "B n"] | None,
        segment_ids: Int[Array, "B T"] | None,
        places: Int[Array, "B T tables"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B n"]]:
        """The embedding of each position.

        Args:
          ids: tokens.
          past: the tokens before the first one, the latest first, each plus 1; 0 for none. None is all 0.
          segment_ids: 0 is padding, a change starts a document.
          places: where in the tables the rows of `rows_read` are; None where the tables have all of their rows.

        Returns:
          what is to be added to the embedding of the tokens, and the past of the next piece.
        """
        rows, last = self.rows_read(ids, past, segment_ids)
        places = rows if places is None else places
        tables = [constrain(table[...], "vocab", "activation") for table in self.tables]
        found = [table[places[..., number]] for number, table in enumerate(tables)]
        return project(jnp.concatenate(found, -1), self.map[...]), last

    def rows_read(
        self, ids: Int[Array, "B T"], past: Int[Array, "B n"] | None, segment_ids: Int[Array, "B T"] | None
    ) -> tuple[Int[Array, "B T tables"], Int[Array, "B n"]]:
        """The row of each table that each position reads, and the past of the next piece; for the arguments see `__call__`."""
        token = ids + 1
        hashed = token.astype(jnp.uint32) * jnp.uint32(BASE)
        rows, last = {}, []
        for n in range(2, max(self.ngrams) + 1):
            token, before = token_shift(
                token, initial_state=None if past is None else past[:, n - 2], segment_ids=segment_ids
            )
            last.append(before)
            hashed = hashed + token.astype(jnp.uint32) * jnp.uint32(pow(BASE, n, 2**32))
            rows[n] = self._row(hashed)
        return jnp.stack([rows[n] for n in self.ngrams], -1), jnp.stack(last, 1)

    def _row(self, hashed):
        mixed = (hashed ^ (hashed >> 16)) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
        return ((mixed ^ (mixed >> 16)) % jnp.uint32(self.rows)).astype(jnp.int32)

    def initial_state(self, batch: int) -> Int[Array, "B n"]:
        """The past before the first token."""
        return jnp.zeros((batch, max(self.ngrams) - 1), jnp.int32)

"""Tokens from a model: generation through the carry, by one prefill and then single steps of one compiled function."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import UserError, check_range
from training.config import SEEDS
from training.state import Built

LARGEST = 2**31 - 1
# Below it logits would leave float32, and the likeliest token is all that is left of the distribution.
COLDEST = 1e-6
NOT_A_NUMBER = -1  # in place of a token, where the scores are none


def check(length: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raises a UserError for settings of `Generator` that are out of range."""
    check_range("--length", length, 1, LARGEST)
    check_range("--temperature", temperature, 0, 1e6)
    check_range("--top_k", top_k, 0, LARGEST)
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p must be more than 0 and at most 1, got {top_p}")
    if not 0 <= seed < SEEDS:
        raise UserError(f"--seed must be from 0 to {SEEDS - 1}, got {seed}")


def filter_logits(
    logits: Float[Array, "B V"], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "B V"]:
    """Log-probabilities (unnormalised, float32) to sample from; -inf for what is left out.

    Tokens are ordered by their logits, equal ones by their ids, the lower first; what is kept is the beginning of that order.

    Args:
      logits: [batch, vocabulary], without NaN.
      temperature: divides the logits; must be positive.
      top_k: keep the first k tokens; 0 keeps all.
      top_p: of the tokens that top_k keeps, and of their probabilities, keep the fewest whose probabilities sum to p or more
        (arXiv 1904.09751); 1 keeps all.
    """
    logits = logits.astype(jnp.float32) / temperature
    size = logits.shape[-1]
    if not 0 < top_k < size and top_p == 1:
        return logits
    ordered, ids = jax.lax.top_k(logits, top_k if 0 < top_k < size else size)
    if top_p < 1:
        probability = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(probability, -1) - probability
        # The first is kept for every p, also one that is 0 in float32.
        kept = (before < top_p).at[..., 0].set(True)
        ordered = jnp.where(kept, ordered, -jnp.inf)
    return jnp.full_like(logits, -jnp.inf).at[jnp.arange(len(logits))[:, None], ids].set(ordered)


def draw(
    logits: Float[Array, "B V"], keys: Array, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Int[Array, "B"]:
    """A token for each row, int32.

    Args:
      logits: [batch, vocabulary].
      keys: [batch], a source of random numbers for each row.
      temperature: below `COLDEST` the likeliest token is taken, of equally likely ones that with the lowest id.
      top_k, top_p: see `filter_logits`.

    Returns:
      the tokens, `NOT_A_NUMBER` for rows whose logits have a NaN.
    """
    if temperature < COLDEST:
        tokens = jnp.argmax(logits, -1)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, temperature, top_k, top_p))
    return jnp.where(jnp.isnan(logits).any(-1), NOT_A_NUMBER, tokens).astype(jnp.int32)


def of_model(built: Built) -> tuple[Callable, Callable]:
    """`call` and `initial_carry` of a model, as `Generator` takes them."""

    def call(params, ids, carry, segment_ids):
        return built.apply(params, ids, carry, **({} if segment_ids is None else {"segment_ids": segment_ids}))

    def initial_carry(params, batch, capacity):
        return built.merge(params).initial_carry(batch, capacity)

    return call, initial_carry


class Generator:
    """Continues prompts. What is compiled is kept, so that batches of equal shape are compiled once.

    Args:
      call: `(params, ids, carry, segment_ids) -> (logits, carry)`; the last is None for rows without padding.
      initial_carry: `(params, batch, capacity) -> carry`.
      temperature, top_k, top_p: see `draw`.

    Attributes:
      step: the jitted `(params, token [B], carry, keys [B], i) -> (token, carry)` of the i-th new token; it consumes the carry.
    """

    def __init__(
        self,
        call: Callable[..., tuple[Array, Any]],
        initial_carry: Callable[[Any, int, int], Any],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check(1, **settings, seed=0)

        def prefill(params, ids, segment_ids, keys, capacity):
            carry = initial_carry(params, ids.shape[0], capacity)
            logits, carry = call(params, ids, carry, segment_ids)
            return draw(logits[:, -1], keys, **settings), carry

        def step(params, token, carry, keys, i):
            logits, carry = call(params, token[:, None], carry, None)
            return draw(logits[:, -1], jax.vmap(jax.random.fold_in, (0, None))(keys, i), **settings), carry

        self._initial_carry = initial_carry
        self._prefill = jax.jit(prefill, static_argnums=4)
        self.step = jax.jit(step, donate_argnums=2)
        self._compiled: dict[Any, tuple[Any, Any]] = {}

    def __call__(
        self,
        params: Any,
        prompts: Int[np.ndarray, "B P"],
        length: int,
        seeds: Sequence[int],
        *,
        segment_ids: Int[np.ndarray, "B P"] | None = None,
        see: Callable[[Int[np.ndarray, "B"]], bool] | None = None,
    ) -> tuple[Int[np.ndarray, "B L"], dict[str, float]]:
        """Continues a batch of prompts.

        Args:
          params: parameters.
          prompts: [batch, prompt length >= 1]; shorter ones are padded on the left.
          length: number of tokens to generate.
          seeds: [batch], the source of each row's draws, which no other row has a part in.
          segment_ids: [batch, prompt length], 0 where a prompt is padded and 1 elsewhere; None where none is.
          see: is told the tokens [batch] of each step, while the next one is computed; where it returns True, they are the last.

        Returns:
          the new tokens [batch, at most length], and "prefill_seconds", "step_seconds" (both without compilation) and
          "tokens_per_second" of the steps.

        Raises:
          UserError: for an empty prompt or parameters out of range, where there is no memory for the carry, and where the model's
            logits have a NaN.
        """
        if prompts.shape[1] < 1:
            raise UserError("the prompt is empty: generation needs at least one token to continue")
        for seed in seeds:
            check(length, 1.0, 0, 1.0, seed)
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        ids, capacity = jnp.asarray(prompts, jnp.int32), prompts.shape[1] + length
        padded = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        what = (*ids.shape, capacity, padded is None)
        if what not in self._compiled:
            with self._fitting(params, len(ids), capacity):
                self._compiled[what] = self._prefill.lower(params, ids, padded, keys, capacity).compile(), None
        prefill, step = self._compiled[what]

        begin = time.perf_counter()
        with self._fitting(params, len(ids), capacity):
            token, carry = jax.block_until_ready(prefill(params, ids, padded, keys))
        prefill_seconds = time.perf_counter() - begin
        if step is None and length > 1:
            step = self.step.lower(params, token, carry, keys, 1).compile()
            self._compiled[what] = prefill, step
        tokens, begin = [], time.perf_counter()
        for i in range(1, length + 1):
            before = token
            if i < length:
                token, carry = step(params, token, carry, keys, i)
            tokens.append(_numbers(before, i))
            if see is not None and see(tokens[-1]):
                break
        seconds, count = time.perf_counter() - begin, len(tokens)
        rate = prompts.shape[0] * (count - 1) / seconds if count > 1 else 0.0
        return np.stack(tokens, 1), {
            "prefill_seconds": prefill_seconds,
            "step_seconds": seconds,
            "tokens_per_second": rate,
        }

    @contextlib.contextmanager
    def _fitting(self, params, rows, capacity):
        """Says how large the carry is where there is no memory for it."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            carry = jax.eval_shape(lambda params: self._initial_carry(params, rows, capacity), params)
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))
            raise UserError(
                f"there is no memory for {rows:,} rows of {capacity:,} tokens, whose carry takes {size / 1e9:,.1f} GB: lower "
                "--length, or --batch_size where there are several texts"
            ) from None


def _numbers(token, i):
    token = np.asarray(token)
    if (token == NOT_A_NUMBER).any():
        raise UserError(
            f"the model's scores of new token {i} are no numbers (NaN): its training diverged, or its parameters are "
            "damaged; take another checkpoint"
        )
    return token

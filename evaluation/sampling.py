"""Generation through the carry: one prefill, then single steps of one compiled function."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import UserError


def filter_logits(
    logits: Float[Array, "B V"], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "B V"]:
    """Log-probabilities (unnormalised) to sample from.

    Args:
      logits: [batch, vocabulary].
      temperature: divides the logits; must be positive.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p (arXiv 1904.09751); 1 keeps all.
    """
    logits = logits.astype(jnp.float32) / temperature
    floor = jnp.finfo(jnp.float32).min
    if top_k > 0:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, floor, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, -1, descending=True)
        probability = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(probability, -1) - probability
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, floor, logits)
    return logits


def generate(
    call: Callable[..., tuple[Array, Any]],
    initial_carry: Callable[[Any, int, int], Any],
    params: Any,
    prompt: Int[np.ndarray, "B P"],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[Int[np.ndarray, "B L"], dict[str, float]]:
    """Continues prompts.

    Args:
      call: `(params, ids, carry) -> (logits, carry)`.
      initial_carry: `(params, batch, capacity) -> carry`.
      params: parameters.
      prompt: [batch, prompt length >= 1].
      length: tokens to generate.
      temperature: 0 takes the most likely token.
      top_k, top_p: see `filter_logits`.
      seed: of the draws.

    Returns:
      the new tokens [batch, length], and `prefill_seconds`, `step_seconds` (both without compilation) and
      `tokens_per_second` of the steps.

    Raises:
      UserError: for an empty prompt or parameters out of range.
    """
    if prompt.shape[1] < 1:
        raise UserError("the prompt is empty: generation needs at least one token to continue")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}"
        )

    def draw(logits, key):
        if temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        return jax.random.categorical(key, filter_logits(logits, temperature, top_k, top_p)).astype(jnp.int32)

    @jax.jit
    def prefill(params, ids, key):
        carry = initial_carry(params, ids.shape[0], ids.shape[1] + length)
        logits, carry = call(params, ids, carry)
        return draw(logits[:, -1], key), carry

    def step(params, token, carry, key):
        logits, carry = call(params, token[:, None], carry)
        return draw(logits[:, -1], key), carry

    key = jax.random.key(seed)
    ids = jnp.asarray(prompt, jnp.int32)
    prefill = prefill.lower(params, ids, key).compile()
    begin = time.perf_counter()
    token, carry = jax.block_until_ready(prefill(params, ids, key))
    prefill_seconds = time.perf_counter() - begin
    step = jax.jit(step, donate_argnums=2).lower(params, token, carry, key).compile()
    tokens = [token]
    begin = time.perf_counter()
    for i in range(1, length):
        token, carry = step(params, token, carry, jax.random.fold_in(key, i))
        tokens.append(token)
    tokens = np.stack(jax.device_get(tokens), 1)
    seconds = time.perf_counter() - begin
    rate = prompt.shape[0] * (length - 1) / seconds if length > 1 else 0.0
    return tokens, {"prefill_seconds": prefill_seconds, "step_seconds": seconds, "tokens_per_second": rate}

"""Text from a checkpoint: generation through the carry, by one prefill and then single steps of one compiled function."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.console import say
from common.errors import UserError, check_range
from common.files import write_atomically
from evaluation.loading import LoadedRun
from training.config import SEEDS
from training.run_directory import RunDirectory
from training.state import Built, cast

LARGEST = 2**31 - 1


def check(length: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raises a UserError for settings of `sample` that are out of range."""
    check_range("--length", length, 1, LARGEST)
    check_range("--temperature", temperature, 0, 1e6)
    if 0 < temperature < 1e-6:  # logits divided by it leave float32
        raise UserError(
            f"--temperature must be 0, which takes the likeliest token, or at least 1e-06, got {temperature}"
        )
    check_range("--top_k", top_k, 0, LARGEST)
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p must be more than 0 and at most 1, got {top_p}")
    if not 0 <= seed < SEEDS:
        raise UserError(f"--seed must be from 0 to {SEEDS - 1}, got {seed}")


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


def steps(
    call: Callable[..., tuple[Array, Any]],
    initial_carry: Callable[[Any, int, int], Any],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Callable, Callable]:
    """The two jitted functions of `generate`, whose arguments these are.

    Returns:
      `prefill(params, ids [B, P], key)` and `step(params, token [B], carry, key)`, which consumes the carry; both give the next
      token [B] and the carry.
    """

    def draw(logits, key):
        if temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        return jax.random.categorical(key, filter_logits(logits, temperature, top_k, top_p)).astype(jnp.int32)

    def prefill(params, ids, key):
        carry = initial_carry(params, ids.shape[0], ids.shape[1] + length)
        logits, carry = call(params, ids, carry)
        return draw(logits[:, -1], key), carry

    def step(params, token, carry, key):
        logits, carry = call(params, token[:, None], carry)
        return draw(logits[:, -1], key), carry

    return jax.jit(prefill), jax.jit(step, donate_argnums=2)


def of_model(built: Built) -> tuple[Callable, Callable]:
    """`call` and `initial_carry` of a model, as `steps` and `generate` take them."""

    def call(params, ids, carry):
        return built.apply(params, ids, carry)

    def initial_carry(params, batch, capacity):
        return built.merge(params).initial_carry(batch, capacity)

    return call, initial_carry


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
      length: number of tokens to generate.
      temperature: 0 takes the most likely token; else see `filter_logits`.
      top_k, top_p: see `filter_logits`.
      seed: the source of the draws.

    Returns:
      the new tokens [batch, length], and `prefill_seconds`, `step_seconds` (both without compilation) and
      `tokens_per_second` of the steps.

    Raises:
      UserError: for an empty prompt or parameters out of range.
    """
    if prompt.shape[1] < 1:
        raise UserError("the prompt is empty: generation needs at least one token to continue")
    check(length, temperature, top_k, top_p, seed)

    prefill, step = steps(call, initial_carry, length, temperature=temperature, top_k=top_k, top_p=top_p)
    key = jax.random.key(seed)
    ids = jnp.asarray(prompt, jnp.int32)
    prefill = prefill.lower(params, ids, key).compile()
    begin = time.perf_counter()
    token, carry = jax.block_until_ready(prefill(params, ids, key))
    prefill_seconds = time.perf_counter() - begin
    step = step.lower(params, token, carry, key).compile()
    tokens = [token]
    begin = time.perf_counter()
    for i in range(1, length):
        token, carry = step(params, token, carry, jax.random.fold_in(key, i))
        tokens.append(token)
    tokens = np.stack(jax.device_get(tokens), 1)
    seconds = time.perf_counter() - begin
    rate = prompt.shape[0] * (length - 1) / seconds if length > 1 else 0.0
    return tokens, {"prefill_seconds": prefill_seconds, "step_seconds": seconds, "tokens_per_second": rate}


def sample(
    run: LoadedRun,
    prompt: str,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continues a prompt, prints the text and the speed, and keeps the text in the run's `samples/`.

    A text that cannot be kept (on a read-only disk, say) is printed all the same, with the reason.

    Args:
      run: the run and its checkpoint.
      prompt: a text.
      length, temperature, top_k, top_p, seed: see `generate`.

    Returns:
      the prompt and what follows it.

    Raises:
      UserError: if the model does not predict a text, for an empty prompt, and for settings out of range.
    """
    config, built = run.config, run.built
    if config.model.head != "token" or not config.model.causal or config.task.spec.vocab_size is None:
        raise UserError(f"task {config.task.name!r} trains no model that continues a text: there is nothing to sample")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8") from None
    settings = {"temperature": float(temperature), "top_k": top_k, "top_p": float(top_p), "seed": seed}

    ids = np.asarray(config.task.encode(prompt))[None]
    params = cast(run.params, built.metadata, config.train.compute_dtype)
    with run.computing():
        new, speed = generate(*of_model(built), params, ids, length, **settings)
    text = prompt + config.task.decode(new[0])
    rate, prefill = speed["tokens_per_second"], 1e3 * speed["prefill_seconds"]
    say(f"{text}\n\n{rate:,.0f} {config.task.spec.unit}s/s (prefill {prefill:.1f} ms)")
    if jax.process_index() == 0:
        folder = RunDirectory(run.workdir).samples
        try:
            say(f"kept as {_keep(folder, text, {**run.origin, 'prompt': prompt, 'length': length, **settings})}")
        except OSError as error:
            say(f"not kept: cannot write to {folder}: {error.strerror or error}")
    return text


def _keep(folder: Path, text: str, settings: dict[str, Any]) -> Path:
    """Writes a text, and its settings beside it as JSON; equal settings have the same file, and others another."""
    record = json.dumps(settings, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    path = folder / f"step{settings['step']}-seed{settings['seed']}-{digest}.txt"
    write_atomically(path.with_suffix(".json"), record)
    write_atomically(path, text)
    return path

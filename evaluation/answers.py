"""What a checkpoint answers to a text: how likely a continuation is, and which one it generates."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError, check_range
from evaluation.generation import Generator, of_model
from evaluation.loading import LoadedRun, ids_of
from evaluation.sampling import Continuation, batches, padded
from training import sharding
from training.state import Built, cast

CHUNK = 128  # positions whose logits are there together
LENGTH = 2048  # of a checkpoint in Hugging Face's format that says none, as in the library
NEW_TOKENS = 256  # of a generation that says none, as in the library
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
Piece = tuple[list[int], list[int]]  # what stands before, and what is scored


class Answers:
    """The three questions of lm-evaluation-harness, answered by a checkpoint. Of its requests the `args` are used.

    A context that several continuations have is read once, where the model takes a carry, and they go on from it.

    Args:
      run: the checkpoint, a causal model of a text.
      max_length: tokens that are read at once; None for the length of the run's rows, or what `config.json` says.
      prefix: stands before a text that has no context; None for a line's end, or the beginning (else the end) of a text where
        `config.json` has such a token.
      batch_size: rows that are computed together.

    Raises:
      UserError: if the model continues no text, and for settings out of range.
    """

    def __init__(self, run: LoadedRun, max_length: int | None = None, prefix: str | None = None, batch_size: int = 16):
        super().__init__()
        config, task = run.config, run.config.task
        if config.model.head != "token" or not config.model.causal or run.encode("a") is None:
            raise UserError(
                f"{run.workdir} holds no model that continues a text: there is nothing that it could be asked"
            )
        if max_length is None:
            max_length = task.spec.length if task is not None else run.facts.get("max_position_embeddings") or LENGTH
        check_range("--max_length", max_length, 1)
        check_range("--batch_size", batch_size, 1)
        self.run, self.max_length = run, max_length
        ways = sharding.batch_ways(run.built.mesh)
        self._rows = -(-batch_size // ways) * ways
        self._ends = run.ends
        beginning = ids_of(run.facts.get("bos_token_id")) or self._ends
        self.prefix = beginning[:1] if prefix is None and beginning else self.encode("\n" if prefix is None else prefix)
        if not self.prefix:
            raise UserError("--prefix is empty: the first token of a text needs one that stands before it")
        self._params = cast(run.params, run.built.metadata, config.train.compute_dtype)
        self._step = log_probabilities(run.built)
        self._read, self._continue = after_contexts(run.built)
        self._generators: dict[tuple, Generator] = {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text.

        Raises:
          UserError: if the model has no tokens for it.
        """
        found = self.run.encode(text)
        if found is None:
            raise UserError(f"the model has no tokens for {text[:60]!r}: it was trained on other characters")
        return list(found)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.run.decode(ids)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation) log p of the continuation in nats, and whether greedy decoding says it."""
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each (text,) its log p in nats, every token once."""
        return [nats for nats, _ in self._scored([(self.prefix[-1:], self.encode(r.args[0])) for r in requests])]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (context, settings) the continuation before the first of settings["until"].

        Raises:
          UserError: for a setting that there is not.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        found: dict[int, str] = {}
        for settings, members in groups.items():
            texts = self._generated([requests[i].args[0] for i in members], json.loads(settings))
            found |= dict(zip(members, texts))
        return [found[i] for i in range(len(requests))]

    def _pair(self, context: str, continuation: str) -> Piece:
        # Blanks between the two belong to the continuation, and the tokens are those of the whole.
        blanks = len(context) - len(context.rstrip())
        if context and blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        if not context:
            return self.prefix, self.encode(continuation)
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]

    def _scored(self, pairs: Sequence[Piece]) -> list[tuple[float, bool]]:
        pieces = [(i, *piece) for i, pair in enumerate(pairs) for piece in windows(*pair, self.max_length)]
        nats, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)

        def add(batch, scores, weights):
            for row, (i, _, _) in enumerate(batch):
                nats[i] += scores[0][row, weights[row]].astype(np.float64).sum()
                greedy[i] &= scores[1][row, weights[row]].all()

        alone, together = self._by_context(pieces)
        for batch in _in_batches(alone, self._rows):
            inputs, targets, weights = self._filled(batch)
            with self.run.computing():
                add(batch, jax.device_get(self._step(self._params, inputs, targets)), weights)
        for contexts, members in together:
            with self.run.computing():
                room = max(len(scored) for _, _, scored in members)
                ids, segment_ids = padded([np.array(context) for context in contexts], several=True)
                carry = self._read(self._params, ids, segment_ids, 1 << (room - 1).bit_length())
                for batch in _in_batches(members, self._rows):
                    # The last token of the context says what follows it; the carry holds those before.
                    ends = [(i, before[-1:], scored) for i, before, scored in batch]
                    inputs, targets, weights = self._filled(ends)
                    take = [contexts.index(tuple(before[:-1])) for _, before, _ in batch]
                    take = np.array(take + take[-1:] * (self._rows - len(take)))
                    add(batch, jax.device_get(self._continue(self._params, carry, take, inputs, targets)), weights)
        if np.isnan(nats).any():
            raise UserError("the model's scores are no numbers (NaN): take another checkpoint")
        return list(zip(nats.tolist(), greedy.tolist()))

    def _by_context(self, pieces):
        """Pieces that are read whole; and, for contexts that several have, (contexts without their last token, the pieces)."""
        alike: dict[tuple, list] = {}
        for piece in pieces:
            alike.setdefault(tuple(piece[1]), []).append(piece)
        model = self.run.config.model
        shared = {k: own for k, own in alike.items() if model.streams and len(own) > 1 and len(k) > 1}
        alone = [piece for context, own in alike.items() if context not in shared for piece in own]
        contexts = list(shared)
        lengths = [len(context) - 1 for context in contexts]
        pads = all(mixer.padding or mixer.packing for mixer in model.sketches.values())
        together = []
        for batch in batches([(i, 0) for i in range(len(contexts))], lengths, self._rows, pads):
            members = [piece for i, _ in batch for piece in shared[contexts[i]]]
            # As many rows as always, whatever they hold.
            filled = batch + batch[-1:] * (self._rows - len(batch))
            together.append(([contexts[i][:-1] for i, _ in filled], members))
        return alone, together

    def _filled(self, batch):
        """Inputs, targets and what is scored of pieces. Few shapes are compiled: lengths are powers of two, and the last batch is
        filled up."""
        longest = max(len(before) + len(scored) - 1 for _, before, scored in batch)
        shape = self._rows, min(self.max_length, 1 << (longest - 1).bit_length())
        inputs, targets, weights = (np.zeros(shape, kind) for kind in (np.int32, np.int32, bool))
        for row, (_, before, scored) in enumerate(batch):
            ids = np.array(before + scored)
            size = len(ids) - 1
            inputs[row, :size], targets[row, :size] = ids[:-1], ids[1:]
            weights[row, size - len(scored) : size] = True
        return inputs, targets, weights

    def _generated(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        unknown = [key for key in settings if key not in GENERATION]
        if unknown:
            raise UserError(f"generation_kwargs: {', '.join(unknown)} is unknown; there are {', '.join(GENERATION)}")
        length = settings.get("max_gen_toks", NEW_TOKENS)
        until = settings.get("until") or []
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        draws = settings.get("do_sample", settings.get("temperature", 0) > 0)
        chosen = {
            "temperature": float(settings.get("temperature", 1.0)) if draws else 0.0,
            "top_k": settings.get("top_k") or 0,
            "top_p": float(settings.get("top_p") or 1.0),
        }
        room = max(1, self.max_length - length)
        ids = [np.array((self.encode(context) or self.prefix)[-room:]) for context in contexts]
        return self.continued(ids, length, stop, **chosen)

    def continued(
        self,
        ids: Sequence[np.ndarray],
        length: int,
        stop: Sequence[str],
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[str]:
        """What is generated behind token ids, before the first of some texts.

        Args:
          ids: what stands before, at least one token.
          length: tokens at most.
          stop: the texts.
          temperature, top_k, top_p: as of `evaluation.generation.Generator`.
        """
        chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        generator = self._generators.setdefault(tuple(chosen.values()), Generator(*of_model(self.run.built), **chosen))
        pads = all(mixer.padding or mixer.packing for mixer in self.run.config.model.sketches.values())
        found: dict[int, str] = {}
        for batch in batches([(i, 0) for i in range(len(ids))], [len(one) for one in ids], self._rows, pads):
            filled = batch + batch[-1:] * (self._rows - len(batch) if pads else 0)
            prompts, segment_ids = padded([ids[i] for i, _ in filled], several=True)
            parts = [Continuation(self.decode, stop) for _ in batch]

            def see(tokens, parts=parts):
                for part, token in zip(parts, tokens):
                    if token in self._ends and not part.ended:
                        part.end()
                    part.add(token)
                return all(part.ended for part in parts)

            with self.run.computing():
                generator(self._params, prompts, length, [i for i, _ in filled], segment_ids=segment_ids, see=see)
            for (i, _), part in zip(batch, parts):
                part.finish()
                found[i] = part.text
        return [found[i] for i in range(len(ids))]


def windows(context: Sequence[int], scored: Sequence[int], max_length: int) -> Iterator[Piece]:
    """Pieces that score every token once, in windows of at most `max_length` inputs; each but the first sees as many as it can.

    Args:
      context: at least one token.
      scored: what follows it.
    """
    whole, start = [*context, *scored], len(context)
    for first in range(start, len(whole), max_length):
        last = min(first + max_length, len(whole))
        yield whole[max(0, last - max_length - 1) : first], whole[first:last]


def log_probabilities(built: Built) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The jitted `(params, inputs [B, T], targets [B, T]) -> (log p [B, T] in nats, whether the target is the likeliest [B, T])`.

    The logits of `CHUNK` positions are there at a time, where the length is a multiple of it.
    """

    def step(params, inputs, targets):
        inputs, targets = jax.lax.with_sharding_constraint((inputs, targets), sharding.batch_sharding(built.mesh))
        return built.apply(params, inputs, reduce=_judge(targets))[0]

    return jax.jit(step, out_shardings=sharding.replicated(built.mesh))


def after_contexts(built: Built) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What scores several continuations of contexts that are read once.

    Returns:
      the jitted `(params, contexts [B, T], segment_ids [B, T] or None, room) -> carry`, which can take `room` more tokens; and
      `(params, carry, rows [N], inputs [N, T], targets [N, T])`, which gives what `log_probabilities` does, of inputs that stand
      behind the contexts of these rows.
    """

    rows_apart = sharding.batch_sharding(built.mesh)

    def read(params, contexts, segment_ids, room):
        contexts = jax.lax.with_sharding_constraint(contexts, rows_apart)
        carry = built.merge(params).initial_carry(contexts.shape[0], contexts.shape[1] + room)
        where = {} if segment_ids is None else {"segment_ids": segment_ids}
        return built.apply(params, contexts, carry, reduce=lambda head, x: x[:, :1], **where)[1]

    def go_on(params, carry, rows, inputs, targets):
        inputs, targets = jax.lax.with_sharding_constraint((inputs, targets), rows_apart)
        own = jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, carry)
        return built.apply(params, inputs, own, reduce=_judge(targets))[0]

    return jax.jit(read, static_argnums=3), jax.jit(go_on, out_shardings=sharding.replicated(built.mesh))


def _judge(targets):
    """As `SequenceModel` takes it for `reduce`: log p of the targets [B, T], and whether they are the likeliest."""

    def judge(head, x):
        def piece(arrays):
            logits = head(arrays[0])
            log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), arrays[1][..., None], -1)[..., 0]
            return log_p, logits.argmax(-1) == arrays[1]

        length = x.shape[1]
        if length % CHUNK or length == CHUNK:
            return piece((x, targets))
        split = lambda a: jnp.moveaxis(a.reshape(len(a), -1, CHUNK, *a.shape[2:]), 1, 0)
        return jax.tree.map(
            lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], length),
            jax.lax.map(piece, (split(x), split(targets))),
        )

    return judge


def _in_batches(pieces: Sequence[tuple[int, list[int], list[int]]], rows: int) -> Iterator[list]:
    """Pieces in batches, the short ones first."""
    order = sorted(pieces, key=lambda piece: len(piece[1]) + len(piece[2]))
    for start in range(0, len(order), rows):
        yield order[start : start + rows]

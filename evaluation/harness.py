"""Scores a checkpoint on tasks of lm-evaluation-harness, its own and yours.

    python -m evaluation.harness --workdir=runs/lm --tasks=lambada_openai,arc_easy
    python -m evaluation.harness --hf=mamba-130m-hf --tasks=mine --include_path=my_tasks --limit=100

pip install -r requirements-harness.txt. The data of its own tasks comes from the Hugging Face Hub; a task of yours, a YAML file
in the folder that --include_path names, may read a local file (dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}).

A context that is too long loses its beginning, and a text longer than --max_length is scored in disjoint windows, the last one
moved back to full context, which is what the library does with models of transformers. Where nothing stands before what is
scored, --prefix does: models of ours have no token for the beginning of a text.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import command
from common.console import say
from common.errors import UserError, check_range
from common.files import write_atomically
from evaluation.generation import Generator, of_model
from evaluation.loading import LoadedRun, load, load_hf
from evaluation.sampling import Continuation, batches, padded
from training import sharding
from training.run_directory import locate
from training.state import Built, cast

RESAMPLES = 1000  # for standard errors that have no formula
CHUNK = 128  # positions whose logits are there together
LENGTH = 2048  # of a checkpoint in Hugging Face's format that says none, as in the library
NEW_TOKENS = 256  # of a generation that says none, as in the library
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
Piece = tuple[list[int], list[int]]  # what stands before, and what is scored


class Answers:
    """The three questions of lm-evaluation-harness, answered by a checkpoint. Of its requests the `args` are used.

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
        facts = _facts(run)
        if max_length is None:
            max_length = task.spec.length if task is not None else facts.get("max_position_embeddings") or LENGTH
        check_range("--max_length", max_length, 1)
        check_range("--batch_size", batch_size, 1)
        self.run, self.max_length = run, max_length
        ways = sharding.batch_ways(run.built.mesh)
        self._rows = -(-batch_size // ways) * ways
        self._ends = _ids(facts.get("eos_token_id"))
        beginning = _ids(facts.get("bos_token_id")) or self._ends
        self.prefix = beginning[:1] if prefix is None and beginning else self.encode("\n" if prefix is None else prefix)
        if not self.prefix:
            raise UserError("--prefix is empty: the first token of a text needs one that stands before it")
        self._params = cast(run.params, run.built.metadata, config.train.compute_dtype)
        self._step = log_probabilities(run.built)
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
        if self.run.tokenizer is not None:
            return self.run.tokenizer.decode(list(ids), skip_special_tokens=False)
        return self.run.config.task.decode(ids)

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
        order = sorted(pieces, key=lambda piece: len(piece[1]) + len(piece[2]))
        nats, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        for start in range(0, len(order), self._rows):
            batch = order[start : start + self._rows]
            # Few shapes are compiled: lengths are powers of two, and the last batch is filled up.
            longest = max(len(before) + len(scored) - 1 for _, before, scored in batch)
            shape = self._rows, min(self.max_length, 1 << (longest - 1).bit_length())
            inputs, targets, weights = (np.zeros(shape, kind) for kind in (np.int32, np.int32, bool))
            for row, (_, before, scored) in enumerate(batch):
                ids = np.array(before + scored)
                size = len(ids) - 1
                inputs[row, :size], targets[row, :size] = ids[:-1], ids[1:]
                weights[row, size - len(scored) : size] = True
            with self.run.computing():
                log_p, best = jax.device_get(self._step(self._params, inputs, targets))
            for row, (i, _, _) in enumerate(batch):
                nats[i] += log_p[row, weights[row]].astype(np.float64).sum()
                greedy[i] &= best[row, weights[row]].all()
        if np.isnan(nats).any():
            raise UserError("the model's scores are no numbers (NaN): take another checkpoint")
        return list(zip(nats.tolist(), greedy.tolist()))

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
        generator = self._generators.setdefault(tuple(chosen.values()), Generator(*of_model(self.run.built), **chosen))
        room = max(1, self.max_length - length)
        ids = [np.array((self.encode(context) or self.prefix)[-room:]) for context in contexts]
        pads = all(mixer.padding or mixer.packing for mixer in self.run.config.model.sketches.values())
        found: dict[int, str] = {}
        for batch in batches([(i, 0) for i in range(len(ids))], [len(one) for one in ids], self._rows, pads):
            filled = batch + batch[-1:] * (self._rows - len(batch) if pads else 0)
            prompts, segment_ids = padded([ids[i] for i, _ in filled], several=True)
            parts = [Continuation(self.decode, stop) for _ in batch]

            def see(tokens, parts=parts):
                for part, token in zip(parts, tokens):
                    if token in self._ends and not part.ended:
                        part.finish()
                        part.ended = True
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

        return built.apply(params, inputs, reduce=judge)[0]

    return jax.jit(step, out_shardings=sharding.replicated(built.mesh))


def installed() -> Any:
    """The library.

    Raises:
      UserError: if it is not installed.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a fork of a process that runs JAX may wait for ever
    try:
        import lm_eval.api.instance
        import lm_eval.api.model
        import lm_eval.evaluator
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError:
        raise UserError("this needs lm-evaluation-harness: pip install -r requirements-harness.txt") from None
    return lm_eval


def as_lm() -> type[Answers]:
    """`Answers` as the library takes it: a subclass of its LM, too."""
    return type("Checkpoint", (Answers, installed().api.model.LM), {})


def evaluate(
    run: LoadedRun,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What the library makes of a checkpoint.

    Args:
      run: the checkpoint.
      tasks: names.
      include_path: a folder of tasks of one's own; the library's are then looked into only where a name is not there.
      num_fewshot: examples before each question; None for what the task says.
      limit: the first so many questions of each task; None for all.
      **settings: of `Answers`.

    Returns:
      the library's "results" and what belongs to them.

    Raises:
      UserError: without the library, for an unknown task, and as `Answers` does.
    """
    lm_eval = installed()
    model = as_lm()(run, **settings)
    folder = None if include_path is None else str(Path(include_path).expanduser().absolute())
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--include_path={include_path} is no folder")
    manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=folder is None)
    if folder is not None and not set(tasks) <= set(manager.all_tasks):
        manager = lm_eval.tasks.TaskManager(include_path=folder)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"--tasks: there is no {', '.join(unknown)} in the library" + (f" or {folder}" if folder else "")
        )
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
    )
    kept = {key: found[key] for key in ("results", "groups", "n-shot", "versions", "n-samples") if key in found}
    print(lm_eval.utils.make_table(found))
    asked = {"tasks": list(tasks), "num_fewshot": num_fewshot, "limit": limit, "max_length": model.max_length}
    asked |= {"prefix": model.decode(model.prefix)}
    return {"checkpoint": str(run.workdir), **run.origin, "lm_eval": version("lm_eval"), **asked, **kept}


def write(run: LoadedRun, record: Mapping[str, Any], output: str | Path | None) -> None:
    """Writes what `evaluate` found into a folder; without one into the run's `evaluations/`, and for --hf nowhere."""
    if output is None and run.config.task is None:
        return
    folder = run.workdir / "evaluations" if output is None else locate(output, "--output")
    asked = json.dumps({key: record[key] for key in ("tasks", "num_fewshot", "limit", "max_length", "prefix")})
    names = "_".join(record["tasks"])[:40].replace("/", "-")
    path = folder / f"step{run.step}-harness-{names}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}.json"
    try:
        write_atomically(path, json.dumps(record, indent=1, default=str))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; give another folder as --output"
        ) from None
    say(f"kept as {path}")


def _facts(run: LoadedRun) -> dict[str, Any]:
    """The `config.json` of a checkpoint in Hugging Face's format; of a run nothing."""
    return json.loads((run.workdir / "config.json").read_text()) if run.config.task is None else {}


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__, prog="python -m evaluation.harness")
    parser.add_argument("--workdir", metavar="DIR", help="the run's directory")
    parser.add_argument("--hf", metavar="DIR", help="a checkpoint in Hugging Face's format, in place of a run")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (default: best)")
    parser.add_argument("--allow_other_data", action="store_true", help="go on where the run's data is not here")
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="tasks of the library, or of --include_path")
    parser.add_argument("--include_path", metavar="DIR", help="a folder of tasks of your own (YAML)")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument("--max_length", type=int, metavar="N", help="tokens that are read at once")
    parser.add_argument("--prefix", metavar="TEXT", help="stands before a text without context (default: a line's end)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="rows that are computed together (16)")
    parser.add_argument(
        "--output", metavar="DIR", help="where a JSON file is written; by default the run's evaluations/"
    )
    options = parser.parse_args(arguments)
    if (options.workdir is None) == (options.hf is None):
        raise UserError("give --workdir=DIR, a run, or --hf=DIR, a checkpoint in Hugging Face's format")
    if options.limit is not None:
        check_range("--limit", options.limit, 1)
    installed()
    command.start()
    if options.hf is not None:
        run = load_hf(options.hf)
    else:
        run = load(options.workdir, options.checkpoint, options.allow_other_data)
    names = ("include_path", "num_fewshot", "limit", "max_length", "prefix", "batch_size")
    record = evaluate(run, options.tasks.split(","), **{name: getattr(options, name) for name in names})
    write(run, record, options.output)


if __name__ == "__main__":
    command.run(main)

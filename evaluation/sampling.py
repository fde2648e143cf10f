"""Text from a checkpoint: what prompts are read, how they are continued together, and where the texts are kept."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.console import say
from common.errors import UserError, check_range
from common.files import absolute, write_atomically
from evaluation import generation
from evaluation.generation import Generator, of_model
from evaluation.loading import LoadedRun
from training.config import SEEDS
from training.run_directory import RunDirectory
from training.state import cast

BROKEN = "\ufffd"  # what stands for the bytes of a character that is not whole
PATIENCE = 16  # tokens in which a character must become whole


def check(
    length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    samples: int = 1,
    stop: Sequence[str] = (),
    batch_size: int = 1,
) -> None:
    """Raises a UserError for settings of `sample` that are out of range."""
    generation.check(length, temperature, top_k, top_p, seed)
    check_range("--samples", samples, 1, SEEDS - seed)
    check_range("--batch_size", batch_size, 1)
    if "" in stop:
        raise UserError("--stop is empty, which every text contains")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: of `.jsonl` a string, or an object with "prompt", in each line; else each line that is not blank.

    Raises:
      UserError: if the file cannot be read or holds no prompt.
    """
    try:
        lines = Path(absolute(path)).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path} cannot be read: {error}") from None
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts={path} holds no prompt: write one into each line")
    if Path(path).suffix != ".jsonl":
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"--prompts={path}, line {number}, is no JSON: {error}") from None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise UserError(
                f'--prompts={path}, line {number}, is neither a string nor an object with a string "prompt"'
            )
        prompts.append(prompt)
    return prompts


class Continuation:
    """The text of tokens that come one by one, until a stop string.

    Args:
      decode: the text of token ids.
      stop: strings before the first of which the text ends.

    Attributes:
      text: so far, in whole characters.
      ended: whether a stop string was found.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        # Tokens whose text is known and gives the next ones their context, and those that wait for a character to be whole.
        self._known: list[int] = []
        self._waiting: list[int] = []
        self._given = 0
        self.text, self.ended = "", False

    def add(self, token: int) -> None:
        """Takes a token. None changes the text once it has ended."""
        if self.ended:
            return
        self._waiting.append(int(token))
        if not self._new().endswith(BROKEN) or len(self._waiting) >= PATIENCE:
            self._take()

    def end(self) -> None:
        """The text ends here."""
        self.finish()
        self.ended = True

    def finish(self) -> None:
        """There are no more tokens: characters that are not whole stay so."""
        if not self.ended and self._waiting:
            self._take()

    def piece(self) -> str:
        """What has not been given yet and cannot become part of a stop string."""
        end = len(self.text) if self.ended else max(self._given, len(self.text) - max(self._longest - 1, 0))
        piece, self._given = self.text[self._given : end], end
        return piece

    def rest(self) -> str:
        """What has not been given yet."""
        piece, self._given = self.text[self._given :], len(self.text)
        return piece

    def _new(self):
        return self._decode(self._known + self._waiting)[len(self._decode(self._known)) :]

    def _take(self):
        new = self._new()
        since = max(0, len(self.text) - self._longest + 1)
        self.text += new
        self._known, self._waiting = self._waiting, []
        found = [at for stop in self._stop if (at := self.text.find(stop, since)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], True


def sample(
    run: LoadedRun,
    prompts: Sequence[str],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    samples: int = 1,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> list[str]:
    """Continues prompts, prints the texts and the speed, and keeps each text in the run's `samples/` (of --hf nowhere).

    A single text is printed while it is made. One that cannot be kept (on a read-only disk, say) is printed all the same, with
    the reason. What is drawn for a prompt does not depend on the prompts beside it.

    Args:
      run: the run and its checkpoint.
      prompts: texts.
      length: number of tokens to generate, where no stop string ends a text before.
      temperature, top_k, top_p: see `generation.draw`.
      seed: the source of the draws of the first sample; the next one has the next seed.
      samples: of each prompt.
      stop: strings before which a text ends.
      batch_size: rows that are computed together.

    Returns:
      the prompts and what follows them, the samples of the first prompt first.

    Raises:
      UserError: if the model does not predict a text, for an empty prompt, for settings out of range, and for scores that are
        no numbers.
    """
    config, built = run.config, run.built
    if config.model.head != "token" or not config.model.causal or config.model.vocab_size is None:
        of = run.workdir if config.task is None else f"task {config.task.name!r}"
        raise UserError(f"{of} has no model that continues a text: there is nothing to sample")
    settings = {"temperature": float(temperature), "top_k": top_k, "top_p": float(top_p)}
    check(length, **settings, seed=seed, samples=samples, stop=stop, batch_size=batch_size)
    several = len(prompts) > 1
    encoded = [_encode(run, prompt, f"prompt {i}" if several else "the prompt") for i, prompt in enumerate(prompts, 1)]
    rows = [(i, seed + j) for i in range(len(prompts)) for j in range(samples)]
    alone = len(rows) == 1
    params = cast(run.params, built.metadata, config.train.compute_dtype)

    generator = Generator(*of_model(built), **settings)
    pads = all(mixer.padding or mixer.packing for mixer in config.model.sketches.values())
    texts, rates, prefill = {}, [], 0.0
    for batch in batches(rows, [len(ids) for ids in encoded], batch_size, pads):
        # A last batch of fewer rows is filled up, so that it need not be compiled.
        several = len(rows) > len(batch)
        filled = batch + batch[-1:] * (batch_size - len(batch) if several and pads else 0)
        ids, segment_ids = padded([encoded[i] for i, _ in filled], several)
        parts = [Continuation(run.decode, stop) for _ in batch]
        if alone:
            _show(prompts[0])

        def see(tokens, parts=parts):
            for part, token in zip(parts, tokens):
                if token in run.ends and not part.ended:
                    part.end()
                part.add(token)
            if alone:
                _show(parts[0].piece())
            return all(part.ended for part in parts)

        with run.computing():
            _, speed = generator(params, ids, length, [s for _, s in filled], segment_ids=segment_ids, see=see)
        rates.append(speed["tokens_per_second"] * len(batch) / len(filled))
        prefill += speed["prefill_seconds"]
        for row, part in zip(batch, parts):
            part.finish()
            if alone:
                _show(part.rest() + "\n")
            texts[row] = prompts[row[0]] + part.text
    unit = "token" if config.task is None else config.task.spec.unit
    say(f"\n{np.mean(rates):,.0f} {unit}s/s (prefill {1e3 * prefill:.1f} ms)")
    _report(run, prompts, texts, rows, length, settings, stop)
    return [texts[row] for row in rows]


def batches(
    rows: Sequence[tuple[int, int]], lengths: Sequence[int], batch_size: int, pads: bool
) -> list[list[tuple[int, int]]]:
    """Rows (prompt, seed) in batches: the short prompts first, and only equal lengths together where nothing can be padded."""
    found: list[list[tuple[int, int]]] = []
    for row in sorted(rows, key=lambda row: lengths[row[0]]):
        same = found and (pads or lengths[found[-1][-1][0]] == lengths[row[0]])
        if same and len(found[-1]) < batch_size:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def padded(prompts: Sequence[np.ndarray], several: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompts [batch, length], padded on the left, and their segments, None where nothing is padded.

    Args:
      prompts: token ids.
      several: whether there are other batches. Then those that are padded are as long as a power of two, so that few shapes are
        compiled.
    """
    longest = max(map(len, prompts))
    if all(len(prompt) == longest for prompt in prompts):
        return np.stack(prompts), None
    size = 1 << (longest - 1).bit_length() if several else longest
    left = lambda a: np.pad(a, (size - len(a), 0))
    return np.stack([left(a) for a in prompts]), np.stack([left(np.ones(len(a), np.int32)) for a in prompts])


def _encode(run, prompt, place):
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} is not valid UTF-8") from None
    if run.config.task is None:
        run.decode([])  # raises where there is no tokenizer
        ids = run.tokenizer.encode_prompt(prompt)  # with what it puts around a text, as the library does
    else:
        ids = run.config.task.encode(prompt)
    if not len(ids):
        raise UserError(f"{place} is empty: generation needs at least one token to continue")
    return np.asarray(ids)


def _show(text):
    if text and jax.process_index() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


def _report(run, prompts, texts, rows, length, settings, stop):
    """Prints the texts (one alone has been printed) and keeps them."""
    folder, problem = RunDirectory(run.workdir).samples, None
    for i, seed in rows:
        text = texts[i, seed]
        record = {**run.origin, "prompt": prompts[i], "length": length, **settings, "seed": seed}
        record |= {"stop": list(stop)} if stop else {}
        path = folder / f"{name(record)}.txt"
        if len(rows) > 1:
            say(f"\n--- {path.name}\n{text}")
        if jax.process_index() == 0 and problem is None and run.config.task is not None:
            try:
                write_atomically(path.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False))
                write_atomically(path, text)
            except OSError as error:
                problem = f"not kept: cannot write to {folder}: {error.strerror or error}"
            else:
                if len(rows) == 1:
                    say(f"kept as {path}")
    if problem is not None:
        say(problem)
    elif len(rows) > 1 and run.config.task is not None:
        say(f"\n{len(rows)} texts kept in {folder}")


def name(record: dict[str, Any]) -> str:
    """The name of a sample's files, by its prompt and settings: equal ones have the same file, and others another."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    prompt = re.sub(r"[^A-Za-z0-9]+", "_", record["prompt"])[:24].strip("_") or "prompt"
    parts = [f"step{record['step']}", prompt, f"n{record['length']}", f"t{record['temperature']:g}"]
    if record["top_k"]:
        parts.append(f"k{record['top_k']}")
    if record["top_p"] < 1:
        parts.append(f"p{record['top_p']:g}")
    return "-".join([*parts, f"seed{record['seed']}", digest])

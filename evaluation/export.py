"""Writes a checkpoint of a run in Hugging Face's format, where transformers has its architecture.

    python -m evaluation.export runs/mamba exported/mamba

The directory gets config.json, model.safetensors and, where the run's text is in subwords, the tokenizer's files. What the
library's model has otherwise than the run's is an error that names it.
"""

from pathlib import Path

from common import command
from common.console import say
from data.tokenizers import Subword
from evaluation.loading import LoadedRun, load
from models import import_hf
from training.run_directory import writing


def export(run: LoadedRun, directory: str | Path) -> None:
    """Writes the model of a run.

    Args:
      run: the run with one of its checkpoints.
      directory: must not exist.

    Raises:
      UserError: if the directory exists, or it cannot be written, or transformers has no such model; nothing is written then.
    """
    files = tokenizer_files(run)
    with writing(Path(directory)):
        import_hf.save(directory, import_hf.from_ours(run.built.merge(run.params), run.config.model, files))
    say(f"{directory}: config.json, {', '.join([import_hf.WEIGHTS, *files])}")


def tokenizer_files(run: LoadedRun) -> dict[str, bytes]:
    """The files of a run's tokenizer, by name; none for bytes and characters, which transformers has no tokenizer for."""
    tokens = getattr(run.config.task, "tokens", None)
    if tokens is None or not isinstance(tokens.tokenizer, Subword):
        return {}
    if not tokens.name.startswith("file:"):
        return {"tokenizer.json": tokens.tokenizer.to_json().encode()}
    path = Path(tokens.name.removeprefix("file:"))
    folder = path if path.is_dir() else path.parent
    found = {name: (folder / name).read_bytes() for name in import_hf.TOKENIZER if (folder / name).is_file()}
    return found if path.is_dir() else found | {"tokenizer.json": path.read_bytes()}


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__, prog="python -m evaluation.export")
    parser.add_argument("workdir", metavar="RUN", help="directory of the run")
    parser.add_argument("directory", metavar="DIR", help="where to write; must not exist")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (default: best)")
    options = parser.parse_args(arguments)
    command.start()
    export(load(options.workdir, options.checkpoint, allow_other_data=True), options.directory)


if __name__ == "__main__":
    command.run(main)

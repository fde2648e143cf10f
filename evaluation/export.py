"""Writes a checkpoint of a run in Hugging Face's format, where transformers has its architecture.

    python -m evaluation.export runs/mamba exported/mamba

The directory gets config.json, model.safetensors and, where the run's text is in subwords, the tokenizer's files, which must
be those of the training. What the library's model has otherwise than the run's is an error that names it.
"""

from pathlib import Path

from common import command
from common.console import say
from common.errors import UserError
from data import vocabularies
from data.tokenizers import Subword
from evaluation.loading import LoadedRun, load
from models import import_hf
from training.run_directory import recorded_data, writing


def export(run: LoadedRun, directory: str | Path, allow_other_data: bool = False) -> None:
    """Writes the model of a run.

    Args:
      run: the run with one of its checkpoints.
      directory: must not exist.
      allow_other_data: write the tokenizer that is here although it is not, or may not be, the one that the run was trained with.

    Raises:
      UserError: if the directory exists, or it cannot be written, or transformers has no such model, or the tokenizer is another;
        nothing is written then.
    """
    files = tokenizer_files(run)
    if files and not allow_other_data:
        check_tokenizer(run)
    with writing(Path(directory)):
        import_hf.save(directory, import_hf.from_ours(run.built.merge(run.params), run.config.model, files))
    say(f"{directory}: config.json, {', '.join([import_hf.WEIGHTS, *files])}")


def check_tokenizer(run: LoadedRun) -> None:
    """Raises a UserError where the tokenizer that is here is not the one of the training, or nothing says that it is: the ids of
    the weights would be other tokens."""
    here, trained = run.config.task.tokenizer.fingerprint, recorded_data(run.workdir, "tokenizer")
    if trained == here or (trained is None and run.other_data is None):
        return
    whether = "may be another" if trained is None else "is another"
    raise UserError(
        f"the tokenizer that is here {whether} than the one that the weights of {run.workdir} were trained with, since its text "
        "or its file has changed: give back what the run was trained on, or write the tokenizer that is here with "
        "--allow_other_data"
    )


def tokenizer_files(run: LoadedRun) -> dict[str, bytes]:
    """The files of a run's tokenizer, by name; none for bytes and characters, which transformers has no tokenizer for."""
    tokenizer = run.config.task.tokenizer
    if not isinstance(tokenizer, Subword):
        return {}
    made = {"tokenizer.json": tokenizer.to_json().encode()}
    name = run.config.task.resolved["tokenizer"]
    if not name.startswith("file:"):
        return made
    path = Path(name.removeprefix("file:"))
    folder = path if path.is_dir() else path.parent
    found = {name: (folder / name).read_bytes() for name in import_hf.TOKENIZER if (folder / name).is_file()}
    if path.is_file():
        return found | {"tokenizer.json": path.read_bytes()}
    return found if vocabularies.of_checkpoint(folder) is not None else found | made


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__, prog="python -m evaluation.export")
    parser.add_argument("workdir", metavar="RUN", help="directory of the run")
    parser.add_argument("directory", metavar="DIR", help="where to write; must not exist")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (default: best)")
    parser.add_argument(
        "--allow_other_data",
        action="store_true",
        help="write the tokenizer that is here although the run was trained with another",
    )
    options = parser.parse_args(arguments)
    command.start()
    # Weights do not change with the text: only a tokenizer that goes with them must be the one of the training.
    run = load(options.workdir, options.checkpoint, allow_other_data=True)
    export(run, options.directory, options.allow_other_data)


if __name__ == "__main__":
    command.run(main)

"""The folder of a run's diagnostics: the numbers as JSON, and plots of them where matplotlib is installed."""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import remote
from common.errors import UserError
from common.files import read_json, write_atomically
from evaluation.diagnostics.plots import PLOTS
from training.run_directory import writing

FILE = "diagnostics.json"


def check(folder: Path, origin: Mapping[str, Any]) -> None:
    """Checks that `save` will be able to write a folder, before anything is computed.

    Args:
      folder: the folder.
      origin: of what is to be written: "step", "length" and "data".

    Raises:
      UserError: if the folder holds diagnostics of another origin, which are not replaced, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no directory; move or delete it to go on")
    file = folder / FILE
    if file.exists():
        found = read_json(file)
        if not isinstance(found, dict):
            raise UserError(f"{file} cannot be read; move or delete {folder} to go on")
        for key, here in origin.items():
            if (there := found.get(key, here)) != here:
                raise UserError(f"{file} is of {key} {there}, this is {key} {here}; move or delete {folder} to go on")
    for place in (folder.parent, folder):
        if place.exists() and not remote.is_address(folder):
            with writing(place):
                tempfile.TemporaryFile(dir=place).close()


def save(result: dict[str, Any], folder: Path) -> str:
    """Makes the folder anew, all of it or nothing; files in it that are not ours stay.

    Args:
      result: what `evaluation.diagnostics.measures.measure` returns, and where it comes from.
      folder: the folder; that which contains it exists.

    Returns:
      a sentence on what is where.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        plots, said = {}, f"numbers in {folder / FILE}; for plots of them: pip install matplotlib"
    else:
        plots, said = PLOTS, f"numbers and plots in {folder}"
    beside = None if remote.is_address(folder) else folder.parent
    with writing(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=beside) as temporary:
        made, before = Path(temporary, "made"), Path(temporary, "before")
        made.mkdir()
        (made / FILE).write_text(json.dumps(finite(result), indent=1, allow_nan=False))
        for name, plot in plots.items():
            figure = plot(result)
            if figure is not None:
                figure.savefig(made / f"{name}.png", dpi=120)
        if beside is None:  # an object store, where the numbers, which come last, are those of all that is there
            for path in sorted(made.iterdir(), key=lambda path: path.name == FILE):
                write_atomically(folder / path.name, path.read_bytes())
            return said
        if folder.exists():
            _keep_others(folder, made)
            folder.rename(before)
        try:
            made.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise
    return said


def _keep_others(folder: Path, made: Path) -> None:
    """Copies what is in the old folder and not of our making into the new one."""
    ours = {FILE, *(f"{name}.png" for name in PLOTS)}
    for path in folder.iterdir():
        if path.name in ours:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, made / path.name, symlinks=True)
        else:
            shutil.copy2(path, made / path.name, follow_symlinks=False)


def finite(tree: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree

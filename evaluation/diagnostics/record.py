"""The folder of a run's diagnostics: the numbers as JSON, and plots of them where matplotlib is installed."""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import remote
from common.errors import UserError
from common.files import read_json, write_atomically, write_figure
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
    """Writes the numbers and the plots. Each file is whole at any time, and the numbers, which come last, are those of all the
    plots that are there; files that are not ours stay as they are.

    Args:
      result: what `evaluation.diagnostics.measures.measure` returns, and where it comes from.
      folder: the folder, which is made.

    Returns:
      a sentence on what is where.

    Raises:
      UserError: if it cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        figures, said = {}, f"numbers in {folder / FILE}; for plots of them: pip install matplotlib"
    else:
        figures = {name: figure for name, plot in PLOTS.items() if (figure := plot(result)) is not None}
        said = f"numbers and plots in {folder}"
    numbers = json.dumps(finite(result), indent=1, allow_nan=False)
    with writing(folder):
        for name in PLOTS:
            path = folder / f"{name}.png"
            if name in figures:
                write_figure(path, figures[name], dpi=120)
            else:
                path.unlink(missing_ok=True)
        write_atomically(folder / FILE, numbers)
    return said


def finite(tree: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree

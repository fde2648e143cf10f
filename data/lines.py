"""A local file of one's own, for tasks that are made of one; and the lines of one with a JSON object in each."""

import pathlib

from common.errors import UserError
from common.files import absolute, read_bytes


def find(data_dir: str | None, file: str | None, ending: str, what: str) -> tuple[pathlib.Path, str]:
    """A file of a task.

    Args:
      data_dir: a folder that holds the file; None where `file` says all.
      file: its name, or its path in the folder; None for the only file of the folder with the ending.
      ending: of such files, such as ".csv".
      what: the file holds, in words, such as "the passages".

    Returns:
      its path, and what `file` must be to mean the same from whatever directory.

    Raises:
      UserError: where there is no such file.
    """
    folder = pathlib.Path(data_dir or "")
    names = sorted(path.name for path in folder.glob(f"*{ending}")) if data_dir is not None else []
    if file is None and len(names) != 1:
        raise UserError(
            f"data_dir={data_dir} holds {len(names)} {ending} files: give the folder of {what}, or the name of one as file"
        )
    if file is None:
        (file,) = names
    elif data_dir is None:
        file = absolute(file)
    path = folder / file
    if not path.is_file():
        raise UserError(f"there is no file {path}; the folder has {', '.join(names) or f'no {ending}'}")
    return path, file


def read(path: pathlib.Path) -> tuple[bytes, list[tuple[int, bytes]]]:
    """All that a file holds, and its lines that are not blank, with their numbers.

    Raises:
      UserError: where it cannot be read.
    """
    content = read_bytes(path)
    return content, [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]

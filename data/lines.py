"""A local file of JSON objects, one in each line, for tasks that are made of one."""

import pathlib

from common.errors import UserError
from common.files import read_bytes


def read(data_dir: str | None, file: str | None, what: str) -> tuple[pathlib.Path, bytes, list[tuple[int, bytes]]]:
    """The lines of a .jsonl file that are not blank.

    Args:
      data_dir: a folder that holds the file.
      file: its name; None for the only .jsonl of the folder.
      what: its lines are, in words, such as "passages".

    Returns:
      its path, all that it holds, and the lines with their numbers.

    Raises:
      UserError: where there is no such file.
    """
    folder = pathlib.Path(data_dir or "")
    names = sorted(path.name for path in folder.glob("*.jsonl")) if data_dir is not None else []
    if file is None and len(names) != 1:
        raise UserError(
            f"data_dir={data_dir} holds {len(names)} .jsonl files: give the folder of the {what}, or their name as file"
        )
    path = folder / (names[0] if file is None else file)
    if not path.is_file():
        raise UserError(f"there is no file {path}; the folder has {', '.join(names) or 'no .jsonl'}")
    content = read_bytes(path)
    return path, content, [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]

"""Why a program has failed, in one line, read from what it has printed."""

import re
from pathlib import Path

from training.command_line import ROOT

TRACEBACK = "Traceback (most recent call last)"


def reason(text: str) -> str | None:
    """The last error in what a program has printed; None if there is none.

    Returns:
      the message of a `UserError`; of every other exception the first line, and where in this project it was raised:
      "ValueError: shapes do not fit (models/mixers/mine.py, line 41, in mix)".
    """
    lines = text.splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith(("error: ", TRACEBACK))]
    if not begins:
        return None
    if not lines[begins[-1]].startswith(TRACEBACK):
        return lines[begins[-1]].removeprefix("error: ")
    frames = []
    for line in lines[begins[-1] + 1 :]:
        if frame := re.match(r'\s+File "(.+)", line (\d+), in (.+)', line):
            frames.append(frame.groups())
        elif line.strip() and not line.startswith(" "):
            return line.strip() + _place(frames)
    return f"{TRACEBACK}, but not its end" + _place(frames)


def _place(frames: list[tuple[str, str, str]]) -> str:
    """The innermost frame in this project, or else in no library, in brackets."""
    outside = [frame for frame in frames if "site-packages" not in frame[0]]
    own = [frame for frame in outside if Path(frame[0]).is_relative_to(ROOT)]
    chosen = (own or outside or frames)[-1:]
    if not chosen:
        return ""
    ((path, line, function),) = chosen
    if Path(path).is_relative_to(ROOT):
        path = str(Path(path).relative_to(ROOT))
    return f" ({path}, line {line}, in {function})"

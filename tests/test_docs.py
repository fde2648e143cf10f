"""What the pages say is there is there: the files that they link to, and the programs and flags of their commands."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

# A command, with the lines that continue it.
COMMAND = re.compile(r"\bpython (-m )?([\w./]+)((?:\\\n|[^\n`])*)")


def named(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def commands(page: pathlib.Path) -> list[tuple[pathlib.Path | None, str, str]]:
    """The commands of a page that run a program of this repository: its file (None if there is none), its name, the rest."""
    if page.name == "CHANGELOG.md":  # which names what is gone, too
        return []
    found = []
    for module, name, rest in COMMAND.findall(page.read_text()):
        if module and name.split(".")[0] in ("venv", "pip", "pytest", ""):
            continue
        if module:
            path = ROOT / (name.strip(".").replace(".", "/") + ".py")
        elif name.endswith(".py"):
            path = ROOT / name
        else:
            continue
        found.append((path if path.is_file() else None, name, rest))
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links(page):
    """Relative links lead to files and folders of the repository, and links inside a page to its headings."""
    text = page.read_text()
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), f"{named(page)} links to {target}"
        assert path or anchor in headings, f"{named(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands(page):
    """The program of a command exists, and so do its configuration and each of its flags."""
    for path, name, rest in commands(page):
        assert path is not None, f"{named(page)} runs {name}, which is not there"
        source = path.read_text()
        for flag in re.findall(r"(?<=\s)--(\w+)", rest.partition("#")[0]):
            if flag not in ("config", "help"):
                assert re.search(rf"[\"'](--)?{flag}[\"']", source), f"{named(page)}: {name} has no --{flag}"
        for config in re.findall(r"--config=([\w./]+\.py)", rest):
            assert (ROOT / config).is_file(), f"{named(page)} takes {config}"


def test_commands_are_found():
    """The commands are really read: an empty list would pass the tests above."""
    programs = {name for page in PAGES for _, name, _ in commands(page)}
    assert {"train.py", "eval.py", "sweep.py", "benchmarks.mixers", "evaluation.expect"} <= programs


def test_modules_of_commands_can_be_imported():
    """`python -m a.b` needs packages all the way."""
    for page in PAGES:
        for _, name, _ in commands(page):
            if not name.endswith(".py"):
                assert importlib.util.find_spec(name) is not None, name

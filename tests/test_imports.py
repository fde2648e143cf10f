"""Who may import whom: from the entry points down to the ground, never upwards and never in a circle."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# What each room may import besides itself.
BELOW = {
    "common": (),
    "ops": ("common",),
    "models": ("ops", "common"),
    "data": ("ops", "common"),
    "training": ("models", "data", "ops", "common"),
    "evaluation": ("training", "models", "data", "ops", "common"),
    "compilation": ("evaluation", "training", "models", "data", "ops", "common"),
    "sweeps": ("evaluation", "training", "models", "data", "ops", "common"),
    "configs": ("training", "models", "data", "common"),
}
# Configurations read defaults and nothing else.
OF_CONFIGS = {
    "common.errors",
    "common.signatures",
    "configs.common",
    "configs.published",
    "data.task",
    "models.config",
    "models.mixer",
    "models.pattern",
    "training.config",
    "training.optimizer",
    "training.sharding",
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in BELOW
    for path in sorted((ROOT / room).rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """The files of ours that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = {next((n for n in (item, item.rpartition(".")[0]) if n in FILES), None) for item in found}
    return found - {None}


def test_no_arrow_goes_up():
    arrows = [(name, other) for name in FILES for other in imports(name)]
    up = [(a, b) for a, b in arrows if b.partition(".")[0] not in (a.partition(".")[0], *BELOW[a.partition(".")[0]])]
    assert not up
    beside = [(a, b) for a, b in arrows if a.startswith("configs.") and b not in OF_CONFIGS]
    assert not beside, "configurations read defaults and nothing else"


def test_there_is_no_circle():
    """Not among files either; a package's own __init__ aside, which its files are part of."""
    arrows = {name: imports(name) for name in FILES}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(arrows[name]):
            if other != name:
                visit(other)
        path.pop()
        done.add(name)

    for name in FILES:
        visit(name)


def test_orbax_stands_in_one_file():
    """And so do the other libraries that one file is to know."""
    for library, owner in {"orbax": "training.checkpoints", "tensorboardX": "training.metrics"}.items():
        users = [
            name
            for name in FILES
            if f"import {library}" in (text := FILES[name].read_text()) or f"from {library}" in text
        ]
        assert users == [owner]


def test_training_is_small_enough_to_read():
    assert len(list((ROOT / "training").glob("*.py"))) <= 18  # seventeen nouns and __init__

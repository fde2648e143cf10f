"""RULER: needles, chains, counts and questions in long texts."""

from data.tasks.ruler import KINDS
from evaluation.suite import Suite


class Ruler(Suite):
    """The thirteen tasks of RULER (arXiv 2404.06654), S-NIAH-1, 2 and 3 first, at lengths that double, in bytes; for others give
    `--lengths`."""

    tasks = (("ruler", {"kind": KINDS, "length": (1024, 2048, 4096)}),)

"""The table of mixers in docs/mixers.md is what the mixers say of themselves."""

import inspect
import pathlib
import re

from common import marks
from models import catalogue
from models import mixer as mixers


def test_page_is_current():
    """Run `python -m models.catalogue docs/mixers.md` after adding a mixer."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "mixers.md").read_text()
    table = catalogue.table()
    assert marks.insert(page, catalogue.NAME, table) == page
    for name in mixers.names():
        assert f"`{name}`" in table


def test_docstrings_name_the_hyperparameters():
    """All of them and nothing else: what is not there, or what the model says in its place, cannot be set."""
    for name in mixers.names():
        docs = [inspect.getdoc(cls) or "" for cls in mixers.find(name).__mro__ if issubclass(cls, mixers.Mixer)]
        sections = re.findall(r"^Args:\n((?:  .*\n?|\n)+)", "\n\n".join(docs), re.M)
        keys = re.findall(r"^  (\w[\w, ]*):", "\n".join(sections), re.M)
        assert {key.strip() for line in keys for key in line.split(",")} == set(mixers.defaults(name)), name

"""The table of mixers in docs/mixers.md is what the mixers say of themselves."""

import pathlib

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

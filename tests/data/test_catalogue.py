"""The table of tasks in docs/tasks.md is what the tasks say of themselves."""

import pathlib

from common import marks
from data import catalogue
from data import task as tasks


def test_page_is_current():
    """Run `python -m data.catalogue docs/tasks.md` after adding a task."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    table = catalogue.table()
    assert marks.insert(page, catalogue.NAME, table) == page
    for name in tasks.names():
        assert f"`{name}`" in table

"""The README's table of mixers is what the mixers say of themselves."""

import pathlib

from models import catalogue
from models import mixer as mixers


def test_readme_is_current():
    """Run `python -m models.catalogue README.md` after adding a mixer."""
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    assert catalogue.insert(readme) == readme
    for name in mixers.names():
        assert f"`{name}`" in catalogue.table()

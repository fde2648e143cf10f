"""How annotations are checked, see `tests/conftest.py`."""

from beartype import BeartypeConf, beartype

# An int is as good as a float (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

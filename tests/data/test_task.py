"""Finding and building tasks."""

import pytest

from common.errors import UserError
from data import task
from data.task import Spec


def test_every_task_is_found_and_has_defaults():
    assert "language_model" in task.names()
    for name in task.names():
        assert issubclass(task.find(name), task.Task)
        task.defaults(name)


def test_defaults_are_typed_and_complete(tmp_path):
    config = task.defaults("language_model")
    assert config.length == 256 and config.corpus == "shakespeare" and config.cache_dir is None
    with pytest.raises(TypeError):
        config.length = "long"
    with pytest.raises(TypeError):
        config.cache_dir = 3
    (tmp_path / "text").write_bytes(bytes(range(1, 256)) * 4)
    config.corpus, config.length = f"file:{tmp_path / 'text'}", 8
    assert task.create("language_model", **config).spec == Spec(256, None, 256, "causal_lm", 8, "byte")


def test_unknown_names_suggest_near_ones():
    with pytest.raises(ValueError, match=r"no task 'languge_model'; did you mean 'language_model'"):
        task.create("languge_model")
    with pytest.raises(ValueError, match=r"no hyperparameter 'lenght'; did you mean 'length'"):
        task.create("language_model", lenght=3)
    with pytest.raises(ValueError, match=r"no hyperparameter 'zzz'; choose one of cache_dir, corpus"):
        task.create("language_model", zzz=3)


def test_spec_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="exactly one"):
        Spec(None, None, 2, "causal_lm", 4)
    with pytest.raises(ValueError, match="did you mean 'causal_lm'"):
        Spec(2, None, 2, "casual_lm", 4)
    with pytest.raises(ValueError, match=r"length must be from 1 to .*, got 0"):
        Spec(2, None, 2, "causal_lm", 0)


def test_a_file_of_ones_own_is_a_task(tmp_path, monkeypatch):
    """By its path, from the current directory; what is not one is said."""
    (tmp_path / "own.py").write_text(
        "from data.task import Spec, Task\n\n\nclass Own(Task):\n    def __init__(self, length: int = 8):\n"
        "        self.name = 'own'\n        self.spec = Spec(4, None, 2, 'classification', length)\n"
    )
    (tmp_path / "none.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    assert task.full("own.py") == str(tmp_path / "own.py") and task.full("mqar") == "mqar"
    assert task.defaults("own.py").to_dict() == {"length": 8}
    assert task.find("own.py") is task.find(str(tmp_path / "own.py"))
    with pytest.raises(UserError, match=r"no hyperparameter 'lenght'.*length"):
        task.create("own.py", lenght=3)
    for name, message in {
        "nothing.py": "no file nothing.py",
        "none.py": r"none\.py must define one subclass of Task",
    }.items():
        with pytest.raises(UserError, match=message):
            task.find(name)

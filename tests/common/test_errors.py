"""Hints in messages, and the ranges of numbers."""

import pytest

from common.errors import UserError, check_choice, check_range, near

KEYS = ["learning_rate", "schedule", "warmup_steps", "name"]


@pytest.mark.parametrize(
    "given, hint",
    [
        ("lerning_rate", "did you mean 'learning_rate'?"),
        ("lr", "did you mean 'learning_rate'?"),  # the initials of its words
        ("warmup", "did you mean 'warmup_steps'?"),
        ("zzz", "choose one of learning_rate, schedule, warmup_steps, name"),
    ],
)
def test_near_names(given, hint):
    assert near(given, KEYS) == hint


def test_choices_and_ranges():
    check_choice("optimizer.name", "adam", ["adam", "sgd"])
    with pytest.raises(UserError, match=r"optimizer\.name='adm' is unknown; did you mean 'adam'"):
        check_choice("optimizer.name", "adm", ["adam", "sgd"])
    check_range("x", 1, 1)
    for value in (0.999, float("nan"), float("-inf")):
        with pytest.raises(UserError, match="x must be at least 1, got"):
            check_range("x", value, 1)
    with pytest.raises(UserError, match="x must be from 0 to 1, got 2"):
        check_range("x", 2, 0, 1)

"""Reconstruction: the target is the end of the input."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows


@pytest.mark.parametrize(("length", "window"), [(50, 7), (50, 50), (31, 1)])
def test_the_target_is_the_end_of_the_input(length, window):
    hippo = task.create("hippo_reconstruct", length=length, window=window)
    for split in hippo.splits:
        row = hippo.example(split, 2)
        np.testing.assert_array_equal(row["targets"], row["inputs"][-window:, 0])
        assert row["weights"] == 1


def test_rows():
    hippo = task.create("hippo_reconstruct")
    check_rows(hippo)
    assert hippo.spec.metric.name == "rmse" and hippo.spec.objective == "regression" and hippo.spec.targets == 64
    # Fourier transforms of other libraries may differ in the last bit.
    np.testing.assert_allclose(
        hippo.example("test", 2)["inputs"][[1, 10, 255], 0], [0.154676, -0.292794, -0.197664], rtol=1e-5
    )


def test_floors():
    hippo = task.create("hippo_reconstruct", length=40, window=10)
    rows = list(hippo.rows("valid"))
    inputs = np.stack([row["inputs"][:, 0] for row in rows]).astype(float)
    rmse = lambda guess: pytest.approx(np.sqrt(np.mean(np.square(guess - inputs[:, -10:]))), rel=1e-6)
    assert hippo.floors("valid") == {
        "zero": rmse(0),
        "last input": rmse(inputs[:, -1:]),
        "mean": rmse(inputs.mean(1, keepdims=True)),
    }


def test_bad_settings():
    for window in (0, 257):
        with pytest.raises(ValueError, match=f"window={window} must be at least 1 and at most length=256"):
            task.create("hippo_reconstruct", window=window)
    with pytest.raises(ValueError, match=r"cutoff=0.7 must be"):
        task.create("hippo_reconstruct", cutoff=0.7)

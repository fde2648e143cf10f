"""The delay line, and the band-limited noise that it delays."""

import numpy as np
import pytest

from data import signals, task
from tests.data.generated_rows import check_rows


@pytest.mark.parametrize(("length", "cutoff"), [(256, 0.25), (257, 0.1), (64, 0.5), (1000, 0.01)])
def test_noise_is_band_limited_and_has_its_power(length, cutoff):
    rng = np.random.default_rng(0)
    draws = np.stack([signals.white_noise(rng, length, cutoff) for _ in range(300)])
    assert draws.shape == (300, length) and (draws[:, 0] == 0).all()
    power = np.mean(np.square(np.abs(np.fft.rfft(draws))), 0)
    frequencies = np.fft.rfftfreq(length)
    if length % 2 == 0:  # an odd length is cut from a period that is one longer
        assert power[(frequencies > cutoff)].sum() < 1e-20 * power.sum()
    # White below the cutoff, and the root mean square of .5 about the mean.
    inside = power[(frequencies > 0.001) & (frequencies < 0.8 * cutoff)]
    assert inside.max() < 2 * inside.min()
    assert np.sqrt(np.mean(draws.var(1))) == pytest.approx(0.5, rel=0.04)
    assert np.sqrt(np.mean(np.square(draws[:, 1:]))) == pytest.approx(0.5**0.5, rel=0.1)


def test_the_target_is_the_input_of_before():
    hippo = task.create("hippo_delay", length=50, delay=7)
    for split in hippo.splits:
        row = hippo.example(split, 2)
        np.testing.assert_array_equal(row["targets"][7:], row["inputs"][:-7])
        assert (row["targets"][:7] == 0).all() and (row["weights"] == 1).all()


def test_several_lags():
    """The first is the only one of the task with one."""
    lags = task.create("hippo_delay", length=50, delay=12, num_lags=4)
    row, first = lags.row("test", 2, 0, 0), task.create("hippo_delay", length=50, delay=12).row("test", 2, 0, 0)
    np.testing.assert_array_equal(row["inputs"], first["inputs"])
    np.testing.assert_array_equal(row["targets"][:, :1], first["targets"])
    for lag in range(4):
        by = 12 * (lag + 1)
        np.testing.assert_array_equal(row["targets"][by:, lag], row["inputs"][:-by, 0])
        assert not row["targets"][:by, lag].any()
    guesses = [np.mean(np.square(one["targets"])) for one in lags.rows("valid")]
    assert lags.floors("valid")["zero"] == pytest.approx(np.sqrt(np.mean(guesses)))
    with pytest.raises(ValueError, match="num_lags=5 must be 1 to length=50 divided by delay=12, 4"):
        task.create("hippo_delay", length=50, delay=12, num_lags=5)


def test_rows():
    hippo = task.create("hippo_delay")
    check_rows(hippo)
    assert hippo.spec.metric.name == "rmse" and hippo.spec.objective == "token_regression"
    # Fourier transforms of other libraries may differ in the last bit.
    np.testing.assert_allclose(
        hippo.example("test", 2)["inputs"][[1, 10, 255], 0], [-0.263669, 0.184912, 0.369145], rtol=1e-5
    )


def test_floors():
    hippo = task.create("hippo_delay", length=40, delay=10)
    rows = list(hippo.rows("valid"))
    inputs, targets = (np.stack([row[key][:, 0] for row in rows]).astype(float) for key in ("inputs", "targets"))
    rmse = lambda guess: pytest.approx(np.sqrt(np.mean(np.square(guess - targets))), rel=1e-6)
    mean = np.array([[row[: t + 1].mean() if t >= 10 else 0 for t in range(40)] for row in inputs])
    assert hippo.floors("valid") == {"zero": rmse(0), "input": rmse(inputs), "mean so far": rmse(mean)}


def test_bad_settings():
    for delay in (0, 256):
        with pytest.raises(ValueError, match=f"delay={delay} must be at least 1 and less than length=256"):
            task.create("hippo_delay", delay=delay)
    for cutoff in (0.001, 0.6, 0.0):
        with pytest.raises(ValueError, match=r"cutoff=.* must be 1 / length=0.00391 to 0.5 cycles"):
            task.create("hippo_delay", cutoff=cutoff)

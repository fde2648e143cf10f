"""Series from files of each format, beside what was written into them."""

import numpy as np
import pytest

from common.errors import UserError
from data import task
from tests.data.classification_rows import check
from tests.data.small_data import write_series


def test_the_archives_format(tmp_path):
    (tmp_path / "S_TRAIN.ts").write_text(
        "#c\n@problemName S\n@timeStamps false\n@classLabel true b a\n@data\n" + "1,2,3:0,0,0:b\n3,?:2,2:a\n" * 10
    )
    (tmp_path / "S_TEST.ts").write_text("@data\n5,6,7,8:1,1,1,1:a\n")
    series = task.create("time_series", data_dir=str(tmp_path))
    assert (series.spec.length, series.spec.channels, series.spec.targets, series.spec.padded) == (4, 2, 2, True)
    assert [series.num_examples(split) for split in series.splits] == [18, 2, 1]
    # Of train without its held rows, 9 and 19: ten of the first kind and eight of the second.
    values = np.array([1, 2, 3] * 10 + [3] * 8)
    mean, std = values.mean(), values.std()
    other = np.array([0, 0, 0] * 10 + [2, 2] * 8)
    row = check(series, "valid", 0)
    np.testing.assert_allclose(row["inputs"][:2, 0], [(3 - mean) / std, 0], rtol=1e-5)
    np.testing.assert_allclose(row["inputs"][:2, 1], (2 - other.mean()) / other.std(), rtol=1e-5)
    assert row["targets"] == 0 and row["segment_ids"].tolist() == [1, 1, 0, 0]
    assert check(series, "test", 0)["targets"] == 0 and series.row("train", 0, 0, 0)["targets"] == 1
    assert set(series.floors()) == {"majority", "nearest class mean", "logistic regression"}


def test_arrays_of_numbers(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 7, 3)), rng.normal(3, 5, size=(40, 2))
    for split, part in (("train", slice(30)), ("valid", slice(30, 34)), ("test", slice(34, 40))):
        np.savez(tmp_path / f"{split}.npz", x=x[part], y=y[part])
    series = task.create("time_series", data_dir=str(tmp_path))
    assert series.spec.objective == "regression" and [series.num_examples(s) for s in series.splits] == [30, 4, 6]
    row = series.row("test", 2, 0, 0)
    mean, std = x[:30].reshape(-1, 3).mean(0), x[:30].reshape(-1, 3).std(0)
    np.testing.assert_allclose(row["inputs"], (x[36] - mean) / std, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(row["targets"], (y[36] - y[:30].mean(0)) / y[:30].std(0), rtol=1e-5)
    scaled = (y[34:] - y[:30].mean(0)) / y[:30].std(0)
    assert series.floors()["mean"] == pytest.approx(np.sqrt(np.mean(scaled**2)))
    np.savez(tmp_path / "test.npz", x=x[:3], y=np.array(["a", "b", "a"]))
    with pytest.raises(UserError, match="y of one file are classes and those of another numbers"):
        task.create("time_series", data_dir=str(tmp_path))


def test_lines(tmp_path):
    (tmp_path / "train.csv").write_text("1,0.5,1\n2,0,0\n" * 10)
    (tmp_path / "test.csv").write_text("2,3,4\n")
    series = task.create("time_series", data_dir=str(tmp_path))
    assert (series.spec.objective, series.spec.targets, series.spec.length) == ("classification", 2, 2)
    assert series.row("test", 0, 0, 0)["targets"] == 1
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf1,0.5,1\r\n2,0,0\r\n" * 1 + b"1,0,0\r\n" * 19)
    assert task.create("time_series", data_dir=str(tmp_path)).spec.targets == 2  # the mark of a spreadsheet is no label
    for train, test in (("1.5,0.5,1\n2,0,0\n", "2,3,4\n"), ("1,0.5,1\n2,0,0\n", "2e-1,3,4\n")):
        (tmp_path / "train.csv").write_text(train * 10)
        (tmp_path / "test.csv").write_text(test)
        assert task.create("time_series", data_dir=str(tmp_path)).spec.objective == "regression"


def test_labels_that_are_the_same_number(tmp_path):
    """+1 and 1 are one class; +1 and -1 by themselves keep their order."""
    for lines, classes in (("+1,5\n1,6\n2,7\n", [0, 0, 1]), ("+1,5\n-1,6\n", [0, 1])):
        for name in ("train", "test"):
            (tmp_path / f"{name}.csv").write_text(lines * 10)
        series = task.create("time_series", data_dir=str(tmp_path))
        assert series.spec.objective == "classification"
        assert [int(series.row("test", i, 0, 0)["targets"]) for i in range(len(classes))] == classes


@pytest.mark.parametrize("space", [" ", "\t", "  "])
def test_a_heading_of_numbers_may_have_any_space(tmp_path, space):
    for split in ("TRAIN", "TEST"):
        (tmp_path / f"S_{split}.ts").write_text(f"@targetLabel{space}true\n@data\n" + "1,2,3:0.5\n4,3,2:1.5\n" * 10)
    assert task.create("time_series", data_dir=str(tmp_path)).spec.objective == "regression"


@pytest.mark.filterwarnings("error")
def test_a_channel_without_a_value_is_nought(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 5, 2))
    held = x.copy()
    x[..., 1] = np.nan
    for split, part in (("train", x), ("test", held)):
        np.savez(tmp_path / f"{split}.npz", x=part, y=np.arange(20) % 2)
    series = task.create("time_series", data_dir=str(tmp_path))
    train = x[np.arange(20) % 10 != 9][..., 0]
    for split, i in (("train", 3), ("test", 4)):
        row = series.row(split, i, 0, 0)["inputs"]
        np.testing.assert_allclose(row[:, 0], (held[i, :, 0] - train.mean()) / train.std(), rtol=1e-5)
        assert not row[:, 1].any()


X, Y = np.ones((20, 3)), np.ones(20)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"x": np.where(np.eye(20, 3) > 0, np.inf, 0), "y": Y}, "value that is infinite"),
        ({"x": np.where(np.eye(20, 3) > 0, 1e200, 0), "y": Y}, r"beyond 1e\+150"),
        ({"x": X, "y": Y * np.nan}, "to be predicted in train is none"),
        ({"x": X, "y": np.ones((20, 2))}, "other numbers than"),
        ({"x": X[:, :0], "y": Y}, r"x \(20, 0\) and y \(20,\) are not"),
        ({"x": X, "y": np.float64(3)}, r"y \(\) are not"),
        ({"x": X[:0], "y": Y[:0]}, "train has no series"),
        ({"x": X * 1j, "y": Y}, "x is an array of complex128"),
        (None, "holds no arrays x and y"),
    ],
)
def test_arrays_that_are_none(train, message, tmp_path):
    np.savez(tmp_path / "test.npz", x=X, y=Y)
    if train is None:
        (tmp_path / "train.npz").write_bytes((tmp_path / "test.npz").read_bytes()[:200])
    else:
        np.savez(tmp_path / "train.npz", **train)
    with pytest.raises(UserError, match=message):
        task.create("time_series", data_dir=str(tmp_path))


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"holds no NAME_TRAIN\.ts, train\.npz or train\.csv"):
        task.create("time_series", data_dir=str(tmp_path))
    write_series(tmp_path)
    path = tmp_path / "Small_TEST.ts"
    path.write_text("@data\n1,2:3:a\n")
    with pytest.raises(UserError, match=r"Small_TEST.ts, line 2, is no series"):
        task.create("time_series", data_dir=str(tmp_path))
    path.write_text("@classLabel false\n@data\n1,2:3,4\n")
    with pytest.raises(UserError, match="has no labels"):
        task.create("time_series", data_dir=str(tmp_path))
    path.write_text("@targetLabel true\n@data\n1,2:3,4:5\n")
    with pytest.raises(UserError, match="are classes and those of another numbers"):
        task.create("time_series", data_dir=str(tmp_path))
    path.write_text("@timeStamps true\n@data\n")
    with pytest.raises(UserError, match="has times of its own"):
        task.create("time_series", data_dir=str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=r"holds 0 files \*_TEST.ts"):
        task.create("time_series", data_dir=str(tmp_path))

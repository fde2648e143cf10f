"""Windows of a table, beside its numbers."""

import numpy as np
import pytest

from common.errors import UserError
from data import task

HEAD = "date,x,OT\n"


def table(path, values):
    path.write_text(HEAD + "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(values)))


@pytest.mark.parametrize(
    ("name", "ends"), [("own.csv", (14_000, 16_000, 20_000)), ("ETTh1.csv", (8640, 11_520, 14_400))]
)
def test_windows(name, ends, tmp_path):
    values = np.random.default_rng(0).normal(size=(20_000, 2)).cumsum(0).round(3)
    table(tmp_path / name, values)
    ahead = task.create("forecasting", data_dir=str(tmp_path), length=10, horizon=4)
    scaled = (values - values[: ends[0]].mean(0)) / values[: ends[0]].std(0)
    begins = {"train": 0, "valid": ends[0] - 10, "test": ends[1] - 10}
    for (split, begin), end in zip(begins.items(), ends, strict=True):
        count = ahead.num_examples(split)
        assert begin + count - 1 + 14 == end
        for i in (0, count - 1):
            row = ahead.row(split, i, 0, 0)
            np.testing.assert_allclose(row["inputs"], scaled[begin + i : begin + i + 10], atol=1e-5)
            np.testing.assert_allclose(row["targets"].reshape(4, 2), scaled[begin + i + 10 : begin + i + 14], atol=1e-5)
    assert [metric.name for metric in ahead.spec.metrics] == ["mse", "mae"]
    only = task.create("forecasting", data_dir=str(tmp_path), length=10, horizon=4, column="OT")
    np.testing.assert_allclose(only.row("test", 3, 0, 0)["inputs"], ahead.row("test", 3, 0, 0)["inputs"][:, 1:])


def test_floors(tmp_path):
    from sklearn.linear_model import Ridge

    table(tmp_path / "a.csv", np.random.default_rng(1).normal(size=(300, 2)))
    ahead = task.create("forecasting", data_dir=str(tmp_path), length=5, horizon=7)
    rows = [ahead.row("test", i, 0, 0) for i in range(ahead.num_examples("test"))]
    truth = np.stack([row["targets"].reshape(7, 2) for row in rows])
    last = np.stack([row["inputs"][-1:] for row in rows])
    again = np.stack([row["inputs"][[0, 1, 2, 3, 4, 0, 1]] for row in rows])  # a "day" is at most the input
    expected = [np.mean(np.square(truth - guess)) for guess in (0, last, again)]
    floors = ahead.floors()
    np.testing.assert_allclose(list(floors.values())[:3], expected, rtol=1e-5)
    # The linear map by scikit-learn, of each window of each column.
    examples = []
    for split in ("train", "test"):
        rows = [ahead.row(split, i, 0, 0) for i in range(ahead.num_examples(split))]
        x, y = (np.stack([r[key].reshape(-1, 2) for r in rows]) for key in ("inputs", "targets"))
        examples.append([np.moveaxis(part - x[:, -1:], 1, 2).reshape(-1, part.shape[1]) for part in (x, y)])
    (x, y), (held, truth) = examples
    error = np.mean(np.square(Ridge(1e-3).fit(x, y).predict(held) - truth))
    assert list(floors)[3] == "linear" and floors["linear"] == pytest.approx(error, rel=1e-3)


def test_what_is_no_table(tmp_path):
    create = lambda **options: task.create("forecasting", data_dir=str(tmp_path), **options)
    with pytest.raises(UserError, match="holds 0"):
        create()
    table(tmp_path / "a.csv", np.zeros((50, 2)))
    with pytest.raises(
        UserError, match=r"has 50 rows, of which train, valid and test end at 35, 40, 50: too few for length=96"
    ):
        create()
    with pytest.raises(UserError, match="has no column 'y'; there are x, OT"):
        create(column="y", length=2, horizon=1)
    with pytest.raises(UserError, match=r"there is no file .*b\.csv; the folder has a\.csv"):
        create(file="b.csv")
    (tmp_path / "a.csv").write_text("2016-07-01,1,-2.5\n2016-07-02,3,4\n")
    with pytest.raises(UserError, match="no heading but numbers"):
        create()
    (tmp_path / "a.csv").write_text(HEAD + "1,2,three\n")
    with pytest.raises(UserError, match="holds something else than numbers"):
        create()
    for text, message in (
        (HEAD.replace(",", ";") + "1;2;3\n", "has one column in its first line: give a heading, with commas between"),
        ("", "has one column in its first line"),
        (HEAD, "has a heading and no rows below it"),
        (HEAD + "1,2,nan\n", "has values that are no finite numbers"),
    ):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            create()

"""Fashion-MNIST from made-up IDX files, packed and not, and from a mocked TFDS data set."""

import gzip

import numpy as np
import pytest

from common.errors import UserError
from data import task
from tests.data.classification_rows import check
from tests.data.small_data import clothes, idx


@pytest.fixture
def made():
    return clothes()


@pytest.fixture(params=["raw", "gz"])
def folder(request, made, tmp_path):
    """The files in a folder."""
    for name, array in made.items():
        if request.param == "raw":
            (tmp_path / name).write_bytes(idx(array))
        else:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_rows_are_the_images(folder, made):
    fashion = task.create("fashion_mnist_pixels", data_dir=str(folder))
    assert [fashion.num_examples(split) for split in fashion.splits] == [54, 6, 20]
    for split, name, start in (("train", "train", 0), ("valid", "train", 54), ("test", "t10k", 0)):
        for i in (0, 5):
            check(fashion, split, i)
            row = fashion.row(split, i, 0, 0)
            expected = (made[f"{name}-images-idx3-ubyte"][start + i].reshape(-1, 1) - 72.94) / 90.02
            np.testing.assert_allclose(row["inputs"], expected, atol=1e-6)
            assert row["targets"] == made[f"{name}-labels-idx1-ubyte"][start + i]
    assert fashion.floors()["majority"] == 0.1


def test_corrupt_and_missing_files(folder, made):
    suffix = next(folder.iterdir()).suffix
    path = folder / f"train-images-idx3-ubyte{suffix}"
    whole = path.read_bytes()
    for content in (whole[:-1], b"", b"\1" + whole, whole[:3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte(\.gz)? is corrupt"):
            task.create("fashion_mnist_pixels", data_dir=str(folder))
    few = idx(made["train-images-idx3-ubyte"][:7])
    path.write_bytes(gzip.compress(few) if suffix else few)
    with pytest.raises(ValueError, match="fetch the files again"):
        task.create("fashion_mnist_pixels", data_dir=str(folder))
    path.unlink()
    with pytest.raises(UserError, match="train-images-idx3-ubyte is missing, and so is"):
        task.create("fashion_mnist_pixels", data_dir=str(folder))


def test_tfds_is_read_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=20):
        fashion = task.create("fashion_mnist_pixels", data_dir=str(tmp_path))
    assert [fashion.num_examples(split) for split in fashion.splits] == [18, 2, 20]
    check(fashion, "train", 3)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"'fashion_mnist' has no prepared split .*dataset-fashion-mnist"):
        task.create("fashion_mnist_pixels", data_dir=str(tmp_path))

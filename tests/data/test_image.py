"""Grey CIFAR-10 from a made-up archive and from a mocked TFDS data set."""

import hashlib
import pickle

import numpy as np
import pytest

from common.errors import UserError
from data import images, lra, task
from tests.data.classification_rows import check, digest
from tests.data.small_data import write_cifar


@pytest.fixture
def archive(tmp_path):
    """A folder with six batches of 20 made-up images, and the images and labels in order."""
    pixels, labels = write_cifar(tmp_path)
    return tmp_path, pixels, labels


def grey_of(image):
    """Levels of one image [3, 32, 32], pixel by pixel and row by row."""
    return [
        int(0.5 + 0.299 * int(r) + 0.587 * int(g) + 0.114 * int(b))
        for r, g, b in zip(*(plane.reshape(-1) for plane in image), strict=True)
    ]


@pytest.mark.parametrize("protocol", ["lra", "s4"])
def test_rows_of_the_archive(archive, protocol):
    folder, pixels, labels = archive
    image = task.create("image", protocol=protocol, data_dir=str(folder))
    assert image.name == f"image/{protocol}"
    assert [image.num_examples(split) for split in image.splits] == [90, 10, 20]
    rows = [check(image, "test", i) for i in range(20)]
    for i in range(3):
        expected = np.array(grey_of(pixels[100 + i]))
        read = rows[i]["inputs"] if protocol == "lra" else rows[i]["inputs"][:, 0] * 61 + 122.6
        # Levels that lie half-way between two may be rounded either way by the float arithmetic above.
        assert np.abs(read - expected).max() < 1.001 and (np.abs(read - expected) > 0.5).mean() < 0.01
        assert rows[i]["targets"] == labels[100 + i]
    held = {digest(image.row("valid", i, 0, 0)) for i in range(10)}
    assert len(held | {digest(image.row("train", i, 0, 0)) for i in range(90)}) == 100


def test_valid_follows_the_protocol(archive):
    folder, _, labels = archive
    lra_task = task.create("image", data_dir=str(folder))
    assert [lra_task.row("valid", i, 0, 0)["targets"] for i in range(10)] == labels[90:100].tolist()
    s4_task = task.create("image", protocol="s4", data_dir=str(folder))
    order = lra.torch_permutation(100, 42)
    assert [s4_task.row("valid", i, 0, 0)["targets"] for i in range(10)] == labels[order[90:]].tolist()


def test_permutations_are_those_of_torch():
    # torch.randperm(10, generator=torch.Generator().manual_seed(seed)) for the seeds 0 and 42.
    assert lra.torch_permutation(10, 0).tolist() == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
    assert lra.torch_permutation(10, 42).tolist() == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    torch = pytest.importorskip("torch")
    expected = torch.randperm(50_000, generator=torch.Generator().manual_seed(42))
    np.testing.assert_array_equal(lra.torch_permutation(50_000, 42), expected.numpy())


def test_grey_is_the_rounded_luma():
    rgb = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], np.uint8)
    assert images.grey(rgb).tolist() == [0, 255, 76, 150, 29, 18]


def test_floors_by_a_plain_loop(archive):
    image = task.create("image", data_dir=str(archive[0]))
    rows = {s: [image.row(s, i, 0, 0) for i in range(image.num_examples(s))] for s in ("train", "test")}
    means = {c: np.mean([r["inputs"] for r in rows["train"] if r["targets"] == c], 0) for c in range(10)}
    right = [min(means, key=lambda c: ((r["inputs"] - means[c]) ** 2).sum()) == r["targets"] for r in rows["test"]]
    floors = image.floors("test")
    assert 0 <= floors.pop("logistic regression") <= 1
    assert floors == pytest.approx({"majority": 0.1, "nearest class mean": np.mean(right)})


def test_the_fingerprint_covers_all_images(archive):
    folder, _, _ = archive
    before = task.create("image", data_dir=str(folder)).fingerprint()
    assert len(before) == len(hashlib.sha256().hexdigest())
    path = folder / "cifar-10-batches-bin" / "data_batch_4.bin"
    content = bytearray(path.read_bytes())
    content[1] ^= 128
    path.write_bytes(content)
    assert task.create("image", data_dir=str(folder)).fingerprint() != before


def test_tfds_is_read_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=20):
        image = task.create("image", data_dir=str(tmp_path))
    assert [image.num_examples(split) for split in image.splits] == [18, 2, 20]
    for split in image.splits:
        check(image, split, 1)


def test_colour(archive):
    """Each channel less its mean and by its deviation, of the same images as in grey."""
    folder, pixels, labels = archive
    colour = task.create("image", protocol="s4", channels="rgb", data_dir=str(folder))
    assert colour.name == "image/s4/rgb" and colour.spec.channels == 3
    row = check(colour, "test", 4)
    expected = (pixels[104].reshape(3, -1).T / 255 - [0.4914, 0.4822, 0.4465]) / [0.247, 0.243, 0.261]
    np.testing.assert_allclose(row["inputs"], expected, atol=1e-5)
    assert row["targets"] == labels[104]
    with pytest.raises(UserError, match="channels='rgb' is three real channels: it needs protocol='s4'"):
        task.create("image", channels="rgb", data_dir=str(folder))


def test_the_archive_for_python(archive, tmp_path_factory):
    """The same rows; and a pickle that would call something is refused."""
    folder, pixels, labels = archive
    other = tmp_path_factory.mktemp("python") / "cifar-10-batches-py"
    other.mkdir()
    for batch, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(20 * batch, 20 * batch + 20)
        content = {b"data": pixels[part].reshape(20, -1), b"labels": labels[part].tolist(), b"batch_label": b"x"}
        (other / name).write_bytes(pickle.dumps(content, protocol=2))
    for options in ({}, {"protocol": "s4", "channels": "rgb"}):
        first, second = (task.create("image", data_dir=str(root), **options) for root in (folder, other.parent))
        assert first.fingerprint() == second.fingerprint()
    (other / "test_batch").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(UserError, match=r"test_batch is corrupt \(it holds builtins.print\)"):
        task.create("image", data_dir=str(other.parent))


def test_missing_and_corrupt_data(archive, tmp_path):
    folder, _, _ = archive
    path = folder / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test_batch.bin is corrupt"):
        task.create("image", data_dir=str(folder))
    path.unlink()
    with pytest.raises(UserError, match=r"test_batch.bin is missing: unpack https://www.cs.toronto.edu"):
        task.create("image", data_dir=str(folder))
    with pytest.raises(UserError, match=r"TFDS 'cifar10' has no prepared split 'train' in .*Or unpack https://"):
        task.create("image", data_dir=str(tmp_path / "nothing"))

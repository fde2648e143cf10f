"""Pathfinder: the geometry of generated images, what their pixels give away, and the released archive's format."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from common.errors import UserError
from data import lra, pathfinder, task
from tests.data.classification_rows import check, digest

ROOT = pathlib.Path(__file__).parents[2]
HARD = "curv_contour_length_14"


@pytest.mark.parametrize(
    "split,index,options,expected",
    [
        ("train", 0, {}, "709508ab3a30ad5a"),
        ("valid", 0, {}, "41a16fa67a1399aa"),
        ("test", 1, {}, "bdf5782cc0ba1f80"),
        ("train", 0, {"protocol": "s4"}, "e7bd61aa9791f340"),
        ("test", 0, {"side": 256}, "226f856f657ab931"),
        ("test", 0, {"side": 64, "difficulty": "easy"}, "6459027b43f8a88b"),
        ("test", 0, {"difficulty": "intermediate"}, "59e11dcb333467ce"),
    ],
)
def test_rows_never_change(tmp_path, split, index, options, expected):
    """Neither as they are drawn nor as they are read again."""
    for _ in range(2):
        images = task.create("pathfinder", cache_dir=str(tmp_path), **options)
        assert digest(images.row(split, index, 4, 2)) == expected


def test_an_image_is_drawn_once_for_all_processes(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "data.pathfinder", "--rows=3", "--processes=2", f"--cache_dir={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0 and "9 of 9 images" in ended.stdout, ended.stderr
    (folder,) = (tmp_path / "drawn").iterdir()
    images, draw = task.create("pathfinder", cache_dir=str(tmp_path)), pathfinder.draw
    drawn = []
    monkeypatch.setattr(pathfinder, "draw", lambda *args: drawn.append(args) or draw(*args))
    pixels, label = images.pixels("valid", 2)
    expected = draw(pathfinder.PARAMETERS[32], np.random.default_rng([1, 2]))
    np.testing.assert_array_equal(pixels, expected[0].reshape(-1))
    assert label == expected[1] and not drawn
    images.pixels("valid", 5)
    images.pixels("valid", 5)
    assert len(drawn) == 1
    # What a crash has left half written, or a disk has spoilt, is drawn again.
    content = bytearray((folder / "valid").read_bytes())
    content[2 * (32 * 32 + 1 + 4) + 500] ^= 1
    (folder / "valid").write_bytes(content)
    np.testing.assert_array_equal(task.create("pathfinder", cache_dir=str(tmp_path)).pixels("valid", 2)[0], pixels)
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("side", "difficulty"), [(32, "hard"), (32, "easy"), (64, "intermediate"), (128, "hard"), (256, "hard")]
)
def test_contours_have_the_published_geometry(side, difficulty):
    p, rng = pathfinder.parameters_of(side, difficulty), np.random.default_rng(side)
    assert pathfinder.parameters_of(side, "hard") == pathfinder.PARAMETERS[side]
    for _ in range(2):
        targets, distractors = pathfinder.contours(p, rng)
        assert targets.shape == (2, pathfinder.DASHES[difficulty], 2) and len(distractors) <= p.num_distractors
        np.testing.assert_allclose(abs(targets[0, 0, 0] - targets[1, 0, 0]), p.seed_distance)
        first = targets[0, 0, 0]
        assert 2 * p.seed_distance <= min(first.real, first.imag, p.side - first.real, p.side - first.imag)
        contours = [*targets, *distractors]
        margin = next(m for m in p.margins if joins(targets[0], m, p.dash_length))
        for contour in contours:
            np.testing.assert_allclose(abs(contour[:, 1] - contour[:, 0]), p.dash_length)
            assert joins(contour, margin, p.dash_length)
            turns = np.angle(np.diff(contour, axis=1)[1:] / np.diff(contour, axis=1)[:-1])
            assert abs(turns).max() <= np.pi / 2 / p.continuity
            inside = p.padding + margin - 1e-9
            assert min(contour.real.min(), contour.imag.min()) >= inside
            assert max(contour.real.max(), contour.imag.max()) <= side - inside
        dashes = [(c, i, dash) for c, contour in enumerate(contours) for i, dash in enumerate(contour)]
        for c, i, a in dashes:
            for d, j, b in dashes:
                if (c, i) < (d, j) and (c != d or j > i + 1):
                    assert dense_distance(a, b) >= p.thickness + 2 * margin - 1e-9


def joins(contour, margin, length):
    """Whether the next dash begins `margin` beyond the point that lies `margin` beyond the last one's end."""
    unit = (contour[:, 1] - contour[:, 0]) / length
    return np.allclose(contour[:-1, 1] + margin * (unit[:-1] + unit[1:]), contour[1:, 0])


def dense_distance(a, b):
    """Least distance between 21 points of each of two dashes: the true one or a little more."""
    share = np.linspace(0, 1, 21)
    return abs((a[0] + share * (a[1] - a[0]))[:, None] - (b[0] + share * (b[1] - b[0]))).min()


def test_labels_say_which_contours_the_discs_are_on(monkeypatch):
    contours, drawn = pathfinder.contours, []
    monkeypatch.setattr(pathfinder, "contours", lambda *args: drawn.append(contours(*args)) or drawn[-1])
    p = pathfinder.PARAMETERS[32]
    labels = []
    for i in range(12):
        image, label = pathfinder.draw(p, np.random.default_rng([9, i]))
        labels.append(label)
        targets = drawn[-1][0]
        # Dashes of this size are half as bright as discs.
        at = lambda point, image=image: image[int(point.real), int(point.imag)] > 200
        starts, ends = [at(t[0, 0]) for t in targets], [at(t[-1, 1]) for t in targets]
        # A disc may cover another end too, but one pair of ends is as the label says.
        pairs = [(a, b) for a in (0, 1) for b in (0, 1) if starts[a] and ends[b]]
        assert any((a == b) == label for a, b in pairs)
    assert set(labels) == {0, 1}


def test_rows_follow_the_protocol(tmp_path):
    ids, real = (task.create("pathfinder", protocol=protocol, cache_dir=str(tmp_path)) for protocol in ("lra", "s4"))
    for split in ids.splits:
        row, float_row = check(ids, split, 2), check(real, split, 2)
        np.testing.assert_allclose(float_row["inputs"][:, 0] * 255, row["inputs"], atol=1e-4)
        assert row["inputs"].max() == 255 and (row["inputs"] == 0).mean() > 0.5
    assert ids.floors() == {"chance": 0.5} and ids.name == "pathfinder32/lra/generated"
    rows = [digest(ids.row(split, i, 0, 0)) for split in ids.splits for i in range(3)]
    assert len(set(rows)) == 9
    again = task.create("pathfinder", cache_dir=str(tmp_path / "other"))
    assert ids.fingerprint() == again.fingerprint() != real.fingerprint()


@pytest.fixture
def archive(tmp_path):
    """A released archive of 30 images in 3 lists, whose outer copy is spoilt; and the images and labels in order."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (30, 32, 32)).astype(np.uint8), rng.integers(0, 2, 30)
    (tmp_path / "lra_release" / "pathfinder32" / HARD).mkdir(parents=True)
    folder = tmp_path / "lra_release" / "lra_release" / "pathfinder32" / HARD
    (folder / "metadata").mkdir(parents=True)
    for batch, name in enumerate((2, 9, 10)):
        (folder / "imgs" / str(name)).mkdir(parents=True)
        lines = []
        for i in range(10):
            image.fromarray(pixels[10 * batch + i]).save(folder / "imgs" / str(name) / f"sample_{i}.png")
            lines.append(f"imgs/{name} sample_{i}.png {i} {labels[10 * batch + i]} 1.0 14 4 2 0.5 1 1\n")
        (folder / "metadata" / f"{name}.npy").write_text("".join(lines))
    return tmp_path, folder, pixels, labels


def test_the_archive_in_the_published_order(archive):
    root, _, pixels, labels = archive
    released = task.create("pathfinder", source="archive", data_dir=str(root))
    assert released.name == "pathfinder32/lra/archive"
    assert [released.num_examples(split) for split in released.splits] == [24, 3, 3]
    order = lra.torch_permutation(30, 42)
    for split, start, size in (("train", 0, 24), ("valid", 24, 3), ("test", 27, 3)):
        for i in range(size):
            row = released.row(split, i, 0, 0)
            np.testing.assert_array_equal(row["inputs"], pixels[order[start + i]].reshape(-1))
            assert row["targets"] == labels[order[start + i]]
        check(released, split, 1)
    most = np.bincount(labels[order[:24]]).argmax()
    assert released.floors("test")["majority"] == pytest.approx(np.mean(labels[order[27:]] == most))


def test_empty_images_are_left_out_and_named(archive, capsys):
    root, folder, pixels, labels = archive
    (folder / "imgs" / "9" / "sample_3.png").write_bytes(b"")
    released = task.create("pathfinder", source="archive", data_dir=str(root))
    assert "1 images are empty and left out: imgs/9/sample_3.png" in capsys.readouterr().out
    assert [released.num_examples(split) for split in released.splits] == [25, 2, 2]
    kept = np.delete(np.arange(30), 13)[lra.torch_permutation(29, 42)]
    for i in range(25):
        row = released.row("train", i, 0, 0)
        np.testing.assert_array_equal(row["inputs"], pixels[kept[i]].reshape(-1))
        assert row["targets"] == labels[kept[i]]


def test_lists_as_the_generator_writes_them_now(archive):
    """Arrays of texts in place of texts: the same images in the same order."""
    root, folder, _, _ = archive
    make = lambda: task.create("pathfinder", source="archive", data_dir=str(root))
    before = make()
    for path in (folder / "metadata").iterdir():
        table = np.array([line.split() for line in path.read_text().splitlines()])
        with open(path, "wb") as file:
            np.save(file, table)
    for i in (0, 23):
        np.testing.assert_array_equal(make().row("train", i, 0, 0)["inputs"], before.row("train", i, 0, 0)["inputs"])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="is no array of texts"):
        make()


def test_missing_and_corrupt_files(archive):
    root, folder, _, _ = archive
    make = lambda: task.create("pathfinder", source="archive", data_dir=str(root))
    released = make()
    for path in folder.glob("imgs/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"sample_\d.png cannot be read as an image"):
        released.row("test", 0, 0, 0)
    (folder / "metadata" / "9.npy").write_text("imgs/9 sample_0.png 0 yes\n")
    with pytest.raises(ValueError, match=r"9.npy, line 1: it should hold"):
        make()
    for path in (folder / "metadata").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"metadata holds no lists of images .*: unpack https://"):
        make()
    with pytest.raises(UserError, match=rf"pathfinder128/{HARD} is missing: fetch https://"):
        task.create("pathfinder", source="archive", side=128, data_dir=str(root))


def test_bad_options():
    with pytest.raises(ValueError, match="side=48 must be one of 32, 64, 128, 256"):
        task.create("pathfinder", side=48)
    with pytest.raises(ValueError, match="difficulty='harder' is unknown; did you mean 'hard'"):
        task.create("pathfinder", difficulty="harder")
    with pytest.raises(ValueError, match="source='archives' is unknown; did you mean 'archive'"):
        task.create("pathfinder", source="archives")
    with pytest.raises(ValueError, match="source='archive' needs the folder lra_release"):
        task.create("pathfinder", source="archive")
    with pytest.raises(ValueError, match="source='generated' reads none"):
        task.create("pathfinder", data_dir="somewhere")

"""Flip-flop: each read is the last written bit, by a plain loop; the settings by their frequencies."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest, scored


@pytest.mark.parametrize("length", [4, 64, 130])
@pytest.mark.parametrize("p_ignore", [0.0, 0.8, 1.0])
def test_reads_are_the_last_written_bit(length, p_ignore):
    flip = task.create("flip_flop", length=length, p_ignore=p_ignore)
    for i in range(30):
        row = flip.example("train", i)
        stored, expected = None, {}
        inputs = row["inputs"].tolist()
        for t, (instruction, bit) in enumerate(zip(inputs[::2], inputs[1::2], strict=True)):
            assert instruction in (2, 3, 4) and bit in (0, 1)
            if instruction == 2:
                stored = bit
            if instruction == 3:
                assert bit == stored
                expected[2 * t] = bit
        assert inputs[0] == 2 and inputs[-2] == 3
        assert scored(row) == expected


@pytest.mark.parametrize(("test", "p", "rows"), [("same", 0.8, 4_000), ("sparse", 0.98, 16_000), ("dense", 0.1, 4_000)])
def test_settings(test, p, rows):
    flip = task.create("flip_flop", length=128, test=test)
    assert flip.num_examples("test") == rows and flip.num_examples("valid") == 1_000
    for split, share in (("train", 0.8), ("valid", 0.8), ("test", p)):
        instructions = np.concatenate([flip.row(split, i, 0, 0)["inputs"][2:-2:2] for i in range(200)])
        expected = [(1 - share) / 2, (1 - share) / 2, share]
        np.testing.assert_allclose(np.bincount(instructions, minlength=5)[2:] / len(instructions), expected, atol=0.02)


def test_rows():
    check_rows(task.create("flip_flop"))
    assert digest(task.create("flip_flop")) == "43f48c77f79fc400"
    assert digest(task.create("flip_flop", test="dense", length=20)) == "b81d8751f8e08fe7"


def test_floors():
    flip = task.create("flip_flop", length=16, p_ignore=0.3)
    right = [bit == row["inputs"][t - 1] for row in flip.rows("valid") for t, bit in scored(row).items()]
    assert flip.floors("valid") == {"chance": 0.5, "last bit": pytest.approx(np.mean(right))}


def test_bad_settings():
    for length in (2, 7):
        with pytest.raises(ValueError, match=f"length={length} must be even and at least 4"):
            task.create("flip_flop", length=length)
    with pytest.raises(ValueError, match=r"p_ignore=1\.5 must be a probability"):
        task.create("flip_flop", p_ignore=1.5)
    with pytest.raises(ValueError, match="test='spares' is unknown; did you mean 'sparse'"):
        task.create("flip_flop", test="spares")

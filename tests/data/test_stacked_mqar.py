"""Keys and values side by side, by the memory that sums their outer products."""

import numpy as np
import pytest

from common.errors import UserError
from data import task
from tests.data.generated_rows import check_rows, digest, scored


def test_an_outer_product_memory_answers():
    """Solved for its keys, the memory of the row gives the value's vector, and rows with one label share that vector."""
    made = task.create("stacked_mqar", num_kv_pairs=8, num_passes=3, vector_size=16)
    vectors = {}
    for i in range(50):
        row = made.example("train", i)
        shown, asked = row["inputs"][:24].reshape(24, 2, 16), row["inputs"][24:].reshape(8, 2, 16)
        passes = shown.reshape(3, 8, 32)
        assert not np.array_equal(passes[0], passes[1])
        for one in passes[1:]:
            assert {pair.tobytes() for pair in one} == {pair.tobytes() for pair in passes[0]}
        memory = np.linalg.lstsq(shown[:, 0], shown[:, 1])[0]
        assert not asked[:, 1].any() and list(scored(row)) == [*range(24, 32)]
        for (key, _), label in zip(asked, scored(row).values(), strict=True):
            vectors.setdefault(label, key @ memory)
            np.testing.assert_allclose(key @ memory, vectors[label], atol=1e-3)
    assert len(vectors) == 64


def test_rows():
    made = task.create("stacked_mqar")
    check_rows(made)
    assert digest(made) == "1eb40d74192b5876"
    assert made.floors("valid") == {"chance": 1 / 64, "a value of the row": 1 / 16}


def test_bad_sizes():
    for options, message in (
        ({"num_kv_pairs": 0}, "num_kv_pairs must be from 1 to 65536, got 0"),
        ({"vector_size": 0}, "vector_size must be from 1 to 65536, got 0"),
        ({"vocab_size": 2**16, "vector_size": 2**16}, r"vectors of vector_size=65536 hold 4,294,967,296 numbers, and"),
        (
            {"num_passes": 2**16, "vector_size": 2**10},
            r"num_kv_pairs=16, 65537 times \(num_passes=65536\), .* holds 2,147,516,416 numbers, and 134,217,728 are the most",
        ),
        ({"vocab_size": 31}, "vocab_size=31 must be even and at least 2"),
        ({"vocab_size": 30}, "vocab_size=30 must be even and at least 2 . num_kv_pairs=32"),
    ):
        with pytest.raises(UserError, match=message):
            task.create("stacked_mqar", **options)

"""MNIST from made-up IDX files, in its three orders."""

import numpy as np
import pytest

from data import lra, task
from data.tasks.mnist_pixels import ORDERS
from tests.data.classification_rows import check
from tests.data.small_data import clothes, write_clothes


def test_orders():
    """Bit reversal by its other definition: the even places first, each half in the same way."""

    def halves(places):
        return places if len(places) == 1 else halves(places[::2]) + halves(places[1::2])

    assert ORDERS["bit_reversal"].tolist() == [place for place in halves(list(range(1024))) if place < 784]
    assert sorted(ORDERS["permuted"]) == list(range(784))
    # The beginning of what numpy.random.RandomState(92916).permutation(784) gives, of which papers speak.
    assert ORDERS["permuted"][:4].tolist() == [319, 576, 323, 107]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_the_images(order, tmp_path):
    write_clothes(tmp_path)
    made, digits = clothes(), task.create("mnist_pixels", order=order, data_dir=str(tmp_path))
    assert digits.name == f"mnist_pixels/{order}" and [digits.num_examples(s) for s in digits.splits] == [54, 6, 20]
    chosen = lra.torch_permutation(60, 42)
    for split, name, first in (("train", "train", chosen[0]), ("valid", "train", chosen[54]), ("test", "t10k", 0)):
        row = check(digits, split, 0) if split == "test" else digits.row(split, 0, 0, 0)
        image = made[f"{name}-images-idx3-ubyte"][first].reshape(-1) / 255
        np.testing.assert_allclose(row["inputs"][:, 0], image[ORDERS[order]], atol=1e-6)
        assert row["targets"] == made[f"{name}-labels-idx1-ubyte"][first]

"""What a token costs does not grow with the length, by the compiled program: a loop that copies what is as long as the sequence
is found here, whatever the clock says.
"""

import pytest

from benchmarks import lengths
from compilation.hlo import Program
from compilation.moved import moved
from models import mixer as mixers

FIRST = (
    "local_attention"  # one of the blockwise softmax, whose statistics XLA once copied whole for each pair of blocks
)


def linear():
    """The names of the causal mixers whose cost of a token is said not to depend on the length."""
    classes = {name: mixers.find(name) for name in mixers.names()}
    growing = ("T^2", "log T", "T /")
    return [name for name, cls in classes.items() if cls.causal and not any(term in cls.complexity for term in growing)]


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(n, marks=pytest.mark.slow) for n in linear() if n != FIRST)])
def test_a_token_moves_as_many_bytes_in_a_long_sequence(name):
    """Forward and backward. Of the two lengths the programs are compiled, and not run."""

    def bytes_of_a_token(length):
        arguments, run, _ = lengths.program(name, 64, length)
        return moved(Program(run.lower(*arguments).compile().as_text())) / length

    assert bytes_of_a_token(2**16) <= 1.1 * bytes_of_a_token(2**14)

"""TTT-MLP: a network of two layers trained at test time."""

from flax import nnx

from models.checks import at_least
from models.test_time_training import TestTimeTraining, matrix


class TTTMLP(TestTimeTraining):
    """W_i = W_0 - sum_{j<=i} eta_ij grad l(W_0; k_j, v_j), l(W; k, v) = |f(k; W) - v|^2 / 2, o_i = f(q_i; W_i),
    f(x; W) = x + LN(gelu(x W_1 + b_1) W_2 + b_2), y = W_o (gelu(W_g x) * LN'(o)) (arXiv 2407.04620, sections 2.3 to 2.7).

    `ttt_linear` with another network: the state is one of two layers in each head, of which both take one gradient step for each
    mini-batch, at the W_0 where the one before ended. All else, the departures included, is as there; the largest step size is
    smaller, as in the authors' configurations.

    Args:
      heads: number of heads.
      mini_batch: tokens that share a starting point W_0.
      base_rate: the largest step size.
      conv_size: taps of the short convolutions.
      rope_base: base of the rotary embedding.
      expansion: hidden channels of the network, as a multiple of a head's.
    """

    paper = "TTT-MLP, arXiv 2407.04620"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        depth: int = 1,
        heads: int = 4,
        mini_batch: int = 16,
        base_rate: float = 0.1,
        conv_size: int = 4,
        rope_base: float = 10000.0,
        expansion: int = 4,
    ):
        at_least(1, expansion=expansion)
        self.expansion = expansion
        super().__init__(
            width,
            rngs=rngs,
            base_width=base_width,
            depth=depth,
            heads=heads,
            mini_batch=mini_batch,
            base_rate=base_rate,
            conv_size=conv_size,
            rope_base=rope_base,
        )

    def make_memory(self, rngs: nnx.Rngs, heads: int, size: int) -> None:
        self.memory_in, self.memory_in_bias = matrix(rngs, heads, size, self.expansion * size)
        self.memory_out, self.memory_out_bias = matrix(rngs, heads, self.expansion * size, size)

    def memories(self) -> tuple[tuple[nnx.Param, nnx.Param], ...]:
        return ((self.memory_in, self.memory_in_bias), (self.memory_out, self.memory_out_bias))

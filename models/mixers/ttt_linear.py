"""TTT-Linear: a linear model trained at test time."""

from flax import nnx

from models.test_time_training import TestTimeTraining, matrix


class TTTLinear(TestTimeTraining):
    """W_i = W_0 - sum_{j<=i} eta_ij grad l(W_0; k_j, v_j), l(W; k, v) = |f(k; W) - v|^2 / 2, o_i = f(q_i; W_i),
    f(x; W) = x + LN(x W + b), y = W_o (gelu(W_g x) * LN'(o)) (arXiv 2407.04620, sections 2.3 to 2.7).

    The state is a linear model (W and b in each head) that takes one gradient step for each mini-batch; i and j are places in
    the same mini-batch, and W_0 is where the one before ended. eta_ij = base_rate max(1/i + offset_i, 0) sigmoid(w_lr . x_j) / K.
    q = conv(W_qk x) and k = conv'(W_qk x) share a projection and are rotated by the place in the mini-batch; v = W_v x.
    The first W, b and the LN of each head are learned. W and w_lr start as N(0, 0.02^2).

    Departures from the authors' code: no biases in the convolutions and in the step size.

    Args:
      heads: number of heads.
      mini_batch: tokens that share a starting point W_0.
      base_rate: the largest step size.
      conv_size: taps of the short convolutions.
      rope_base: base of the rotary embedding.
    """

    paper = "TTT-Linear, arXiv 2407.04620"

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        base_width: int,
        depth: int = 1,
        heads: int = 4,
        mini_batch: int = 16,
        base_rate: float = 1.0,
        conv_size: int = 4,
        rope_base: float = 10000.0,
    ):
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
        self.memory, self.memory_bias = matrix(rngs, heads, size, size)

    def memories(self) -> tuple[tuple[nnx.Param, nnx.Param], ...]:
        return ((self.memory, self.memory_bias),)

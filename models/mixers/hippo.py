"""HiPPO, a linear memory with a fixed transition."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from common.errors import check_choice
from models.checks import at_least, even
from models.mixer import Ids, Mixer, Tokens
from models.params import dense, residual_output
from models.partitioning import constrain
from ops.hippo import MEASURES
from ops.hippo_memory import hippo_memory
from ops.projection import project


class HiPPO(Mixer):
    """f_t = W_f x_t, c_t = Abar_t c_{t-1} + Bbar_t f_t for each signal f, y_t = W_o c_t (arXiv 2008.07669, equations 3 and 4
    with the matrices of theorems 1 and 2).

    c holds the coefficients of the signal's past on N basis functions; only W_f and W_o are trained. Under "legs", the
    paper's scaled measure, the past is the whole segment, and Abar_t and Bbar_t depend on the position t in it. This is the
    memory of the paper's HiPPO-RNN (its figure 2) as a layer of its own: there the signal is read from a gated RNN's hidden
    state, to which c is fed back; here it is read from the layer's input, so that nothing but the memory is recurrent.

    A zero-order hold discretises, so that c_t is the exact projection of the tokens. The paper's bilinear rule (in
    `ops.hippo`) approximates it, badly at the first tokens, where 1/t is large.

    Args:
      measure: "legs" (all the past, uniformly), "legt" (a sliding window, Legendre polynomials), "fourier" (a sliding window,
        sines and cosines) or "lagt" (fading past, Laguerre functions).
      state: N.
      signals: number of signals that are kept; the paper keeps one.
      window: tokens in the window, or in the unit of time of "lagt"; without meaning for "legs".
    """

    paper = "HiPPO, arXiv 2008.07669"
    primitive = "hippo_memory"
    sequence_parallel = ()  # no function of `ops` passes its memory on
    tiny = {"state": 8, "window": 8}

    def __init__(
        self,
        width: int,
        *,
        rngs: nnx.Rngs,
        depth: int = 1,
        measure: str = "legs",
        state: int = 64,
        signals: int = 4,
        window: int = 256,
    ):
        check_choice("measure", measure, MEASURES)
        at_least(1, state=state, signals=signals, window=window)
        if measure == "fourier":
            even(state=state)
        self.measure = measure
        self.window = window
        self.sizes = (signals, state)
        self.w_f = dense(rngs, (width, signals), ("embed", None))
        self.w_o = residual_output(rngs, (signals, state, width), (None, None, "embed"), depth)

    def mix(
        self, x: Tokens, state: Float[Array, "B S N"] | None, *, segment_ids: Ids | None, positions: Ids
    ) -> tuple[Tokens, Float[Array, "B S N"] | None]:
        f = constrain(project(x, self.w_f[...]), "batch", "length", None)
        c, state = hippo_memory(
            f,
            self.measure,
            self.sizes[1],
            window=self.window,
            initial_state=state,
            segment_ids=segment_ids,
            positions=None if state is None and segment_ids is None else positions,
        )
        return project(c.astype(x.dtype), self.w_o[...], inputs=2), state

    def initial_state(self, batch: int, capacity: int) -> Float[Array, "B S N"]:
        return jnp.zeros((batch, *self.sizes), jnp.float32)

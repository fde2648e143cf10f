"""Mixers side by side: one block whose mixer is made of several, each with maps of its own ("attention|mamba2").

Falcon-H1 (arXiv 2507.22448) adds attention and Mamba-2, each with a factor before and behind it; Hymba (arXiv 2411.13676) takes
the mean of their normalised outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from common.errors import UserError, check_choice
from models.mixer import Bidirectional, Carry, Context, Mixer, add_scalars
from models.norms import RMSNorm
from models.params import param, zeros
from ops.projection import project

COMBINE = ("sum", "mean_norm", "gate")


class Parallel(nnx.Module):
    """y = sum_i s_i f_i(c_i x), or a weighted sum of the same, over mixers f_i; with c = `input_scale` and s = `output_scale`:

        sum        sum_i s_i f_i(c_i x)
        mean_norm  mean_i s_i RMSNorm_i(f_i(c_i x))
        gate       sum_i g_i s_i f_i(c_i x),  g = softmax(W x) for each token, in float32; W starts at 0, as the mean

    It obeys the law of a mixer, since each of its parts does. It can do what all of its parts can (stream, pack, ...), and knows
    the order of tokens if one of them does. The carry is that of a mixer, with the parts' states by name; the `Context` that it
    takes has the layers and the streams by name, and so has the stream that it returns.

    Hymba normalises before a last map that its heads share; here each mixer has its own, and its norm is behind it.

    Args:
      parts: the mixers by name.
      width: size of the last axis of x.
      combine: "sum", "mean_norm" or "gate".
      input_scale: factor of each part's input, in the order of the parts; () for none.
      output_scale: factor of each part's output.

    Raises:
      UserError: for an unknown `combine`, or as many factors as there are no parts.
    """

    def __init__(
        self,
        parts: Mapping[str, Mixer | Bidirectional],
        width: int,
        *,
        rngs: nnx.Rngs,
        combine: str = "sum",
        input_scale: tuple[float, ...] = (),
        output_scale: tuple[float, ...] = (),
    ):
        check_choice("model.parallel.combine", combine, COMBINE)
        for key, scale in (("input_scale", input_scale), ("output_scale", output_scale)):
            if len(scale) not in (0, len(parts)):
                raise UserError(
                    f"model.parallel.{key} has {len(scale)} factors; {'|'.join(parts)} takes {len(parts)}, or () for none"
                )
        self.parts = nnx.Dict(parts)
        self.combine = combine
        self.input_scale, self.output_scale = tuple(input_scale), tuple(output_scale)
        self.norms = nnx.List([RMSNorm(width, rngs=rngs) for _ in parts] if combine == "mean_norm" else [])
        gated = combine == "gate"
        self.w_gate = param(rngs, zeros, (width, len(parts)), ("embed", None), keep_float32=True) if gated else None
        every = lambda capability: all(getattr(part, capability) for part in parts.values())
        some = lambda capability: any(getattr(part, capability) for part in parts.values())
        for capability in ("causal", "streaming", "packing", "constant_carry", "replaces_channel_mixer"):
            setattr(self, capability, every(capability))
        self.padding = all(part.padding or part.packing for part in parts.values())
        for capability in ("fixed_length", "position_aware", "random"):
            setattr(self, capability, some(capability))

    @property
    def streams(self) -> bool:
        """Whether this instance takes a carry."""
        return all(part.streams for part in self.parts.values())

    def branches(self, x: Float[Array, "B T D"]) -> list[tuple[str, nnx.Module, Float[Array, "B T D"]]]:
        """The name of each part, the part, and its input."""
        scaled = [scale * x for scale in self.input_scale] or [x] * len(self.parts)
        return [(name, part, h) for (name, part), h in zip(self.parts.items(), scaled, strict=True)]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Carry | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        context: Context | None = None,
    ) -> tuple[Any, ...]:
        """Mixes a sequence or a piece of one, see `Mixer.__call__`; `context.layer` and `context.stream` are dicts by name."""
        outputs, states, streams, scalars, new = [], {}, {}, {}, None
        for i, (name, part, h) in enumerate(self.branches(x)):
            own = None
            if context is not None:
                key = None if context.key is None else jax.random.fold_in(context.key, i)
                own = Context(context.layer[name], key, (context.stream or {}).get(name), context.block)
            before = None if carry is None else {**carry, "state": carry["state"][name]}
            y, new, *beside = part(h, before, segment_ids=segment_ids, positions=positions, context=own)
            outputs.append(y)
            states[name] = None if new is None else new["state"]
            streams[name] = beside[0] if beside else None
            scalars = add_scalars(scalars, *beside[1:])
        y = self._combined(x, outputs, segment_ids)
        # Where the piece ends is the same for all parts.
        carry = None if carry is None else {**new, "state": states}
        if context is None:
            return y, carry
        return (y, carry, streams, scalars) if scalars else (y, carry, streams)

    def _combined(self, x, outputs: Sequence[Array], segment_ids) -> Array:
        if self.combine == "mean_norm":
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        if self.output_scale:
            outputs = [scale * y for scale, y in zip(self.output_scale, outputs, strict=True)]
        if self.combine == "gate":
            x = x if segment_ids is None else jnp.where((segment_ids != 0)[..., None], x, 0)
            gates = jax.nn.softmax(project(x.astype(jnp.float32), self.w_gate[...]))
            return sum(gates[..., i, None] * y for i, y in enumerate(outputs)).astype(x.dtype)
        y = sum(outputs[1:], outputs[0])
        return y / len(outputs) if self.combine == "mean_norm" else y

    def initial_carry(self, batch: int, capacity: int) -> Carry:
        """The carry before the first token, see `Mixer.initial_carry`.

        Raises:
          UserError: if a part does not stream.
        """
        carries = {name: part.initial_carry(batch, capacity) for name, part in self.parts.items()}
        place = next(iter(carries.values()))
        return {**place, "state": {name: carry["state"] for name, carry in carries.items()}}

"""The contract of a token mixer, and how to find one.

A mixer maps a sequence to a sequence and can be cut anywhere:

    y, carry = mixer(x, carry, segment_ids=..., positions=...)       x, y: [batch, length, width]

    mixer(concat(a, b), c0)  ==  concat(mixer(a, c0) -> c1,  mixer(b, c1))

The same call trains (`carry=None`), prefills (a long piece with a carry) and decodes (pieces of length 1). A variant is one
file under `models/mixers/` with one subclass of `Mixer`; its name is the file's, its hyperparameters and their defaults
are its constructor's keywords, and what it cannot do it says in class attributes.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from ml_collections import config_dict

from common.errors import UserError
from common.plugins import Plugins
from models.checks import about, at_least
from models.params import without_values
from ops import segments

# Constructor arguments that a mixer gets from its surroundings, where its signature asks for them; all the others are its
# hyperparameters.
#   width: size of x.  rngs: source of keys.  causal: False for the two-sided form.  depth: number of mixers in the model.
#   layer, layers: place among, and number of, the mixers of this name in the model; `layer` may be a traced integer.
#   all_layers: number of all blocks of the model.  length: of the longest sequence that the model is built for.
#   base_width: width of the model that this one is scaled from, and `width` where there is none; for first values that do not
#     have the deviation 1 / sqrt(inputs), see docs/scaling.md.
SURROUNDINGS = ("width", "rngs", "causal", "depth", "layer", "layers", "all_layers", "length", "base_width")

Carry = dict[str, Any]
Tokens = Float[Array, "B T D"]
Ids = Int[Array, "B T"]  # segments or positions
MatrixState = Float[Array, "B H K V"]  # of a mixer whose heads have keys and values


# What a layer tells of a batch in training, beside its output: float32 scalars by name. "objective", if it is there, is added to
# the objective as it is, over all layers; the means of all others over the layers are recorded with the training's metrics.
Scalars = Mapping[str, Float[Array, ""]]


class Context(NamedTuple):
    """What a mixer that `uses_context` is told of the model around it, at every call.

    Attributes:
      layer: place among the mixers of its name in the model, from 0.
      key: source of random numbers in training; None in evaluation.
      stream: what the mixer of this name before it handed on; for the first one, what `Shared` makes.
      block: place of its block among all blocks of the model, from 0.
    """

    layer: int | Int[Array, ""] = 0
    key: Key[Array, ""] | None = None
    stream: Any = None
    block: int | Int[Array, ""] = 0


class Mixer(nnx.Module):
    """Base of all mixers: checks, padding and segment bookkeeping around `mix`, which is what a variant writes.

    A subclass defines `__init__(self, width, *, rngs, ...)`, `mix` and (if it streams) `initial_state`. One with an explicit map
    of attention may define `attention_scores(x, *, segment_ids, positions)`, which gives the diagnostics its scores [B, H, T, T]
    (-inf where its own pattern hides a key) and how they are normalised: "softmax", "sum" or "none".

    What a mixer can do is said by its attributes. Those of the class are its usual ones; where one depends on the form or on a
    hyperparameter, the constructor sets it on the instance (`self.packing = causal`). So what was built is asked, and not its
    class: see `sketch`, and `models.config.ModelConfig.sketches`. Where a hyperparameter's default is None and the constructor
    computes a value, it keeps that under the hyperparameter's name (`self.heads = heads`), see `as_used`.

    Attributes:
      causal: has a form in which y_t depends on x_1..x_t only. On an instance: whether it is that form.
      bidirectional: has a two-sided form of its own, made with `causal=False` (others are wrapped, see `Bidirectional`).
      streaming: takes and returns a carry.
      packing: honours `segment_ids`: the documents packed into a row have the outputs that they have alone.
      padding: a document has the output that it has alone where padding surrounds it. Implied by packing.
      constant_carry: the size of the carry does not depend on `capacity`.
      fixed_length: takes no sequence longer than the `length` that it is built for.
      position_aware: knows the order of tokens by itself; others get a position embedding at the model's input.
      uses_context: `mix` takes a `context` and returns its stream as a third value.
      random: draws random numbers in training (from `context.key`).
      Shared: class of the parameters that all mixers of this name in a model have in common, or None. It is made with the
        surroundings and hyperparameters that its constructor asks for, and `shared(x, segment_ids=..., positions=...)` is the
        stream that enters the first of them (a tree of arrays; each mixer returns one of the same shapes and dtypes).
      sequence_parallel: the forms, "causal" and "two-sided", that work on a sequence in shards on several devices
        (`mesh.sequence`): they send states, neighbours, or keys and values, and no device gets the activations of the whole
        sequence. A mixer has this of the functions of `ops` that it calls.
      replaces_channel_mixer: its paper's layer has no MLP beside it (two such layers stand for one mixer and one MLP).
      paper: source, with its arXiv id.
      primitive: the function of `ops` that it stands on.
      complexity: time that a whole sequence takes as a function of its length T.
      tiny: hyperparameters under which sequences of some twenty tokens exercise all of the mixer (tests use them).
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = False
    streaming: ClassVar[bool] = True
    packing: ClassVar[bool] = True
    padding: ClassVar[bool] = True
    constant_carry: ClassVar[bool] = True
    fixed_length: ClassVar[bool] = False
    position_aware: ClassVar[bool] = True
    uses_context: ClassVar[bool] = False
    random: ClassVar[bool] = False
    Shared: ClassVar[type[nnx.Module] | None] = None
    sequence_parallel: ClassVar[tuple[str, ...]] = ("causal",)
    replaces_channel_mixer: ClassVar[bool] = False
    paper: ClassVar[str]
    primitive: ClassVar[str]
    complexity: ClassVar[str] = "T"
    tiny: ClassVar[dict[str, Any]] = {}

    shared: nnx.Module | None = None  # of a mixer that was made alone, not in a model

    def mix(
        self,
        x: Float[Array, "B T D"],
        state: Any,
        *,
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The mixer's equation.

        Args:
          x: [batch, length, width]; zero at padding.
          state: None in training (what is returned for it is ignored), else what `initial_state` or the last call
            returned. It always belongs to the segment of the first token.
          segment_ids: [batch, length] or None for one segment without padding; always given with a state. Documents are counted
            from 1 (`ops.segments.runs`), so that no number comes back in a row, nor in the pieces after it.
          positions: [batch, length], counted from 0 in each segment and continued across calls.

        A mixer that `uses_context` takes also `context`, a `Context`, and returns (y, state, stream). In training (where the
        context has a key; it is to set `random`) it may return a fourth value, `Scalars`. Padding must not count in them.
        """
        raise NotImplementedError

    def initial_state(self, batch: int, capacity: int) -> Any:
        """The state before the first token, as arrays whose first axis is the batch (scalars, if the carry grows)."""
        raise NotImplementedError

    @property
    def in_shards(self) -> bool:
        """Whether this form takes sequences in shards, see `sequence_parallel`."""
        return ("causal" if self.causal else "two-sided") in self.sequence_parallel

    @property
    def streams(self) -> bool:
        """Whether this instance takes a carry: it is of a mixer that streams, in its causal form."""
        return self.streaming and self.causal

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Carry | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        context: Context | None = None,
    ) -> tuple[Any, ...]:
        """Mixes a sequence or a piece of one.

        Args:
          x: [batch, length, width], float32 or bfloat16.
          carry: None for whole sequences, else `initial_carry(...)` or the carry of the piece before.
          segment_ids: [batch, length], 0 for padding; a change restarts the state, also across calls, so that an id that comes
            back after others (padding included) is a new document. None: one segment, which continues that of the last token
            in the carry, and is a new document where that token is padding or there is none.
          positions: [batch, length]; by default counted from 0 in each segment.
          context: given by the model around the mixer, see `Context`; None for a mixer alone.

        Returns:
          y of x's shape and dtype, zero at padding; and the carry for the next piece (None if `carry` is None). If a
          context is given, thirdly the stream for the next mixer of this name; and in training, of a mixer that has them,
          `Scalars`.

        Raises:
          UserError: for a shape that does not fit, or a capability that this mixer lacks.
        """
        self._check(x, carry, segment_ids, positions)
        x = segments.zero_padding(x, segment_ids)
        place, runs, positions = locate(x.shape[:2], carry, segment_ids, positions)
        state = None if carry is None else carry["state"]
        if carry is None:
            runs = None if segment_ids is None else runs  # None tells `mix` of the fast paths
        elif segment_ids is not None and self.constant_carry:
            state = self._restart(state, segment_ids[:, 0] != carry["segment"])
        y, new, *beside = self._mix(x, state, runs, positions, context)
        if carry is not None:
            new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
            if segment_ids is not None and self.constant_carry:
                # Nothing of what is before padding is left, so that a piece without segments need not ask.
                new = self._restart(new, segment_ids[:, -1] == 0)
            carry = {**place, "state": new}
        y = segments.zero_padding(y, segment_ids)
        return (y, carry) if context is None else (y, carry, *beside)

    def _mix(self, x, state, segment_ids, positions, context):
        where = {"segment_ids": segment_ids, "positions": positions}
        if not self.uses_context:
            return *self.mix(x, state, **where), None
        if context is None:
            context = Context(stream=None if self.shared is None else self.shared(x, **where))
        y, new, stream, *scalars = self.mix(x, state, **where, context=context)
        return y, new, jax.tree.map(lambda new, old: new.astype(old.dtype), stream, context.stream), *scalars

    def initial_carry(self, batch: int, capacity: int) -> Carry:
        """The carry before the first token.

        Args:
          batch: number of rows.
          capacity: number of tokens that the carry must be able to hold; only mixers without `constant_carry` use it.

        Raises:
          UserError: if this mixer does not stream.
        """
        self._require("streaming", "a carry")
        if not self.causal:
            raise UserError(f"{self.name()} was built with causal=False and cannot stream; build it with causal=True")
        return {**origin(batch), "state": self.initial_state(batch, capacity)}

    @classmethod
    def name(cls) -> str:
        """The name by which configs choose this mixer: its file's."""
        return cls.__module__.rpartition(".")[-1]

    def _restart(self, state, where):
        fresh = self.initial_state(where.shape[0], 0)
        pick = lambda new, old: jnp.where(where.reshape((-1,) + (1,) * (old.ndim - 1)), new.astype(old.dtype), old)
        return jax.tree.map(pick, fresh, state)

    def _require(self, capability: str, what: str) -> None:
        if not getattr(self, capability):
            form = "causal" if self.causal else "two-sided"
            raise UserError(
                f"mixer {self.name()!r} has {capability}=False in its {form} form: it takes no {what}. "
                "`python -m models.catalogue` lists what each mixer can do"
            )

    def _check(self, x, carry, segment_ids, positions) -> None:
        if x.ndim != 3 or 0 in x.shape[:2]:
            raise ValueError(f"mixer {self.name()!r} takes x of shape [batch >= 1, length >= 1, width], got {x.shape}")
        for label, array in (("segment_ids", segment_ids), ("positions", positions)):
            if array is not None and array.shape != x.shape[:2]:
                raise ValueError(f"{label} must have x's [batch, length] = {x.shape[:2]}, got {array.shape}")
        if segment_ids is not None and not self.packing:
            self._require("padding", "segment_ids")
        if carry is not None:
            self._require("streaming", "carry")
            if carry["segment"].shape != x.shape[:1]:
                raise ValueError(f"the carry was made for batch {carry['segment'].shape[0]}, x has batch {x.shape[0]}")


class Bidirectional(nnx.Module):
    """Two causal mixers, one over each direction, summed: the two-sided form of a mixer that has none of its own.

    Tokens are reversed inside their segments, so that padding enters neither direction.
    """

    causal = False
    bidirectional = True
    streaming = False
    streams = False
    in_shards = False  # a token and its mirror image are on different devices
    constant_carry = True
    _OF_BOTH = ("packing", "padding", "fixed_length", "position_aware", "random", "replaces_channel_mixer")

    def __init__(self, forward: Mixer, backward: Mixer):
        self.forward = forward
        self.backward = backward
        for capability in self._OF_BOTH:
            setattr(self, capability, getattr(forward, capability))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: Carry | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        context: Context | None = None,
    ) -> tuple[Any, ...]:
        """Mixes whole sequences, as `Mixer.__call__`. The stream is a pair, one of each direction.

        Raises:
          UserError: if there is a carry.
        """
        if carry is not None:
            raise UserError(
                f"a bidirectional {self.forward.name()!r} takes no carry; build it with causal=True to stream"
            )
        contexts = (None, None)
        if context is not None:
            keys = (None, None) if context.key is None else jax.random.split(context.key)
            streams = (None, None) if context.stream is None else context.stream
            contexts = [context._replace(key=key, stream=stream) for key, stream in zip(keys, streams, strict=True)]
        where = {"segment_ids": segment_ids, "positions": positions}
        y, _, *forward = self.forward(x, **where, context=contexts[0])
        x = segments.reverse(segments.zero_padding(x, segment_ids), segment_ids)
        z, _, *backward = self.backward(x, **where, context=contexts[1])
        y = y + segments.reverse(z, segment_ids)
        if context is None:
            return y, None
        stream = None if context.stream is None else (forward[0], backward[0])
        scalars = add_scalars(*forward[1:], *backward[1:])
        return (y, None, stream, scalars) if scalars else (y, None, stream)


class BothShared(nnx.Module):
    """`Mixer.Shared` of each direction of a `Bidirectional`."""

    def __init__(self, forward: nnx.Module, backward: nnx.Module):
        self.forward = forward
        self.backward = backward

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None, positions: Int[Array, "B T"] | None
    ) -> tuple[Any, Any]:
        """The stream of each direction; for the arguments see `Mixer.__call__`."""
        where = {"segment_ids": segment_ids, "positions": positions}
        return self.forward(x, **where), self.backward(x, **where)


def add_scalars(*found: Scalars) -> dict[str, Float[Array, ""]]:
    """The sums of several `Scalars` by name."""
    return {
        name: sum(one[name] for one in found if name in one) for name in dict.fromkeys(n for one in found for n in one)
    }


def origin(batch: int) -> Carry:
    """The place before the first token of a sequence: no segment yet (as at padding), the first run to come, position 0."""
    return {key: jnp.zeros(batch, jnp.int32) for key in ("segment", "run", "position")}


def locate(
    shape: tuple[int, int],
    place: Carry | None,
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"] | None,
) -> tuple[Carry, Int[Array, "B T"], Int[Array, "B T"]]:
    """Says where the tokens of a piece are.

    Args:
      shape: (batch, length) of the piece.
      place: what comes before, as in `origin`: the "segment" of the last token, the "run", which is the number of documents so
        far, and the "position" that follows it; None for whole sequences.
      segment_ids: None to go on with the segment of `place`, or with a new one behind padding.
      positions: None to count inside each segment.

    Returns:
      the place after the piece, the number of each token's document as `ops.segments.runs` counts, and positions [batch, length].
    """
    place = origin(shape[0]) if place is None else place
    before = place["segment"]
    if segment_ids is None:
        segment_ids = jnp.broadcast_to(jnp.where(before == 0, 1, before)[:, None], shape)
    if positions is None:
        positions = segments.positions(segment_ids, before, place["position"])
    runs = segments.runs(segment_ids, before, place["run"])
    last = segment_ids[:, -1]
    after = {
        "segment": last,
        "run": jnp.maximum(place["run"], jnp.max(runs, 1)),
        "position": jnp.where(last == 0, 0, positions[:, -1] + 1),
    }
    return after, runs, positions


_PLUGINS = Plugins("mixer", "models.mixers", Mixer, SURROUNDINGS)


def names() -> list[str]:
    """The names of all mixers: the files of `models/mixers/`."""
    return _PLUGINS.names()


def find(name: str) -> type[Mixer]:
    """The class of a mixer.

    Raises:
      UserError: if there is none of that name; the message names the nearest.
    """
    return _PLUGINS.find(name)


def defaults(name: str) -> config_dict.ConfigDict:
    """The hyperparameters of a mixer and their defaults, read from its constructor's signature."""
    return _PLUGINS.defaults(name)


def create(
    name: str,
    width: int,
    *,
    rngs: nnx.Rngs,
    causal: bool = True,
    depth: int = 1,
    layer: int | Int[Array, ""] = 0,
    layers: int = 1,
    all_layers: int = 1,
    length: int = 512,
    base_width: int | None = None,
    alone: bool = True,
    **hyperparameters,
) -> Mixer | Bidirectional:
    """Builds a mixer.

    Args:
      name: a file of `models/mixers/`.
      width: size of the last axis of x.
      rngs: source of keys.
      causal: False for the two-sided form: the mixer's own where it has one, else `Bidirectional`.
      depth: number of mixers in the model, for initialisers that scale with it.
      layer, layers: place among, and number of, the mixers of this name in the model.
      all_layers: number of all blocks of the model.
      length: of the longest sequence that the model is built for.
      base_width: of the model that this one is scaled from; None for none.
      alone: whether the mixer brings its own `Shared`, to be called without a model around it.
      **hyperparameters: as in `defaults(name)`.

    Raises:
      UserError: for an unknown mixer or hyperparameter, or a form that the mixer does not have.
    """
    cls = find(name)
    _PLUGINS.check(name, hyperparameters)
    if causal and not cls.causal:
        able = [n for n in names() if find(n).causal]
        raise UserError(f"mixer {name!r} is not causal; use an encoder task, or one of {', '.join(able)}")
    given = {
        "depth": depth,
        "layer": layer,
        "layers": layers,
        "all_layers": all_layers,
        "length": length,
        "base_width": base_width or width,
        "causal": causal or not cls.bidirectional,
    }

    def make():
        mixer = cls(width, rngs=rngs, **_asked(cls, given), **hyperparameters)
        if alone and cls.Shared is not None:
            mixer.shared = cls.Shared(width, rngs=rngs, **_asked(cls.Shared, given | hyperparameters))
        return mixer

    with about(f"mixer {name!r}"):
        at_least(1, width=width, depth=depth, layers=layers, all_layers=all_layers, length=length)
        return make() if given["causal"] == causal else Bidirectional(make(), make())


def sketch(name: str, width: int, **options) -> Mixer | Bidirectional:
    """Builds a mixer without values: its attributes are those of what `create` builds, its parameters only shapes.

    Args:
      name: a file of `models/mixers/`.
      width: size of the last axis of x.
      **options: as of `create`, without `rngs`.

    Raises:
      UserError: as `create`.
    """
    return without_values(lambda: create(name, width, rngs=nnx.Rngs(0), **options))


def as_used(mixer: Mixer | Bidirectional, given: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters of a built mixer: those given, and the defaults of the others.

    Where a None stands for a value that the constructor computes, it is that value, which the mixer keeps under the
    hyperparameter's name.
    """
    own = mixer.forward if isinstance(mixer, Bidirectional) else mixer
    used = defaults(own.name()).to_dict() | dict(given)
    return {key: getattr(own, key, None) if value is None else value for key, value in used.items()}


def create_shared(
    name: str,
    width: int,
    *,
    rngs: nnx.Rngs,
    causal: bool = True,
    depth: int = 1,
    layers: int = 1,
    length: int = 512,
    base_width: int | None = None,
    **hyperparameters,
) -> nnx.Module | None:
    """Builds what all mixers of a name in a model have in common, see `Mixer.Shared`; None if there is nothing. The arguments
    are those of `create`."""
    cls = find(name)
    if cls.Shared is None:
        return None
    given = {
        "depth": depth,
        "layers": layers,
        "length": length,
        "base_width": base_width or width,
        "causal": causal or not cls.bidirectional,
        **hyperparameters,
    }
    make = lambda: cls.Shared(width, rngs=rngs, **_asked(cls.Shared, given))
    with about(f"mixer {name!r}"):
        return make() if given["causal"] == causal else BothShared(make(), make())


def _asked(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given arguments that a constructor has."""
    parameters = inspect.signature(cls.__init__).parameters
    return {key: value for key, value in given.items() if key in parameters}

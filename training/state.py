"""The state of training: what a checkpoint holds, how it is made and where it lies.

    state = {"params", "opt", "step", "skipped", "key"}

is a tree of arrays and nothing else. With truncated back-propagation "carry", what each row goes on with, belongs to it. `build`
derives everything about it from the model's constructor: the facts of each parameter, shapes and shardings (also the
optimiser's), a jitted initialiser and a pure `apply`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Key, PyTree

from models.params import without_values
from training import sharding
from training.optimizer import Optimizer

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The facts of a parameter, as written where it is made (`models.params.param`).

    Attributes:
      axes: logical axis name or None of each dimension, without the dimensions of stacked layers.
      decay: whether weight decay applies.
      group: learning-rate group.
      keep_float32: whether it stays in float32 when the model computes in bfloat16.
      inputs: indices in `axes` of the dimensions that the product with it sums over; () for what is no map.
      active: share of it that one token uses.
    """

    axes: tuple[str | None, ...]
    decay: bool
    group: str
    keep_float32: bool
    inputs: tuple[int, ...] = ()
    active: float = 1.0

    @property
    def is_table(self) -> bool:
        """Whether tokens look up rows of it, few of all. The tokens' own embedding is none: a head may share it."""
        return self.active < 1 and self.axes[:1] == ("vocab",)


@dataclasses.dataclass(frozen=True)
class Built:
    """A model on a mesh, as pure functions and descriptions.

    Attributes:
      mesh: the devices.
      metadata: tree of `Metadata`, like the parameters.
      optimizer: None if the state is only for evaluation; its "opt" is then empty.
      abstract: tree of `jax.ShapeDtypeStruct` with shardings, like the state; the target of a restore.
      init: `init(key) -> state`, jitted, with the arrays where `abstract` says.
      merge: `merge(params) -> nnx.Module`.
      apply: `apply(params, *args, **kwargs)`: calls the model, its activations laid out on the mesh.
    """

    mesh: Mesh
    metadata: PyTree
    optimizer: Optimizer | None
    abstract: State
    init: Callable[[jax.Array], State]
    merge: Callable[[PyTree], nnx.Module]
    apply: Callable[..., Any]

    @property
    def shardings(self) -> State:
        """The shardings in `abstract`."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def build(
    model_factory: Callable[[nnx.Rngs], nnx.Module],
    make_optimizer: Callable[[PyTree], Optimizer] | None,
    mesh: Mesh,
    carry: tuple[int, str] | None = None,
) -> Built:
    """Describes a model and its state; computes nothing and allocates nothing.

    Args:
      model_factory: makes the model from a source of keys.
      make_optimizer: makes the optimiser from the tree of `Metadata`, for example
        `functools.partial(optimizer.build, config, total_steps)`; None for evaluation.
      mesh: a mesh of `sharding.make_mesh`.
      carry: of truncated back-propagation, the rows of a batch and the dtype that the model computes in; None without.

    Raises:
      ValueError: if the model holds a parameter without its facts, or arrays that are no parameters.
    """
    model = without_values(lambda: model_factory(nnx.Rngs(jax.random.key(0))))
    _refuse_other_arrays(model)
    graphdef, variables = nnx.split(model)
    flat = list(nnx.to_flat_state(variables))
    metadata = nest({path: _facts(path, variable) for path, variable in flat})
    optimizer = None if make_optimizer is None else make_optimizer(metadata)
    tx = optax.identity() if optimizer is None else optimizer

    def merge(params):
        values = [(path, variable.replace(_find(params, path))) for path, variable in flat]
        return nnx.merge(graphdef, nnx.from_flat_state(values))

    def apply(params, *args, **kwargs):
        with sharding.tracing(mesh):
            return merge(params)(*args, **kwargs)

    def create(key: Key[jax.Array, ""]) -> State:
        model_key, run_key = jax.random.split(key)
        made = nnx.to_flat_state(nnx.state(model_factory(nnx.Rngs(model_key))))
        params = nest({path: variable.get_value() for path, variable in made})
        carries = {}
        if carry is not None:
            rows, dtype = carry
            carries["carry"] = merge(cast(params, metadata, dtype)).initial_carry(rows, 0)
        return {
            **carries,
            "params": params,
            "opt": tx.init(params),
            "step": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(run_key),
        }

    shapes = jax.eval_shape(create, jax.random.key(0))
    whole = sharding.replicated(mesh)
    place = lambda leaf, facts: sharding.sharding(facts.axes, leaf.shape, mesh)
    params = jax.tree.map(place, shapes["params"], metadata)
    opt = like_params(tx.init, shapes["opt"], params, whole)
    shardings = {**jax.tree.map(lambda _: whole, shapes), "params": params, "opt": opt}
    if carry is not None:
        shardings["carry"] = jax.tree.map(lambda _: sharding.batch_sharding(mesh), shapes["carry"])
    abstract = jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target), shapes, shardings
    )
    return Built(mesh, metadata, optimizer, abstract, _initialiser(create, shardings, mesh), merge, apply)


def like_params(init: Callable[[PyTree], PyTree], opt: PyTree, of_params: PyTree, other: Any) -> PyTree:
    """A tree like an optimiser's state `opt`, which `init` makes: for what is kept of a parameter the leaf that `of_params` has
    for that parameter, and `other` for the rest."""
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
    pick = lambda moment, target: moment if masked(moment) else target
    return optax.tree_map_params(init, pick, opt, of_params, transform_non_params=lambda _: other, is_leaf=masked)


def _initialiser(create: Callable[[jax.Array], State], shardings: State, mesh: Mesh) -> Callable[[jax.Array], State]:
    """`create`, jitted, with its arrays where the shardings say."""
    if mesh.devices.flat[0].platform != "cpu":
        return jax.jit(create, out_shardings=shardings)
    # Compiling an initialiser for the CPU costs more than running it, optimised or not.
    jitted = functools.partial(jax.jit, create, compiler_options={"xla_backend_optimization_level": 0})
    if mesh.size == 1 or mesh.is_multi_process:
        return jitted(out_shardings=shardings)
    # Orthogonal matrices, of LAPACK, wait for threads of XLA's, of which there may be no more than devices that wait so.
    one = Mesh(
        mesh.devices.flatten()[:1].reshape((1,) * mesh.devices.ndim), mesh.axis_names, axis_types=mesh.axis_types
    )
    alone = jitted()

    def init(key: jax.Array) -> State:
        numbers, kind = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
        with jax.set_mesh(one):  # also where the caller has set the whole mesh
            state = alone(jax.random.wrap_key_data(numbers, impl=kind))
        return jax.device_put(state, shardings)

    return init


def cast(params: PyTree, metadata: PyTree, dtype) -> PyTree:
    """The parameters to compute with: in `dtype`, except those that say `keep_float32`."""
    return jax.tree.map(lambda p, facts: p if facts.keep_float32 else p.astype(dtype), params, metadata)


def _facts(path: tuple, variable: nnx.Variable) -> Metadata:
    name, known = "/".join(map(str, path)), variable.get_metadata()
    missing = [field.name for field in dataclasses.fields(Metadata) if field.name not in known]
    if missing:
        raise ValueError(f"parameter {name} does not say its {', '.join(missing)}; make it with models.params.param")
    facts = Metadata(**{field.name: known[field.name] for field in dataclasses.fields(Metadata)})
    if variable.dtype != jnp.float32:
        raise ValueError(f"parameter {name} is {variable.dtype}; make it float32 (complex numbers are pairs of reals)")
    if len(facts.axes) > variable.ndim:
        raise ValueError(
            f"parameter {name} of shape {variable.shape} has more axis names than dimensions: {facts.axes}"
        )
    return facts


def _refuse_other_arrays(model: nnx.Module) -> None:
    for path, value in nnx.iter_graph(model):
        variable = isinstance(value, nnx.Variable) and not isinstance(value, nnx.Param)
        if variable or isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(
                f"the model holds an array that is no parameter: {'/'.join(map(str, path))} ({type(value).__name__}). "
                "Compute it from static numbers in __call__, or make it a parameter with decay=False that is read "
                "through jax.lax.stop_gradient"
            )


def nest(flat: dict[tuple, Any]) -> PyTree:
    """Nested dicts with strings as keys (a list's indices are integers, which checkpoints and exports dislike)."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _find(tree: PyTree, path: tuple) -> Any:
    for key in path:
        tree = tree[str(key)]
    return tree

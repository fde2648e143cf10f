"""The law that every mixer obeys, and what it declares about itself.

    mixer(concat(a, b), c0) == concat(mixer(a, c0) -> c1, mixer(b, c1))

Mixers are collected from `models/mixers/`. What one cannot do, its class attributes say; then the test is that asking
for it is an error. Compilation is most of the time that these tests take, so each function is compiled once per mixer and the
tests share its results.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from models import mixer as mixers
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from ops import dispatch
from tests.collection import one_of_each_primitive
from tests.tolerance import FLOAT32, assert_close

WIDTH, BATCH, LENGTH = 32, 3, 23
PIECES = (11, 1, 11)  # and single tokens: two lengths, so that two programs are compiled
# Packed rows: documents of several lengths (1 included), then padding; a single document; and an id that comes back after
# padding, where it is another document. Cuts between pieces fall on borders between documents, inside of them and into padding.
PACKED = np.array(
    [[1] * 11 + [2] + [3] * 7 + [0] * 4, [1] * LENGTH, [1] * 9 + [0] * 5 + [1] * 9],
    np.int32,
)
PADDED = np.array([[1] * 19 + [0] * 4, [0] * 2 + [1] * 19 + [0] * 2, [0] * 4 + [1] * 19], np.int32)


def documents(ids: np.ndarray) -> list[slice]:
    """The runs of equal ids of a row that are no padding."""
    borders = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    return [slice(a, b) for a, b in itertools.pairwise(borders) if ids[a]]


def able(capability: str, value: bool = True) -> list[str]:
    return [name for name in mixers.names() if bool(getattr(mixers.find(name), capability)) == value]


def each(found) -> list:
    """Test parameters, those of one mixer in one process. `make test` has the first of each primitive, `make rest` the others."""
    return one_of_each_primitive(found, pytest.mark.rest)


def forms() -> list:
    """Every mixer's causal and own two-sided form; and in two-sided form, through the wrapper, the first mixer without context
    and all those that have one. Of mixers that have both forms, the two-sided one of the first of each primitive is tested
    here, and the others thoroughly."""
    own = able("bidirectional")
    both = one_of_each_primitive([name for name in own if mixers.find(name).causal], pytest.mark.thorough)
    wrapped = able("bidirectional", False)
    first = next(name for name in wrapped if not mixers.find(name).uses_context)
    two_sided = [name for name in own if not mixers.find(name).causal]
    two_sided += [name for name in wrapped if name == first or mixers.find(name).uses_context]
    of_each = lambda params, causal: [pytest.param(*p.values, causal, marks=p.marks) for p in params]
    return of_each(each(able("causal")), True) + of_each([*both, *each(two_sided)], False)


def after_padding() -> list:
    """Mixers whose carry grows, which tell documents apart by themselves, and those that are restarted from outside, all of them
    in the same way: the first is tested, the others are slow."""
    found = sorted(set(able("streaming")) & set(able("packing")))
    grows = [name for name in found if not mixers.find(name).constant_carry]
    first, *others = (name for name in found if name not in grows)
    slow = [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.xdist_group(name)]) for name in others]
    return each([*grows, first]) + slow


@functools.lru_cache(maxsize=2)
def build(name: str, causal: bool = True):
    mixer = mixers.create(name, WIDTH, rngs=nnx.Rngs(0), causal=causal, length=LENGTH, **mixers.find(name).tiny)
    # Some initialisers (gains of zero, tiny scales) would hide errors: move every parameter off its initial value.
    graph, params = nnx.split(mixer)
    numbers = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + np.float32(0.1 * numbers.standard_normal(p.shape)), params)
    return graph, params


@functools.cache
def sketch(name: str, causal: bool = True):
    """A mixer without values, whose capabilities are those of the one that is tested."""
    return mixers.sketch(name, WIDTH, causal=causal, length=LENGTH, **mixers.find(name).tiny)


def normal(seed: int, scale: float = 1.0) -> np.ndarray:
    return np.float32(scale * np.random.default_rng(seed).standard_normal((BATCH, LENGTH, WIDTH)))


def inputs(ids=None) -> np.ndarray:
    """Random numbers, NaN at padding."""
    x = normal(2)
    return x if ids is None else np.where((ids == 0)[..., None], np.float32(np.nan), x)


@functools.lru_cache(maxsize=2)
def runner(name: str, causal: bool):
    graph, _ = build(name, causal)
    return jax.jit(lambda params, x, carry=None, ids=None: nnx.merge(graph, params)(x, carry, segment_ids=ids))


@functools.lru_cache(maxsize=2)
def differentiator(name: str, causal: bool):
    """(params, x, ids, weight) -> y and the gradients of sum(y * weight) to params and x."""
    graph, _ = build(name, causal)

    def run(params, x, ids, weight):
        y, pull_back = jax.vjp(lambda params, x: nnx.merge(graph, params)(x, segment_ids=ids)[0], params, x)
        return y, pull_back(weight.astype(y.dtype))

    return jax.jit(run)


@functools.lru_cache(maxsize=4)
def whole(name: str, causal: bool):
    """Output without segments."""
    return runner(name, causal)(build(name, causal)[1], inputs())[0]


@functools.lru_cache(maxsize=4)
def in_rows(name: str, causal: bool):
    """Output and gradients of rows with padding, packed where the mixer can, and their segments."""
    ids = PACKED if sketch(name, causal).packing else PADDED
    return *differentiator(name, causal)(build(name, causal)[1], inputs(ids), ids, normal(3)), ids


@pytest.mark.parametrize("name", each(able("streaming")))
def test_law(name):
    """Cut anywhere, pieces of length 1 included: the outputs and the final carry are the same."""
    graph, params = build(name)
    run = runner(name, True)
    packing = sketch(name).packing
    expected = in_rows(name, True)[0] if packing else whole(name, True)
    x = inputs(PACKED) if packing else inputs()
    start = nnx.merge(graph, params).initial_carry(BATCH, LENGTH)
    assert float(jnp.abs(expected).max()) > 0

    def cut(pieces):
        outputs, carry, at = [], start, 0
        for length in pieces:
            piece = slice(at, at + length)
            y, carry = run(params, x[:, piece], carry, PACKED[:, piece] if packing else None)
            outputs.append(y)
            at += length
        assert at == LENGTH
        return jnp.concatenate(outputs, 1), carry

    y, after_pieces = cut(PIECES)
    assert_close(y, expected, what="pieces")
    y, after_tokens = cut((1,) * LENGTH)
    assert_close(y, expected, what="tokens")
    for a, b in zip(jax.tree.leaves(after_pieces), jax.tree.leaves(after_tokens), strict=True):
        assert_close(a, b, what="carry")


@pytest.mark.parametrize("name", after_padding())
def test_continuing_without_segments(name):
    """Without segment_ids a piece goes on with the document of the last token; behind padding it is a new one."""
    graph, params = build(name)
    run = runner(name, True)
    ids = np.array([[1] * 5 + [0] * 2, [0] * 2 + [1] * 5, [1] * 7], np.int32)
    x = np.where(np.pad(ids, ((0, 0), (0, 1)), constant_values=1)[..., None], normal(2)[:, :8], np.float32(np.nan))
    _, carry = run(params, x[:, :7], nnx.merge(graph, params).initial_carry(BATCH, 8), ids)
    y, _ = run(params, x[:, 7:], carry)
    expected, _ = run(params, x, None, np.concatenate([ids, [[2], [1], [1]]], 1).astype(np.int32))
    assert_close(y, expected[:, 7:])


@pytest.mark.parametrize("name", each(able("streaming")))
def test_carry_size(name):
    """A constant carry does not depend on the capacity; one that grows does."""
    graph, params = build(name)
    size = lambda capacity: sum(
        a.size
        for a in jax.tree.leaves(jax.eval_shape(lambda p: nnx.merge(graph, p).initial_carry(1, capacity), params))
    )
    assert (size(64) == size(1024)) == sketch(name).constant_carry


@pytest.mark.parametrize("name", each(sorted(set(able("streaming")) & set(able("constant_carry", False)))))
def test_overfull_carry(name):
    """A carry that is asked to hold more than its capacity says so with NaN instead of forgetting silently."""
    graph, params = build(name)
    run = runner(name, True)
    carry = nnx.merge(graph, params).initial_carry(BATCH, 4)
    for i in range(5):
        y, carry = run(params, inputs()[:, i : i + 1], carry)
        assert np.isnan(y).all() if i == 4 else np.isfinite(y).all()


@pytest.mark.parametrize("name,causal", [form for form in forms() if mixers.find(form.values[0]).padding])
def test_packing_and_padding(name, causal):
    """A row gives its documents' outputs when alone; padding, even NaN, enters neither outputs nor gradients."""
    params = build(name, causal)[1]
    run = runner(name, causal)
    y, gradients, ids = in_rows(name, causal)
    x = inputs()
    for row in range(BATCH):
        for document in documents(ids[row]):
            if causal:  # what follows it is of no consequence (test_dependence), and the program is compiled already
                alone = run(params, np.concatenate([x[:, document], normal(5)], 1)[:, :LENGTH])[0]
            else:
                alone = run(params, x[:, document])[0]
            assert_close(y[row, document], alone[row, : document.stop - document.start], what=f"row {row}, {document}")
    assert not np.asarray(y[ids == 0]).any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert not np.asarray(gradients[1][ids == 0]).any()


@pytest.mark.parametrize("name,causal", forms())
def test_dependence(name, causal):
    """Causal: y_t depends on x_1..x_t and on nothing later. Two-sided: on both sides."""
    params, x, other = build(name, causal)[1], inputs(), normal(4)
    y, t, at = whole(name, causal), LENGTH // 2, np.arange(LENGTH)[:, None]
    change = lambda where: np.abs(runner(name, causal)(params, np.where(where, other, x))[0] - y).max((0, 2))
    assert change(at == t)[t] > 0 and change(at == t - 1)[t] > 0
    later = change(at > t)
    if causal:
        assert later[: t + 1].max() <= FLOAT32 * np.abs(y).max()  # transforms leave rounding errors everywhere
    else:
        assert later[t] > 0


@pytest.mark.thorough
@pytest.mark.parametrize("name", one_of_each_primitive(able("causal")))
def test_implementations_agree(name):
    """All forms that the mixer's primitives offer are the same function, gradients included."""
    graph, params = build(name)
    ids = PACKED if sketch(name).packing else None
    y, gradients = differentiator(name, True)(params, inputs(ids), ids, normal(3))
    flat = lambda y, gradients: [y, *jax.tree.leaves(gradients)]
    expected = flat(y, gradients)

    def make():  # a new function each time, since what was traced of one is not traced again
        def run(params, x):
            y, pull_back = jax.vjp(lambda params, x: nnx.merge(graph, params)(x, segment_ids=ids)[0], params, x)
            return y, pull_back(jnp.asarray(normal(3)))

        return run

    x = inputs(ids)
    with dispatch.implementation("auto") as choice:
        programs = {str(jax.make_jaxpr(make())(params, x))}
    count = max(map(len, choice.asked.values()), default=0)
    for i in range(count):  # the i-th form of each primitive together, so that each of its forms has its turn
        text = ",".join(f"{primitive}={forms[i % len(forms)]}" for primitive, forms in choice.asked.items())
        with dispatch.implementation(text):
            program = str(jax.make_jaxpr(make())(params, x))
            if program not in programs:
                found = flat(*jax.jit(make())(params, x))
                for a, b in zip(found, expected, strict=True):
                    assert_close(a, b, 1e-4, what=text)
        programs.add(program)


@pytest.mark.rest
@pytest.mark.parametrize("name", one_of_each_primitive(mixers.names(), pytest.mark.thorough))
def test_bfloat16(name):
    """Outputs and gradients are finite in bfloat16 at two input scales, and close to float32's at the first."""
    causal = mixers.find(name).causal
    params = build(name, causal)[1]
    low = jax.tree.map(
        lambda p: p.replace(p[...] if p.get_metadata()["keep_float32"] else p[...].astype(jnp.bfloat16)),
        params,
        is_leaf=lambda p: isinstance(p, nnx.Variable),
    )
    for scale in (1.0, 100.0):
        x = jnp.asarray(scale * inputs(), jnp.bfloat16)
        y, gradients = differentiator(name, causal)(low, x, None, jnp.ones(x.shape, jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        for leaf in jax.tree.leaves((y, gradients)):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
        if scale == 1.0:
            assert_close(y.astype(jnp.float32), whole(name, causal), 0.1)


@pytest.mark.parametrize(
    "name", one_of_each_primitive(sorted(set(able("uses_context")) & set(able("streaming"))), pytest.mark.thorough)
)
def test_law_across_layers(name):
    """In a model of three layers, what layers hand to each other does not depend on where the sequence is cut."""
    config = ModelConfig(
        vocab_size=11, targets=11, width=16, depth=3, length=12, channel_mixer="none", pattern=(name,),
        mixer={name: mixers.find(name).tiny},
    )  # fmt: skip
    graph, params = nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))
    ids = np.random.default_rng(0).integers(0, 11, (BATCH, 12))
    run = jax.jit(lambda params, ids, carry=None: nnx.merge(graph, params)(ids, carry))
    carry = nnx.merge(graph, params).initial_carry(BATCH, 12)
    outputs = []
    for piece in (ids[:, :6], ids[:, 6:]):
        y, carry = run(params, piece, carry)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, 1), run(params, ids)[0])


def test_refusals():
    """Asking for what is not there names the mixer and the capability."""
    x = jnp.zeros((1, 4, WIDTH))
    for name in mixers.names():
        cls = mixers.find(name)
        mixer = sketch(name, causal=cls.causal)
        if not cls.streaming:
            with pytest.raises(ValueError, match=f"{name}.*streaming"):
                mixer.initial_carry(1, 4)
        if not (cls.packing or cls.padding):
            with pytest.raises(ValueError, match=f"{name}.*padding"):
                mixer(x, segment_ids=jnp.ones((1, 4), jnp.int32))
        if not cls.causal:
            with pytest.raises(ValueError, match=f"{name}.*not causal"):
                mixers.create(name, WIDTH, rngs=nnx.Rngs(0))
        else:
            mixer = sketch(name, causal=False)
            with pytest.raises(ValueError, match="causal=True" if cls.streaming else "streaming"):
                if isinstance(mixer, mixers.Bidirectional):
                    mixer(x, {"segment": jnp.zeros(1, jnp.int32)})
                    raise ValueError("streaming")
                mixer.initial_carry(1, 4)


def test_declared_lacks_are_refused(monkeypatch):
    """A mixer that declares that it lacks something is not asked for it, whatever its equations would do."""
    graph, params = build("gla")
    for lacks, call in (
        (("padding", "packing"), lambda mixer, x: mixer(x, segment_ids=jnp.ones((1, 4), jnp.int32))),
        (("streaming",), lambda mixer, x: mixer.initial_carry(1, 4)),
    ):
        with monkeypatch.context() as patch:
            for capability in lacks:
                patch.setattr(mixers.find("gla"), capability, False)
            with pytest.raises(ValueError, match=f"'gla' has {lacks[0]}=False"):
                call(nnx.merge(graph, params), jnp.zeros((1, 4, WIDTH)))
    monkeypatch.setattr(mixers.find("gla"), "causal", False)
    with pytest.raises(ValueError, match="'gla' is not causal"):
        mixers.create("gla", WIDTH, rngs=nnx.Rngs(0))


def test_finding():
    """Unknown mixers and hyperparameters are errors that name the near ones."""
    with pytest.raises(ValueError, match="mamba"):
        mixers.find("mambo")
    with pytest.raises(ValueError, match="did you mean 'state'"):
        mixers.create("mamba", WIDTH, rngs=nnx.Rngs(0), sate=4)


@pytest.mark.parametrize(
    "name,width,wrong,message",
    [
        ("attention", 30, {"heads": 4}, "width 30 cannot be divided into 4 heads; change it or `heads`"),
        ("attention", 32, {"kv_heads": 3}, "query heads 4 cannot be divided into 3 kv_heads; change it or `kv_heads`"),
        ("attention", 32, {"head_channels": 3}, "must be even.*got 3; change `head_channels`"),
        ("attention", 12, {"heads": 4}, "must be even.*got 3; change `heads`"),
        ("mamba2", 32, {"heads": 4, "groups": 3}, "change it or `groups`"),
        ("retnet", 12, {"heads": 4}, "must be even.*got 3; change `heads`"),
        ("gau", 32, {"key_size": 7}, "`key_size` must be an even number, 2 or more, got 7"),
        ("s5", 64, {"blocks": 7}, "s5's state .* cannot be divided into 7 blocks; change it or `blocks`"),
    ],
)
def test_indivisible_sizes(name, width, wrong, message):
    """The message names the hyperparameter that was given."""
    with pytest.raises(UserError, match=message):
        mixers.create(name, width, rngs=nnx.Rngs(0), **wrong)


@pytest.mark.parametrize("name", mixers.names())
def test_declaration(name):
    """Every mixer says where it comes from, and its defaults are complete and typed."""
    cls = mixers.find(name)
    assert "arXiv" in cls.paper and cls.primitive and cls.complexity and cls.__doc__
    assert cls.padding or not cls.packing
    config = mixers.defaults(name)
    for key, value in config.items():
        kind = config.get_type(key)
        assert kind in (int, float, bool, str, tuple), f"{name}.{key} = {value!r}"


@pytest.mark.parametrize("name", mixers.names())
def test_hyperparameters_as_used(name):
    """With all its defaults given, those that its constructor computes included, the mixer is the same."""

    def make(hyperparameters):
        """The mixer, and the program that draws its parameters."""
        made = []

        def draw(key):
            made.append(mixers.create(name, 64, rngs=nnx.Rngs(key), causal=mixers.find(name).causal, **hyperparameters))
            return nnx.state(made[0])

        program = str(jax.make_jaxpr(draw)(jax.random.key(0)))
        return made[0], (nnx.graphdef(made[0]), program)

    mixer, expected = make({})
    used = mixers.as_used(mixer, {})
    assert list(used) == list(mixers.defaults(name))
    assert all(value is not None or hasattr(mixer, key) for key, value in used.items()), "see `Mixer`"
    assert make(used)[1] == expected

"""Diagnostics of a trained model against closed forms: maps, influences, spectra, and the files of a run."""

import dataclasses
import errno
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from configs import lm
from evaluation import diagnosing
from evaluation.diagnostics import influence, measures, probing, record, spectra
from evaluation.loading import LoadedRun
from models import mixer as mixers
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from models.stack import repeat_of
from tests.tolerance import assert_close
from training import setup
from training.config import resolve

MAPS = [
    ("attention", {"kv_heads": 2, "qk_norm": True}, True),
    ("attention", {"positions": "alibi"}, False),
    ("local_attention", {"window": 5}, True),
    ("local_attention", {"window": 4, "kv_heads": 2}, False),
    ("linear_attention", {}, True),
    ("cosformer", {"length": 20}, True),
    ("norm_attention", {}, True),
    ("performer", {"features": 32}, True),
    ("performer", {"features": 32, "kernel": "relu"}, False),
]


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name, options, causal", MAPS, ids=lambda value: value if isinstance(value, str) else "")
def test_scores_are_those_of_the_mixer(name, options, causal):
    """What a mixer says of its scores gives its output; d p / d s is what automatic differentiation finds."""
    mixer = mixers.create(name, 16, rngs=nnx.Rngs(0), causal=causal, **options)
    x, positions = normal(2, 14, 16), jnp.broadcast_to(jnp.arange(14), (2, 14))
    kind = measures.score_gradients(mixer, x, None, positions)[1]

    def weights(scores):
        if kind == "softmax":
            return jax.nn.softmax(scores, -1)
        scores = jnp.where(scores > -jnp.inf, scores, 0)
        # cosFormer's first token may have a sum of zero, and then an output of zero.
        return scores / jnp.maximum(jnp.sum(scores, -1, keepdims=True), 1e-6) if kind == "sum" else scores

    @jax.jit
    def expect():
        scores, _ = mixer.attention_scores(x, segment_ids=None, positions=positions)
        if causal:
            scores = jnp.where(jnp.tri(14, dtype=bool), scores, -jnp.inf)
        v = jnp.einsum("btd,dhk->bthk", x, mixer.w_v[...] if hasattr(mixer, "w_v") else mixer.w_qkv[:, 2])
        v = jnp.repeat(v, scores.shape[1] // v.shape[2], axis=2)
        y = jnp.einsum("bhts,bshk->bthk", weights(scores), v)
        if name == "norm_attention":
            y = y / jnp.sqrt(jnp.mean(jnp.square(y), (2, 3), keepdims=True))
        shift = lambda e, i: weights(scores + e * (jnp.arange(14) == i))[..., i]
        slopes = [jax.jvp(lambda e, i=i: shift(e, i), (0.0,), (1.0,))[1] for i in range(14)]
        return scores, jnp.einsum("bthk,hkd->btd", y, mixer.w_o[...]), mixer(x)[0], jnp.stack(slopes, -1)

    scores, y, mixed, slopes = map(np.asarray, expect())
    # Performer's scores leave out its eps.
    assert_close(mixed, y, 1e-3 if name == "performer" else 1e-5)
    found, _ = measures.score_gradients(mixer, x, None, positions)
    seen, defined = scores > -np.inf, np.isfinite(found)
    assert defined.mean() > 0.9
    assert_close(found[defined], np.abs(slopes[seen][defined]), 1e-4)
    if kind == "softmax":
        p = np.asarray(weights(scores))[seen]
        assert_close(found, p * (1 - p))
        assert found.max() <= 0.25


def test_score_gradients_stay_in_documents():
    """Pairs are those of the same document, and padding has none."""
    mixer = mixers.create("linear_attention", 8, rngs=nnx.Rngs(0))
    ids, positions = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.array([[0, 1, 2, 0, 1, 0]])
    found, kind = measures.score_gradients(mixer, normal(1, 6, 8), ids, positions)
    assert kind == "sum" and found.shape == (4 * (6 + 3),)


def test_influence_is_the_jacobian():
    """The estimate approaches the Jacobian's norms, and is exactly 0 outside the window."""
    mixer = mixers.create("local_attention", 8, rngs=nnx.Rngs(0), window=4)
    x, at = normal(1, 12, 8), np.array([0, 5, 11])
    found = influence.influence(influence.mixer_outputs, (mixer, {}), x, at, jax.random.key(1), 400)
    jacobian = jax.jit(jax.jacrev(lambda x: mixer(x)[0]))(x)[0, :, :, 0]
    expected = np.sqrt(np.sum(np.square(jacobian), (1, 3)))[at]
    assert_close(found[0], expected, 0.15)
    distance = at[:, None] - np.arange(12)
    assert (np.asarray(found[0])[(distance < 0) | (distance >= 4)] == 0).all()
    assert (np.asarray(found[0])[(distance >= 0) & (distance < 4)] > 0).all()


def test_locality_of_known_maps():
    """Equal influence of all tokens before, of one token only, and of tokens that do not count."""
    at = np.array([9, 19])
    even = np.stack([np.arange(20) <= t for t in at])[None] * 3.0
    found = influence.locality(even, at, np.ones((1, 20)), True)
    assert found["mean_distance"] == pytest.approx((4.5 + 9.5) / 2)
    assert found["entropy"] == pytest.approx((np.log(10) + np.log(20)) / 2)
    assert found["within"]["4"] == pytest.approx((5 / 10 + 5 / 20) / 2)
    assert found["within"]["19"] == pytest.approx(1) and found["profile"] == pytest.approx([3.0] * 20)
    one = np.stack([np.arange(20) == t - 3 for t in at])[None] * 1.0
    found = influence.locality(one, at, np.ones((1, 20)), True)
    assert found["cover"] == {"50": 3, "90": 3, "99": 3} and found["entropy"] == 0
    assert influence.locality(one, at, np.zeros((1, 20)), True)["mean_distance"] is None


def build(config):
    return jax.jit(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))()


def batch_of(length, vocabulary=11, rows=2):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, (rows, length + 1))
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((rows, length), np.float32)}


def test_a_local_model():
    """A layer with a window sees no further, its buffer forgets everything, and gradients are those of the model by hand."""
    options = {"mixer": {"local_attention": {"window": 4}}, "channel_mixer": "none", "length": 20}
    config = ModelConfig(11, 11, width=16, depth=1, pattern=("local_attention",), **options)
    model, batch = build(config), batch_of(20)
    result = measures.measure(model, ["local_attention"], batch, causal=True, queries=4, probes=2, tokens=1)
    assert not any(result["receptive_field"]["profile"][4:]) and all(result["receptive_field"]["profile"][:4])
    assert result["receptive_field"]["cover"]["99"] <= 3
    (layer,) = result["layers"]
    assert layer["locality"]["within"]["4"] == pytest.approx(1)
    assert layer["spectrum"]["zeros"] == 1 and layer["spectrum"]["state"] == 3 * 2 * 16
    assert layer["score_gradient"]["max"] <= 0.25

    block = repeat_of(model.stack.stacked, 0).blocks[0]
    x = model.embedding[...][batch["inputs"]]

    def loss(h):
        z = model.norm(x + block.mixer(h)[0]) @ model.embedding[...].T
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), batch["targets"][..., None], -1))

    norms = np.linalg.norm(jax.jit(jax.grad(loss))(block.mixer_norm(x)), axis=-1)
    assert layer["token_gradient"]["relative_std"] == pytest.approx(norms.std() / norms.mean(), rel=1e-4)
    assert layer["token_gradient"]["max_over_mean"] == pytest.approx(norms.max() / norms.mean(), rel=1e-4)


def test_spectra_are_the_closed_forms():
    """The eigenvalues of four kinds of recurrences, from their parameters and the real input of the last token."""
    names = ["lru", "s4d", "gla", "gated_delta_net"]
    options = {"s4d": {"state": 4}, "gla": {"heads": 2}, "gated_delta_net": {"heads": 2, "negative_eigenvalues": True}}
    config = ModelConfig(11, 11, width=8, depth=4, pattern=tuple(names), mixer=options, length=9)
    model, batch = build(config), batch_of(9)
    lru, s4d, gla, delta = layers = probing.unstack(model)

    @jax.jit
    def inputs():
        own, seen = nnx.clone(model), []
        own.stack = probing.Unrolled(own.stack, lambda layer, x, carry, **call: (x, seen.append(x[0, -1]))[0])
        own(batch["inputs"][:1])
        return seen

    x = [np.asarray(one) for one in inputs()]
    found = spectra.layer_spectra(model, layers, batch, True, tokens=1, limit=10**4, seed=0)

    both = lambda z: np.concatenate([np.ravel(z), np.conj(np.ravel(z))])
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    decay = sigmoid((x[2] @ gla.w_decay_in[...]) @ gla.w_decay_out[...].reshape(-1, 4) + gla.b_decay[...].ravel())
    _, key, value = delta.sizes
    beta = 2 * sigmoid(x[3] @ delta.w_b[...])
    alpha = np.exp(-np.exp(delta.a_log[...]) * np.logaddexp(0, x[3] @ delta.w_a[...] + delta.dt_bias[...]))
    dt = np.exp(s4d.log_dt[...])[:, None]
    expected = [
        both(np.exp(-np.exp(lru.nu_log[...]) + 1j * np.exp(lru.theta_log[...]))),
        both(np.exp(dt * (-np.exp(s4d.log_a_real[...]) + 1j * np.asarray(s4d.a_imag[...])))),
        np.repeat(decay ** (1 / 16), gla.sizes[-1]),
        np.repeat(np.concatenate([alpha * (1 - beta), np.repeat(alpha, key - 1)]), value),
    ]
    for name, result, values in zip(names, found, expected):
        eigenvalues = np.array(result["eigenvalues"]) @ [1, 1j]
        # The delta rule's keys, normalised with an eps, are not quite 1 long.
        tolerance = 1e-3 if name == "gated_delta_net" else 1e-5
        assert_close(np.sort(np.abs(eigenvalues)), np.sort(np.abs(values)), tolerance, name)
        assert_close(np.sort(eigenvalues.real), np.sort(values.real), tolerance, name)
        assert_close(np.sort(eigenvalues.imag) + 1, np.sort(np.imag(values)) + 1, 1e-5, name)
        assert result["sampled"] == result["state"] and not result["left_out"]
    buffers = 3 * 2 * (2 * key + value)
    assert found[3]["zeros"] == pytest.approx(buffers / (buffers + 2 * key * value))
    median = np.percentile(np.abs(expected[2]), 50)
    assert found[2]["time_scale"]["50"] == pytest.approx(-1 / np.log(median), rel=1e-3)


def test_spectrum_of_a_large_matrix():
    """Whole parts of a matrix give some of its eigenvalues; parts too large for the limit are counted, not guessed."""
    rng = np.random.default_rng(0)
    matrix = np.zeros((900, 900))
    for start in range(0, 300, 3):
        matrix[start : start + 3, start : start + 3] = rng.normal(size=(3, 3))
    matrix[300:400, 300:400] = np.eye(100, k=1)
    matrix[:300, 300:400] = rng.normal(size=(300, 100)) * (rng.random((300, 100)) < 0.02)
    shuffle = rng.permutation(900)
    small = matrix[:400, :400][np.ix_(shuffle[shuffle < 400], shuffle[shuffle < 400])]
    values, left = spectra.eigenvalues(lambda i: small[i], 400, 400, rng)
    exact = np.concatenate([np.linalg.eigvals(matrix[i : i + 3, i : i + 3]) for i in range(0, 300, 3)])
    assert left == 0 and np.sum(values == 0) == 100
    assert_close(np.sort(np.abs(values))[100:], np.sort(np.abs(exact)))
    matrix[400:, 400:] = rng.normal(size=(500, 500))
    values, left = spectra.eigenvalues(lambda i: matrix[i], 900, 300, rng)
    assert left > 0 and len(values) > 0
    assert all(np.abs(value - np.append(exact, 0)).min() < 1e-6 for value in values)
    none = spectra.eigenvalues(lambda i: matrix[400 + i, 400:], 500, 200, rng)
    assert len(none[0]) == 0 and "500 numbers" in spectra.describe([(500, *none)])["skipped"]
    empty = spectra.eigenvalues(lambda i: matrix[i], 0, 200, rng)
    assert spectra.describe([(0, *empty)]) == {"skipped": spectra.EMPTY}


def nest(tree):
    return {str(key): nest(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A run of packed documents, of no training, with two kinds of mixers."""
    folder = tmp_path_factory.mktemp("documents")
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"document number {i} " * (3 + i % 5))
    config = lm.get_config("mixer=attention+min_gru")
    config.task.update({"corpus": f"file:{folder}", "length": 24, "packing": "documents"})
    config.model.update({"width": 8, "depth": 2})
    config = resolve(config)
    built = setup.build(config, for_training=False)
    params = nest(nnx.to_pure_dict(nnx.state(build(config.model))))
    return LoadedRun(config, built, params, tmp_path_factory.mktemp("run"), step=2, data=config.task.fingerprint())


def test_diagnostics_of_a_run(documents, capsys, monkeypatch):
    """A model of packed documents: JSON, plots and a table; again for the same step, never over another's."""
    run, made = documents, documents.workdir / "diagnostics"
    with pytest.raises(UserError, match="one length"):
        diagnosing.diagnose(run, [24, 48])
    diagnosing.diagnose(run)
    printed = capsys.readouterr().out
    assert "0 attention" in printed and "1 min_gru" in printed and "receptive field" in printed
    result = json.loads((made / record.FILE).read_text())
    assert result["step"] == 2 and [layer["mixer"] for layer in result["layers"]] == ["attention", "min_gru"]
    assert result["length"] == 24 and result["data"] == run.data
    assert result["layers"][0]["spectrum"] == {"skipped": spectra.GROWS}
    assert result["layers"][1]["spectrum"]["modulus"]["100"] < 1
    names = {f"{name}.png" for name in ("locality", "gradients", "receptive_field", "spectra")}
    installed = importlib.util.find_spec("matplotlib") is not None
    assert {path.name for path in made.iterdir()} == {record.FILE} | (names if installed else set())

    (made / "notes.txt").write_text("of a reader")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in record.save(result, made)
    assert json.loads((made / record.FILE).read_text()) == result
    assert {path.name for path in made.iterdir()} == {record.FILE, "notes.txt"}, "plots of other numbers are gone"
    assert [path.name for path in run.workdir.iterdir()] == ["diagnostics"]

    before = (made / record.FILE).read_bytes()
    others = [({"step": 1}, [], "step 2, this is step 1"), ({}, [12], "length 24, this is length 12")]
    for changes, lengths, message in [*others, ({"data": "of another text"}, [], "this is data of another text")]:
        with pytest.raises(UserError, match=message):
            diagnosing.diagnose(dataclasses.replace(run, **changes), lengths)
    assert (made / record.FILE).read_bytes() == before


def test_a_folder_that_cannot_be_written(documents, tmp_path, monkeypatch):
    """It is found out before anything is computed, and what fails later leaves the old folder as it was."""
    run = dataclasses.replace(documents, workdir=tmp_path)
    monkeypatch.setattr(diagnosing, "measure", lambda *args, **options: pytest.fail("computed"))
    (tmp_path / "diagnostics").write_text("a file")
    with pytest.raises(UserError, match="diagnostics is no directory"):
        diagnosing.diagnose(run)
    (tmp_path / "diagnostics").unlink()

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record.tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}.*: No space left"):
        diagnosing.diagnose(run)
    assert not list(tmp_path.iterdir())

    folder = tmp_path / "diagnostics"
    folder.mkdir()
    (folder / record.FILE).write_text("{}")
    (folder / "notes.txt").write_text("of a reader")
    monkeypatch.setattr(record, "PLOTS", {})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        record.save({"step": 2}, folder)
    assert (folder / record.FILE).read_bytes() == b"{}" and list(tmp_path.iterdir()) == [folder]
    assert sorted(path.name for path in folder.iterdir()) == [record.FILE, "notes.txt"]


def test_a_stop_amid_diagnostics_takes_nothing_away(tmp_path, monkeypatch):
    """Ctrl-C may come at any place: what lies in the folder, a reader's own files too, stays."""
    folder = tmp_path / "diagnostics"
    folder.mkdir()
    for name in (record.FILE, "notes.txt"):
        (folder / name).write_text("{}")
    monkeypatch.setattr(record, "PLOTS", {})

    rename, done = record.Path.rename, []

    def stop(source, target):
        if done or target == folder / record.FILE:
            raise KeyboardInterrupt
        done.append(rename(source, target))

    monkeypatch.setattr(record.Path, "rename", stop)
    monkeypatch.setattr(record.Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        record.save({"step": 2}, folder)
    assert sorted(path.name for path in folder.iterdir()) == [record.FILE, "notes.txt"]

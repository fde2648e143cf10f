"""Checkpoints: what is read is bit for bit what was saved, on any mesh, or it is reported."""

import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from training.checkpoints import CheckpointError, Checkpoints

SPECS = {"params/w": ("a", "b"), "params/b": ("b",), "opt/0/m": (None, "a"), "opt/0/v": ("b", "a")}


def mesh_of(*shape: int) -> Mesh:
    count = int(np.prod(shape))
    return jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])


def place(tree, mesh: Mesh, make=jax.device_put):
    def one(path, x):
        spec = SPECS.get(jax.tree_util.keystr(path, simple=True, separator="/"), ())
        return make(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(one, tree)


def make_state(seed: int = 0, width: int = 512):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(8, width)).astype(np.float32), "b": rng.normal(size=8).astype(jnp.bfloat16)}
    moments = {"m": rng.normal(size=(3, 8)).astype(np.float32), "v": rng.integers(0, 99, (8, 8)).astype(np.int8)}
    opt = (moments, (), None, np.int32(seed))
    state = {"params": params, "opt": opt, "rng": jax.random.key(seed), "step": np.int32(seed), "flag": np.bool_(True)}
    return place(state, mesh_of(2, 4))


def abstract(state, mesh: Mesh):
    return place(state, mesh, lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s))


def same(left, right) -> bool:
    def bits(x):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return x.dtype, x.shape, np.asarray(x).tobytes()

    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        bits(a) == bits(b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


STATE = make_state(0)
HERE = abstract(STATE, mesh_of(2, 4))
STATES = {step: make_state(step) for step in (1, 2, 3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints 1 and 2."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, STATES[step], {"tokens": 10 * step, "name": "x"}, score=1.0 / step)
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restores_first(directory: Path, capsys, why: str) -> None:
    """Checkpoint 2 is reported and set aside, 1 is used, and 2 can be saved again."""
    before = sum(path.is_file() for path in (directory / "2").rglob("*"))
    checkpoints = Checkpoints(directory)
    restored = checkpoints.restore(HERE)
    assert restored.step == 1 and restored.metadata == {"tokens": 10, "name": "x"} and same(restored.state, STATES[1])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert (
        printed.startswith("checkpoint 2 is damaged, kept as 2.damaged (")
        and why in printed
        and "from checkpoint 1" in printed
    )
    assert checkpoints.steps() == [1] and sum(path.is_file() for path in (directory / "2.damaged").rglob("*")) == before
    checkpoints.save(2, STATES[2], {}, score=0.1)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2] and checkpoints.best_step() == 2
    assert same(Checkpoints(directory).restore(HERE).state, STATES[2])


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (1, 1), (8, 1), (1, 2)])
def test_round_trip_on_every_mesh(saved, shape):
    there = abstract(STATE, mesh_of(*shape))
    restored = Checkpoints(saved).restore(there)
    assert restored.step == 2 and restored.metadata == {"tokens": 20, "name": "x"}
    assert same(restored.state, STATES[2])
    assert all(
        x.sharding == a.sharding for x, a in zip(jax.tree.leaves(restored.state), jax.tree.leaves(there), strict=True)
    )
    draws = [np.asarray(jax.random.bits(s["rng"], (4,))) for s in (restored.state, STATES[2])]
    np.testing.assert_array_equal(*draws)


def test_parameters_alone(saved, tmp_path):
    params = abstract(STATE, mesh_of(1, 2))["params"]
    checkpoints = Checkpoints(saved)
    for step, want in {"latest": 2, "best": 2, 1: 1}.items():
        restored = checkpoints.restore_params(params, step)
        assert restored.step == want and same(restored.state, STATES[want]["params"])
        assert restored.metadata["tokens"] == 10 * want
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(CheckpointError, match=r"there are no checkpoints in .*nothing"):
        Checkpoints(tmp_path / "nothing").restore_params(params)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("part", ["metadata", "state/**/d"])
def test_parameters_of_any_model_of_a_damaged_checkpoint(directory, capsys, part):
    """Whatever of the newest is damaged, the one before is used, and it is said."""
    for path in (directory / "2").glob(part):
        shutil.rmtree(path)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints = Checkpoints(directory)
    restored = checkpoints.restore_any_params(sharding)
    assert restored.step == 1 and same(restored.state, STATES[1]["params"])
    printed = capsys.readouterr().out
    assert printed.startswith("checkpoint 2 is damaged (") and printed.endswith("); using checkpoint 1\n")
    with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* is damaged"):
        checkpoints.restore_any_params(sharding, 2)
    (directory / "1" / "metadata" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .* \(2: .*; 1: no readable metadata"):
        checkpoints.restore_any_params(sharding)
    assert checkpoints.steps() == [1, 2]
    with pytest.raises(CheckpointError, match=r"there are no checkpoints in .*nothing"):
        Checkpoints(directory / "nothing").restore_any_params(sharding)


def test_parameters_of_a_damaged_checkpoint(directory, capsys):
    (directory / "2" / "metadata" / "metadata").unlink()
    checkpoints = Checkpoints(directory)
    params = HERE["params"]
    assert same(checkpoints.restore_params(params).state, STATES[1]["params"])
    assert "checkpoint 2 is damaged (no readable metadata" in capsys.readouterr().out
    assert checkpoints.steps() == [1, 2]  # a reader renames nothing
    with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* is damaged: no readable metadata"):
        checkpoints.restore_params(params, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint 7 in .*; there are \[1, 2\]"):
        checkpoints.restore_params(params, 7)
    assert checkpoints.restore_params(params, "best").step == 1


def data_files(directory: Path) -> list[Path]:
    return sorted((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size, reverse=True)


def test_no_flipped_byte_passes(saved, tmp_path):
    """Whichever byte of whichever file is changed: either nothing was lost, or checkpoint 2 is not used."""
    rng = np.random.default_rng(0)
    noticed = {}
    for file in data_files(saved / "2"):
        name, content = file.relative_to(saved / "2"), file.read_bytes()
        noticed[name] = []
        for position in rng.integers(0, len(content), 1):
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            try:
                state = Checkpoints(saved).restore(HERE, 2).state
                assert same(state, STATES[2]), (name, position)
                noticed[name].append(False)
            except CheckpointError as error:
                assert "checkpoint 2 in" in str(error) and "\n" not in str(error)
                noticed[name].append(True)
            finally:
                file.write_bytes(content)
    assert sum(map(any, noticed.values())) >= 4  # values, their index, the tree, the metadata
    assert same(Checkpoints(saved).restore(HERE).state, STATES[2])


@pytest.mark.parametrize("where", ["state/ocdbt.process_0/d", "state/d", "metadata"])
def test_flipped_byte_in_large_files(directory, capsys, where):
    file = data_files(directory / "2" / where)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)
    restores_first(directory, capsys, "")


def test_changed_values_in_valid_files(directory, capsys):
    """What only the checksums can see: every file of the arrays is well formed, but it is another state's."""
    shutil.rmtree(directory / "2" / "state")
    shutil.copytree(directory / "1" / "state", directory / "2" / "state")
    restores_first(directory, capsys, "the bytes of opt/0/m have changed since it was written")


def test_changed_metadata(directory, capsys):
    file = directory / "2" / "metadata" / "metadata"
    file.write_text(file.read_text().replace('"tokens": 20', '"tokens": 30'))
    restores_first(directory, capsys, "its metadata has changed")


def test_truncated_file(directory, capsys):
    for file in data_files(directory / "2" / "state"):
        if file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    restores_first(directory, capsys, "its arrays cannot be read: ")


@pytest.mark.parametrize("missing", ["metadata", "state", "state/manifest.ocdbt", "state/_METADATA", "*"])
def test_missing_parts(directory, capsys, missing):
    for path in (directory / "2").glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    restores_first(
        directory, capsys, "its arrays cannot be read" if missing.startswith("state") else "no readable metadata"
    )


def test_all_damaged(directory):
    for step in "12":
        (directory / step / "metadata" / "metadata").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"no intact checkpoint in .* \(2: no readable metadata.*; 1: no readable"
    ):
        Checkpoints(directory).restore(HERE)
    assert Checkpoints(directory).steps() == [1, 2]  # nothing is renamed unless there is something to go on from


def test_interrupted_save(directory):
    left = [directory / f"{step}.orbax-checkpoint-tmp" for step in (3, 7)]
    for path in left:
        shutil.copytree(directory / "2" / "state", path / "state")
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [1, 2] and checkpoints.restore(HERE).step == 2
    checkpoints.save(3, STATES[3], {})
    checkpoints.close()
    assert not any(path.exists() for path in left) and checkpoints.steps() == [2, 3]
    assert same(Checkpoints(directory).restore(HERE).state, STATES[3])


def test_keeps_the_newest_and_the_best(tmp_path):
    metrics = {1: 3.0, 2: float("nan"), 3: 1.0, 4: None, 5: 2.0, 6: 1.5, 7: float("inf"), 8: 1.0, 9: 4.0, 10: 5.0}
    on_disk = {3: [2, 3], 5: [3, 4, 5], 7: [3, 6, 7], 8: [7, 8], 10: [8, 9, 10]}
    checkpoints = Checkpoints(tmp_path)
    for step, metric in metrics.items():
        if step == 5:  # a new launch knows what the old one kept
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path)
        checkpoints.save(step, {"params": {"w": jnp.float32(step)}}, {}, metric)
        if step in on_disk:
            checkpoints.wait()
            assert checkpoints.steps() == on_disk[step]
    assert checkpoints.best_step() == 8 and Checkpoints(tmp_path).best_step() == 8
    checkpoints.close()
    assert Checkpoints(tmp_path, higher_is_better=True).best_step() == 10


def test_which_score_improves(tmp_path):
    """Only a finite score that is better than all before, in the metric's own direction."""
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    for higher, better, worse in ((False, 0.5, 1.5), (True, 1.5, 0.5)):
        checkpoints = Checkpoints(tmp_path / str(higher), higher_is_better=higher)
        assert checkpoints.improves(1.0) and not checkpoints.improves(float("nan"))
        checkpoints.save(1, {"params": {"w": jnp.ones(1)}}, {}, 1.0)
        found = [checkpoints.improves(score) for score in (better, worse, 1.0, float("inf"), float("-inf"))]
        assert found == [True, False, False, False, False]
        checkpoints.close()


def test_a_best_that_cannot_be_read_is_said(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"params": {"w": jnp.full(1, step)}}, {}, float(step))
    checkpoints.close()
    (tmp_path / "1" / "metadata").rename(tmp_path / "moved")
    assert Checkpoints(tmp_path).best_step() == 2
    assert "checkpoint 1 is damaged (no readable metadata" in capsys.readouterr().out


def test_scores_of_older_code(tmp_path):
    """It wrote minus the score where a higher one is better."""
    checkpoints = Checkpoints(tmp_path, higher_is_better=True)
    assert checkpoints._score({"metric": -0.75}) == 0.75 and checkpoints._score({"metric": None}) is None
    assert Checkpoints(tmp_path)._score({"metric": 1.5}) == 1.5


def test_no_metric_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"w": jnp.ones(2)}}, {})
    checkpoints.close()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* has a score"):
        checkpoints.restore_params({"w": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)}, "best")
    with pytest.raises(ValueError, match="abstract leaf params/w has no sharding"):
        checkpoints.restore_params({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_another_model(directory):
    def error(change) -> str:
        tree = jax.tree.map(lambda x: x, HERE)
        change(tree)
        with pytest.raises(CheckpointError) as info:
            Checkpoints(directory).restore(tree)
        return str(info.value)

    like = HERE["params"]["w"]
    other = lambda shape, dtype=like.dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=like.sharding)
    shape = error(lambda t: t["params"].update(w=other((8, 1024))))
    assert f"checkpoint 2 in {directory} is of another model: params/w is float32[8,512] in the checkpoint" in shape
    assert shape.endswith("and float32[8,1024] in this model")
    assert "params/w is float32[8,512] in the checkpoint and bfloat16[8,512]" in error(
        lambda t: t["params"].update(w=other((8, 512), jnp.bfloat16))
    )
    assert "params/new is absent in the checkpoint" in error(lambda t: t["params"].update(new=other((4, 4))))
    assert "params/b is bfloat16[8] in the checkpoint and absent in this" in error(lambda t: t["params"].pop("b"))
    foreign = error(lambda t: (t.clear(), t.update(network=other((2, 2)))))
    assert (
        "network is absent in the checkpoint and float32[2,2]" in foreign and "(8 other leaves differ too)" in foreign
    )
    assert Checkpoints(directory).steps() == [1, 2]


def test_same_step_again(directory):
    checkpoints = Checkpoints(directory)
    checkpoints.save(2, STATES[2], {"anything": 1})
    with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* holds another state"):
        checkpoints.save(2, STATES[3], {})
    (directory / "2" / "metadata" / "metadata").unlink()
    checkpoints.save(2, STATES[3], {})
    checkpoints.close()
    assert (directory / "2.damaged").is_dir() and same(Checkpoints(directory).restore(HERE, 2).state, STATES[3])


def test_a_score_that_comes_later(directory):
    """It is added to the checkpoint, which stays intact; one that is there is not replaced."""
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, STATES[3], {})
    assert checkpoints.best_step() == 2
    for score in (0.1, 0.9):
        checkpoints.save(3, STATES[3], {}, score)
    checkpoints.close()
    again = Checkpoints(directory)
    assert again.best_step() == 3 and not again.improves(0.2) and again.restore(HERE).step == 3


def test_going_on_from_an_older_step(directory):
    checkpoints = Checkpoints(directory)
    assert checkpoints.restore(HERE, 1).step == 1
    checkpoints.save(3, STATES[3], {})
    checkpoints.save(4, STATES[3], {})
    checkpoints.close()
    assert checkpoints.steps() == [2, 3, 4]  # 2 is the best


def test_state_may_be_donated_after_save(tmp_path):
    advance = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = {"params": {f"{i}": advance(jnp.full((1 << 18,), i, jnp.float32)) for i in range(4)}}
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in range(3):
        checkpoints.save(step, state, {})
        for _ in range(4):
            state = advance(state)
    checkpoints.close()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    for step in range(3):
        for i, x in checkpoints.restore(tree, step).state["params"].items():
            assert np.unique(x).tolist() == [int(i) + 1 + 4 * step]


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*file/checkpoints: "):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, {"params": {"w": jnp.ones(2)}}, {})


def test_full_disk(tmp_path):
    """A limit on the size of files stands in for it. The previous checkpoints stay, and later saves work."""
    numbers = np.random.default_rng(0).integers(0, 2**31, 1 << 18, dtype=np.int32)
    state = {"params": {"w": jnp.asarray(numbers)}}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*File too large"):
            checkpoints.save(2, state, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert checkpoints.steps() == [1]
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, state, {})
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_full_memory_is_no_damage(directory, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", full)
    with pytest.raises(jax.errors.JaxRuntimeError):
        Checkpoints(directory).restore(HERE)
    assert Checkpoints(directory).steps() == [1, 2]


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        Checkpoints(tmp_path).save(1, {"params": {"w": jnp.ones(2)}}, {"array": np.ones(2)})
    assert Checkpoints(tmp_path).steps() == []


def test_record_on_disk(directory):
    record = json.loads((directory / "2" / "metadata" / "metadata").read_text())["record"]
    assert record["step"] == 2 and record["score"] == 0.5 and record["metadata"] == {"tokens": 20, "name": "x"}
    assert record["leaves"]["params/w"]["type"] == "float32[8,512]" and record["leaves"]["rng"]["type"] == "key<fry>[]"
    assert len(record["leaves"]) == 8

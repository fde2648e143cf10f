"""Compiling for devices: names, what is missing, and the page; for the CPUs that are here, which need no other compiler."""

import dataclasses
import json
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import pytest

import eval as eval_program
import train as train_program
from common.errors import UserError
from compilation import commands, findings, report, steps, targets
from ops import dispatch
from training import command_line, config, sharding


def resolve(*settings: str, mixer: str = "retnet") -> config.Config:
    keys = [
        f"--config.{setting}"
        for setting in ("model.width=32", "model.depth=2", "task.length=64", "optimizer.name=adamw", *settings)
    ]
    return config.resolve(command_line.parse([f"--config=configs/lm.py:mixer={mixer}", *keys]), with_data=False)


@pytest.fixture(scope="module")
def here() -> targets.Target:
    """The eight fake devices, with little memory."""
    return targets.Target("cpu:8", jax.devices(), 2**30, "a number of this test")


@pytest.fixture(scope="module")
def found(here) -> findings.Findings:
    chosen = resolve("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "task.tokenizer=bpe:1000", "model.channel_size=63")
    return findings.compile_step(steps.train(chosen, here), here)


@pytest.mark.parametrize(
    "text, message",
    [
        ("h1000:8", "no device 'h1000'; did you mean 'h100'"),
        ("v5:4x4", "did you mean 'v5p' or 'v5e'"),
        ("v5e", "a topology of v5e has 2 sizes, as in v5e:4x4"),
        ("v5p:4x4", "has 3 sizes, as in v5p:4x4x4"),
        ("v5e:4xfour", "has 2 sizes"),
        ("v5e:0x4", "has 2 sizes"),
        ("h100:12", "more than 8 come in hosts of 8"),
        ("h100", "say how many, as in h100:8"),
    ],
)
def test_names_that_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        targets.parse(text)
    for program in (train_program, eval_program):
        with pytest.raises(UserError, match=message):
            program.main([f"--compile_for={text}", "--config=configs/lm.py"])


def test_names_that_are_known():
    assert targets.parse("v5e:16x16") == ("v5e", (16, 16))
    assert targets.parse("tpu7x:2x2x1") == ("tpu7x", (2, 2, 1))
    assert targets.parse("b200:16") == ("b200", (16,))


def test_what_is_missing_is_said_with_its_licence(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"pip install 'jax\[tpu\]==.*libtpu, .*licence .*https://cloud.google.com/terms"
    ):
        targets.find("v5e:2x2")
    with pytest.raises(UserError, match=rf"pip install jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=="):
        targets.find("h100:8")


def test_programs_of_another_compiler(monkeypatch, here):
    """jaxlib may not know what a newer libtpu writes: the message names both, and the compiler that belongs to this JAX."""
    unread = "INTERNAL: RET_CHECK failure async-update instruction should have 1 operands but sees 3"
    compiled = SimpleNamespace(as_text=Mock(side_effect=jax.errors.JaxRuntimeError(unread)))
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, **options: compiled)
    chosen = resolve("train.batch_size=8")
    with pytest.raises(
        UserError, match=rf"async-update .*jax {jax.__version__}, .*pip install -r requirements-aot.txt"
    ):
        findings.compile_step(steps.train(chosen, here), here)


def test_options_of_eval(capsys):
    with pytest.raises(UserError, match="give --workdir=DIR, a run, or --config=FILE"):
        eval_program.main(["--compile_for=v5e:2x2"])
    with pytest.raises(UserError, match="--config does not go with scoring"):
        eval_program.main(["--workdir=x", "--config=configs/lm.py"])
    with pytest.raises(UserError, match="--length does not go with --compile_for"):
        eval_program.main(["--compile_for=v5e:2x2", "--config=configs/lm.py", "--length=3"])
    with pytest.raises(UserError, match="--distributed does not go with --compile_for"):
        eval_program.main(["--compile_for=v5e:2x2", "--config=configs/lm.py", "--distributed"])
    with pytest.raises(UserError, match="--rows=3"):
        eval_program.main(["--workdir=x", "--rows=3"])


def test_options_of_train(tmp_path, monkeypatch):
    """The model that is compiled is that of --init_from; what has no effect is refused."""
    for option in ("--show_config", "--allow_other_data", "--distributed", "--num_processes=2", "--start_seconds=9"):
        with pytest.raises(UserError, match=f"{option.partition('=')[0]} does not go with --compile_for"):
            train_program.main(["--compile_for=v5e:2x2", option])
    shown = Mock(return_value=0)
    monkeypatch.setattr(commands, "show", shown)
    monkeypatch.setattr(targets, "find", lambda text: text)
    monkeypatch.setattr(train_program.command, "start", lambda *_, **__: None)
    (tmp_path / "config.json").write_text(json.dumps(resolve().raw))
    line = ["--compile_for=v5e:2x2", "--config.model.depth=1"]
    assert train_program.main([*line, f"--init_from={tmp_path}"]) == 0
    model = shown.call_args.args[0].model
    assert (model.pattern, model.width, model.depth) == (("retnet",), 32, 1)
    with pytest.raises(UserError, match="there is no run"):
        train_program.main([*line, f"--init_from={tmp_path / 'nowhere'}"])


def test_what_holds_memory(found):
    """Of every parameter that an axis splits, a device has a part; AdamW keeps two moments of each and counts its updates."""
    held = found.memory.held
    total = 4 * found.parameters
    assert total / 8 <= held["parameters"] <= total / 2
    assert held["optimizer"] == 2 * held["parameters"] + 2 * 4
    assert held["batch"] == 3 * 4 * (found.rows // 4) * 64  # inputs, targets and weights
    assert found.memory.fits and found.memory.peak > sum(held.values())


def test_what_the_mesh_leaves_whole(found):
    """63 hidden units do not divide by two; everything else does, or is small."""
    names = {whole.name.rpartition("/")[2]: whole for whole in found.whole if whole.axis == "tensor"}
    assert not any("channel_mixer" in whole.name for whole in found.whole)  # of 32 x 63 numbers: too small to be said
    assert not names


def test_large_parameters_that_are_whole_are_said(here):
    chosen = resolve("mesh.data=2", "mesh.tensor=4", "model.width=128", "model.channel_size=1023", "train.batch_size=2")
    built = steps.train(chosen, here).built
    parts = built.abstract["params"], built.metadata, built.mesh
    whole = sharding.left_whole(*parts)
    assert {(one.name.rpartition("/")[2], one.axis, one.reason) for one in whole} == {
        ("w_in", "tensor", "mlp=1023 does not divide by 4"),
        ("w_out", "tensor", "mlp=1023 does not divide by 4"),
    }
    assert whole[0].bytes == 4 * 2 * 128 * 2 * 1023
    (line,) = sharding.warnings(*parts)  # as a run says where it begins
    assert line.startswith("mesh.tensor leaves ") and line.endswith(
        " (3.0 MiB on each device): mlp=1023 does not divide by 4"
    )


def test_step_of_the_configuration(found):
    # Those of a CPU.
    assert found.forms == {"linear_attention": ["sequential"], "project": ["separated"], "unit_rows": ["halves"]}
    assert found.mesh == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1, "expert": 1}
    assert {products.operands for products in found.products} == {"f32"}
    reduced = {axis for t in found.traffic if t.kind in ("all-reduce", "reduce-scatter") for axis in t.axes.split(",")}
    assert reduced == {"data", "fsdp", "tensor"}


def test_page_and_record(found, tmp_path):
    text = report.page(found)
    for part in (
        "train step on cpu:8: 8 x cpu",
        "retnet",
        "fits: ",
        "a number of this test",
        "all-reduce",
        "optimizer",
    ):
        assert part in text
    path = report.write(found, tmp_path)
    assert path == tmp_path / "compiled" / "train-cpu-8.json"
    record = json.loads(path.read_text())
    assert record["fits"] and record["memory"]["held"] == found.memory.held
    assert record["mesh"] == found.mesh and record["traffic"][0]["bytes"] == found.traffic[0].bytes


def test_verdict_of_what_does_not_fit(found, here, tmp_path, monkeypatch, capsys):
    """A compiler that refuses says how much it needs; one that does not refuse is compared."""
    over = dataclasses.replace(found.memory, capacity=found.memory.peak - 2**30)
    refused = dataclasses.replace(
        found, memory=over, suggestions=["--config.model.remat=full"], refusal="RESOURCE_EXHAUSTED: so"
    )
    assert "does not fit: " in report.page(refused) and "1.00 GiB too many" in report.page(refused)
    assert "try --config.model.remat=full" in report.page(refused)
    unknown = dataclasses.replace(refused, memory=dataclasses.replace(over, peak=float("inf")))
    assert json.loads(report.write(unknown, tmp_path).read_text())["memory"]["peak"] is None
    for make, status in ((refused, 1), (found, 0)):
        monkeypatch.setattr(commands, "compile_step", lambda step, target, make=make: make)
        made = [lambda config, target: object(), lambda config, target: None]
        assert commands.show(None, here, made, None) == status
    assert capsys.readouterr().out.count("train step on") == 2


@pytest.mark.parametrize(
    "message, gib",
    [
        (
            "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (17.25G) exceeds "
            "available HBM (15.75G)",
            17.25,
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm. Exceeded by", 0.5),
        ("no number", float("inf")),
    ],
)
def test_what_a_refusal_says(message, gib):
    assert findings.needed(message) == gib * 2**30


def test_suggestions(here):
    step = steps.train(resolve("mesh.data=8", "train.batch_size=32"), here)
    memory = findings.Memory(1.0, 2.0, {"parameters": 0.5, "optimizer": 1.0})
    said = " ".join(findings._suggestions(step, memory))
    for part in (
        "model.remat=full",
        "train.loss_chunks=8",
        "train.accumulation=2 computes 2 of 4 rows",
        "mesh.fsdp=8 --config.mesh.data=1",
        "mesh.tensor=2",
    ):
        assert part in said
    step = steps.train(resolve("mesh.fsdp=8", "train.batch_size=8", "model.remat=full"), here)
    said = " ".join(findings._suggestions(step, memory))
    assert "remat" not in said and "accumulation" not in said and "mesh.fsdp" not in said
    step = steps.train(resolve("train.batch_size=8"), dataclasses.replace(here, devices=here.devices[:1]))
    assert "mesh" not in " ".join(findings._suggestions(step, memory)), "one device splits nothing"


def test_batches_that_do_not_divide_are_refused(here):
    with pytest.raises(UserError, match=r"batch_size=6 does not divide over mesh.data \* mesh.fsdp \* mesh.expert = 8"):
        steps.train(resolve("mesh.data=8", "train.batch_size=6"), here)


def test_score_and_decode(here):
    chosen = resolve("mesh.data=4", "mesh.tensor=2", "train.batch_size=8")
    made = [findings.compile_step(make(chosen, here), here) for make in (steps.score, steps.decode)]
    score, decode = made
    assert (score.step, score.rows, set(score.memory.held)) == ("score", 8, {"parameters", "batch"})
    assert (decode.step, set(decode.memory.held)) == ("decode", {"parameters", "carry, if not split"})
    assert not any(t.kind == "all-reduce" and "data" in t.axes for t in decode.traffic)
    pooled = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, head="pooled"))
    assert steps.decode(pooled, here) is None


def test_programs_are_traced_for_their_devices(here, monkeypatch):
    """The forms follow the devices of the mesh and not this machine: here a CPU's devices say that they are TPUs."""
    step = steps.train(resolve("mesh.data=8", "train.batch_size=8", mixer="s5"), here)
    entered = []
    own = dispatch.platform
    monkeypatch.setattr(dispatch, "platform", lambda name: entered.append(name) or own("tpu"))
    with jax.set_mesh(step.built.mesh), dispatch.implementation("auto") as choice:
        step.function.trace(*step.arguments)
    assert set(entered) == {"cpu"} and choice.taken["linear_recurrence"] == {"pallas"}

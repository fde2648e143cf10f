"""Runs that start from the weights of others."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import train
from common.errors import UserError
from configs import lm
from data import task as tasks
from models import import_hf
from training import initial, loop
from training.checkpoints import Checkpoints
from training.command_line import parse
from training.config import resolve
from training.initial import find, read_weights
from training.run_directory import RunDirectoryError, read_config
from training.setup import build


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return path


def settings(text, argument="mixer=min_gru,"):
    """A tiny run on the command line, whose file has another model than the one it starts from."""
    return [
        f"--config=configs/lm.py:{argument}corpus=file:{text}",
        "--config.task.length=12",
        "--config.train.steps=2",
        "--config.train.batch_size=8",
        "--config.train.eval_batches=1",
        "--config.optimizer.warmup_steps=0",
        "--config.optimizer.name=adamw",
        "--config.model.width=8",
        "--config.model.depth=1",
        "--config.model.channel_mixer=none",
    ]


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run of two steps, and its last parameters."""
    workdir = tmp_path_factory.mktemp("run") / "first"
    config = resolve(parse([*settings(text), "--config.model.mixer.min_gru.expand=1.5"]))
    loop.train(config, workdir)
    params = Checkpoints(workdir / "checkpoints").restore_params(build(config, False).abstract["params"]).state
    return workdir, params


def test_a_run_starts_from_another(run, text, tmp_path, capsys):
    """With its model, and by the weights of its last step: at learning rate 0 they are those of the end. It is recorded."""
    workdir, params = run
    line = [*settings(text)[:7], "--config.optimizer.learning_rate=0", f"--workdir={tmp_path / 'second'}"]
    assert train.main([*line, f"--init_from={workdir}"]) == 0
    assert f"parameters start from {workdir}, step 2" in capsys.readouterr().out
    raw = read_config(tmp_path / "second")
    assert raw["train"]["init_from"] == str(workdir) and raw["model"]["mixer"]["min_gru"]["expand"] == 1.5
    checkpoints = Checkpoints(tmp_path / "second" / "checkpoints")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_any_params(sharding).state, params)
    (launch,) = json.loads((tmp_path / "second" / "environment.json").read_text())
    assert launch["init_from"]["step"] == 2 and not launch["init_from"]["anew"]
    assert find(str(workdir), tmp_path / "second") == initial.Source(
        str(workdir), read_config(workdir)["model"], "byte"
    )
    config = tmp_path / "second" / "config.json"
    config.write_text(config.read_text().replace(str(workdir), str(tmp_path / "gone")))
    assert find(str(tmp_path / "gone"), tmp_path / "second").model == raw["model"], "it goes on without its source"
    with pytest.raises(UserError, match="there is no run"):
        find(str(tmp_path / "gone"), tmp_path / "third")
    config.write_text(config.read_text().replace(str(tmp_path / "gone"), str(workdir)))
    with pytest.raises(RunDirectoryError, match=r"train\.init_from"):
        train.main([*line, "--config.model.width=8", "--config.model.depth=1", "--config.model.channel_mixer=none"])


def test_a_key_that_a_run_no_longer_has(run, text, tmp_path):
    """A run that was begun with a key in place of the source's is another one without it; so it was not in older code, which has
    not recorded the source's, and whose runs go on."""
    first, second = run[0], tmp_path / "second"
    line = [*settings(text)[:7], f"--workdir={second}", f"--init_from={first}"]
    assert train.main([*line, "--config.model.norm_eps=0.5"]) == 0
    with pytest.raises(RunDirectoryError, match=r"another configuration \(model\.norm_eps: 0\.5 -> 1e-0.\)"):
        train.main(line)
    with pytest.raises(RunDirectoryError, match=r"another configuration \(model\.norm_eps: 0\.5 -> 0\.25\)"):
        train.main([*line, "--config.model.norm_eps=0.25"])
    assert train.main([*line, "--config.model.norm_eps=0.5"]) == 0
    environment = second / "environment.json"
    launches = json.loads(environment.read_text())
    for launch in launches:
        launch["init_from"] = {key: value for key, value in launch.get("init_from", {}).items() if key != "model"}
    environment.write_text(json.dumps(launches))
    assert train.main(line) == 0


def source_of_file(argument, *keys, **changes):
    """What a run of a file would be to another one: nothing is trained."""
    raw = resolve(parse([f"--config=configs/{argument}", *keys]), with_data=False).raw
    return dataclasses.replace(initial.Source("/first", raw["model"], None, raw["task"]), **changes)


@pytest.mark.parametrize(
    "argument, told",
    [
        ("lm.py:mixer=mamba", r'model\.pattern=\["mamba"\], there \["gla"\]; model\.depth=8, there 4'),
        ("lm.py:corpus=stdlib,size=small", r"model\.depth=8, there 4; model\.width=512, there 128"),
        ("lm.py:ngrams=3", r"model\.ngrams=\[2, 3\], there \[\]"),
    ],
)
def test_an_argument_that_chooses_another_model(argument, told):
    """It would have no effect, and is refused; the weights alone can be had."""
    source = source_of_file("lm.py:mixer=gla")
    with pytest.raises(
        UserError, match=rf"{argument} chooses another .*{told}.*give --config\.train\.init_from=/first "
    ):
        parse([f"--config=configs/{argument}"], source)
    # A run of older code goes on with the command that has begun it.
    earlier = parse([f"--config=configs/{argument}"], dataclasses.replace(source, earlier=True))
    assert earlier.model.pattern == ("gla",)


@pytest.mark.parametrize(
    "argument, keys, other",
    [
        ("lm.py:mixer=mamba,ngrams=2", (), "lm.py:mixer=mamba,ngrams=2,corpus=stdlib"),
        ("hybrids.py:name=griffin,size=small", (), "hybrids.py:size=small,name=griffin"),
        ("hybrids.py:name=jamba,size=paper", (), "hybrids.py:name=jamba,size=paper"),
        ("lm.py:mixer=gla", (), "papers/lru_lra.py:task=listops"),
        ("lm.py:mixer=gla", (), "recall.py:task=passkey"),
        ("lm.py:mixer=mamba", ("--config.model.depth=2",), "lm.py:mixer=mamba"),
    ],
)
def test_an_argument_that_says_nothing_else(argument, keys, other):
    """What the source's model has too, what a task brings along, and what a key of the command line comes after."""
    source = source_of_file(argument, *keys)
    config = parse([f"--config=configs/{other}", *keys], source)
    assert config.model.pattern == tuple(source.model["pattern"]) and config.model.depth == source.model["depth"]


def test_keys_of_the_model_that_is_taken():
    """It is said whose model has no such key."""
    with pytest.raises(
        UserError, match=r"lm\.py with the model of /first has no key config\.model\.mixer\.mamba\.state"
    ):
        parse(["--config=configs/lm.py", "--config.model.mixer.mamba.state=4"], source_of_file("lm.py:mixer=gla"))


def test_a_file_that_cannot_do_without_its_argument(tmp_path):
    """What its argument chooses of the model cannot be told, and it can be used."""
    file = tmp_path / "own.py"
    file.write_text(
        "from configs import lm\ndef get_config(arg):\n    return lm.get_config({'a': 'size=small'}[arg])\n"
    )
    assert parse([f"--config={file}:a"], source_of_file("lm.py:mixer=gla")).train.batch_size == 32


def test_weights_come_from_one_place(run, text, tmp_path):
    """A source on the command line that a key takes back, or moves elsewhere, would give its model and not its weights."""
    workdir, _ = run
    source = find(str(workdir))
    for other in ("", f"{tmp_path}/elsewhere"):
        with pytest.raises(UserError, match=rf"--init_from={workdir} and --config\.train\.init_from={other} say where"):
            parse([*settings(text), f"--config.train.init_from={other}"], source)
    assert parse([*settings(text), f"--config.train.init_from={workdir}"], source).train.init_from == str(workdir)


def test_what_does_not_fit_is_said(run, text, capsys):
    """Parameters of another shape, or without a namesake, start anew, by name; nothing at all is an error."""
    workdir, params = run
    config = lm.get_config(f"corpus=file:{text},mixer=min_gru")
    config.model.update({"width": 8, "depth": 1, "tie_embeddings": False, "channel_mixer": "none"})
    config.model.mixer.min_gru.expand = 1.5
    config.task.length = 12
    resolved = resolve(config)
    weights = read_weights(str(workdir / "checkpoints" / "2"), resolved, build(resolved))
    assert weights.record["anew"] == {"head": "it is not there"} and "head starts anew" in capsys.readouterr().out
    config.model.width = 16
    resolved = resolve(config)
    with pytest.raises(UserError, match=r"nothing of .* fits .*embedding: \[256, 8\] there, \[256, 16\] here"):
        read_weights(str(workdir), resolved, build(resolved))
    with pytest.raises(UserError, match="there is no run"):
        find(str(workdir / "nowhere"))
    with pytest.raises(UserError, match=rf"there is no checkpoint 1 in {workdir}/checkpoints; there are \[2\]"):
        find(str(workdir / "checkpoints" / "1"))
    del params


def test_padded_and_other_vocabularies():
    """A table that was padded gives its first rows; one of another vocabulary nothing."""
    fitting = lambda shape, axes: initial._fitting(np.zeros((50, 8)), shape, axes)
    assert fitting((47, 8), ("vocab", "embed")).shape == (47, 8)
    assert fitting((40, 8), ("vocab", "embed")) is None and fitting((47, 8), ("embed", None)) is None
    assert fitting((51, 8), ("vocab", "embed")) is None and fitting((50, 8), ("vocab", "embed")).shape == (50, 8)


@pytest.fixture
def tokens(tmp_path):
    """Configurations of texts in tokens, and what they are as a source of weights, with and without a record."""
    for name, text in (("a", "the quick brown fox\n"), ("b", "jumps over the lazy dog\n")):
        (tmp_path / name).write_text(text * 60)

    def make(tokenizer, corpus="a", task="language_model"):
        options = {"corpus": f"file:{tmp_path}/{corpus}", "length": 8, "tokenizer": tokenizer}
        made = tasks.create(task, **options)
        return SimpleNamespace(task=made, raw={"task": {"name": task, **made.hyperparameters}})

    for corpus in "ab":
        (tmp_path / f"{corpus}.json").write_text(make("bpe:262", corpus).task.tokenizer.to_json())
    return make


def source_of(config, recorded=True):
    task = config.task
    trained = getattr(task.tokenizer, "fingerprint", None) if recorded else None
    return initial.Source(
        "/run", {}, config.raw["task"].get("tokenizer"), config.raw["task"], task.fingerprint(), trained
    )


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    "theirs, ours, corpus, told",
    [
        ("bpe:262", "bpe:262", "b", r"is there made from file:.*/a, here from file:.*/b"),
        ("bpe:262", "byte", "a", "the tokenizer there is bpe:262, here it is byte"),
        ("bpe:262", "bpe:262", "a", None),
        ("bpe:262", "file:a.json", "b", None),
        ("file:a.json", "bpe:262", "a", None),
        ("file:a.json", "file:copy.json", "b", None),
        ("file:a.json", "file:b.json", "a", r"the tokenizer there is file:.*/a.json, here it is file:.*/b.json"),
        ("byte", "byte", "b", None),
        ("byte", "character", "a", "the tokenizer there is byte, here it is character"),
    ],
)
def test_a_vocabulary_is_taken_over_where_its_tokens_are_the_same(
    tokens, tmp_path, theirs, ours, corpus, told, recorded
):
    """By what the ids stand for, whatever the tokenizers are called."""
    shutil.copy(tmp_path / "a.json", tmp_path / "copy.json")
    at = lambda name: name.replace("file:", f"file:{tmp_path}/")
    found = initial._other_vocabulary(source_of(tokens(at(theirs)), recorded), tokens(at(ours), corpus))
    assert found is None if told is None else re.search(told, found), found


def test_a_file_of_a_tokenizer_that_was_replaced(tokens, tmp_path):
    """What the weights were trained with is what was recorded, and not what has its place today."""
    file = tmp_path / "tokenizer.json"
    shutil.copy(tmp_path / "a.json", file)
    source = source_of(tokens(f"file:{file}"))
    shutil.copy(tmp_path / "b.json", file)
    told = initial._other_vocabulary(source, tokens(f"file:{file}"))
    assert told == f"the tokenizer file:{file} is another one now than when the weights there were trained"
    assert initial._other_vocabulary(source, tokens(f"file:{tmp_path}/a.json")) is None


def test_ids_that_are_no_text(tokens):
    """They mean the same in the same task only."""
    numbers = {"name": "mqar", "vocab_size": 256, "length": 16, "num_kv_pairs": 4}
    mqar = SimpleNamespace(task=tasks.create(**numbers), raw={"task": numbers})
    assert initial._other_vocabulary(source_of(mqar), mqar) is None
    told = initial._other_vocabulary(source_of(mqar), tokens("byte"))
    assert told == "its ids are there those of mqar, here of language_model"
    assert "here of mqar" in initial._other_vocabulary(source_of(tokens("byte")), mqar)
    passkey = tasks.create("passkey", filler="grass", length=300)
    bytes_too = SimpleNamespace(task=passkey, raw={"task": {"name": "passkey"}})
    assert initial._other_vocabulary(source_of(tokens("byte")), bytes_too) is None


def test_a_checkpoint_whose_tokenizer_cannot_be_read(tokens, tmp_path):
    """Its ids are not bytes; where there is none, nothing is known against them."""
    source = initial.Source(f"hf:{tmp_path}", {})
    assert initial._other_vocabulary(source, tokens("byte")) is None
    (tmp_path / "tokenizer.model").touch()
    assert "tokenizer.model, which cannot be read here" in initial._other_vocabulary(source, tokens("byte"))


def test_a_trained_tokenizer_whose_text_has_changed(tmp_path):
    """At the same place under the same name, its ids are other tokens."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 60)
    chosen = lm.get_config(f"corpus=file:{text},mixer=min_gru")
    chosen.task.update({"tokenizer": "character", "length": 8})
    config = resolve(chosen)
    source = initial.Source("/run", {}, "character", config.raw["task"], config.task.fingerprint())
    assert initial._other_vocabulary(source, config) is None
    text.write_text("jumps over the lazy dog\n" * 60)
    told = initial._other_vocabulary(source, config)
    assert told == f"the tokenizer character is there made from what file:{text} was then, and that is another text now"


def test_a_checkpoint_of_the_library(text, tmp_path):
    """The model and the tokenizer of the file's configuration are those of the folder."""
    from flax import nnx

    from models.config import ModelConfig
    from models.sequence_model import SequenceModel

    model = ModelConfig(vocab_size=270, targets=270, width=8, depth=1, pattern=("mamba",), tie_embeddings=False)
    made = import_hf.from_ours(SequenceModel(model, rngs=nnx.Rngs(0)), model)
    import_hf.save(tmp_path / "hf", made)
    line = settings(text, argument="")
    config = parse([*line[:7], "--config.task.tokenizer=byte"], find(f"hf:{tmp_path / 'hf'}"))
    resolved = resolve(config)
    assert resolved.model.pattern == ("mamba",) and resolved.model.width == 8 and not resolved.model.tie_embeddings
    weights = read_weights(resolved.train.init_from, resolved, build(resolved))
    assert not weights.record["anew"]
    np.testing.assert_array_equal(weights.params["embedding"], made.model.embedding[...][:256])
    trained = tasks.create("language_model", corpus=f"file:{text}", length=12, tokenizer="bpe:264").tokenizer
    (tmp_path / "hf" / "tokenizer.json").write_text(trained.to_json())
    assert parse(line[:1], find(f"hf:{tmp_path / 'hf'}")).task.tokenizer == f"file:{tmp_path}/hf/tokenizer.json"
    weights = read_weights(resolved.train.init_from, resolved, build(resolved))
    assert weights.record["anew"].keys() == {"embedding", "head"}, "bytes are not the tokens of the folder"

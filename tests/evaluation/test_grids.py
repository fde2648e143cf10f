"""Any task and any setting on a checkpoint: what is scored, what is refused, and what is written."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from common.errors import UserError
from configs import lm, recall
from data import task as tasks
from data.generated import GeneratedTask
from data.rows import token_row
from evaluation import grids, report, scoring, settings, suite
from evaluation.loading import LoadedRun, load_hf
from tests.data import small_data
from training import setup
from training.config import resolve

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker trains the run


def nest(tree):
    return {str(key): nest(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A run of the word problem, of no training."""
    config = recall.get_config("task=word_problem,mixer=min_gru")
    config.task.update({"group": "Z6", "length": 6})
    config.model.update({"width": 8, "depth": 1, "channel_mixer": "none"})
    config.train.update({"batch_size": 8})
    config = resolve(config)
    built = setup.build(config, for_training=False)
    params = nest(nnx.to_pure_dict(nnx.state(built.merge(built.init(jax.random.key(0))["params"]))))
    return LoadedRun(config, built, params, tmp_path_factory.mktemp("words"), step=2, data="")


def answers(run, task, rows):
    """The likeliest class at each position of the first rows of test, and the rows."""
    found = [task.example("test", i) for i in range(rows)]
    logits, _ = jax.jit(run.built.apply)(run.params, np.stack([row["inputs"] for row in found]))
    return np.argmax(logits, -1), found


def test_a_grid(words, tmp_path, capsys):
    """Each cell is scored on its own rows, with its floors; a table, a JSON file and a picture hold it."""
    asked = settings.asked(words, "", ["task.length=6,9", "task.scored=all"], "", [])
    assert [setting.named for setting in asked] == [{"length": n, "scored": "all"} for n in (6, 9)]
    cells = grids.score_settings(words, asked, "test", batches=2, output=tmp_path)
    printed = capsys.readouterr().out
    for (setting, scored), rows in zip(cells, (16, 16)):
        task = tasks.create("word_problem", group="Z6", length=setting.named["length"], scored="all")
        classes, found = answers(words, task, rows)
        right = np.stack([row["targets"] for row in found]) == classes
        assert scored.rows == rows and scored.all_rows == 1000
        assert scored.result["row_accuracy"] == pytest.approx(right.all(1).mean())
        assert scored.result["accuracy"] == pytest.approx(right.mean())
        assert scored.floors == {"chance": 6.0 ** (1 - setting.named["length"])}
        low, high = scored.intervals["accuracy"]
        assert low < scored.result["accuracy"] < high
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert [cell["settings"]["length"] for cell in record["cells"]] == [6, 9] and record["step"] == 2
    assert record["cells"][1]["scores"] == cells[1][1].result and record["cells"][0]["rows"] == 16
    assert [line.split()[:3] for line in printed.splitlines() if line.lstrip().startswith(("6 ", "9 "))] == [
        [str(n), "all", "16"] for n in (6, 9)
    ]
    assert "pip install matplotlib" in printed or len(list(tmp_path.glob("*.png"))) == 1


def test_scores_on_a_text_that_was_changed_are_kept_beside_the_others(run, tmp_path):
    """Each cell says which data it is of; the same data is the same file."""
    text = tmp_path / "text.txt"
    asked = settings.grid(run, "language_model", {"corpus": [f"file:{text}"]})
    for words in ("the quick brown fox ", "jumps over the lazy dog ", "the quick brown fox "):
        text.write_text(words * 60)
        grids.score_settings(run, asked, output=tmp_path / "out")
    found = [json.loads(path.read_text())["cells"][0] for path in (tmp_path / "out").glob("*.json")]
    assert len(found) == 2 and len({cell["data"] for cell in found}) == 2
    assert tasks.create(asked[0].task, **asked[0].options).fingerprint() in {cell["data"] for cell in found}


def test_tables_have_what_compares_all_tokens():
    """Bits per byte and perplexity per word, of a task that is judged by bits per token; no loss."""
    spec = tasks.Spec(300, None, 300, "causal_lm", 8, unit="token")
    result = {"bits_per_token": 4.0, "accuracy": 0.5, "loss": 2.77, "bits_per_byte": 1.25, "tokens": 64.0}
    scored = scoring.Scored(SimpleNamespace(spec=spec, floors=None), "test", 8, 8, result, {})
    scored.__dict__["floors"] = None
    heading, line = report.table([({"length": 8}, scored)]).splitlines()
    assert "bits per byte" in heading and "1.2500" in line and "loss" not in heading and "word" not in heading


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_scored(words, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(grids, "score_task", lambda *_: pytest.fail("scored"))
    with pytest.raises(
        UserError, match=r"cannot write to .*file/there: .*file is no folder; give another folder as --output"
    ):
        grids.score_settings(
            words, settings.grid(words, "word_problem", {"length": [6]}), output=tmp_path / "file" / "there"
        )


def test_floors_of_the_rows_that_are_scored():
    flip = tasks.create("flip_flop", length=8)
    right = []
    for i in range(50):
        row = flip.example("test", i)
        (read,) = np.nonzero(row["weights"])
        right += (row["inputs"][read - 1] == row["targets"][read]).tolist()
    assert scoring.floors(flip, "test", 50) == {"chance": 0.5, "last bit": pytest.approx(np.mean(right))}
    assert flip.num_examples("test") == 4000 and scoring.floors(flip, "train", 50) is None


def test_word_problems_by_sequence_and_last_position(words, capsys):
    """Both accuracies are printed; what is returned is that of the task as it was trained."""
    ((length, found),) = scoring.score(words, "test", batches=2)
    classes, rows = answers(words, words.config.task, 16)
    whole = tasks.create("word_problem", group="Z6", length=6, scored="all")
    right = np.stack([whole.example("test", i)["targets"] for i in range(len(rows))]) == classes
    assert length == 6 and found["accuracy"] == pytest.approx(right[:, -1].mean())
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test, length 6")]
    assert first.startswith("test, length 6, 16 of 1,000 rows: accuracy") and "row accuracy" in second
    assert second.startswith(f"test, length 6, 16 of 1,000 rows: row accuracy {100 * right.all(1).mean():.2f} %")


def test_nothing_is_scored_where_one_setting_is_refused(words, capsys):
    for name, values in (("word_problem,flip_flop", []), ("word_problem", ["task.length=6,-1"])):
        with pytest.raises(UserError, match=r"flip_flop: this model cannot|length=-1: "):
            grids.score_settings(words, settings.asked(words, name, values, "", []), batches=1)
    assert not capsys.readouterr().out


def test_a_key_that_is_set_twice():
    """A task's own word goes before that to all, whatever their order."""
    parse = lambda *asked: settings.parse(asked, ["passkey", "mqar"])
    with pytest.raises(UserError, match=r"--set task\.length is given twice: write its values once, with commas"):
        parse("task.length=64", "task.length=128")
    for asked in (("task.length=64", "mqar.length=32"), ("mqar.length=32", "task.length=64")):
        assert parse(*asked) == {"passkey": {"length": [64]}, "mqar": {"length": [32]}}


def test_settings_that_no_task_of_several_takes():
    sections = [{"name": "mqar", "num_kv_pairs": pairs} for pairs in (4, 8)]
    settings.check_some(["task.length=20"], sections, "--score")  # the first takes it
    settings.check_some([], sections, "--score")
    with pytest.raises(UserError, match=r"--score \{'length': 9\}: length=9 must be even"):
        settings.check_some(["task.length=20,9"], sections, "--score")


def test_scores_that_are_no_numbers(words):
    spoilt = dataclasses.replace(words, params=jax.tree.map(lambda leaf: leaf * np.nan, words.params))
    with pytest.raises(UserError, match=r"no numbers \(NaN\) in 8 of 8 rows"):
        scoring.score_task(spoilt, words.config.task, batches=1)


class MostlyZeros(GeneratedTask):
    """Some places of each row are scored, and nine labels of ten are 0."""

    sizes = {"train": 8, "valid": 8, "test": 48}

    def __init__(self):
        self.name, self.spec = "zeros", tasks.Spec(6, None, 6, "token_labels", 13, causal=True)

    def draw(self, split, rng):
        scored = (rng.random(13) < 0.4) | (np.arange(13) == rng.integers(13))
        return token_row(rng.integers(6, size=13), rng.integers(6, size=13) * (rng.random(13) < 0.1), scored)

    def floors(self, split="test"):
        return {}


def test_long_rows_are_read_in_pieces(words, run, tmp_path, monkeypatch):
    """The scores are those of whole rows, with padding behind the last piece and with padding inside."""
    small_data.write_passages(tmp_path)
    passages = tasks.create("lambada", data_dir=str(tmp_path), length=60)
    whole = [scoring.score_task(run, passages), scoring.score_task(words, MostlyZeros())]
    run.steps.clear()
    words.steps.clear()
    monkeypatch.setattr(scoring, "LONG", 0)
    monkeypatch.setattr(scoring, "PIECE", 5)
    pieces = [scoring.score_task(run, passages), scoring.score_task(words, MostlyZeros())]
    for one, other in zip(whole, pieces, strict=True):
        assert other.result == pytest.approx(one.result, rel=1e-5) and other.intervals.keys() == one.intervals.keys()
    # Of a model that always says 0.
    silent = dataclasses.replace(words, params=jax.tree.map(lambda leaf: leaf * 0, words.params))
    rows = list(MostlyZeros().rows("test"))
    right = np.mean([not row["targets"].any() for row in rows])
    assert 0.3 < right < 0.9 and scoring.score_task(silent, MostlyZeros()).result["row_accuracy"] == pytest.approx(
        right
    )
    # What needs the row whole has it.
    run.steps.clear()
    words.steps.clear()
    (at,) = settings.asked(run, "language_model", ["task.positions=3+9"], "", [])
    assert scoring.in_pieces(run, tasks.create(at.task, **at.options)) is None
    assert scoring.in_pieces(run, run.config.task) is not None


def test_tasks_that_do_not_fit(words, run):
    """The message says why; a suite leaves them out, and says so."""
    refused = [
        (words, "flip_flop", [], "vocabulary of 5"),
        (words, "word_problem", ["task.group=Z7"], "a vocabulary of 7, and the model a vocabulary of 6"),
        (words, "listops", [], "the model's head gives something else"),
        (words, "adding", [], "the model's head gives something else"),
        (run, "passkey", ["task.depth=2"], "depth=2.0: depth=2.0 must be 0"),
        (run, "word_problem", [], "vocabulary of 2"),
    ]
    for checkpoint, name, values, message in refused:
        with pytest.raises(UserError, match=message):
            grids.score_settings(checkpoint, settings.asked(checkpoint, name, values, "", []), batches=1)
    texts = tasks.create("language_model", corpus=run.config.raw["task"]["corpus"], length=16, tokenizer="bpe:260")
    with pytest.raises(UserError, match="cuts texts into other tokens"):
        scoring.check_fits(run, texts)
    with pytest.raises(UserError, match="nothing that this model can answer"):
        grids.score_settings(words, settings.asked(words, "flip_flop", [], "", []), leave_out=True)


@pytest.mark.parametrize("tokenizer", ["bpe:290", "character"])
def test_a_tokenizer_that_is_trained_anew_on_another_text(tmp_path, tokenizer):
    """Its ids are other tokens, although it cuts an English text into the same bytes; that of the run, by its file, is none."""
    texts = {"greek": "η γάτα κάθισε στο χαλί και το καπέλο ", "russian": "кошка сидела на ковре и шляпа плоская "}
    for name, text in texts.items():
        (tmp_path / name).write_text(text * 100)
    config = lm.get_config("mixer=min_gru")
    config.task.update({"corpus": f"file:{tmp_path}/greek", "tokenizer": tokenizer, "length": 8})
    config.model.update({"width": 8, "depth": 1, "channel_mixer": "none"})
    config = resolve(config)
    own = LoadedRun(config, None, None, tmp_path, 1, "")
    other = lambda **options: tasks.create("language_model", corpus=f"file:{tmp_path}/russian", length=8, **options)
    with pytest.raises(
        UserError, match="cuts texts into other tokens than those that the model was trained on"
    ) as error:
        scoring.check_fits(own, other(tokenizer=tokenizer))
    scoring.check_fits(
        own, tasks.create("language_model", corpus=f"file:{tmp_path}/greek", length=9, tokenizer=tokenizer)
    )
    if tokenizer != "character":
        (file,) = re.findall(r"--set task\.tokenizer=(\S+)$", str(error.value))
        scoring.check_fits(own, other(tokenizer=file))


def test_texts_are_those_of_the_run(run):
    """Another task of texts reads the run's corpus; its own task keeps its hyperparameters."""
    (setting,) = settings.asked(run, "passkey", ["task.depth=None"], "", [200])
    assert setting.options["corpus"] == run.config.raw["task"]["corpus"] and "tokenizer" not in setting.options
    assert setting.named == {"depth": None, "length": 200}
    (own,) = settings.asked(run, "language_model", [], "", [])
    assert own.options == {key: value for key, value in run.config.raw["task"].items() if key != "name"}
    assert settings.asked(run, "", [], "", [8, 16]) == []


@pytest.mark.parametrize("name", suite.names())
def test_suites(name):
    """Every setting of a suite is one that its task takes."""
    assert suite.find(name).__doc__
    for task, keys in suite.find(name).tasks:
        assert set(keys) <= set(tasks.defaults(task))
        for i in range(max(map(len, keys.values()))):
            if task not in ("passkey", "language_model"):  # which read a text
                more = {"vocab_size": 8192} if task == "mqar" else {}
                tasks.create(task, **{key: values[min(i, len(values) - 1)] for key, values in keys.items()}, **more)


@pytest.fixture
def mamba(tmp_path):
    """A small checkpoint in Hugging Face's format, with 300 ids and no tokenizer."""
    config = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1}
    config |= {"time_step_rank": 2, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    block = {"norm.weight": (8,), "mixer.in_proj.weight": (32, 8), "mixer.conv1d.weight": (16, 1, 4)}
    block |= {"mixer.conv1d.bias": (16,), "mixer.x_proj.weight": (10, 16), "mixer.dt_proj.weight": (16, 2)}
    block |= {"mixer.dt_proj.bias": (16,), "mixer.A_log": (16, 4), "mixer.D": (16,), "mixer.out_proj.weight": (8, 16)}
    shapes = {f"backbone.layers.0.{name}": shape for name, shape in block.items()}
    shapes |= {"backbone.embeddings.weight": (300, 8), "backbone.norm_f.weight": (8,)}
    rng = np.random.default_rng(0)
    save_file({n: np.float32(rng.normal(size=s)) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_tokenizer_of_a_checkpoint(text, mamba):
    """Each way to store one that can be read is taken; where one is there that cannot be, bytes are not its tokens."""
    asked = [f"task.corpus=file:{text}", "task.length=16"]
    trained = tasks.create("language_model", corpus=f"file:{text}", length=16, tokenizer="bpe:290").tokenizer
    (mamba / "tokenizer.model").touch()
    loaded = load_hf(mamba)
    with pytest.raises(
        UserError, match=r"tokens are those of .*tokenizer\.model, which cannot be read here: write them as"
    ):
        grids.score_settings(loaded, settings.asked(loaded, "language_model", asked, "", []), batches=1)
    with pytest.raises(UserError, match=r"tokenizer\.model, which cannot be read here"):
        loaded.decode([1])
    model = json.loads(trained.to_json())["model"]
    (mamba / "vocab.json").write_text(json.dumps(model["vocab"]))
    (mamba / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    rows = []
    for file in ("merges.txt", "tokenizer.json"):
        if file == "tokenizer.json":
            (mamba / "tokenizer.json").write_text(trained.to_json())
        loaded = load_hf(mamba)
        (setting,) = settings.asked(loaded, "language_model", asked, "", [])
        assert setting.options["tokenizer"] == f"file:{mamba}" + ("/tokenizer.json" if file == "tokenizer.json" else "")
        task = tasks.create(setting.task, **setting.options)
        scoring.check_fits(loaded, task)
        assert loaded.encode("the quick fox") == trained.encode("the quick fox").tolist()
        assert loaded.decode(loaded.encode("the quick fox")) == "the quick fox"
        rows.append(task.example("test", 0)["inputs"].tolist())
    assert rows[0] == rows[1] and task.spec.vocab_size == 290
    with pytest.raises(UserError, match="cuts texts into other tokens"):
        scoring.check_fits(
            loaded, tasks.create("language_model", corpus=f"file:{text}", length=16, tokenizer="bpe:280")
        )


def test_a_checkpoint_of_hugging_face(text, mamba, tmp_path, capsys):
    """It is scored like a run; the bits are those of its own logits."""
    loaded = load_hf(mamba)
    asked = settings.asked(loaded, "language_model", [f"task.corpus=file:{text}", "task.length=16"], "", [])
    ((_, scored),) = grids.score_settings(loaded, asked, "valid", output=tmp_path / "out")
    rows = [scored.task.example("valid", i) for i in range(scored.rows)]
    logits, _ = jax.jit(loaded.built.apply)(loaded.params, np.stack([row["inputs"] for row in rows]))
    scores = np.asarray(jax.nn.log_softmax(logits), np.float64)
    targets, weights = (np.stack([row[key] for row in rows]) for key in ("targets", "weights"))
    bits = -np.take_along_axis(scores, targets[..., None], -1)[..., 0] / np.log(2)
    assert scored.result["bits_per_byte"] == pytest.approx((weights * bits).sum() / weights.sum(), rel=1e-5)
    assert len(list((tmp_path / "out").glob("*.json"))) == 1 and "uniform" in scored.floors

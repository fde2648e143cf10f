"""What lm-evaluation-harness is told of a checkpoint: beside the model's own logits, and (make harness) through the library."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from common.errors import UserError
from configs import lm
from evaluation import harness
from evaluation.answers import Answers, windows
from evaluation.loading import LoadedRun, load_hf
from training import setup
from training.config import resolve

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker trains the run

PAIRS = [
    ("the quick", " brown"),
    ("the quick", " zebra"),
    ("", "fox"),
    ("over ", "the lazy dog"),  # the blank belongs to what is scored
    ("x" * 60, "yz"),  # loses its beginning
    ("jumps", "a" * 55),  # more than a window
    ("nothing", ""),
]


def asked(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def answers(run):
    return Answers(run, batch_size=4)


@pytest.fixture(scope="module")
def log_p(run):
    """log p of each byte behind bytes, one row at a time, in float64."""
    apply = jax.jit(run.built.apply)

    def table(ids):
        whole = np.zeros((8, -(-len(ids) // 64) * 64), np.int32)  # a row for each device; few shapes are compiled
        whole[:, : len(ids)] = ids
        scores = np.asarray(apply(run.params, whole)[0][0, : len(ids)], np.float64)
        scores -= scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    return table


def by_hand(log_p, context, scored, length):
    """The sum over windows that are written out from what the library's documentation says."""
    whole, total, greedy = context + scored, 0.0, True
    first = len(context)
    while first < len(whole):
        last = min(first + length, len(whole))
        shown = whole[:last][-length - 1 :]
        rows = log_p(shown[:-1])[len(shown) - 1 - (last - first) :]
        chosen = whole[first:last]
        total += rows[np.arange(len(chosen)), chosen].sum()
        greedy &= rows.argmax(-1).tolist() == chosen
        first = last
    return total, greedy


def test_continuations_beside_rows_one_by_one(answers, log_p):
    found = answers.loglikelihood([asked(*pair) for pair in PAIRS])
    for (context, continuation), (nats, greedy) in zip(PAIRS, found, strict=True):
        blanks = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
        expected, best = by_hand(log_p, list(context.encode()) or [10], list(continuation.encode()), 24)
        assert nats == pytest.approx(expected, abs=1e-4) and greedy == best
    # Whatever stands beside it.
    alone = [answers.loglikelihood([asked(*pair)])[0] for pair in PAIRS[:2]]
    np.testing.assert_allclose([a[0] for a in alone], [f[0] for f in found[:2]], rtol=1e-6)


CHOICES = [("the quick", c) for c in (" brown", " zebra", "", " fox jumps over")] + [
    *(("seven wizards", c) for c in (" box", " b")),
    *(("x" * 40, c) for c in ("yz", "x", "abcdefgh")),  # loses its beginning, and each another
    *(("q", c) for c in "uvw"),  # is the last token before what is scored, and nothing before it
    ("alone", " is"),
]


def test_a_context_that_several_have_is_read_once(answers, log_p, monkeypatch):
    """Beside rows one by one, and in fewer tokens."""
    read, step, seen = answers._read, answers._step, {"contexts": [], "whole": 0}

    def count(params, ids, *rest):
        seen["contexts"].append(ids.shape)
        return read(params, ids, *rest)

    def whole(params, inputs, targets):
        seen["whole"] += len(inputs)
        return step(params, inputs, targets)

    monkeypatch.setattr(answers, "_read", count)
    monkeypatch.setattr(answers, "_step", whole)
    found = answers.loglikelihood([asked(*pair) for pair in CHOICES])
    for (context, continuation), (nats, greedy) in zip(CHOICES, found, strict=True):
        expected, best = by_hand(log_p, list(context.encode()), list(continuation.encode()), 24)
        assert nats == pytest.approx(expected, abs=1e-4) and greedy == best
    assert seen["contexts"] == [(8, 16)] and seen["whole"] == 8  # "the quick", "seven wizards"; and seven rows


def test_contexts_that_are_read_once_by_a_carry_that_grows(run, text, monkeypatch):
    """Contexts of unequal lengths, padded, behind a cache of keys: beside the same rows whole."""
    config = lm.get_config("mixer=attention+min_gru")
    config.task.update({"corpus": f"file:{text}", "length": 24})
    config.model.update({"width": 8, "depth": 2, "channel_mixer": "none"})
    made = resolve(config)
    built = setup.build(made, for_training=False)
    params = built.init(jax.random.key(0))["params"]
    one = Answers(LoadedRun(made, built, params, run.workdir, 0, ""), batch_size=8)
    requests = [asked(*pair) for pair in CHOICES]
    together = one.loglikelihood(requests)
    monkeypatch.setattr(one, "_by_context", lambda pieces: (pieces, []))
    alone = one.loglikelihood(requests)
    np.testing.assert_allclose([t[0] for t in together], [a[0] for a in alone], rtol=1e-5)
    assert [t[1] for t in together] == [a[1] for a in alone]


def test_a_sum_of_parts(answers):
    """log p(a | c) + log p(b | c a) = log p(a b | c), and rolling is the same with the prefix before it."""
    (a, _), (b, _), (both, _) = answers.loglikelihood(
        [asked("The ", "lazy"), asked("The lazy", " dog"), asked("The ", "lazy dog")]
    )
    assert a + b == pytest.approx(both, abs=1e-4)
    (rolling,) = answers.loglikelihood_rolling([asked("lazy dog")])
    assert rolling == pytest.approx(answers.loglikelihood([asked("", "lazy dog")])[0][0], abs=1e-4)


def test_long_logits_are_there_in_pieces(run, answers, log_p):
    """300 bytes in one window of 512, which is four pieces of logits."""
    text = "the lazy dog jumps over " * 13
    (found,) = Answers(run, max_length=512, batch_size=1).loglikelihood_rolling([asked(text)])
    ids = [10, *text.encode()]
    assert found == pytest.approx(log_p(ids[:-1])[np.arange(len(text)), ids[1:]].sum(), rel=1e-5)


def test_windows():
    """The example of the library's documentation: ten tokens, four at a time."""
    assert list(windows([-1], list(range(10)), 4)) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]


def test_generation_is_the_likeliest_byte_again_and_again(answers, log_p):
    contexts = ["the qu", "", "seven wizards box the quick brown"]
    settings = {"until": ["e", " "], "max_gen_toks": 5, "do_sample": False}
    found = answers.generate_until([asked(context, settings) for context in contexts])
    for context, text in zip(contexts, found, strict=True):
        ids = list(context.encode())[-19:] or [10]
        expected = b""
        for _ in range(5):
            byte = log_p(ids)[-1].argmax()
            ids.append(int(byte))
            expected += bytes([byte])
        expected = expected.decode(errors="replace")
        assert text == expected[: min([expected.find(stop) for stop in "e " if stop in expected], default=None)]


def test_what_cannot_be_asked(run, answers, text, monkeypatch):
    with pytest.raises(UserError, match="num_beams is unknown; there are until, max_gen_toks"):
        answers.generate_until([asked("a", {"num_beams": 4})])
    with pytest.raises(UserError, match="--max_length must be"):
        Answers(run, max_length=0)
    with pytest.raises(UserError, match="--prefix is empty"):
        Answers(run, prefix="")
    monkeypatch.setattr(type(run), "encode", lambda run, text: None)
    with pytest.raises(UserError, match="holds no model that continues a text"):
        Answers(run)


def test_the_command_says_what_is_missing(monkeypatch, trained):
    with pytest.raises(UserError, match="give --workdir=DIR, a run, or --hf=DIR"):
        harness.main(["--tasks=a"])
    with pytest.raises(UserError, match="--limit must be"):
        harness.main([f"--workdir={trained}", "--tasks=a", "--limit=0"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-harness\.txt"):
        harness.main([f"--workdir={trained}", "--tasks=a"])


def test_results_of_another_checkpoint_or_folder_of_tasks_have_another_file(tmp_path):
    """Also of checkpoints without steps, written into one folder."""
    record = {"tasks": ["a"], "num_fewshot": None, "limit": 2, "max_length": 8, "prefix": "\n", "include_path": None}
    config, origin = SimpleNamespace(task=None), {"step": 0, "data": ""}
    runs = [SimpleNamespace(config=config, workdir=tmp_path / name, origin=origin, step=0) for name in "xy"]
    for run in (*runs, runs[0]):
        for change in ({}, {"include_path": "/mine"}, {"limit": 3}):
            harness.write(run, record | change | {"checkpoint": run.workdir.name}, tmp_path / "out")
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("step0-harness-a-*.json")]
    assert len(found) == 6 and [one["checkpoint"] for one in found].count("x") == 3
    harness.write(runs[0], record, None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The library, without a network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    pytest.importorskip("lm_eval", reason="pip install -r requirements-harness.txt")
    return harness.installed()


QUESTIONS = [
    {"text": "the quick brown", "choices": [" fox jumps", " box"], "answer": 0},
    {"text": "the lazy", "choices": [" wizards", " dog", " the"], "answer": 2},
    {"text": "seven", "choices": [" e", " t"], "answer": 1},
]
TASKS = {
    "chosen": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "said": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def folder(tmp_path):
    """Tasks of one's own, of a local file."""
    path = tmp_path / "tasks"
    path.mkdir()
    (path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}/questions.jsonl}}}}\n"
        (path / f"{name}.yaml").write_text(f"{head}test_split: test\nmetadata: {{version: 1}}{body}")
    return path


@pytest.mark.harness
def test_windows_are_those_of_the_library(library):
    for length in (1, 3, 4, 10, 11):
        theirs = library.utils.get_rolling_token_windows(list(range(10)), -1, length, 1)
        assert list(windows([-1], list(range(10)), length)) == [library.utils.make_disjoint_window(w) for w in theirs]


@pytest.mark.harness
def test_local_tasks_of_a_run(library, folder, run, log_p, tmp_path):
    record = harness.evaluate(run, ["chosen", "rolling", "said"], folder)
    right = []
    for one in QUESTIONS:
        sums = [by_hand(log_p, list(one["text"].encode()), list(c.encode()), 24)[0] for c in one["choices"]]
        sizes = [len(c) for c in one["choices"]]
        right.append([np.argmax(sums) == one["answer"], np.argmax(np.divide(sums, sizes)) == one["answer"]])
    acc, norm = np.mean(right, 0)
    assert record["results"]["chosen"]["acc,none"] == pytest.approx(acc)
    assert record["results"]["chosen"]["acc_norm,none"] == pytest.approx(norm)
    nats = sum(by_hand(log_p, [10], list(one["text"].encode()), 24)[0] for one in QUESTIONS)
    size = sum(len(one["text"]) for one in QUESTIONS)
    assert record["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(-nats / np.log(2) / size, rel=1e-5)
    assert 0 <= record["results"]["said"]["exact_match,none"] <= 1
    assert record["prefix"] == "\n" and record["max_length"] == 24
    harness.write(run, record, tmp_path / "out")
    (written,) = (tmp_path / "out").glob("step4-harness-chosen_rolling_said-*.json")
    assert json.loads(written.read_text())["results"] == record["results"]
    with pytest.raises(UserError, match="--tasks: there is no chosn in the library"):
        harness.evaluate(run, ["chosn"], folder)


@pytest.mark.harness
@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_beside_transformers_in_the_same_library(library, folder, tmp_path, kind):
    """A random model in Hugging Face's format, as the library itself runs it, and as we do."""
    torch = pytest.importorskip("torch", reason="pip install -r requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-parity.txt")
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="pip install lm-eval[hf]")
    import tokenizers

    words = ["[BOS]", "[EOS]", "\u0120", *map(chr, range(97, 123))]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="[BOS]", eos_token="[EOS]")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "llama":
        more = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
        config = transformers.LlamaConfig(**sizes, **more, max_position_embeddings=16, initializer_range=0.5)
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4, initializer_range=0.5))
    model.eval().save_pretrained(tmp_path / "hf")
    fast.save_pretrained(tmp_path / "hf")
    theirs = huggingface.HFLM(pretrained=model, tokenizer=fast, max_length=16, batch_size=2, device="cpu")
    ours = harness.as_lm()(load_hf(tmp_path / "hf"), max_length=16, batch_size=3)
    assert ours.prefix == [theirs.prefix_token_id]
    requests = {
        "loglikelihood": [
            ("the lazy", " dog"),
            ("", "fox"),
            ("over ", "the box"),
            ("quick brown fox jumps over", " a b"),
        ],
        "loglikelihood_rolling": [("the quick brown fox jumps over the lazy dog",), ("abc",)],
        "generate_until": [
            (context, {"until": ["q", "zz"], "max_gen_toks": 6, "do_sample": False})
            for context in ("the quick brown", "seven", "abc def")
        ],
    }
    for kind_of_request, args in requests.items():
        made = [
            library.api.instance.Instance(kind_of_request, {}, arguments, index) for index, arguments in enumerate(args)
        ]
        expected, found = (getattr(model, kind_of_request)(made) for model in (theirs, ours))
        if kind_of_request == "generate_until":
            assert found == expected
        elif kind_of_request == "loglikelihood":
            np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-4)
            assert [f[1] for f in found] == [bool(e[1]) for e in expected]
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-4)

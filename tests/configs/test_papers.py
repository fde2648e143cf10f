"""Every experiment file resolves to a model that can be built, and those of papers say what to expect."""

import collections
import importlib
import json
import pathlib
import pkgutil
import re
import sys
import types

import numpy as np
import pytest

import configs
import configs.papers
from data import metrics
from training import setup
from training.config import resolve

# What a file offers to choose from, and the key of its argument.
CHOICES = {"RECIPES": "task", "MIXERS": "mixer", "CORPORA": "task", "HYBRIDS": "name"}
WORDS = "to be or not to be, that is the question: whether tis nobler in the mind to suffer. "


def experiments():
    """(module, argument) of every experiment file; the papers' with each task or mixer that they offer."""
    for package in (configs, configs.papers):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            if hasattr(module, "get_config"):
                keys = [(key, list(getattr(module, name))) for name, key in CHOICES.items() if hasattr(module, name)]
                arguments = [f"{key}={value}" for key, values in keys for value in values] or [""]
                yield from ((module, argument) for argument in arguments)


EXPERIMENTS = list(experiments())
PAPERS = [(module, argument) for module, argument in EXPERIMENTS if module.__name__.startswith("configs.papers.")]
FIRST = {module: argument for module, argument in reversed(EXPERIMENTS)}  # of each file
NAMES = lambda cases: [f"{module.__name__}:{argument}" for module, argument in cases]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A folder with made-up reviews, pictures and pairs of texts, as the archives have them, and a text."""
    folder = tmp_path_factory.mktemp("archives")
    (folder / "text.txt").write_text(WORDS * 400)
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            reviews = folder / "aclImdb" / split / label
            reviews.mkdir(parents=True)
            for i in range(2):
                (reviews / f"{i}_1.txt").write_text(f"{label} {WORDS * 4}")
    (folder / "cifar-10-batches-bin").mkdir()
    records = np.zeros((10, 1 + 3 * 32 * 32), np.uint8)
    records[:, 0] = np.arange(10)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "tsv_data").mkdir()
    for part in ("train", "eval", "test"):
        (folder / "tsv_data" / f"new_aan_pairs.{part}.tsv").write_text(f"1\ta\tb\t{WORDS}\t{WORDS}\n0\ta\tc\tx\ty\n")
    # The package that draws mnist1d, where it is not installed.
    drawn = {
        "x": np.zeros((80, 40)),
        "y": np.arange(80) % 10,
        "x_test": np.zeros((20, 40)),
        "y_test": np.arange(20) % 10,
    }
    package = types.ModuleType("mnist1d.data")
    package.get_dataset_args, package.make_dataset = dict, lambda arguments: drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mnist1d", types.ModuleType("mnist1d"))
        patch.setitem(sys.modules, "mnist1d.data", package)
        yield folder


def with_data(config, folder):
    """The configuration, its data replaced by what is in the folder or drawn."""
    task = config.task
    if task.name == "language_model":
        task.update({"corpus": f"file:{folder / 'text.txt'}", "length": 32, "cache_dir": str(folder)})
        task.tokenizer = "byte" if task.get("tokenizer", "byte") == "byte" else "bpe:260"
    elif task.name == "pathfinder":
        task.source = "generated"
    elif task.name in ("image", "text", "retrieval"):
        task.data_dir = str(folder)
        if task.name == "retrieval":
            task.cache_dir = str(folder)
    return config


@pytest.mark.parametrize(
    "module,argument",
    [
        pytest.param(module, argument, marks=[pytest.mark.thorough] * (FIRST[module] != argument))
        for module, argument in EXPERIMENTS
    ],
    ids=NAMES(EXPERIMENTS),
)
def test_the_model_can_be_built(module, argument, archives):
    """With data in place a configuration resolves, and its model, optimiser and schedule fit together."""
    config = with_data(module.get_config(argument), archives)
    resolved = resolve(config)
    setup.build(resolved)
    assert json.loads(json.dumps(resolved.raw))["train"] == resolved.raw["train"]


@pytest.mark.parametrize("module,argument", PAPERS, ids=NAMES(PAPERS))
def test_a_paper_says_what_to_expect(module, argument, archives):
    """The section is complete, its metric is one that the task has, and a verified number is a possible score."""
    config = module.get_config(argument)
    if "data_dir" in config.task:
        assert config.task.get_type("data_dir") is str, "it can be given as a flag"
    resolved = resolve(with_data(config, archives))
    expect, spec = resolved.expect, resolved.task.spec
    assert re.match(r"arXiv \d{4}\.\d{5}[,:]", expect.source)
    scores = metrics.summary(spec, collections.defaultdict(lambda: 1.0))
    assert expect.metric in scores
    if expect.value is not None:
        assert 0 < expect.tolerance <= 0.05
        assert expect.metric != "accuracy" or 1 / spec.targets <= expect.value <= 1  # of chance, where it is to fail
    # Only evaluations that are saved can be the best checkpoint.
    assert resolved.train.eval_every == resolved.train.checkpoint_every
    assert resolved.train.eval_batches == 0


@pytest.mark.parametrize("module", dict.fromkeys(module for module, _ in PAPERS), ids=lambda m: m.__name__)
def test_a_paper_explains_itself(module):
    """The file has its command, its paper, what differs, and where the hours come from."""
    text = " ".join(module.__doc__.split())
    path = pathlib.Path(module.__file__)
    assert f"--config=configs/papers/{path.name}" in text and "python -m evaluation.expect" in text
    assert re.search(r"arXiv (\d{4}\.\d{5})", text)[1] in module.get_config().expect.source
    assert "Expected" in text and "Recipe" in text and "Hours in `expect`" in text
    assert "not as published" in text or "not known" in text


@pytest.mark.parametrize("module", dict.fromkeys(module for module, _ in PAPERS), ids=lambda m: m.__name__)
def test_unknown_arguments(module):
    with pytest.raises(ValueError, match=r"takes|must be one of"):
        module.get_config("tusk=listops")
    if any(hasattr(module, name) for name in CHOICES):
        with pytest.raises(ValueError, match="must be one of"):
            module.get_config(f"{next(CHOICES[name] for name in CHOICES if hasattr(module, name))}=listop")

"""What can be asked for on the command line of a sweep, and how."""

import shlex

import pytest

import sweep as entry
from common.errors import UserError
from sweeps import engine
from sweeps.request import split_values, whole_numbers

NEEDED = ["--config=configs/lm.py", "--workdir=runs/never"]


@pytest.mark.parametrize(
    "text, values",
    [
        ("a", ["a"]),
        ("a,b,c", ["a", "b", "c"]),
        ("(1,2),(3,4)", ["(1,2)", "(3,4)"]),
        ("[(1,2),3],{'a,': 4}", ["[(1,2),3]", "{'a,': 4}"]),
        ("'a,b',c", ["a,b", "c"]),
        ('c,"(",it\'s', ["c", "(", "it's"]),
        ("a,,b", ["a", "", "b"]),
        (" a, b c ,( 1, 2 )", ["a", "b c", "( 1, 2 )"]),
        ("' a ' , b", [" a ", "b"]),
        ("", [""]),
    ],
)
def test_commas_that_separate(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize(
    "text, message",
    [
        ("(1,2", "'\\)' is missing"),
        ("'a,b", '"\'" is missing'),
        ("('a)", '"\'" is missing'),
        ("1)", "'\\)' closes nothing"),
        ("(1]", "'\\]' closes nothing"),
        ("'a'b", "comma must follow"),
    ],
)
def test_values_that_do_not_end(text, message):
    with pytest.raises(UserError, match=message):
        split_values(text)


def test_lengths():
    assert whole_numbers("--lengths", "64,32,64") == (32, 64) and whole_numbers("--lengths", "") == ()
    for text in ("0", "-1", "3.5", "32,", "x"):
        with pytest.raises(UserError, match="--lengths takes whole numbers above 0"):
            whole_numbers("--lengths", text)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--over seed=0", "--config=FILE and --workdir=DIR are needed"),
        ("--cell=runs/x --over seed=0", "asks for nothing anew: no --over goes with it"),
        ("--cell=runs/x --allow_other_data", "no --allow_other_data goes with it"),
        ("--status --workdir=runs/x --lengths=64", "no --lengths goes with it"),
        ("--cancel --workdir=runs/x --engine=slurm --retries=1", "no --retries goes with it"),
        ("--over mixer=gla,lru seed=0,1 --reference=seed=0", "rows are means over seeds"),
        ("--status", "--workdir=DIR is needed"),
        ("--status --workdir=runs/never", "holds no cells of a sweep"),
        ("--status --cell=runs/x", "not allowed with"),
        ("--cell=runs/x", "is no cell of a sweep"),
        ("--over seed=0 --retries=-1", "--retries must be at least 0"),
        ("--over seed=0 --hosts=2", "are for engines with several machines"),
        ("--over seed=0 --option partition=gpu", "--engine=local has no options"),
        ("--over seed=0 --detach", "jobs of --engine=local end with the command"),
        ("--over seed=0 --engine=local.py", "no engine 'local.py'"),
        ("--over seed=0 --best_of=train.steps", "--best_of='train.steps' is unknown; choose one of seed"),
        ("--over mixer=gla,lru --best_of=,", "--best_of takes different names"),
        ("--over mixer=gla,lru --best_of=mixer,mixer", "--best_of takes different names"),
        ("--over train.steps=0,-1", "none of the cells can be run; train.steps=0: train.steps must be"),
        ("--over train.data_workers=99999999", "train.data_workers must be from 0 to 1024"),
        ("--over train.steps=99999999999", "train.steps must be from 1 to 2147483647"),
        ("--cancel --workdir=runs/never", "holds no cells of a sweep"),
        ("--over seed=0 --workers=0", "--workers must be at least 1"),
        ("--over seed=0 --engine=locla", "no engine 'locla'; did you mean 'local'"),
        ("--over seed=0 --match=params --budget=-1", "above 0, got -1"),
        ("--over seed=0 --match=params --budget=nan", "above 0, got nan"),
        ("--over seed=0 --match=params --budget=inf", "above 0, got inf"),
        ("--over mixer=gla --budget=5", "needs a measure"),
        ("--over mixer=gla --match=parms", "did you mean 'params'"),
        ("--over seed=0 --match=params", "axis of mixers"),
        ("--over seed=0 --lengths=0", "above 0"),
        ("--over seed=0 --lengths=32 64", "64"),
        ("--over seed=0 seed=1", "--over has seed twice"),
        ("--over seed", "--over takes KEY=VALUE"),
        ("--over seed=0,0", "different"),
        ("--over seed=0 --set seed=1", "both an axis and set"),
        ("--over corpus=\"'file:a,b',auto\"", "corpus='file:a,b' goes into the experiment file's argument"),
        ("--set train.steps=1", "needs an axis"),
        ("--ov seed=0", "--ov"),
        ("--over seed=0 --workdir=runs/other", "--workdir: it is given twice"),
        ("--over optimizer.learning_rate=1e-3,0.001", "have the same configuration: leave one of them out"),
        ("--over mixer=mambo", "mambo"),
        ("--over train.stpes=3", "train.steps"),
    ],
)
def test_what_is_refused(arguments, message, monkeypatch, tmp_path):
    """Before anything is built or written."""
    monkeypatch.chdir(tmp_path)
    alone = arguments == "--over seed=0" or arguments.startswith(("--cell", "--status", "--cancel"))
    needed = [] if alone else NEEDED
    with pytest.raises(UserError) as raised:
        entry.main([*needed, *shlex.split(arguments)])
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_engines_are_found():
    assert "local" in engine.names() and issubclass(engine.find("local"), engine.Engine)

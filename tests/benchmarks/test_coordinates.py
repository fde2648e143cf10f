"""The coordinate check, which models scaled from a base pass and others do not."""

import pytest

from benchmarks import coordinates
from common.errors import UserError
from configs import recall


def chosen(mixer, channel_mixer):
    config = recall.get_config(f"task=induction_heads,mixer={mixer}")
    config.task.length = 32
    config.model.update({"depth": 1, "width": 32, "embedding_scale": 1.0, "channel_mixer": channel_mixer})
    config.train.batch_size = 8
    config.optimizer.update({"name": "adamw", "learning_rate": 1e-2})
    return config


def failures(found):
    """The quantities whose change is not as large at every size."""
    return {
        name: line["change_slope"] for name, line in found.items() if not coordinates.passes(name, line["change_slope"])
    }


def check(mixer, sizes, steps, channel_mixer="auto"):
    plain, scaled = coordinates.check(chosen(mixer, channel_mixer), "width", sizes, steps)
    assert {"logits", "stream 1"} < set(plain) and any("/mixer/" in name for name in plain)
    assert max(line["change_slope"] for line in plain.values()) > 0.3  # the check can fail
    return failures(scaled)


def test_heads_are_as_large_as_those_of_the_base():
    """And as many of them share a key, in the base that the rule scales from, too."""
    config = chosen("attention", "none")
    config.model.mixer.attention.update({"heads": 4, "kv_heads": 2})
    wide = coordinates.sized(config, "width", 64, 32, True, 2).model
    count = lambda model: [model.mixer["attention"][key] for key in ("heads", "kv_heads")]
    assert (count(wide), count(wide.base)) == ([8, 4], [4, 2])


@pytest.mark.thorough
def test_attention():
    assert not check("attention", (32, 128), 3, "none")


@pytest.mark.thorough
def test_gla():
    assert not check("gla", (32, 64, 128), 4)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["slstm", "s5"])
def test_mixers_that_are_told_the_width_of_the_base(name):
    """Nothing grows, with first values that would not follow the inputs."""
    assert max(check(name, (32, 128), 3).values(), default=0.0) < 0.3


@pytest.mark.parametrize(
    "given, message",
    [
        (["--sizes=16"], "two different sizes or more; got --sizes=16"),
        (["--widths=16,16"], "two different sizes or more"),
        (["--widths=16,32", "--seeds=0"], "--seeds must be at least 1"),
        (["--widths=16,32", "--steps=0"], "--steps must be at least 1"),
    ],
)
def test_what_has_no_slope(given, message):
    with pytest.raises(UserError, match=message):
        coordinates.main(["--config=configs/lm.py", *given])

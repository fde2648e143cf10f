"""RULER: whoever reads the text with regular expressions is right, whatever the kind."""

import collections
import re

import numpy as np
import pytest

from data import task
from data.tasks.ruler import KINDS, NEEDLES
from tests.data.generated_rows import check_rows, digest

TEXT = "".join(f"{chr(97 + i // 676)}{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}. " for i in range(10_000))
GOLDEN = {
    "single_1": "7548e75647b266e5",
    "single_2": "cedc5ae7bc241990",
    "single_3": "79ca7c17b0e526ae",
    "multikey_1": "1f6a7dcf35cc66f7",
    "multikey_2": "282c4311c519b9eb",
    "multikey_3": "1ad3212bf00ebf18",
    "multivalue": "8e333e94af0a4341",
    "multiquery": "0c2247551e88bd60",
    "vt": "03e80af57ea08581",
    "cwe": "0df40591a9544183",
    "fwe": "acd703519b02e590",
    "qa_1": "523b00f7b167533f",
    "qa_2": "a703022b1322263d",
}


@pytest.fixture
def ruler(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return lambda **options: task.create("ruler", corpus=f"file:{tmp_path / 'text.txt'}", **options)


def solve(kind, text):
    """The answer, of the text without it."""
    if kind in NEEDLES:
        found = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.\n", text)
        query = re.search(r"What (?:is|are all) the special magic \w+ for (.*?) mentioned", text)[1]
        asked = query.replace(", and ", ", ").split(", ")
        return ", ".join(value for name in asked for key, value in found if key == name)
    if kind == "vt":
        given = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\n", text))
        value = re.search(r"assigned the value (\d+)", text)[1]
        names = [name for name, source in given.items() if source == value]
        for _ in range(4):
            names += [name for name, source in given.items() if source == names[-1]]
        return ", ".join(names)
    if kind == "cwe":
        words = re.findall(r"\d+\. (\w+)", text)
        counts = collections.Counter(words)
        assert len(set(counts.values())) == 2 and list(counts.values()).count(max(counts.values())) == 10
        return ", ".join(word for word in counts if counts[word] == max(counts.values()))
    if kind == "fwe":
        coded = text.split("\n")[-2].split()
        (_, most), *others = collections.Counter(coded).most_common(5)
        assert coded.count("...") == most > others[0][1] > others[1][1] > others[2][1] > others[3][1]
        return ", ".join(word for word, _ in others[:3])
    home = dict(re.findall(r"\n(\w+ \w+) was born in \d+ and lives in (\w+)\.", text))
    land = dict(re.findall(r"\n(\w+) is a town in (\w+)\.", text))
    name = re.search(r"Question: .* (\w+ \w+) lives?\?", text)[1]
    return home[name] if kind == "qa_1" else land[home[name]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_is_right(kind, ruler):
    for length in (1024, 5000):
        made = ruler(kind=kind, length=length)
        answers = set()
        for i in range(8):
            row = made.example("test", i)
            whole = made.decode(np.append(row["inputs"], row["targets"][-1]))
            answer = made.decode(row["targets"][row["weights"] > 0])
            assert len(whole) == length + 1 and whole.endswith(f" {answer}")
            assert solve(kind, whole[: -len(answer)]) == answer
            assert len(whole) - len(whole.lstrip("\n")) < 200
            answers.add(answer)
        assert len(answers) > 4


@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind, ruler):
    made = ruler(kind=kind)
    check_rows(made, rows=3)
    assert digest(made) == GOLDEN[kind]


def test_haystacks(ruler):
    """The corpus is there as it is, but for the needles, and cycled."""
    for kind in ("single_2", "multiquery"):
        row = ruler(kind=kind, length=3000).example("test", 1)
        text = ruler().decode(row["inputs"])
        body = re.sub(r"\nOne of the special magic [^\n]*\n", "", text.split("afterwards.\n")[1])
        assert body.split("\nWhat ")[0] in TEXT[-2500:] * 3


def test_floors(ruler):
    for kind in ("single_1", "multivalue", "vt"):  # there is nothing else to say
        assert ruler(kind=kind).floors("valid") == {"any of the text": 1.0}
    assert ruler(kind="multiquery").floors()["any of the text"] == pytest.approx(1 / 24)
    row = ruler(kind="multikey_2").row("valid", 0, 0, 0)
    needles = ruler().decode(row["inputs"]).count("One of the special magic")
    made = ruler(kind="multikey_2")
    made.sizes = {"train": 1, "valid": 1, "test": 1}
    assert made.floors("valid")["any of the text"] == pytest.approx(1 / needles)


def test_the_commonest_land_is_a_floor(ruler):
    """On average over rows, with equally common ones taken equally often."""
    made, right = ruler(kind="qa_2", length=2048), []
    for i in range(made.num_examples("valid")):
        row = made.row("valid", i, 0, 0)
        lands = re.findall(r"is a town in (\w+)\.", made.decode(row["inputs"]))
        best = [land for land in set(lands) if lands.count(land) == max(map(lands.count, lands))]
        right.append((made.decode(row["targets"][row["weights"] > 0]) in best) / len(best))
    assert abs(np.mean(right) - made.floors("valid")["any of the text"]) < 0.1
    assert made.floors("valid")["any of the text"] > 0.2


def test_bad_settings(ruler):
    with pytest.raises(ValueError, match="kind='singel_1' is unknown; did you mean 'single_1'"):
        ruler(kind="singel_1")
    with pytest.raises(ValueError, match="length=100 must be 1024 to"):
        ruler(length=100)
    assert ruler(kind="vt", length=4096).name == "ruler/vt"  # reads none

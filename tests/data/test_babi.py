"""bAbI's questions, alone and in a text: what a row says, where, and that its answer is what the story in it tells."""

import re

import numpy as np
import pytest

from common.errors import UserError
from data import task
from tests.data.generated_rows import digest
from tests.data.small_data import NAMES, write_facts

SENTENCES = [" ".join(f"w{i}x{j}" for j in range(10 + i % 3)) + "." for i in range(2000)]
SHORT = "Too short a sentence."


@pytest.fixture
def babi(tmp_path):
    (tmp_path / "facts").mkdir()
    write_facts(tmp_path / "facts", stories=100)
    (tmp_path / "text.txt").write_text(f" {SHORT} ".join(SENTENCES))

    def make(**given):
        options = {"corpus": f"file:{tmp_path / 'text.txt'}", "length": 600, **given}
        return task.create("babi", facts_dir=str(tmp_path / "facts"), **options)

    return make


def said(made, row):
    """The text of a row and the answer, which is what is scored, at its end."""
    text = made.decode([*row["inputs"], row["targets"][-1]])
    (places,) = np.nonzero(row["weights"])
    assert places.tolist() == list(range(len(row["inputs"]) - len(places), len(row["inputs"])))
    answer = made.decode(row["targets"][places])
    assert text.endswith(f"? {answer}") and len(text.encode()) == made.spec.length + 1
    return text, answer


def test_the_story_in_the_text_tells_the_answer(babi):
    """Read by a pattern, as if there were no text; and what is no story is sentences of the text, in pieces of its own split."""
    made, places = babi(), []
    assert [made.num_examples(split) for split in made.splits] == [270, 30, 60]
    for split in made.splits:
        for i in range(6):
            text, answer = said(made, made.example(split, i))
            asked = re.search(r"\nWhere is (\w+)\? \w+$", text)[1]
            moves = list(re.finditer(rf"({'|'.join(NAMES)}) (?:moved|went back|journeyed) to the (\w+)\.", text))
            assert [move[2] for move in moves if move[1] == asked][-1] == answer
            assert 2 <= len(moves) <= 6 and text.count("?") == 1
            places += [move.start() / len(text) for move in moves]
            rest = text[: asked and text.rindex("\nWhere")]
            for move in moves:
                rest = rest.replace(move[0], "")
            sentences = re.findall(r"\S[^.]*\.", rest)
            assert SHORT not in sentences and len(sentences) > 2 and set(sentences) <= set(SENTENCES)
            number = int(re.match(r"w(\d+)x", sentences[0])[1])
            assert {"train": number < 1850, "valid": 1750 < number < 1950, "test": number > 1850}[split]
    assert min(places) < 0.2 and max(places) > 0.7
    # New text in each epoch, and for each seed; the held-out splits know neither.
    rows = [made.row("train", 0, epoch, seed)["inputs"].tobytes() for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert len(set(rows)) == 3
    assert digest(made) == "28d15ae1b060e4c0"


def test_bare_stories(babi):
    made = babi(corpus=None, length=300)
    text, answer = said(made, made.row("test", 0, 0, 0))
    story, question = text.strip("\n").split("\n")
    assert made.name == "babi/qa1" and story.count(".") == 2 and question.endswith(answer)
    # Of these stories, those of three pairs of moves are too long.
    assert babi(corpus=None, length=200).num_examples("train") < made.num_examples("train") == 270


def test_answers_of_more_bytes_than_characters_are_scored_whole(babi, tmp_path):
    for path in (tmp_path / "facts").iterdir():
        path.write_text(path.read_text().replace("kitchen", "Küche").replace("office", "事務所"))
    made = babi(corpus=None, length=300)
    answers = {said(made, made.row("test", i, 0, 0))[1] for i in range(60)}
    assert answers == {"bathroom", "bedroom", "garden", "hallway", "Küche", "事務所"}


def test_floors(babi, tmp_path):
    """The place that is said last is where the last one went, who is asked for more often than not, or another who is there."""
    write_facts(tmp_path / "facts", stories=500)
    made = babi(corpus=None, length=400)
    floors, rows = made.floors(), [said(made, made.row("test", i, 0, 0)) for i in range(made.num_examples("test"))]
    last = [re.findall(r"to the (\w+)", text)[-1] == answer for text, answer in rows]
    first = [re.findall(r"to the (\w+)", text)[0] == answer for text, answer in rows]
    assert floors["said last"] == np.mean(last) and floors["said first"] == np.mean(first)
    assert 0.1 < floors["commonest answer"] < 0.25 < floors["said last"] < 0.7
    # Places that are told by a tree of what is asked, and of the last three moves.
    from sklearn.tree import DecisionTreeClassifier

    def features(split):
        told = [said(made, made.row(split, i, 0, 0)) for i in range(made.num_examples(split))]
        places = sorted({answer for _, answer in told})
        moves = [re.findall(r"to the (\w+)", text) for text, _ in told]
        x = [[places.index(p) for p in (own[-1], own[-2], own[0])] + [len(own)] for own in moves]
        asked = [NAMES.index(re.search(r"Where is (\w+)", text)[1]) for text, _ in told]
        return np.column_stack([x, asked]), [answer for _, answer in told]

    (x, labels), (held, expected) = features("train"), features("test")
    scores = [
        np.mean(
            DecisionTreeClassifier(max_depth=d, min_samples_leaf=10, random_state=0).fit(x, labels).predict(held)
            == expected
        )
        for d in (3, 6, 9)
    ]
    assert max(floors.values()) >= max(scores) - 0.02, scores


@pytest.mark.parametrize("text", ["", "2 Mary moved to the office.", "1 Mary\nhm", "1 Where is Mary?\t\t1"])
def test_what_is_no_story(babi, tmp_path, text):
    path = tmp_path / "facts" / "qa1_single-supporting-fact_train.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"is none of bAbI's|has no answer|too short for each of the 0 stories"):
        babi()


def test_what_is_missing(babi):
    with pytest.raises(UserError, match=r"holds 0 files qa2_\*_train.txt: give the folder en-10k"):
        babi(kind="qa2")
    with pytest.raises(UserError, match="length=20 is too short for each of the"):
        babi(length=20)
    with pytest.raises(UserError, match="kind='qa21' is unknown"):
        babi(kind="qa21")

"""Spoken words beside the files that they are read from, which are made here."""

import re
import wave

import numpy as np
import pytest

from common.errors import UserError
from data import task
from data.tasks import speech_commands
from tests.data.generated_rows import digest
from tests.data.small_data import write_sounds


def write(path, samples, rate=16_000):
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def test_all_words_by_the_lists(tmp_path):
    sounds = write_sounds(tmp_path)
    made = task.create("speech_commands", data_dir=str(tmp_path))
    assert (made.spec.length, made.spec.channels, made.spec.targets) == (16_000, 1, 35)
    train = np.concatenate([np.pad(s, (0, 16_000 - len(s))) for name, s in sounds.items() if name.endswith("0.wav")])
    seen = set()
    for number, split in enumerate(made.splits):
        assert made.num_examples(split) == 35
        for i in range(35):
            row = made.row(split, i, 0, 0)
            word = speech_commands.ALL[int(row["targets"])]
            sound = sounds[f"{word}/{number}.wav"]
            expected = (np.pad(sound, (0, 16_000 - len(sound))) - train.mean()) / train.std()
            np.testing.assert_allclose(row["inputs"][:, 0], expected, atol=1e-4)
            seen.add((split, word))
    assert len(seen) == 105
    assert digest(made) == "b75bc26e4c32cb39"
    slow = task.create("speech_commands", data_dir=str(tmp_path), every=3)
    assert slow.spec.length == 5334 and slow.name == "speech_commands/all/every3"
    np.testing.assert_array_equal(slow.row("test", 4, 0, 0)["inputs"], made.row("test", 4, 0, 0)["inputs"][::3])


def test_ten_words_and_floors(tmp_path):
    """Each word's second half is louder than the next one's; every twentieth recording is too short."""
    rng = np.random.default_rng(0)
    for place, word in enumerate(speech_commands.TEN):
        for i in range(21):
            sound = rng.normal(size=16_000) * np.repeat([500, 100 * 1.5**place], 8000)
            write(tmp_path / word / f"{i:02}.wav", sound[: 16_000 if i else 15_999])
    made = task.create("speech_commands", data_dir=str(tmp_path), words="ten")
    assert [made.num_examples(split) for split in made.splits] == [140, 30, 30]
    labels = {
        split: [int(made.row(split, i, 0, 0)["targets"]) for i in range(made.num_examples(split))]
        for split in made.splits
    }
    assert all(np.bincount(own).tolist() == [len(own) // 10] * 10 and own[0] != own[1] for own in labels.values())
    rows = [
        made.row(split, i, 0, 0)["inputs"].tobytes() for split in made.splits for i in range(made.num_examples(split))
    ]
    assert len(set(rows)) == 200
    floors = made.floors()
    assert floors["majority"] == 0.1 and min(floors["nearest class mean"], floors["logistic regression"]) > 0.3


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no recordings of yes, no, .* unpack http://download"):
        task.create("speech_commands", data_dir=str(tmp_path), words="ten")
    write_sounds(tmp_path)
    write(tmp_path / "cat" / "9.wav", np.ones(5), rate=8000)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/cat/9.wav has 1 channels of 16 bits at 8000 Hz")):
        task.create("speech_commands", data_dir=str(tmp_path))
    (tmp_path / "cat" / "9.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"9\.wav is no WAV file"):
        task.create("speech_commands", data_dir=str(tmp_path))
    (tmp_path / "cat" / "9.wav").unlink()
    (tmp_path / "testing_list.txt").write_text("cat/nobody.wav\n")
    with pytest.raises(UserError, match="has no recordings for the test split"):
        task.create("speech_commands", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="every must be from 1 to 16000"):
        task.create("speech_commands", data_dir=str(tmp_path), every=0)

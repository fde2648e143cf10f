"""Speech Commands (arXiv 1804.03209): which word is said in a second of raw sound, 16,000 samples (state-spaces/s4,
src/dataloaders/datasets/sc.py).

`data_dir` holds speech_commands_v0.02.tar.gz, unpacked: a folder of WAV files for each word, and two lists of files.

all   the 35 words of the archive (S4's SC35): valid and test are validation_list.txt and testing_list.txt, and recordings
      that are shorter than a second are filled up with silence behind them
ten   yes, no, up, down, left, right, on, off, stop, go (SC10): recordings of exactly a second, of each word 70, 15 and 15 % as
      train, valid and test by a draw of ours. The source's goes by the order in which its disk lists files.

`every` keeps each so many samples, without a filter, as the source does: `eval.py --set task.every=2` asks a model for what it
makes of 8 kHz. Samples are standardised by the mean and the deviation of those of train. There are no MFCCs. The recordings lie
in memory, 2 bytes a sample: 3.4 GB of all words, 1.2 GB of ten.
"""

import io
import pathlib
import wave
from typing import ClassVar

import numpy as np

from common.errors import UserError, check_choice, check_range
from common.files import Folder, read_bytes
from data import images, lra
from data.rows import class_row
from data.task import Outline, Spec, Task

RATE = 16_000
TEN = "yes no up down left right on off stop go".split()
ALL = sorted(
    "backward bed bird cat dog down eight five follow forward four go happy house learn left marvin nine no off on one right "
    "seven sheila six stop three tree two up visual wow yes zero".split()
)
WORDS = {"all": ALL, "ten": TEN}
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
ARCHIVE = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
FRAMES = 40  # of a recording, for floors
SHARES = (0.7, 0.85)


def _spec(words: str, every: int) -> Spec:
    check_choice("words", words, WORDS)
    check_range("every", every, 1, RATE)
    return Spec(None, 1, len(WORDS[words]), "classification", -(-RATE // every), unit="row")


class SpeechCommands(Task):
    """Classification of spoken words.

    Args:
      data_dir: the folder with the words' folders.
      words: "all" or "ten".
      every: of so many samples one is kept.

    Raises:
      UserError: where a word or a list is missing, for what is no sound of 16 kHz, and for a split without recordings.
    """

    paper_size: ClassVar[dict] = {"words": "all"}

    def __init__(self, data_dir: Folder | None = None, words: str = "all", every: int = 1):
        self.spec = _spec(words, every)
        self.name = _name(words, every)
        self._every = every
        found, contents = _read(data_dir, words)
        self._content = lra.digest(words, *contents)
        self._sounds, self._labels = {}, {}
        for split in self.splits:
            if not found[split]:
                raise UserError(f"{data_dir} has no recordings for the {split} split of words={words!r}")
            # Not one word after the other: parts of a split are to have all.
            order = np.random.RandomState(0).permutation(len(found[split]))
            self._sounds[split] = np.stack([found[split][i][0] for i in order])
            self._labels[split] = np.array([found[split][i][1] for i in order])
        # In two steps and pieces, which need no copy of all in float64.
        train = self._sounds["train"]
        self._mean = float(np.mean([sound.mean(dtype=np.float64) for sound in train]))
        self._std = float(np.sqrt(np.mean([np.square(sound - self._mean).mean() for sound in train]))) or 1.0

    @classmethod
    def outline(cls, words: str, every: int, **_) -> Outline:
        return Outline(_name(words, every), _spec(words, every))

    def num_examples(self, split: str) -> int:
        check_choice("split", split, self.splits)
        return len(self._labels[split])

    def row(self, split: str, index: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        sound = self._sounds[split][index, :: self._every]
        return class_row(images.standardised(sound, self._mean, self._std), int(self._labels[split][index]))

    def floors(self, split: str = "test") -> dict[str, float]:
        """Accuracy of the most frequent word, and of the nearest mean and of logistic regression on the loudness (log RMS) and
        the share of changes of sign in each of 40 frames, fitted on train."""
        check_choice("split", split, self.splits)
        parts = {}
        for key in ("train", split):
            features = np.stack([_features(sound[:: self._every].astype(np.float64)) for sound in self._sounds[key]])
            parts[key] = features, self._labels[key]
        mean, std = parts["train"][0].mean(0), parts["train"][0].std(0)
        scaled = {key: images.Pixels((x - mean) / np.where(std > 0, std, 1), y) for key, (x, y) in parts.items()}
        return images.floors(scaled["train"], scaled[split])

    def content(self) -> str:
        return self._content


def _name(words: str, every: int) -> str:
    return f"speech_commands/{words}" + (f"/every{every}" if every > 1 else "")


def _features(sound: np.ndarray) -> np.ndarray:
    frames = np.array_split(sound, min(FRAMES, len(sound)))
    loud = [np.log(np.sqrt(np.mean(np.square(frame))) + 1) for frame in frames]
    turns = [np.mean(np.signbit(frame[1:]) != np.signbit(frame[:-1])) if len(frame) > 1 else 0.0 for frame in frames]
    return np.array([*loud, *turns])


def _read(data_dir: Folder | None, words: str) -> tuple[dict[str, list[tuple[np.ndarray, int]]], list]:
    """By split the recordings and their labels; and all that was read."""
    folder, contents = pathlib.Path(data_dir or ""), []
    there = [word for word in WORDS[words] if data_dir is not None and any((folder / word).glob("*.wav"))]
    if len(there) < len(WORDS[words]):
        missing = ", ".join(word for word in WORDS[words] if word not in there)
        raise UserError(f"data_dir={data_dir} has no recordings of {missing}: unpack {ARCHIVE} and give its folder")
    split_of: dict[str, str] = {}
    for split, name in LISTS.items() if words == "all" else ():
        contents.append(read_bytes(folder / name))
        split_of |= dict.fromkeys(contents[-1].decode(errors="replace").split(), split)
    found: dict[str, list] = {"train": [], "valid": [], "test": []}
    for label, word in enumerate(WORDS[words]):
        sounds = []
        for path in sorted((folder / word).glob("*.wav")):
            content = read_bytes(path)
            contents += [f"{word}/{path.name}", content]
            sounds.append((_samples(path, content), f"{word}/{path.name}"))
        if words == "all":
            for sound, name in sounds:
                whole = np.pad(sound, (0, max(0, RATE - len(sound))))[:RATE]
                found[split_of.get(name, "train")].append((whole, label))
            continue
        whole = [sound for sound, _ in sounds if len(sound) == RATE]
        order = np.random.RandomState(label).permutation(len(whole))
        cuts = [round(share * len(whole)) for share in SHARES]
        for split, part in zip(found, np.split(order, cuts)):
            found[split] += [(whole[i], label) for i in part]
    return found, contents


def _samples(path: pathlib.Path, content: bytes) -> np.ndarray:
    """The samples of a WAV file, int16."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            form = file.getnchannels(), file.getsampwidth(), file.getframerate()
            samples = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path} is no WAV file: {error}") from None
    if form != (1, 2, RATE) or not samples:
        raise UserError(
            f"{path} has {form[0]} channels of {8 * form[1]} bits at {form[2]} Hz and {len(samples)} bytes of sound; what is "
            f"read is one channel of 16 bits at {RATE} Hz"
        )
    return np.frombuffer(samples[: len(samples) // 2 * 2], "<i2")

"""Any task with data of a few kilobytes, written into a folder in the format that the task reads."""

import json
import pathlib
import struct
import wave

import numpy as np
import pytest

from common.errors import UserError
from data import task
from data.tasks import speech_commands

REVIEWS = {
    "train": {"neg": ["bad bad film", "dull, bad \u00e9"], "pos": ["good film " * 3, "a good one"]},
    "test": {"neg": ["so bad"], "pos": ["good good", "a film"]},
}
PAIRS = [
    ("1.0", "P01", "P02", 'we "propose" a parser', "a parser"),
    ("0.0", "P03", "P04", "", "caf\u00e9 \\ translation of long text"),
    ("1.0", "P05", "P06", "x" * 50, "y"),
    ("0.0", "P07", "P08", "speech", "b'quoted'"),
]


def pseudo_text(size: int) -> bytes:
    """Printable bytes in which every short window is unique."""
    state, out = 1, bytearray()
    for _ in range(size):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(32 + (state >> 16) % 90)
    return bytes(out)


def write_cifar(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Six batches of 20 made-up images; returns images and labels in order."""
    rng = np.random.default_rng(3)
    (folder / "cifar-10-batches-bin").mkdir()
    pixels, labels = rng.integers(0, 256, (120, 3, 32, 32)).astype(np.uint8), (np.arange(120) % 10).astype(np.uint8)
    for batch, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(20 * batch, 20 * batch + 20)
        records = np.concatenate([labels[part, None], pixels[part].reshape(20, -1)], 1)
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(records.tobytes())
    return pixels, labels


def write_reviews(folder: pathlib.Path) -> None:
    """An aclImdb of `REVIEWS`."""
    for split, reviews in REVIEWS.items():
        for kind, texts in reviews.items():
            path = folder / "aclImdb" / split / kind
            path.mkdir(parents=True)
            for i, text in enumerate(texts):
                (path / f"{i}_7.txt").write_bytes(text.encode())


def write_pairs(folder: pathlib.Path) -> None:
    """An archive whose splits hold 4, 3 and 2 of the pairs; one file has no newline at its end."""
    path = folder / "lra_release" / "tsv_data"
    path.mkdir(parents=True)
    for part, count in (("train", 4), ("eval", 3), ("test", 2)):
        text = "".join("\t".join(pair) + "\n" for pair in PAIRS[:count])
        (path / f"new_aan_pairs.{part}.tsv").write_bytes((text[:-1] if part == "eval" else text).encode())


def clothes() -> dict[str, np.ndarray]:
    """60 training and 20 test images with their labels, by the names of the files."""
    rng, result = np.random.default_rng(1), {}
    for split, size in (("train", 60), ("t10k", 20)):
        result[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (size, 28, 28)).astype(np.uint8)
        result[f"{split}-labels-idx1-ubyte"] = (np.arange(size) % 10).astype(np.uint8)
    return result


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_clothes(folder: pathlib.Path) -> None:
    for name, array in clothes().items():
        (folder / name).write_bytes(idx(array))


def write_passages(folder: pathlib.Path) -> None:
    """Five passages of LAMBADA's form."""
    lines = [
        json.dumps({"text": f"he saw {word} and then, at {i}, saw {word}"})
        for i, word in enumerate("abc def g hi jkl".split())
    ]
    (folder / "passages.jsonl").write_text("\n".join(lines) + "\n")


def write_completions(folder: pathlib.Path) -> None:
    """Three texts of SWDE's form."""
    texts = [("Film: Alien\nBy: Ridley Scott\nYear: 1979\nDirector:", "Ridley Scott"), ("A: bcd\nE: f g\nA:", "bcd")]
    texts.append(("it ends as it began, with a rose is a", "rose"))
    lines = [
        json.dumps({"doc_id": str(i), "text": f"{text} ", "value": value}) for i, (text, value) in enumerate(texts)
    ]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")


PLACES = "bathroom bedroom garden hallway kitchen office".split()
NAMES = "Mary John Sandra Daniel".split()


def write_facts(folder: pathlib.Path, stories: int = 20) -> None:
    """bAbI's first task, in its files' format: people move, and every two moves one of them is asked for."""
    rng = np.random.default_rng(6)
    for split, count in (("train", stories), ("test", max(2, stories // 5))):
        lines = []
        for _ in range(count):
            place, number = {}, 0
            for _ in range(3):
                for _ in range(2):
                    number += 1
                    name, where = str(rng.choice(NAMES)), str(rng.choice(PLACES))
                    place[name] = where, number
                    lines.append(f"{number} {name} {rng.choice(['moved', 'went back', 'journeyed'])} to the {where}.")
                number += 1
                name = str(rng.choice(sorted(place)))
                lines.append(f"{number} Where is {name}? \t{place[name][0]}\t{place[name][1]}")
        (folder / f"qa1_single-supporting-fact_{split}.txt").write_text("\n".join(lines) + "\n")


def write_series(folder: pathlib.Path) -> None:
    """A data set of the UEA archive's format: 30 and 8 series of two channels, 3 to 5 long, of two classes."""
    rng = np.random.default_rng(4)
    for split, count in (("TRAIN", 30), ("TEST", 8)):
        lines = ["# made up", "@problemName Small", "@univariate false", "@classLabel true up down", "@data"]
        for i in range(count):
            channels = [",".join(f"{v:.2f}" for v in rng.normal(size=3 + i % 3)) for _ in range(2)]
            lines.append(":".join([*channels, ("up", "down")[i % 2]]))
        (folder / f"Small_{split}.ts").write_text("\n".join(lines))


def write_sounds(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Speech Commands of three recordings of 50 samples for each word, one for each split; returns them by their names."""
    rng, sounds = np.random.default_rng(8), {}
    for word in speech_commands.ALL:
        (folder / word).mkdir()
        for i in range(3):
            sounds[f"{word}/{i}.wav"] = rng.integers(-3000, 3000, 50)
            with wave.open(str(folder / word / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, 16_000, 0, "NONE", ""))
                file.writeframes(sounds[f"{word}/{i}.wav"].astype("<i2").tobytes())
    for i, name in ((1, "validation_list.txt"), (2, "testing_list.txt")):
        (folder / name).write_text("".join(f"{word}/{i}.wav\n" for word in speech_commands.ALL))
    return sounds


def write_table(folder: pathlib.Path) -> None:
    """A table of 900 rows and two columns beside the time's."""
    values = np.random.default_rng(5).normal(size=(900, 2)).cumsum(0)
    lines = [f"2026-01-01 {i},{a:.3f},{b:.3f}" for i, (a, b) in enumerate(values)]
    (folder / "small.csv").write_text("\n".join(["date,a,b", *lines]))


# How a task's data_dir is filled, where it needs one.
WRITERS = {
    "lambada": write_passages,
    "completion": write_completions,
    "speech_commands": write_sounds,
    "time_series": write_series,
    "forecasting": write_table,
    "mnist_pixels": write_clothes,
    "image": write_cifar,
    "text": write_reviews,
    "retrieval": write_pairs,
    "fashion_mnist_pixels": write_clothes,
}

# Tasks of which only the data say what the spec is.
NO_OUTLINE = ("time_series", "forecasting")


def reads_files(name: str) -> bool:
    """Whether `options` writes files for the task."""
    return name in WRITERS or "corpus" in task.defaults(name)


def options(name: str, folder: pathlib.Path) -> dict[str, str]:
    """Hyperparameters by which any task can be built here; its data are written into the folder."""
    known, result = task.defaults(name), {}
    if "corpus" in known:
        (folder / "text.txt").write_bytes(pseudo_text(8000))
        result["corpus"] = f"file:{folder / 'text.txt'}"
    if "cache_dir" in known:
        result["cache_dir"] = str(folder / "cache")
    if "facts_dir" in known:
        (folder / "facts").mkdir()
        write_facts(folder / "facts")
        result["facts_dir"] = str(folder / "facts")
    if name in WRITERS:
        (folder / "data").mkdir()
        WRITERS[name](folder / "data")
        result["data_dir"] = str(folder / "data")
    return result


def create(name: str, **hyperparameters) -> task.Task:
    """The task; the test is skipped where it needs what is not installed."""
    try:
        return task.create(name, **hyperparameters)
    except UserError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))

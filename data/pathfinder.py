"""A generator of Pathfinder images: two dashed contours, two discs, and shorter contours that distract.

Written from the published parameters (google-research/long-range-arena, lra_benchmarks/data/pathfinder.py) and from what
they mean in Kim, Linsley, Thakkar and Serre 2020 (ICLR, openreview HJxrVA4FDS) and drewlinsley/pathfinder:

- A contour is a chain of `contour_length` dashes of length `dash_length` with gaps of 2 * margin. From one dash to the
  next the direction turns by an angle D with density proportional to cos(min(continuity * |D|, pi/2))^2.
- The contours start `seed_distance` apart, the first at least twice that far from the border, and grow in turn.
- Dashes that are not neighbours in a contour stay 2 * margin apart, surface to surface; a pair that cannot go on is begun anew.
- num_distractors contours of distractor_length dashes are placed in what room is left.
- One disc is on the start of one of the contours; the other on the end of the same (label 1) or of the other (label 0).

Departures from that generator: dashes have real coordinates and exact distances where it works on a grid of pixels and
dilated masks; they are drawn by the distance of each pixel's centre, not by supersampling; all of an image's dashes are
equally bright (paddle contrast * snake contrast, at most 1). Images are alike, not equal: accuracies on them are not those
on the released files.

An image takes 15 ms (side 32) to 250 ms (256), and hard ones of side 64, which has little room, 450 ms, so each is drawn once and
kept in the cache. Those of a whole data set are drawn beforehand by several processes:

    python -m data.pathfinder --side=32 --processes=16
"""

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import pathlib
import time

import numpy as np

from common import command
from common.errors import UserError
from common.files import cache_folder
from data.drawn import Drawn

SIZES = {"train": 160_000, "valid": 2_000, "test": 2_000}

ATTEMPTS = 32  # for each distractor; most begin where there is no room
TURNS = 24  # directions that a dash chooses from


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The "hard" parameters of one image size; lengths in pixels."""

    side: int
    margins: tuple[int, ...]
    marker_radius: float
    dash_length: int
    thickness: float
    seed_distance: int
    continuity: float
    num_distractors: int
    contrast: float
    pairs: int  # of contours grown at once, of which the first that is completed is taken; a matter of speed
    padding: int = 1
    contour_length: int = 14
    distractor_length: int = 14 // 3


PARAMETERS = {
    32: Parameters(32, (1,), 1.5, 2, 0.5, 7, 1.0, 20 // 4, 1.0, pairs=16),
    64: Parameters(64, (1,), 2.5, 5, 1, 12, 1.8, 22 // 4, 0.8, pairs=64),
    128: Parameters(128, (2, 3), 3, 5, 1.5, 20, 1.8, 35 // 4, 0.9, pairs=64),
    256: Parameters(256, (3,), 5, 5, 2, 27, 1.8, 30 // 4, 1.0, pairs=8, padding=22),
}


DASHES = {"easy": 6, "intermediate": 9, "hard": 14}  # of a contour
DISTRACTING = {32: 20, 64: 22, 128: 35, 256: 30}  # dashes, at most


def parameters_of(side: int, difficulty: str) -> Parameters:
    """The parameters of a size of images and a difficulty, a name of `DASHES`."""
    dashes = DASHES[difficulty]
    fewer = {"contour_length": dashes, "distractor_length": dashes // 3}
    return dataclasses.replace(PARAMETERS[side], **fewer, num_distractors=DISTRACTING[side] // (dashes // 3))


def draw(parameters: Parameters, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """An image, uint8 [side, side], and its label, 1 where both discs are on one contour."""
    label, first = (int(i) for i in rng.integers(2, size=2))
    targets, distractors = contours(parameters, rng)
    discs = targets[first, 0, 0], targets[first if label else 1 - first, -1, 1]
    image = _render(parameters, np.concatenate([*targets, *distractors]), discs)
    return np.rint(255 * image).astype(np.uint8), label


def drawn(side: int, cache_dir: str | None, difficulty: str = "hard") -> dict[str, Drawn]:
    """The images of each split, kept in the cache: [side * side] pixels and the label, uint8, in one row of bytes."""
    # Another program, or other random numbers, have images of their own.
    key = pathlib.Path(__file__).read_bytes() + np.__version__.encode()
    kind = f"pathfinder{side}" + ("" if difficulty == "hard" else f"-{difficulty}")
    folder = cache_folder(cache_dir) / "drawn" / f"{kind}-{hashlib.sha256(key).hexdigest()[:16]}"
    rows = {split: functools.partial(_row, side, difficulty, split) for split in SIZES}
    return {split: Drawn(folder / split, side**2 + 1, rows[split]) for split in SIZES}


def _row(side: int, difficulty: str, split: str, index: int) -> bytes:
    image, label = draw(parameters_of(side, difficulty), np.random.default_rng([list(SIZES).index(split), index]))
    return image.tobytes() + bytes([label])


def contours(parameters: Parameters, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """The two target contours, complex [2, dashes, 2 ends], and the distractors, [dashes, 2 ends] each, in order of growth.

    A point is row + 1j * column.
    """
    p = parameters
    margin = int(rng.choice(p.margins))
    targets = None
    while targets is None:
        low, high = 2 * p.seed_distance, p.side - 2 * p.seed_distance
        starts = np.empty((p.pairs, 2), complex)
        starts[:, 0] = _uniform(rng, low, high, p.pairs)
        starts[:, 1] = starts[:, 0] + p.seed_distance * np.exp(2j * np.pi * rng.random(p.pairs))
        targets = _grow(p, margin, rng, starts, p.contour_length, np.zeros((0, 2), complex))
    placed, distractors = targets.reshape(-1, 2), []
    for _ in range(p.num_distractors):
        starts = _uniform(rng, 0, p.side, ATTEMPTS)[:, None]
        grown = _grow(p, margin, rng, starts, p.distractor_length, placed)
        if grown is not None:
            distractors.append(grown[0])
            placed = np.concatenate([placed, grown[0]])
    return targets, distractors


def _uniform(rng, low, high, size):
    return (low + (high - low) * rng.random((2, size))).T @ np.array([1, 1j])


def _grow(p, margin, rng, starts, length, placed):
    """Contours of `length` dashes from starts [attempts, contours], grown in turn: those of the first attempt that succeeds.

    Returns complex [contours, length, 2], or None if no attempt finds room beside the dashes `placed`, [n, 2].
    """
    attempts, chains = starts.shape
    border, apart = p.padding + margin, p.thickness + 2 * margin
    dashes = np.zeros((attempts, chains, length, 2), complex)
    angles = np.zeros((attempts, chains))
    turns = np.linspace(-np.pi / 2, np.pi / 2, TURNS) / p.continuity
    for step in range(length):
        for chain in range(chains):
            others = [dashes[:, c, : step + (c < chain)] for c in range(chains) if c != chain]
            own = dashes[:, chain, : max(step - 1, 0)]
            around = np.broadcast_to(placed, (len(dashes), *placed.shape))
            obstacles = np.concatenate([own, *others, around], 1)
            if step == 0:
                turned, density = 2 * np.pi * rng.random((len(dashes), 1)), np.ones(1)
                begin = starts[:, chain, None]
            else:
                turned, density = angles[:, chain, None] + turns, np.cos(turns * p.continuity) ** 2
                # The axes of two dashes meet half-way in the gap.
                corner = dashes[:, chain, step - 1, 1] + margin * np.exp(1j * angles[:, chain])
                begin = corner[:, None] + margin * np.exp(1j * turned)
            made = np.stack([begin, begin + p.dash_length * np.exp(1j * turned)], -1)
            free = np.minimum(made.real, made.imag).min(-1) >= border
            free &= np.maximum(made.real, made.imag).max(-1) <= p.side - border
            # Most directions fail at the border and most obstacles are far away: both are cheap to see.
            row, turn = np.nonzero(free)
            candidates = made[row, turn]
            away = candidates.mean(-1)[:, None] - obstacles.mean(-1)[row]
            candidate, obstacle = np.nonzero(away.real**2 + away.imag**2 < (apart + p.dash_length) ** 2)
            distance = _dash_distances(candidates[candidate], obstacles[row[candidate], obstacle])
            blocked = candidate[distance < apart]
            free[row[blocked], turn[blocked]] = False
            weights = np.cumsum(density * free, 1)
            chosen = (weights <= rng.random((len(weights), 1)) * weights[:, -1:]).sum(1)
            kept = np.flatnonzero(weights[:, -1] > 1e-4)
            if not len(kept):
                return None
            chosen, dashes, angles, starts = chosen[kept], dashes[kept], angles[kept], starts[kept]
            dashes[:, chain, step], angles[:, chain] = made[kept, chosen], turned[kept, chosen]
    return dashes[0]


def _dash_distances(a, b):
    """Distances of dashes a from dashes b, both complex [n, 2]: the least of an end of one from the other.

    Of two that cross it is not 0, but less than half a dash, which is less than the distance asked for.
    """
    return np.min([point_distances(one[:, end], other) for one, other in ((a, b), (b, a)) for end in (0, 1)], 0)


def point_distances(points: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Distances of points [...] from line segments [..., 2 ends], broadcast; all complex."""
    offset = points - segments[..., 0]
    along = segments[..., 1] - segments[..., 0]
    share = np.clip((offset * along.conj()).real / (along * along.conj()).real, 0, 1)
    return np.abs(offset - share * along)


def _render(p, dashes, discs):
    """Brightness 0 to 1; a pixel is as bright as it is covered, by its centre's distance from a dash's axis or a disc."""
    image = np.zeros((p.side, p.side))
    reach = int(np.ceil((p.dash_length + p.thickness) / 2)) + 1
    around = np.arange(-reach, reach + 1)
    middle = dashes.mean(-1)[:, None, None]
    rows = np.clip(middle.real.astype(int) + around[:, None], 0, p.side - 1)
    columns = np.clip(middle.imag.astype(int) + around, 0, p.side - 1)
    distance = point_distances(rows + 0.5 + 1j * (columns + 0.5), dashes[:, None, None])
    # A line thinner than a pixel covers at most its thickness of it.
    cover = np.clip(0.5 + p.thickness / 2 - distance, 0, min(1, p.thickness))
    np.maximum.at(image, (rows, columns), p.contrast * cover)
    centres = np.arange(p.side) + 0.5
    for disc in discs:
        distance = np.hypot(centres[:, None] - disc.real, centres - disc.imag)
        np.maximum(image, np.clip(0.5 + p.marker_radius - distance, 0, 1), out=image)
    return image


def _keep(side: int, cache_dir: str | None, difficulty: str, split: str, start: int, stop: int) -> int:
    images = drawn(side, cache_dir, difficulty)[split]
    for index in range(start, stop):
        images[index]
    return stop - start


def main(arguments: list[str]) -> None:
    """The command; raises a UserError for what cannot be done."""
    parser = command.Parser(__doc__, prog="python -m data.pathfinder")
    parser.add_argument("--side", type=int, default=32, choices=PARAMETERS, help="of the images")
    parser.add_argument("--difficulty", default="hard", choices=DASHES, help="by the contours' dashes (hard)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that draw; by default one for each core")
    parser.add_argument("--rows", type=int, default=max(SIZES.values()), help="of each split, at most")
    parser.add_argument("--cache_dir", help="by default the environment's MIXOLOGY_CACHE, else ~/.cache/mixology")
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.rows < 1:
        raise UserError("--processes and --rows must be at least 1")
    sizes = {split: min(size, options.rows) for split, size in SIZES.items()}
    # What is scored comes first.
    jobs = [
        (options.side, options.cache_dir, options.difficulty, split, start, min(start + 64, sizes[split]))
        for split in reversed(SIZES)
        for start in range(0, sizes[split], 64)
    ]
    done, told, total, begun = 0, 0, sum(sizes.values()), time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for count in pool.imap_unordered(_starred, jobs):
            done += count
            if done == total or done - told >= total / 10:
                print(f"{done:,} of {total:,} images, {time.monotonic() - begun:,.0f} s", flush=True)
                told = done


def _starred(job: tuple) -> int:
    return _keep(*job)


if __name__ == "__main__":
    command.run(main)

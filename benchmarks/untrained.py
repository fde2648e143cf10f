"""Numbers of papers that follow from their equations, without training.

    python -m benchmarks.untrained --what=hippo                     10^6 steps, N = 256: the paper's size, minutes of one core
    python -m benchmarks.untrained --what=performer --image=performer.png
    python -m benchmarks.untrained --what=diagonal
    python -m benchmarks.untrained --what=ring
    python -m benchmarks.untrained --what=reflections

hippo (arXiv 2008.07669, section 4.3): white noise below 1 Hz with a root mean square of 0.5 goes for 100 s into 256 coefficients
of LegS. Printed is the mean squared error of what they say of all the past at the end (bilinear, step by step), the least one
that 256 Legendre polynomials can have (by quadrature, without the recurrence), and their ratio.

performer (arXiv 2009.14794): the mean squared error of exp(x . y) for x and y of length 1, estimated by m positive or
trigonometric features with independent rows: over that of lemma 2, which is 1 if the lemma holds, and its slope over m, which is
-1; the same with orthogonal rows, over independent ones; and the error of the mixer's output beside softmax attention.

diagonal (S4D, arXiv 2206.11893, theorem 3): how far HiPPO-LegS' normal part, with half its B, is from the whole matrix, as a
system from its input to its first coefficient. At a frequency the error goes to 0 as 1 / N; the largest one over all frequencies
(the whole system is 1 at most) does not, so that the kernels of a finite N are noisy (arXiv 2310.01698, section 3).

ring (LRU, arXiv 2303.06349, section 3.4): the mean energy of a state under white noise, over that of its input, where |lambda|^2
is even from r_min^2 to r_max^2. Without gamma it is log((1 - r_min^2) / (1 - r_max^2)) / (r_max^2 - r_min^2), with gamma 1. The
eigenvalues and gamma are those that the mixer `lru` starts with, for many seeds.

reflections (DeltaProduct, arXiv 2502.10297): the word problem of a group, solved by keys and betas that are written down. Each
element is a product of n reflections (beta = 2), n being the delta-rule steps of a token. Two are enough for S3 and, as rotations
of the cube and of the icosahedron, for S4 and A5; S5 takes four. Printed is the share of right products of 100,000 in a row.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from common import command
from common.errors import UserError, check_range
from data.tasks.word_problem import products
from models.mixers.lru import LRU
from models.mixers.performer import Performer
from ops import hippo as hippos
from ops.delta_rule import delta_rule
from ops.linear_recurrence import linear_recurrence

KINDS, RULES = ("positive", "trigonometric"), ("independent", "orthogonal")
CHUNK = 500  # draws at a time
RINGS = ((0.0, 0.9), (0.5, 0.99), (0.9, 0.999))


def legs(signals: Float[np.ndarray, "T S"], size: int) -> Float[np.ndarray, "N S"]:
    """LegS's coefficients of several signals after their last step, by the bilinear rule with step 1 / t, in O(N) a step.

    With r_n = sqrt(2 n + 1), A_nm = -r_n r_m below the diagonal and -(n + 1) on it, so that both halves of a step,
    (I - A / 2t) c' = (I + A / 2t) c + (B / t) f, need only running sums over n of r_m c_m.
    """
    n = jnp.arange(size, dtype=jnp.float64)
    root = jnp.sqrt(2 * n + 1)

    def step(carry, f):
        c, t = carry
        h = 0.5 / t

        def row(sums, x):
            before, after = sums  # of r_m c_m and r_m c'_m, over m < n
            c_n, r, m = x
            right = c_n - h * (r * before + (m + 1) * c_n) + r / t * f
            new = (right - h * r * after) / (1 + h * (m + 1))
            return (before + r * c_n, after + r * new), new

        nothing = jnp.zeros(c.shape[1])
        return (jax.lax.scan(row, (nothing, nothing), (c, root, n), unroll=8)[1], t + 1), None

    run = jax.jit(lambda x: jax.lax.scan(step, (jnp.zeros((size, x.shape[1])), 1.0), x)[0][0])
    return np.asarray(run(jnp.asarray(signals)))


def white_noise(length: int, cycles: int, signals: int, seed: int) -> Float[np.ndarray, "T S"]:
    """Signals whose power is even over 1 .. `cycles` periods in their length, with a root mean square of 0.5."""
    random = np.random.default_rng(seed)
    spectrum = np.zeros((length // 2 + 1, signals), complex)
    spectrum[1 : cycles + 1] = random.normal(size=(cycles, signals)) + 1j * random.normal(size=(cycles, signals))
    signal = np.fft.irfft(spectrum, length, axis=0)
    return 0.5 * signal / np.sqrt(np.mean(np.square(signal), 0))


def hippo(options) -> dict:
    """Mean squared errors, one for each signal."""
    signals = white_noise(options.length, options.cycles, options.signals, options.seed)
    # The values are the means over their steps, so x lies in their middle.
    basis = np.polynomial.legendre.legvander(
        2 * (np.arange(options.length) + 0.5) / options.length - 1, options.state - 1
    )
    basis *= np.sqrt(2 * np.arange(options.state) + 1)
    error = lambda c: np.mean(np.square(basis @ c - signals), 0)
    with jax.enable_x64(True):
        online = legs(signals, options.state)
    found, least = error(online), error(basis.T @ signals / options.length)
    print(f"LegS, N = {options.state}, {options.length:,} steps, {options.cycles} periods, {options.signals} signals")
    for name, value in (("online", found), ("least possible", least), ("online over least", found / least)):
        print(f"  {name:18s} {value.mean():.4f}  ({value.min():.4f} to {value.max():.4f})")
    return {"online": found.tolist(), "least": least.tolist()}


def estimate(kind: str, x: Float[np.ndarray, "P K"], y: Float[np.ndarray, "P K"], w: Float[np.ndarray, "D M K"]):
    """[D, P]: exp(x . y) of each pair by each draw of M features (arXiv 2009.14794, lemma 1)."""
    lengths = np.sum(x**2, -1) / 2 + np.sum(y**2, -1) / 2
    if kind == "positive":
        return np.mean(np.exp(w @ (x + y).T - lengths), 1)
    return np.exp(lengths) * np.mean(np.cos(w @ (x - y).T), 1)


def lemma(kind: str, x, y, features: int) -> np.ndarray:
    """[P]: the mean squared error of `estimate` with independent rows (lemma 2)."""
    kernel, both, apart = np.exp(np.sum(x * y, -1)), np.sum((x + y) ** 2, -1), np.sum((x - y) ** 2, -1)
    if kind == "positive":
        return np.exp(both) * kernel**2 * (1 - np.exp(-both)) / features
    return np.exp(both) / kernel**2 * np.square(1 - np.exp(-apart)) / (2 * features)


def rows_of_features(rule: str, random: np.random.Generator, draws: int, features: int, size: int):
    """[D, M, K]: Gaussian rows, independent or orthogonal in blocks of K."""
    w = random.normal(size=(draws, features, size))
    if rule == "orthogonal":
        blocks = np.linalg.qr(random.normal(size=(draws, -(-features // size), size, size)))[0]
        # QR's signs are not random: those of the rows do not matter to lengths, those of the columns do.
        blocks = blocks * random.choice([-1.0, 1.0], size=(*blocks.shape[:2], 1, size))
        w = blocks.reshape(draws, -1, size)[:, :features] * np.linalg.norm(w, axis=-1, keepdims=True)
    return w


def pairs(angle: float, size: int, count: int, random: np.random.Generator):
    """x and y [P, K] of length 1, with an angle (in degrees) between them."""
    one, other = np.moveaxis(np.linalg.qr(random.normal(size=(count, size, 2)))[0], -1, 0)
    return one, np.cos(np.radians(angle)) * one + np.sin(np.radians(angle)) * other


def performer(options) -> dict:
    """Rows by angle and number of features."""
    random, rows = np.random.default_rng(options.seed), []
    given = {angle: pairs(angle, options.size, options.pairs, random) for angle in options.angles}
    for m in options.features:
        errors = {(angle, kind, rule): [] for angle in given for kind in KINDS for rule in RULES}
        for _ in range(options.draws // CHUNK):
            for rule in RULES:
                w = rows_of_features(rule, random, CHUNK, m, options.size)
                for angle, (x, y) in given.items():
                    for kind in KINDS:
                        error = estimate(kind, x, y, w) - np.exp(np.sum(x * y, -1))
                        errors[angle, kind, rule].append(np.mean(np.square(error)))
        for angle, (x, y) in given.items():
            row = {"angle": angle, "features": m}
            for kind in KINDS:
                row |= {f"{kind}, {rule}": float(np.mean(errors[angle, kind, rule])) for rule in RULES}
                row[f"{kind}, lemma"] = float(np.mean(lemma(kind, x, y, m)))
            rows.append(row)
    print(f"{options.pairs} pairs of {options.size} numbers at each angle, {options.draws} draws")
    print(
        "| angle | m | positive over lemma 2 | trigonometric over lemma 2 | orthogonal over independent, positive |",
        end="",
    )
    print(" the same, trigonometric | positive over trigonometric |\n|" + "---|" * 7)
    for row in rows:
        ratio = lambda above, below, row=row: f"{row[above] / row[below]:.3f}"
        cells = [ratio(f"{kind}, independent", f"{kind}, lemma") for kind in KINDS]
        cells += [ratio(f"{kind}, orthogonal", f"{kind}, independent") for kind in KINDS]
        cells.append(ratio("positive, independent", "trigonometric, independent"))
        print(f"| {row['angle']:g} | {row['features']} | " + " | ".join(cells) + " |")
    slopes = {}
    for angle in given:
        here = [row for row in rows if row["angle"] == angle]
        for kind in KINDS:
            for rule in RULES:
                errors = [row[f"{kind}, {rule}"] for row in here]
                slopes[f"{angle:g}, {kind}, {rule}"] = slope([row["features"] for row in here], errors)
    print(f"slopes over m, in logarithms: {min(slopes.values()):.3f} to {max(slopes.values()):.3f}")
    output = {m: attention_error(options, m) for m in options.features}
    print("squared error of the mixer's output: " + ", ".join(f"m = {m}: {error:.4f}" for m, error in output.items()))
    return {"rows": rows, "slopes": slopes, "output": output}


def slope(x, y) -> float:
    """Of the straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def attention_error(options, features: int) -> float:
    """Squared error of the mixer's output over that of softmax attention with the same maps, relative to its square."""
    width = 2 * options.size
    mixer = Performer(width, rngs=nnx.Rngs(options.seed), heads=2, features=features, causal=False)
    x = jax.random.normal(jax.random.key(options.seed), (1, options.length, width))
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, mixer.w_qkv[:, i]) for i in range(3))
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / options.size**0.5, -1)
    exact = jnp.einsum("bhts,bshk,hkd->btd", weights, v, mixer.w_o[...])
    return float(jnp.sum(jnp.square(mixer(x)[0] - exact)) / jnp.sum(jnp.square(exact)))


def diagonal(options) -> dict:
    """Errors of the transfer function, by N."""
    found = {}
    print(
        "| N | "
        + " | ".join(f"frequency {w}" for w in options.frequencies)
        + " | the largest |\n"
        + "|---" * (len(options.frequencies) + 2)
        + "|"
    )
    for size in options.states:
        eigenvalues, vectors, _, b = hippos.normal_plus_low_rank("legs", size)
        # Of the first coefficient, c_0' = -c_0 + f, which is 1 / (1 + i w) in the whole system. Peaks are at the eigenvalues.
        w = np.concatenate([options.frequencies, np.abs(eigenvalues.imag)])
        error = np.abs((1j * w[:, None] - eigenvalues) ** -1 @ (vectors[0] * b / 2) - 1 / (1 + 1j * w))
        given = len(options.frequencies)
        found[size] = [*(error * np.abs(1 + 1j * w))[:given].tolist(), float(error.max())]
        print(f"| {size} | " + " | ".join(f"{value:.2e}" for value in found[size]) + " |")
    slopes = [slope(options.states, errors) for errors in np.array(list(found.values())).T]
    print("slopes over N, in logarithms: " + ", ".join(f"{value:.2f}" for value in slopes))
    return {"errors": found, "slopes": slopes}


def ring(options) -> dict:
    """Energies by ring, beside the proposition's."""
    rows = []
    for r_min, r_max in RINGS:
        gains = []  # without and with gamma
        for seed in range(options.seed, options.seed + options.draws // 100):
            lru = LRU(4, rngs=nnx.Rngs(seed), state=256, r_min=r_min, r_max=r_max)
            radius, phase = jnp.exp(-jnp.exp(lru.nu_log[...])), jnp.exp(lru.theta_log[...])
            noise = np.random.default_rng(seed).normal(size=(2, 1, options.length, 256)).astype(np.float32)
            h, _ = linear_recurrence((radius * jnp.cos(phase), radius * jnp.sin(phase)), tuple(noise))
            energy = np.mean(np.square(np.stack(h)[:, 0, options.length // 2 :]), (0, 1))
            gains.append([np.mean(energy), np.mean(energy * np.exp(2 * lru.gamma_log[...]))])
        law = np.log((1 - r_min**2) / (1 - r_max**2)) / (r_max**2 - r_min**2)
        mean, error = np.mean(gains, 0), np.std(gains, 0, ddof=1) / len(gains) ** 0.5
        rows.append({"ring": [r_min, r_max], "law": law, "mean": mean.tolist(), "error": error.tolist()})
        print(
            f"ring {r_min:g} to {r_max:g}: {mean[0]:.3f} +- {error[0]:.3f}, by the proposition {law:.3f}; "
            f"with gamma {mean[1]:.4f} +- {error[1]:.4f}"
        )
    return {"rows": rows}


def turn(axis, angle: float) -> Float[np.ndarray, "3 3"]:
    """The rotation about an axis."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def group(*generators: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "G K K"]:
    """All products of the generators; the first is the identity."""
    found = [np.eye(len(generators[0]))]
    for matrix in found:  # which grows meanwhile
        for generator in generators:
            if np.min(np.abs(np.array(found) - matrix @ generator).max((1, 2))) > 1e-6:
                found.append(matrix @ generator)
    return np.array(found)


def reflections_of(matrix: Float[np.ndarray, "K K"]) -> list[np.ndarray]:
    """Unit vectors k_1, ..., k_n with (I - 2 k_n k_n^T) ... (I - 2 k_1 k_1^T) = matrix, which is orthogonal (Householder)."""
    keys, left = [], matrix
    for unit in np.eye(len(matrix)):
        away = left @ unit - unit
        if np.linalg.norm(away) > 1e-6:
            keys.append(away / np.linalg.norm(away))
            left = left - 2 * np.outer(keys[-1], keys[-1] @ left)
    return keys[::-1]


def groups() -> dict[str, Float[np.ndarray, "G K K"]]:
    """S3 and S5 as permutations of coordinates, S4 and A5 as the rotations of the cube and the icosahedron."""
    permutation = lambda *order: np.eye(len(order))[list(order)]
    about_diagonal = permutation(1, 2, 0)
    return {
        "S3": group(about_diagonal, permutation(1, 0, 2)),
        "S4": group(about_diagonal, turn((0, 0, 1), np.pi / 2)),
        "A5": group(about_diagonal, turn((0, 1, (1 + 5**0.5) / 2), 2 * np.pi / 5)),
        "S5": group(permutation(1, 2, 3, 4, 0), permutation(1, 0, 2, 3, 4)),
    }


def reflections(options) -> dict:
    """Shares of right products by group, and the steps of a token."""
    found, random = {}, np.random.default_rng(options.seed)
    for name, matrices in groups().items():
        # The state is S_t = M(x_t)^T S_{t-1}, from the identity: S_t^T q = M(x_1) ... M(x_t) q.
        keys = [reflections_of(matrix.T) for matrix in matrices]
        steps, size = max(map(len, keys)), matrices.shape[-1]
        k, beta = np.zeros((len(keys), steps, size)), np.zeros((len(keys), steps))
        for element, rows in enumerate(keys):
            k[element, : len(rows)], beta[element, : len(rows)] = np.reshape(rows, (-1, size)), 2.0
        elements = random.integers(len(keys), size=options.length)
        k, beta = (jnp.asarray(x[elements].reshape(1, -1, 1, *x.shape[2:]), jnp.float32) for x in (k, beta))
        query = random.normal(size=size)  # no element but the identity leaves it where it is
        q = np.broadcast_to(query, (1, options.length * steps, 1, size)).astype(np.float32)
        o, _ = delta_rule(q, k, jnp.zeros_like(q), beta, initial_state=jnp.eye(size)[None, None])
        places = matrices @ query
        read = np.asarray(o)[0, steps - 1 :: steps, 0]
        answers = np.argmin(np.square(read[:, None] - places).sum(-1), -1)
        together = np.einsum("aij,bjk->abik", matrices, matrices).reshape(len(keys) ** 2, 1, size, size)
        table = np.argmin(np.square(together - matrices).sum((2, 3)), 1).reshape(len(keys), len(keys))
        right = float(np.mean(answers == products(table, elements)))
        found[name] = {"elements": len(keys), "steps": steps, "right": right}
        print(f"{name}, {len(keys)} elements, {steps} steps of size {size}: {100 * right:.3f} % of {options.length:,}")
    return found


def draw(path: Path, found: dict) -> None:
    """The errors of Performer's features over their number, a panel for each angle."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    angles = list(dict.fromkeys(row["angle"] for row in found["rows"]))
    figure, panels = plt.subplots(
        1, len(angles), figsize=(3.4 * len(angles), 3.4), sharey=True, constrained_layout=True
    )
    for angle, axes in zip(angles, np.atleast_1d(panels), strict=True):
        rows = [row for row in found["rows"] if row["angle"] == angle]
        for kind, color in zip(KINDS, ("C0", "C1"), strict=True):
            for rule, style in zip((*RULES, "lemma"), ("o", "s", "-"), strict=True):
                values = [row[f"{kind}, {rule}"] for row in rows]
                axes.plot([row["features"] for row in rows], values, style, color=color, label=f"{kind}, {rule}")
        axes.set(xscale="log", yscale="log", xlabel="features", title=f"{angle:g} degrees between x and y")
        ticks = [row["features"] for row in rows]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7)
    np.atleast_1d(panels)[0].set_ylabel("mean squared error of exp(x . y)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# And their lengths.
SUBJECTS = {
    "hippo": (hippo, 10**6),
    "performer": (performer, 512),
    "diagonal": (diagonal, None),
    "ring": (ring, 10**4),
    "reflections": (reflections, 10**5),
}


def check(options) -> None:
    """Raises a UserError for numbers of which there would be no result, or one of other numbers."""
    if options.length is not None:
        check_range("--length", options.length, 2)
    for key, least in {"state": 1, "cycles": 1, "signals": 1, "size": 2, "pairs": 1}.items():
        check_range(f"--{key}", getattr(options, key), least)
    if options.draws < CHUNK or options.draws % CHUNK:
        raise UserError(f"--draws={options.draws}: it takes a multiple of {CHUNK}, which are made at a time")
    if options.what == "hippo":
        check_range("--cycles", options.cycles, 1, options.length // 2)
    if options.image and options.what != "performer":
        raise UserError(f"--image is of --what=performer, --what={options.what} has no picture: leave it out")


def main(arguments: list[str]) -> None:
    study(arguments)


def study(arguments: list[str]) -> dict:
    """What `main` prints."""
    parser = command.Parser(__doc__)
    whole = command.whole_numbers
    parser.add_argument("--what", choices=tuple(SUBJECTS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=command.new_file, help="file for the numbers")
    parser.add_argument("--image", type=command.new_file, help="file for the picture; of performer")
    parser.add_argument(
        "--length", type=int, help="steps of hippo (10^6), ring (10^4), reflections (10^5); tokens of performer (512)"
    )
    parser.add_argument("--state", type=int, default=256, help="hippo: N")
    parser.add_argument("--cycles", type=int, default=100, help="hippo: highest frequency, in periods of the signal")
    parser.add_argument("--signals", type=int, default=3, help="hippo: how many")
    parser.add_argument("--features", type=whole, default=whole("16,32,64,128,256,512"), help="performer: values of m")
    parser.add_argument("--size", type=int, default=16, help="performer: of queries and keys")
    parser.add_argument(
        "--angles", type=whole, default=whole("45,90,135"), help="performer: between x and y, in degrees"
    )
    parser.add_argument("--pairs", type=int, default=8, help="performer: of x and y, of length 1, at each angle")
    parser.add_argument(
        "--draws", type=int, default=4000, help="performer: of the features; a hundred times those of ring"
    )
    parser.add_argument("--states", type=whole, default=whole("64,128,256,512,1024"), help="diagonal: values of N")
    parser.add_argument(
        "--frequencies", type=whole, default=whole("1,10,100"), help="diagonal: of its input, in radians"
    )
    options = parser.parse_args(arguments)
    compute, length = SUBJECTS[options.what]
    options.length = length if options.length is None else options.length
    check(options)
    found = compute(options)
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options), **found}, indent=1, default=str))
    if options.image:
        try:
            draw(options.image, found)
        except ModuleNotFoundError as missing:
            raise UserError(f"the picture needs {missing.name}: pip install matplotlib, or leave --image out") from None
    return found


if __name__ == "__main__":
    command.run(main)

"""Whole training steps and decoding beside what a user would pick instead.

    python -m benchmarks.steps --mixers=attention,gla --sizes=default,large --json=steps.json
    python -m benchmarks.steps --what=decode

Every program is a process of its own, all of them on the same cores, and they take turns; times are medians over the rounds.
Ours is what `train.py` and `eval.py --sample` run: AdamW in float32, with the policies of the primitives. Peers are PyTorch as it
is ("eager"), under torch.compile and under bfloat16 autocast, with its own attention, the mixers of transformers and the plain
functions of flash-linear-attention, in models of the same width, depth and channel mixer; a "chunked" peer may solve an easier
problem (one decay for each head). Peers that are not installed (`requirements-parity.txt`) are left out.

Columns: milliseconds of a step or of a decoded token (CPU time on one core, wall time on more), how many times as long the peer
took as we did, the share of the speed of large float32 matrix products that the FLOPs of the model come to, and the most
memory that the process has held.
"""

import importlib.util
import json
import os
import statistics
import time

import jax
import numpy as np

from benchmarks.timing import environment
from benchmarks.workers import Worker, alternate, serve
from common import command
from common.errors import check_choice, check_range
from configs import common
from models import mixer as mixers
from ops import dispatch
from training import config, setup
from training.step import make_train_step

# width, depth in pairs of mixer and channel mixer, length, batch size
SIZES = {"default": (128, 4, 256, 8), "large": (512, 6, 1024, 4)}
PROMPTS = (8, 1024)
BATCHES = (1, 16)
SIDE = 1024  # of the matrices whose product is the measure of speed
NEW_TOKENS = 512  # for which a growing carry has room
ALL = ("eager", "compile", "bf16")
LOOP = ("eager",)  # a loop over tokens in Python: nothing for a compiler
# mixer -> {peer: (kind of `benchmarks.torch_models`, modes)}
PEERS = {
    "attention": {"torch": ("attention", ALL)},
    "mamba": {"transformers": ("mamba", LOOP), "mambapy": ("mamba_mambapy", LOOP)},
    "gla": {"fla recurrent": ("gla_recurrent", LOOP), "fla chunked": ("gla_chunked", ALL)},
    "gated_delta_net": {"transformers": ("gated_delta_net", ("eager", "bf16"))},
    "retnet": {"fla parallel": ("retnet_parallel", ALL), "fla chunked": ("retnet_chunked", ALL)},
    "rwkv4": {"transformers": ("rwkv4", LOOP)},
    "s4d": {"plain torch": ("s4d", ("eager", "bf16"))},
}
DECODERS = ("attention", "mamba", "rwkv4")
OTHER_DECODERS = ("gla", "gated_delta_net")  # nothing to compare with
_PACKAGES = ("jax", "jaxlib", "torch", "transformers", "fla-core")


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--what", choices=("steps", "decode"), default="steps")
    parser.add_argument("--mixers", default="", help="names, joined by commas; by default all that there are peers of")
    parser.add_argument("--sizes", default=",".join(SIZES), help="of: " + ", ".join(SIZES))
    parser.add_argument("--modes", default=",".join(ALL), help="of the peers, of: " + ", ".join(ALL))
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each program in each round")
    parser.add_argument("--implementation", default="auto", help="our forms of primitives, as of train.implementation")
    parser.add_argument("--json", type=command.new_file, help="where to write the figures")
    parser.add_argument("--worker", help="for its own use")
    options = parser.parse_args(arguments)
    if options.worker:
        given = json.loads(options.worker)
        return _products() if given["what"] == "products" else _work(**given)
    _check(options)
    cores = set(sorted(os.sched_getaffinity(0))[-options.cores :])
    clock = "cpu" if options.cores == 1 else "wall"
    peak = _matmul_peak(max(cores))
    result = {
        "environment": environment(_PACKAGES),
        "cores": options.cores,
        "gflops_of_matmuls": peak / 1e9,
        "rows": [],
    }
    print(
        f"{result['environment']['device']}, {options.cores} core(s), {clock} time, products {peak / 1e9:.0f} GFLOP/s"
    )
    for title, jobs in _jobs(options):
        print(f"\n{title}", flush=True)
        workers = [Worker(name, ["-m", module, *arguments], cores) for name, module, arguments in jobs]
        alternate(
            workers,
            options.rounds,
            options.seconds,
            NEW_TOKENS // (options.rounds + 3) if options.what == "decode" else None,
        )
        own = workers[0]
        for worker in workers:
            row = {"case": title, "program": worker.name, "error": worker.error, **worker.facts}
            if not worker.error:
                samples = getattr(worker, clock)
                seconds = statistics.median(samples)
                row |= {"milliseconds": 1e3 * seconds, "of_rounds": samples, "megabytes": worker.megabytes}
                row["ratio"] = None if own.error else seconds / statistics.median(getattr(own, clock))
            result["rows"].append(row)
            print(_line(row, peak * options.cores), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1))


def _check(options) -> None:
    """Raises a UserError for what a measurement could not have, or would leave out without a word."""
    check_range("--cores", options.cores, 1, len(os.sched_getaffinity(0)))
    check_range("--rounds", options.rounds, 1, NEW_TOKENS // 2)
    check_range("--seconds", options.seconds, 0)
    for option, known in (("sizes", SIZES), ("modes", ALL)):
        for value in getattr(options, option).split(","):
            check_choice(f"--{option}", value, known)
    for name in options.mixers.split(",") if options.mixers else ():
        mixers.find(name)
    dispatch.check(options.implementation)


def _line(row: dict, peak: float) -> str:
    if row["error"]:
        return f"  {row['program']:24s} {row['error'][:90]}"
    share = ""
    if "flops" in row:
        share = f"{row['flops'] / (row['milliseconds'] / 1e3) / peak:5.0%} of peak"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:6.2f}x"
    spread = f"[{1e3 * min(row['of_rounds']):.2f}-{1e3 * max(row['of_rounds']):.2f}]"
    return (
        f"  {row['program']:24s} {row['milliseconds']:9.2f} ms {spread:20s} {ratio} {row['megabytes']:7.0f} MB {share}"
    )


def _jobs(options):
    """(title, [(name, module, arguments)]) of each case; the first program is ours."""
    has_peers = importlib.util.find_spec("torch") is not None
    choice = {"implementation": options.implementation}
    ours = lambda **what: ("ours", "benchmarks.steps", ["--worker", json.dumps(what | choice)])
    theirs = lambda name, way, **what: (name, "benchmarks.torch_models", [way, json.dumps(what)])
    if options.what == "steps":
        for size in options.sizes.split(","):
            width, depth, length, batch = SIZES[size]
            shape = {"width": width, "length": length, "batch": batch}
            for mixer in options.mixers.split(",") if options.mixers else PEERS:
                jobs = [ours(what="step", mixer=mixer, depth=depth, **shape)]
                layers = common.blocks((mixer,), depth)
                for name, (kind, modes) in PEERS.get(mixer, {}).items() if has_peers else ():
                    for mode in [mode for mode in modes if mode in options.modes.split(",")]:
                        jobs.append(theirs(f"{name} {mode}", "step", kind=kind, depth=layers, mode=mode, **shape))
                yield f"{mixer}: width {width}, depth {layers}, {batch} x {length} tokens", jobs
        return
    width, depth, *_ = SIZES["default"]
    for mixer in options.mixers.split(",") if options.mixers else (*DECODERS, *OTHER_DECODERS):
        for batch in BATCHES:
            for prompt in PROMPTS:
                shape = {"width": width, "batch": batch, "prompt": prompt}
                jobs = [ours(what="decode", mixer=mixer, depth=depth, **shape)]
                if has_peers and mixer in DECODERS:
                    layers = common.blocks((mixer,), depth)
                    jobs.append(theirs("transformers", "decode", kind=mixer, depth=layers, **shape))
                yield f"{mixer}: decoding, batch {batch}, prompt {prompt}", jobs


def _matmul_peak(core: int) -> float:
    """FLOP/s of a large float32 product on one core: in a process that has no other, or the threads that the library has for them
    would do a part of it that no clock of this thread sees."""
    worker = Worker("products", ["-m", "benchmarks.steps", "--worker", json.dumps({"what": "products"})], {core})
    for _ in range(10):
        worker.run(1)
    worker.end()
    if worker.error:
        raise RuntimeError(worker.error)
    return 2 * SIDE**3 / min(worker.cpu)


def _products() -> None:
    """A large product, as a worker."""
    a = np.ones((SIDE, SIDE), np.float32)

    def call(number):
        for _ in range(number):
            a @ a

    serve({"side": SIDE}, call)


def _work(
    what: str, mixer: str, width: int, depth: int, implementation: str, batch: int, length: int = 256, prompt: int = 8
) -> None:
    """Ours, as a worker."""
    command.start()
    chosen = common.experiment(
        common.task_section("language_model", corpus="stdlib", length=length),
        common.model((mixer,), width, depth),
        common.optimizer(1e-3, 1000),
        common.train(1000, batch, implementation=implementation),
    )
    resolved = config.resolve(chosen)
    begin = time.perf_counter()
    built = setup.build(resolved, for_training=what == "step")
    with jax.set_mesh(built.mesh), dispatch.implementation(resolved.train.implementation):
        state = built.init(jax.random.key(0))
        facts = {"parameters": sum(x.size for x in jax.tree.leaves(state["params"]))}
        if what == "step":
            step = make_train_step(built, compute_dtype=resolved.train.compute_dtype, random=resolved.model.random)
            rows = setup.batches(resolved, built, "train", batch, for_training=True)[0]
            compiled = step.function.lower(state, rows, step.placed).compile()
            facts["temporary_megabytes"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
            facts["flops"] = 3 * setup.cost(resolved.model, resolved.task.spec).flops_per_token * batch * length

            def call(number):
                nonlocal state
                for _ in range(number):
                    state, metrics = compiled(state, rows, step.placed)
                assert np.isfinite(float(metrics["loss"]))
        else:
            ids = np.random.default_rng(0).integers(256, size=(batch, prompt), dtype=np.int32)

            def draw(params, ids, carry, key):
                logits, carry = built.apply(params, ids, carry)
                return jax.random.categorical(key, logits[:, -1] / 0.8)[:, None], carry

            def start(params, ids, key):
                return draw(params, ids, built.merge(params).initial_carry(batch, prompt + NEW_TOKENS), key)

            token, carry = jax.jit(start)(state["params"], ids, jax.random.key(0))
            decode, made = jax.jit(draw, donate_argnums=2), 0

            def call(number):
                nonlocal token, carry, made
                for _ in range(number):
                    token, carry = decode(state["params"], token, carry, jax.random.fold_in(jax.random.key(1), made))
                    made += 1
                assert made < NEW_TOKENS, "the carry is full"
                jax.block_until_ready(token)

        serve(facts | {"start_seconds": time.perf_counter() - begin}, call)


if __name__ == "__main__":
    command.run(main)

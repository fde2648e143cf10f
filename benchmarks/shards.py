"""Training steps on rows in shards: temporaries of a device by the number of devices, and what is sent, by the compiler's word.

    python -m benchmarks.shards
    python -m benchmarks.shards --mixers=gla,attention --lengths=8192,65536 --devices=1,8

Each step is compiled for devices that this machine's CPU pretends to be (`--config.mesh.sequence`), one row a step; nothing is
executed. For real devices there is `train.py --compile_for`.
"""

import math

import jax

from common import command
from common.console import say
from compilation import findings, hlo, steps
from compilation.targets import Target
from configs import lm
from training import config

MIXERS = "gla,mamba,delta_net,attention,local_attention"
LENGTHS = "8192,16384,32768,65536"
DEVICES = "1,2,4,8"
WIDTH, DEPTH = 64, 2
# The plan of memory does not depend on how machine code is optimised.
CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(mixer: str, length: int, devices: int) -> tuple[float, list[hlo.Sent], list[hlo.Sent]]:
    """MiB of temporaries; all that is sent over `sequence`; and of it the activations of whole rows."""
    described = lm.get_config(f"mixer={mixer},corpus=stdlib")
    described.task.length = length
    described.model.width, described.model.depth = WIDTH, DEPTH
    described.train.batch_size, described.train.loss_chunks = 1, 8
    described.optimizer.name = "adamw"
    described.mesh.sequence, described.mesh.data = devices, 1
    target = Target("CPUs", jax.devices()[:devices], math.inf)
    step = steps.train(config.resolve(described), target)
    with jax.set_mesh(step.built.mesh):
        program = step.function.lower(*step.arguments).compile(CHEAP)
    sent = [
        one
        for one in hlo.Program(program.as_text()).sent(dict(step.built.mesh.shape))
        if "sequence" in one.axes.split(",")
    ]
    whole = list(findings.of_whole_rows(sent, length, findings.sizes_of_parameters(step)))
    return program.memory_analysis().temp_size_in_bytes / 2**20, sent, whole


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--mixers", default=MIXERS, help="comma-separated")
    parser.add_argument(
        "--lengths", type=command.whole_numbers, default=LENGTHS, help="comma-separated tokens of a row"
    )
    parser.add_argument(
        "--devices", type=command.whole_numbers, default=DEVICES, help="comma-separated sizes of mesh.sequence"
    )
    options = parser.parse_args(arguments)
    lengths, counts = options.lengths, options.devices
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(counts))
    for mixer in options.mixers.split(","):
        rows = []
        for length in lengths:
            cells = [compiled(mixer, length, count) for count in counts]
            sent, whole = cells[-1][1:]
            line = [f"{length:,}", *(f"{temporaries:.1f}" for temporaries, *_ in cells)]
            line += [
                f"{cells[0][0] / cells[-1][0]:.1f}",
                f"{sum(one.bytes for one in sent) / 2**20:.1f}",
                str(len(whole)),
            ]
            say(" ".join(line))
            rows.append(line)
        last = f"on {counts[-1]}"
        head = ["tokens", *(f"MiB on {n}" for n in counts), "first / last", f"MiB sent {last}", f"of whole rows {last}"]
        print(f"\n{mixer}, width {WIDTH}, depth {DEPTH}\n")
        for cells in (head, ["---:"] * len(head), *rows):
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    command.run(main)

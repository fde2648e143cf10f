"""What `benchmarks.device` runs on an accelerator, each part in a process of its own.

Everything is imported where it is used, since the first thing that touches a device keeps it.
"""

import functools
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from common.errors import UserError


class Sizes(NamedTuple):
    """What is run. `tiny` is for a machine without an accelerator, and shows that everything runs.

    Attributes:
      agree: tokens, for the comparison of the forms.
      lengths, batch: of the primitives' timings.
      config: of the model.
      rows: at which training is tried, the largest first: what does not fit is halved.
      decode: rows that decode together.
      rounds: of each timing.
    """

    agree: int
    lengths: tuple[int, ...]
    batch: int
    config: dict[str, Any]
    rows: tuple[int, ...]
    decode: int
    rounds: int


SIZES = {
    False: Sizes(512, (2048, 8192), 8, {"size": "130m", "tokenizer": "bpe:50304"}, (32, 16, 8, 4), 64, 5),
    True: Sizes(24, (32,), 2, {"size": "default", "tokenizer": "byte"}, (2,), 2, 1),
}


def forms(name: str, sizes: Sizes) -> Iterator[dict]:
    """Rows of the comparison of a primitive's forms."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.cases import CASES, case_arrays

    processor, device = jax.devices("cpu")[0], jax.devices()[0]

    def outputs(case, form, arrays, cotangents, place):
        """The leaves of the outputs and of the gradients, in float64."""

        def program(arrays, cotangents):
            y, pull_back = jax.vjp(lambda *arrays: jax.tree.leaves(case.function(form, sizes.agree, *arrays)), *arrays)
            return [*y, *pull_back([c.astype(x.dtype) for c, x in zip(cotangents, y, strict=True)])]

        found = jax.jit(program)(*jax.device_put((arrays, cotangents), place))
        return [np.asarray(x, np.float64) for x in found]

    for case in [case for case in CASES if case.primitive == name]:
        inputs, cotangents = case_arrays(case, sizes.agree)
        for dtype in (jnp.float32, jnp.bfloat16):
            arrays = [jnp.asarray(x, dtype) for x in inputs]
            exact = [x.astype(jnp.float32) for x in arrays]
            with jax.default_device(processor):
                reference = "reference" if "reference" in case.forms() else "auto"
                expected = outputs(case, reference, exact, cotangents, processor)
            for form in dict.fromkeys(("auto", *case.forms())):
                row = {"variant": case.variant, "form": form, "dtype": jnp.dtype(dtype).name}
                try:
                    jax.eval_shape(functools.partial(case.function, form, sizes.agree), *arrays)
                except ValueError:  # not offered
                    continue
                try:
                    found = outputs(case, form, arrays, cotangents, device)
                    count = len(cotangents)
                    error = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in zip(found, expected)]
                    row |= {"outputs": max(error[:count]), "gradients": max(error[count:])}
                except Exception as failure:
                    row["failed"] = _reason(failure)
                yield row


def ops(name: str, sizes: Sizes) -> Iterator[dict]:
    """Rows of the timings of a primitive."""
    import jax
    import jax.numpy as jnp
    import ml_dtypes
    import numpy as np

    from benchmarks.cases import CASES, case_arrays
    from benchmarks.ops import differentiated, jax_rows
    from benchmarks.peers import PEERS, torch_program
    from benchmarks.timing import Clock, Program, measure
    from models import accounting
    from ops import dispatch

    def wide(x, length):
        """Rows of sequences, as many as the batch has."""
        return np.repeat(x[:1], sizes.batch, 0) if x.ndim >= 3 and x.shape[1] == length else x

    for case in [case for case in CASES if case.primitive == name]:
        for length in sizes.lengths:
            inputs, cotangents = ([wide(x, length) for x in arrays] for arrays in case_arrays(case, length))
            half = [[x.astype(ml_dtypes.bfloat16) for x in arrays] for arrays in (inputs, cotangents)]
            rows = jax_rows(case, length, "fwdbwd", *half, with_peers=True)
            programs = [row.program for row in rows]
            for peer in (*PEERS[case.primitive, case.variant], *fused(case.primitive, case.variant)):
                if peer.uses_torch and not peer.missing and _torch_device() is not None:
                    prepare = functools.partial(
                        torch_program, peer, length, "fwdbwd", inputs, cotangents, _torch_device(), "bfloat16"
                    )
                    programs.append(Program(peer.name, True, lambda prepare=prepare: (prepare(), None)))
            for program in programs:
                program.is_peer = True  # what fails is noted, and the others go on
            measure(programs, sizes.rounds, 10.0, Clock())
            with dispatch.matmul_form():
                abstract = lambda arrays: [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays]
                both = differentiated(functools.partial(case.function, "auto"), length, "fwdbwd")
                flops = accounting.flops(both, abstract(cotangents), *abstract(inputs))
            moved = sum(2 * x.size for x in (*inputs, *inputs, *cotangents, *cotangents))
            for program in programs:
                names = next((row.names for row in rows if row.program is program), [program.name])
                row = {"variant": case.variant, "length": length, "batch": sizes.batch, "form": "/".join(names)}
                if program.samples:
                    seconds = statistics.median(program.samples)
                    row |= {"milliseconds": 1e3 * seconds, "gb_per_second": moved / seconds / 1e9}
                    row["tflop_per_second"] = flops.total / seconds / 1e12
                    row["temporary_bytes"], row["difference"] = program.temporary_bytes, program.difference
                if program.note:
                    row["failed" if not program.samples else "note"] = program.note
                yield row


def train(name: str, sizes: Sizes) -> Iterator[dict]:
    """The row of a model in training, with as many rows a batch as the device has memory for."""
    import jax
    import numpy as np

    from compilation import steps
    from compilation.findings import planned
    from compilation.targets import Target
    from ops import dispatch
    from training import setup
    from training.metrics import peak_flops

    device = jax.devices()[0]
    for rows in sizes.rows:
        resolved = _config(name, sizes, rows)
        step = steps.train(resolved, Target("here", [device], math.inf))
        random = np.random.default_rng(0)
        row = {"rows": rows, "length": resolved.task.spec.length}
        try:
            with jax.set_mesh(step.built.mesh), dispatch.implementation(resolved.train.implementation):
                begin = time.perf_counter()
                compiled = step.function.lower(*step.arguments).compile()
                row["compile_seconds"] = time.perf_counter() - begin
                plan = compiled.memory_analysis()
                state = step.built.init(jax.random.key(0))
                batch = {
                    key: jax.device_put(_numbers(random, x, resolved), x.sharding)
                    for key, x in step.arguments[1].items()
                }
                settings = jax.tree.map(
                    lambda value, x: jax.device_put(value, x.sharding), step.built.optimizer.settings, step.arguments[2]
                )
                state, metrics = compiled(state, batch, settings)
                jax.block_until_ready(metrics)
                samples = []
                for _ in range(sizes.rounds):
                    begin = time.perf_counter()
                    for _ in range(3):
                        state, metrics = compiled(state, batch, settings)
                    loss = float(metrics["loss"])
                    samples.append((time.perf_counter() - begin) / 3)
        except jax.errors.JaxRuntimeError as failure:
            if "RESOURCE_EXHAUSTED" not in str(failure) or rows == sizes.rows[-1]:
                raise
            state = batch = compiled = None
            continue
        seconds = statistics.median(samples)
        tokens = rows * resolved.task.spec.length
        cost = setup.cost(resolved.model, resolved.task.spec)
        peak = peak_flops(device)
        used = device.memory_stats() or {}
        yield row | {
            "parameters": cost.parameters,
            "loss": loss,
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": None if peak is None else 3 * cost.flops_per_token * tokens / seconds / peak,
            "planned_bytes": planned(plan),
            "peak_bytes": used.get("peak_bytes_in_use"),
        }
        return


def decode(name: str, sizes: Sizes) -> Iterator[dict]:
    """The row of a model that decodes."""
    import jax
    import jax.numpy as jnp

    from compilation import steps
    from compilation.targets import Target
    from evaluation.generation import of_model
    from ops import dispatch
    from training.state import cast

    device = jax.devices()[0]
    resolved = _config(name, sizes, sizes.decode)
    step = steps.decode(resolved, Target("here", [device], math.inf))
    if step is None:
        raise UserError(f"{name} does not stream")
    built, length = step.built, resolved.task.spec.length
    with jax.set_mesh(built.mesh), dispatch.implementation(resolved.train.implementation):
        params = cast(built.init(jax.random.key(0))["params"], built.metadata, resolved.train.compute_dtype)
        carry = jax.jit(of_model(built)[1], static_argnums=(1, 2))(params, sizes.decode, length)
        token, keys = jnp.zeros(sizes.decode, jnp.int32), jax.random.split(jax.random.key(1), sizes.decode)
        samples, made, calls = [], 0, min(64, length // (sizes.rounds + 2))
        for _ in range(sizes.rounds + 1):  # the first compiles
            begin = time.perf_counter()
            for _ in range(calls):
                token, carry = step.function(params, token, carry, keys, jnp.int32(made))
                made += 1
            jax.block_until_ready(token)
            samples.append((time.perf_counter() - begin) / calls)
    seconds = statistics.median(samples[1:])
    yield {
        "rows": sizes.decode,
        "carry_bytes": sum(x.nbytes for x in jax.tree.leaves(carry)),
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": sizes.decode / seconds,
    }


def _config(name: str, sizes: Sizes, rows: int):
    """The resolved configuration of the model, without its data."""
    from configs import lm
    from training import config

    chosen = lm.get_config(f"mixer={name},size={sizes.config['size']}")
    with chosen.unlocked():
        chosen.task.tokenizer = sizes.config["tokenizer"]
        chosen.train.batch_size = rows
    return config.resolve(chosen, with_data=False)


def _numbers(random, shape, resolved):
    """An array of a batch: tokens at random, and ones for weights and segments."""
    import numpy as np

    if np.issubdtype(shape.dtype, np.integer) and len(shape.shape) == 2:
        return random.integers(resolved.task.spec.vocab_size, size=shape.shape).astype(shape.dtype)
    return np.ones(shape.shape, shape.dtype)


def _torch_device() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def fused(primitive: str, variant: str) -> list:
    """Peers that are kernels for GPUs: flash-linear-attention's and Mamba's, by their documented calls."""
    from benchmarks.peers import Peer

    def layer(module: str, name: str, order: Callable) -> Peer:
        package = module.partition(".")[0]

        def function(length, *inputs):
            y = order(getattr(importlib.import_module(module), name), *inputs)
            return y[0] if isinstance(y, tuple) else y

        return Peer(f"{package} {name}", ("torch", package), function)

    kernels = {
        ("linear_attention", "decay per head"): layer(
            "fla.ops.simple_gla", "chunk_simple_gla", lambda f, q, k, v, g: f(q, k, v, g.float())
        ),
        ("linear_attention", "decay per channel"): layer("fla.ops.gla", "chunk_gla", lambda f, *inputs: f(*inputs)),
        ("delta_rule", "decay per head"): layer(
            "fla.ops.gated_delta_rule",
            "chunk_gated_delta_rule",
            lambda f, q, k, v, beta, g: f(q, k, v, g=g.float(), beta=beta),
        ),
        ("delta_rule", "decay per channel"): layer(
            "fla.ops.kda", "chunk_kda", lambda f, q, k, v, beta, g: f(q, k, v, g=g.float(), beta=beta)
        ),
        ("selective_scan", "Mamba"): layer(
            "mamba_ssm.ops.selective_scan_interface",
            "selective_scan_fn",
            lambda f, x, dt, A, B, C: f(
                *(z.transpose(1, 2) for z in (x, dt)), A.float(), *(z.transpose(1, 2) for z in (B, C))
            ).transpose(1, 2),
        ),
    }
    return [kernels[primitive, variant]] if (primitive, variant) in kernels else []


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip()}".splitlines()[0][:200]

"""What the families with mixtures of experts have in common."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.import_hf.architecture import LINEAR, Block, Options, Tensors


def balance(get: Options, top_k: int) -> float:
    """Our weight of the balance: the library divides counts by tokens, and not by choices."""
    return get("router_aux_loss_coef") * top_k


def shared(size: int, hidden: int) -> dict[str, Any]:
    """Our options of a shared expert of a size, beside experts of another."""
    return {"shared": 1, "shared_hidden": size} if size % hidden else {"shared": size // hidden}


def shared_size(moe: Mapping[str, Any]) -> int:
    """The size of the shared expert."""
    return moe["shared_hidden"] or moe["shared"] * (moe["hidden"] or 1)


def rows(
    block: Block, prefix: str, config: ModelConfig, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Tensors:
    """The maps of the experts, one tensor each, as published files have them."""
    gate, up, down = (f"{name}.weight" for name in names)
    for e in range(config.moe["experts"]):
        for i, name in enumerate((gate, up)):
            yield block(f"{prefix}.{e}.{name}", "channel_mixer.w_in", "d f -> f d", (e, slice(None), i))
        yield block(f"{prefix}.{e}.{down}", "channel_mixer.w_out", LINEAR, (e,))


def period(places: list[int], depth: int) -> tuple[int, int]:
    """The least p and the k < p for which the places are those i < depth with i % p == k; past the depth where there are none,
    and those that fit best where they are no such places."""
    every = ((p, k) for p in range(1, depth + 2) for k in range(p))
    return min(every, key=lambda c: (len({*range(c[1], depth, c[0])} ^ {*places}), c))

"""Based: recall over the lengths and pairs that Based's figure 2 tests on."""

from evaluation.suite import Suite


class Based(Suite):
    """MQAR as in Based (arXiv 2402.18668, figure 2), of models that were trained on its mixture: `mqar` with vocab_size=8192,
    length=256, num_kv_pairs=64 and mixture=64:4*5+128:8+256:16+256:32+256:64."""

    tasks = (
        ("mqar", {"length": (64,), "num_kv_pairs": (4, 8, 16)}),
        ("mqar", {"length": (128,), "num_kv_pairs": (32,)}),
        ("mqar", {"length": (256,), "num_kv_pairs": (64,)}),
        ("mqar", {"length": (512,), "num_kv_pairs": (128,)}),
        ("mqar", {"length": (1024,), "num_kv_pairs": (256,)}),
    )

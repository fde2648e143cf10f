"""Recall: what stood before in the row is asked for again, over numbers of pairs, lengths and depths."""

from evaluation.suite import Suite


class Recall(Suite):
    """MQAR over the lengths and pairs of Zoology's figure 2 (arXiv 2312.04927), induction heads over lengths (arXiv 2312.00752,
    table 11), and a passkey over lengths and depths (arXiv 2305.16300). A model answers those whose tokens are its own."""

    tasks = (
        ("mqar", {"length": (64,), "num_kv_pairs": (4, 8, 16)}),
        ("mqar", {"length": (128,), "num_kv_pairs": (8, 16, 32)}),
        ("mqar", {"length": (256,), "num_kv_pairs": (16, 32, 64)}),
        ("mqar", {"length": (512,), "num_kv_pairs": (64,)}),
        ("induction_heads", {"length": (64, 128, 256, 512, 1024)}),
        ("passkey", {"length": (256, 512, 1024), "depth": (0.1, 0.5, 0.9)}),
    )

"""Language: what a language model says of held-out text at several lengths, and whether it finds a number in it."""

from evaluation.suite import Suite


class Language(Suite):
    """Cross-entropy at several context lengths, and a passkey over lengths and depths (arXiv 2305.16300)."""

    tasks = (
        ("language_model", {"length": (128, 256, 512, 1024)}),
        ("passkey", {"length": (256, 512, 1024), "depth": (0.1, 0.5, 0.9)}),
    )

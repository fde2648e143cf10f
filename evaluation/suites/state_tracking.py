"""State tracking: a state is followed through more steps, and with longer silences, than in training."""

from evaluation.suite import Suite


class StateTracking(Suite):
    """The three test sets of flip-flop language modelling (arXiv 2306.00946), and words of a group at longer lengths, by their
    last position and by the whole sequence (arXiv 2404.08819)."""

    tasks = (
        ("flip_flop", {"test": ("same", "sparse", "dense")}),
        ("word_problem", {"length": (16, 32, 64, 128), "scored": ("last", "all")}),
    )

"""Shallow models with hand-made features: floors of tasks that look harder than they are."""

import collections
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Int


def commonest_of_others(answers: Sequence[str]) -> list[str | None]:
    """For each answer the commonest of the others, where a floor has no rows to be fitted on but those that it scores; None where
    there are no others. Of equally common ones the first in the order of the alphabet."""
    counts = collections.Counter(answers)
    best = sorted(counts, key=lambda answer: (-counts[answer], answer))[:2]

    def other(own: str) -> str | None:
        left = [(own == answer) - counts[answer] for answer in best]
        return min(((count, answer) for count, answer in zip(left, best) if count), default=(0, None))[1]

    found = {own: other(own) for own in counts}
    return [found[own] for own in answers]


def polynomial(features: Float[np.ndarray, "N F"], degree: int) -> Float[np.ndarray, "N P"]:
    """All products of up to `degree` features, and 1."""
    columns = [np.ones(len(features))]
    for size in range(1, degree + 1):
        for chosen in itertools.combinations_with_replacement(range(features.shape[1]), size):
            columns.append(np.prod(features[:, chosen], axis=1))
    return np.stack(columns, 1)


def standardised(
    features: Float[np.ndarray, "N F"], held: Float[np.ndarray, "M F"]
) -> tuple[Float[np.ndarray, "N F"], Float[np.ndarray, "M F"]]:
    """Both with the mean and the standard deviation of the first; constant features become 0."""
    mean, std = features.mean(0), features.std(0)
    scale = np.where(std > 1e-12, std, np.inf)
    return (features - mean) / scale, (held - mean) / scale


def linear_classifier(
    features: Float[np.ndarray, "N F"],
    labels: Int[np.ndarray, "N"],
    held: Float[np.ndarray, "M F"],
    penalty: float = 1e-3,
) -> Int[np.ndarray, "M"]:
    """The likeliest classes of multinomial logistic regression.

    Args:
      features, labels: to be fitted; features are taken relative to their means, in units of the standard deviation of all.
      held: whose classes are wanted.
      penalty: of half the squared weights, beside the mean cross-entropy.
    """
    classes, target = np.unique(labels, return_inverse=True)
    mean, scale = features.mean(0), features.std() or 1.0
    x = np.pad((features - mean) / scale, ((0, 0), (0, 1)), constant_values=1)
    rows = np.arange(len(x))

    def objective(flat):
        weights = flat.reshape(x.shape[1], len(classes))
        scores = x @ weights
        log_p = scores - scipy.special.logsumexp(scores, axis=1, keepdims=True)
        slope = np.exp(log_p)
        slope[rows, target] -= 1
        decayed = np.append(weights[:-1], np.zeros((1, len(classes))), 0)
        loss = -log_p[rows, target].mean() + penalty / 2 * np.sum(np.square(decayed))
        return loss, (x.T @ slope / len(x) + penalty * decayed).ravel()

    start = np.zeros(x.shape[1] * len(classes))
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 100})
    weights = found.x.reshape(x.shape[1], len(classes))
    return classes[((held - mean) / scale @ weights[:-1] + weights[-1]).argmax(1)]

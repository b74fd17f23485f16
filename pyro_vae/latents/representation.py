"""Worth of codes to somebody who knows a few labels."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor


class ProbeAccuracy(NamedTuple):
    """Shares of test data whose label is found from their code.

    Attributes:
        linear: Share found by multinomial logistic regression.
        nearest_neighbours: Share found by the majority of the nearest training codes.
        std_error: Larger of the standard errors of the two, from the number of test data.
    """

    linear: float
    nearest_neighbours: float
    std_error: float


def probe_accuracy(
    codes: Float[Tensor, "data latent"],
    labels: Int[Tensor, " data"],
    test_codes: Float[Tensor, "test latent"],
    test_labels: Int[Tensor, " test"],
    *,
    num_neighbours: int = 10,
) -> ProbeAccuracy:
    """Accuracy of simple classifiers on codes, which are brought to mean 0 and scale 1 first.

    Args:
        codes: Codes of training data, such as ``posterior_mean(guide, train.x)``.
        labels: Classes of the training data.
        test_codes: Codes of the data that are judged.
        test_labels: Classes of those.
        num_neighbours: Training codes that vote.
    """
    train, test = (c.detach().cpu().double().numpy() for c in (codes, test_codes))
    accuracies = []
    for classifier in (LogisticRegression(max_iter=1000), KNeighborsClassifier(num_neighbours)):
        fitted = make_pipeline(StandardScaler(), classifier).fit(train, labels.cpu().numpy())
        accuracies.append(float(fitted.score(test, test_labels.cpu().numpy())))
    errors = [np.sqrt(a * (1 - a) / len(test)) for a in accuracies]
    return ProbeAccuracy(*accuracies, float(max(errors)))

"""How far one next-token distribution is from another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Below this a probability is rounding of float32 log-probabilities.
FLOOR = 1e-7


def kl_with_remainder(p: Sequence[float], q: Sequence[float]) -> float:
    """KL divergence of two distributions of which some classes are listed.

    Args:
        p, q: log-probabilities of the same listed classes, [n]; what they leave
            of 1 is one further class.

    Returns:
        KL(p || q) in nats over the n + 1 classes: a lower bound of the
        divergence over all of them.
    """

    def completed(listed: Sequence[float]) -> np.ndarray:
        values = np.asarray(listed, dtype=np.float64)
        rest = max(1.0 - float(np.exp(values).sum()), FLOOR)
        return np.append(values, np.log(rest))

    log_p, log_q = completed(p), completed(q)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))

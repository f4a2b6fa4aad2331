"""Confidence intervals of means, by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, the same for the same values."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2 or sample.std() == 0:
        mean = float(sample.mean())
        return mean, mean
    found = stats.bootstrap(
        (sample,),
        np.mean,
        method="percentile",
        n_resamples=2000,
        confidence_level=level,
        random_state=0,
    ).confidence_interval
    return float(found.low), float(found.high)

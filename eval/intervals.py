"""Confidence intervals of means, by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

BOOTSTRAP: dict[str, Any] = {"method": "percentile", "n_resamples": 2000, "random_state": 0}


def interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, the same for the same values.

    Raises:
        ValueError: fewer than two values, which tell nothing of their spread.
    """
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        raise ValueError("an interval needs at least two values")
    if sample.std() == 0:
        mean = float(sample.mean())
        return mean, mean
    found = stats.bootstrap(
        (sample,), np.mean, confidence_level=level, **BOOTSTRAP
    ).confidence_interval
    return float(found.low), float(found.high)


def ratio_interval(
    values: Sequence[float], base: Sequence[float], *, level: float = 0.95
) -> tuple[float, float]:
    """The same of the ratio of two means over the same cases, drawn in pairs.

    Raises:
        ValueError: fewer than two cases.
    """
    top, bottom = np.asarray(values, dtype=float), np.asarray(base, dtype=float)
    if len(top) < 2:
        raise ValueError("an interval needs at least two values")
    if np.allclose(top, bottom):
        return 1.0, 1.0
    found = stats.bootstrap(
        (top, bottom),
        lambda t, b, axis=-1: t.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        confidence_level=level,
        **BOOTSTRAP,
    ).confidence_interval
    return float(found.low), float(found.high)


def clustered(
    sums: Sequence[float], counts: Sequence[int], *, level: float = 0.95
) -> tuple[float, float]:
    """The same for values that come in clusters, such as questions about the same
    documents: whole clusters are drawn.

    Where all values are 0, which a bootstrap would take for certainty, the exact
    binomial bound of how often another value may come, to both sides; of one cluster
    alone, which tells nothing, all that is possible.

    Args:
        sums: of the values of each cluster, each value in [-1, 1].
        counts: how many they are; none of them 0.
    """
    total, weight = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    if not total.any():
        bound = stats.binomtest(0, int(weight.sum())).proportion_ci(level).high
        return -float(bound), float(bound)
    if len(total) < 2:
        return -1.0, 1.0
    found = stats.bootstrap(
        (total, weight),
        lambda s, n, axis=-1: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        confidence_level=level,
        **BOOTSTRAP,
    ).confidence_interval
    return float(found.low), float(found.high)


def share_interval(
    right: Sequence[int], counts: Sequence[int], *, level: float = 0.95
) -> tuple[float, float]:
    """Of a share of cases that come in clusters, within [0, 1]; where all are right, or none
    is, the exact binomial bound.

    Args:
        right, counts: cases of each cluster that are right, and all of them; not 0.
    """
    if list(right) == list(counts):
        _, bound = clustered([0] * len(counts), counts, level=level)
        return 1 - bound, 1.0
    low, high = clustered(right, counts, level=level)
    return max(0.0, low), min(1.0, high)

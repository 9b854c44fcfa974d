"""Straight-line fits with intervals from the bootstrap of azr/passk.py. numpy alone.

A least-squares fit is a function of sums over the observations, so resampling observations is resampling sums. With
`groups`, whole groups (steps, tasks, runs) are resampled instead of single observations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from azr.passk import DRAWS, Interval, bootstrap_interval, bootstrap_statistic

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees; then the last
FEW = 6  # observations (or groups) below which a resampled fit says nothing


@dataclass
class Fit:
    """y = coefficients . (1, x...) + error. Intervals are NaN with fewer than FEW observations or groups."""

    coefficients: list[Interval]
    r2: Interval
    n: int


def as_json(interval: Interval, n: int | None = None) -> dict:
    """{"mean", "low", "high"} of floats, and n."""
    row = {name: float(getattr(interval, name)) for name in ("mean", "low", "high")}
    return row if n is None else row | {"n": int(n)}


def linear_fit(x, y, groups=None, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Ordinary least squares of y (n,) on x (n,) or (n, p), with intercept; rows with a NaN are left out.

    ValueError if nothing is left. R^2 of a y without variance is NaN.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    keep = np.isfinite(x).all(axis=1) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if not len(y):
        raise ValueError("nothing to fit: no observation has both values")
    shift, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    design = np.column_stack([np.ones(len(y)), (x - shift) / scale])
    p = design.shape[1]
    products = np.column_stack(
        [(design[:, :, None] * design[:, None, :]).reshape(len(y), p * p), design * y[:, None], y**2]
    )
    units = products if groups is None else _group_sums(products, np.asarray(groups)[keep])

    def statistic(sums: np.ndarray) -> np.ndarray:
        """(..., p + 1): intercept, slopes in the units of x, R^2."""
        gram = sums[..., : p * p].reshape(*sums.shape[:-1], p, p)
        moment, square = sums[..., p * p : p * p + p], sums[..., -1]
        beta = (np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ moment[..., None])[..., 0]
        count = gram[..., 0, 0]
        total = square - moment[..., 0] ** 2 / count
        residual = square - (beta * moment).sum(-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            r2 = np.where(total > 1e-12 * np.abs(square), 1 - residual / total, np.nan)
        slopes = beta[..., 1:] / scale
        intercept = beta[..., 0] - (slopes * shift).sum(-1)
        return np.concatenate([intercept[..., None], slopes, r2[..., None]], axis=-1)

    estimate, few = statistic(units.sum(axis=0)), len(units) < max(FEW, p + 1)

    def with_fit(sums: np.ndarray) -> np.ndarray:
        # a resample of equal values has no fit: it says nothing about the spread of the others
        values = statistic(sums)
        return np.where(np.isfinite(values), values, estimate)

    if few:
        whole = Interval(estimate, np.full(p + 1, np.nan), np.full(p + 1, np.nan))
    else:
        whole = bootstrap_statistic(units, with_fit, draws=draws, seed=seed)
    parts = [Interval(float(whole.mean[i]), float(whole.low[i]), float(whole.high[i])) for i in range(p + 1)]
    return Fit(parts[:-1], parts[-1], len(y))


def ratio_of_sums(hits, of) -> Interval:
    """sum(hits) / sum(of) with the units resampled: a token mean, where a unit is a sequence."""
    return bootstrap_statistic(np.column_stack([hits, of]), lambda sums: sums[..., 0] / sums[..., 1])


def difference_of_means(a, b) -> Interval:
    """mean(b) - mean(a) of two independent samples, each resampled."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    low, high = bootstrap_interval(a), bootstrap_interval(b, seed=1)
    mean = high.mean - low.mean
    # the errors of two independent means add in squares, each side with the interval's own skew (Newcombe 1998)
    down = np.hypot(high.mean - high.low, low.high - low.mean)
    up = np.hypot(high.high - high.mean, low.mean - low.low)
    return Interval(mean, float(mean - down), float(mean + up))


def over_runs(values) -> Interval:
    """Mean over training seeds with Student's t: of three values a bootstrap would be their range at most. One: NaN."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return Interval(float(values.mean()), np.nan, np.nan)
    half = T95[min(len(T95), len(values) - 1) - 1] * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def _group_sums(columns: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(groups, columns) sums over each group."""
    _, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((index.max() + 1, columns.shape[1]))
    np.add.at(sums, index, columns)
    return sums

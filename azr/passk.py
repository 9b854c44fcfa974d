"""pass@k and its relatives, with intervals and tests. numpy alone: the file can be lifted out as it is.

    values = pass_at_k(n, correct, [1, 8, 64])              # (problems, 3), unbiased
    share_interval(values)                                  # Interval(mean, low, high), each (3,)
    difference_interval(values_b - values_a)                # of two models, on the same problems
    holm(sign_flip_test(values_b - values_a))

Every interval is over PROBLEMS: the answers to a problem are already part of its pass@k, and resampling them as well
counts their noise twice (a nominal 95 % then covers 75 to 85 %). An interval is thus about other problems like these,
not about other training runs. Per-problem functions take n, the number of samples (one, or one a problem), and c, the
correct ones, (problems,). Left out: CoT-pass@k, which needs a judge of the reasoning.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

DRAWS = 2000  # bootstrap resamples
CONFIDENCE = 0.95  # of every interval


# ---------------------------------------------------------------- estimators, a value a problem


def pass_at_k(n: int | Sequence[int], c: Sequence[int], k: int | Sequence[int]) -> np.ndarray:
    """Unbiased pass@k = 1 - C(n-c, k) / C(n, k) of each problem, from c correct answers among n.

    n: one number or one a problem; c: (problems,). Returns (problems,) for one k, (problems, ks) for several.
    Product form of Chen et al. 2021 (arXiv 2107.03374): 1 - prod_{i=n-c+1..n} (1 - k/i), cumulated once per n for
    every c, so no factorials and no loop over problems. ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    c, ks = np.asarray(c, dtype=np.int64), np.atleast_1d(np.asarray(k, dtype=np.int64))
    n = np.broadcast_to(np.asarray(n, dtype=np.int64), c.shape)
    if np.any(c < 0) or np.any(c > n):
        raise ValueError("pass@k: the number of correct answers must lie between 0 and the number of samples")
    if not ks.size or np.any(ks < 1):
        raise ValueError(f"pass@k: k must be at least 1, not {ks.tolist()}")
    if n.size and ks.max() > n.min():
        raise ValueError(f"pass@k: k must lie between 1 and the samples a problem has ({n.min()}), not {ks.tolist()}")
    result = np.empty((c.size, ks.size))
    for samples in np.unique(n):
        rows = n == samples
        factors = np.maximum(0.0, 1 - ks / np.arange(samples, 0, -1)[:, None])  # (i = n..1, ks)
        failure = np.concatenate([np.ones((1, ks.size)), np.cumprod(factors, axis=0)])  # row c: all k answers wrong
        result[rows] = 1 - failure[c[rows]]
    return result if np.ndim(k) else result[:, 0]


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Entropy, in nats, of ONE problem's answers as texts; those without an answer are left out; NaN if none is left.

    The plug-in estimate: too low by about (distinct answers - 1) / 2n, so compare it at equal n only.
    """
    counts = np.array(list(Counter(answer for answer in answers if answer is not None).values()), dtype=np.float64)
    if not counts.size:
        return math.nan
    share = counts / counts.sum()
    return float(abs((share * np.log(share)).sum()))


def distinct_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> int:
    """How many different texts are among ONE problem's correct answers. It grows with n: compare at equal n only."""
    return len({answer for answer, ok in zip(answers, correct, strict=True) if ok})


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n/2: at k = n, pass@k is a single draw a problem. Just 1 if n is 1."""
    return [2**i for i in range(max(1, (n // 2).bit_length()))]


# ---------------------------------------------------------------- intervals

FEW = 10  # solved (or unsolved) problems that are too few for a bootstrap
FEW_CHANGED = 8  # problems that carry a difference, likewise
NEARLY_BINARY = 0.8  # of the variance that values 0 or 1 would have: their bootstrap has too few steps


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval: floats, or arrays of one shape."""

    mean: Any
    low: Any
    high: Any

    def __str__(self) -> str:
        if np.ndim(self.mean):
            return ", ".join(str(self[i]) for i in range(len(self.mean)))
        return shown(self)

    def __getitem__(self, column: int) -> Interval:
        return Interval(float(self.mean[column]), float(self.low[column]), float(self.high[column]))

    @property
    def excludes_zero(self) -> Any:
        """Tells whether 0 lies outside the interval, for each entry of `mean`; False where the ends are NaN."""
        return (np.asarray(self.low) > 0) | (np.asarray(self.high) < 0)

    def to_json(self) -> dict[str, float | None]:
        """{"mean", "low", "high"} of floats; null for NaN."""
        pairs = zip(("mean", "low", "high"), (self.mean, self.low, self.high))
        return {name: float(value) if math.isfinite(value) else None for name, value in pairs}


def shown(value: Interval | dict | None, digits: int = 3, sign: bool = False) -> str:
    """An estimate with its interval as text; of an Interval, a dict of its fields, or None, which is "-"."""
    row = value if isinstance(value, dict) else value.to_json() if value else {}
    mean, low, high = (math.nan if row.get(key) is None else row[key] for key in ("mean", "low", "high"))
    if math.isnan(mean):
        return "-"
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{mean:{form}} [{'no interval' if math.isnan(low) else f'{low:{form}}, {high:{form}}'}]"


def bootstrap_interval(
    values: np.ndarray, draws: int = DRAWS, seed: int = 0, ends: tuple[float, float] | None = None
) -> Interval:
    """Mean over problems with its interval. values: (problems,) or (problems, columns), resampled as whole rows.

    ends: the least and the greatest value that a problem can have. With them, columns in which all problems are equal,
    whose resamples are all equal too, get an interval of their own: with 97.5 % confidence at most a share
    s = 1 - 0.025^(1/problems) of other problems differs (Clopper and Pearson 1934, about 3.7 / problems: the "rule of
    three"), and these may all lie at one end. ValueError: no problems.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no problems, so there is nothing to average")
    sums = _resampled_sums(values.reshape(len(values), -1), draws, seed)
    means = values.mean(axis=0)
    result = _interval(means, sums.reshape(draws, *means.shape) / len(values), len(values))
    if ends is None or len(values) < 2:
        return result
    share, equal = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(values)), np.ptp(values, axis=0) == 0
    low = np.where(equal, means - share * (means - ends[0]), result.low)
    high = np.where(equal, means + share * (ends[1] - means), result.high)
    return Interval(means, low, high) if means.ndim else Interval(float(means), float(low), float(high))


def share_interval(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """`bootstrap_interval` for values in [0, 1], such as pass@k, with an answer near 0 and 1.

    All 30 problems solved would give [1, 1], a certainty that 30 problems do not have; and values that are 0 or 1, as
    at k = n, give a bootstrap of a few coarse steps. So where fewer than FEW problems are solved, or unsolved (by the
    sum of the values), or the values are NEARLY_BINARY, the interval is Wilson's (1927) for as many problems with
    values 0 or 1 as would vary by as much. A handful of small values does not tell the variance, so it is drawn towards
    that of values 0 or 1, with a weight of 0.8 of all problems when nothing is solved, fading as more is. The weight
    was chosen by simulation. At 30 problems and k = n coverage cannot be even: the mean has only 31 possible values.
    Values that are all equal and neither 0 nor 1 have the interval of `bootstrap_interval` with ends.
    """
    values = np.asarray(values, dtype=np.float64)
    result, n, mean = bootstrap_interval(values, draws, seed, (0, 1)), len(values), values.mean(axis=0)
    z2, binary = NormalDist().inv_cdf((1 - CONFIDENCE) / 2) ** 2, mean * (1 - mean)
    events, squares = n * np.minimum(mean, 1 - mean), ((values - mean) ** 2).sum(axis=0)
    prior = 0.4 * n / (0.5 + events)
    variance = np.where(binary > 0, (squares + prior * binary) / (n - 1 + prior), 1)
    size = np.where(binary > 0, n * binary / variance, n)
    half = np.sqrt(z2 / size * (binary + z2 / (4 * size)))
    wilson = [np.clip((mean + z2 / (2 * size) + sign * half) / (1 + z2 / size), 0, 1) for sign in (-1, 1)]
    coarse = (events < FEW) | (squares > NEARLY_BINARY * n * binary)
    coarse &= (np.ptp(values, axis=0) > 0) | (binary == 0) | (n < 2)
    # Rounding must not put the mean outside.
    low = np.minimum(mean, np.where(coarse, wilson[0], result.low))
    high = np.maximum(mean, np.where(coarse, wilson[1], result.high))
    return Interval(mean, low, high) if mean.ndim else Interval(float(mean), float(low), float(high))


def difference_interval(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """`bootstrap_interval` for paired differences in [-1, 1], (problems,) or (problems, columns).

    Where few problems carry the difference (their effective number, (sum d^2)^2 / sum d^4, is below FEW_CHANGED; at
    large k most problems do not change at all), resampling them claims too much; none changed would give [0, 0]. There
    the interval is a Wald interval with pseudo-problems as in Agresti and Min 2005 (Statistics in Medicine 24:729):
    w problems of +1 and of -1 and 2w more of 0, with w from 1/2 when nothing changed towards 0 when more did.
    Differences that are all equal, and not few, have the interval of `bootstrap_interval` with ends.
    """
    values = np.asarray(values, dtype=np.float64)
    result, n, mean = bootstrap_interval(values, draws, seed, (-1, 1)), len(values), values.mean(axis=0)
    squares, fourth = (values**2).sum(axis=0), (values**4).sum(axis=0)
    changed = np.where(fourth > 0, squares**2 / np.where(fourth > 0, fourth, 1), 0)
    pseudo = 1 / (1 + changed / 4)
    size, z = n + 2 * pseudo, NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = n * mean / size
    half = z * np.sqrt(squares + pseudo - size * centre**2) / size
    few = (changed < FEW_CHANGED) & (n > 1)
    low = np.where(few, np.minimum(mean, np.maximum(-1, centre - half)), result.low)
    high = np.where(few, np.maximum(mean, np.minimum(1, centre + half)), result.high)
    return Interval(mean, low, high) if mean.ndim else Interval(float(mean), float(low), float(high))


def bootstrap_statistic(columns: np.ndarray, statistic, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Interval of a function of column sums, (..., columns) -> (...) or (..., k), by a bootstrap over problems.

    columns: (problems, columns). NaN where a resample has no value (nothing counts in a denominator).
    """
    columns = np.asarray(columns, dtype=np.float64)
    if not len(columns):
        raise ValueError("no problems, so there is nothing to average")
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate, replicates = statistic(columns.sum(axis=0)), statistic(_resampled_sums(columns, draws, seed))
    return _interval(estimate, replicates, len(columns))


def _resampled_sums(columns: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws, columns): column sums of `draws` resamples of the rows, with replacement."""
    problems, rng, sums = len(columns), np.random.default_rng(seed), []
    for start in range(0, draws, 100):  # counts of 100 resamples at a time, so memory stays small
        size = min(100, draws - start)
        picks = rng.integers(problems, size=(size, problems)) + problems * np.arange(size)[:, None]
        counts = np.bincount(picks.ravel(), minlength=size * problems).reshape(size, problems)
        sums.append(counts.astype(np.float64) @ columns)
    return np.concatenate(sums)


def _interval(estimate: np.ndarray, replicates: np.ndarray, problems: int) -> Interval:
    """Expanded percentile interval (Hesterberg 2015, arXiv 1411.5279, section 5.3): the percentile bootstrap is too
    narrow by sqrt((n-1)/n) and by normal for t, which shows at 30 problems. One problem: NaN."""
    if problems < 2:
        low = high = np.full_like(estimate, np.nan)
    else:
        tail = NormalDist().cdf(math.sqrt(problems / (problems - 1)) * t_quantile((1 - CONFIDENCE) / 2, problems - 1))
        low, high = np.quantile(replicates, [tail, 1 - tail], axis=0)
    if np.ndim(estimate) == 0:
        return Interval(float(estimate), float(low), float(high))
    return Interval(estimate, low, high)


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t by its expansion in 1/freedom (Abramowitz and Stegun 26.7.5); 3e-3 off at 5 degrees, 95 %."""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


# ---------------------------------------------------------------- tests


def sign_flip_test(differences: np.ndarray, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Two-sided p of "no difference" for each column of paired differences, (problems,) or (problems, columns).

    Under the null the two models' answers to a problem could be swapped, so the sum's distribution is that under
    random signs, the same for all columns. All sign patterns if at most 13 problems differ anywhere; else `draws`
    random ones, p = (1 + as large) / (1 + draws).
    """
    differences = np.asarray(differences, dtype=np.float64)
    columns = differences.reshape(len(differences), -1)
    columns = columns[np.any(columns != 0, axis=1)]
    observed = np.abs(columns.sum(axis=0)) * (1 - 1e-12) - 1e-12  # sums differ in the last bits by their order
    if len(columns) <= 13:
        bits = np.arange(2 ** len(columns))[:, None] >> np.arange(len(columns)) & 1
        p = np.mean(np.abs((2.0 * bits - 1) @ columns) >= observed, axis=0)
    else:
        rng, larger = np.random.default_rng(seed), 1
        for start in range(0, draws, 500):
            signs = 2.0 * rng.integers(0, 2, size=(min(500, draws - start), len(columns)), dtype=np.int8) - 1
            larger = larger + (np.abs(signs @ columns) >= observed).sum(axis=0)
        p = larger / (1 + draws)
    return p if differences.ndim > 1 else p[0]


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's (1979) adjusted p values, in the given order: below 0.05 at a family-wise error of 5 %."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * (p.size - np.arange(p.size))))
    return adjusted


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test from the problems that only a, only b solved: Binomial(a + b, 1/2)."""
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n)

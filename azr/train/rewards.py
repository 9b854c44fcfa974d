"""Shapes of the proposer's reward: pure functions of a solve rate (Absolute Zero, arXiv 2505.03335, eq. 4).

The solve rate r is measured on n answers, so a proposer is paid E[R(k / n)] with k ~ Binomial(n, p), not R(p): the
published reward, 1 - r but 0 at the ends, is highest at p = 1 - n^(-1 / (n - 1)), which is 0.257 for n = 8.
"""

from __future__ import annotations

import math

WIDTH = 0.2  # of the gaussian shape


def at_an_end(solve_rate: float) -> bool:
    """Whether a task is never solved or always solved."""
    return solve_rate in (0.0, 1.0)


def learnability(solve_rate: float) -> float:
    """0 if the task is never or always solved, else 1 - r: highest for the hardest task solved at all (eq. 4)."""
    return 0.0 if at_an_end(solve_rate) else 1.0 - solve_rate


def half_peak(solve_rate: float) -> float:
    """1 - 2 |r - 1/2|, which is 0 at both ends (arXiv 2510.27072, section on alternative rewards)."""
    return 1.0 - 2.0 * abs(solve_rate - 0.5)


def variance(solve_rate: float) -> float:
    """4 r (1 - r): the variance of an answer's correctness, scaled to 1."""
    return 4.0 * solve_rate * (1.0 - solve_rate)


def gaussian(solve_rate: float) -> float:
    """exp(-(r - 1/2)^2 / (2 x 0.2^2)), 0 at the ends (Socratic-Zero, arXiv 2509.24726)."""
    return 0.0 if at_an_end(solve_rate) else math.exp(-((solve_rate - 0.5) ** 2) / (2 * WIDTH**2))


def gate(solve_rate: float) -> float:
    """1 if the task is sometimes solved and sometimes not, else 0 (SQLM, arXiv 2508.03682)."""
    return 0.0 if at_an_end(solve_rate) else 1.0


SHAPES = {
    "learnability": learnability,
    "half-peak": half_peak,
    "uniform": lambda solve_rate: 1.0,  # valid is enough
    "variance": variance,
    "gaussian": gaussian,
    "gate": gate,
    "above-chance": learnability,  # of the solve rate that is left when guessing is taken off: `above_chance`
    "random": None,  # of the task, not of its solve rate
}


def above_chance(solve_rate: float, chance: float) -> float:
    """(r - c) / (1 - c), at least 0: the solve rate corrected for guessing, as in Cohen's kappa (1960)."""
    return max(0.0, (solve_rate - chance) / (1.0 - chance)) if chance < 1 else 0.0


def random_reward(task_hash: str) -> float:
    """U(0, 1) that follows from the task alone: the same task earns the same whenever it is proposed."""
    return int(task_hash[:16], 16) / 2**64


def task_reward(shape: str, solve_rate: float, ends_penalty: float = 0.0, task_hash: str = "") -> float:
    """The reward of a valid task: its shape, less `ends_penalty` where it was never or always solved.

    learnability with 0.5 is -0.5 at the ends, as the published code has it.
    """
    value = random_reward(task_hash) if shape == "random" else SHAPES[shape](solve_rate)
    return value - ends_penalty if at_an_end(solve_rate) else value


# ------------------------------------------------------------------------------------------------- what it amounts to


def expected_reward(shape: str, p: float, n: int, ends_penalty: float = 0.0) -> float:
    """E[R(k / n)] over k ~ Binomial(n, p), exact: what a valid task of true solve rate p earns on average.

    random: over tasks, 1/2 less the penalty.
    """
    if shape == "random":
        return 0.5 - ends_penalty * (p**n + (1 - p) ** n)
    terms = (
        math.comb(n, k) * p**k * (1 - p) ** (n - k) * task_reward(shape, k / n, ends_penalty) for k in range(n + 1)
    )
    return math.fsum(terms)


def curves(n: int, ends_penalty: float = 0.0, points: int = 1001) -> dict[str, list[float]]:
    """{"p": true solve rates, shape: its expected reward at each}."""
    p = [i / (points - 1) for i in range(points)]
    return {"p": p, **{shape: [expected_reward(shape, x, n, ends_penalty) for x in p] for shape in SHAPES}}

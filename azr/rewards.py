"""Rewards of both roles: pure functions of a verdict and a solve rate (Absolute Zero, arXiv 2505.03335, eq. 4-6)."""

from __future__ import annotations

INVALID = -1.0  # a proposal that is refused, or whose think/answer format is broken


def learnability(solve_rate: float) -> float:
    """0 if the task is never or always solved, else 1 - r: highest for the hardest task solved at all (eq. 4)."""
    return 0.0 if solve_rate in (0.0, 1.0) else 1.0 - solve_rate


def proposer_reward(valid: bool, well_formed: bool, solve_rate: float | None) -> float:
    """-1 for what is refused or malformed, else the learnability of the task at its measured solve rate."""
    return learnability(solve_rate) if valid and well_formed else INVALID


def solver_reward(correct: bool, well_formed: bool, kind: str = "graded") -> float:
    """graded: 1 correct, -0.5 wrong but well-formed, -1 malformed (eq. 6); binary: 1 if both, else 0."""
    if kind == "binary":
        return float(correct and well_formed)
    if not well_formed:
        return -1.0
    return 1.0 if correct else -0.5

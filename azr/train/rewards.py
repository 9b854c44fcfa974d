"""Rewards of both roles: pure functions of a verdict and a solve rate (Absolute Zero, arXiv 2505.03335, eq. 4-6).

    python -m azr.train.rewards --out plots                    # expected reward of each shape against the true solve rate
    python -m azr.train.rewards --answers 4 --ends-penalty 0.5

The solve rate r is measured on n answers, so a proposer is paid E[R(k / n)] with k ~ Binomial(n, p), not R(p): the
published reward, 1 - r but 0 at the ends, is highest at p = 1 - n^(-1 / (n - 1)), which is 0.257 for n = 8.
"""

from __future__ import annotations

import argparse
import math
import sys

INVALID = -1.0  # a proposal that is refused, or whose think/answer format is broken
WIDTH = 0.2  # of the gaussian shape


def at_an_end(solve_rate: float) -> bool:
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
    "random": None,  # of the task, not of its solve rate
}


def random_reward(task_hash: str) -> float:
    """U(0, 1) that follows from the task alone: the same task earns the same whenever it is proposed."""
    return int(task_hash[:16], 16) / 2**64


def task_reward(shape: str, solve_rate: float, ends_penalty: float = 0.0, task_hash: str = "") -> float:
    """The reward of a valid task: its shape, less `ends_penalty` where it was never or always solved.

    learnability with 0.5 is -0.5 at the ends, as the published code has it.
    """
    value = random_reward(task_hash) if shape == "random" else SHAPES[shape](solve_rate)
    return value - ends_penalty if at_an_end(solve_rate) else value


def proposer_reward(
    valid: bool,
    well_formed: bool,
    solve_rate: float | None,
    shape: str = "learnability",
    ends_penalty: float = 0.0,
    task_hash: str = "",
) -> float:
    """-1 for what is refused or malformed, else the reward of the task at its measured solve rate."""
    return task_reward(shape, solve_rate, ends_penalty, task_hash) if valid and well_formed else INVALID


def solver_reward(correct: bool, well_formed: bool, kind: str = "graded") -> float:
    """graded: 1 correct, -0.5 wrong but well-formed, -1 malformed (eq. 6); binary: 1 if both, else 0."""
    if kind == "binary":
        return float(correct and well_formed)
    if not well_formed:
        return -1.0
    return 1.0 if correct else -0.5


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from azr.analysis.figures import add_output_arguments

    parser.add_argument("--answers", type=int, default=8, help="answers that measure a solve rate (default 8)")
    parser.add_argument("--ends-penalty", type=float, default=0.0, help="as in train_azr.py (default 0)")
    add_output_arguments(parser)


def main(args) -> int:
    from azr.analysis import figures

    if args.answers < 1:
        print(f"azr.train.rewards: --answers must be at least 1, not {args.answers}", file=sys.stderr)
        return 2
    found = curves(args.answers, args.ends_penalty)
    print(f"Expected proposer reward of a valid task, solve rate measured on {args.answers} answers:")
    drawn, (axes,) = figures.figure(1, 1, 5.6, 3.6)
    for i, shape in enumerate(SHAPES):
        best = max(found[shape])
        at = "everywhere" if best - min(found[shape]) < 1e-9 else f"at p = {found['p'][found[shape].index(best)]:.3f}"
        print(
            f"  {shape:13s} highest {at}: {best:.3f}; at p = 0.01: {expected_reward(shape, 0.01, args.answers):.3f}"
        )
        axes.plot(found["p"], found[shape], color=figures.CYCLE[i], linewidth=1.6, label=shape)
    penalty = f", ends penalty {args.ends_penalty:g}" if args.ends_penalty else ""
    title = f"expected proposer reward, {args.answers} answers a task{penalty}"
    figures.label(axes, title, "true solve rate p", "E[R(k / n)]")
    figures.write_outputs(args, "proposer_rewards", found, {"proposer_rewards": drawn})
    return 0


if __name__ == "__main__":
    from azr.analysis.figures import run_module

    sys.exit(run_module(__doc__, add_arguments, main))

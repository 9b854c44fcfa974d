"""The expected reward of a valid proposal against the true solve rate of its task, for every shape of the reward.

python analyze.py rewards --out plots
python analyze.py rewards --answers 4 --ends-penalty 0.5
"""

from __future__ import annotations

import argparse

from azr import drawing
from azr.analysis import figures
from azr.command import Number
from azr.palette import style
from azr.train.rewards import SHAPES, curves, expected_reward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `analyze.py rewards`."""
    answers, penalty = Number(int, 1, 1000), Number(float, 0, 100)
    parser.add_argument("--answers", type=answers, default=8, help="answers that measure a solve rate (default 8)")
    parser.add_argument("--ends-penalty", type=penalty, default=0.0, help="as in train_azr.py (default 0)")
    figures.add_output_arguments(parser)


def main(args) -> int:
    """Prints where each shape is highest and plots them all; returns the exit code. ValueError for bad input."""
    rewards = curves(args.answers, args.ends_penalty)
    print(f"Expected proposer reward of a valid task, solve rate measured on {args.answers} answers:")
    drawn, (axes,) = drawing.figure(1, 5.6, 4.0)
    for i, shape in enumerate(SHAPES):
        best = max(rewards[shape])
        flat, p = best - min(rewards[shape]) < 1e-9, rewards["p"][rewards[shape].index(best)]
        at = "everywhere" if flat else f"at p = {p:.3f}"
        print(f"  {shape:13s} highest {at}: {best:.3f}; at p = 0.01: {expected_reward(shape, 0.01, args.answers):.3f}")
        # markers at different places, so that of two equal curves (learnability, above-chance) both are seen
        every = max(1, len(rewards["p"]) // 10)
        places = (i * every // len(SHAPES), every)
        axes.plot(rewards["p"], rewards[shape], label=shape, markevery=places, **drawing.look(style(shape)))
    penalty = f", ends penalty {args.ends_penalty:g}" if args.ends_penalty else ""
    title = f"expected proposer reward, {args.answers} answers per task{penalty}"
    drawing.label(axes, title, "true solve rate p of a task", f"expected reward E[R(k / {args.answers})]")
    drawing.legend(drawn, [axes])
    figures.write_outputs(args, "proposer_rewards", rewards, {"proposer_rewards": drawn})
    return 0

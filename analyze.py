"""What a training run did, measured afterwards; every subcommand has --help.

    python analyze.py sparsity --base tiny --adapter runs/tiny-0               what the update did to the weights
    python analyze.py sparsity --base qwen-3b --tuned DIR --json sparsity.json --out plots

Exit codes: 0 done, 1 completed but the answer is no, 2 bad input and nothing written. This file only dispatches: each
subcommand is a module of azr/ with `add_arguments(parser)` and `main(args) -> int`, which raises ValueError, in one
line, for bad input.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from azr.command import Parser
from azr.console import note

# subcommand -> (module, one line of help); a module is imported when its name is typed, so that --help stays fast
COMMANDS = {
    "sparsity": ("azr.weights.sparsity", "size, sparsity, rank and concentration of an update"),
    "entropy": ("azr.analysis.entropy", "exact entropy of a model on given text, and the curves of a run"),
    "dynamics": ("azr.analysis.dynamics", "validity, solve rates, lengths, diversity, rewards, time of a run"),
    "difficulty": (
        "azr.analysis.difficulty",
        "harder tasks or a weaker solver: fixed solvers on each stage's proposals",
    ),
    "forgetting": ("azr.analysis.forgetting", "what was lost, against KL, size and sparsity of the update"),
    "health": ("azr.analysis.health", "what a run was warned of; works while it runs too"),
    "rewards": ("azr.analysis.rewards", "the expected reward of a proposal against the true solve rate"),
    "report": ("azr.analysis.report", "one HTML page about one or more runs"),
}


def main(arguments: list[str]) -> int:
    """Returns the subcommand's exit code: see the module."""
    parser = Parser(prog="analyze.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    module = importlib.import_module(COMMANDS[chosen][0]) if chosen else None
    for name, (_, help_text) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=help_text,
            description=module.__doc__ if name == chosen else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            module.add_arguments(command)
    args = parser.parse_args(arguments)
    try:
        importlib.import_module("azr.analysis.figures").check_outputs(args)
        return module.main(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # RunError and ModelError are ValueErrors
        note(f"analyze.py {args.command}: {error}")
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("analyze.py: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # | head
        os._exit(0)

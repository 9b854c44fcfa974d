"""Can a base be learned on? The gates of the embedded model: one command each, results/tiny/NAME.json, what is there is
not made again.

    python results/tiny_gates.py base                    accuracy at each temperature, styles, lengths, pass@k; gate d
    python results/tiny_gates.py forced                  made to answer at once or to think in full; gate b
    python results/tiny_gates.py proposals               do proposals follow their references, are they valid; c, g
    python results/tiny_gates.py rlvr --seed 0           150 steps on fixed tasks: the gain and what it is; a, b2
    python results/tiny_gates.py oracle --seed 0         the same with easy and with hard tasks; e
    python results/tiny_gates.py selfplay --seed 0       the default run, before and after; f
    python results/tiny_gates.py examples [--adapter DIR]      proposals and answers as text
    python results/tiny_gates.py table                   all of it as Markdown, into docs/tiny.md

Each takes --model DIR (default: the embedded model), --quick (a smoke test, into OUT/quick) and --out. The first three
take minutes on one core. Exit codes: 0 done, 2 bad input. The intervals are over held-out tasks, 95 %.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT), str(RESULTS)]

import gate_base
import gate_proposals
import gate_table
import gate_training
from sandbox import SandboxError

COMMANDS = {
    "base": gate_base.base,
    "forced": gate_base.forced,
    "proposals": gate_proposals.proposals,
    "rlvr": gate_training.rlvr,
    "oracle": gate_training.oracle,
    "selfplay": gate_training.selfplay,
    "examples": gate_proposals.examples,
    "table": gate_table.report,
}
TRAININGS = ("rlvr", "oracle", "selfplay")


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message: str) -> None:
        """Prints the message in one line, without the usage, and exits with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    """The parser of all commands."""
    made = Parser(prog="tiny_gates.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name in COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("--model", default="tiny", help="directory of an embedded base (the one in azr/tiny)")
        command.add_argument("--out", type=Path, default=RESULTS / "tiny", help="of the results (results/tiny)")
        command.add_argument("--seed", type=int, default=0, help="of sampling, and of a training (0)")
        command.add_argument("--quick", action="store_true", help="a smoke test")
        if name in TRAININGS:
            command.add_argument("--runs", type=Path, default=ROOT / "runs" / "tiny-gates", help="for the trainings")
            command.add_argument("--flags", default="", metavar="'--x 1'", help="more flags of train_azr.py")
        if name in ("rlvr", "oracle"):
            command.add_argument("--steps", type=int, default=gate_training.STEPS, help="of each training (150)")
        if name == "examples":
            command.add_argument("--adapter", type=Path, help="a checkpoint of a training (none: the base)")
    return made


def main(arguments: list[str]) -> int:
    """Returns the exit code: see the module."""
    options = parser().parse_args(arguments)
    if options.quick:
        options.out = options.out / "quick"
        options.runs = getattr(options, "runs", ROOT / "runs") / "quick"
    if options.command in TRAININGS:  # train_azr.py is started in the root
        options.runs = options.runs.resolve()
        options.model = options.model if options.model == "tiny" else str(Path(options.model).resolve())
    try:
        print(COMMANDS[options.command](options))
    except (ValueError, OSError, SandboxError) as error:
        print(f"tiny_gates.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

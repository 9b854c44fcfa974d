"""How long the programs are that runs propose: mean statements per window of steps, as a table.

    python train_azr.py --seed 0 --eval-samples 0 --proposer no-update --out runs/no-update-0
    python results/proposal_lengths.py runs/tiny-0 runs/no-update-0

Of valid deductions and abductions (an induction's program is given). Brackets: 95 % over proposals, normal; they say
nothing about other training seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from azr.runs import read_samples
from gate_numbers import statements
from gate_text import table

WINDOW = 10  # steps


def lengths(run: Path) -> dict[int, list[int]]:
    """Window -> statements of each valid program that was proposed in it."""
    windows: dict[int, list[int]] = {}
    for row in read_samples(run):
        if row["role"] == "proposer" and row["reason"] == "ok" and row["mode"] != "induction" and row["step"] > 0:
            windows.setdefault((row["step"] - 1) // WINDOW, []).append(statements(row["task"]["program"]) or 0)
    return windows


def cell(values: list[int] | None) -> str:
    """Mean [low, high]; a dash below two values."""
    if not values or len(values) < 2:
        return "-"
    mean, half = statistics.mean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def main(runs: list[Path]) -> int:
    """Prints a row per run."""
    measured = {run: lengths(run) for run in runs}
    windows = sorted({window for of_run in measured.values() for window in of_run})
    head = ["run", *(f"steps {WINDOW * w + 1}-{WINDOW * w + WINDOW}" for w in windows)]
    print(table(head, [[run.name, *(cell(of_run.get(w)) for w in windows)] for run, of_run in measured.items()]))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    sys.exit(main(parser.parse_args().runs))

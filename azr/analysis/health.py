"""What goes wrong in a run, in words: the table of azr/analysis/checks.py, asked at every step.

    python analyze.py health runs/tiny-0               what a run was warned of; works while it runs too
    python analyze.py health runs/tiny-0 --limits      every limit with its reason

The run on the screen (`Watch`), this command and the report all use this one table. `Health.add` takes the rows of
metrics.jsonl one by one and returns what is new at each; it knows nothing else, so a resumed run says the same as one
that was never stopped, and a finished one can be asked again. A warning is about the mean of the last 10 steps, is
said once, and again when it is twice as far past its limit, shows in another mode, or has lasted 50 steps. Left out:
any change of settings on its own; a warning never stops or alters a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from azr.analysis.checks import CHECKS, WINDOW, Finding, Window
from azr.jsonl import read_object
from azr.runs import RunError, read_metrics

AGAIN_AFTER = 50  # steps until a warning that still holds is repeated
WORSE = 2.0  # times further past its limit: said again before that
TAIL = 32 << 20  # bytes of samples.jsonl that are searched for an example: several steps of any model
DERIVED = ("cut-off", "format", "valid", "no-task", "refused", "no-advantage", "no-update")


def causes(findings: list[Finding]) -> list[Finding]:
    """Without what another finding explains: one fault, one warning."""
    places = {f.check: set(f.places) for f in findings}
    if "entropy-rise" in places:  # all the rest follows from it
        findings = [f for f in findings if f.check not in DERIVED]
    cut = {place.removeprefix("solver ") for place in places.get("cut-off", ()) if place.startswith("solver ")}
    explained = {
        "refused": places.get("valid", set()),  # which names the reason
        "format": cut,
        "no-advantage": cut | places.get("format", set()),  # all alike, since all malformed
    }
    hollow = {"no-task": ("valid",), "no-update": ("valid", "no-task", "no-advantage", "cut-off", "format")}
    return [
        f
        for f in findings
        if not (f.check in explained and set(f.places) <= explained[f.check])
        and not any(other in places for other in hollow.get(f.check, ()))
    ]


class Health:
    """The warnings of a run, row by row. said: every warning given; now: those that hold after the last row; until: the
    last step at which each held."""

    def __init__(self, config: dict) -> None:
        """config: the settings of the run, as in config.json."""
        self.window, self.said, self.now = Window(config), [], []
        self.until: dict[str, int] = {}
        self._last: dict[tuple[str, str], Finding] = {}

    def add(self, row: dict) -> list[Finding]:
        """Takes the next row; returns the warnings to say at it."""
        self.window.add(row)
        self.now = causes([f for check in CHECKS if (f := check.look(self.window))])
        self.until |= {f.check: f.step for f in self.now}
        new = [f for f in self.now if self._is_news(f)]
        for f in new:
            self._last |= {(f.check, place): f for place in f.places or ("",)}
        self.said += new
        return new

    def _is_news(self, f: Finding) -> bool:
        """Whether to say it now: see the module."""
        earlier = [self._last.get((f.check, place)) for place in f.places or ("",)]
        if any(e is not None and f.step - e.step < WINDOW for e in earlier):
            return False  # the same rows, mostly
        return any(e is None or f.level >= WORSE * e.level or f.step - e.step >= AGAIN_AFTER for e in earlier)

    def warnings(self) -> list[str]:
        """Each warning once, the last time it was said, and whether it still holds."""
        latest: dict[str, Finding] = {}
        first: dict[str, int] = {}
        for f in [*self.said, *self.now]:
            first.setdefault(f.check, f.step)
            latest[f.check] = f
        lines = []
        for check, f in latest.items():
            when = f"step {f.step}" if first[check] == f.step else f"steps {first[check]} to {f.step}"
            if f not in self.now and self.until[check] < self.window.last[-1]["step"]:
                when += ", gone by the end"
            lines.append(f"{when}: {f.what}. {f.advice}")
        return lines

    def summary(self) -> list[str]:
        """Lines for the end of a run."""
        if lines := self.warnings():
            return ["what to look at:", *(f"- {line}" for line in lines)]
        count = self.window.count
        steps = "1 step" if count == 1 else f"{count} steps"
        return [f"health: nothing to warn of in {steps} (checks: python analyze.py health --limits)"]


def example(run_dir: Path, f: Finding) -> str | None:
    """The last proposal of samples.jsonl up to the finding's step that was refused for its reason, on one line."""
    path = Path(run_dir) / "samples.jsonl"
    if f.example is None or not path.is_file():
        return None
    mode, reason = f.example
    mark, latest = json.dumps({"reason": reason})[1:-1].encode(), None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        for line in file:
            if mark not in line or not line.endswith(b"\n") or not line.startswith(b"{"):
                continue
            row = json.loads(line)
            if row["step"] > f.step:
                break
            if (row["role"], row["mode"], row["reason"]) == ("proposer", mode, reason):
                latest = row["response"]
    return None if latest is None else ascii(latest if len(latest) <= 90 else latest[:90] + " ...")


class Watch:
    """Says the warnings of a running run as they come; of what is in metrics.jsonl already, they were said before."""

    def __init__(self, config: dict, run_dir: Path, say: Callable[[str], None]) -> None:
        """config: the settings; say: prints a line, `console.warn`."""
        self.health, self.run_dir, self.say = Health(config), Path(run_dir), say
        if (self.run_dir / "metrics.jsonl").exists():
            for row in steps_of(self.run_dir):
                self.health.add(row)

    def add(self, row: dict) -> None:
        """Takes the metrics of a step that has ended, and says what is new."""
        for f in self.health.add(row):
            shown = example(self.run_dir, f)
            self.say(f.text() + (f"; example of {f.example[1]}: {shown}" if shown else ""))


def steps_of(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl that are training steps. RunError: no such file, or a damaged one."""
    return [row for row in read_metrics(run_dir) if row["step"] > 0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `analyze.py health`."""
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run directory, also of a run going on")
    parser.add_argument("--limits", action="store_true", help="print the limit of every check, with its reason")


def main(args) -> int:
    """Prints, returns the exit code. ValueError, in one line: no such run."""
    if args.limits:
        print("check          limit  judged from  why")
        for check in CHECKS:
            sign = "<" if check.below else " "
            print(f"{check.name:13s}{sign}{check.limit:5g}  step {check.steps:2d}      {check.why}")
        return 0
    if args.run is None:
        raise ValueError("which run? give its directory (or --limits)")
    rows = steps_of(args.run)
    health = Health(read_object(args.run / "config.json", RunError))
    for row in rows:
        for f in health.add(row):
            print(f.text())
            if shown := example(args.run, f):
                print(f"    example of {f.example[1]}: {shown}")
    print("\n".join(health.summary()))
    return 0

"""The one table of warnings: what goes wrong in a run, in words, with its limit and the flag to try.

    python analyze.py health runs/tiny-0               what a run was warned of; works while it runs too
    python analyze.py health runs/tiny-0 --limits      every limit with its reason

The run on the screen (`Watch`), this command and the report all use CHECKS. `Health.add` takes the rows of
metrics.jsonl one by one and returns what is new at each; it knows nothing else, so a resumed run says the same as one
that was never stopped, and a finished one can be asked again. A warning is about the mean of the last 10 steps, is
said once, and again when it is twice as far past its limit, shows in another mode, or has lasted 50 steps. Left out:
any change of settings on its own; a warning never stops or alters a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from azr.analysis import conditions
from azr.analysis.conditions import WINDOW, Window, cooler, listed, lower_rate, warmer
from azr.runs import RunError, read_metrics

AGAIN_AFTER = 50  # steps until a warning that still holds is repeated
WORSE = 2.0  # times further past its limit: said again before that
TAIL = 32 << 20  # bytes of samples.jsonl that are searched for an example: several steps of any model


@dataclass(frozen=True)
class Finding:
    """What is past its limit at a step. level: how far, 1 at the limit; places: the modes or roles it is about."""

    check: str
    step: int
    what: str
    advice: str
    level: float
    places: tuple[str, ...] = ()
    example: tuple[str, str] | None = None  # (mode, reason) of a refused proposal that shows it

    def text(self) -> str:
        """The warning as it is printed, without the example."""
        return f"step {self.step}: {self.what}. {self.advice}"


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Check:
    """A row of the table. It warns if a value of `measure` is at the limit or above it (`below`: under it).

    sentence and advice: a text in which {places}, {percent}, {value} stand for what is past the limit, or a function
    of (window, {place: value} past the limit).
    """

    name: str
    limit: float
    why: str  # the reason of the limit
    steps: int  # rows before it is asked
    measure: conditions.Measure
    sentence: str | Callable[[Window, dict[str, float]], str]
    advice: str | Callable[[Window, dict[str, float]], str]
    below: bool = False
    short: bool = False  # asked at the end of a run that has fewer steps, too
    example: Callable[[Window, dict[str, float]], tuple[str, str]] | None = None  # (mode, reason) of a refusal

    def look(self, w: Window) -> Finding | None:
        """What is past the limit after the last row; None if nothing is, or it is too early to ask."""
        if w.count < (min(self.steps, w.config.get("steps") or self.steps) if self.short else self.steps):
            return None
        values = self.measure(w)
        past = {place: v for place, v in values.items() if (v < self.limit if self.below else v >= self.limit)}
        if not past:
            return None
        # Zero counts as four times below a limit.
        worst = min(past.values()) if self.below else max(past.values())
        level = self.limit / max(worst, self.limit / 4) if self.below else worst / self.limit
        shown = self.example(w, past) if self.example else None
        sentence, advice = (self._text(part, w, past) for part in (self.sentence, self.advice))
        places = tuple(place for place in past if place)
        return Finding(self.name, w.last[-1]["step"], sentence, advice, level, places, shown)

    @staticmethod
    def _text(part, w: Window, past: dict[str, float]) -> str:
        if not isinstance(part, str):
            return part(w, past)
        value = next(iter(past.values()))
        return part.format(places=listed(past), value=value, percent=100 * value)


# "Healthy": the worst 10-step mean of a run of the embedded model that learned: three of 80 to 100 steps of the present
# base, and ten of 80 to 120 steps of the one before it, where that one was worse. What those have is no warning.
# The gap was measured on a CPU, sampled at temperature 1, LoRA of rank 16: mean |difference|, share of tokens whose
# ratio is outside [0.9, 1.1]. SmolLM2-135M: fp32 3.2e-6, 0 % (n 461; NF4 3.2e-6, 0 %, n 470); fp16 3.9e-3, 0 % (n 461;
# NF4 4.6e-3, 0 %, n 480); bf16 2.8e-2, 4.1 % (n 461; NF4 3.6e-2, 8.3 %, n 480). The embedded model before this one (n
# 432 to 438): fp32 5e-7, fp16 4e-4, bf16 4e-3, all 0 %. Published shares, of a trainer alone at two batch sizes:
# Qwen2.5-3B 6.9 %, 7B 5.6 % in bf16, 0.00 % in fp16 and fp32 (verl, issue 6280); TRL 7.5 to 8 % in bf16 (issue 6789).
CHECKS = (
    Check(
        "skipped",
        2,
        "of the last 10 updates had a non-finite gradient; one can be chance",
        1,
        conditions.non_finite,
        "{value:.0f} of the last 10 updates were not finite and were skipped",
        lambda w, past: f"Try {lower_rate(w.config)}; non_finite_step_*.jsonl has the batches",
    ),
    Check(
        "memory",
        4,
        "times smaller micro-batches or fewer sequences than planned: two back-offs or more",
        1,
        conditions.shrunk,
        conditions.memory_words,
        "Results stay, but steps get slower: try a smaller --preset, --max-new-tokens or --prompt-tokens",
    ),
    Check(
        "gap",
        0.10,
        "nats a token between sampler and trainer in bf16; healthy 0.04: rounding",
        3,
        conditions.gap_in("bf16"),
        conditions.gap_words,
        conditions.gap_advice,
    ),
    Check(
        "gap, fp16",
        0.02,
        "the same in fp16; healthy 0.004 to 0.005",
        3,
        conditions.gap_in("fp16"),
        conditions.gap_words,
        conditions.gap_advice,
    ),
    Check(
        "gap, fp32",
        0.001,
        "the same in fp32; healthy 3e-6",
        3,
        conditions.gap_in("fp32"),
        conditions.gap_words,
        conditions.gap_advice,
    ),
    Check(
        "entropy-rise",
        1.50,
        "times that of the first 3 steps, in the last 5; healthy up to 1.11",
        8,
        conditions.entropy_rise,
        conditions.rise_words,
        lambda w, past: f"Begin again with {lower_rate(w.config, 4)} or less",
    ),
    Check(
        "cut-off",
        conditions.CUT_OFF,
        "share of responses that end at --max-new-tokens; healthy up to 8 %",
        3,
        conditions.cut_off,
        conditions.cut_off_words,
        conditions.cut_off_advice,
    ),
    Check(
        "format",
        0.50,
        "share of answers without the asked form; healthy up to 6 %, an untrained base more",
        5,
        conditions.malformed,
        "answers without the asked form ({places})",
        conditions.malformed_advice,
    ),
    Check(
        "valid",
        conditions.HARDLY_VALID,
        "share of a mode's proposals; healthy from 25 %; below, the group is one long refusal",
        3,
        conditions.rate("proposer", "valid_rate"),
        conditions.valid_words,
        lambda w, past: conditions.remedy(w, *conditions.valid_example(w, past)),
        below=True,
        short=True,
        example=conditions.valid_example,
    ),
    Check(
        "no-task",
        0.50,
        "share of steps without any valid proposal: most of the run proposes for nothing",
        3,
        conditions.no_task,
        "{percent:.0f} % of the last steps had no valid proposal, so no new task",
        lambda w, past: f"Try {cooler(w.config)}; samples.jsonl has the reasons",
        short=True,
    ),
    Check(
        "refused",
        0.75,
        "share of a mode's proposals refused for one reason; healthy up to 72 % (wrong_count)",
        5,
        conditions.refused,
        conditions.refused_words,
        lambda w, past: conditions.remedy(w, *conditions.refused_example(w, past)),
        example=conditions.refused_example,
    ),
    Check(
        "duplicates",
        0.30,
        "share of a mode's proposals that were proposed before; healthy up to 13 %",
        5,
        conditions.rate("proposer", "duplicate_rate"),
        "proposals repeat earlier ones ({places})",
        lambda w, past: warmer(w.config),
    ),
    Check(
        "no-advantage",
        0.95,
        "share of answers in groups that are all alike: no gradient; healthy up to 89 %",
        5,
        conditions.rate("solver", "zero_advantage_rate"),
        "nearly all groups of answers are alike and teach nothing ({places})",
        conditions.no_advantage_advice,
    ),
    Check(
        "no-update",
        0.50,
        "share of steps in which no sample had an advantage: most of the run trains nothing",
        3,
        conditions.no_update,
        "{percent:.0f} % of the last steps trained nothing: no sample had an advantage",
        "Try more --prompts-per-mode, more --answers, or a larger --model",
        short=True,
    ),
    Check(
        "one-answer",
        0.40,
        "share of a mode's answers that are one text; 101 of 109 runs stayed below 37 %",
        5,
        conditions.one_answer,
        "the same answer to everything ({places}): proposals and answers have settled on it",
        conditions.one_answer_advice,
    ),
    Check(
        "entropy",
        0.70,
        "share lost since the first 10 steps; healthy up to 60 %, as they learn",
        2 * WINDOW,
        conditions.entropy_loss,
        conditions.loss_words,
        conditions.loss_advice,
    ),
    Check(
        "held-out",
        0.055,
        "lost since the best: 3 standard errors, 360 tasks of which 12 % change sides",
        1,
        conditions.held_out_loss,
        conditions.held_out_words,
        conditions.held_out_advice,
    ),
    Check(
        "sandbox",
        0.02,
        "share of a mode's proposals without a verdict, the machine's fault; healthy 0",
        3,
        conditions.no_verdict,
        "the sandbox gave no verdict on proposals ({places}): the machine is too busy",
        "They count for nothing; run python -m sandbox doctor, and stop what else uses the CPU",
    ),
    Check(
        "timeout",
        0.20,
        "share of proposals or answers that ran out of CPU time; healthy up to 0.8 %",
        5,
        conditions.slow,
        "programs run out of CPU time ({places})",
        lambda w, past: f"Steps get slow; see them in samples.jsonl under timeout; try {cooler(w.config)}",
    ),
)
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
    """The warnings of a run, row by row.

    config: its settings as in config.json. said: every warning given; now: those that hold after the last row;
    until: the last step at which each held.
    """

    def __init__(self, config: dict) -> None:
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
        return [f"health: nothing to warn of in {self.window.count} steps (checks: python analyze.py health --limits)"]


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
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="a run directory; the run may still be going on"
    )
    parser.add_argument("--limits", action="store_true", help="print the limit of every check, with its reason")


def main(args) -> int:
    """Returns the exit code."""
    if args.limits:
        for check in CHECKS:
            sign = "<" if check.below else " "
            print(f"{check.name:13s}{sign}{check.limit:5g}  from step {check.steps:2d}  {check.why}")
        return 0
    if args.run is None:
        print("analyze.py health: which run? give its directory (or --limits)", file=sys.stderr)
        return 2
    try:
        rows = steps_of(args.run)
        config = json.loads((args.run / "config.json").read_text(encoding="utf-8"))
    except (RunError, OSError, ValueError) as error:
        print(f"analyze.py health: {error}", file=sys.stderr)
        return 2
    health = Health(config)
    with contextlib.suppress(BrokenPipeError):  # | head
        for row in rows:
            for f in health.add(row):
                print(f.text())
                if shown := example(args.run, f):
                    print(f"    example of {f.example[1]}: {shown}")
        print("\n".join(health.summary()), flush=True)
        return 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
    return 0

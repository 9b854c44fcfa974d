"""The parser of every script and of every `python -m`: an error is one line on stderr, exit code 2.

    parser = Parser(prog="script.py")
    parser.add_argument("--answers", type=Number(int, 1, 1024))    # "must be a whole number from 1 to 1,024, not '0'"

A plain `type=int` takes 63 bits and `type=float` what is finite. No value may be empty: "" is most often a variable of
a shell that is not set. Standard library only; can be lifted out.
"""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass
from pathlib import Path

MOST = 2**63 - 1  # beyond it neither numpy nor torch takes a whole number
LARGEST = 1e300
MAX_WORKERS = 1024  # processes at a time: no machine has more cores to give them


@dataclass(frozen=True)
class Number:
    """What a numeric flag takes: the type of its argument, and the check of a value from a file of settings.

    kind: int or float. low, high: the ends, which belong to it unless `above` (low) or `below` (high) is set.
    """

    kind: type
    low: float
    high: float
    above: bool = False
    below: bool = False

    def __call__(self, text: str) -> float:
        """The number of a command line. argparse's error for what is none or lies outside."""
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value is None or not self.holds(value):
            raise argparse.ArgumentTypeError(f"must be {self}, not {text!r}")
        return value

    def holds(self, value: float) -> bool:
        """Whether the value lies inside; NaN and infinities do not."""
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        what, number = ("a whole number", ",d") if self.kind is int else ("a number", ",g")
        low, high = ("2^63 - 1" if end == MOST else format(end, number) for end in (self.low, self.high))
        if not (self.above or self.below):
            return f"{what} from {low} to {high}"
        start, end = "above" if self.above else "of at least", "below" if self.below else "at most"
        return f"{what} {start} {low} and {end} {high}"


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


# What other trainers call it: the nearest spelling alone would suggest another flag, or none.
SYNONYMS = {
    "--lr": "--learning-rate",
    "--batch-size": "--prompts-per-mode",
    "--num-generations": "--answers",
    "--group-size": "--answers",
    "--max-tokens": "--max-new-tokens",
    "--max-length": "--max-new-tokens",
    "--max-steps": "--steps",
    "--output-dir": "--out",
    "--output": "--out",
    "--dataset": "--data",
    "--lora-r": "--lora-rank",
    "--report-to": "--tracker",
    "--load-in-4bit": "--quantization nf4",
    "--bf16": "--dtype bf16",
    "--fp16": "--dtype fp16",
    "--n": "--samples",
    "--num-samples": "--samples",
}


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest flag for an unknown one; exit code 2."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.register("type", None, _text)
        self.register("type", Path, lambda text: Path(_text(text)))
        self.register("type", int, Number(int, -MOST, MOST))
        self.register("type", float, Number(float, -LARGEST, LARGEST))

    def error(self, message: str) -> None:
        """Prints the line and ends the process."""
        words = [word for word in message.split() if word.startswith("--")]
        typed, known = words[0].split("=")[0] if words else "", [f for f in self._flags() if f not in ("-h", "--help")]
        meant = SYNONYMS.get(typed.replace("_", "-"), "")
        near = [meant] if meant.split(" ")[0] in known else difflib.get_close_matches(typed, known, 1)
        hint = f" (did you mean {near[0]}?)" if near and "unrecognized" in message else ""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}{hint}\n")

    def _flags(self) -> list[str]:
        """All flags, those of the subcommands too: an unknown one is reported by the parser above them."""
        flags = []
        for action in self._actions:
            flags += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._flags()]
        return flags

"""The parser of every script and of every `python -m`: an error is one line on stderr, exit code 2.

Standard library only; can be lifted out.
"""

from __future__ import annotations

import argparse
import difflib

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

    def error(self, message: str) -> None:
        """Prints the line and ends the process."""
        words = [word for word in message.split() if word.startswith("--")]
        typed, known = words[0].split("=")[0] if words else "", [f for f in self._flags() if f not in ("-h", "--help")]
        meant = SYNONYMS.get(typed.replace("_", "-"), "")
        near = [meant] if meant.split(" ")[0] in known else difflib.get_close_matches(typed, known, 1)
        hint = f" (did you mean {near[0]}?)" if near and "unrecognized" in message else ""
        self.exit(2, f"{self.prog}: {message}{hint}\n")

    def _flags(self) -> list[str]:
        """All flags, those of the subcommands too: an unknown one is reported by the parser above them."""
        flags = []
        for action in self._actions:
            flags += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._flags()]
        return flags

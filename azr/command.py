"""The parser of every script and of every `python -m`: an error is one line on stderr, exit code 2.

Standard library only; can be lifted out.
"""

from __future__ import annotations

import argparse
import difflib


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest flag for an unknown one; exit code 2."""

    def error(self, message: str) -> None:
        """Prints the line and ends the process."""
        words = [word for word in message.split() if word.startswith("--")]
        near = difflib.get_close_matches(words[0].split("=")[0], self._flags(), 1) if words else []
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

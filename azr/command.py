"""The parser of every script: errors in one line, exit code 2."""

from __future__ import annotations

import argparse
import difflib


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest flag for an unknown one; exit code 2."""

    def error(self, message: str) -> None:
        words = [w for w in message.split() if w.startswith("--")]
        known = [option for action in self._actions for option in action.option_strings]
        near = (
            difflib.get_close_matches(words[0].split("=")[0], known, 1) if words and "unrecognized" in message else []
        )
        self.exit(2, f"{self.prog}: {message}{f' (did you mean {near[0]}?)' if near else ''}\n")

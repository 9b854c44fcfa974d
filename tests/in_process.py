"""Commands of this repository called as functions: a start of Python with torch would take seconds of every test."""

import contextlib
import io
import subprocess
from collections.abc import Callable


def run_here(main: Callable[[list[str]], int], *arguments) -> subprocess.CompletedProcess:
    """Exit code, stdout and stderr of `main(arguments)`, as of a process."""
    shown, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # what argparse does
            code = stop.code
    return subprocess.CompletedProcess(arguments, code, shown.getvalue(), errors.getvalue())

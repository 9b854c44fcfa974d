"""Lines on the screen and in log files: say, prose, warn, and a bar that is one line where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

if hasattr(sys.stdout, "reconfigure"):  # what a model writes must not end a run where the locale is not UTF-8
    sys.stdout.reconfigure(errors="backslashreplace")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 118)
INDENT = " " * 9


def say(text: str = "") -> None:
    """A line, never wrapped into pieces that a log file would break."""
    console.print(Text(text), soft_wrap=True)


def prose(text: str, file=None) -> None:
    """A line for reading: on a terminal broken between words, elsewhere whole, so that grep finds it."""
    file = sys.stdout if file is None else file
    if file.isatty():
        text = textwrap.fill(
            text, max(40, console.width), subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
        )
    print(text, file=file, flush=True)


def warn(text: str) -> None:
    """One loud line on stderr: every fallback gets one."""
    prose(f"warning: {text}", sys.stderr)


def duration(seconds: float) -> str:
    minutes = int(round(seconds)) // 60
    return (
        f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{int(round(seconds)) % 60:02d} min"
    )


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives advance(done, total): a bar on a terminal, one line at the end elsewhere."""
    start = time.perf_counter()
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda done, total: None
        say(f"{title}: {time.perf_counter() - start:.0f} s")
        return
    columns = TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)

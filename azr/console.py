"""Lines on the screen and in log files: say, prose, note, warn, a bar that is lines without a terminal, a pulse.

    say("step 3: ...")                      # stdout: what was asked for
    note("sampling 400 answers")            # stderr: what one may want to know
    warn("no GPU: computed on the CPU")     # stderr: every fallback gets one
    with bar("solving") as advance: advance(done, total)
    advance = pulse("step 3, solve", 512, "answers"); advance(1)       # a line every half minute, none before

Needs rich; imports nothing else of this project and can be lifted out.
"""

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
LINE_SECONDS = 30  # between two lines of a bar where there is no terminal


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


def note(text: str) -> None:
    """One line on stderr: progress, and what was chosen."""
    prose(text, sys.stderr)


def warn(text: str) -> None:
    """One loud line on stderr: every fallback gets one."""
    note(f"warning: {text}")


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes = int(round(seconds)) // 60
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{int(round(seconds)) % 60:02d} min"


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives advance(done, total): on a terminal a bar with the time left, elsewhere a line now and then and at the end.

    The first call says where the work begins: what was done before (a run that goes on) does not count as fast.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        with _lines(title) as advance:
            yield advance
        return
    columns = TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def pulse(title: str, total: int, unit: str) -> Callable[[int], None]:
    """Gives advance(count): a line on stderr with the time left every LINE_SECONDS, so none where it takes less."""
    start = last = time.perf_counter()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done, now = done + count, time.perf_counter()
        if now - last >= LINE_SECONDS:
            left = duration((now - start) / done * max(0, total - done))
            note(f"{title}: {min(done, total)} of {total} {unit}, {left} left")
            last = now

    return advance


@contextlib.contextmanager
def _lines(title: str) -> Iterator[Callable[[int, int], None]]:
    """The bar of a log file: a line every LINE_SECONDS, and one at the end."""
    start = last = time.perf_counter()
    first: int | None = None

    def advance(done: int, total: int) -> None:
        nonlocal first, last
        first, now = done if first is None else first, time.perf_counter()
        if now - last >= LINE_SECONDS and done > first:
            left = (now - start) / (done - first) * (total - done)
            say(f"{title}: {done} of {total}, {duration(left)} left")
            last = now

    yield advance
    say(f"{title}: {time.perf_counter() - start:.0f} s")

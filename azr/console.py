"""Lines on the screen and in log files: say, prose, note, warn, a bar that is lines without a terminal, a pulse.

    say("step 3: ...")                      # stdout: what was asked for
    note("sampling 400 answers")            # stderr: what one may want to know
    warn("no GPU: computed on the CPU")     # stderr: every fallback gets one
    with bar("solving") as advance: advance(done, total)
    advance = pulse("step 3, solve", 512, "answers"); advance(1)       # nothing where it takes but seconds

Needs rich; imports nothing else of this project and can be lifted out.
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

if hasattr(sys.stdout, "reconfigure"):  # what a model writes must not end a run where the locale is not UTF-8
    sys.stdout.reconfigure(errors="backslashreplace")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """`| head`, or a `tee` that died: an error like any other, where rich would end the process at once."""
        _silence(sys.stdout)
        raise BrokenPipeError


def _silence(file) -> None:
    """Sends what is still printed nowhere: nobody reads it any more, and at its exit Python would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


console = _Console(highlight=False, width=None if sys.stdout.isatty() else 118)
INDENT = " " * 9
LINE_SECONDS = 30  # between two lines of a bar where there is no terminal
LIVE_SECONDS = 5  # from which on a phase shows on a terminal how far it is


def counted(count: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


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
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        _silence(file)
        raise


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


def pulse(title: str, total: int, unit: str) -> Callable[..., None]:
    """Gives advance(count, tokens=0, more=0), which says on stderr how far a phase is, from a quarter on with the time
    left and tokens a second. more: what has come to the total.

    On a terminal one line that is written anew, from LIVE_SECONDS on, and gone when all is done; elsewhere a line every
    LINE_SECONDS. So a short phase shows nothing.
    """
    start = last = time.perf_counter()
    done = tokens = 0
    # the cursor goes back to where the line begins: what is printed next, if only by a stop, writes over it
    live = sys.stderr.isatty() and not console.is_dumb_terminal
    first, every, form = (LIVE_SECONDS, 0.2, "\x1b[K{}\r") if live else (LINE_SECONDS, LINE_SECONDS, "{}\n")

    def advance(count: int, new_tokens: int = 0, more: int = 0) -> None:
        nonlocal done, tokens, total, last
        done, tokens, total, now = done + count, tokens + new_tokens, total + more, time.perf_counter()
        if live and done >= total:
            print(form.format("") if last > start else "", end="", file=sys.stderr, flush=True)
        elif done and now - start >= first and now - last >= every:
            text = f"{title}: {min(done, total)} of {total} {unit}"
            # of samples that run side by side the first to end are the short ones: they say nothing about the others
            if done >= total / 4:
                rate = f", {tokens / (now - start):,.0f} tokens/s" if tokens else ""
                text += f"{rate}, {duration((now - start) / done * max(0, total - done))} left"
            print(form.format(text[: console.width - 1] if live else text), end="", file=sys.stderr, flush=True)
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

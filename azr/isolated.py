"""Checks that may crash, hang or print secrets: each in a forked child, what it found as plain text without names.

    values, why = apart(lambda: iter([probe()]), seconds=60)    # why: None, or in one line how it ended early
    found = finding(check, argument)                            # a check that returns Findings
    print(scrub(text))                                          # no home directory, user, host, tokens

Left out: checks side by side, Windows (which has no fork).
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Findings:
    """What the checks found: lines of (label, text), and what they mean for training."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)  # will not work because
    slows: list[str] = field(default_factory=list)  # works, but


# ------------------------------------------------------------------------------------------------ what is not said


@functools.cache
def _secrets() -> list[tuple[re.Pattern, str]]:
    """(pattern, what stands for it): values first, then names."""
    import pwd  # here: whoever reads on Windows that nothing can be tried there gets no further

    patterns = [(re.compile(r"\bhf_\w+"), "<token>"), (re.compile(r"(?<=://)[^/@\s]+@"), "")]
    for name, value in os.environ.items():
        if re.search("TOKEN|SECRET|PASSW|CREDENTIAL|KEY", name.upper()) and len(value) >= 6:
            patterns.append((re.compile(re.escape(value)), "<secret>"))
    homes, users = {os.path.expanduser("~")}, {os.environ.get(name, "") for name in ("USER", "LOGNAME")}
    with contextlib.suppress(KeyError):  # an unnamed uid
        entry = pwd.getpwuid(os.getuid())
        homes, users = homes | {entry.pw_dir}, users | {entry.pw_name}
    homes |= {os.path.realpath(home) for home in homes}
    users |= {os.path.basename(home) for home in homes}
    for home in sorted(homes - {"/"}, key=len, reverse=True):
        patterns.append((re.compile(re.escape(home) + r"(?![\w-])"), "~"))
    names = [(user, "<user>") for user in users - {"root"}] + [(socket.gethostname(), "<host>")]
    return patterns + [(re.compile(rf"(?<!\w){re.escape(n)}(?!\w)"), mask) for n, mask in names if len(n) > 1]


def scrub(text: str) -> str:
    """The text without tokens, home directory, user and machine name."""
    for pattern, mask in _secrets():
        text = pattern.sub(mask, text)
    return text


def one_line(error: BaseException | str) -> str:
    """Returns the class of an exception and the first line of its message (or of a text), scrubbed, cut to 160."""
    text = str(error).strip() or "no message"
    kind = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    return scrub(kind + text.splitlines()[0])[:160]  # cut after scrubbing: half a token would not be recognised


# ---------------------------------------------------------------------------------------------- a child a check


def apart(check: Callable[[], Iterator], seconds: float = 300) -> tuple[list, str | None]:
    """(what `check()` yields, why it ended early or None), run in a forked child: it may crash, hang or exit."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(check, there))
    child.start()
    there.close()
    values, why, deadline = [], f"no answer in {seconds:.0f} s", time.monotonic() + seconds
    while here.poll(max(0.0, deadline - time.monotonic())):
        try:
            value, error = here.recv()
        except EOFError:  # the child has ended
            child.join()
            code = child.exitcode
            why = f"ended by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}" if code else None
            break
        if error is not None:
            why = error
            break
        values.append(value)
    child.kill()
    child.join()
    here.close()
    return values, why


def _child(check, there) -> None:
    """Runs the check and ends the process; what libraries say on the way goes nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        for value in check():
            there.send((value, None))
        os._exit(0)
    except BaseException as error:  # SystemExit of a package too: any end is a finding
        there.send((None, one_line(error)))
    finally:
        os._exit(1)


def finding(check: Callable[..., Findings], *arguments, seconds: float = 300, vital: bool = False) -> Findings:
    """The findings of a check that is run apart. One that fails is a line, and blocks training if it is vital."""
    values, why = apart(lambda: iter([vars(check(*arguments))]), seconds)
    if values:
        return Findings(**values[0])
    name = check.__name__.replace("_", " ")
    return Findings([(name, f"broken: {why}")], [f"the check of {name} failed: {why}"] if vital else [])


# ------------------------------------------------------------------------------------------------ shared by the checks


def output_of(*command: str) -> str | None:
    """What a program prints; None if there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def cores() -> float:
    """Cores this process may use: its affinity, and the quota of its control group."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):  # version 2: "max 100000" or "150000 100000"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, int(quota) / int(period))
    return count


def read_text(path: str) -> str:
    """Returns the text of a file, and "" if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""

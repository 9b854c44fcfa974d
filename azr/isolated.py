"""Checks that may crash, hang or print secrets: each in a forked child, what it found as plain text without names.

    values, why = apart(lambda: iter([probe()]), seconds=60)    # why: None, or in one line how it ended early
    found = finding(check, argument)                            # a check that returns Findings
    print(scrub(text))                                          # no home directory, user, host, tokens

Left out: checks side by side, Windows (no fork there: the check runs in this process, guarded but not apart).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
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
    patterns = [(re.compile(r"\bhf_\w+"), "<token>"), (re.compile(r"(?<=://)[^/@\s]+@"), "")]
    for name, value in os.environ.items():
        if re.search("TOKEN|SECRET|PASSW|CREDENTIAL|KEY", name.upper()) and len(value) >= 6:
            patterns.append((re.compile(re.escape(value)), "<secret>"))
    homes, users = {os.path.expanduser("~")}, {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")}
    with contextlib.suppress(ImportError, KeyError):  # Windows; an unnamed uid
        entry = importlib.import_module("pwd").getpwuid(os.getuid())
        homes, users = homes | {entry.pw_dir}, users | {entry.pw_name}
    homes |= {os.path.realpath(home) for home in homes}
    for home in sorted(homes, key=len, reverse=True):
        if len(home) > 1:
            patterns.append((re.compile(re.escape(home) + r"(?![\w-])"), "~"))
    users |= {os.path.basename(home) for home in homes}
    names = [(user, "<user>") for user in users - {"root"}] + [(socket.gethostname(), "<host>")]
    patterns += [(re.compile(rf"(?<!\w){re.escape(name)}(?!\w)"), mask) for name, mask in names if len(name) > 1]
    return patterns


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
    """(what `check()` yields, why it ended early or None), run in a forked child: it may crash, hang or exit.

    The values pass through JSON. Where there is no fork (Windows), it runs in this process.
    """
    if not hasattr(os, "fork"):
        return _here(check)
    read, write = os.pipe()
    with tempfile.TemporaryFile() as transcript:
        pid = os.fork()
        if pid == 0:
            _child(check, write, transcript.fileno())
        os.close(write)
        text, late = _read_until(read, time.monotonic() + seconds)
        os.close(read)
        if late:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        transcript.seek(0)
        last = transcript.read().decode(errors="replace").strip().splitlines()[-1:]
    records = [json.loads(line) for line in text.splitlines() if line.endswith("]")]
    values = [value for kind, value in records if kind == "value"]
    if late:
        return values, f"no answer in {seconds:.0f} s"
    if code == 0 or (errors := [value for kind, value in records if kind == "error"]):
        return values, None if code == 0 else errors[0]
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return values, f"ended by {name}" + (f": {one_line(last[0])}" if last else "")


def _here(check) -> tuple[list, str | None]:
    values = []
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            values.extend(json.loads(json.dumps(value)) for value in check())
    except Exception as error:  # whatever a broken package raises is a finding
        return values, one_line(error)
    return values, None


def _child(check, write: int, said: int) -> None:
    """Runs the check and ends the process; what libraries say on the way goes to `said`."""
    code = 1
    try:
        for descriptor in (1, 2):
            os.dup2(said, descriptor)
        for value in check():
            os.write(write, json.dumps(["value", value]).encode() + b"\n")
        code = 0
    except BaseException as error:  # SystemExit of a package too: any end is a finding
        os.write(write, json.dumps(["error", one_line(error)]).encode() + b"\n")
    finally:
        os._exit(code)


def _read_until(descriptor: int, deadline: float) -> tuple[str, bool]:
    """All that is written until the other end closes, and whether the deadline came first."""
    data = b""
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (more := os.read(descriptor, 65536)):
            return data.decode(), False
        data += more
    return data.decode(errors="replace"), True


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

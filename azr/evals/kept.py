"""What reference solutions gave, kept on disk from one call to the next: scoring again runs none of them again.

    kept = Kept(directory("references"), stamp=code_version())
    kept.get([program, inputs])                   # the value that was put under these parts and this stamp, or None
    kept.put([program, inputs], {"outputs": ["1", "4"]})
    kept.trim()                                   # at the end: the files that were not used for longest go

A file stands for one value. Its name is the hash of all that the value depends on, so whatever changes is another file,
and nothing needs to be declared out of date. It is believed if its first line says the same hash, the rest has the hash
that the line says, and it belongs to this user and nobody else may write it: expected outputs decide grades. What is
damaged or somebody else's is said in a line, and made again. Where nothing can be written nothing is kept.

Programs in the sandbox can neither read nor write here: seccomp lets them open no file. Left out: a lock. A file is
written aside and renamed, and two processes that make the same one make it alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import stat
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from azr.console import warn
from azr.jsonl import replacing

MOST_BYTES = 64_000_000  # of all files together


def directory(name: str) -> Path | None:
    """The place of this name in the user's cache: below $AZR_CACHE, or azr/ in $XDG_CACHE_HOME or ~/.cache. None where
    there is none, and where AZR_CACHE is set and empty: nothing is kept."""
    own = os.environ.get("AZR_CACHE")
    if own is not None:
        return Path(own) / name if own else None
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # others are to be ignored, says its specification
        return Path(shared, "azr", name)
    with contextlib.suppress(RuntimeError):  # a user without a home
        return Path.home() / ".cache" / "azr" / name
    return None


class Kept:
    """The values below a directory that were made under the same `stamp`; a directory of None keeps nothing."""

    def __init__(self, place: Path | None, stamp: Any) -> None:
        self.place, self.stamp = place, stamp
        self.used: list[str] = []  # the dates of what was found; lists, since several threads add to them
        self.made: list[str] = []  # the keys of what was written

    def _key(self, parts: Any) -> str:
        return hashlib.sha256(json.dumps([self.stamp, parts]).encode()).hexdigest()

    def get(self, parts: Any) -> Any:
        """The value that was put under these parts; None if there is none, or none to be believed."""
        if self.place is None:
            return None
        key = self._key(parts)
        path = self.place / key
        try:
            with open(path, "rb") as file:
                status, head, body = os.fstat(file.fileno()), file.readline(200), file.read()
        except OSError:
            return None
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            warn(f"{path}: belongs to somebody else, or others may write it; not used, made again")
            return None
        date, _, said = head.decode("ascii", "replace").rstrip("\n").partition(" ")
        if said != f"{key} {hashlib.sha256(body).hexdigest()}":
            warn(f"{path}: damaged, or no file of this program; not used, made again")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # `trim` goes by the last use
        self.used.append(date)
        return json.loads(zlib.decompress(body))

    def put(self, parts: Any, value: Any) -> None:
        """Keeps a value of JSON types, whole or not at all, where a file can be written."""
        if self.place is None:
            return
        key = self._key(parts)
        body = zlib.compress(json.dumps(value).encode(), 1)
        head = f"{time.strftime('%Y-%m-%d')} {key} {hashlib.sha256(body).hexdigest()}\n"
        with contextlib.suppress(OSError):
            self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self.place / key) as file:
                os.fchmod(file.fileno(), 0o600)  # whatever the umask is: see `get`
                file.write(head.encode() + body)
            self.made.append(key)

    def trim(self) -> None:
        """Removes the files that were not used for longest until all together are within MOST_BYTES."""
        if not self.made:
            return
        with contextlib.suppress(OSError):
            files = [(entry.stat(), entry.path) for entry in os.scandir(self.place) if entry.is_file()]
            left = sum(status.st_size for status, _ in files)
            for status, path in sorted(files, key=lambda file: file[0].st_mtime):
                if left <= MOST_BYTES:
                    break
                os.unlink(path)
                left -= status.st_size


def machine(packages: Iterable[str], *sources: Path) -> list[str]:
    """What the output of a program depends on besides itself: Python, the system and its mathematical library, the
    processor (it decides how floats are rounded), these packages, and the text of these source files that run it."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    versions = []
    for name in sorted(packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    return [sys.version, platform.platform(), model[1] if model else platform.machine(), *versions, code]

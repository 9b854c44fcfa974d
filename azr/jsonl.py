"""JSON and JSON lines: one strict reader, one tolerant reader, one atomic writer, and a filter over lines.

    for where, row in strict_lines("tasks.jsonl"):          # ValueError: "tasks.jsonl, line 3: not a JSON line (...)"
    rows = list(tolerant_lines("metrics.jsonl", notes))     # what is damaged is left out, and noted in words
    write_json_atomic("result.json", {...})                 # a reader sees the old file or the new one, never a part
    stream(answer)                                          # stdin to stdout, line by line

Strict is for files that somebody gives as input: a line that is left out would change what is measured. Tolerant is
for the logs of a run, which is perhaps still writing them, or died in a write. Standard library only; can be lifted
out.

The filter answers each line of its input with one line, in order. A bad line (no JSON, not UTF-8, too long, a missing
key) is answered with {"error", "line"} and costs no other line its answer. Left out: threads. What has arrived is
answered at once, so a peer that writes one line and waits gets its answer, and a file that is piped in is worked on in
batches large enough for all cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import json
import math
import os
import select
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_LINE = 8_000_000  # bytes of a line that the filter takes
BATCH = 256  # lines that are answered together at most


# ---------------------------------------------------------------- reading


def read_object(path: str | Path, error: type[ValueError] = ValueError) -> dict:
    """The JSON object that a file holds. error: what is raised, in one line that names the file, if it holds none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:  # bytes that are not UTF-8 are a ValueError
        raise error(f"{path}: cannot be read ({getattr(cause, 'strerror', None) or cause})") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def strict_lines(path: str | Path, error: type[ValueError] = ValueError) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", object) of each line that is not blank; a file that is gzipped is unpacked on the way.

    error: what is raised, in one line with file and number, at the first line that is no JSON object. A last line
    without its end is one too: it was cut off in its writing.
    """
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as cause:
                    torn = "" if line.endswith(b"\n") else "; the line was cut off in its writing"
                    raise error(f"{where}: not a JSON line ({cause}){torn}") from cause
                if not isinstance(row, dict):
                    raise error(f"{where}: expected a JSON object, found {type(row).__name__}")
                yield where, row
    except (OSError, EOFError, zlib.error) as cause:
        raise error(f"{path}: cannot be read ({getattr(cause, 'strerror', None) or cause})") from cause


def tolerant_lines(path: str | Path, notes: list[str]) -> Iterator[dict]:
    """The JSON objects of a file, line by line. What is damaged is left out and becomes one note in `notes`, at the
    end: a torn last line one, all other lines that are no objects together another."""
    bad, last_bad = [], False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            last_bad = not isinstance(row, dict) and bool(line.strip())
            if isinstance(row, dict):
                yield row
            elif last_bad:
                bad.append(number)
    name = Path(path).name
    if last_bad:
        bad.pop()
        notes.append(f"{name}: the last line is torn (the run is being written, or died in a write): left out")
    if bad:
        notes.append(f"{name}: {len(bad)} line(s) are no JSON objects, the first is line {bad[0]}: left out")


def open_bytes(path: str | Path) -> BinaryIO:
    """The bytes of a file, unpacked if it is gzipped, whatever its name says."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else open(path, "rb")


# ---------------------------------------------------------------- writing


def plain(value: Any, where: str = "value", finite: bool = True) -> Any:
    """`value` as JSON types. finite: NaN and infinities become None (JSON has none). TypeError names the place."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value), where, finite)
    if isinstance(value, dict):
        return {str(key): plain(item, f"{where}[{key!r}]", finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]", finite) for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item, where, finite) for item in value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # scalars of numpy and torch
        return plain(value.item(), where, finite)
    raise TypeError(f"{where}: a {type(value).__name__} cannot be written as JSON")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Writes readable JSON, whole or not at all. NaN becomes null. TypeError: what is no JSON type; OSError."""
    text = json.dumps(plain(value, Path(path).name), indent=2, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def write_jsonl_atomic(path: str | Path, rows: Iterable[dict]) -> None:
    """The same for one JSON object a line; `rows` may be a generator of gigabytes."""
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(plain(row), allow_nan=False).encode() + b"\n")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends; if it raises, `path` stays as it was.

    Written aside as NAME.tmp-PID, synced, renamed: a kill at any instant leaves the old file or the new one.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            yield file
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file or directory; some network file systems refuse it for directories."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- a filter


def stream(answer: Callable[[list[dict]], list]) -> int:
    """Answers every line of stdin on stdout; returns the exit code: 1 when a line was bad, else 0.

    `answer` takes the rows of a batch and gives, for each, an object or the ValueError that says what is wrong with
    it.
    """
    number = faults = 0
    for lines in batches(0, BATCH):
        rows = [_read(line) for line in lines]
        answers = iter(answer([row for row in rows if isinstance(row, dict)]))
        written = []
        for row in rows:
            number += 1
            result = next(answers) if isinstance(row, dict) else row
            if isinstance(result, ValueError):
                faults += 1
                result = {"error": str(result), "line": number}
            if isinstance(row, dict) and "id" in row:
                result = {"id": row["id"]} | result
            written.append(json.dumps(result) + "\n")
        data = memoryview("".join(written).encode())
        try:
            while data:  # not print: at its end Python would complain of a reader that is gone
                data = data[os.write(1, data) :]
        except BrokenPipeError:  # nobody reads any more
            return 1
    if faults:
        print(f"{faults} of {number} lines were bad; their answers say why", file=sys.stderr)
    return int(faults > 0)


def batches(source: int, size: int) -> Iterator[list[bytes | None]]:
    """Lists of up to `size` lines: waits for one, then takes what has already come. None stands for a line over
    MAX_LINE."""
    pending, lines, skipping, ended = bytearray(), [], False, False
    while not ended or lines:
        while not ended and (not lines or len(lines) < size and select.select([source], [], [], 0)[0]):
            chunk = os.read(source, 1 << 16)
            ended = not chunk
            if ended and (pending or skipping):
                chunk = b"\n"
            *whole, rest = chunk.split(b"\n")
            for part in whole:
                lines.append(None if skipping or len(pending) + len(part) > MAX_LINE else bytes(pending + part))
                pending, skipping = bytearray(), False
            pending += rest
            if len(pending) > MAX_LINE:
                pending, skipping = bytearray(), True
        if lines:
            yield lines[:size]
        del lines[:size]


def _read(line: bytes | None) -> dict | ValueError:
    """The object of a line, or what is wrong with it."""
    if line is None:
        return ValueError(f"the line has more than {MAX_LINE:,} bytes")
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        return ValueError(f"not a JSON line: {error}")
    return row if isinstance(row, dict) else ValueError(f"expected a JSON object, got {type(row).__name__}")

"""A filter over JSON lines: answers each line of its input with one line, in order.

A bad line (no JSON, not UTF-8, too long, a missing key) is answered with {"error", "line"} and costs no other line
its answer. Left out: threads. What has arrived is answered at once, so a peer that writes one line and waits gets its
answer, and a file that is piped in is worked on in batches large enough for all cores.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Iterator

MAX_LINE = 8_000_000  # bytes of a line
BATCH = 256  # lines that are answered together at most


def stream(answer: Callable[[list[dict]], list], source: int = 0, sink: int = 1) -> int:
    """Answers every line of the descriptor `source` on `sink`; returns the exit code: 1 when a line was bad, else 0.

    `answer` takes the rows of a batch and gives, for each, an object or the ValueError that says what is wrong with
    it.
    """
    number = faults = 0
    for lines in batches(source, BATCH):
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
        try:
            _write(sink, "".join(written).encode())
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


def _write(sink: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sink, view) :]

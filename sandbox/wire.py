"""What goes over the pipes between the pool and its lanes.

A request is HEAD and a marshalled tuple (pool to child; the pool is trusted). A child answers with frames: B it is
confined and begins, with its process id, before it has seen a program; for each program R refused by the gate, X failed
while loading, A to be run alone, or G loaded, then one frame per input: O value, E exception, U of a type without a
literal, L too large (N before it: the program has looked at the text or the hash of an address); D done. The server
adds one REPORT after each child. Nothing here trusts a child.

    frames, whole = decode(frame(b"O", "[1]", cpu_seconds=0.01))         # [("O", "[1]", 0.01)], True

Imports literal.py, and is imported by both sides, so that they cannot disagree.
"""

import marshal
import struct

from . import literal

HEAD = struct.Struct("=I")  # length of a request
FRAME = struct.Struct("=cII")  # kind, length of the text in bytes, CPU time used so far in microseconds
REPORT = struct.Struct("=iqq")  # wait status, CPU time in microseconds, peak memory in KiB
KINDS = frozenset(b"BRXAGNOEULD")
OVERSLEPT = 75  # exit code of a child whose sleeps and CPU time together passed its limit of CPU time


def pack_args(text: str, limits: literal.Limits) -> str | bytes:
    """The arguments of one call as a child takes them: marshalled, or canonical text when there are sets, whose
    order would come from this process otherwise. Raises literal.LiteralError for what is not literals within the
    limits.

    marshal because it is several times faster than reading text, and the child's start is what costs; both ends are one
    Python. Nothing marshalled ever comes back from a child.
    """
    args, kwargs = literal.parse_args(text, limits)
    canonical = literal.canon_args(args, kwargs, limits)
    if "{" in canonical and literal.has_set((args, kwargs)) or "set(" in canonical:
        return canonical
    return marshal.dumps((args, kwargs), 2)  # version 2 shares nothing: the child gets separate lists


def unpack_args(packed: str | bytes, limits: literal.Limits) -> tuple[tuple, dict]:
    """(args, kwargs) of what `pack_args` gave; fresh objects each time."""
    return marshal.loads(packed) if type(packed) is bytes else literal.parse_args(packed, limits)


def frame(kind: bytes, text: str, cpu_seconds: float) -> bytes:
    """One frame as bytes, in one piece: a single write to a pipe. A lone surrogate in the text is escaped."""
    data = text.encode("utf-8", "backslashreplace")
    return FRAME.pack(kind, len(data), int(cpu_seconds * 1e6) & 0xFFFFFFFF) + data


def decode(data: bytes) -> tuple[list[tuple[str, str, float]], bool]:
    """[(kind, text, CPU seconds so far)] and whether the bytes were whole frames of known kinds in valid UTF-8.
    Never raises, whatever a child has written."""
    frames, position = [], 0
    while position + FRAME.size <= len(data):
        kind, length, cpu = FRAME.unpack_from(data, position)
        position += FRAME.size
        if kind[0] not in KINDS or position + length > len(data):
            return frames, False
        try:
            frames.append((kind.decode(), data[position : position + length].decode(), cpu / 1e6))
        except UnicodeDecodeError:
            return frames, False
        position += length
    return frames, position == len(data)

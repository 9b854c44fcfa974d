"""What the parent makes of the bytes of a child: frames, outcomes, nothing forged. SANDBOX_LONG=1: longer."""

import os
import random
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import Job, outcomes, wire

LONG = bool(os.environ.get("SANDBOX_LONG"))


def frames(parts):
    """What a child writes, from (kind, text, CPU seconds)."""
    return b"".join(wire.frame(kind, text, cpu) for kind, text, cpu in parts)


def settled(heard, status, inputs=3, **options):
    """(outcomes, pieces left, infra) after a child has said `heard` and ended with `status`."""
    found = [None] * inputs
    piece = outcomes.Piece(Job("", ("1",) * inputs, **options), [b"1"] * inputs, list(range(inputs)), found, 1, set())
    rest, infra = outcomes.settle(piece, heard, status, lambda text: text.isdigit())
    return found, rest, infra


@pytest.mark.parametrize(
    "parts, status, expected",
    [
        ([(b"B", "", 0), (b"G", "", 0), (b"O", "1", 0), (b"O", "2", 0), (b"O", "3", 0), (b"D", "", 0)], 0, ["ok"] * 3),
        ([(b"B", "", 0), (b"R", "forbidden import os", 0), (b"D", "", 0)], 0, ["forbidden"] * 3),
        ([(b"B", "", 0), (b"R", "ok 42", 0), (b"D", "", 0)], 0, ["killed"] * 3),
        ([(b"B", "", 0), (b"X", "KeyError", 0), (b"D", "", 0)], 0, ["error"] * 3),
        ([(b"B", "", 0), (b"X", "KeyError", 0)], 0, ["killed"] * 3),
        ([(b"B", "", 0), (b"O", "1", 0), (b"D", "", 0)], 0, ["killed"] * 3),
        ([(b"B", "", 0), (b"G", "", 0), (b"O", "x", 0), (b"D", "", 0)], 0, ["killed"] * 3),
        ([(b"B", "", 0), (b"G", "", 0), (b"O", "1", 0), (b"D", "", 0)], 0, ["ok", "killed", "killed"]),
        ([(b"B", "", 0), (b"G", "", 0), *[(b"O", "1", 0)] * 4, (b"D", "", 0)], 0, ["ok", "ok", "killed"]),
        ([(b"B", "", 0), (b"G", "", 0), (b"E", "ValueError", 0), (b"G", "", 0)], 0, ["error", "killed", "killed"]),
        ([(b"B", "", 0)], signal.SIGPROF, ["timeout"] * 3),
        ([(b"B", "", 0)], signal.SIGSEGV, ["killed"] * 3),
        ([(b"B", "", 0)], signal.SIGSYS, ["forbidden"] * 3),
    ],
)
def test_what_a_child_says_becomes_outcomes(parts, status, expected):
    found, rest, infra = settled(frames(parts), status)
    assert [outcome.status for outcome in found] == expected and not rest and not infra


def test_a_timeout_after_busy_inputs_is_doubted_and_a_kill_from_outside_is_infra():
    begun = [(b"B", "", 0), (b"G", "", 0), (b"O", "1", 0.001)]
    found, [rest], _ = settled(frames(begun), signal.SIGPROF)
    assert [found[0].status, found[1].status, found[2]] == ["ok", "timeout", None] and rest.slots == [2]
    found, [rest], _ = settled(frames(begun[:2] + [(b"O", "1", 0.5)]), signal.SIGPROF)
    assert found[1:] == [None, None] and rest.slots == [1, 2]
    found, rest, infra = settled(frames(begun), signal.SIGKILL)
    assert found[1:] == [None, None] and infra and not rest
    assert settled(frames(begun), signal.SIGALRM)[2] == "wall_time"


def test_random_bytes_never_raise_and_never_forge():
    rng = random.Random(3)
    kinds = [b"B", b"G", b"O", b"E", b"U", b"L", b"D", b"R", b"X"]
    for _ in range(100_000 if LONG else 30_000):
        heard = b"".join(
            rng.choice(
                [
                    lambda: wire.frame(
                        rng.choice(kinds), rng.choice(["1", "22", "", "x", "ok ok", "order"]), rng.random()
                    ),
                    lambda: rng.randbytes(rng.randrange(12)),
                ]
            )()
            for _ in range(rng.randrange(6))
        )
        frames_, whole = wire.decode(heard)
        assert all(type(text) is str and cpu >= 0 for _, text, cpu in frames_)
        found, rest, infra = settled(
            heard, rng.choice([0, 256, 9, 14, 27, 31, 11, 6]), stop_at_failure=rng.random() < 0.3
        )
        for place, outcome in enumerate(found):
            left = infra or any(place in piece.slots for piece in rest)
            assert (outcome is None) == bool(left) or left
            assert outcome is None or outcome.status != "ok" or outcome.output.isdigit()


@settings(max_examples=1_000 if LONG else 80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([bytes([kind]) for kind in sorted(wire.KINDS)]), st.text(max_size=20))))
def test_frames_round_trip(parts):
    heard = frames([(kind, text, 0.5) for kind, text in parts])
    decoded, whole = wire.decode(heard)
    assert whole and [(kind.encode(), text) for kind, text, _ in decoded] == [
        (kind, text.encode("utf-8", "backslashreplace").decode()) for kind, text in parts
    ]
    for cut in {1, len(heard) // 2, len(heard) - 1} & set(range(1, len(heard))):
        wire.decode(heard[:cut])

"""Jobs, their outcomes, and how the second is made of the bytes that a child has written and of how it ended.

    rest, infra = settle(piece, data, wait_status, is_canonical)         # outcomes are now in piece.outcomes

Pure functions on bytes and numbers: nothing here starts or waits for anything, and nothing trusts a child. Imports
wire.py and literal.py.
"""

import os
import signal
from copy import copy
from dataclasses import dataclass, field, replace

from . import literal
from .wire import OVERSLEPT, decode

# Seconds of CPU time that earlier inputs of a child may use up before a later input's time-out is doubted: within a
# child all inputs share one timer, and a verdict must not depend on what ran before.
CPU_SLACK = 0.01
# What a repeat may take, in limits of the first run: nobody is to be refused for a little more than the first time.
REPEAT_FACTOR = 1.25
# CPU time of all inputs of a job together, in limits of one input: what several slow inputs may take, and no more.
JOB_LIMITS = 5


@dataclass(frozen=True)
class Job:
    """A program and the inputs to call it with."""

    code: str
    inputs: tuple[str, ...]  # each the text between the parentheses of entry(...)
    cpu_seconds: float | None = None  # of one input, loading the program included; None: the profile's
    entry: str = "f"
    stop_at_failure: bool = False  # after an input that is not `ok` the rest get its status and "not_run"
    job_seconds: float | None = None  # CPU time of all inputs together; None: JOB_LIMITS times that of one


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    status: str  # ok timeout memory error forbidden killed not_literal too_large syntax infra nondeterministic
    output: str | None  # canonical text, for ok
    detail: str  # first word for machines: an exception's class, "import os", "hash_seed", ...
    # CPU time of loading the program and of its inputs up to this one, as the child says: a hint, not a measurement. 0
    # of an input that ended its process.
    seconds: float = field(default=0.0, compare=False, repr=False)


class Piece:
    """Inputs of one job that one child is to take, and where their outcomes go.

    texts: packed inputs (wire.pack_args); slots: the place of each in `outcomes`; seed: the hash seed to run under;
    sensitive: ids of the outcome lists that hash order may reach, shared by a whole call; spent: a list with the CPU
    seconds of the children that the job has had, shared by all of its pieces.
    """

    def __init__(self, job, texts, slots, outcomes, seed, sensitive, spent=None):
        self.job, self.texts, self.slots, self.outcomes, self.seed = job, texts, slots, outcomes, seed
        self.sensitive, self.spent = sensitive, [] if spent is None else spent
        self.retried = self.slow = False
        if any(type(text) is str for text in texts):  # sets among the inputs (see wire.pack_args)
            sensitive.add(id(outcomes))

    def told(self, what):
        """Takes down what a child says of the program: "order" (hash order can matter), "text" or "hash" (it has looked
        at those of an address)."""
        key = id(self.outcomes)
        if what in ("order", "text", "hash"):
            self.sensitive.update((key, (key, what)))

    def rest(self, start, stop=None):
        """The inputs from a position on, as a piece that has not been retried."""
        texts, slots = self.texts[start:stop], self.slots[start:stop]
        return Piece(self.job, texts, slots, self.outcomes, self.seed, self.sensitive, self.spent)

    def parts(self, count):
        """The piece as at most `count` pieces of about one length."""
        size = -(-len(self.slots) // count)
        return [self.rest(start, start + size) for start in range(0, len(self.slots), size)]

    def settle(self, position, outcome):
        """The outcome of one input."""
        self.outcomes[self.slots[position]] = outcome

    def settle_from(self, position, outcome):
        """The same outcome for this input and all after it."""
        for slot in self.slots[position:]:
            self.outcomes[slot] = outcome

    def programs(self):
        """What a child is told: (code, entry, inputs, whether to stop at a failure) of each program."""
        return ((self.job.code, self.job.entry, tuple(self.texts), self.job.stop_at_failure),)

    def cpu_limit(self, usual):
        """Seconds of CPU time of the child; 0 when the job has used up its time. usual: the profile's, of one input."""
        # One input's time for all of them: a child whose inputs are honest needs a fraction, and one that loops is
        # found after one limit, not after the sum.
        cpu = usual if self.job.cpu_seconds is None else self.job.cpu_seconds
        left = (JOB_LIMITS * cpu if self.job.job_seconds is None else self.job.job_seconds) - sum(self.spent)
        return 0 if left < 0.001 else min(cpu, left) + (CPU_SLACK if len(self.texts) > 1 else 0)

    def stopped(self, data, outcome, is_canonical):
        """Settles a child that the pool has ended while it ran; returns the pieces that are to be run again.

        outcome: of the input that it was at, and of all inputs if it has written too much to be believed.
        """
        if outcome.status != "timeout":
            self.settle_from(0, outcome)
            return []
        return settle(self, data, signal.SIGPROF, is_canonical, outcome)[0]


class Bundle:
    """Pieces with one CPU limit that are to share one child if their programs allow it (see contained.py). Programs
    whose outcomes a neighbour may have caused are run again, alone."""

    def __init__(self, pieces):
        self.pieces, self.seed = pieces, pieces[0].seed

    def programs(self):
        """As Piece.programs, of all pieces."""
        return tuple(program for piece in self.pieces for program in piece.programs())

    def cpu_limit(self, usual):
        """That of one program: one that loops costs no more here than alone."""
        return max(piece.cpu_limit(usual) for piece in self.pieces)

    def stopped(self, data, outcome, is_canonical):
        """One of the programs is at fault, and it is not known which: all are run again, alone."""
        return self.pieces


def refusal(job, profile):
    """The outcome of a job that is not worth a process. Raises ValueError for a CPU limit that the kernel would take
    for none."""
    # A timer of 0 is switched off: the program would run for ever.
    for name in ("cpu_seconds", "job_seconds"):
        seconds = getattr(job, name)
        if seconds is not None and not 0.001 <= seconds < 1e6:
            raise ValueError(f"{name} is {seconds}: give at least a millisecond")
    if len(job.code) > profile.source_chars:
        text = f"program of {len(job.code)} characters, the limit is {profile.source_chars}"
        return Outcome("too_large", None, text)
    try:
        job.code.encode()
    except UnicodeEncodeError:
        return Outcome("syntax", None, "UnicodeEncodeError lone surrogate in the program")
    return None


# --- from bytes to outcomes -------------------------------------------------------------------------------------------


def settle(piece, data: bytes, status: int, is_canonical, ending=None):
    """Turns a child's frames and wait status into outcomes. Returns (pieces still to be run, reason of infra or "").

    is_canonical(text): whether a text is the canonical text of a value within the limits. ending: the outcome of the
    input that it was at, None: what the wait status tells. A program that writes frames
    itself can only claim values for its own inputs, in order: that is no more than returning them.
    """
    frames, whole = decode(data)
    began, frames = frames[0][2] if frames else 0.0, frames[1:]  # B: the pool has looked at it
    done = bool(frames) and frames[-1][0] == "D"
    frames = frames[:-1] if done else frames
    broken = Outcome("killed", None, "protocol")
    if frames and frames[0][0] in ("R", "X"):
        outcome = _load_failure(*frames[0][:2]) if done and whole and len(frames) == 1 else broken
        piece.settle_from(0, outcome)
        return [], ""
    if frames and frames[0][0] != "G":
        piece.settle_from(0, broken)
        return [], ""
    loaded = bool(frames)
    if loaded:
        piece.told(frames[0][1])
    # CPU time that loading and earlier inputs have used, as the child says; it only decides what is tried again.
    used, position = frames[0][2] - began if loaded else 0.0, 0
    for kind, text, cpu in frames[1:]:
        if kind == "N":
            piece.told(text)
            continue
        outcome = _value(kind, text, is_canonical, cpu - began)
        if outcome is None or position >= len(piece.slots):
            piece.settle_from(min(position, len(piece.slots) - 1), broken)
            return [], ""
        piece.settle(position, outcome)
        position, used = position + 1, cpu - began
        if outcome.status != "ok" and piece.job.stop_at_failure:
            piece.settle_from(position, Outcome(outcome.status, None, "not_run"))
            return [], ""
    if position == len(piece.slots):
        return [], ""
    return _ended_early(piece, position, ending or _ending(status, done, whole), loaded, used)


def settle_together(bundle, data: bytes, status: int, is_canonical):
    """Settles those pieces of a bundle whose outcomes are the same alone; returns the others, to be run alone."""
    frames, whole = decode(data)
    done = bool(frames) and frames[-1][0] == "D"
    sections = []  # the frames of each program, in the order of the pieces
    for frame in frames[1:-1] if done else frames[1:]:
        if frame[0] in "RXAG":
            sections.append([])
        elif not sections:
            return bundle.pieces
        sections[-1].append(frame)
    if not whole or len(sections) > len(bundle.pieces) or done and len(sections) < len(bundle.pieces):
        return bundle.pieces
    # The program that was running when time ran out is at fault only if those before it had used next to none of it.
    used = frames[-1][2] - frames[0][2] if frames else 0.0
    timeout = not done and _ending(status, done, whole).status == "timeout" and used <= CPU_SLACK
    alone = bundle.pieces[len(sections) :]
    for piece, section in zip(bundle.pieces, sections):
        last = section is sections[-1]
        outcomes = _outcomes_of(section, is_canonical)
        if outcomes is None or not _complete(piece, outcomes, section[0][0], last and timeout):
            alone.append(piece)
        elif section[0][0] != "G":
            piece.settle_from(0, outcomes[0])
        else:
            piece.told(section[0][1])
            alone += _settle_shared(piece, outcomes)
    return alone


def _outcomes_of(section, is_canonical):
    """Outcomes from the frames of one program of several; None when it must be run alone: it asked for that, or there
    is an outcome that neighbours (memory, stack) or the place in memory may have caused."""
    kind, text, _ = section[0]
    outcomes = [_value(*frame[:2], is_canonical) for frame in section[1:]]
    if kind == "A" or kind != "G" and outcomes or None in outcomes:
        return None
    if kind == "R":
        outcomes = [_load_failure(kind, text)]
    elif kind == "X":
        outcomes = [_exception(text)]
    return outcomes if all(map(_of_its_own, outcomes)) else None


# Exceptions of a program's own logic. MemoryError and RecursionError are not among them: neighbours can cause these.
_OWN_EXCEPTIONS = frozenset(
    """AssertionError AttributeError IndentationError IndexError KeyError NameError StopIteration SyntaxError TabError
    TypeError UnboundLocalError ValueError ZeroDivisionError""".split()
)


def _of_its_own(outcome):
    """Whether the program alone, and no neighbour in its child, can have caused this outcome."""
    if outcome.status in ("error", "syntax"):
        return outcome.detail.partition(" ")[0] in _OWN_EXCEPTIONS
    return outcome.status in ("ok", "not_literal", "too_large", "forbidden")


def _complete(piece, outcomes, kind, timeout):
    """Whether the outcomes are all of a program's; with `timeout`, all but those from the input that timed out."""
    if kind != "G" or len(outcomes) == len(piece.slots):
        return True
    failed = bool(outcomes) and outcomes[-1].status != "ok" and piece.job.stop_at_failure
    return len(outcomes) < len(piece.slots) and (failed or timeout)


def _settle_shared(piece, outcomes):
    for position, outcome in enumerate(outcomes):
        piece.settle(position, outcome)
    position = len(outcomes)
    if outcomes and outcomes[-1].status != "ok" and piece.job.stop_at_failure:
        piece.settle_from(position, Outcome(outcomes[-1].status, None, "not_run"))
        return []
    if position == len(piece.slots):
        return []
    return _ended_early(piece, position, Outcome("timeout", None, "cpu_time"), True, 0.0)[0]


def _ended_early(piece, position, outcome, loaded, used):
    if outcome.status == "infra":
        return [], outcome.detail
    if not loaded or outcome.detail == "protocol":
        piece.settle_from(position, outcome)
        return [], ""
    if outcome.status == "timeout" and position > 0 and used > CPU_SLACK:
        return [piece.rest(position)], ""  # earlier inputs had part of its time: once more, first in line
    piece.settle(position, outcome)
    if piece.job.stop_at_failure:
        piece.settle_from(position + 1, Outcome(outcome.status, None, "not_run"))
    rest = piece.rest(position + 1)
    return ([rest] if rest.slots and not piece.job.stop_at_failure else []), ""


def _ending(status, done, whole):
    """The outcome of an input during which its process ended."""
    if done or not whole and os.WIFEXITED(status):
        return Outcome("killed", None, "protocol")
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OVERSLEPT:
        return Outcome("timeout", None, "sleep")
    if os.WIFEXITED(status):
        return Outcome("killed", None, f"exited {os.WEXITSTATUS(status)}")
    number = os.WTERMSIG(status)
    if number == signal.SIGPROF:
        return Outcome("timeout", None, "cpu_time")
    if number == signal.SIGALRM:
        return Outcome("infra", None, "wall_time")
    # A program has no call to send or to set off a signal, so these came from outside: the kernel short of memory, a
    # user.
    if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Outcome("infra", None, f"signal {signal.Signals(number).name}")
    if number == signal.SIGSYS:
        return Outcome("forbidden", None, "system_call")
    return Outcome("killed", None, f"signal {signal.Signals(number).name}")


def _load_failure(kind, text):
    if kind == "R":
        status, _, detail = text.partition(" ")
        return Outcome(status if status in ("syntax", "forbidden") else "killed", None, detail[:200])
    return _exception(text)


def _exception(text):
    # A child's text becomes part of a sentence that is shown to a model and logged: an identifier, or one known phrase.
    word = text.partition(" ")[0]
    name = word if word.isidentifier() and len(word) <= 100 else "Exception"
    detail = text if text == f"{name} no {text[len(name) + 4 :]}" and text.isprintable() else name  # "NameError no f"
    return Outcome("memory" if name == "MemoryError" else "error", None, detail[:200])


def _value(kind, text, is_canonical, seconds=0.0):
    """The outcome of one input's frame; None when it is no frame of an input, or its text is not canonical."""
    if kind == "O":
        return Outcome("ok", text, "", seconds) if is_canonical(text) else None
    if kind == "E":
        return replace(_exception(text), seconds=seconds)
    statuses = {"U": "not_literal", "L": "too_large"}
    if kind in statuses:
        return Outcome(statuses[kind], None, "".join(c if c.isprintable() else "?" for c in text[:200]), seconds)
    return None


# --- determinism ------------------------------------------------------------------------------------------------------


class Repeat:
    """A second run of the good inputs of a job, for comparison: reversed, and then once more in order when `twice`."""

    def __init__(self, job, first, good, seed, twice):
        self.first, self.good, self.seed, self.twice = first, good, seed, twice
        limit = REPEAT_FACTOR * job.job_seconds * (2 if twice else 1)
        self.job = replace(job, cpu_seconds=limit, job_seconds=limit)
        self.order = good[::-1] + good if twice else good[::-1]
        self.outcomes = [None] * len(self.order)
        self.by_order = set()  # slots that are known to differ for the order of the inputs

    def under(self, seed):
        """The same repeat under another seed, still to be run."""
        other = copy(self)
        other.seed, other.outcomes = seed, [None] * len(self.order)
        return other

    def compare(self) -> dict[int, Outcome]:
        """{slot: the outcome that takes the place of the first run's} for the inputs that came out differently."""
        differing = {}
        for slot in self.good:
            for other in self.of(slot):
                if slot not in differing and not same_outcome(self.first[slot], other):
                    differing[slot] = self.verdict(slot, other)
        return differing

    def verdict(self, slot, other):
        """The outcome of an input whose repeat came out as `other`."""
        if other.status in ("infra", "timeout", "memory"):
            return other
        first, seen = self.first[slot].output, other.output or f"{other.status} {other.detail}"
        # Different within one process: state. Else another seed or another address made the difference; a text with an
        # address in it tells which.
        inside = any(not same_outcome(self.of(slot)[0], later) for later in self.of(slot)[1:])
        why = "state" if inside or slot in self.by_order else "address" if " at 0x" in first + seen else "hash_seed"
        return Outcome("nondeterministic", None, f"{why} {first:.80} against {seen:.80}")

    def of(self, slot):
        """The repeat's outcomes of one input, in the order in which they were made."""
        return [outcome for place, outcome in zip(self.order, self.outcomes) if place == slot]

    def agrees(self, other, slot) -> bool:
        """Whether another repeat in the same order gave the same for this input."""
        return all(same_outcome(a, b) for a, b in zip(self.of(slot), other.of(slot)))


def same_outcome(a: Outcome, b: Outcome) -> bool:
    """The same status and, exactly, the same value; details may differ."""
    return a.status == b.status and same_value(a.output, b.output)


def same_value(a: str | None, b: str | None) -> bool:
    """Whether two canonical texts say the same value, exactly (no tolerance; the order in dicts is no difference)."""
    return a == b or (a is not None and b is not None and literal.equal(_read(a), _read(b), rel=0))


def _read(text):
    # Limits that no canonical text exceeds: it has been read within the profile's limits before.
    generous = literal.Limits(len(text), len(text) + 1, depth=200, int_bits=1 << 20, complex_numbers=True)
    return literal.parse(text, generous)

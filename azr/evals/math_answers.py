r"""Mathematical answers: taken out of a response, and compared with the reference by math-verify.

    extract("... so the final answer is \boxed{\frac12}.")          # "\\frac12"
    with MathGrader() as grader:
        grader.grade([("1/2", "0.5"), ("204", None)])               # [Verdict(True, "ok", "1/2"), Verdict(False, ...)]

math-verify parses with sympy, whose parser evaluates text, and some answers (9^{9^{9}}) take for ever. So it never runs
in this process: a worker a core imports it once and forks a child for a few answers to a problem, with limits of
CPU time and memory set in the kernel and, where the system has them, the sandbox's system call filter and Landlock;
where it dies, another one goes on after the answer that was at fault. Equal texts and what says a plain number
(math_numbers.py) need no worker at all.

Left out: units that differ (1 m and 100 cm), answers in words, a last number that nobody called the answer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from azr.evals import math_numbers
from azr.tasks.parse import answer_text

ANSWERS_PER_CHILD = 16  # to one problem; a fork costs as much as ten comparisons
MAX_ANSWER = 2_000  # characters of an answer; what is longer is no answer to anything
CPU_SECONDS, WALL_SECONDS, MEMORY_MB = 2, 120, 1_024  # of one comparison; honest ones take a fifth of a second
PACKAGE = "math-verify==0.9.0"

_ANSWER_IS = re.compile(r"\banswer(?:\s+is|\s*[:=])\s*:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.;](?=\s|$)")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_DRESSING = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\(?=%)|\$|\s+|~")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d{1,30}(?:\.\d{0,30})?)[eE]([+-]?\d{1,4})(?!\w)")  # 4.5e33 (Minerva)
_CUT = "\\boxed", "\\fbox"


class MathError(ValueError):
    """Answers cannot be compared here; one line that says why and what to do."""


@dataclass(frozen=True)
class Verdict:
    """`ok`: correct. reason: "ok", "wrong", "no_answer", "too_large", "unevaluated" (an operation is left to be carried
    out), "endless" (none could), "unparsed", "timeout", "memory", "killed" or "infra" (no verdict).
    key: equal for answers that are the same value written differently, as
    far as sympy's form of them shows; None without an answer."""

    ok: bool
    reason: str
    key: str | None = None


# ---------------------------------------------------------------- answers


def extract(response: str) -> str | None:
    r"""The answer a response states, or None. In the text of its answer tag if it has one, else in all of it: the last
    \boxed{...}, else what follows the last "####", else the last "answer is"; a tag's text may be the bare answer.

    Linear in the response, nothing raises.
    """
    _, tagged, _ = answer_text(response)
    answer = _stated(response if tagged is None else tagged)
    if answer is None and tagged is not None:
        answer = tagged if len(tagged.strip().splitlines()) == 1 else None  # of prose, any number would be read
    answer = None if answer is None else answer.strip().strip("`*").strip()
    return answer or None


def _stated(text: str) -> str | None:
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    mark = text.rfind("####")
    if mark >= 0:
        return text[mark + 4 :].lstrip().partition("\n")[0]
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    if not ends:
        return None
    rest = text[ends[-1] : ends[-1] + MAX_ANSWER].lstrip("* \n")
    return _SENTENCE_END.split(rest, maxsplit=1)[0]


def last_boxed(text: str) -> str | None:
    r"""What is inside the last \boxed{...} (or \fbox{...}) whose braces close; `\boxed 5` counts too."""
    end = len(text)
    # A few tries only: a response may open a box a million times without closing one.
    for _ in range(5):
        start = max(text.rfind(name, 0, end) for name in _CUT)
        if start < 0:
            return None
        begin = start + len("\\boxed" if text.startswith("\\boxed", start) else "\\fbox")
        head = text[begin : begin + MAX_ANSWER + 10]
        if head.startswith(" ") and not head.lstrip().startswith("{"):
            return head.split()[0].rstrip("$.") if head.split() else None
        inside = _braces(head.lstrip())
        if inside is not None:
            return inside
        end = start
    return None


def _braces(text: str) -> str | None:
    """The inside of the braces that a text begins with; None if they do not close."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[1 : match.start()] if text[0] == "{" and match[0] == "}" else None
    return None


def normalise(answer: str) -> str:
    r"""The answer without what LaTeX adds for the eye only: $, spaces, \left, \right, thin spaces, a final full stop;
    plain numbers without thousands separators, leading zeros and a fraction of zeros."""
    text = answer.replace("\\$", "").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").strip().rstrip(".")
    text = _DRESSING.sub("", text)
    if len(text) > 40 or not _NUMBER.fullmatch(text):
        return text
    whole, _, fraction = text.lstrip("-").replace(",", "").partition(".")
    number = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".rstrip(".")
    return f"-{number}" if text.startswith("-") and number != "0" else number


def _quick(reference: str, answer: str | None) -> Verdict | None:
    """A verdict where none needs math-verify: no answer, the same text in normal form, and what says a number."""
    if answer is None or not answer.strip():
        return Verdict(False, "no_answer")
    if len(answer) > MAX_ANSWER:
        return Verdict(False, "too_large", normalise(answer[:MAX_ANSWER]))
    wanted, given = normalise(reference), normalise(answer)
    if wanted == given:
        return Verdict(True, "ok", wanted)
    right = math_numbers.judge(reference, answer)
    if right is None:
        return None
    return Verdict(True, "ok", wanted) if right is True else Verdict(False, right or "wrong", given)


# ---------------------------------------------------------------- grading


class MathGrader:
    """Compares answers with references; `workers` processes at a time (default: one a core), started when needed.

    MathError if math-verify is not installed, or does not start. Use as a context manager.
    """

    def __init__(self, workers: int | None = None):
        if importlib.util.find_spec("math_verify") is None:
            raise MathError(
                f"mathematical answers are compared by math-verify, which is missing: pip install {PACKAGE}"
            )
        self.workers = workers or len(os.sched_getaffinity(0))
        self._idle: queue.Queue = queue.Queue()
        for _ in range(self.workers):
            self._idle.put(_Worker())

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in range(self.workers):
            self._idle.get().close()

    def grade(self, pairs: Iterable[tuple[str, str | None]]) -> list[Verdict]:
        """The verdict on each (reference, answer), in order. Equal pairs are compared once."""
        pairs = list(pairs)
        verdicts: dict[tuple[str, str | None], Verdict] = {}
        slow: dict[str, list[str]] = {}
        for reference, answer in dict.fromkeys(pairs):
            if verdict := _quick(reference, answer):
                verdicts[reference, answer] = verdict
            else:
                slow.setdefault(reference, []).append(answer)
        groups = [
            (reference, tuple(answers[start : start + ANSWERS_PER_CHILD]))
            for reference, answers in slow.items()
            for start in range(0, len(answers), ANSWERS_PER_CHILD)
        ]
        if groups:
            with ThreadPoolExecutor(self.workers) as threads:
                for (reference, answers), row in zip(groups, threads.map(self._ask, groups)):
                    verdicts |= {(reference, answer): verdict for answer, verdict in zip(answers, row)}
        return [verdicts[pair] for pair in pairs]

    def _ask(self, group: tuple[str, tuple[str, ...]]) -> list[Verdict]:
        worker = self._idle.get()
        try:
            rows = worker.ask(*group) or worker.ask(*group)  # the machine's fault: once more
        finally:
            self._idle.put(worker)
        rows = rows or [{"ok": False, "reason": "infra", "key": None}] * len(group[1])
        return [
            Verdict(row["ok"], row["reason"], row["key"] or normalise(answer)) for row, answer in zip(rows, group[1])
        ]


class _Worker:
    """The parent's end of a worker process: one question at a time, None for no answer. Started by the first."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, reference: str, answers: tuple[str, ...]) -> list[dict] | None:
        """Returns a row {"ok", "reason", "key"} for each answer, in order; None if the process died or took too long
        (the next question then starts a new one). MathError if it does not start."""
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps([reference, answers]).encode() + b"\n")
            self.process.stdin.flush()
            # At worst WALL_SECONDS for each answer and for a child that hangs; one more to spare.
            if select.select([self.process.stdout], [], [], (len(answers) + 2) * WALL_SECONDS)[0]:
                if line := self.process.stdout.readline():
                    return json.loads(line)
        except (OSError, ValueError):
            pass
        self.close()
        return None

    def _start(self) -> None:
        # A fixed hash seed: the order of sympy's sets, and with it the key of an answer, is the same in every run.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "azr.evals.math_answers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        if self.process.stdout.readline() != b"ready\n":
            self.close()
            raise MathError(f"math-verify does not start (its error is above); install it again: pip install {PACKAGE}")

    def close(self) -> None:
        """Kills the process if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


# ---------------------------------------------------------------- the worker: python -m azr.evals.math_answers


def serve() -> None:
    """Answers lines [reference, answers] with a list of {"ok", "reason", "key"}.

    A child takes all answers of a line, and where it dies, another one takes those that it left.
    """
    import gc
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    from sandbox import confine

    logging.disable(logging.CRITICAL)
    library = confine.libc()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes the pipe

    # Only what is in the box as a whole: by default any number in it would do.
    box = [LatexExtractionConfig(boxed_match_priority=0)]

    @lru_cache(maxsize=4096)
    def gold(reference: str):
        return parse(_latex(reference), box, parsing_timeout=None)

    def compare(reference: str, answer: str) -> dict:
        expected, expressions = gold(reference), parse(_latex(answer), box, parsing_timeout=None)
        if not expressions:
            return {"ok": False, "reason": "unparsed", "key": None}
        # Reference first: math-verify treats the two sides of an equation or an interval differently. No time limits of
        # its own, here and in parse: they are signals that Python code handles, the kernel's limits hold in C code too.
        ok = bool(verify(expected, expressions, timeout_seconds=None)) and _near(expected[0], expressions[0])
        return {
            "ok": ok,
            "reason": "ok" if ok else "wrong",
            # One key for all right answers, whatever form each has.
            "key": normalise(reference) if ok else str(expressions[0])[:500],
        }

    for reference, answer in _WARM_UP:  # loads what sympy loads late: the children cannot open files
        compare(reference, answer)
    gc.freeze()  # a collection in a child would copy every page of the parent
    gc.disable()
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        reference, answers = json.loads(line)
        gold(reference)  # before the fork, for all answers to the problem
        rows = []
        while len(rows) < len(answers):
            part, failure = _in_child(lambda answer: compare(reference, answer), answers[len(rows) :], library)
            rows += part
            # The answer over which it died is asked again only if those before it had most of its time or its memory.
            alone = not part or failure["reason"] == "timeout" and part[-1]["cpu"] < CPU_SECONDS / 2
            if len(rows) < len(answers) and alone:
                rows.append(failure)
        sys.stdout.buffer.write(json.dumps(rows).encode() + b"\n")
        sys.stdout.buffer.flush()


def _near(expected, answer) -> bool:
    """Whether two expressions that math-verify takes for the same are, if both are real numbers, within a thousandth of
    the first: it rounds to six decimals, where every tiny number is 0."""
    if not all(getattr(side, "is_number", False) and side.is_real for side in (expected, answer)):
        return True
    return bool(abs(expected.evalf() - answer.evalf()) <= abs(expected.evalf()) / 1000)


_WARM_UP = [
    (r"\frac{\sqrt{3}}{2}", r"\sin(\pi/3)"),
    ("(1,2)", "[1,2)"),
    (r"x \in [-2,7]", "-2 <= x <= 7"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
    ("50\\%", "0.5"),
    (r"y = 2x + 1", r"y - 2x = 1"),
    (r"\{1, 2\} \cup (3, \infty)", r"(3, \infty)"),
    ("1 + 2i", "2i + 1"),
    (r"e^{-2t} \cos(3t) u(t)", r"\ln(x^2) + \int_0^1 x dx"),
    (r"\text{Evelyn}", "Evelyn"),
    ("x^2 - 1", "(x-1)(x+1)"),
    (r"10!", r"\binom{5}{2}"),
    (r"\sum_{k=1}^{n} k", "n(n+1)/2"),
    ("2.5e11", "250000000000"),
    ("2_8", "A, B"),
]


def _latex(answer: str) -> str:
    answer = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", answer.replace("$", ""))
    return "$\\boxed{" + answer + "}$"


def _in_child(work: Callable[[str], dict], answers: list[str], library) -> tuple[list[dict], dict | None]:
    """(work(answer) of the answers in a fork under the limits, as far as it came; why it came no further)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _confine(library, writing)
            for answer in answers:
                # At once and unbuffered: what was compared before this process dies still counts.
                row = work(answer) | {"cpu": time.process_time()}
                os.write(writing, json.dumps(row).encode() + b"\n")
            os._exit(0)
        except MemoryError:
            os._exit(3)
        except BaseException:  # whatever it is, the child must not go on as a second server
            os._exit(4)
    # The pipe ends only when no process holds this end, and the child's death must end it.
    os.close(writing)
    data = b""
    while ready := select.select([reading], [], [], WALL_SECONDS)[0]:
        if not (part := os.read(reading, 1 << 16)):
            break
        data += part
    os.close(reading)
    # Silent without having used up its CPU time: it waited for the machine, which says nothing about the answer.
    if not ready:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    reason = {-signal.SIGXCPU: "timeout", 3: "memory", 4: "unparsed"}.get(code, "killed") if ready else "infra"
    # The last part is empty, or a row that death cut off.
    return [json.loads(row) for row in data.split(b"\n")[:-1]], {"ok": False, "reason": reason, "key": None}


def _confine(library, descriptor: int) -> None:
    """CPU time and memory in the kernel; where Linux lets us, no files, no network, no other system calls."""
    import resource

    from sandbox import confine

    # At the first limit SIGXCPU ends the child, which tells a timeout from other deaths; the second cannot be ignored.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    confine.limit_resources(MEMORY_MB)
    if library is None:
        return
    # No child outlives a worker that is killed; without the second call the kernel takes no layer from a plain user.
    library.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    library.prctl(confine.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # The filter of system calls last: it forbids what Landlock is set up with.
    for layer in (lambda: confine.landlock(library), lambda: confine.Seccomp(library, descriptor).install()):
        try:
            layer()
        except OSError:  # an old kernel; the limits above hold everywhere
            continue


if __name__ == "__main__":
    serve()

"""Grades code answers to HumanEval+ and MBPP+ (evalplus, arXiv 2305.01210) in the sandbox's benchmark profile.

    [problem, *_] = load_problems("HumanEvalPlus.jsonl.gz")
    with Sandbox(1, profile=BENCHMARK) as sandbox:
        reference = reference_of(problem, sandbox)
        grade(problem, answer, reference, sandbox)              # Grade(ok_base, ok_plus, reason, detail)

The rules are evalplus 0.3.1's: its conversion of JSON inputs, time limits from the reference solution (4 times what
its slowest input needs, at least a second; CPU time here, and sleeping), a minute for all inputs of an answer,
tolerances and special oracles. What differs: the expected outputs never enter the process of an answer, and what it
returns is compared here, as a literal. So an object with an __eq__ of its own passes nothing, and neither does a value
that equals no literal (a deque, an array). Files, threads and processes are out of reach. Stricter than evalplus:
Mbpp/164, where evalplus takes any value, wants a bool, and the polynomial of HumanEval/32 must not be far below zero
either. Milder: floats anywhere in tuples, lists and dicts have the tolerance. Left out: prompts, and taking the code
out of a response. No torch is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azr.console import warn
from azr.evals.kept import Kept, directory, machine
from azr.jsonl import strict_lines
from sandbox import BENCHMARK, Job, Outcome, Sandbox, literal

TIME_FACTOR, LEAST_SECONDS = 4.0, 1.0  # evalplus: limit = max(1 s, 4 x the reference solution's time)
REFERENCE_SECONDS = 30.0  # CPU time of one input of a reference solution
# A reference solution that took less has the least limit even where all takes 2.5 times as long as when it ran.
QUICK_SECONDS = 0.1
# The same at each call; memory too, since its limit is that of the profile.
LASTING = frozenset(("ok", "error", "forbidden", "memory", "not_literal", "syntax", "too_large"))
ATOL, RTOL = 1e-6, 1e-7  # floats where a problem gives no tolerance; relative part, for all
ANSWER_SECONDS = 60.0  # of all inputs of an answer; evalplus: min(60 s, the sum of the limits)
# Inputs that a process of an answer takes: a process costs as much as a thousand calls that are quick.
FIRST_INPUTS, GROWTH, MOST_INPUTS = 16, 8, 1_024

_TEXTS = dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution"), str)
_EVALPLUS = _TEXTS | {"base_input": list, "plus_input": list, "atol": (int, float)}
_OFFICIAL = _TEXTS | {"test": str}

# What the arguments of MBPP+ were before they became JSON: a shape per argument, the last one for all that follow.
# A shape reads from outside to inside: t list to tuple, l stays a list, * tuples all the way down, { values of a dict,
# s set (an empty one is {}, as evalplus has it), f float, c complex, . unchanged.
_SHAPES = {
    "t": (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
    "lt": (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780),
    "tt": (259, 278, 401, 445),
    "*": (580, 615, 791),
    "lt .": (75, 413, 444, 753),
    ". t": (106, 750),
    "t .": (250, 307, 405, 446, 617, 720, 763, 808),
    "ls": (115,),
    "f c": (124,),
    "c": (252,),
    "{t .": (722,),
}
_SHAPE_OF = {f"Mbpp/{number}": shape.split() for shape, numbers in _SHAPES.items() for number in numbers}

# Tasks whose statement leaves the order, or the kind of a true value, open.
_ANY_ORDER = frozenset(f"Mbpp/{number}" for number in (2, 7, 111, 140, 232, 249, 579, 769))
_FOUND_OR_NONE = frozenset(f"Mbpp/{number}" for number in (737, 787, 794))


@dataclass(frozen=True)
class Problem:
    """A problem with its inputs: each the text between the parentheses of entry_point(...), the first `base` of them
    the base inputs. atol: absolute tolerance of floats, 0 for the usual one."""

    task_id: str
    prompt: str
    entry_point: str
    solution: str
    inputs: tuple[str, ...]
    base: int
    atol: float


@dataclass(frozen=True)
class Reference:
    """What the reference solution came to on this machine: the inputs it answers (the first `base` of them base
    inputs), its outputs as canonical text, the CPU limit of one input in seconds, and what it does not answer."""

    inputs: tuple[str, ...]
    base: int
    outputs: tuple[str, ...]
    cpu_seconds: float
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Grade:
    """ok_plus: all inputs are right, the base ones too. reason: "ok", "wrong", "no_answer" or the sandbox's status of
    the first input that is not right ("timeout", "error", ...; "infra": no verdict, the machine's fault)."""

    ok_base: bool
    ok_plus: bool
    reason: str
    detail: str = ""


# ---------------------------------------------------------------- problems


def load_problems(path: str | Path) -> list[Problem]:
    """The problems of evalplus's file, .jsonl or .jsonl.gz. ValueError with file, line and field for a bad one."""
    problems = [_problem(row, where) for where, row in _checked(strict_lines(path), _EVALPLUS)]
    if not problems:
        raise ValueError(f"{path}: holds no problems; expected evalplus's HumanEvalPlus.jsonl or MbppPlus.jsonl")
    return problems


def _checked(rows: Iterable[tuple[str, dict]], fields: dict) -> Iterator[tuple[str, dict]]:
    """The rows, each with its place. ValueError for a field of another kind, and for a task_id that comes twice."""
    seen = set()
    for where, row in rows:
        if row.get("plus_input") == {}:  # Mbpp/793 of version 0.2.0 has no plus inputs, and says so like that
            row["plus_input"] = []
        for name, kind in fields.items():
            if name not in row:
                raise ValueError(f"{where}: the field {name} is missing")
            if not isinstance(row[name], kind) or isinstance(row[name], bool):
                raise ValueError(f"{where}, field {name}: {type(row[name]).__name__} is no value for it")
        if not row["entry_point"].isidentifier():
            raise ValueError(f"{where}, field entry_point: {row['entry_point']!r:.60} is no name of a function")
        if row["task_id"] in seen:
            raise ValueError(f"{where}, field task_id: {row['task_id']} is there twice")
        seen.add(row["task_id"])
        yield where, row


def _problem(row: dict, where: str) -> Problem:
    """A row of evalplus's file, whose fields are checked, as a problem."""
    if not 0 <= row["atol"] < float("inf"):
        raise ValueError(f"{where}, field atol: {row['atol']} is no tolerance")
    if not row["base_input"]:
        raise ValueError(f"{where}, field base_input: there is no input")
    inputs = [
        _call(row["task_id"], arguments, f"{where}, field {name}")
        for name in ("base_input", "plus_input")
        for arguments in row[name]
    ]
    return Problem(*(row[name] for name in _TEXTS), tuple(inputs), len(row["base_input"]), float(row["atol"]))


def _call(task_id: str, arguments: Any, where: str) -> str:
    """The text between the parentheses of a call with these JSON arguments."""
    if not isinstance(arguments, list):
        raise ValueError(f"{where}: an input is {type(arguments).__name__}, expected the list of arguments")
    try:
        return literal.canon_args(convert(task_id, arguments), {}, BENCHMARK.limits)
    except (ValueError, TypeError, AttributeError) as error:  # LiteralError is a ValueError
        raise ValueError(f"{where}: an input cannot be used ({error})") from error


# Some tests draw their inputs, so the seed is fixed; arguments are copied before a solution can change them.
_RECORD = """

def _record():
    import copy
    import random
    random.seed(0)
    calls = []
    def candidate(*arguments):
        calls.append(copy.deepcopy(arguments))
        return {}(*arguments)
    check(candidate)
    return calls
"""
_OFFICIAL_ATOL = {"HumanEval/32": 1e-4}  # as its test has it


def official_problems(rows: Iterable[tuple[str, dict]]) -> list[Problem]:
    """The problems of OpenAI's HumanEval.jsonl.gz: (where, row) each. Its tests are assertions, which would bring the
    expected values into an answer's process; so each runs once on the reference solution, in the sandbox, to record
    the inputs it uses, and these are the problem's base inputs. ValueError for a bad row."""
    problems, rows = [], list(_checked(rows, _OFFICIAL))
    programs = [
        f"{row['prompt']}{row['canonical_solution']}\n{row['test']}{_RECORD.format(row['entry_point'])}"
        for _, row in rows
    ]
    with Sandbox(profile=BENCHMARK) as sandbox:
        outcomes = sandbox.run([Job(program, ("",), REFERENCE_SECONDS, "_record") for program in programs])
    for (where, row), [outcome] in zip(rows, outcomes):
        task_id = row["task_id"]
        if outcome.status != "ok":
            raise ValueError(f"{where}: the tests of {task_id} cannot be run ({outcome.status} {outcome.detail})")
        calls = literal.parse(outcome.output, BENCHMARK.limits)
        inputs = tuple(dict.fromkeys(literal.canon_args(call, {}, BENCHMARK.limits) for call in calls))
        atol = _OFFICIAL_ATOL.get(task_id, 0.0)
        problems.append(Problem(*(row[name] for name in _TEXTS), inputs, len(inputs), atol))
    return problems


def convert(task_id: str, arguments: list) -> tuple:
    """The arguments of one call as the task means them, from JSON: tuples, sets and complex numbers are back."""
    shapes = _SHAPE_OF.get(task_id, ["."])
    return tuple(_shaped(argument, shapes[min(place, len(shapes) - 1)]) for place, argument in enumerate(arguments))


def _shaped(value: Any, shape: str) -> Any:
    mark, inner = shape[0], shape[1:]
    if mark == "c":
        return complex(value)
    if mark == "f":
        return float(value)
    if mark == "{":
        return {key: _shaped(item, inner) for key, item in value.items()}
    if mark == "s":
        return set(value) if isinstance(value, list) and value else {}
    if mark == "." or not isinstance(value, list):
        return value
    inner = shape if mark == "*" else inner or "."
    items = [_shaped(item, inner) for item in value]
    return items if mark == "l" else tuple(items)


# ---------------------------------------------------------------- running


def program_of(problem: Problem, answer: str) -> str:
    """The program of an answer: the answer alone where it defines the entry point at its top level, and the prompt
    with the answer as its completion elsewhere (a function's body, or helpers of a function that the prompt begins).

    An answer whose first line of code is indented is the rest of the prompt's function, whatever follows.
    """
    first = re.search(r"^[ \t]*[^\s#]", answer, re.MULTILINE)
    indented = first is not None and first.group()[0] in " \t"
    name = re.escape(problem.entry_point)
    # A name bound to a lambda or to another function defines it too; a comparison with == does not.
    defined = re.search(
        rf"^(?:(?:async[ \t]+)?def[ \t]+{name}[ \t]*[(\[]|{name}[ \t]*(?::[^=\n]*)?=(?!=))", answer, re.MULTILINE
    )
    return answer if defined and not indented else problem.prompt + answer


def keeper() -> Kept:
    """Where what reference solutions give is kept from one call to the next: made by this machine, this Python, these
    packages and this code."""
    packages = {name.partition(".")[0] for name in BENCHMARK.packages}
    sources = [Path(__file__), *sorted(Path(literal.__file__).parent.glob("*.py"))]
    return Kept(directory("references"), machine(packages, *sources))


def reference_of(problem: Problem, sandbox: Sandbox, kept: Kept | None = None) -> Reference:
    """Runs the reference solution and takes its times. Nothing else may run in the sandbox meanwhile.

    kept: where its outputs are looked up before, and put afterwards; where it is slow its slowest input is run all the
    same, for its time. An input that it does not answer is left out, with a line on stderr that says so: mostly outputs
    beyond the limits of the profile. ValueError if it answers no base input, or for a sandbox of another profile.
    """
    if not sandbox.profile.wide:
        raise ValueError(f"code benchmarks need Sandbox(profile=BENCHMARK), not the profile {sandbox.profile.name}")
    # All that the outputs and the words about them depend on here; `keeper` has what else there is.
    parts = [problem.task_id, problem.prompt, problem.solution, problem.entry_point, problem.inputs, problem.base]
    parts.append(repr(sandbox.profile))
    ran = kept.get(parts) if kept else None
    if ran and ran["seconds"] > QUICK_SECONDS:
        ran = _timed_again(problem, ran, sandbox)
    if ran is None:
        ran, lasting = _run_reference(problem, sandbox)
        if kept and lasting:
            kept.put(parts, ran)
    outputs, faults = ran["outputs"], ran["faults"]
    good = [place for place, output in enumerate(outputs) if output is not None]
    inputs, base = tuple(problem.inputs[place] for place in good), sum(place < problem.base for place in good)
    if not base:
        raise ValueError(f"{problem.task_id}: its reference solution answers no base input ({faults[0]})")
    if faults:
        warn(
            f"{problem.task_id}: {len(faults)} of {len(outputs)} inputs are left out, the reference solution gives no "
            f"value for them ({faults[0]})"
        )
    limit = max(LEAST_SECONDS, TIME_FACTOR * ran["seconds"])
    return Reference(inputs, base, tuple(outputs[place] for place in good), limit, tuple(faults))


def _run_reference(problem: Problem, sandbox: Sandbox) -> tuple[dict, bool]:
    """What the reference solution gives, as it is kept: its outputs (None: no value), its faults, and the place of its
    slowest input and the seconds that it took. And whether another call would find the same: what ran out of time, or
    was no verdict, may be for what else the machine had to do."""
    [outcomes] = sandbox.run([_reference_job(problem, problem.inputs)])
    faults = [
        f"{_name(problem.base, place)}: {outcome.status} {outcome.detail}".rstrip()
        for place, outcome in enumerate(outcomes)
        if outcome.status != "ok"
    ]
    seconds, slowest = _slowest(outcomes)
    outputs, lasting = [outcome.output for outcome in outcomes], all(outcome.status in LASTING for outcome in outcomes)
    return {"outputs": outputs, "faults": faults, "slowest": slowest, "seconds": seconds}, lasting


def _timed_again(problem: Problem, ran: dict, sandbox: Sandbox) -> dict | None:
    """The same with the time that the slowest input takes now: the machine may be another one or have more to do, and
    an answer has its limit by it. None if it has another outcome now."""
    places = sorted({0, ran["slowest"]})  # the first one bears the time of loading the program
    [outcomes] = sandbox.run([_reference_job(problem, tuple(problem.inputs[place] for place in places))])
    same = [outcome.output for outcome in outcomes] == [ran["outputs"][place] for place in places]
    return ran | {"seconds": _slowest(outcomes)[0]} if same else None


def _reference_job(problem: Problem, inputs: tuple[str, ...]) -> Job:
    program, each = problem.prompt + problem.solution, REFERENCE_SECONDS
    return Job(program, inputs, each, problem.entry_point, job_seconds=each * len(inputs))


def _slowest(outcomes: list[Outcome]) -> tuple[float, int]:
    """The seconds that the slowest input took, and its place. What a process says of its time is believed here: the
    program is the benchmark's own, and running every input again, alone, would cost more than all else."""
    slowest, before = (0.0, 0), 0.0
    for place, outcome in enumerate(outcomes):
        # Up to this input, and from zero on where a process took over from one that was ended for its time.
        own = outcome.seconds - (before if outcome.seconds >= before else 0.0)
        slowest, before = max(slowest, (own if outcome.status == "ok" else 0.0, place)), outcome.seconds
    return slowest


def _measured(job: Job, sandbox: Sandbox) -> tuple[list, float]:
    """The outcomes of a job, and the seconds that all its inputs together took: CPU time, or the limit of each process
    that was ended for its time, where sleeping counts too."""
    # The counters are those of the whole sandbox, so nothing else may run in it meanwhile.
    before = sandbox.state
    [outcomes] = sandbox.run([job])
    after = sandbox.state
    ended = after["children"] - before["children"] - 1
    return outcomes, max(after["children_cpu_seconds"] - before["children_cpu_seconds"], ended * job.cpu_seconds)


def grade(problem: Problem, answer: str | None, reference: Reference, sandbox: Sandbox) -> Grade:
    """The grade of an answer, by the first input that is not right. None is no answer.

    The inputs go to the sandbox in parts that grow: a wrong answer ends with the part in which it is wrong, and one
    that is slow at every input with the answer's budget of time. Nothing else may run in the sandbox meanwhile.
    """
    if answer is None:
        return Grade(False, False, "no_answer", "the response holds no program")
    program, limit, count = program_of(problem, answer), reference.cpu_seconds, len(reference.inputs)
    budget, spent, start, size = min(ANSWER_SECONDS, count * limit), 0.0, 0, FIRST_INPUTS
    while start < count:
        inputs = reference.inputs[start : start + size]
        # The first input that fails decides the grade, and each further one could take its whole time limit.
        left = max(limit, budget - spent)
        job = Job(program, inputs, limit, problem.entry_point, stop_at_failure=True, job_seconds=left)
        outcomes, seconds = _measured(job, sandbox)
        for place, outcome in enumerate(outcomes, start):
            if fault := _fault(problem, reference, place, outcome):
                return fault
        start, spent = start + len(inputs), spent + seconds
        # Sure to run out of it: a quarter is gone, and the rest would take it three times over.
        hopeless = spent > budget / 4 and spent * count > 3 * budget * start
        if start < count and (spent > budget or hopeless):
            detail = f"{_name(reference.base, start)}: the budget of {budget:.0f} s does not suffice"
            return Grade(start >= reference.base, False, "timeout", detail)
        # A part that is expected to fit into one process, since one that is ended for its time has to be run again.
        size = min(GROWTH * size, MOST_INPUTS, max(1, int(0.8 * limit * start / (spent + 1e-9))))
    return Grade(True, True, "ok")


def _fault(problem: Problem, reference: Reference, place: int, outcome: Outcome) -> Grade | None:
    """The grade of an answer with this outcome of an input, None if it is right."""
    reason, detail = outcome.status, outcome.detail
    if reason == "ok":
        expected = reference.outputs[place]
        if accepts(problem, reference.inputs[place], outcome.output, expected):
            return None
        reason, detail = "wrong", f"{outcome.output:.80} instead of {expected:.80}"
    # Base inputs come first: whoever fails at an extra one was right on all of them.
    name = _name(reference.base, place)
    return Grade(place >= reference.base, False, reason, f"{name}: {detail}".rstrip(": "))


def _name(base: int, place: int) -> str:
    return f"base input {place}" if place < base else f"plus input {place - base}"


# ---------------------------------------------------------------- comparing


def accepts(problem: Problem, arguments: str, output: str, wanted: str) -> bool:
    """Whether `output` is right for the call with `arguments`, where the reference solution gives `wanted`: canonical
    texts all three. Special oracles as in evalplus/eval/_special_oracle.py."""
    if output == wanted and problem.task_id != "Mbpp/164":
        return True
    value, expected = (literal.parse(text, BENCHMARK.limits) for text in (output, wanted))
    if problem.task_id == "Mbpp/164":  # "equivalent" is not defined there, so either bool is right
        return type(value) is bool
    if problem.task_id in _FOUND_OR_NONE:
        return _found(value) == _found(expected)
    # Before the oracles: what the reference solution gives is right even where an oracle names another value.
    if close(value, expected, problem.atol):
        return True
    oracle = _ORACLES.get(problem.task_id)
    if problem.task_id in _ANY_ORDER:
        oracle = _same_elements
    if oracle is None:
        return False
    try:
        return bool(oracle(value, expected, literal.parse_args(arguments, BENCHMARK.limits)[0], problem.atol))
    except (TypeError, ValueError, ArithmeticError):  # a value of another kind than the oracle is about
        return False


def close(value: Any, expected: Any, atol: float = 0.0) -> bool:
    """Equal, or of the same kind with floats that differ by at most atol + 1e-7 |expected| (atol 0: 1e-6)."""
    if literal.equal(value, expected, rel=0):
        return True
    # A set has no tolerance inside, and has just been compared.
    return (
        type(value) is type(expected) and type(value) not in (set, frozenset) and _near(value, expected, atol or ATOL)
    )


def _near(a: Any, b: Any, atol: float) -> bool:
    kinds = {type(a), type(b)}
    # Integers are exact: within a relative tolerance a large one would equal its neighbours.
    if kinds <= {int, float, complex} and kinds != {int}:
        try:
            # An infinite b would make the tolerance infinite; the last comparison is for NaN.
            return a == b or abs(a - b) <= atol + RTOL * abs(b) < float("inf") or literal.equal(a, b, rel=0)
        except OverflowError:  # an integer beyond all floats
            return False
    if kinds in ({list}, {tuple}):
        return len(a) == len(b) and all(_near(x, y, atol) for x, y in zip(a, b))
    if kinds == {dict}:
        return a.keys() == b.keys() and all(_near(a[key], b[key], atol) for key in a)
    return literal.equal(a, b, rel=0)


def _found(value: Any) -> bool:
    """Tells whether a search found something: a match (written as True) or any value but None; a bool is the answer."""
    return value if type(value) is bool else value is not None


def _same_elements(value, expected, _arguments, _atol):
    """set(value) == set(expected), by texts: a set of numbers can be made to share one hash, and texts cannot."""
    return set(map(_element, value)) == set(map(_element, expected))


def _element(value: Any) -> str:
    """The same text for hashable values that are equal. TypeError for a value that no set could hold."""
    if isinstance(value, (list, dict, set)):
        raise TypeError("not hashable")
    if isinstance(value, (bool, int, float)):
        return literal.canon(int(value) if value == value // 1 else value, BENCHMARK.limits)
    if isinstance(value, tuple):
        return f"({','.join(map(_element, value))})"
    return repr(value)


def _is_root(value, _expected, arguments, atol):
    """HumanEval/32: any zero of the polynomial sum_i arguments[0][i] x^i will do."""
    # A float as in evalplus; the powers of an integer could have millions of digits. OverflowError: beyond all floats.
    value = float(value) if type(value) in (int, float) else None
    return value is not None and abs(sum(c * value**i for i, c in enumerate(arguments[0]))) <= atol


def _is_zero(value, _expected, _arguments, _atol):
    """Mbpp/295: whether a number is among its divisors is open, as is what has none; evalplus takes 0."""
    return type(value) in (int, float) and value == 0


def _is_surface(value, _expected, arguments, atol):
    """Mbpp/581: of a square pyramid, with the height read as that of the apex instead of the slant height."""
    edge, height = arguments
    slant = ((edge / 2) ** 2 + height**2) ** 0.5
    return abs(value - round(edge**2 + 2 * edge * slant)) <= atol


def _is_digit_distance(value, _expected, arguments, _atol):
    """Mbpp/558: digit by digit from the right, the shorter number with zeros in front."""
    texts = [str(number) for number in arguments]
    width = max(map(len, texts))
    return value == sum(abs(int(a) - int(b)) for a, b in zip(*(text.zfill(width) for text in texts)))


_ORACLES = {"HumanEval/32": _is_root, "Mbpp/295": _is_zero, "Mbpp/581": _is_surface, "Mbpp/558": _is_digit_distance}

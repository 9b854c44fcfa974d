"""Random small typed programs for the embedded model: ints, lists of ints, strings over a-e; one to three operations.

A `Program` carries its text, the words that name its operations, and a Python callable for each operation, so its value
on an input, with every intermediate value, is computed by executing those callables; a test runs the texts in the
sandbox and compares. Left out on purpose: dicts, floats, nested loops, recursion. The model has a million parameters.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

LETTERS = "abcde"
MAX_TEXT = 24  # longest value text a document shows


class Operation(NamedTuple):
    """One typed operation. {e} is the operand, in parentheses if needed, {E} the bare one, {c} the constant."""

    weight: float
    words: str
    takes: str  # i(nt), l(ist of ints), s(tring)
    gives: str
    text: str
    run: Callable[[Any, Any], Any]
    constant: str = ""  # "": none; "small" 1-9; "divisor" 2-5; "factor" 2-4; "letter"; "cut" 1-2
    atomic: bool = True  # the text needs no parentheses as an operand


OPERATIONS = [
    Operation(3.0, "add {c}", "i", "i", "{e}+{c}", lambda v, c: v + c, "small", False),
    Operation(2.5, "subtract {c}", "i", "i", "{e}-{c}", lambda v, c: v - c, "small", False),
    Operation(2.0, "multiply by {c}", "i", "i", "{e}*{c}", lambda v, c: v * c, "factor", False),
    Operation(1.5, "divide by {c}", "i", "i", "{e}//{c}", lambda v, c: v // c, "divisor", False),
    Operation(1.5, "remainder of {c}", "i", "i", "{e}%{c}", lambda v, c: v % c, "divisor", False),
    Operation(1.0, "take from {c}", "i", "i", "{c}-{e}", lambda v, c: c - v, "small", False),
    Operation(0.7, "absolute", "i", "i", "abs({E})", lambda v, c: abs(v)),
    Operation(1.0, "at least {c}", "i", "i", "max({E}, {c})", lambda v, c: max(v, c), "small"),
    Operation(1.0, "at most {c}", "i", "i", "min({E}, {c})", lambda v, c: min(v, c), "small"),
    Operation(0.7, "square", "i", "i", "{e}**2", lambda v, c: v**2, "", False),
    Operation(0.6, "negate", "i", "i", "-{e}", lambda v, c: -v, "", False),
    Operation(0.8, "count up", "i", "l", "list(range({E}))", lambda v, c: list(range(v))),
    Operation(0.8, "pair with {c}", "i", "l", "[{E}, {c}]", lambda v, c: [v, c], "small"),
    Operation(0.5, "repeat in a list {c}", "i", "l", "[{E}]*{c}", lambda v, c: [v] * c, "factor", False),
    Operation(0.8, "as text", "i", "s", "str({E})", lambda v, c: str(v)),
    Operation(1.5, "length", "l", "i", "len({E})", lambda v, c: len(v)),
    Operation(2.0, "sum", "l", "i", "sum({E})", lambda v, c: sum(v)),
    Operation(1.2, "largest", "l", "i", "max({E})", lambda v, c: max(v)),
    Operation(1.2, "smallest", "l", "i", "min({E})", lambda v, c: min(v)),
    Operation(1.0, "first", "l", "i", "{e}[0]", lambda v, c: v[0]),
    Operation(1.0, "last", "l", "i", "{e}[-1]", lambda v, c: v[-1]),
    Operation(0.7, "count of {c}", "l", "i", "{e}.count({c})", lambda v, c: v.count(c), "small"),
    Operation(1.6, "sort", "l", "l", "sorted({E})", lambda v, c: sorted(v)),
    Operation(0.7, "sort down", "l", "l", "sorted({E})[::-1]", lambda v, c: sorted(v)[::-1]),
    Operation(1.6, "reverse", "l", "l", "{e}[::-1]", lambda v, c: v[::-1]),
    Operation(1.0, "drop first {c}", "l", "l", "{e}[{c}:]", lambda v, c: v[c:], "cut"),
    Operation(1.0, "keep first {c}", "l", "l", "{e}[:{c}]", lambda v, c: v[:c], "cut"),
    Operation(0.7, "drop last", "l", "l", "{e}[:-1]", lambda v, c: v[:-1]),
    Operation(0.7, "every second", "l", "l", "{e}[::2]", lambda v, c: v[::2]),
    Operation(1.0, "append {c}", "l", "l", "{e}+[{c}]", lambda v, c: v + [c], "small", False),
    Operation(0.7, "put {c} before", "l", "l", "[{c}]+{e}", lambda v, c: [c] + v, "small", False),
    Operation(1.2, "add {c} to each", "l", "l", "[v+{c} for v in {E}]", lambda v, c: [u + c for u in v], "small"),
    Operation(1.0, "multiply each by {c}", "l", "l", "[v*{c} for v in {E}]", lambda v, c: [u * c for u in v], "factor"),
    Operation(1.0, "keep over {c}", "l", "l", "[v for v in {E} if v>{c}]", lambda v, c: [u for u in v if u > c],
              "small"),
    Operation(0.8, "keep even", "l", "l", "[v for v in {E} if v%2==0]", lambda v, c: [u for u in v if u % 2 == 0]),
    Operation(0.8, "unique sorted", "l", "l", "sorted(set({E}))", lambda v, c: sorted(set(v))),
    Operation(0.5, "twice over", "l", "l", "{e}*2", lambda v, c: v * 2, "", False),
    Operation(1.0, "join digits", "l", "s", "''.join(str(v) for v in {E})", lambda v, c: "".join(map(str, v))),
    Operation(1.3, "length", "s", "i", "len({E})", lambda v, c: len(v)),
    Operation(1.0, "count {c}", "s", "i", "{e}.count({c})", lambda v, c: v.count(c), "letter"),
    Operation(0.8, "find {c}", "s", "i", "{e}.find({c})", lambda v, c: v.find(c), "letter"),
    Operation(1.8, "reverse", "s", "s", "{e}[::-1]", lambda v, c: v[::-1]),
    Operation(1.3, "upper case", "s", "s", "{e}.upper()", lambda v, c: v.upper()),
    Operation(1.0, "drop first {c}", "s", "s", "{e}[{c}:]", lambda v, c: v[c:], "cut"),
    Operation(1.0, "keep first {c}", "s", "s", "{e}[:{c}]", lambda v, c: v[:c], "cut"),
    Operation(0.8, "drop last", "s", "s", "{e}[:-1]", lambda v, c: v[:-1]),
    Operation(0.7, "every second", "s", "s", "{e}[::2]", lambda v, c: v[::2]),
    Operation(1.2, "end with {c}", "s", "s", "{e}+{c}", lambda v, c: v + c, "letter", False),
    Operation(1.0, "start with {c}", "s", "s", "{c}+{e}", lambda v, c: c + v, "letter", False),
    Operation(0.8, "repeat {c}", "s", "s", "{e}*{c}", lambda v, c: v * c, "factor", False),
    Operation(0.8, "remove {c}", "s", "s", "{e}.replace({c}, '')", lambda v, c: v.replace(c, ""), "letter"),
    Operation(1.0, "sort letters", "s", "s", "''.join(sorted({E}))", lambda v, c: "".join(sorted(v))),
    Operation(0.7, "letters", "s", "l", "list({E})", lambda v, c: list(v)),
]


class Loop(NamedTuple):
    """A loop over `x` as one operation; {c} is its constant."""

    words: str
    takes: str
    lines: str
    run: Callable[[Any, Any], Any]
    constant: str = ""


LOOPS = [
    Loop("sum of each times {c}", "l", "t=0\n    for v in x:\n        t+=v*{c}\n    return t",
         lambda x, c: sum(v * c for v in x), "factor"),
    Loop("sum of even", "l", "t=0\n    for v in x:\n        if v%2==0:\n            t+=v\n    return t",
         lambda x, c: sum(v for v in x if v % 2 == 0)),
    Loop("count over {c}", "l", "t=0\n    for v in x:\n        if v>{c}:\n            t+=1\n    return t",
         lambda x, c: sum(1 for v in x if v > c), "small"),
    Loop("running sums", "l", "t=0\n    r=[]\n    for v in x:\n        t+=v\n        r.append(t)\n    return r",
         lambda x, c: [sum(x[: i + 1]) for i in range(len(x))]),
    Loop("each minus {c}", "l", "r=[]\n    for v in x:\n        r.append(v-{c})\n    return r",
         lambda x, c: [v - c for v in x], "small"),
    Loop("double each letter", "s", "r=''\n    for v in x:\n        r+=v*2\n    return r",
         lambda x, c: "".join(v * 2 for v in x)),
    Loop("letters before others reversed", "s", "r=''\n    for v in x:\n        r=v+r\n    return r",
         lambda x, c: x[::-1]),
    Loop("letters without {c}", "s", "r=''\n    for v in x:\n        if v!={c}:\n            r+=v\n    return r",
         lambda x, c: "".join(v for v in x if v != c), "letter"),
    Loop("sum up to it plus {c}", "i", "t={c}\n    for v in range(x):\n        t+=v\n    return t",
         lambda x, c: c + sum(range(x)), "small"),
    Loop("multiples of {c}", "i", "r=[]\n    for v in range(x):\n        r.append(v*{c})\n    return r",
         lambda x, c: [v * c for v in range(x)], "factor"),
    Loop("add {c} until over 20", "i", "while x<20:\n        x+={c}\n    return x",
         lambda x, c: x if x >= 20 else x + c * -(-(20 - x) // c), "small"),
]

CONDITIONS = {
    "i": [("x>{c}", "over {c}", lambda x, c: x > c, "small"), ("x%2==0", "even", lambda x, c: x % 2 == 0, "")],
    "l": [("len(x)>{c}", "longer than {c}", lambda x, c: len(x) > c, "cut"),
          ("x[0]>{c}", "first over {c}", lambda x, c: x[0] > c, "small")],
    "s": [("len(x)>{c}", "longer than {c}", lambda x, c: len(x) > c, "cut"),
          ("{c} in x", "with {c}", lambda x, c: c in x, "letter")],
}


@dataclass(frozen=True)
class Program:
    """`text` defines f(x) or f(x, y); `trace(x, y)` gives the values after each operation; it may raise."""

    text: str
    words: str
    takes: str
    two: bool  # whether there is a second parameter y, a small int
    trace: Callable[[Any, Any], list]


def constant(kind: str, rng: random.Random):
    """A value for an operation's constant."""
    return {
        "small": lambda: rng.randint(1, 9), "divisor": lambda: rng.randint(2, 5), "factor": lambda: rng.randint(2, 4),
        "cut": lambda: rng.randint(1, 2), "letter": lambda: rng.choice(LETTERS), "": lambda: None,
    }[kind]()


def _pick(takes: str, rng: random.Random, gives: str | None = None) -> Operation:
    fitting = [o for o in OPERATIONS if o.takes == takes and (gives is None or o.gives == gives)]
    return rng.choices(fitting, [o.weight for o in fitting])[0]


def _apply(op: Operation, operand: str, atomic: bool, c: str) -> str:
    return op.text.replace("{e}", operand if atomic else f"({operand})").replace("{E}", operand).replace("{c}", c)


def _chain(takes: str, rng: random.Random, count: int, two: bool):
    """`count` operations with constants; one of the int constants is y if `two`."""
    steps, kind = [], takes
    for _ in range(count):
        op = _pick(kind, rng)
        steps.append((op, constant(op.constant, rng)))
        kind = op.gives
    places = [i for i, (op, _) in enumerate(steps) if op.constant in ("small", "divisor", "factor")]
    return steps, (rng.choice(places) if two and places else -1)


def random_program(rng: random.Random) -> Program:
    """One program; its style and number of operations are drawn from the mixture described in the module."""
    takes = rng.choices("ils", [36, 36, 28])[0]
    style = rng.choices(["nest", "assign", "loop", "if", "either"], [58, 18, 10, 9, 5])[0]
    if style == "loop":
        return _loop_program(takes, rng)
    if style in ("if", "either"):
        return _branch_program(takes, rng, style)
    count = rng.choices([1, 2, 3], [46, 38, 16])[0]
    steps, place_y = _chain(takes, rng, max(count, 2) if style == "assign" else count, rng.random() < 0.25)
    names = ["y" if i == place_y else repr(c) for i, (_, c) in enumerate(steps)]
    lines, operand, atomic = [], "x", True
    for i, ((op, _), name) in enumerate(zip(steps, names)):
        operand, atomic = _apply(op, operand, atomic, name), op.atomic
        if style == "assign" and i < len(steps) - 1:
            lines.append(f"{'ab'[i]}={operand}\n    ")
            operand, atomic = "ab"[i], True
    two = place_y >= 0
    words = " then ".join(op.words.replace("{c}", name.strip("'")) for (op, _), name in zip(steps, names))

    def trace(x, y):
        values = [x]
        for i, (op, c) in enumerate(steps):
            values.append(op.run(values[-1], y if i == place_y else c))
        return values[1:]

    return Program(f"def f(x{', y' if two else ''}):\n    {''.join(lines)}return {operand}", words, takes, two, trace)


def _loop_program(takes: str, rng: random.Random) -> Program:
    loop = rng.choice([loop for loop in LOOPS if loop.takes == takes])
    c = constant(loop.constant, rng)
    text = loop.lines.replace("{c}", repr(c))
    return Program(f"def f(x):\n    {text}", loop.words.replace("{c}", str(c)), takes, False,
                   lambda x, y: [loop.run(x, c)])


def _branch_program(takes: str, rng: random.Random, style: str) -> Program:
    test, test_words, holds, kind = rng.choice(CONDITIONS[takes])
    limit = constant(kind, rng)
    yes = _pick(takes, rng)
    no = _pick(takes, rng, yes.gives)
    c_yes, c_no = constant(yes.constant, rng), constant(no.constant, rng)
    test = test.replace("{c}", repr(limit))
    left, right = _apply(yes, "x", True, repr(c_yes)), _apply(no, "x", True, repr(c_no))
    if style == "if":
        body = f"if {test}:\n        return {left}\n    return {right}"
    else:
        body = f"return {left} if {test} else {right}"
    words = (f"{yes.words.replace('{c}', str(c_yes))} if {test_words.replace('{c}', str(limit))} "
             f"else {no.words.replace('{c}', str(c_no))}")
    return Program(f"def f(x):\n    {body}", words, takes, False,
                   lambda x, y: [yes.run(x, c_yes) if holds(x, limit) else no.run(x, c_no)])


def random_value(takes: str, rng: random.Random):
    """An argument of the type: ints 0-9 (one in seven to 20), lists and strings of 1 to 4 elements."""
    if takes == "i":
        return rng.randint(0, 20) if rng.random() < 0.15 else rng.randint(0, 9)
    length = rng.choices([1, 2, 3, 4], [12, 26, 34, 28])[0]
    if takes == "l":
        return [rng.randint(0, 9) for _ in range(length)]
    return "".join(rng.choice(LETTERS) for _ in range(length))


def random_arguments(program: Program, rng: random.Random) -> tuple:
    """(x, y); y is None for a program of one parameter."""
    return random_value(program.takes, rng), (rng.randint(1, 9) if program.two else None)


def arguments_text(arguments: tuple) -> str:
    """The text between the parentheses of f(...)."""
    return repr(arguments[0]) if arguments[1] is None else f"{arguments[0]!r}, {arguments[1]!r}"


def run_program(program: Program, arguments: tuple) -> list | None:
    """The values after each operation, or None if the program raises or a value is too long to show."""
    try:
        values = program.trace(*arguments)
    except (IndexError, ValueError, ZeroDivisionError, TypeError):
        return None
    return values if all(len(repr(v)) <= MAX_TEXT for v in values) else None


def induction_pairs(program: Program, rng: random.Random, count: int) -> list[tuple[tuple, Any]] | None:
    """`count` distinct arguments with their results, at least three distinct; None if the draws do not give that."""
    found: dict[str, tuple] = {}
    for _ in range(5 * count):
        arguments = random_arguments(program, rng)
        if program.takes == "i":
            arguments = (rng.randint(0, 20), arguments[1])  # ten distinct inputs want a wider range than one
        elif len(arguments[0]) == 1 and rng.random() < 0.8:
            continue
        values = run_program(program, arguments)
        if values is not None:
            found[arguments_text(arguments)] = (arguments, values[-1])
        if len(found) == count:
            pairs = list(found.values())
            if program.takes == "i" and rng.random() < 0.9:
                pairs.sort(key=lambda pair: pair[0])
            return pairs if len({repr(v) for _, v in pairs}) >= 3 else None
    return None

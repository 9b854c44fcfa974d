"""Random small programs for the embedded model: one to eight statements whose values can be followed step by step.

    def f(x, y):            a program assigns one fresh name in each statement and returns the last one
        p=x+3
        q=max(p, y)         the trace of f(5, 9): p=5+3=8;q=max(8, 9)=9;
        return q

A statement is an operation, a choice (an expression or a block) or a loop with state. Values are computed by the
Python callables of the tables in operations.py, never by evaluating text; a test runs the texts in the sandbox and
compares. `Program.run` also writes the trace: every executed step with the values put in place of the names, because
a small model learns to copy and compute, not to look up and compute in one go (measured: trace loss .10 against .49).

`Stage` says which types and how large ints a program may hold: training begins with digits. Left out on purpose: nested
loops, recursion, floats, negative numbers; the model has about a million parameters.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from azr.tiny.operations import LETTERS, LOOPS, MAX_TURNS, OPERATIONS, TESTS, Loop, Operation, Test, constant, kind_of

NAMES = "pqrstumn"  # a statement's target, in order; v is the variable of loops
PARAMETERS = "xyz"
TOP = ""  # where a run keeps the largest int allowed, among the values of its variables
MAX_LIST, MAX_STRING = 5, 7  # elements or letters of a value
MAX_TRACE = 130  # characters; about as many tokens
MAX_STATEMENTS = 8
STYLES = (64, 18, 10, 8)  # of statements: operation, loop, conditional expression, block
ALONE = (82, 8, 6, 4)  # of the only statement of a program: the easiest programs are one step long
PARAMETER_TYPES = (56, 26, 18)
UNREAD, NOT_NEWEST = 0.6, 0.95  # how often a source is one that nothing has read yet; is not the newest
LIKE = 6.0  # how much likelier an operation of a reference is in a proposal


class OutOfRange(Exception):
    """A value is negative, too large, too long or mixed: the program does not fit this input."""


class Stage(NamedTuple):
    """Which values a program may hold: types i(nt), l(ist of ints), s(tring), t(uple), d(ict), and the largest int."""

    types: str
    top: int


STAGES = (Stage("i", 9), Stage("i", 99), Stage("il", 99), Stage("ils", 99), Stage("ilstd", 99))
LAST = len(STAGES) - 1


@dataclass(frozen=True)
class Statement:
    """One statement with its target and sources chosen.

    `lines` is its text; `value(env)` its value given the values of the variables, and with a list `steps` it appends
    what the trace shows of it. `words` name it; `kind` is the template's text (what "a shared operation" means).
    """

    name: str
    sources: tuple[str, ...]
    gives: str
    lines: str
    words: str
    kind: str
    value: Callable[[dict, list | None], Any]


def checked(value: Any, top: int | None) -> Any:
    """The value, if it is short enough and no int in it is negative or above `top`; OutOfRange if not. None: any."""
    if top is None:
        return value
    ints = value if isinstance(value, list) else [value] if isinstance(value, int) else ()
    if isinstance(value, (tuple, dict)):
        ints = [v for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, int)]
    if any(not 0 <= v <= top for v in ints):
        raise OutOfRange
    if isinstance(value, list) and len(value) > MAX_LIST or isinstance(value, str) and len(value) > MAX_STRING:
        raise OutOfRange
    return value


def _operation(name: str, op: Operation, operands: tuple[str, ...], c: Any) -> Statement:
    a, b = operands[0], operands[-1]

    def value(env, steps):
        left, right = env[a], env[b]
        result = checked(op.run(left, right, c), env[TOP])
        if steps is not None:
            steps.append(f"{name}={op.text.format(a=repr(left), b=repr(right), c=repr(c))}={result!r};")
        return result

    text = op.text.format(a=a, b=b, c=repr(c))
    words = op.words.format(c=str(c))
    return Statement(name, operands, op.gives, f"{name}={text}", words, op.text, value)


def _loop(name: str, loop: Loop, operands: tuple[str, ...], c: Any) -> Statement:
    a, b = operands[0], operands[-1]

    def turns(state, left, right):
        if loop.over is not None:
            yield from loop.over(left, right, c)
        else:
            while loop.holds(state[0], right, c):
                yield None

    def value(env, steps):
        left, right = env[a], env[b]
        state, count = [checked(loop.start(left, right, c), env[TOP])], 0
        if steps is not None:
            steps.append(f"{name}={state[0]!r};")
        for v in turns(state, left, right):
            before, count = state[0], count + 1
            state[0] = checked(loop.step(before, v, left, right, c), env[TOP])
            if count > (100 if env[TOP] is None else MAX_TURNS) or state[0] == before and loop.over is None:
                raise OutOfRange
            if steps is not None:
                shown = dict(q=repr(before), v=repr(v), a=repr(left), b=repr(right), c=repr(c))
                steps.append(f"{name}={loop.body.format(**shown)}={state[0]!r};")
        return state[0]

    names = dict(q=name, v="v", a=a, b=b, c=repr(c))
    first, head, body = (part.format(**names) for part in (loop.first, loop.head, loop.body))
    lines = f"{name}={first}\n    {head}\n        {name}={body}"
    return Statement(name, operands, loop.gives, lines, loop.words.format(c=str(c)), loop.head + loop.body, value)


def _choice(name, test: Test, operands, c, yes: Statement, no: Statement, block: bool) -> Statement:
    a, b = operands[0], operands[-1]

    def value(env, steps):
        left, right = env[a], env[b]
        holds = test.holds(left, right, c)
        if steps is not None:
            steps.append(f"{test.text.format(a=repr(left), b=repr(right), c=repr(c))} {'yes' if holds else 'no'};")
        return (yes if holds else no).value(env, steps)

    text = test.text.format(a=a, b=b, c=repr(c))
    if block:
        lines = f"if {text}:\n        {yes.lines}\n    else:\n        {no.lines}"
    else:
        lines = f"{yes.lines} if {text} else {no.lines[len(name) + 1 :]}"
    words = f"{yes.words} if {test.words.format(c=str(c))} else {no.words}"
    sources = tuple(dict.fromkeys(operands + yes.sources + no.sources))
    return Statement(name, sources, yes.gives, lines, words, test.text, value)


@dataclass(frozen=True)
class Program:
    """`text` defines f over `parameters` (name -> type)."""

    parameters: dict[str, str]
    statements: tuple[Statement, ...]

    @property
    def text(self) -> str:
        """The program as Python, a function f."""
        lines = "".join(f"    {s.lines}\n" for s in self.statements)
        return f"def f({', '.join(self.parameters)}):\n{lines}    return {self.statements[-1].name}"

    @property
    def words(self) -> str:
        """Its operations in words, as proposals and messages of inductions say them."""
        return " then ".join(s.words for s in self.statements)

    def run(self, arguments: tuple, top: int | None = 99, steps: list | None = None) -> dict[str, Any] | None:
        """The values of all variables, and with a list `steps` the trace; None if the program fails or a value does not
        fit (see `checked`)."""
        env = {TOP: top, **dict(zip(self.parameters, arguments))}
        try:
            for s in self.statements:
                env[s.name] = s.value(env, steps)
        except (OutOfRange, IndexError, ValueError, ZeroDivisionError, TypeError):
            return None
        return env

    def output(self, arguments: tuple, top: int | None = 99) -> Any:
        """The value returned; None as for `run`."""
        env = self.run(arguments, top)
        return None if env is None else env[self.statements[-1].name]

    def influential(self, env: dict[str, Any]) -> int:
        """How many statements change the result when their value is another one, everything after them run again."""
        count, last = 1, self.statements[-1].name
        for i, s in enumerate(self.statements[:-1]):
            for other in _others(env[s.name]):
                again = dict(env)
                again[s.name] = other
                try:
                    for later in self.statements[i + 1 :]:
                        again[later.name] = later.value(again, None)
                except (OutOfRange, IndexError, ValueError, ZeroDivisionError, TypeError):
                    continue
                if again[last] != env[last]:
                    count += 1
                    break
        return count


def _others(value: Any) -> list:
    """Two values near the given one, to see whether anything depends on it."""
    if isinstance(value, int):
        return [value + 1, value - 1 if value else 2]
    if isinstance(value, list):
        return [value[::-1] + [1], [v + 1 for v in value]]
    if isinstance(value, str):
        return [value[::-1] + "a", value[1:] + "h"]
    if isinstance(value, tuple):
        return [(*value[:-1], 7), (*value[:-1], 8)]
    return [{**value, next(reversed(value)): 7}, {**value, next(reversed(value)): 8}]


class _Draw:
    """One program in the making: chooses operations and their sources, unread variables first."""

    def __init__(self, rng: random.Random, stage: Stage, like: frozenset[str], styles: tuple[int, ...] = STYLES):
        self.rng, self.stage, self.like, self.styles = rng, stage, like, styles
        self.types: dict[str, str] = {}
        self.unread: list[str] = []
        self.statements: list[Statement] = []

    def source(self, kinds: str, taken: str = "") -> str | None:
        """A variable of one of the types, seldom the newest where there is a choice; None if there is none."""
        fits = [n for n, kind in self.types.items() if kind in kinds and n != taken]
        unread = [n for n in self.unread if n in fits]
        pool = unread if unread and self.rng.random() < UNREAD else fits
        newest = next(reversed(self.types))
        if len(pool) > 1 and newest in pool and self.rng.random() < NOT_NEWEST:
            pool = [n for n in pool if n != newest]
        return self.rng.choice(pool) if pool else None

    def pick(self, table: str, first: str, gives: str | None = None):
        """(entry, operands, constant) of a table whose first operand is the variable; None if nothing fits."""
        fits, weights = _fitting(table, self.types[first], gives, self.stage.types)
        if self.like:
            weights = [w * (LIKE if kind_of(entry) in self.like else 1) for w, entry in zip(weights, fits)]
        for entry in self.rng.choices(fits, weights, k=3) if fits else ():
            second = first if len(entry.takes) == 1 else self.source(entry.takes[1], first)
            if second is not None:
                operands = (first,) if len(entry.takes) == 1 else (first, second)
                return entry, operands, constant(entry.constant, self.stage.top, self.rng)
        return None

    def statement(self, name: str) -> Statement | None:
        """One more statement; None if the choice made does not fit the variables there are."""
        style = self.rng.choices(("operation", "loop", "expression", "block"), self.styles)[0]
        first = self.source("ils" if style != "operation" else "ilstd")
        if first is None:
            return None
        if style == "operation":
            found = self.pick("operations", first)
            return found and _operation(name, *found)
        if style == "loop":
            found = self.pick("loops", first)
            return found and _loop(name, *found)
        test = self.pick("tests", first)
        source = self.source("ils")
        yes = source and self.pick("operations", source)
        no = yes and self.pick("operations", source if self.rng.random() < 0.5 else yes[1][0], yes[0].gives)
        if test is None or no is None or yes[0].gives in "td":
            return None
        branches = [_operation(name, *branch) for branch in (yes, no)]
        return None if branches[0].lines == branches[1].lines else _choice(name, *test, *branches, style == "block")

    def add(self, statement: Statement) -> None:
        """Appends a statement; its sources are read by now, its own variable is not."""
        self.statements.append(statement)
        self.unread = [n for n in self.unread if n not in statement.sources] + [statement.name]
        self.types[statement.name] = statement.gives


@functools.cache
def _fitting(table: str, first: str, gives: str | None, types: str) -> tuple[list, list]:
    """Entries of a table for the type of the first operand, with their weights."""
    entries = {"operations": OPERATIONS, "loops": LOOPS, "tests": TESTS}[table]
    fits = [e for e in entries if e.takes[0] == first and set(e.takes) <= set(types)]
    fits = [e for e in fits if getattr(e, "gives", "i") in types and gives in (None, getattr(e, "gives", "i"))]
    return fits, [getattr(e, "weight", 1.0) for e in fits]


def random_program(rng: random.Random, stage: Stage, count: int, like: frozenset[str] = frozenset()) -> Program | None:
    """A program of `count` statements, operations in `like` (see `kind_of`) favoured; None if the draw went wrong:
    fewer than half of its statements can reach the result."""
    draw = _Draw(rng, stage, like, STYLES if count > 1 else ALONE)
    for name in PARAMETERS[: rng.choices((1, 2, 3), (30, 45, 25))[0]]:
        draw.types[name] = rng.choices("ils", PARAMETER_TYPES)[0]
        if draw.types[name] not in stage.types:
            draw.types[name] = "i"
        draw.unread.append(name)
    parameters = dict(draw.types)
    tries = 0
    while len(draw.statements) < count:
        statement = draw.statement(NAMES[len(draw.statements)])
        tries += 1
        if statement is not None:
            draw.add(statement)
        elif tries > 6 * count:
            return None
    wanted, reached = {draw.statements[-1].name}, 0
    for statement in reversed(draw.statements):
        if statement.name in wanted:
            wanted.update(statement.sources)
            reached += 1
    return Program(parameters, tuple(draw.statements)) if 2 * reached > count else None


def random_value(kind: str, stage: Stage, rng: random.Random) -> Any:
    """An argument: ints mostly of one digit, lists of 1 to 4 of them, strings of 1 to 4 letters."""
    if kind == "i":
        return rng.randint(0, 9) if stage.top < 10 or rng.random() < 0.5 else rng.randint(10, 50)
    length = rng.choices((1, 2, 3, 4), (10, 28, 36, 26))[0]
    if kind == "l":
        high = 9 if rng.random() < 0.8 else 30
        return [rng.randint(0, high) for _ in range(length)]
    return "".join(rng.choice(LETTERS) for _ in range(length))


def random_arguments(program: Program, stage: Stage, rng: random.Random) -> tuple:
    """One value for each parameter."""
    return tuple(random_value(kind, stage, rng) for kind in program.parameters.values())


def arguments_text(arguments: tuple) -> str:
    """The text between the parentheses of f(...)."""
    return ", ".join(map(repr, arguments))

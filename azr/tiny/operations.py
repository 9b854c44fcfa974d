"""The statements that programs of the embedded model are made of: operations, loops with state, and tests of a choice.

Each row holds the text of a statement, its words for messages, its types and what it computes. The types are i(nt),
l(ist of ints), s(tring), t(uple) and d(ict). To teach another language, change these tables; programs.py draws from
them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

LETTERS = "abcdefgh"


class Operation(NamedTuple):
    """One typed operation: {a} and {b} are operands, {c} the constant. `words` name it in messages."""

    weight: float
    words: str
    takes: str  # types of a and b
    gives: str
    text: str
    run: Callable[[Any, Any, Any], Any]
    constant: str = ""  # see `constant`; "": none


OPERATIONS = [
    Operation(2.5, "plus {c}", "i", "i", "{a}+{c}", lambda a, b, c: a + c, "large"),
    Operation(2.0, "minus {c}", "i", "i", "{a}-{c}", lambda a, b, c: a - c, "small"),
    Operation(2.0, "times {c}", "i", "i", "{a}*{c}", lambda a, b, c: a * c, "factor"),
    Operation(1.0, "divided by {c}", "i", "i", "{a}//{c}", lambda a, b, c: a // c, "factor"),
    Operation(1.0, "remainder of {c}", "i", "i", "{a}%{c}", lambda a, b, c: a % c, "small"),
    Operation(1.0, "taken from {c}", "i", "i", "{c}-{a}", lambda a, b, c: c - a, "large"),
    Operation(0.7, "at least {c}", "i", "i", "max({a}, {c})", lambda a, b, c: max(a, c), "large"),
    Operation(0.7, "at most {c}", "i", "i", "min({a}, {c})", lambda a, b, c: min(a, c), "large"),
    Operation(4.0, "sum of two", "ii", "i", "{a}+{b}", lambda a, b, c: a + b),
    Operation(2.5, "difference of two", "ii", "i", "{a}-{b}", lambda a, b, c: a - b),
    Operation(1.5, "product of two", "ii", "i", "{a}*{b}", lambda a, b, c: a * b),
    Operation(1.5, "distance of two", "ii", "i", "abs({a}-{b})", lambda a, b, c: abs(a - b)),
    Operation(1.5, "larger of two", "ii", "i", "max({a}, {b})", lambda a, b, c: max(a, b)),
    Operation(1.5, "smaller of two", "ii", "i", "min({a}, {b})", lambda a, b, c: min(a, b)),
    Operation(2.0, "pair of two", "ii", "l", "[{a}, {b}]", lambda a, b, c: [a, b]),
    Operation(0.6, "list with {c}", "i", "l", "[{a}, {c}]", lambda a, b, c: [a, c], "small"),
    Operation(0.5, "repeated in a list", "i", "l", "[{a}]*{c}", lambda a, b, c: [a] * c, "factor"),
    Operation(0.5, "as text", "i", "s", "str({a})", lambda a, b, c: str(a)),
    Operation(1.0, "length", "l", "i", "len({a})", lambda a, b, c: len(a)),
    Operation(1.8, "total", "l", "i", "sum({a})", lambda a, b, c: sum(a)),
    Operation(1.2, "largest", "l", "i", "max({a})", lambda a, b, c: max(a)),
    Operation(1.2, "smallest", "l", "i", "min({a})", lambda a, b, c: min(a)),
    Operation(1.0, "first", "l", "i", "{a}[0]", lambda a, b, c: a[0]),
    Operation(1.0, "last", "l", "i", "{a}[-1]", lambda a, b, c: a[-1]),
    Operation(0.6, "count of {c}", "l", "i", "{a}.count({c})", lambda a, b, c: a.count(c), "small"),
    Operation(1.2, "count in list", "li", "i", "{a}.count({b})", lambda a, b, c: a.count(b)),
    Operation(1.5, "sorted", "l", "l", "sorted({a})", lambda a, b, c: sorted(a)),
    Operation(1.5, "reversed", "l", "l", "{a}[::-1]", lambda a, b, c: a[::-1]),
    Operation(0.8, "without first {c}", "l", "l", "{a}[{c}:]", lambda a, b, c: a[c:], "cut"),
    Operation(0.8, "first {c} only", "l", "l", "{a}[:{c}]", lambda a, b, c: a[:c], "cut"),
    Operation(0.8, "end with {c}", "l", "l", "{a}+[{c}]", lambda a, b, c: a + [c], "small"),
    Operation(2.0, "end with number", "li", "l", "{a}+[{b}]", lambda a, b, c: a + [b]),
    Operation(1.5, "start with number", "li", "l", "[{b}]+{a}", lambda a, b, c: [b] + a),
    Operation(1.5, "joined lists", "ll", "l", "{a}+{b}", lambda a, b, c: a + b),
    Operation(1.0, "plus {c} each", "l", "l", "[v+{c} for v in {a}]", lambda a, b, c: [v + c for v in a], "small"),
    Operation(1.2, "plus number each", "li", "l", "[v+{b} for v in {a}]", lambda a, b, c: [v + b for v in a]),
    Operation(1.0, "times {c} each", "l", "l", "[v*{c} for v in {a}]", lambda a, b, c: [v * c for v in a], "factor"),
    Operation(
        0.8, "over {c} only", "l", "l", "[v for v in {a} if v>{c}]", lambda a, b, c: [v for v in a if v > c], "small"
    ),
    Operation(1.0, "over number only", "li", "l", "[v for v in {a} if v>{b}]", lambda a, b, c: [v for v in a if v > b]),
    Operation(1.0, "length", "s", "i", "len({a})", lambda a, b, c: len(a)),
    Operation(0.8, "count of {c}", "s", "i", "{a}.count({c})", lambda a, b, c: a.count(c), "letter"),
    Operation(0.6, "place of {c}", "s", "i", "({a}+{c}).find({c})", lambda a, b, c: (a + c).find(c), "letter"),
    Operation(1.5, "reversed", "s", "s", "{a}[::-1]", lambda a, b, c: a[::-1]),
    Operation(1.2, "capitals", "s", "s", "{a}.upper()", lambda a, b, c: a.upper()),
    Operation(0.8, "without first {c}", "s", "s", "{a}[{c}:]", lambda a, b, c: a[c:], "cut"),
    Operation(0.8, "first {c} only", "s", "s", "{a}[:{c}]", lambda a, b, c: a[:c], "cut"),
    Operation(1.0, "end with {c}", "s", "s", "{a}+{c}", lambda a, b, c: a + c, "letter"),
    Operation(0.8, "start with {c}", "s", "s", "{c}+{a}", lambda a, b, c: c + a, "letter"),
    Operation(1.8, "joined texts", "ss", "s", "{a}+{b}", lambda a, b, c: a + b),
    Operation(1.2, "number written behind", "si", "s", "{a}+str({b})", lambda a, b, c: a + str(b)),
    Operation(0.8, "letter at the number", "si", "s", "{a}[{b}%len({a})]", lambda a, b, c: a[b % len(a)]),
    Operation(0.6, "sorted letters", "s", "s", "''.join(sorted({a}))", lambda a, b, c: "".join(sorted(a))),
    Operation(0.6, "repeated twice", "s", "s", "{a}*2", lambda a, b, c: a * 2),
    Operation(0.8, "tuple of two", "ii", "t", "({a}, {b})", lambda a, b, c: (a, b)),
    Operation(0.5, "tuple with text", "si", "t", "({a}, {b})", lambda a, b, c: (a, b)),
    Operation(0.7, "dict of two", "ii", "d", "{{'a': {a}, 'b': {b}}}", lambda a, b, c: {"a": a, "b": b}),
    Operation(0.5, "dict with text", "si", "d", "{{{a}: {b}}}", lambda a, b, c: {a: b}),
    Operation(1.0, "last of the tuple", "t", "i", "{a}[-1]", lambda a, b, c: a[-1]),
    Operation(0.7, "tuple turned", "t", "t", "{a}[::-1]", lambda a, b, c: a[::-1]),
    Operation(1.0, "keys", "d", "l", "list({a}.values())", lambda a, b, c: list(a.values())),
    Operation(1.0, "largest value", "d", "i", "max({a}.values())", lambda a, b, c: max(a.values())),
]


class Loop(NamedTuple):
    """A loop with state {q} over {v}; {a} is the operand, {b} a second one, {c} the constant.

    `start` gives the first state and `over` what v runs over (None: while `holds`), each from (a, b, c);
    `step` the next state from (q, v, a, b, c).
    """

    weight: float
    words: str
    takes: str
    gives: str
    first: str
    head: str
    body: str
    start: Callable[..., Any]
    over: Callable[..., Any] | None
    step: Callable[..., Any]
    constant: str = ""
    holds: Callable[..., bool] | None = None  # (q, b, c)


LOOPS = [
    Loop(
        1.5,
        "all added to number",
        "li",
        "i",
        "{b}",
        "for v in {a}:",
        "{q}+{v}",
        lambda a, b, c: b,
        lambda a, b, c: a,
        lambda q, v, a, b, c: q + v,
    ),
    Loop(
        1.0,
        "all added times {c}",
        "l",
        "i",
        "0",
        "for v in {a}:",
        "{q}+{v}*{c}",
        lambda a, b, c: 0,
        lambda a, b, c: a,
        lambda q, v, a, b, c: q + v * c,
        "factor",
    ),
    Loop(
        1.0,
        "distance from each",
        "li",
        "i",
        "{b}",
        "for v in {a}:",
        "abs({q}-{v})",
        lambda a, b, c: b,
        lambda a, b, c: a,
        lambda q, v, a, b, c: abs(q - v),
    ),
    Loop(
        1.5,
        "number added in turns of {c}",
        "ii",
        "i",
        "{a}",
        "for v in range({c}):",
        "{q}+{b}",
        lambda a, b, c: a,
        lambda a, b, c: range(c),
        lambda q, v, a, b, c: q + b,
        "turns",
    ),
    Loop(
        1.0,
        "turn added in turns of {c}",
        "i",
        "i",
        "{a}",
        "for v in range({c}):",
        "{q}+{v}",
        lambda a, b, c: a,
        lambda a, b, c: range(c),
        lambda q, v, a, b, c: q + v,
        "turns",
    ),
    Loop(
        0.8,
        "doubled in turns of {c}",
        "i",
        "i",
        "{a}",
        "for v in range({c}):",
        "{q}*2",
        lambda a, b, c: a,
        lambda a, b, c: range(c),
        lambda q, v, a, b, c: q * 2,
        "turns",
    ),
    Loop(
        1.0,
        "doubled less number in turns of {c}",
        "ii",
        "i",
        "{a}",
        "for v in range({c}):",
        "{q}*2-{b}",
        lambda a, b, c: a,
        lambda a, b, c: range(c),
        lambda q, v, a, b, c: q * 2 - b,
        "turns",
    ),
    Loop(
        1.2,
        "lowered by {c} while over",
        "i",
        "i",
        "{a}",
        "while {q}>{c}:",
        "{q}-{c}",
        lambda a, b, c: a,
        None,
        lambda q, v, a, b, c: q - c,
        "large",
        lambda q, b, c: q > c,
    ),
    Loop(
        1.0,
        "raised by number up to {c}",
        "ii",
        "i",
        "{a}",
        "while {q}<{c}:",
        "{q}+{b}",
        lambda a, b, c: a,
        None,
        lambda q, v, a, b, c: q + b,
        "goal",
        lambda q, b, c: q < c,
    ),
    Loop(
        1.0,
        "list of number and turn",
        "i",
        "l",
        "[]",
        "for v in range({c}):",
        "{q}+[{a}+{v}]",
        lambda a, b, c: [],
        lambda a, b, c: range(c),
        lambda q, v, a, b, c: q + [a + v],
        "turns",
    ),
    Loop(
        1.2,
        "running totals",
        "l",
        "l",
        "[0]",
        "for v in {a}:",
        "{q}+[{q}[-1]+{v}]",
        lambda a, b, c: [0],
        lambda a, b, c: a,
        lambda q, v, a, b, c: q + [q[-1] + v],
    ),
    Loop(
        1.0,
        "each put before {c}",
        "l",
        "l",
        "[{c}]",
        "for v in {a}:",
        "[{v}]+{q}",
        lambda a, b, c: [c],
        lambda a, b, c: a,
        lambda q, v, a, b, c: [v] + q,
        "small",
    ),
    Loop(
        1.0,
        "each letter before",
        "s",
        "s",
        "''",
        "for v in {a}:",
        "{v}+{q}",
        lambda a, b, c: "",
        lambda a, b, c: a,
        lambda q, v, a, b, c: v + q,
    ),
    Loop(
        1.0,
        "each letter with {c}",
        "s",
        "s",
        "''",
        "for v in {a}:",
        "{q}+{v}+{c}",
        lambda a, b, c: "",
        lambda a, b, c: a,
        lambda q, v, a, b, c: q + v + c,
        "letter",
    ),
    Loop(
        0.8,
        "two more for each letter",
        "si",
        "i",
        "{b}",
        "for v in {a}:",
        "{q}+2",
        lambda a, b, c: b,
        lambda a, b, c: a,
        lambda q, v, a, b, c: q + 2,
    ),
]
MAX_TURNS = 4


class Test(NamedTuple):
    """The condition of a choice."""

    takes: str
    words: str
    text: str
    holds: Callable[..., bool]
    constant: str = ""


TESTS = [
    Test("i", "over {c}", "{a}>{c}", lambda a, b, c: a > c, "large"),
    Test("i", "even", "{a}%2==0", lambda a, b, c: a % 2 == 0),
    Test("ii", "over the other", "{a}>{b}", lambda a, b, c: a > b),
    Test("l", "longer than {c}", "len({a})>{c}", lambda a, b, c: len(a) > c, "cut"),
    Test("s", "longer than {c}", "len({a})>{c}", lambda a, b, c: len(a) > c, "cut"),
]


def constant(kind: str, top: int, rng: random.Random):
    """A value for {c}; `top` is the stage's largest int."""
    if kind == "large":
        return rng.randint(1, 9) if top < 10 or rng.random() < 0.6 else rng.randint(10, 40)
    return {
        "small": lambda: rng.randint(1, 9),
        "factor": lambda: rng.randint(2, 4),
        "cut": lambda: rng.randint(1, 3),
        "turns": lambda: rng.randint(2, 3),
        "goal": lambda: rng.randint(5, 9) * (1 if top < 10 else 5),
        "letter": lambda: rng.choice(LETTERS),
        "": lambda: None,
    }[kind]()


def kind_of(entry: Any) -> str:
    """What makes two statements the same operation: the text of the table, whatever names and constants it has."""
    return entry.head + entry.body if isinstance(entry, Loop) else entry.text

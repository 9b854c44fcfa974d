"""Files as `python -m azr.tasks make tiny` makes them, of programs whose statements the embedded model never saw.

    python results/other_operations.py make tiny others.jsonl --count 3000 --solutions     what azr.tasks takes

Bits, digits, slices in steps, sets, other methods of texts. The shape of programs, the notation of traces and the
share of each style of thought are those of azr/tiny: SFT on it is SFT on other operations, and nothing else is new.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from azr.tasks.__main__ import main
from azr.tiny import operations
from azr.tiny.operations import Loop, Operation, Test

OPERATIONS = [
    Operation(1.5, "bits not shared with {c}", "i", "i", "{a}^{c}", lambda a, b, c: a ^ c, "large"),
    Operation(1.5, "bits of either or {c}", "i", "i", "{a}|{c}", lambda a, b, c: a | c, "small"),
    Operation(1.5, "bits shared with {c}", "i", "i", "{a}&{c}", lambda a, b, c: a & c, "large"),
    Operation(1.0, "bits to the left", "i", "i", "{a}<<1", lambda a, b, c: a << 1),
    Operation(1.0, "bits to the right", "i", "i", "{a}>>1", lambda a, b, c: a >> 1),
    Operation(1.0, "square", "i", "i", "pow({a}, 2)", lambda a, b, c: pow(a, 2)),
    Operation(0.8, "to the nearest ten", "i", "i", "round({a}, -1)", lambda a, b, c: round(a, -1)),
    Operation(0.8, "digits turned", "i", "i", "int(str({a})[::-1])", lambda a, b, c: int(str(a)[::-1])),
    Operation(0.5, "bits as text", "i", "s", "bin({a})[2:]", lambda a, b, c: bin(a)[2:]),
    Operation(0.8, "counted down", "i", "l", "[*range({a}, 0, -{c})]", lambda a, b, c: [*range(a, 0, -c)], "small"),
    Operation(2.5, "bits not shared by two", "ii", "i", "{a}^{b}", lambda a, b, c: a ^ b),
    Operation(2.5, "bits of either of two", "ii", "i", "{a}|{b}", lambda a, b, c: a | b),
    Operation(2.0, "bits shared by two", "ii", "i", "{a}&{b}", lambda a, b, c: a & b),
    Operation(1.0, "quotient and rest", "ii", "t", "divmod({a}, {b})", lambda a, b, c: divmod(a, b)),
    Operation(1.5, "three of two", "ii", "l", "[{a}, {b}, {a}]", lambda a, b, c: [a, b, a]),
    Operation(1.2, "every other summed", "l", "i", "sum({a}[::2])", lambda a, b, c: sum(a[::2])),
    Operation(1.2, "different ones", "l", "i", "len(set({a}))", lambda a, b, c: len(set(a))),
    Operation(1.2, "width", "l", "i", "max({a})-min({a})", lambda a, b, c: max(a) - min(a)),
    Operation(1.2, "place of the largest", "l", "i", "{a}.index(max({a}))", lambda a, b, c: a.index(max(a))),
    Operation(1.5, "one of each", "l", "l", "sorted(set({a}))", lambda a, b, c: sorted(set(a))),
    Operation(1.5, "falling", "l", "l", "sorted({a}, reverse=True)", lambda a, b, c: sorted(a, reverse=True)),
    Operation(1.2, "first put last", "l", "l", "{a}[1:]+{a}[:1]", lambda a, b, c: a[1:] + a[:1]),
    Operation(1.0, "every other", "l", "l", "{a}[::2]", lambda a, b, c: a[::2]),
    Operation(1.0, "bits and {c} each", "l", "l", "[v^{c} for v in {a}]", lambda a, b, c: [v ^ c for v in a], "small"),
    Operation(1.2, "bits and number each", "li", "l", "[v|{b} for v in {a}]", lambda a, b, c: [v | b for v in a]),
    Operation(1.2, "from the end", "li", "i", "{a}[~{b}%len({a})]", lambda a, b, c: a[~b % len(a)]),
    Operation(1.5, "in both", "ll", "l", "[v for v in {a} if v in {b}]", lambda a, b, c: [v for v in a if v in b]),
    Operation(1.0, "different letters", "s", "i", "len(set({a}))", lambda a, b, c: len(set(a))),
    Operation(1.2, "as a title", "s", "s", "{a}.title()", lambda a, b, c: a.title()),
    Operation(1.2, "case turned", "s", "s", "{a}.swapcase()", lambda a, b, c: a.swapcase()),
    Operation(1.2, "{c} made z", "s", "s", "{a}.replace({c}, 'z')", lambda a, b, c: a.replace(c, "z"), "letter"),
    Operation(1.0, "first put last", "s", "s", "{a}[1:]+{a}[:1]", lambda a, b, c: a[1:] + a[:1]),
    Operation(1.0, "every other", "s", "s", "{a}[::2]", lambda a, b, c: a[::2]),
    Operation(1.0, "ends without", "ss", "s", "{a}.strip({b})", lambda a, b, c: a.strip(b)),
    Operation(1.0, "filled on the left", "si", "s", "{a}.rjust({b}, 'z')", lambda a, b, c: a.rjust(b, "z")),
    Operation(1.0, "zeros of the tuple", "t", "i", "{a}.count(0)", lambda a, b, c: a.count(0)),
    Operation(1.0, "tuple and {c}", "t", "t", "{a}+({c},)", lambda a, b, c: (*a, c), "small"),
]
HEAD, TURNS = "for v in {a}:", "for v in range({c}):"
LOOPS = [
    Loop(
        1.5,
        "bits of all not shared",
        "li",
        "i",
        "{b}",
        HEAD,
        "{q}^{v}",
        lambda a, b, c: b,
        lambda a, b, c: a,
        lambda q, v, a, b, c: q ^ v,
    ),
    Loop(
        1.5,
        "bits of all",
        "l",
        "i",
        "0",
        HEAD,
        "{q}|{v}",
        lambda a, b, c: 0,
        lambda a, b, c: a,
        lambda q, v, a, b, c: q | v,
    ),
    Loop(
        1.5,
        "bits not shared with turns of {c}",
        "i",
        "i",
        "{a}",
        TURNS,
        "{q}^{v}",
        lambda a, b, c: a,
        lambda a, b, c: range(c),
        lambda q, v, a, b, c: q ^ v,
        "turns",
    ),
    Loop(
        1.0,
        "bits of number in turns of {c}",
        "ii",
        "i",
        "{a}",
        TURNS,
        "({q}<<1)^{b}",
        lambda a, b, c: a,
        lambda a, b, c: range(c),
        lambda q, v, a, b, c: (q << 1) ^ b,
        "turns",
    ),
    Loop(
        1.2,
        "each with bits of {c}",
        "l",
        "l",
        "[]",
        HEAD,
        "{q}+[{v}^{c}]",
        lambda a, b, c: [],
        lambda a, b, c: a,
        lambda q, v, a, b, c: [*q, v ^ c],
        "small",
    ),
    Loop(
        1.0,
        "each letter turned",
        "s",
        "s",
        "''",
        HEAD,
        "{q}+{v}.swapcase()",
        lambda a, b, c: "",
        lambda a, b, c: a,
        lambda q, v, a, b, c: q + v.swapcase(),
    ),
]
TESTS = [
    Test("i", "odd", "{a}&1==1", lambda a, b, c: a & 1 == 1),
    Test("i", "bits of {c} over it", "{a}^{c}>{c}", lambda a, b, c: a ^ c > c, "large"),
    Test("ii", "below the other", "{a}<{b}", lambda a, b, c: a < b),
    Test("l", "rising at the ends", "{a}[0]<{a}[-1]", lambda a, b, c: a[0] < a[-1]),
    Test("s", "with {c}", "{c} in {a}", lambda a, b, c: c in a, "letter"),
]


if __name__ == "__main__":
    for theirs, mine in zip((operations.OPERATIONS, operations.LOOPS, operations.TESTS), (OPERATIONS, LOOPS, TESTS)):
        theirs[:] = mine  # programs.py draws from these lists
    sys.exit(main())

"""The literal reader and writer: examples, random and mutated texts against ast.literal_eval, properties.

30,000 texts; SANDBOX_LONG=1 takes 100,000.
"""

import ast
import math
import os
import random
import re
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import literal
from sandbox.literal import Limits, LiteralError, NotLiteral, TooLarge, canon, equal, parse, parse_args
from tests.timing import cpu_seconds

LONG = bool(os.environ.get("SANDBOX_LONG"))

WIDE = Limits(1_000_000, 200_000, depth=100, int_bits=100_000, complex_numbers=True, published=True)

# --- examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "None"),
        (True, "True"),
        (-5, "-5"),
        (0.1 + 0.2, "0.30000000000000004"),
        (-0.0, "-0.0"),
        ("it's", '"it\'s"'),
        (b"\x00a", "b'\\x00a'"),
        ([], "[]"),
        ((), "()"),
        ((1,), "(1,)"),
        ([1, (2, 3)], "[1, (2, 3)]"),
        (set(), "set()"),
        ({30, 4, 5}, "{4, 5, 30}"),
        (frozenset(), "frozenset()"),
        (frozenset({2, 1}), "frozenset({1, 2})"),
        ({"b": 1, "a": [None]}, "{'b': 1, 'a': [None]}"),
        (float("inf"), "float('inf')"),
        (-math.inf, "float('-inf')"),
        (float("nan"), "float('nan')"),
        ("\ud800", "'\\ud800'"),
        (Counter("aab"), "{'a': 2, 'b': 1}"),
        (OrderedDict(x=1), "{'x': 1}"),
        (defaultdict(int, {1: 2}), "{1: 2}"),
    ],
)
def test_canonical_text(value, text):
    assert canon(value) == text
    assert canon(parse(text)) == text


class Always(int):
    """An int that equals everything."""

    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value",
    [
        ...,
        1j,
        range(3),
        iter([]),
        (x for x in ()),
        bytearray(b"a"),
        Always(1),
        [Always(1)],
        {1: Always(2)},
        object(),
        int,
        {}.keys(),
        type("S", (str,), {})("a"),
        type("L", (list,), {})(),
        math,
    ],
)
def test_other_types_are_refused(value):
    with pytest.raises(NotLiteral):
        canon(value)


def cyclic():
    """A list that holds itself."""
    value = []
    value.append(value)
    return value


def shared():
    """A list that would be 2 ** 60 values written out."""
    value = [1]
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "a" * 20_000,
        b"a" * 20_000,
        1 << 5000,
        list(range(5000)),
        cyclic(),
        shared(),
        ["x" * 9000, "y" * 9000],
        {i: i for i in range(4000)},
    ],
)
def test_too_large_values_are_refused(value):
    with pytest.raises(TooLarge):
        canon(value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 30 + "]" * 30,
        "(" * 5000 + "1" + ")" * 5000,
        "-" * 16_000 + "1",
        "9**9**9",
        "9" * 2000,
        "0x" + "f" * 1100,
        "[" + "1, " * 5000 + "]",
        "'" + "a" * 20_000 + "'",
        "[" * 16_000,
        "{" * 16_000,
        "'" * 16_001,
        "\\" * 10_000,
        "1e" * 8000,
        "((((" * 4000,
        "frozenset(" * 1600,
        "frozenset(" * 800 + ")" * 800,
        "frozenset((" * 700,
        "'\\" * 8000,
        "#" * 16_385,
    ],
)
def test_bombs_are_refused_at_once(text):
    with pytest.raises(LiteralError):
        parse(text)
    with pytest.raises(LiteralError):
        parse_args(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1 2",
        "1,,2",
        "[1",
        "1]",
        "{1: }",
        "{1, 2: 3}",
        "{[]}",
        "{{}: 1}",
        "{[1]: 2}",
        "01",
        "0x",
        "1_",
        "1__0",
        "1if 1 else 2",
        "'a",
        "'''a'",
        "'a\nb'",
        "b'\xe9'",
        "'a' b'b'",
        "f'a'",
        "rb'a' 'b'",
        "'\\x4'",
        "'\\u12'",
        "'\\N{no such name}'",
        "'\\U00110000'",
        "True.real",
        "x",
        "None()",
        "range(5)",
        "f(5)",
        "lambda: 1",
        "[x for x in []]",
        "1 + 2",
        "2 * 3",
        "1 + 2j",
        "not 1",
        "-True",
        "--1",
        "-'a'",
        "*[1]",
        "**{}",
        "...",
        "1 if 1 else 2",
        "__import__('os')",
        "float('1')",
        "float(1)",
        "set(1)",
        "frozenset('ab')",
        "1) or (True",
        "[1](0)",
        "'a'.upper()",
        "1;2",
        "a=1",
        "\0",
        "'\0'",
        "'\ud800'",
        "$",
        "1\\ 2",
    ],
)
def test_texts_that_are_no_literals(text):
    with pytest.raises(LiteralError):
        parse(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("5 # five", 5),
        ("# five\n5", 5),
        ("1, 2", (1, 2)),
        ("1,", (1,)),
        ("[1, 2,]", [1, 2]),
        ("(1)", 1),
        ("-(1)", -1),
        ("'a' \"b\"", "ab"),
        ("'''a\r\nb'''", "a\nb"),
        (r"r'\d'", "\\d"),
        (r"'\x41\101\u0042\N{BULLET}\q'", "AAB\u2022\\q"),
        (r"b'\x41\u0042\777'", b"A\\u0042\xff"),
        ("'a\\\nb'", "ab"),
        ("0x_ff", 255),
        ("1_0.5e-1", 1.05),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e400", math.inf),
        ("{1: 2, 1: 3}", {1: 3}),
        ("'\u00e9'", "\u00e9"),
        ("(\n1,\n)", (1,)),
        ("set([1])", {1}),
        ("frozenset((1,))", frozenset({1})),
        ("float('-inf')", -math.inf),
    ],
)
def test_readings(text, value):
    assert parse(text) == value and type(parse(text)) is type(value)


@pytest.mark.parametrize(
    "text, args, kwargs",
    [
        ("", (), {}),
        ("1", (1,), {}),
        ("1, 'a', k=[2], ", (1, "a"), {"k": [2]}),
        ("dict(a=1), 'u'", ({"a": 1}, "u"), {}),
        ("''.join(['A'] * 3)", ("AAA",), {}),
        ("'a-b'.upper().split('-'), n=1", (["A", "B"],), {"n": 1}),
        ("'a' + 'b' * 2", ("abb",), {}),
        ("[[0]] * 2 + [[1]]", ([[0], [0], [1]],), {}),
        ("caf\u00e9=1", (), {"caf\u00e9": 1}),
    ],
)
def test_arguments(text, args, kwargs):
    assert parse_args(text) == (args, kwargs)


@pytest.mark.parametrize(
    "text",
    [
        "k=1, 2",
        "k=1, k=2",
        "None=1",
        "if=2",
        "*[1]",
        "**{}",
        "1 2",
        ")",
        "1)(2",
        "x for x in []",
        "1 + 2",
        "[0] * 10 ** 9",
        "[0] * 100000",
        "'a' * 100000 * 100000",
        "''.join(['a' * 16000] * 4000)",
        "'a'.format(1)",
        "'a'.__class__",
        "'%s' % 1",
        "[1].pop()",
        "'a'.split('')",
        "(lambda x: x)(1)",
        "dict(1)",
        "dict(a=1, a=2)",
        "dict([(1, 2)])",
        "range(5)",
        "open('x')",
    ],
)
def test_arguments_that_are_refused(text):
    with pytest.raises(LiteralError):
        parse_args(text)


def test_what_json_reads_means_the_same(monkeypatch):
    pieces = "' 'a' é 'é' , [ ] { } : - + 1 0 .5 2. e3 'e 1e5 ,1 ]] [1,2] {'a':1} \\ \" \n True NaN".split(" ")
    rng, texts = (
        random.Random(5),
        ["[1, ]", "'a''b'", "'''a'''", "{'a': 1, 'a': 2}", "-0.0", "1], [2", "'\t'", "", "'\ud800'"],
    )
    texts += ["".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9))) for _ in range(30_000)]
    # Pairs that come twice are too many for Reader, and the dict that they make is within the limit.
    texts += ["{" + "'a':1," * 2_500 + "'b':2}", "[" * 30 + "]" * 30, "[" + "1," * 4_100 + "1]", "1" * 4_400]
    quick = [(reading(parse, text), reading(parse_args, text)) for text in texts]
    monkeypatch.setattr(literal, "_may_be_json", lambda text, limits: False)
    for text, (value, arguments) in zip(texts, quick):
        assert repr(reading(parse, text)) == repr(value) and repr(reading(parse_args, text)) == repr(arguments), text
    assert sum(good for (good, _), _ in quick) > 1_500


def test_large_integers_are_hexadecimal():
    value = [-(1 << 50_000), 1 << 4095]
    assert parse(canon(value, WIDE), WIDE) == value and canon(value, WIDE).startswith("[-0x1000")


def test_benchmark_values():
    assert canon([1 - 2j, re.match("a", "ab")], WIDE) == "[complex(1.0, -2.0), True]"
    assert parse("[complex(1.0, -2.0), 1-2j, (3)+(4j), -0-1j]", WIDE) == [1 - 2j, 1 - 2j, 3 + 4j, -1j]
    for text in ("1+2", "1j+2j", "1+-2j", "complex('1')"):
        with pytest.raises(LiteralError):
            parse(text, WIDE)


def test_colliding_keys_are_refused():
    step = sys_hash_modulus()
    text = "{" + ", ".join(str(i * step) for i in range(3_000)) + "}"
    with pytest.raises(TooLarge, match="collide"):
        parse(text, WIDE)
    assert len(parse("{" + ", ".join(map(str, range(3_000))) + "}", WIDE)) == 3_000


def test_reading_takes_linear_time():
    shared = 2**61 - 1  # all multiples have the hash 0
    halves = [*range(30_000), *(n * shared for n in range(20_000))]
    tuples = ["(" + ", ".join(f"-{1 + (n >> bit & 1)}" for bit in range(14)) + ")" for n in range(3_000)]
    long = (f"'{'ß' * 8000}'" + ".title()" * 900, "'a' * 16000" + " + ''" * 2000, "[0] * 4000" + " + []" * 2000)

    def read():
        for items in (map(str, halves), tuples):
            with pytest.raises(TooLarge, match="collide"):
                parse("{" + ", ".join(items) + "}", WIDE)
        for text in long:
            with pytest.raises(TooLarge, match="operations"):
                parse_args(text)

    assert cpu_seconds(read, 5) < 5


def test_what_a_published_grader_takes_for_a_plain_value():
    class Point(namedtuple("Point", "x y")):
        pass

    class Liar(int):
        def __eq__(self, other):
            return True

    values = [Point(1, 2), Fraction(4, 2), Fraction(1, 2), Decimal("0.25"), re.match("a", "a"), Decimal(-(10**40))]
    assert canon(values, WIDE) == f"[(1, 2), 2, 0.5, 0.25, True, -1{'0' * 40}]"
    for value in (Liar(3), Fraction(1, 3), Decimal("0.1"), Decimal("nan"), Decimal("inf"), iter(())):
        with pytest.raises(NotLiteral):
            canon(value, WIDE)
    with pytest.raises(NotLiteral):
        canon(Point(1, 2))


def sys_hash_modulus():
    """The prime of which hashes of numbers are remainders."""
    import sys

    return sys.hash_info.modulus


# --- against ast.literal_eval --------------------------------------------------------------------------------

ALPHABET = [
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    ",",
    ":",
    "'",
    '"',
    "'''",
    "\\",
    "\n",
    " ",
    "\t",
    "#",
    "0",
    "1",
    "9",
    "_",
    ".",
    "e",
    "E",
    "x",
    "j",
    "-",
    "+",
    "True",
    "None",
    "b",
    "r",
    "u",
    "f",
    "N",
    "set()",
    "...",
    "a",
    "\u00e9",
    "\\x41",
    "\\u00e9",
    "\\N{DASH}",
    "*",
    "=",
    "\r",
    "float('nan')",
    "frozenset(",
    "0x1f",
    "1e5",
    "\f",
]
NAMES = {"__builtins__": {}, "float": float, "set": set, "frozenset": frozenset, "dict": dict}


def random_value(rng, depth=0):
    """A value of any kind, nested up to five deep."""
    kind = rng.randrange(12 if depth < 4 else 6)
    if kind < 6:
        return rng.choice(
            [
                None,
                True,
                rng.randrange(-1000, 1000),
                rng.getrandbits(200),
                rng.gauss(0, 1e6),
                "\u00e9'\"\\\n\x00z"[rng.randrange(8) :],
                bytes([rng.randrange(256)]),
                1e300 * rng.choice([1, 1e300]),
                "text",
                float("nan"),
            ]
        )
    items = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    hashable = [item for item in items if not literal.has_set(item) and type(item) not in (list, dict, tuple)]
    return [list(items), tuple(items), set(hashable), frozenset(hashable), {key: items for key in hashable}, items][
        kind - 6
    ]


def random_text(rng):
    """The text of a value with a few changes, or letters without sense."""
    kind = rng.randrange(10)
    if kind < 3:
        return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 12)))
    text = canon(random_value(rng))
    for _ in range(rng.randrange(0, 4) if kind < 9 else 0):
        place = rng.randrange(len(text) + 1)
        change = rng.randrange(4)
        if change == 0:
            text = text[:place] + text[place + rng.randrange(1, 3) :]
        elif change == 1:
            text = text[:place] + rng.choice(ALPHABET) + text[place:]
        elif change == 2:
            other = rng.randrange(len(text) + 1)
            text = text[:place] + text[min(place, other) : max(place, other)] + text[place:]
        else:
            text = text[:place] + rng.choice(ALPHABET) + text[place + 1 :]
    return text


def reading(reader, *arguments):
    """(whether it can be read, the value)."""
    try:
        return True, reader(*arguments)
    except (LiteralError, SyntaxError, ValueError, TypeError, MemoryError, RecursionError, NameError, AttributeError):
        return False, None


@pytest.mark.filterwarnings("ignore")
def test_fuzz_against_literal_eval():
    rng, accepted = random.Random(20_240), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(100_000 if LONG else 30_000):
            text = random_text(rng)
            good, value = reading(parse, text)
            theirs_good, theirs = reading(ast.literal_eval, text)
            if theirs_good and not good:  # only for a value that we do not have
                assert not reading(canon, theirs)[0] or len(text) > 16_000, text
            if good:
                accepted += 1
                if not theirs_good:  # our few names, and line ends as between parentheses
                    theirs = eval(f"({text}\n)", NAMES)
                assert canon(value) == canon(theirs), text
                assert canon(parse(canon(value))) == canon(value), text
    assert accepted > 1_500


@pytest.mark.filterwarnings("ignore")
def test_fuzz_of_arguments():
    rng, accepted = random.Random(7), 0
    for _ in range(20_000 if LONG else 5_000):
        parts = [rng.choice(["", "", "k=", "x = ", "k=", "*"]) + random_text(rng)[:60] for _ in range(rng.randrange(3))]
        text = rng.choice([", ", ",", " ", ", ,"]).join(parts)
        good, value = reading(parse_args, text)
        if good:
            accepted += 1
            args, kwargs = eval(f"call({text}\n)", NAMES | {"call": lambda *args, **kwargs: (args, kwargs)})
            assert literal.canon_args(*value) == literal.canon_args(args, kwargs), text
    assert accepted > 500


# --- properties ----------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
keys = st.recursive(scalars, lambda part: st.tuples(part, part) | st.frozensets(part, max_size=3), max_leaves=5)
values = st.recursive(
    scalars,
    lambda part: (
        st.lists(part, max_size=4)
        | st.tuples(part, part)
        | st.sets(keys, max_size=4)
        | st.dictionaries(keys, part, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=1_000 if LONG else 60, deadline=None, derandomize=True)
@given(values)
def test_round_trip(value):
    text = canon(value)
    again = parse(text)
    assert canon(again) == text and equal(again, value, rel=0)


@settings(max_examples=1_000 if LONG else 40, deadline=None, derandomize=True)
@given(values, values)
def test_equality_is_symmetric_and_contains_that_of_python(a, b):
    assert equal(a, a) and equal(a, b) == equal(b, a)
    if a == b:
        assert equal(a, b)


@settings(max_examples=1_000 if LONG else 100, deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_any_text_is_a_value_or_a_literal_error(text):
    for reader in (parse, parse_args):
        try:
            reader(text)
        except LiteralError:
            pass

"""What a proposer is not paid for: what exists already in another spelling, what is trivial, what its message tells."""

import base64
import codecs
import urllib.parse

import pytest

from azr.tasks import Buffers, Proposal, Task, validate
from azr.tasks.behaviour import PROBES, fresh_inputs, observe
from azr.tasks.buffers import PER_PROGRAM
from azr.tasks.program import bare, read_program
from sandbox import Sandbox, literal

LENGTH = "def f(x):\n    return len(x) * 3 + 1"
REWRITTEN = [
    "def f(x):\n    return (len(x) * 3) + 1",
    "def f(x):\n    return len(x) * 0x3 + 1",
    "def f(x):\n    unread = 3\n    return len(x) * 3 + 1",
    "def f(x, y=1):\n    return len(x) * 3 + 1",
    "def f(x):\n    ...\n    return len(x) * 3 + 1",
    "def f(x):\n    assert True\n    return 1 + len(x) * 3",
    "def f(x):\n    if False:\n        return 2\n    return 3 * len(x) + 1",
    "def f(x):\n    return ｌｅｎ(x) * 3 + 1",
    "def f(x):\n    return len(x) + len(x) + len(x) + 1",
    "import math\ndef f(x):\n    return len(x) * 3 + 1",
    "def g(x):\n    return len(x) * 3\ndef f(x):\n    return g(x) + 1",
    "def f(*x):\n    return len(x[0]) * 3 + 1",
]


@pytest.fixture(scope="module")
def sandbox():
    """One for all tests of this file."""
    with Sandbox(workers=2) as running:
        yield running


def reasons(proposals, sandbox, known=None):
    """The reason of each verdict."""
    return [verdict.reason for verdict in validate(proposals, sandbox, known=known)]


def test_a_rewritten_program_with_the_same_input_is_a_duplicate(sandbox):
    buffers = Buffers()
    [verdict] = validate([Proposal("deduction", LENGTH, ("'abc'",))], sandbox, known=buffers.keys())
    buffers.add(verdict.task, 1)
    for given in ("'abc'", "'\\x61bc'"):
        proposals = [Proposal("deduction", program, (given,)) for program in REWRITTEN]
        assert reasons(proposals, sandbox, buffers.keys()) == ["duplicate"] * len(REWRITTEN)
    other = [Proposal("abduction", LENGTH, ("'abc'",)), Proposal("deduction", LENGTH, ("'abcd'",))]
    assert reasons(other, sandbox, buffers.keys()) == ["ok", "ok"], "another mode or input is another task"
    assert reasons([Proposal("deduction", program, ("'z'",)) for program in REWRITTEN], sandbox, frozenset()) == [
        "ok",
        *["duplicate"] * (len(REWRITTEN) - 1),
    ], "the same goes for proposals of one batch"


def test_a_program_enters_with_few_inputs_however_it_is_written(sandbox):
    buffers = Buffers()
    for i in range(PER_PROGRAM + 4):
        given = Proposal("deduction", REWRITTEN[i % len(REWRITTEN)], (repr("a" * i),))
        [verdict] = validate([given], sandbox, known=buffers.keys())
        assert verdict.ok == (i < PER_PROGRAM), i
        if verdict.ok:
            buffers.add(verdict.task, i)


@pytest.mark.parametrize("given", ["3", "x=3"])
def test_trivial_by_what_it_does(given, sandbox):
    bodies = """return x + 0; return [x][0]; return x * 0; return x - 1 + 1; return sorted([x])[0]; return x ** 1
        return x if x > -1 else 0; return int(str(x)); return 7 if x == 3 else 0; return x // 1; return len([x])
        return bool(x); return (lambda y: y)(x); return max(x, 0); return x * 48 - x * 48""".replace("\n", ";").split(
        ";"
    )
    programs = [f"def f(x):\n    {body.strip()}" for body in bodies]
    proposals = [Proposal("deduction", program, (given,)) for program in programs]
    assert reasons(proposals, sandbox) == ["trivial"] * len(programs)


TABLES = [
    "return {1: 5, 2: 8}.get(x, 0)",
    "return {1: 5, 2: 8, 3: 7, 4: 1, 7: 6}.get(x, x)",
    "return {1: 5, 2: 8}[x]",
    "return dict([(1, 5), (2, 8)]).get(x, 'none')",
    "if x == 1:\n        return 5\n    elif x == 2:\n        return 8\n    return 0",
    "return 5 if x == 1 else 8 if x == 2 else 9 if x == 0x3 else -1",
    "return 5 * (x == 1) + 8 * (x == 2) + 4 * (x in (4, 6))",
    "for a, b in ((1, 5), (2, 8), (9, 3)):\n        if a == x:\n            return b\n    return 0",
    "try:\n        return {1: 5, 2: 8}[x]\n    except KeyError:\n        return 0",
    "match x:\n        case 1:\n            return 5\n        case 2:\n            return 8\n    return 0",
    "if x != 1 and x != 2:\n        raise ValueError\n    return x * 3 + 2",
]


@pytest.mark.parametrize("given", ["1", "x=2"])
def test_a_table_of_inputs_that_stand_in_the_program_is_trivial(given, sandbox):
    programs = [f"def f(x):\n    {body}" for body in TABLES]
    assert reasons([Proposal("deduction", p, (given,)) for p in programs], sandbox) == ["trivial"] * len(TABLES)


def test_tables_of_several_arguments_of_texts_and_of_induction_are_trivial(sandbox):
    table = {(1, 2): 5, (3, 4): 8, (2, 2): 1}
    sums = {x: x * x % 7 + x for x in range(1, 11)}
    proposals = [
        Proposal("deduction", f"def f(x, y):\n    return {table}.get((x, y), 0)", ("1, 2",)),
        Proposal("deduction", f"def f(xs):\n    return {table}.get(tuple(xs), 0)", ("[3, 4]",)),
        Proposal("abduction", "def f(s):\n    return {'abc': 1, 'x': 2, 'noon': 3}.get(s, 0)", ("'noon'",)),
        Proposal("abduction", "def f(s):\n    return {'abc': 1, 'x': 2, 'noon': 3}[s]", ("'x'",)),
        Proposal("induction", f"def f(x):\n    return {sums}.get(x, 0)", tuple(map(str, sums)), "m"),
        Proposal("induction", f"def f(x):\n    return {sums}[x]", tuple(map(str, sums)), "m"),
    ]
    assert reasons(proposals, sandbox) == ["trivial"] * len(proposals)


def test_a_program_that_decides_by_a_word_is_no_table(sandbox):
    honest = [
        (
            "def f(op, a, b):\n    if op == 'add':\n        return a + b\n    return a * b if op == 'mul' else 0",
            "'add', 2, 3",
        ),
        ("def f(op, xs):\n    if op == 'sum':\n        return sum(xs)\n    raise ValueError(op)", "'sum', [4, 5]"),
        ("def f(s):\n    return sum({'I': 1, 'V': 5, 'X': 10}.get(c, 0) for c in s)", "'XVI'"),
        ("def f(d):\n    return d['key'] * 2 + 1", "{'key': 4}"),
        ("def f(n):\n    return {0: 'Fizz', 1: 'one', 2: 'two'}[n % 3]", "2"),
        ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)", "1"),
        ("def f(c):\n    return c in 'aeiou'", "'a'"),
        ("def f(a, b):\n    return b if a == 3 else a", "3, 5"),
    ]
    given = [Proposal("deduction", program, (text,)) for program, text in honest]
    assert reasons(given, sandbox) == ["ok"] * len(given)


def test_what_few_inputs_pass_is_not_trivial(sandbox):
    honest = [
        ("def f(s):\n    return s == s[::-1]", "'level'"),
        ("def f(n):\n    return n % 7 == 0", "14"),
        ("def f(n):\n    return all(n % i for i in range(2, n))", "13"),
        ("def f(a, b):\n    return a == b", "4, 4"),
        ("def f(s):\n    return s.replace('needle', 'pin')", "'a needle here'"),
        ("def f(s):\n    return 'needle' in s", "'a needle here'"),
        ("def f(s):\n    return s.strip()", "' a '"),
        ("def f(xs):\n    return sorted(xs)", "[3, 1, 2]"),
        ("def f(x):\n    return round(x, 2)", "1.234"),
        ("def f(d):\n    return {v: k for k, v in d.items()}", "{'a': 1}"),
    ]
    assert reasons([Proposal("deduction", *[p, (given,)]) for p, given in honest], sandbox) == ["ok"] * len(honest)


def test_fresh_inputs_depend_on_types_alone_and_are_literals():
    for given in ("3", "'ab'", "[1, 2], {'a': 1}", "(1, 'b'), True", "None", "[]", "{1, 2}, 0.5", "b'x', [[1], [2]]"):
        inputs = fresh_inputs("def f(x, y=1):\n    return x", given)
        assert len(inputs) == PROBES and inputs == fresh_inputs("def f(a, b=2):\n    return b", given)
        types = [type(value) for value in literal.parse_args(given)[0]]
        for text in inputs:
            assert [type(value) for value in literal.parse_args(text)[0]] == types
    assert fresh_inputs("def f(x):\n    return x", "3") == fresh_inputs("def f(x):\n    return x", "77")
    assert fresh_inputs("def f(x):\n    return x", "x=3") == fresh_inputs("def f(x):\n    return x", "3")


def test_programs_that_do_not_run_on_other_inputs_are_told_apart_by_their_text(sandbox):
    picky = [Task("deduction", f"def f(d):\n    return d['key'] + {i}", "{'key': 1}", str(1 + i)) for i in (1, 2)]
    assert [behaviour.key for behaviour in observe(picky, sandbox)] == ["", ""]
    proposals = [Proposal("deduction", task.program, (task.input,)) for task in picky]
    assert reasons([*proposals, proposals[0]], sandbox, frozenset()) == ["ok", "ok", "duplicate"]


def test_chance_is_that_of_a_guess(sandbox):
    bit = "def f(x):\n    return x * 48271 * 16807 % 2147483647 >> 7 & 1"
    tasks = [
        Task("deduction", bit, "5", "1"),
        Task("abduction", bit, "5", "1"),
        Task("deduction", "def f(x):\n    return x * 31 + 7", "5", "162"),
        Task("abduction", "def f(x):\n    return x * 31 + 7", "999", "30976"),
    ]
    one, other, own, none = (behaviour.chance for behaviour in observe(tasks, sandbox))
    assert 0.5 <= one <= 0.8 and 0.2 <= other <= 0.8 and own <= 0.25 and none == 0
    [verdict] = validate([Proposal("deduction", bit, ("5",))], sandbox, known=None)
    assert verdict.task.chance == one


def test_loops_that_never_end_on_fresh_inputs_cost_little(sandbox):
    loops = "def f(x):\n    while x != 3:\n        pass\n    return [x]"
    [behaviour] = observe([Task("deduction", loops, "3", "[3]")], sandbox)
    assert behaviour.key == "" and not behaviour.trivial


# --- messages --------------------------------------------------------------------------------------------------------

POLYNOMIAL = "def f(x):\n    return x * x + 3 * x - 7"
INPUTS = tuple(map(str, (2, 5, 11, 3, 8, 20, 1, 9, 14, 6)))
OUTPUTS = [str(int(x) ** 2 + 3 * int(x) - 7) for x in INPUTS]
BYTES = POLYNOMIAL.encode()
TELLING = {
    "table": "; ".join(f"{x} -> {y}" for x, y in zip(INPUTS, OUTPUTS)),
    "json": str(dict(zip(INPUTS, OUTPUTS))),
    "outputs": "it gives " + ", ".join(OUTPUTS),
    "power": "give back x ** 2 + 3 * x - 7",
    "caret": "x^2+3x-7",
    "brackets": "(x * x) + ((3 * x)) - 7",
    "swapped": "3 * x + x * x - 7",
    "full width": "ｘ＊ｘ＋３＊ｘ－７",
    "zero width": "x\u200b * x + 3 * x\u200b - 7",
    "base64": base64.b64encode(POLYNOMIAL.encode()).decode(),
    "hexadecimal": POLYNOMIAL.encode().hex(),
    "html": "<b>x</b>&nbsp;* x + 3 &#42; x - 7",
    "other name": "for a number n return n*n + 3*n - 7",
    "equation": "y = x^2 + 3x - 7",
    "turned by 13 letters": codecs.encode(POLYNOMIAL, "rot13"),
    "backwards": POLYNOMIAL[::-1],
    "base32": base64.b32encode(BYTES).decode(),
    "base85": base64.b85encode(BYTES).decode(),
    "base64 in pieces": " ".join(base64.b64encode(BYTES).decode()[i : i + 8] for i in range(0, 60, 8)),
    "quoted as in addresses": urllib.parse.quote(POLYNOMIAL),
    "every byte quoted": "".join(f"%{byte:02X}" for byte in BYTES),
    "escapes of Unicode": "".join(f"\\u{byte:04x}" for byte in BYTES),
    "octal escapes": "".join(f"\\{byte:03o}" for byte in BYTES),
    "codes of characters": "spell it: " + ", ".join(map(str, BYTES)),
    "binary codes": " ".join(f"{byte:08b}" for byte in BYTES),
    "bytes apart": " ".join(f"{byte:02x}" for byte in BYTES),
    "superscript and a long minus": "x² + 3x − 7",
    "signs of multiplication": "3×x + x×x – 7",
    "LaTeX": r"$3 \cdot x + x^{2} - 7$",
    "JavaScript": "x => x ** 2 + 3 * x - 7",
    "functions of operators": "add(mul(x, x), sub(mul(3, x), 7))",
    "table of hexadecimal numbers": "; ".join(f"{int(x):#x} -> {int(y):#x}" for x, y in zip(INPUTS, OUTPUTS)),
    "table from right to left": "; ".join(f"{y} <- {x}" for x, y in zip(INPUTS, OUTPUTS)),
    "table with zeros before": "; ".join(f"{int(x):03d} -> {int(y):05d}" for x, y in zip(INPUTS, OUTPUTS)),
    "table of decimals": "; ".join(f"{x}.0 -> {y}.00" for x, y in zip(INPUTS, OUTPUTS)),
    "outputs backwards": "at the end " + ", ".join(OUTPUTS[::-1]),
}
HINTS = [
    "a quadratic in the number",
    "a polynomial of degree two; f(2) is 3",
    "",
    "square, then add three times the number; 7 less",
    "SEVEN_LETTER_NAMES_ARE_NO_CODE and averylongwordofmanylettersindeed",
    "numbers such as 65, 66, 67, 68, 69, 70, 71, 72 and 0x41 0x42 0x43 0x44 0x45 0x46 0x47 0x48 are large",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567 100 % of x is x; 50%25",
]


def test_messages_that_tell_the_program_or_the_pairs(sandbox):
    proposals = [Proposal("induction", POLYNOMIAL, INPUTS, text) for text in TELLING.values()]
    assert dict(zip(TELLING, reasons(proposals, sandbox))) == dict.fromkeys(TELLING, "message_has_code")
    hints = [Proposal("induction", POLYNOMIAL, INPUTS, text) for text in HINTS]
    assert reasons(hints, sandbox) == ["ok"] * len(HINTS)


def test_expressions_that_never_end_cost_little(sandbox):
    message = "x ** 9 ** 9 ** x, then sum(range(10 ** 9 + x)), but also len(range(9 ** 9)) * sum(range(x * 10 ** 10))"
    before = sandbox.state["children_cpu_seconds"]
    assert reasons([Proposal("induction", POLYNOMIAL, INPUTS, message)], sandbox) == ["ok"]
    assert sandbox.state["children_cpu_seconds"] - before < 1


def test_hidden_pairs_need_two_outputs(sandbox):
    program = "def f(x):\n    return max(0, 5 - x)"
    early = Proposal("induction", program, tuple(map(str, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))), "m")
    late = Proposal("induction", program, tuple(map(str, (6, 7, 8, 9, 10, 1, 2, 3, 4, 5))), "m")
    assert reasons([early, late], sandbox) == ["outputs_not_diverse", "ok"]


# --- comments --------------------------------------------------------------------------------------------------------


def test_a_task_shows_no_comments_and_docstrings(sandbox):
    program = 'def f(x):\n    """the output is 8"""\n\n    # it is 8\n    y = x * 2  # 8\n    return y + 2'
    [verdict] = validate([Proposal("deduction", program, ("3",))], sandbox, known=None)
    assert verdict.ok and verdict.task.program == "def f(x):\n    y = x * 2\n    return y + 2"


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("def f(x):\n\n    return x", "def f(x):\n\n    return x"),  # nothing to take away: as it is
        ("def f(x):\n    'only this'\n", "def f(x):\n    pass"),
        ("class A:\n    'd'\ndef f(x):\n    return A", "class A:\n    pass\ndef f(x):\n    return A"),
        (
            "def f(x):\n    y = '''a\n\n # b\n'''\n    return y  # c",
            "def f(x):\n    y = '''a\n\n # b\n'''\n    return y",
        ),
        (
            "def f(x):\n    if x:\n        # c\n        's'\n    return 2",
            "def f(x):\n    if x:\n        pass\n    return 2",
        ),
        ("'''m'''\nimport re\ndef f(s): return s # x", "import re\ndef f(s): return s"),
    ],
)
def test_bare(source, wanted):
    assert bare(source) == wanted and read_program(bare(source)).form == read_program(source).form

"""Programs that share a process: which may, that nothing gets from one to the next, and that a loop costs only itself.

tests/sandbox/attacks/ holds the attacks (sharing.txt is made for this); each stands between honest programs here.
"""

import builtins
import itertools
import json
import os
import random
import sys
import types
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")

from sandbox import BENCHMARK, Job, Sandbox, contained, gate, literal, outcomes, pool, wire, worker

ATTACKS = Path(__file__).parent / "attacks"
DATA = Path(__file__).parents[2].parent / "shared" / "data" / "benchmarks" / "cruxeval.jsonl"
LONG = bool(os.environ.get("SANDBOX_LONG"))
LOOP = "def f(x):\n    while True:\n        pass\n"
COUNT = "def f(x, seen=[]):\n    seen.append(x)\n    return [len(seen), sum(seen), sorted({'b', 'a', str(x)})]\n"


@pytest.fixture(scope="module")
def alone():
    """A sandbox with a process for every program."""
    with Sandbox(workers=1, share=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared():
    """A sandbox in which programs share processes."""
    with Sandbox(workers=1) as opened:
        yield opened


def may_share(code):
    """Whether the child lets the program into company."""
    return contained.contained(gate.compile_source(code))


def children(sandbox, jobs):
    """(outcomes, children that it took, their CPU seconds)."""
    before = sandbox.state
    found = sandbox.run(jobs)
    return (
        found,
        sandbox.state["children"] - before["children"],
        sandbox.state["children_cpu_seconds"] - before["children_cpu_seconds"],
    )


# --- which programs may --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        COUNT,
        LOOP,
        "import math\ndef f(x): return math.sqrt(x) + math.pi",
        "from collections import Counter, deque as d\nK = 3\ndef f(x):\n    return Counter(d(x)).most_common(K)",
        "from typing import List, Optional\ndef f(x: List[int], k: Optional[int] = None) -> list:\n"
        "    if k is not None and x is None: return []\n    return [i for i in x if i % 2 and not (i is True)]",
        "def f(x):\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n        yield n\n    return list(g())",
        "def f(a, *b, k=1, **c):\n    a[k:], (x, *y) = b, b\n    del a[0]\n    assert k, f'{a!r:>3}'\n"
        "    raise ValueError(x)",
        "from functools import lru_cache\n@lru_cache(None)\ndef g(n): return n if n < 2 else g(n - 1) + g(n - 2)\n"
        "def f(x): return g(x)",
        "def f(s): return ''.join(sorted(s, key=lambda c: (-s.count(c), c))).replace('a', 'b')",
    ],
)
def test_ordinary_programs_may(code):
    assert may_share(code) and contained.worth_trying(code)


@pytest.mark.parametrize(
    "code",
    [
        "import math\nmath.pi = 3",
        "import math\nmath.pi += 1",
        "import math\ndel math.pi",
        "import re",
        "import decimal",
        "from functools import wraps",
        "import functools\nfunctools.update_wrapper",
        "from operator import attrgetter",
        "import operator\noperator.setitem",
        "import collections.abc",
        "from math import floor as __len__",
        "class A: pass",
        "type('A', (), {})",
        "setattr",
        "getattr",
        "vars()",
        "print.x",
        "x = ().mro",
        "x.gi_frame",
        "'{0.a}'.format(1)",
        "'{0.a}'.format_map",
        "f = ().__class__",
        "__builtins__",
        "__x = 1",
        "__debug__\n__name__",
        "def f():\n global len\n len = 1",
        "def f():\n try: f()\n except ValueError: pass",
        "def f():\n try: return f()\n finally: return 1",
        "with x: pass",
        "async def f(): pass",
        "def f():\n yield from f()",
        "match 1:\n case [x]: pass",
        "x is 'a'",
        "x is y",
        "x is not 1",
        "def f(s, x): return s is ('a1' if x else None)",
        "[" + ", ".join(f"'c{i}'" for i in range(300)) + ", x is 'c299']",
        "raise MemoryError",
        "raise Exception",
        "object()",
        "x: int = 1",
        "sqrt = 1\nx.foo",
        "mro = 1\nlist.mro",
        "memoryview(b'')",
        "super()",
        "f.cache = {}",
        "append(1)\nx.unlisted",
        "import math as m\nm.unlisted",
        "from math import *\nsqrt(1)\nhypot2(1)",
        "import " + ", ".join(["math"] * 2) + "\n" + "\n".join(f"v{i} = 1" for i in range(61)),
    ],
)
def test_programs_that_might_reach_more_may_not(code):
    assert not may_share(code)


def test_what_is_listed_is_within_nobodys_power_to_change():
    """Every object that a listed name finds in a listed module is of an immutable kind, or a Python function or class,
    which only operations that are not listed can change; and no unlisted builtin is an attribute's name."""
    assert not contained.ATTRIBUTES & set(dir(builtins)) - contained.BUILTINS
    assert all(hasattr(builtins, name) and name not in gate.FORBIDDEN_BUILTINS for name in contained.BUILTINS)
    assert not [name for name in contained.ATTRIBUTES if name.startswith("_")]
    proxies = worker._proxies({name: worker._load(name) for name in contained.MODULES})
    written_in_python = set()
    for name, proxy in proxies.items():
        assert contained.MODULES[name] - set(vars(proxy)) <= {"pairwise"}
        for attribute in contained.ATTRIBUTES & set(vars(proxy)):
            found = getattr(proxy, attribute)
            if type(found) is types.FunctionType or type(found) is type and found.__flags__ & 1 << 9:  # heap types
                written_in_python.add(attribute)
            else:
                assert type(found) in (float, str, type, types.BuiltinFunctionType) or name == "typing", attribute
    assert "wraps" not in written_in_python and "nlargest" in written_in_python


def test_no_operation_that_stores_outside_is_listed():
    listed = set(contained._OPERATIONS.split())
    assert not [
        name
        for name in listed
        if any(
            word in name
            for word in (
                "STORE_ATTR",
                "DELETE_ATTR",
                "_GLOBAL_",
                "BUILD_CLASS",
                "IMPORT_STAR",
                "EXC",
                "WITH_EXCEPT",
                "BEFORE",
                "SETUP",
                "AWAIT",
                "ASYNC",
                "SEND",
                "MATCH",
                "LOCALS",
                "SUPER",
            )
        )
    ]


# --- what it saves, what it costs ----------------------------------------------------------------------------


def test_eight_programs_are_one_child(shared, alone):
    jobs = [Job(COUNT + f"k = {i}\n", ("1", "2")) for i in range(8)]
    found, count, _ = children(shared, jobs)
    assert count == 1 and found == alone.run(jobs)
    assert [outcome.output for outcome in found[7]] == ["[1, 1, ['1', 'a', 'b']]", "[2, 3, ['2', 'a', 'b']]"]
    assert children(alone, jobs)[1] == 8


def test_benchmark_programs_never_share():
    with Sandbox(workers=1, profile=BENCHMARK) as wide:
        assert children(wide, [Job(COUNT, ("1",))] * 4)[1] == 4


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_loop_costs_its_own_limit(shared, place):
    jobs = [Job(COUNT, ("1", "2"), 0.3)] * 8
    jobs[place] = Job(LOOP, ("1", "2"), 0.3, stop_at_failure=True)
    found, count, cpu = children(shared, jobs)
    assert [outcome.status for outcome in found.pop(place)] == ["timeout", "timeout"]
    assert {outcome.output for pair in found for outcome in pair[:1]} == {"[1, 1, ['1', 'a', 'b']]"}
    assert count == 8 - place and cpu < 0.3 + 0.1


def test_a_busy_program_is_not_held_against_the_next(shared):
    busy = "def f(x):\n    n = 0\n    for i in range(2_000_000): n += i\n    return x"  # about a tenth of a second
    found, count, _ = children(shared, [Job(busy, (str(i),), 0.3) for i in range(8)])
    assert [pair[0].output for pair in found] == [str(i) for i in range(8)]


def test_failures_of_programs_are_told_as_alone(shared, alone):
    bodies = [
        "return 1 // x",
        "return [0][x]",
        "return g(x)",
        "return x.foo()",
        "return f(x)",
        "return [0] * 10 ** 10",
        "return 'a' * 20_000",
        "return lambda: 0",
        "return (",
        "return open('x')",
        "assert x",
        "return next(iter([]))",
        "return 9 ** 5000",
        "return 2 ** 20_000",
        "raise KeyError",
        "return 'a' * 16_000",
        "return str(lambda: 0)[:9]",
    ]
    for stop in (True, False):
        jobs = [Job(f"def f(x): {body}", ("0", "1", "2"), stop_at_failure=stop) for body in bodies]
        jobs += [Job(code, ("0", "1")) for code in ("1 // 0", "def g(x): return 1", "", "x = undefined")]
        assert shared.run(jobs) == alone.run(jobs)


def test_many_answers_of_16_kb_are_no_flood(shared):
    jobs = [Job(f"def f(x): return '{i}' * 16_000", tuple(map(str, range(10)))) for i in range(4)]
    assert {outcome.status for pair in shared.run(jobs) for outcome in pair} == {"ok"}


# --- attacks among honest programs ---------------------------------------------------------------------------


def attacks(kind):
    """[(name, program)] of a kind of attacks."""
    parts = (ATTACKS / f"{kind}.txt").read_text().split("# --- ")[1:]
    return [(name.strip(), code) for name, _, code in (part.partition("\n") for part in parts)]


def test_attacks_on_neighbours_reach_nobody(shared, alone, monkeypatch):
    monkeypatch.setattr(pool, "worth_trying", lambda source: True)  # the child's own check decides
    probe = Job(
        "import math, heapq\nfrom collections import Counter\nfrom typing import List\n"
        + COUNT
        + "def g(x: List[int]):\n    return [math.sqrt(x), heapq.nlargest(1, [x]), len(str(x)), print(x),\n"
        "            Counter('aab').most_common(1)]\ndef f(x, f=f):\n    return [f(x), g(x)]\n",
        ("4", "9"),
    )
    [expected] = alone.run([probe])
    assert [outcome.status for outcome in expected] == ["ok", "ok"] and may_share(probe.code)
    probe = Job(probe.code, probe.inputs, 0.05)
    corpus = attacks("sharing")
    jobs = [Job(code, ("1", "2"), 0.05) for _, code in corpus]
    found = shared.run([job for attack in jobs for job in (attack, probe)] + [probe] * 2)
    assert [name for (name, _), outcomes_ in zip(corpus, found[1::2]) if outcomes_ != expected] == []
    assert found[-2:] == [expected] * 2
    by_place = ("order_by_address", "neighbours_source_by_format", "number_made_of_an_address", "memo_of_a_copy")
    by_place += ("functions_in_order_of_their_places",)
    for (name, _), shared_, alone_ in zip(corpus, found[::2], alone.run(jobs)):
        late = "timeout" in {outcome.status for outcome in shared_ + alone_}  # some need just about the limit
        assert late or shared_ == alone_ or name in by_place, name


def test_few_attacks_are_let_into_company():
    """By name, so that a change of the lists is seen: these only use up time or memory or keep values of their own."""
    let_in = {
        name
        for name, code in attacks("sharing")
        if contained.worth_trying(code) and _compiles(code) and may_share(code)
    }
    assert let_in == {
        "store_in_a_default",
        "len_of_its_own",
        "generator_left_running",
        "cache_filled",
        "nested_list_left",
        "recursion_left_in_generators",
        "memory_kept",
        "memory_kept_in_a_cycle",
        "memory_kept_by_an_iterator",
        "memory_kept_by_a_default",
        "memory_kept_by_a_generator",
        "memory_of_one_integer",
        "memory_in_small_pieces",
        "loop_inside_c",
        "time_used_up_just_short_of_the_limit",
        "loop_while_loading",
        "loop_beside_others",
        "compiler_kept_busy",
        "answer_for_the_neighbour",
        "guess_by_frame_of_text",
        "too_much_text_for_one_child",
        "order_by_address",
        "cache_of_typing_without_handlers",
        "number_made_of_an_address",
        "memo_of_a_copy",
        "functions_in_order_of_their_places",
        "forged_word_of_company",
    }


@pytest.mark.parametrize(
    "body",
    [
        "return int(str(f).split('0x')[1][:-1], 16) % 65536",
        "return int(f'{(i for i in [])}'[-10:-1], 16)",
        "return int(('%s' % [].append)[-9:-1], 16)",
        "return int(repr({1: [map(str, [])]})[-11:-3], 16)",
        "a, b = (lambda: 0), (lambda: 1)\n    return [g() for g in {a, b}]",
        "return [g(1) for g in frozenset((iter, lambda x: x)) if g is not None and g(()) == ()]",
        "return list({float('nan'), float('nan'), 0.5})[0] == 0.5",
        "memo = {}\n    deepcopy([[x]], memo)\n    return max([k for k in memo]) % 65536",
        "return len(str(zip))",
        "return sorted(map(str, [iter([]), 'a']))[0][-9:]",
    ],
)
def test_who_looks_at_an_address_is_run_alone(body, shared):
    code = f"from copy import deepcopy\ndef f(x):\n    {body}\n"
    assert contained.worth_trying(code) and may_share(code)
    alone_too = body == "return len(str(zip))"  # the text of a type has no address
    assert children(shared, [Job(code, ("1",)), Job(COUNT, ("1",)), Job(COUNT, ("2",))])[1] == 2 - alone_too


@pytest.mark.parametrize("place", ["1", "True", "1.0"])
def test_caches_of_typing_are_nobodys_business(place, shared, alone):
    jobs = [
        Job(f"from typing import Dict, List, Optional, Tuple, Union\ndef f(x): return str({kind}[{value}])", ("1",))
        for kind in ("List", "Optional", "Tuple", "Union")
        for value in (place, "1", "True", "-0.0", "0.0", "0")
    ]
    assert shared.run(jobs) == alone.run(jobs) == shared.run(jobs[::-1])[::-1]
    assert f"typing.List[{place}]" in shared.run(jobs)[0][0].output or shared.run(jobs)[0][0].status == "error"


def _compiles(code):
    try:
        gate.compile_source(code)
    except gate.Refused:
        return False
    return "9 ** 9 ** 9" not in code


def test_in_company_and_alone_are_the_same_on_published_programs(alone):
    """Real programs on real and on wrong inputs, alone and in three orders: each has met twenty others at the end."""
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    rows = [json.loads(line) for line in DATA.open()][:: 1 if LONG else 4]
    inputs = [row["input"] for row in rows]
    jobs = [Job(row["code"], (row["input"], other)) for row, other in zip(rows, inputs[1:] + inputs[:1])]
    expected = alone.run(jobs)
    with Sandbox(workers=2) as two:
        for seed in range(3):
            order = random.Random(seed).sample(range(len(jobs)), len(jobs))
            found, count, _ = children(two, [jobs[i] for i in order])
            assert found == [expected[i] for i in order] and count < len(jobs) / 3


# --- what such a child says ----------------------------------------------------------------------------------


def settled(heard, status, stops=(True, False, True)):
    """(outcomes of each program, programs to be run alone) after a child of three programs with two inputs each."""
    found = [[None, None] for _ in stops]
    pieces = [
        outcomes.Piece(Job("", ("1", "2"), stop_at_failure=stop), [b"1", b"2"], [0, 1], row, 1, set())
        for stop, row in zip(stops, found)
    ]
    again = outcomes.settle_together(outcomes.Bundle(pieces), heard, status, str.isdigit)
    return found, [next(i for i, row in enumerate(found) if row is piece.outcomes) for piece in again]


def frames(text, cpu=0.001):
    """'G 1 E' -> frames of an honest child: a letter is a kind, a digit a value."""
    said = [
        wire.frame(b"O" if word.isdigit() else word[:1].encode(), word if word.isdigit() else word[2:], cpu)
        for word in text.split()
    ]
    return wire.frame(b"B", "", 0) + b"".join(said)


@pytest.mark.parametrize(
    "text, status, statuses, again",
    [
        ("G 1 2 G 3 4 G 5 6 D", 0, "ok ok ok ok ok ok", []),
        ("G 1 2 A G 5 6 D", 0, "ok ok - - ok ok", [1]),
        ("G E:KeyError G E:KeyError 4 X:NameError D", 0, "error error error ok error error", []),
        ("G E:MemoryError G E:RecursionError 4 X:OSError D", 0, "- - - - - -", [0, 1, 2]),
        ("R:forbidden R:syntax A D", 0, "forbidden forbidden - - - -", [1, 2]),
        ("G 1 G 3 4 G 5 6 D", 0, "- - ok ok ok ok", [0]),
        ("G 1 2 3 G 3 4 G 5 6 D", 0, "- - ok ok ok ok", [0]),
        ("G 1 x G 3 4 G 5 6 D", 0, "ok ok - - - -", None),
        ("G 1 2 G 3 4 D", 0, "- - - - - -", [0, 1, 2]),
        ("G 1 2 G 3 4 G 5 6 G 7 8 D", 0, "- - - - - -", [0, 1, 2]),
        ("1 2 D", 0, "- - - - - -", [0, 1, 2]),
        ("G 1 2 G", 27, "ok ok timeout - - -", [2, 1]),
        ("G 1 2 G 3", 27, "ok ok ok timeout - -", [2]),
        ("G 1", 27, "ok timeout - - - -", [1, 2]),
        ("G 1 2", 27, "ok ok - - - -", [1, 2]),
        ("", 27, "- - - - - -", [0, 1, 2]),
        ("G 1 2 G 3", 11, "ok ok - - - -", [2, 1]),
        ("G 1 2 G 3", 14, "ok ok - - - -", [2, 1]),
        ("G 1 2 G 3", 0, "ok ok - - - -", [2, 1]),
    ],
)
def test_what_such_a_child_says_becomes_outcomes(text, status, statuses, again):
    found, alone = settled(frames(text), status)
    if again is None:  # frames of an unknown kind: nothing of it is believed
        assert found == [[None, None]] * 3 and alone == [0, 1, 2]
        return
    assert [outcome.status if outcome else "-" for outcome in itertools.chain(*found)] == statuses.split()
    assert sorted(alone) == sorted(again)


def test_time_before_a_loop_is_doubted():
    found, alone = settled(frames("G 1 2 G 3", cpu=0.5), 27)
    assert found[1] == [None, None] and sorted(alone) == [1, 2]


def test_random_bytes_leave_nobody_out():
    rng = random.Random(8)
    for _ in range(5_000):
        words = rng.choices(
            "G G 1 2 A D E:KeyError E:MemoryError X:TypeError R:forbidden U L".split(), k=rng.randrange(12)
        )
        heard = frames(" ".join(words), rng.choice([0.001, 0.5])) + rng.randbytes(rng.choice([0, 0, 0, 5]))
        found, again = settled(heard, rng.choice([0, 9, 14, 27, 11, 31]))
        for number, row in enumerate(found):
            assert (None in row) == (number in again)
            assert all(outcome is None or outcome.status != "ok" or literal.parse(outcome.output) for outcome in row)

"""The three modes: tasks as JSON, which proposals are valid, which are duplicates or held out, the seed tasks."""

import json
from dataclasses import replace

import pytest

from azr import tasks
from azr.tasks import SEED_PROGRAM, SEED_TASKS, Proposal, Task, judge, validate
from azr.tasks.messages import leak, leaked_code
from azr.tasks.program import skeleton
from sandbox import PROPOSAL, Sandbox
from tests.timing import cpu_seconds

DOUBLE = "def f(x):\n    return x * 2"


@pytest.fixture(scope="module")
def sandbox():
    """One for all tests of this file."""
    with Sandbox(workers=2, profile=replace(PROPOSAL, cpu_seconds=0.25)) as opened:
        yield opened


def reasons(proposals, sandbox, **options):
    """The reason of each verdict."""
    return [verdict.reason for verdict in validate(proposals, sandbox, **options)]


def deduction(program, given="3", mode="deduction"):
    """A proposal with one input."""
    return Proposal(mode, program, (given,))


def induction(program=DOUBLE, inputs=tuple("0123456789"), message="do something with a number"):
    """A proposal with ten inputs."""
    return Proposal("induction", program, tuple(inputs), message)


SEED = SEED_TASKS["deduction"].to_json()

# --- records ---------------------------------------------------------------------------------------------------------


def test_task_json_round_trip_has_only_the_fields_of_its_mode():
    for mode, task in SEED_TASKS.items():
        row = json.loads(json.dumps(task.to_json()))
        assert Task.from_json(row) == task and Task.from_json(row).hash == task.hash
        assert set(row) == {"mode", *tasks.FIELDS[mode]}
    solved = Task("deduction", DOUBLE, "1", "2", response="x</think><answer>2</answer>", log_probs=(-0.5, -1.0))
    assert Task.from_json(json.loads(json.dumps(solved.to_json()))) == solved
    assert solved.hash == Task("deduction", DOUBLE, "1", "2").hash != Task("abduction", DOUBLE, "1", "2").hash
    proposal = Task("deduction", DOUBLE, "1", "2", response="x", references=(solved, SEED_TASKS["abduction"]))
    assert Task.from_json(json.loads(json.dumps(proposal.to_json()))) == proposal and proposal.hash == solved.hash


@pytest.mark.parametrize(
    "row, wrong",
    [
        ([], "JSON object"),
        ({}, "mode"),
        ({"mode": "deduce"}, "deduce"),
        ({"mode": ["deduction"]}, "mode"),
        ({"mode": "deduction", "program": DOUBLE, "input": "1"}, "'output' is missing"),
        ({"mode": "deduction", "program": 3, "input": "1", "output": "2"}, "'program' must be text"),
        ({"mode": "deduction", "program": "a\0b", "input": "1", "output": "2"}, "NUL"),
        ({"mode": "deduction", "program": "'\ud800'", "input": "1", "output": "2"}, "surrogate"),
        ({"mode": "deduction", "program": "x" * 1_000_001, "input": "1", "output": "2"}, "1,000,001"),
        ({"mode": "deduction", "program": DOUBLE, "input": "1", "output": "2 +"}, "no literal"),
        (
            {"mode": "induction", "program": DOUBLE, "message": "", "visible": [["1"]], "hidden": [["1", "2"]]},
            "visible",
        ),
        ({"mode": "induction", "program": DOUBLE, "message": "", "visible": [], "hidden": [["1", "2"]]}, "visible"),
        (
            {"mode": "induction", "program": DOUBLE, "message": "", "visible": [["1", 2]], "hidden": [["1", "2"]]},
            "visible",
        ),
        ({"mode": "math", "question": "1+1", "answer": "2", "log_probs": [float("nan")]}, "log_probs"),
        ({"mode": "math", "question": "1+1", "answer": "2", "references": [SEED]}, "nobody proposes"),
        (SEED | {"references": []}, "must be a list of tasks"),
        (SEED | {"references": [SEED | {"output": "2 +"}]}, "no literal"),
        (SEED_TASKS["induction"].to_json() | {"references": [SEED, SEED]}, "one reference, not 2"),
    ],
)
def test_a_broken_task_is_one_clear_line(row, wrong):
    with pytest.raises(ValueError, match=wrong) as error:
        Task.from_json(row)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


# --- validation ------------------------------------------------------------------------------------------------------

VERDICTS = [
    ("ok", deduction("import math\nclass A:\n    pass\ndef g(x):\n    return x\ndef f(x, y=1):\n    return g(x) + y")),
    ("no_entry", deduction("def g(x):\n    return x")),
    ("no_entry", deduction("f = lambda x: x + 1")),
    ("syntax", deduction("def f(x):\n    return x +")),
    ("syntax", deduction("def f(x):\n    return x\0")),
    ("syntax", deduction("def f(x):\n    return '\ud800' + x")),
    ("forbidden", deduction("import os\ndef f(x):\n    return os.getpid() + x")),
    ("forbidden", deduction("def f(x):\n    return eval('x')")),
    ("error", deduction("def f(x):\n    return x / 0")),
    ("error", deduction("def f(x):\n    return x", "1, 2")),
    ("nondeterministic", deduction("def f(x):\n    return list({str(i) for i in range(x + 9)})")),
    ("nondeterministic", deduction("n = []\ndef f(x):\n    n.append(x)\n    return len(n)")),
    ("not_literal", deduction("def f(x):\n    return (i for i in range(x))")),
    ("not_literal", deduction(DOUBLE, "range(3)")),
    ("not_literal", deduction(DOUBLE, "1) or (2")),
    ("too_large", deduction("def f(x):\n    return [x] * 300")),
    ("too_large", deduction(DOUBLE, "'" + "a" * 2000 + "'")),
    ("too_large", deduction(DOUBLE + "\n" * 9000)),
    ("none_output", deduction("def f(x):\n    print(x)")),
    ("trivial", deduction("def f(x):\n    '''nothing'''\n    return (x)  # at all")),
    ("trivial", deduction("def f(x: int) -> int:\n    y: int = x\n    return y")),
    ("trivial", deduction("def f(x):\n    return 17")),
    ("trivial", deduction("def f(x):\n    x = 17\n    return x")),
    ("ok", deduction("def f(x):\n    return [x + 1 for x in x]", "[1]")),
    ("ok", induction()),
    ("wrong_count", induction(inputs=["1", "2"])),
    ("inputs_not_distinct", induction(inputs=["1", " 1 # same", *map(str, range(8))])),
    ("outputs_not_diverse", induction("def f(x):\n    return x > 4")),
    ("message_has_code", induction(message="def g(y): return y * 2")),
    ("message_has_code", induction(message="it's just n * 2, isn't it")),
    ("trivial", induction(SEED_PROGRAM)),
    ("trivial", induction("def f(x):\n    return 5")),
    ("error", induction("def f(x):\n    return 1 // (x - 7)")),
]


def test_validation_gives_each_refusal_its_reason(sandbox):
    verdicts = validate([proposal for _, proposal in VERDICTS], sandbox)
    assert [verdict.reason for verdict in verdicts] == [reason for reason, _ in VERDICTS]
    assert all(verdict.ok == (verdict.task is not None) == (verdict.reason == "ok") for verdict in verdicts)
    assert all(verdict.detail for verdict in verdicts if not verdict.ok and verdict.reason not in ("memory", "killed"))


def test_time_and_memory_are_reasons(sandbox):
    assert reasons([deduction("def f(x):\n    while True:\n        pass")], sandbox) == ["timeout"]
    assert reasons([deduction("def f(x):\n    return len([x] * 10**9)")], sandbox) == ["memory"]


def test_a_valid_proposal_makes_its_task(sandbox):
    one, ten = validate([deduction(DOUBLE, " 'a'  , # x", "abduction"), induction()], sandbox)
    assert one.task == Task("abduction", DOUBLE, "'a'", "'aa'")
    pairs = tuple((str(i), str(2 * i)) for i in range(10))
    assert ten.task == Task(
        "induction", DOUBLE, message="do something with a number", visible=pairs[:5], hidden=pairs[5:]
    )


def test_duplicates_by_name_and_layout_only(sandbox):
    same = deduction("def f(value: int) -> int:\n    '''twice'''\n    return value*2  # twice", "3,")
    others = [deduction(DOUBLE, "4"), deduction("def f(x):\n    return x * 3"), deduction(DOUBLE, mode="abduction")]
    known = {tasks.duplicate_key(Task("deduction", DOUBLE, "3", "6"))}
    assert reasons([same, *others], sandbox, known=known) == ["duplicate", "ok", "ok", "ok"]
    assert reasons([deduction(DOUBLE), same, *others], sandbox) == ["ok", "duplicate", "ok", "ok", "ok"]
    assert reasons([deduction(DOUBLE), same], sandbox, known=None) == ["ok", "ok"]
    bad = deduction("def f(x):\n    return x / 0")
    assert reasons([bad, bad], sandbox) == ["error", "error"]  # a repeated failure is that failure
    assert reasons([induction(), induction(inputs=map(str, range(9, -1, -1)), message="other")], sandbox) == [
        "ok",
        "duplicate",
    ]
    names = (
        deduction("def f(x, y):\n    return x - y", "y=1, x=2"),
        deduction("def f(a, b):\n    return a - b", "a=2, b=1"),
    )
    assert reasons(names, sandbox) == ["ok", "duplicate"]


def test_held_out_programs_are_refused_whatever_their_constants_and_names(sandbox):
    held_out = frozenset({skeleton("def f(x):\n    p=x+3\n    return p*'a'")})
    same = deduction("def f(number):\n    q = number + 40  # more\n    return q * 'bc'")
    others = [deduction("def f(x):\n    p=x-3\n    return p*'a'"), deduction("def f(x):\n    p=3+x\n    return p*'a'")]
    about = induction("def f(x):\n    p=x+1\n    return p*'a'")
    assert reasons([same, *others, about], sandbox, held_out=held_out) == ["held_out", "ok", "ok", "held_out"]
    assert reasons([same, *others, about], sandbox) == ["ok"] * 4
    [verdict] = validate([same], sandbox, held_out=held_out)
    assert not verdict.ok and verdict.task is None and verdict.detail
    assert reasons([deduction("def f(x:\n    return")], sandbox, held_out=held_out) == ["syntax"]  # read, never run


def test_the_seed_is_exempt_for_induction_alone(sandbox):
    seed = induction(SEED_PROGRAM)
    assert reasons([seed, deduction(SEED_PROGRAM)], sandbox, exempt={SEED_PROGRAM}) == ["ok", "trivial"]


def test_limits_of_output_can_be_set(sandbox):
    assert reasons([deduction(DOUBLE, "'aaaa'")], sandbox, max_output_chars=9) == ["too_large"]
    assert reasons([deduction(DOUBLE, "'aaaa'")], sandbox, max_output_chars=10) == ["ok"]


def test_messages():
    program = "def f(items, k):\n    best = sorted(items)[::-1]\n    return [x + k for x in best if x % 2 == 0]"
    for message in [
        "",
        "Sort, then add k to the even ones.",
        "sorted (descending); 3 - 4 values / items, and/or none!",
        "f([1, 2], 3) gives [5]",
        "It's x + k",
        "sorted(items)",
        "[x for x in best]",
    ]:
        assert not leaked_code(program, message), message
    for message in [
        "use [v + z for v in rows if v % 2 == 0]",
        "```\ncode\n```",
        "a function def go(x): ...",
        "lambda v: v + 1",
        "don't forget 'sorted(xs)[::-1]' here",
        "return [x+k for x in best if x%2==0]",
    ]:
        assert leaked_code(program, message), message
    assert leaked_code("def f(x):\n    return x // 2", "n // 2") and not leaked_code(
        "def f(x):\n    return x // 2", "half"
    )


def test_many_readings_of_a_message_take_no_time():
    program = "def f(x):\n    return " + "x + 1 * " * 900 + "1"
    runs, hidden = "41 " * 8 + "z ", " ".join(f"{ord(letter):x}" for letter in "x + 1 * x + 1 * x")

    def search():
        assert leak(program, (runs * 80)[:2_000]) == "" and "*" in leak(program, runs * 70 + hidden)

    assert cpu_seconds(search, 2) < 2  # a hundred readings, each once compared with a thousand pieces of code: 6 s


def test_the_seed_tasks_are_right(sandbox):
    assert (
        judge(
            [
                (SEED_TASKS["deduction"], "'Hello world'"),
                (SEED_TASKS["abduction"], '"Hello world"'),
                (SEED_TASKS["induction"], SEED_PROGRAM),
            ],
            sandbox,
        )
        == [tasks.Verdict(True, "ok")] * 3
    )
    seed = SEED_TASKS["induction"]
    inputs = tuple(given for given, _ in seed.visible + seed.hidden)
    verdict = validate([Proposal("induction", SEED_PROGRAM, inputs, seed.message)], sandbox, exempt={SEED_PROGRAM})[0]
    assert verdict.ok and verdict.task == seed

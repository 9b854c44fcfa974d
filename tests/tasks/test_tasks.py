"""azr/tasks/__init__.py: records, reading responses, validation, judging, buffers."""

import json
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr import tasks
from azr.tasks import (
    MODES,
    SEED_PROGRAM,
    SEED_TASKS,
    Buffers,
    Proposal,
    Task,
    judge,
    parse_answer,
    parse_proposal,
    validate,
)
from azr.tasks.parse import fences, leaked_code
from azr.tasks.program import read_program, skeleton
from sandbox import PROPOSAL, Outcome, Sandbox

DOUBLE = "def f(x):\n    return x * 2"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, profile=replace(PROPOSAL, cpu_seconds=0.25)) as opened:
        yield opened


def reasons(proposals, sandbox, **options):
    return [verdict.reason for verdict in validate(proposals, sandbox, **options)]


def deduction(program, given="3", mode="deduction"):
    return Proposal(mode, program, (given,))


def induction(program=DOUBLE, inputs=tuple("0123456789"), message="do something with a number"):
    return Proposal("induction", program, tuple(inputs), message)


# --- records ---------------------------------------------------------------------------------------------------------


def test_task_json_round_trip_has_only_the_fields_of_its_mode():
    for mode, task in SEED_TASKS.items():
        row = json.loads(json.dumps(task.to_json()))
        assert Task.from_json(row) == task and Task.from_json(row).hash == task.hash
        assert set(row) == {"mode", *tasks.FIELDS[mode]}
    solved = Task("deduction", DOUBLE, "1", "2", response="x</think><answer>2</answer>", log_probs=(-0.5, -1.0))
    assert Task.from_json(json.loads(json.dumps(solved.to_json()))) == solved
    assert solved.hash == Task("deduction", DOUBLE, "1", "2").hash != Task("abduction", DOUBLE, "1", "2").hash


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
    ],
)
def test_a_broken_task_is_one_clear_line(row, wrong):
    with pytest.raises(ValueError, match=wrong) as error:
        Task.from_json(row)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


# --- reading responses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, response, well_formed, value",
    [
        ("deduction", "so 4</think> <answer>```output\n4\n```\n</answer>", True, "4"),
        ("deduction", "</think><answer>4</answer> and so on", True, "4"),
        ("deduction", "</think>\n\n<answer>```\n[1,\n 2]\n```</answer>", True, "[1,\n 2]"),
        ("deduction", "</think><answer>```output\n1\n``` or ```output\n2\n```</answer>", True, "2"),
        ("deduction", "</think><answer>```output\n'a```b'\n```</answer>", True, "'a```b'"),
        ("deduction", "</think><answer>```output 7```</answer>", True, "7"),
        ("deduction", "</think><answer>```OUTPUT\n7```</answer>", True, "7"),
        ("deduction", "</think>so<answer>4</answer>", False, "4"),
        ("deduction", "<answer>3</answer> no, <answer>4</answer>", False, "4"),
        ("deduction", "</think><answer>```output\n4\n```", False, "4"),
        ("deduction", "</think><answer>4", False, None),
        ("deduction", "</think><answer></answer>", True, None),
        ("deduction", "</think><answer>```output\n4</answer>", True, None),
        ("deduction", "4", False, None),
        ("abduction", "</think><answer>```input\n'a', k=2\n```</answer>", True, "'a', k=2"),
        (
            "induction",
            "</think><answer>```python\ndef f(a):\n    return a\n```</answer>",
            True,
            "def f(a):\n    return a",
        ),
        (
            "induction",
            "</think><answer>```python\n1\n```\n```py\ndef f(a):\n    return 2\n```</answer>",
            True,
            "def f(a):\n    return 2",
        ),
        ("induction", "</think><answer>def f(a): return a</answer>", True, None),
        ("math", "</think><answer> \\boxed{4} </answer>", True, "\\boxed{4}"),
    ],
)
def test_answers(mode, response, well_formed, value):
    parsed = parse_answer(mode, response)
    assert (parsed.well_formed, parsed.value) == (well_formed, value)
    assert (parsed.reason == "ok") == (well_formed and value is not None)
    assert parsed.reason in ("ok", "no_format", "no_answer")


def test_a_fence_inside_a_string_does_not_end_the_program():
    program = 'def f(x):\n    """Shown as\n```\n    code\n```\n    """\n    return x + "```"  # don\'t\n'
    parsed = parse_proposal("deduction", f"</think><answer>```python\n{program}```\n```input\n'a'\n```</answer>")
    assert parsed.value == Proposal("deduction", program.strip(), ("'a'",))
    broken = 'def f(x):\n    """never closed\n    return x'  # the quotes stay open: the fence still ends it
    parsed = parse_proposal("deduction", f"</think><answer>```python\n{broken}\n```\n```input\n'a'\n```</answer>")
    assert parsed.value == Proposal("deduction", broken, ("'a'",))


def test_proposals():
    answer = f"```input\n5\n```\nfor example\n```python\nprint(1)\n```\n```python\n{DOUBLE}\n```\n```input\n6\n```"
    assert parse_proposal("abduction", f"</think><answer>{answer}</answer>").value == Proposal(
        "abduction", DOUBLE, ("5",)
    )
    assert (
        parse_proposal("deduction", f"</think><answer>```\n{DOUBLE}\n```\n```input\n1\n```</answer>").value.program
        == DOUBLE
    )
    ten = "".join(f"```input\n{i}\n```\n" for i in range(10)) + "```message\ndon't think\n```"
    parsed = parse_proposal("induction", f"</think><answer>{ten}</answer>", DOUBLE)
    assert parsed.reason == "ok" and parsed.value == induction(message="don't think")
    for text, reason in [
        (f"```python\n{DOUBLE}\n```", "no_input"),
        ("```input\n1\n```", "no_program"),
        ("", "no_program"),
    ]:
        parsed = parse_proposal("deduction", f"</think><answer>{text}</answer>")
        assert (parsed.value, parsed.reason, parsed.well_formed) == (None, reason, True)
    assert parse_proposal("induction", "</think><answer>```input\n1\n```</answer>", DOUBLE).reason == "no_message"
    assert parse_proposal("induction", f"</think>{ten}", DOUBLE).reason == "no_format"
    with pytest.raises(ValueError):
        parse_proposal("induction", "</think><answer></answer>")


PIECES = [
    "</think>",
    "<answer>",
    "</answer>",
    "```",
    "```python\n",
    "```input\n",
    "```output",
    "\n",
    " ",
    '"""',
    "'",
    "'''",
    "\\",
    "#",
    "def f(x):\n    return x",
    "1",
    "[",
    "`",
    "message",
    "\ud800",
    "\0",
    "\r\n",
    "é",
    "{",
    "f'{",
    "lambda x:",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join))
def test_any_text_is_read_and_gets_a_reason(text):
    for mode in MODES:
        parsed = parse_answer(mode, text)
        assert parsed.reason and (parsed.value is not None or parsed.reason != "ok")
        assert parse_proposal(mode, text, "def f(x):\n    return x" if mode == "induction" else None).reason


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60).filter(lambda t: "`" not in t and t.strip()))
def test_a_fenced_literal_survives_any_thought(thought, value):
    thought = thought.replace("<", "(")
    shown = repr(value)
    for mode, tag in (("deduction", "output"), ("abduction", "input")):
        parsed = parse_answer(mode, f"{thought}</think> <answer>\n```{tag}\n{shown}\n```\n</answer>")
        assert parsed.well_formed and parsed.value == shown


@pytest.mark.parametrize(
    "piece",
    [
        "```python\n",
        "``` x ",
        '```\n"""\n',
        "</think><answer>",
        "<answer>",
        "'",
        "`",
        "#",
        "\\",
        "```input\n1\n```\n",
        " ",
        "```python\n'''",
        "</think> ",
        '"\\"',
    ],
)
def test_reading_is_linear(piece):
    text = "</think><answer>" + (piece * 200_000)[:200_000] + "</answer>"
    started = time.process_time()
    for mode in MODES:
        assert (
            parse_answer(mode, text).reason and parse_proposal(mode, text, "" if mode == "induction" else None).reason
        )
    assert time.process_time() - started < 3.0


def test_fences_keep_their_order_and_tags():
    text = "a ```python\nx\n```\n````text\n```\ninner\n```\n````\n  ```\n  y\n  ```\nb ```Input\n\n1\n```"
    assert [(block.tag, block.text) for block in fences(text)] == [
        ("python", "x"),
        ("text", "```\ninner\n```"),
        ("", "  y"),
        ("input", "\n1"),
    ]
    assert fences("```input\n1\n```input\n2\n```") == fences("```input\n2\n```"), "the first was never closed"


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
    ("ok", deduction("def f(x):\n    return [x for x in x]", "[1]")),
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


# --- judging ---------------------------------------------------------------------------------------------------------


def judged(task, answers, sandbox, **options):
    return [
        (verdict.ok, verdict.reason) for verdict in judge([(task, answer) for answer in answers], sandbox, **options)
    ]


def test_deduction_compares_values(sandbox):
    task = Task("deduction", DOUBLE, "1", "{'a': (1, 2.0), 'b': {'x', 'y'}}")
    right = ["{'b': {'y', 'x'}, 'a': (1, 2)}", "{'a': (True, 2.0000000001), 'b': {'x', 'y'}}"]
    wrong = ["{'a': [1, 2.0], 'b': {'x', 'y'}}", "{'a': (1, 2.1), 'b': {'x', 'y'}}", "'{}'"]
    assert judged(task, right + wrong, sandbox) == [(True, "ok")] * 2 + [(False, "wrong")] * 3
    refused = ["eval(gold)", "1) or (True", "9**9**9", "type('A', (), {'__eq__': lambda a, b: True})()", "", "(" * 9000]
    verdicts = judged(task, refused + [None], sandbox)
    assert not any(ok for ok, _ in verdicts) and [reason for _, reason in verdicts[:3]] == ["not_literal"] * 3
    assert verdicts[-1] == (False, "no_answer")
    assert judged(Task("deduction", DOUBLE, "1", "float('nan')"), ["float('nan')", "nan"], sandbox)[0] == (True, "ok")


def test_abduction_runs_the_program_on_the_answer(sandbox):
    task = Task(
        "abduction",
        "def f(a, b=2):\n    if a == 9:\n        while True:\n            pass\n    return [a * b]",
        "3",
        "[6]",
    )
    answers = ["3", "6, 1", "b=3, a=2", "2.0, 3.0", "4", "'x'", "9", "1) or (True", "f(3)", "10**9**9", None]
    expected = [
        "ok",
        "ok",
        "ok",
        "ok",
        "wrong",
        "wrong",
        "timeout",
        "not_literal",
        "not_literal",
        "not_literal",
        "no_answer",
    ]
    assert [reason for _, reason in judged(task, answers, sandbox)] == expected
    assert [reason for _, reason in judged(task, answers[::-1], sandbox)] == expected[::-1]


def test_answers_cannot_help_or_harm_each_other(sandbox):
    """A program that counts its calls: each answer is the first in a process of its own."""
    task = Task("abduction", "n = []\ndef f(x):\n    n.append(x)\n    return sum(n)", "5", "5")
    assert not read_program(task.program).stateless
    assert judged(task, ["2", "3", "5", "0"], sandbox) == [(False, "wrong")] * 2 + [(True, "ok"), (False, "wrong")]
    greedy = Task("abduction", "def f(x):\n    return len('a' * x)", "20000000", "20000000")
    assert read_program(greedy.program).stateless
    # 20 MB: touching its pages must not cost a slow machine the second of CPU time that an input has
    assert judged(greedy, ["1000000000", "20000000", "7"], sandbox) == [
        (False, "memory"),
        (True, "ok"),
        (False, "wrong"),
    ]


@pytest.mark.parametrize(
    "program",
    [
        "n = 0\ndef f(x):\n    global n\n    n += x\n    return n",
        "def f(x, seen=[]):\n    seen.append(x)\n    return seen",
        "def f(x):\n    f.n = x\n    return x",
        "def f(x):\n    setattr(f, 'n', x)\n    return x",
        "import math\ndef f(x):\n    math.pi, y = x, 1\n    return y",
        "class A:\n    n = 0\ndef f(x):\n    A.n += x\n    return A.n",
        "from functools import lru_cache\n@lru_cache\ndef f(x):\n    return x",
        "def f(x):\n    f.__dict__.update(a=x)\n    return x",
        "import decimal\ndef f(x):\n    return f'{decimal.getcontext()}'",
        "def g(i=iter(range(9))):\n    return next(i)\ndef f(x):\n    return g()",
        "import copy\ndef f(x):\n    copy._deepcopy_dispatch[int] = x",
    ],
)
def test_programs_that_could_carry_state_are_seen(program):
    assert not read_program(program).stateless


def test_induction_is_all_or_nothing(sandbox):
    hidden = tuple((str(i), str(2 * i)) for i in range(5, 10))
    task = Task("induction", DOUBLE, message="", visible=(("1", "2"),), hidden=hidden)
    programs = [
        "def f(n):\n    return n + n",
        "def f(n):\n    return n + n if n < 9 else 1 / 0",
        "def f(n):\n    return {1: 2}[n]",
        "def g(n):\n    return n",
        "def f(n)",
        "import os\ndef f(n):\n    return 2 * n",
        "x" * 10_000,
        "def f(n):\n    return '\ud800'",
    ]
    expected = ["ok", "error", "error", "no_entry", "syntax", "forbidden", "too_large", "syntax"]
    assert [reason for _, reason in judged(task, programs, sandbox)] == expected
    scores = [verdict.score for verdict in judge([(task, program) for program in programs[:3]], sandbox, fraction=True)]
    assert scores == pytest.approx([1.0, 0.8, 0.0])
    liar = (
        "class A:\n    def __eq__(self, other):\n        return True\n"
        "    def __repr__(self):\n        return '10'\n"
        "def f(n):\n    return A()"
    )
    assert judged(task, [liar, "def f(n):\n    raise SystemExit(0)"], sandbox) == [
        (False, "not_literal"),
        (False, "error"),
    ]


class Recorder:
    """Passes jobs on to a sandbox and keeps them."""

    def __init__(self, sandbox, broken=()):
        self.sandbox, self.jobs, self.broken = sandbox, [], broken

    def run(self, jobs):
        self.jobs += jobs
        rows = self.sandbox.run(jobs)
        return [
            [
                Outcome("infra", None, "lost") if text in self.broken else outcome
                for text, outcome in zip(job.inputs, row)
            ]
            for job, row in zip(jobs, rows)
        ]


def test_expected_answers_stay_outside_and_equal_answers_run_once(sandbox):
    recorder = Recorder(sandbox)
    task = Task("abduction", "def f(x):\n    return 'secret' + str(x)[:0]", "1", "'secret'")
    hidden = Task("induction", DOUBLE, message="m", visible=(("1", "2"),), hidden=(("41", "1234567"),))
    pairs = [(task, "1"), (task, "1 "), (task, "1"), (task, "2"), (hidden, DOUBLE), (hidden, DOUBLE)]
    assert [verdict.ok for verdict in judge(pairs, recorder)] == [True, True, True, True, False, False]
    assert sum(len(job.inputs) for job in recorder.jobs) == 3
    assert "1234567" not in repr(recorder.jobs) and all("output" not in repr(job) for job in recorder.jobs)


def test_a_failing_sandbox_is_infra_and_never_a_right_answer(sandbox):
    recorder = Recorder(sandbox, broken=("6",))
    abduction = Task("abduction", DOUBLE, "6", "12")
    hidden = Task("induction", DOUBLE, message="m", visible=(("1", "2"),), hidden=(("6", "12"), ("7", "14")))
    verdicts = judge(
        [(abduction, "6"), (hidden, DOUBLE), (hidden, "def f(x):\n    return 12")], recorder, fraction=True
    )
    assert [(v.ok, v.reason, v.score) for v in verdicts] == [
        (False, "infra", 0.0),
        (False, "infra", 0.0),
        (False, "wrong", 0.0),
    ]


def test_judging_what_is_no_task_of_ours(sandbox):
    with pytest.raises(ValueError, match="azr.evals.benchmarks"):
        judge([(Task("math", question="1+1", answer="2"), "2")], sandbox)
    with pytest.raises(ValueError, match="no literal"):
        judge([(Task("deduction", DOUBLE, "1", "2 +"), "2")], sandbox)
    assert judge([], sandbox) == [] and validate([], sandbox) == []


# --- buffers ---------------------------------------------------------------------------------------------------------


def number_task(i, mode="deduction"):
    return Task(mode, f"def f(x):\n    return x + {i}", str(i), str(2 * i))


def test_the_oldest_leaves_and_nothing_comes_twice():
    buffers = Buffers(capacity=3)
    assert [buffers.add(number_task(i), i) for i in (0, 1, 1, 2, 3)] == [True, True, False, True, True]
    assert [step for _, step in buffers.tasks("deduction")] == [1, 2, 3] and buffers.size("deduction") == len(
        buffers
    ) == 3
    assert not buffers.add(Task("deduction", "def f(n):  # renamed\n    return n + 3", "3", "6"), 9)
    assert buffers.add(number_task(0), 4), "a task that has left may come back"
    assert buffers.keys("deduction") == {tasks.duplicate_key(number_task(i)) for i in (2, 3, 0)}
    assert buffers.newest("deduction", 2) == [number_task(0), number_task(3)]
    assert buffers.newest("deduction", 9, since=3) == [number_task(0), number_task(3)]
    assert buffers.sample("abduction", 4, random.Random(0)) == []
    with pytest.raises(ValueError):
        Buffers(capacity=0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["deduction", "abduction"])), max_size=40),
    st.integers(1, 8),
    st.integers(0, 9),
)
def test_buffer_state_restores_exactly(added, capacity, seed):
    buffers = Buffers(capacity)
    for step, (i, mode) in enumerate(added):
        buffers.add(number_task(i, mode), step)
    restored = Buffers()
    restored.load_state_dict(json.loads(json.dumps(buffers.state_dict())))
    assert restored.state_dict() == buffers.state_dict() and restored.capacity == capacity
    for mode in MODES:
        assert restored.keys(mode) == buffers.keys(mode) and len(buffers.keys(mode)) == buffers.size(mode) <= capacity
        drawn = buffers.sample(mode, 4, random.Random(seed))
        assert drawn == restored.sample(mode, 4, random.Random(seed))
        assert len({task.hash for task in drawn}) == len(drawn) == min(4, buffers.size(mode))


def test_a_broken_state_changes_nothing():
    buffers = Buffers()
    buffers.add(number_task(1), 0)
    state = json.loads(json.dumps(buffers.state_dict()))
    state["rows"]["abduction"] = state["rows"]["deduction"]
    with pytest.raises(ValueError, match="misplaced"):
        buffers.load_state_dict(state)
    assert buffers.size("deduction") == 1 and buffers.size("abduction") == 0


def test_induction_programs_come_from_both_buffers_and_the_seed_only_when_alone():
    buffers, rng = Buffers(), random.Random(0)
    for task in SEED_TASKS.values():
        assert buffers.add(task, 0)
    assert buffers.sample_program(rng).program == SEED_PROGRAM
    buffers.add(number_task(1), 1)
    buffers.add(number_task(2, "abduction"), 1)
    drawn = {buffers.sample_program(rng).program for _ in range(50)}
    assert drawn == {number_task(1).program, number_task(2).program}


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
        == [tasks.Verdict(True, "ok", score=1.0)] * 3
    )
    seed = SEED_TASKS["induction"]
    inputs = tuple(given for given, _ in seed.visible + seed.hidden)
    verdict = validate([Proposal("induction", SEED_PROGRAM, inputs, seed.message)], sandbox, exempt={SEED_PROGRAM})[0]
    assert verdict.ok and verdict.task == seed

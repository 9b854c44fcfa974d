"""azr/tasks/judging.py: which answers are right, and what a judge gives to the sandbox."""

from dataclasses import replace

import pytest

from azr.tasks import Task, judge, validate
from azr.tasks.program import read_program
from sandbox import PROPOSAL, Outcome, Sandbox

DOUBLE = "def f(x):\n    return x * 2"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, profile=replace(PROPOSAL, cpu_seconds=0.25)) as opened:
        yield opened


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

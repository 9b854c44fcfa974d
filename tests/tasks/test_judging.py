"""azr/tasks/judging.py: which answers are right, and what a judge gives to the sandbox."""

from dataclasses import replace

import pytest

from azr.tasks import Task, judge, validate
from sandbox import PROPOSAL, Outcome, Sandbox

DOUBLE = "def f(x):\n    return x * 2"


@pytest.fixture(scope="module")
def sandbox():
    """One for all tests of this file."""
    with Sandbox(workers=2, profile=replace(PROPOSAL, cpu_seconds=0.25)) as opened:
        yield opened


def judged(task, answers, sandbox, **options):
    """(correct, reason) of each answer."""
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
    assert judged(task, ["2", "3", "5", "0"], sandbox) == [(False, "wrong")] * 2 + [(True, "ok"), (False, "wrong")]
    greedy = Task("abduction", "def f(x):\n    return len('a' * x)", "20000000", "20000000")
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
        "class A:\n    n = 0\ndef f(x):\n    A.n += x\n    return A.n",
        "from functools import lru_cache\n@lru_cache\ndef g(x): return x\ndef f(x):\n"
        "    return [g(x), g.cache_info().hits]",
        "from numbers import Number\ndef f(x):\n    known = isinstance('', Number)\n    Number.register(str)\n"
        "    return [known]",
        "import decimal\ndef f(x):\n    before = str(decimal.Context().traps)\n"
        "    decimal.DefaultContext.clear_traps()\n    return len(before)",
        "from typing import List\ndef f(x):\n    return str(List[x])",
        "import enum\nclass A(enum.Enum):\n    B = 1\nB = 7\ndef f(x):\n    before = B\n    enum.global_enum(A)\n"
        "    return before",
        "import operator\ndef f(x):\n    d = operator.attrgetter('__dict__')(f)\n"
        "    operator.setitem(d, 'n', d.get('n', 0) + 1)\n"
        "    return d['n']",
    ],
)
def test_one_answer_cannot_change_what_the_next_one_gets(program, sandbox):
    answers = ["1", "True", "1.0", "2", "'a'"]
    tasks = [Task("abduction", program, "1", output) for output in ("1", "[1]", "[False]", "'typing.List[1]'", "7")]
    for task in tasks:
        together = judged(task, answers, sandbox)
        assert together == [judged(task, [answer], sandbox)[0] for answer in answers]
        assert together == judged(task, answers[::-1], sandbox)[::-1]


def test_an_endless_answer_costs_little_and_a_slow_task_has_its_time(sandbox):
    loop = "def f(n):\n    while True:\n        pass"
    quick = Task("induction", DOUBLE, message="", visible=(("1", "2"),), hidden=(("5", "10"), ("6", "12")))
    count = "def f(n):\n    m = 0\n    for i in range(n):\n        m += 1\n    return m"
    slow = Task("induction", count, message="", visible=(("1", "1"),), hidden=(("900000", "900000"),))
    before = sandbox.state["children_cpu_seconds"]
    assert judged(quick, [loop, DOUBLE, loop + "\n"], sandbox) == [(False, "timeout"), (True, "ok"), (False, "timeout")]
    assert sandbox.state["children_cpu_seconds"] - before < 0.3
    slower = count.replace("m += 1", "m += 1; n, k, j = n, i, m; k = j + i - j; j = [k, i, n][1]; k += j")
    assert judged(slow, [slower, count], sandbox) == [(True, "ok")] * 2


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
    contradicts = "def f(n):\n    return n + n if n > 1 else 0"  # right for all hidden pairs, not for a visible one
    assert judged(task, [contradicts], sandbox) == [(False, "wrong")]
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
        """As Sandbox.run."""
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
    assert sum(len(job.inputs) for job in recorder.jobs) == 4
    assert "1234567" not in repr(recorder.jobs) and all("output" not in repr(job) for job in recorder.jobs)


def test_a_failing_sandbox_is_infra_and_never_a_right_answer(sandbox):
    recorder = Recorder(sandbox, broken=("6",))
    abduction = Task("abduction", DOUBLE, "6", "12")
    hidden = Task("induction", DOUBLE, message="m", visible=(("1", "2"),), hidden=(("6", "12"), ("7", "14")))
    verdicts = judge([(abduction, "6"), (hidden, DOUBLE), (hidden, "def f(x):\n    return 12")], recorder)
    assert [(v.ok, v.reason) for v in verdicts] == [(False, "infra"), (False, "infra"), (False, "wrong")]


def test_judging_what_is_no_task_of_ours(sandbox):
    with pytest.raises(ValueError, match="azr.evals.benchmarks"):
        judge([(Task("math", question="1+1", answer="2"), "2")], sandbox)
    with pytest.raises(ValueError, match="no literal"):
        judge([(Task("deduction", DOUBLE, "1", "2 +"), "2")], sandbox)
    assert judge([], sandbox) == [] and validate([], sandbox) == []

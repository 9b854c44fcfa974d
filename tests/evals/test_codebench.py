"""Grading of HumanEval+ and MBPP+ answers: on a problem of our own, and on a dozen of theirs where the files are."""

import gzip
import json
from pathlib import Path

import pytest

from azr.evals import code_answers
from azr.evals.code_answers import Problem, accepts, close, convert, load_problems, program_of, reference_of
from sandbox import BENCHMARK, Sandbox
from tests.evals.answers import HALF
from tests.timing import cpu_seconds

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "benchmarks"
HUMANEVAL, MBPP = DATA / "HumanEvalPlus.jsonl.gz", DATA / "MbppPlus.jsonl.gz"
HUMANEVAL_TASKS = (0, 2, 4, 32, 38, 53, 99)
MBPP_TASKS = (2, 75, 124, 252, 278, 558, 580, 581, 722, 737)

ROW = HALF | {"plus_input": [[640], [7], [10**30]]}
ALONE = "def half(x):\n    return [x / 2, (x & -x).bit_length() - 2]\n"
OFF_BY_ONE = """
def _shift(call):
    def shifted(*arguments):
        value = call(*arguments)
        if type(value) is bool:
            return not value
        if isinstance(value, (int, float, complex)):
            return value + 1
        if isinstance(value, str):
            return value + "x"
        if isinstance(value, (list, tuple)):
            return value + type(value)([0.5])
        if isinstance(value, set):
            return value | {0.5}
        return 0 if value is None else None
    return shifted
"""


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(1, profile=BENCHMARK) as sandbox:
        yield sandbox


def calibrate(problems, sandbox):
    """{task_id: Reference}."""
    return {problem.task_id: reference_of(problem, sandbox) for problem in problems}


def grade(pairs, sandbox, references):
    """The grade of each (problem, answer)."""
    return [code_answers.grade(problem, answer, references[problem.task_id], sandbox) for problem, answer in pairs]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory, sandbox):
    """Our problem and its reference."""
    [problem] = load_problems(write(tmp_path_factory.mktemp("own") / "own.jsonl", ROW))
    return problem, calibrate([problem], sandbox)


def reasons(answers, own, sandbox):
    return [grade.reason for grade in grade([(own[0], answer) for answer in answers], sandbox, own[1])]


# ---------------------------------------------------------------- problems


def test_both_kinds_of_file_are_read(tmp_path):
    plain = load_problems(write(tmp_path / "a.jsonl", ROW))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert load_problems(tmp_path / "a.jsonl.gz") == plain
    assert plain[0].inputs[:3] == ("2", "12", "640") and plain[0].base == 2


@pytest.mark.parametrize(
    "change, said",
    [
        ({"base_input": None}, "field base_input: NoneType"),
        ({"base_input": []}, "field base_input: there is no input"),
        ({"plus_input": [3]}, "field plus_input: an input is int"),
        ({"atol": -1}, "field atol"),
        ({"entry_point": "a b"}, "field entry_point"),
        ({"task_id": 3}, "field task_id: int"),
        ({"atol": True}, "atol"),
        ({"task_id": "Mbpp/252", "base_input": [["1+"]]}, "field base_input: an input cannot be used"),
        ({"base_input": [["x" * 2_000_000]]}, "field base_input: an input cannot be used"),
    ],
)
def test_a_bad_field_is_named(tmp_path, change, said):
    path = write(tmp_path / "bad.jsonl", ROW, "", ROW | {"task_id": "Own/2"} | change)
    with pytest.raises(ValueError) as error:
        load_problems(path)
    assert f"{path}, line 3" in str(error.value) and said in str(error.value)


def test_a_bad_file_is_named(tmp_path):
    for name, rows, said in (
        ("a", [ROW, ROW], "Own/1 is there twice"),
        ("b", ["{"], "line 1: not a JSON line"),
        ("c", ["[]"], "line 1: expected a JSON object"),
        ("d", [], "holds no problems"),
        ("e", [{k: v for k, v in ROW.items() if k != "atol"}], "the field atol is missing"),
    ):
        with pytest.raises(ValueError, match=said):
            load_problems(write(tmp_path / name, *rows))
    for data in (gzip.compress(b"x" * 1000)[:-9], b"\x1f\x8bjunk"):
        (tmp_path / "f.gz").write_bytes(data)
        with pytest.raises(ValueError, match="f.gz: cannot be read"):
            load_problems(tmp_path / "f.gz")
    with pytest.raises(ValueError, match="No such file"):
        load_problems(tmp_path / "none")


def test_arguments_get_back_what_json_cannot_say():
    assert convert("Mbpp/2", [[1, [2]], [3]]) == ((1, [2]), (3,))
    assert convert("Mbpp/75", [[[1], [2]], [3]]) == ([(1,), (2,)], [3])
    assert convert("Mbpp/307", [[1], [2], [3]]) == ((1,), [2], [3])
    assert convert("Mbpp/580", [[1, [2, [3]]]]) == ((1, (2, (3,))),)
    assert convert("Mbpp/115", [[[1, 1], []]]) == ([{1}, {}],)
    assert convert("Mbpp/124", ["1e-3", "(-0-1j)"]) == (0.001, -1j)
    assert convert("Mbpp/722", [{"a": [1, 2]}, 3]) == ({"a": (1, 2)}, 3)
    assert convert("HumanEval/2", [[1, 2]]) == ([1, 2],)


# ---------------------------------------------------------------- programs and verdicts


def test_program_is_the_answer_or_completes_the_prompt(own):
    problem, body = own[0], "    return x\n"
    assert program_of(problem, ALONE) == ALONE
    assert program_of(problem, "half: object = lambda x: x") == "half: object = lambda x: x"
    assert program_of(problem, body) == problem.prompt + body
    again = body + "\ndef half(x):\n    return 1\n"  # a completion that goes on and on
    assert program_of(problem, again) == problem.prompt + again
    assert program_of(problem, "half == 3") == problem.prompt + "half == 3"


def test_right_answers_pass(own, sandbox):
    assert own[1]["Own/1"].cpu_seconds == 1.0 and not own[1]["Own/1"].faults
    assert reasons([ALONE, ROW["canonical_solution"], ALONE.replace("x / 2", "x * 0.5000000001")], own, sandbox) == [
        "ok",
        "ok",
        "ok",
    ]


def test_wrong_answers_have_a_reason(own, sandbox):
    answers = [
        None,
        "",
        "def half(x): return None",
        "def half(x) return x",
        "def half(x): 1 / 0",
        "def half(x): exit()",
        ALONE.replace("x / 2", "x // 2 + (x > 20)"),
        "import socket\nsocket.socket()\n" + ALONE,
        "x" * 2_000_000,
        "def half(x): return iter([])",
        "\ud800" + ALONE,
        "def half(x):\n    while 1: pass",
        "import time\ndef half(x):\n    while 1: time.sleep(0.3)",
    ]
    assert reasons(answers, own, sandbox) == [
        "no_answer",
        "wrong",
        "wrong",
        "syntax",
        "error",
        "error",
        "wrong",
        "forbidden",
        "too_large",
        "not_literal",
        "syntax",
        "timeout",
        "timeout",
    ]


def test_base_and_plus_are_told_apart(own, sandbox):
    answers = [
        ALONE.replace("x / 2", "x / 2 if x != 7 else 0"),
        ALONE.replace("x / 2", "x / (x != 7) / 2"),
        ALONE.replace("x / 2", "x / 2 if x != 12 else 0"),
    ]
    first, second, third = grade([(own[0], answer) for answer in answers], sandbox, own[1])
    assert (first.ok_base, first.ok_plus) == (True, False)
    assert first.detail == "plus input 1: [0, -1] instead of [3.5, -1]"
    assert (second.ok_base, second.reason, second.detail) == (True, "error", "plus input 1: ZeroDivisionError")
    assert (third.ok_base, third.ok_plus) == (False, False)


def test_a_problem_without_reference_output_is_refused(sandbox, tmp_path, capsys):
    row = ROW | {"canonical_solution": "    return x if x < 7 else iter(())\n"}
    [problem] = load_problems(write(tmp_path / "own.jsonl", row))
    reference = calibrate([problem], sandbox)["Own/1"]
    assert reference.inputs == ("2",) and len(reference.faults) == 4
    assert "Own/1: 4 of 5 inputs are left out" in capsys.readouterr().err
    [problem] = load_problems(write(tmp_path / "own.jsonl", row | {"canonical_solution": "    return iter(())"}))
    with pytest.raises(ValueError, match="answers no base input"):
        reference_of(problem, sandbox)


def test_the_limit_grows_with_the_reference(sandbox, tmp_path):
    burn = (
        "    from time import process_time\n    end = process_time() + {}\n    while process_time() < end:\n"
        "        pass\n    return x\n"
    )
    row = ROW | {"canonical_solution": burn.format(0.4), "plus_input": []}
    [problem] = load_problems(write(tmp_path / "own.jsonl", row))
    references = calibrate([problem], sandbox)
    assert 1.5 <= references["Own/1"].cpu_seconds < 3  # 4 x 0.4 s by a coarse clock, not 4 x 0.8 s of both
    found = grade([(problem, burn.format(seconds)) for seconds in (1.3, 4)], sandbox, references)
    assert [grade.reason for grade in found] == ["ok", "timeout"]


def test_an_input_that_is_left_out_raises_no_limit(sandbox, tmp_path, capsys):
    body = (
        "    from time import process_time\n    end = process_time() + (0.5 if x == {} else 0)\n"
        "    while process_time() < end:\n        pass\n    return object() if x == {} else x\n"
    )
    before = sandbox.state["children"]
    for slow, limit in ((2, 2.0), (7, 1.0)):  # answered after half a second, and left out after as much
        [problem] = load_problems(write(tmp_path / "own.jsonl", ROW | {"canonical_solution": body.format(slow, 7)}))
        reference = reference_of(problem, sandbox)
        assert limit - 0.1 <= reference.cpu_seconds < limit + 0.8 and len(reference.faults) == 1
    assert sandbox.state["children"] == before + 2  # nothing is run again to be measured


def test_the_proposal_profile_is_refused(own):
    with Sandbox(workers=1) as sandbox, pytest.raises(ValueError, match="BENCHMARK"):
        reference_of(own[0], sandbox)


# ---------------------------------------------------------------- comparing


def test_tolerance():
    assert close([1.0, (2.0, {"a": 3.0})], [1.0000005, (2.0, {"a": 2.9999995})])
    assert close(1e9, 1e9 + 50) and not close(1e9, 1e9 + 150) and close(1.00005, 1.0, 1e-4)
    assert close(1, 1.0) and close([1], [1.0000001]) and not close(1, 1.0000001) and not close([1.0], (1.0000001,))
    assert close(float("nan"), float("nan")) and close(float("inf"), float("inf"))
    assert not close(float("inf"), -float("inf")) and not close(1.0, float("inf")) and not close(float("nan"), 1.0)
    assert not close([1.0], [1.0, 1.0]) and not close(10**400, 1.0) and not close([10**400], [1.0])
    assert not close(2, 1, 1e-4) and not close("1.0", 1.0) and not close(True, False) and not close(None, 0.0)
    assert close(1 + 1e-7j, 1 + 0j) and not close({1.0: 2}, {1.5: 2})


@pytest.mark.parametrize(
    "task, arguments, wanted, right, wrong",
    [
        ("HumanEval/32", "[1.0, 2.0]", "-0.5", ["-0.50001", "-0.5"], ["0.5", "-1000.0", "None", "'x'", "float('nan')"]),
        (
            "HumanEval/32",
            "[-6, 11, -6, 1]",
            "1.0",
            ["1.0", "2.0", "3", "2.99999"],
            ["0", "1.5", "-9.0", "1e300", "[1.0]"],
        ),
        ("Mbpp/2", "(3, 4), (4, 5)", "(4, 3)", ["(3, 4)", "[3, 4, 4]", "{3, 4}"], ["(3,)", "None", "7", "[[3], [4]]"]),
        ("Mbpp/164", "1, 2", "True", ["True", "False"], ["None", "1", "'True'"]),
        ("Mbpp/295", "8", "7", ["7", "0"], ["8", "None", "False", "[]"]),
        ("Mbpp/558", "1, 23", "1", ["1", "4"], ["3", "None"]),
        ("Mbpp/581", "3, 4", "33", ["33", "35"], ["34", "None", "'33'"]),
        ("Mbpp/737", "'annie'", "True", ["True", "'annie'", "0"], ["None", "False"]),
        ("Mbpp/737", "'dawood'", "None", ["None", "False"], ["True", "'d'"]),
    ],
)
def test_special_oracles(task, arguments, wanted, right, wrong):
    problem = Problem(task, "", "entry", "", (arguments,), 1, 1e-4 if task == "HumanEval/32" else 0.0)
    assert [text for text in right if not accepts(problem, arguments, text, wanted)] == []
    assert [text for text in wrong if accepts(problem, arguments, text, wanted)] == []


def test_comparing_takes_linear_time():
    shared = [tuple(-1 - (n >> bit & 1) for bit in range(14)) for n in range(5_000)]  # all have one hash
    any_order = Problem("Mbpp/2", "", "entry", "", ("(1,), (2,)",), 1, 0.0)
    root = Problem("HumanEval/32", "", "entry", "", ("[1, 2]",), 1, 1e-4)

    def compare():
        assert not accepts(any_order, "(1,), (2,)", str(shared), "(4, 3)")
        assert accepts(any_order, "(1,), (2,)", str(shared[::-1] * 2), str(shared))
        assert accepts(any_order, "(1,), (2,)", "[1.0, True, (2, 3.0)]", "((2.0, 3), 1)")
        assert not accepts(root, str(list(range(1, 60))), hex(2**99_990), "0.5")

    assert cpu_seconds(compare, 5) < 5


# ---------------------------------------------------------------- the public files


@pytest.fixture(scope="module", params=[(HUMANEVAL, HUMANEVAL_TASKS), (MBPP, MBPP_TASKS)], ids=["HumanEval", "MBPP"])
def public(request, sandbox):
    path, numbers = request.param
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    problems = [problem for problem in load_problems(path) if int(problem.task_id.split("/")[1]) in numbers]
    assert len(problems) == len(numbers)
    return problems, calibrate(problems, sandbox)


def test_reference_solutions_pass(public, sandbox):
    problems, references = public
    assert not any(reference.faults for reference in references.values())
    for answers in (
        [problem.solution for problem in problems],
        [problem.prompt + problem.solution for problem in problems],
    ):
        grades = grade(list(zip(problems, answers)), sandbox, references)
        assert [grade for grade in grades if not (grade.ok_base and grade.ok_plus)] == []


def test_mutated_reference_solutions_fail(public, sandbox):
    problems, references = public
    for change in ("{0} = lambda *arguments: None", OFF_BY_ONE + "{0} = _shift({0})"):
        pairs = [
            (problem, problem.prompt + problem.solution + "\n" + change.replace("{0}", problem.entry_point))
            for problem in problems
        ]
        assert [
            pair[0].task_id
            for pair, found in zip(pairs, grade(pairs, sandbox, references))
            if found.ok_base or found.ok_plus or found.reason != "wrong"
        ] == []

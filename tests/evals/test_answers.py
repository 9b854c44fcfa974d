"""Honest answers to code benchmarks pass, cheats do not, and an answer costs no more than its time (answers.py)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from azr.evals import code_answers, score
from azr.evals.benchmarks import load
from azr.evals.code_answers import grade, load_problems, reference_of
from azr.evals.grade import Answer, Grader
from azr.stop import StopNow
from sandbox import BENCHMARK, Sandbox
from tests.evals.answers import HALF, HONEST
from tests.evals.cheats import CHEATS

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "benchmarks"
ROW = HALF | {"plus_input": [[n] for n in range(3, 30)]}
RIGHT = ROW["prompt"] + ROW["canonical_solution"]
LOOP = "def half(x):\n    while True: pass"


def filled(text, problem):
    return text.replace("{S}", problem.prompt + problem.solution).replace("{E}", problem.entry_point)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(1, profile=BENCHMARK) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return path


@pytest.fixture(scope="module")
def own(file, sandbox):
    [problem] = load_problems(file)
    return problem, reference_of(problem, sandbox)


def test_honest_answers_pass(own, sandbox):
    problem, reference = own
    pytest.importorskip("numpy")
    found = {name: grade(problem, filled(text, problem), reference, sandbox) for name, text in HONEST.items()}
    assert len(found) > 60 and {name: found for name, found in found.items() if not found.ok_plus} == {}


def test_cheats_do_not_pass(own, sandbox):
    problem, reference = own
    found = {name: grade(problem, filled(text, problem), reference, sandbox) for name, text in CHEATS.items()}
    assert len(found) > 40
    assert {name: found for name, found in found.items() if found.ok_base or found.ok_plus} == {}
    assert "infra" not in [grade.reason for grade in found.values()]
    assert grade(problem, RIGHT, reference, sandbox).ok_plus  # and the lane is as it was


@pytest.mark.parametrize("name, step, first", [("HumanEvalPlus", 30, 0), ("MbppPlus", 60, 1)])
def test_honest_answers_to_public_problems_pass(name, step, first, sandbox):
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    problems = [problem for problem in load_problems(path)[::step] if len(problem.inputs) < 800]
    references = {problem.task_id: reference_of(problem, sandbox) for problem in problems}
    failed = {}
    for i, (kind, text) in enumerate(list(HONEST.items())[first::2]):
        problem = problems[i % len(problems)]
        found = grade(problem, filled(text, problem), references[problem.task_id], sandbox)
        if not found.ok_plus:
            failed[kind, problem.task_id] = found
    assert failed == {}


def test_a_package_that_is_missing_is_said_in_one_line(monkeypatch, capfd):
    from dataclasses import replace

    with Sandbox(1, profile=replace(BENCHMARK, packages=("not_there", "not_there.part"))) as sandbox:
        assert sandbox.state["missing"] == ["not_there", "not_there.part"]
    said = capfd.readouterr().err
    assert said.count("not_there is not installed") == 1


# ---------------------------------------------------------------- time


def test_an_answer_has_one_budget_over_all_inputs(own, sandbox, monkeypatch):
    problem, reference = own
    slow = "import time\n" + RIGHT.replace("return", "time.sleep(0.4); return")
    before = sandbox.state["children"]
    assert grade(problem, slow, reference, sandbox).ok_plus  # twelve seconds of a minute, which nobody waits for
    monkeypatch.setattr(code_answers, "ANSWER_SECONDS", 5.0)
    found = grade(problem, slow, reference, sandbox)
    assert (found.reason, found.ok_base, found.ok_plus) == ("timeout", True, False) and "budget of 5 s" in found.detail
    assert sandbox.state["children"] - before < 60
    monkeypatch.setattr(code_answers, "ANSWER_SECONDS", 6.0)
    monkeypatch.setattr(code_answers, "FIRST_INPUTS", 4)
    slower = slow.replace("0.4", "0.9")  # half of it for four inputs, and 25 more to come
    assert grade(problem, slower, reference, sandbox).detail.startswith("plus input 2: the budget of 6 s")


def test_a_wrong_answer_is_not_run_to_its_end(own, sandbox):
    problem, reference = own
    burn = "import time\ndef half(x):\n    time.sleep(0.3)\n    return 0"
    before = sandbox.state["children"]
    assert grade(problem, burn, reference, sandbox).reason == "wrong"
    assert sandbox.state["children"] - before < 8  # those of the first part


def test_a_slow_answer_holds_up_no_other(file):
    texts = [LOOP, *(RIGHT + f"\n# {i}" for i in range(4))]
    with Grader(load(f"humaneval+={file}"), workers=2) as grader:
        order = [place for place, _ in grader.graded([Answer("Own/1", text, "solution") for text in texts])]
    assert sorted(order) == list(range(5)) and order.index(0) >= 2  # on a busy machine the last one may come later


# ---------------------------------------------------------------- progress, kills


def samples(path, texts):
    path.write_text("".join(json.dumps({"task_id": "Own/1", "solution": text}) + "\n" for text in texts))
    return str(path)


def test_a_score_that_was_cut_off_goes_on_to_the_same_result(tmp_path, file, monkeypatch):
    benchmark, texts = load(f"humaneval+={file}"), [RIGHT + f"\nx = {i}" for i in range(6)] + ["x", "x"]
    given = samples(tmp_path / "s.jsonl", texts)
    whole = score.score(given, benchmark, [1], str(tmp_path / "whole"))
    calls = []

    @contextlib.contextmanager
    def cut(title):
        def advance(done, total):
            calls.append((done, total))
            if len(calls) == 4:
                raise StopNow

        yield advance

    monkeypatch.setattr(score, "bar", cut)
    with pytest.raises(StopNow):
        score.score(given, benchmark, [1], str(tmp_path / "cut"))
    assert calls == [(0, 7), (1, 7), (2, 7), (3, 7)]  # equal answers are one
    partial = tmp_path / "cut" / score.PARTIAL
    assert len(partial.read_text().splitlines()) == 4 and not (tmp_path / "cut" / "result.json").exists()
    with open(partial, "a") as torn:
        torn.write('{"key": "0123')
    again = score.score(given, benchmark, [1], str(tmp_path / "cut"))
    assert calls[4] == (3, 7) and calls[-1] == (7, 7) and again == whole
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"graded.jsonl", "result.json", "lock"}
    assert (tmp_path / "cut" / "graded.jsonl").read_text() == (tmp_path / "whole" / "graded.jsonl").read_text()


def test_a_second_score_of_one_directory_is_refused(tmp_path, file):
    """Two would take each other's partial grades away."""
    given = samples(tmp_path / "s.jsonl", [RIGHT])
    with score.locked(tmp_path / "out"):
        code = f"import sys, eval_passk as e; sys.exit(e.main({['score', given, '--benchmark', f'humaneval+={file}']!r}"
        code += f" + ['--out', {str(tmp_path / 'out')!r}]))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is writing there" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_file_of_another_benchmark_is_refused(tmp_path):
    path = tmp_path / "humaneval.jsonl"
    path.write_text(json.dumps(HALF | {"task_id": "HumanEval/0", "plus_input": [[1]]}) + "\n")
    assert load(f"humaneval+={path}").items[0].code.task_id == "HumanEval/0"
    with pytest.raises(ValueError, match="HumanEval/0 is no problem of mbpp"):
        load(f"mbpp+={path}")


def test_grades_of_another_benchmark_are_not_taken_over(tmp_path, file):
    (tmp_path / score.PARTIAL).write_text('{"benchmark": "other"}\n{"key": "x", "grade": {}, "left_out": 0}\n')
    result = score.score(samples(tmp_path / "s.jsonl", [RIGHT]), load(f"humaneval+={file}"), [1], str(tmp_path))
    assert result["pass@k"]["1"]["mean"] == 1


def test_ctrl_c_keeps_what_is_graded_and_exits_0(tmp_path, file):
    texts = [RIGHT, *(f"{LOOP}\n# {i}" for i in range(200))]
    command = [sys.executable, str(ROOT / "eval_passk.py"), "score", samples(tmp_path / "s.jsonl", texts)]
    command += ["--benchmark", f"humaneval+={file}", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    partial, deadline = tmp_path / "out" / score.PARTIAL, time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_text().count("\n") > 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on" in said, errors
    assert partial.read_text().count("\n") > 1

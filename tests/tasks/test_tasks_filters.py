"""python -m azr.tasks validate|judge: formats, bad lines, order, streaming, exit codes."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from azr.jsonl import batches
from azr.tasks import SEED_TASKS

ROOT = Path(__file__).parents[2]
DOUBLE = "def f(x):\n    return x * 2"
TEN = {"mode": "induction", "program": DOUBLE, "inputs": [str(i) for i in range(10)], "message": "twice"}
COMMAND = [sys.executable, "-m", "azr.tasks"]


def run(command, data, *options):
    """(rows of standard output, exit code, standard error) of `python -m azr.tasks COMMAND`."""
    if not isinstance(data, bytes):
        data = "".join(json.dumps(row) + "\n" for row in data).encode()
    done = subprocess.run([*COMMAND, command, *options], input=data, capture_output=True, cwd=ROOT, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode, done.stderr.decode()


def test_validate_answers_every_line_in_order():
    rows = [
        {"id": i, "mode": "deduction", "program": f"def f(x):\n    return x + {1 + i % 7}", "input": "1"}
        for i in range(40)
    ]
    rows[5]["program"] = "def f(x):\n    while x:\n        pass"
    rows[6] = TEN | {"id": {"any": ["json", None]}}
    rows[7] = TEN | {"inputs": ["1"]}
    answers, code, _ = run("validate", rows)
    assert code == 0 and [answer.get("id") for answer in answers] == [row.get("id") for row in rows]
    assert answers[1] == {"id": 1, "valid": True, "reason": "ok", "detail": "", "output": "3"}
    assert answers[5]["reason"] == "timeout" and answers[5]["valid"] is False and answers[5]["output"] is None
    assert answers[6] == {
        "id": {"any": ["json", None]},
        "valid": True,
        "reason": "ok",
        "detail": "",
        "outputs": [str(2 * i) for i in range(10)],
    }
    assert (answers[7]["reason"], answers[7]["outputs"]) == ("wrong_count", None) and answers[7]["detail"]
    assert all(answer["valid"] for i, answer in enumerate(answers) if i not in (5, 7)), (
        "lines are no duplicates of each other"
    )


def test_judge_takes_tasks_with_an_answer():
    deduction = {"mode": "deduction", "program": DOUBLE, "input": "3", "output": "6"}
    rows = [
        deduction | {"answer": "6.0"},
        deduction | {"answer": "7", "id": "x"},
        deduction | {"answer": None},
        deduction | {"mode": "abduction", "answer": "3.0"},
        SEED_TASKS["induction"].to_json() | {"answer": "def f(x): return x"},
        SEED_TASKS["induction"].to_json() | {"answer": "def f(x): return 1"},
    ]
    answers, code, _ = run("judge", rows)
    assert code == 0 and answers == [
        {"correct": True, "reason": "ok"},
        {"id": "x", "correct": False, "reason": "wrong"},
        {"correct": False, "reason": "no_answer"},
        {"correct": True, "reason": "ok"},
        {"correct": True, "reason": "ok"},
        {"correct": False, "reason": "wrong"},
    ]


def test_bad_lines_cost_only_themselves():
    good = json.dumps({"mode": "deduction", "program": DOUBLE, "input": "3"}).encode()
    huge = json.dumps({"mode": "deduction", "program": "x" * 50_000_000, "input": "3"}).encode()
    large = json.dumps({"id": 9, "mode": "deduction", "program": "x" * 2_000_000, "input": "3"}).encode()
    lines = [
        good,
        b"{",
        b"\xff\xfe",
        b"",
        b"[" * 100_000,
        b"null",
        b'{"mode": "deduction", "program": "a\\u0000", "input": "1"}',
        b'{"mode": "deduction", "program": "a", "input": "\\ud800"}',
        b'{"id": 7, "mode": "deduction", "program": "a"}',
        b'{"mode": "guess", "program": "a", "input": "1"}',
        huge,
        large,
        good.replace(b'"3"', b'"3\\u0000"'),
        b'{"mode": "deduction", "program": 3, "input": "1"}',
        b'{"id": ' + b"9" * 5000 + b"}",
        good,
    ]
    answers, code, stderr = run("validate", b"\n".join(lines))
    assert code == 1 and len(answers) == len(lines)
    for number, answer in enumerate(answers, 1):
        if number in (1, len(lines)):
            assert answer["valid"] and answer["output"] == "6"
        else:
            assert answer["error"] and answer["line"] == number and "valid" not in answer
    assert answers[8]["id"] == 7 and "'input' is missing" in answers[8]["error"] and answers[11]["id"] == 9
    assert len(stderr.strip().splitlines()) == 1 and f"{len(lines) - 2} of {len(lines)}" in stderr


def test_bad_lines_of_judge():
    deduction = {"mode": "deduction", "program": DOUBLE, "input": "3", "output": "6"}
    rows = [
        deduction,
        deduction | {"answer": 6},
        {"mode": "math", "question": "1+1", "answer": "2"},
        deduction | {"output": "2 +", "answer": "2"},
        SEED_TASKS["induction"].to_json() | {"answer": "x", "hidden": []},
    ]
    answers, code, _ = run("judge", rows)
    assert code == 1 and [answer["line"] for answer in answers] == [1, 2, 3, 4, 5]
    for answer, word in zip(
        answers, ["'answer' is missing", "'answer' must be text", "azr.evals.benchmarks", "no literal", "'hidden'"]
    ):
        assert word in answer["error"]


def test_a_peer_that_waits_for_each_answer_gets_it():
    with subprocess.Popen(
        [*COMMAND, "validate", "--workers", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as peer:
        for i in range(3):
            peer.stdin.write(
                json.dumps({"id": i, "mode": "deduction", "program": DOUBLE, "input": str(i)}).encode() + b"\n"
            )
            peer.stdin.flush()
            assert select.select([peer.stdout], [], [], 60)[0], "no answer before the next line"
            assert json.loads(os.read(peer.stdout.fileno(), 65_536)) == {
                "id": i,
                "valid": True,
                "reason": "ok",
                "detail": "",
                "output": str(2 * i),
            }
        peer.stdin.close()
        assert peer.wait(60) == 0


def test_nothing_in_nothing_out_and_usage():
    assert run("judge", b"") == ([], 0, "")
    for arguments in (["guess"], [], ["validate", "--workers", "many"], ["judge", "--workers", "0"]):
        done = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60
        )
        assert done.returncode == 2 and not done.stdout and done.stderr


def test_a_reader_that_goes_away_ends_the_filter_quietly():
    rows = "".join(json.dumps({"mode": "deduction", "program": DOUBLE, "input": str(i)}) + "\n" for i in range(120))
    done = subprocess.run(
        f"{sys.executable} -m azr.tasks validate | head -n 1",
        input=rows.encode(),
        capture_output=True,
        shell=True,
        cwd=ROOT,
        timeout=120,
    )
    assert len(done.stdout.splitlines()) == 1 and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "writes, expected",
    [
        ([b"a\nb", b"c\n\nd"], [b"a", b"bc", b"", b"d"]),
        ([], []),
        ([b"\n"], [b""]),
        ([b"x" * 200_000 + b"\n1\n"], [b"x" * 200_000, b"1"]),
        ([b"y" * 8_000_001 + b"\nz"], [None, b"z"]),
        ([b"y" * 9_000_000], [None]),
    ],
)
def test_lines_are_cut_wherever_the_writes_end(writes, expected):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        for data in writes:
            while data:
                data = data[os.write(writer, data) :]
        os._exit(0)
    os.close(writer)
    assert [line for lines in batches(reader, 3) for line in lines] == expected
    os.close(reader)
    os.wait()

"""python -m sandbox run and doctor: the line protocol, bad input, streaming."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")

ROOT = Path(__file__).parents[2]
SANDBOX = [sys.executable, "-m", "sandbox"]


def filter_lines(data: bytes, *options):
    """(exit code, rows of standard output, standard error) of `python -m sandbox run`."""
    done = subprocess.run([*SANDBOX, "run", *options], input=data, capture_output=True, cwd=ROOT)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr.decode()


def line(code, *inputs, **more):
    """One request."""
    return json.dumps({"code": code, "inputs": list(inputs), **more}).encode() + b"\n"


def test_good_lines():
    data = line("def f(x): return x * 2", "1", "'a'", id="first") + line("def f(x): return 1 / x", "0")
    data += line("def g(x): return x", "3", entry="g")
    code, answers, errors = filter_lines(data)
    assert code == 0 and answers == [
        {"id": "first", "outcomes": [{"status": "ok", "output": "2"}, {"status": "ok", "output": "'aa'"}]},
        {"outcomes": [{"status": "error", "detail": "ZeroDivisionError"}]},
        {"outcomes": [{"status": "ok", "output": "3"}]},
    ]


BAD = [
    b"nonsense\n",
    b"\xff\xfe\n",
    b"[]\n",
    b"{}\n",
    b'{"code": 1, "inputs": []}\n',
    b'{"code": "x"}\n',
    b'{"code": "x", "inputs": "1"}\n',
    b'{"code": "x", "inputs": [1]}\n',
    b'{"code": "a\\u0000b", "inputs": []}\n',
    b'{"code": "\\ud800", "inputs": []}\n',
    b'{"code": "x", "inputs": ["\\udfff"]}\n',
    b'{"code": "x", "inputs": [], "entry": "a b"}\n',
    b"\n",
    b"\0\n",
    b"[" * 100_000 + b"\n",
    b'{"code": "x", "inputs": [], "cpu_seconds": 0}\n',
    b'{"code": "x", "inputs": [], "cpu_seconds": NaN}\n',
    b'{"code": "' + b"#" * 50_000_000 + b'", "inputs": []}\n',
]


def test_bad_lines_spoil_nothing():
    good = line("def f(x): return x", "7")
    code, answers, errors = filter_lines(b"".join(bad + good for bad in BAD)[:-1])
    assert code == 1 and len(answers) == 2 * len(BAD) and "Traceback" not in errors
    for number, (bad, fine) in enumerate(zip(answers[::2], answers[1::2])):
        assert bad["line"] == 2 * number + 1 and type(bad["error"]) is str and set(bad) == {"error", "line"}
        assert fine == {"outcomes": [{"status": "ok", "output": "7"}]}


def test_long_programs_are_outcomes():
    code, answers, _ = filter_lines(line("#" * 100_000, "1"))
    assert code == 0 and answers[0]["outcomes"][0]["status"] == "too_large"


def test_no_lines():
    assert filter_lines(b"")[:2] == (0, [])


def test_answers_come_before_the_next_question():
    process = subprocess.Popen([*SANDBOX, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    for number in range(3):
        process.stdin.write(line("def f(x): return x", str(number)))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["outcomes"][0]["output"] == str(number)
    process.stdin.close()
    assert process.wait() == 0
    process.stdout.close()


def test_many_lines_keep_their_order():
    data = b"".join(line("def f(x): return x", str(number), id=number) for number in range(300))
    code, answers, _ = filter_lines(data)
    found = [(answer["id"], answer["outcomes"][0]["output"]) for answer in answers]
    assert code == 0 and found == [(number, str(number)) for number in range(300)]


def test_benchmark_profile():
    data = line("import random\ndef f(x): return x", "1-2j")
    assert filter_lines(data)[1][0]["outcomes"][0]["status"] == "not_literal"
    [answer] = filter_lines(data.replace(b"1-2j", b"1"))[1]
    assert answer["outcomes"] == [{"status": "forbidden", "detail": "import random"}]
    [answer] = filter_lines(data, "--profile", "benchmark")[1]
    assert answer["outcomes"] == [{"status": "ok", "output": "complex(1.0, -2.0)"}]


def test_doctor_and_usage():
    done = subprocess.run([*SANDBOX, "doctor"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "seccomp" in done.stdout and "NO:" not in done.stdout
    done = subprocess.run([*SANDBOX, "run", "--workers", "0"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--workers" in done.stderr

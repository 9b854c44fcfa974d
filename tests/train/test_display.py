"""What a run shows, as a user sees it: in terminals of 80 and 200 columns, in a file, in ASCII, without colours.

A child process shows the same step to each: a real terminal (a pty), a pipe, a file under nohup.
"""

import fcntl
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from azr import console
from azr.policy.sampling import Completion
from azr.tasks.task import Parsed, Sample, Task
from azr.train import screen as display
from azr.train.config import Config

ROOT = Path(__file__).parents[2]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# What a model may write: code, an accent, an emoji, and an escape that clears the screen.
CHILD = r"""
import sys
from azr import console
from azr.train import screen as display
from azr.evals.held_out import EvalResult, TaskResult
from azr.tasks.task import Parsed, Sample, Task
from azr.tasks import MODES

def row(step):
    row = {"step": step, "time/step": 12.34, "time/elapsed": 3600.0 * step, "train/sampled_tokens": 90000}
    row |= {"time/propose": 4.0, "time/solve": 4.0, "time/update": 4.0}
    row |= {"memory/peak_process": 3.21, "train/tokens": 90000}
    row |= {"proposer/all/probe_kl": 0.01234, "solver/all/probe_kl": 0.0567}
    for mode in MODES:
        row |= {f"proposer/{mode}/valid_rate": 1.0, f"solver/{mode}/accuracy": 1.0, f"held_out/{mode}/accuracy": 0.5}
        row |= {f"proposer/{mode}/entropy": 0.7, f"solver/{mode}/entropy": 0.6}
        row |= {f"proposer/{mode}/solve_rate": None if mode == "induction" else 0.5}
    return row

def sample(role, mode, response, reason="ok", task=None, rate=None):
    return Sample(role, mode, "", [], None, response, "", Parsed(True, None, reason), task, reason, solve_rate=rate)

lines = display.StepLines(int(sys.argv[1]), 1.99)
for step in (1, 10, int(sys.argv[1])):
    lines.show(row(step))
console.warn("step 5: responses are cut off at --max-new-tokens 40 (proposer induction 100 %). Cut-off ones count as "
             "malformed: try --max-new-tokens 160 (--dry-run says what memory it takes)")
task = Task("deduction", "def f(x):\n    return x", "1", "1")
written = "<answer>def f(x):\n\treturn '\xe9t\xe9'\n'\x1b[2J\x07ouch \U0001f600'</answer>"
proposed = [sample("proposer", "deduction", written, task=task, rate=0.5)]
proposed += [sample("proposer", mode, "x" * 200, "no_format") for mode in MODES[1:]]
display.sample_table(1, proposed, [sample("solver", "deduction", "<answer>" + "y" * 90 + "</answer>", "wrong", task)])
display.training_table([row(1)], [row(2)])
settings = {"samples": 64, "sampling": {"temperature": 1.0}}
base, trained = (EvalResult([TaskResult(str(i), mode, 64, correct * (i + 1), 60, correct, 2, 0, 0)
                             for mode in MODES for i in range(5)], settings) for correct in (2, 9))
display.before_after([base, trained], [base, trained], [1, 64])
with console.bar("held-out tasks, 64 answers each, step_120") as advance:
    advance(19200, 38400)
    advance(38400, 38400)
print("shown", flush=True)
sys.stdin.readline()
"""


def environment(**more) -> dict:
    kept = {
        key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "TERM", "FORCE_COLOR")
    }
    return kept | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"} | more


def in_terminal(columns: int, steps: int = 500, **more) -> str:
    """All that a terminal of so many columns receives."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-c", CHILD, str(steps)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=slave, stderr=slave, env=environment(**more))
    os.close(slave)
    received = b""
    while b"shown" not in received:
        try:
            received += os.read(master, 1 << 16)
        except OSError:  # the child is gone
            break
    child.communicate(b"\n", timeout=60)
    os.close(master)
    assert child.returncode == 0, received.decode(errors="replace")[-2000:]
    return received.decode("utf-8", errors="strict")


def rows_of(shown: str) -> list[str]:
    """The lines that stay on the screen, without colours; a line that is drawn again counts as it was last."""
    return [ESCAPES.sub("", line.split("\x1b[2K")[-1].rstrip("\r").split("\r")[-1]) for line in shown.split("\n")]


@pytest.mark.parametrize("columns, steps", [(80, 500), (80, 1000), (110, 500), (200, 500)])
def test_nothing_is_wider_than_the_terminal(columns, steps):
    rows = rows_of(in_terminal(columns, steps))
    assert max(len(row) for row in rows) <= columns, max(rows, key=len)
    assert not [row for row in rows if row.startswith("│") and not row.rstrip().endswith("│")]  # no box is broken
    step = next(row for row in rows if re.match(rf"(step +)?10/{steps} ", row.strip()) or f" 10/{steps} " in row)
    assert "valid 100 100 100" in step and "solved 100 100 100" in step and " left" in step
    assert ("12.3 s" in step and "%" in step) == (columns > 100)
    assert "         KL from step 0, nats a token: proposer 0.0123, solver 0.0567" in rows


def test_the_widest_line_has_every_entropy():
    rows = rows_of(in_terminal(200))
    assert any("H 0.70 0.70 0.70 ; 0.60 0.60 0.60 | 12.3 s" in row and "$19.90" in row for row in rows)
    assert any("time: sampling 65 % (11,250 tokens/s)" in row and "process 3.2 GB" in row for row in rows)


def test_a_model_cannot_write_control_characters():
    shown = in_terminal(120)
    assert "\x1b[2J" not in shown and "\x07" not in shown and r"\x1b[2J\x07ouch" in shown


def test_no_colour_and_dumb_terminals():
    colour = re.compile(r"\x1b\[(3|9|38;|1;3)\d")
    assert not colour.search(in_terminal(100, NO_COLOR="1")) and colour.search(in_terminal(100))
    dumb = in_terminal(100, TERM="dumb")
    assert "\x1b" not in dumb and "held-out tasks, 64 answers each, step_120: 0 s" in dumb


def test_a_file_gets_whole_lines_at_once(tmp_path):
    """Under nohup, into a file: everything is there while the run goes on, without escapes, one line a warning."""
    log = tmp_path / "log"
    command = [*(["nohup"] if shutil.which("nohup") else []), sys.executable, "-c", CHILD, "500"]
    with open(log, "wb") as file:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment())
        start = time.monotonic()
        while b"shown" not in log.read_bytes() and child.poll() is None and time.monotonic() - start < 60:
            time.sleep(0.05)
        text = log.read_text(encoding="utf-8")
        assert child.poll() is None, text  # it is still running
        child.communicate(b"\n", timeout=60)
    assert "\x1b" not in text and "\r" not in text and "\x07" not in text
    assert len(re.findall("^step  10/500   2 % .* 0.60 0.60 0.60 .*left, \\$19.90$", text, re.M)) == 1
    assert len(re.findall("^warning: step 5: .*memory it takes\\)$", text, re.M)) == 1
    assert text.count("64 answers each, step_120") == 1  # no progress bar
    assert "pass@64" in text and "nan" not in text


def test_ascii_locale_does_not_end_a_run():
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "500"],
        input=b"\n",
        capture_output=True,
        timeout=60,
        env=environment(LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
    )
    assert done.returncode == 0, done.stderr.decode()[-800:]
    text = done.stdout.decode("ascii")
    assert "\\xe9t\\xe9" in text and "+---" in text and "shown" in text


@pytest.mark.parametrize("word", ["say", "prose"])
def test_a_reader_that_goes_away_is_an_error_that_can_be_caught(word):
    read, write = os.pipe()
    os.close(read)
    child = f"from azr import console\ntry: console.{word}('x')\nexcept BrokenPipeError: console.note('caught')"
    done = subprocess.run([sys.executable, "-c", child], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "caught\n")


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00 min"), (59.6, "1:00 min"), (3599.4, "59:59 min"), (3600, "1:00 h")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def test_the_table_of_a_run_has_its_modes_and_measures_alone(capsys):
    row = {"solver/math/entropy": 0.5, "solver/math/well_formed_rate": None, "train/loss": 1.0}
    display.training_table([row], [row])
    shown = capsys.readouterr().out
    assert "last step " in shown and "math" in shown and "0.50 -> 0.50" in shown
    assert not any(word in shown for word in ("deduction", "well-formed", "valid"))


def test_averages_of_nothing_are_a_dash():
    rows = [{"a": None, "b": 1.0}, {"b": 2.0}]
    assert (display.average(rows, "a"), display.average(rows, "b")) == ("-", "1.50")
    assert display.numbers([math.nan, 1.0]) == "   - 1.00"


def test_a_model_that_keeps_no_form_is_told_from_one_that_does():
    def proposal(reason, task=None, detail="", end="stop"):
        parsed, completion = Parsed(task is not None, None, reason), Completion([1], [0.0], end)
        return Sample("proposer", "deduction", "", [], completion, "one\x1b[2J two", "", parsed, task, reason, detail)

    good = proposal("ok", Task("deduction", "def f(x):\n    return x", "1", "1"))
    bad = [proposal("no_format")] * 18 + [proposal("trivial", detail="constant")] * 2
    assert display.refusals([good]) == "100 % of 1 valid"
    assert display.refusals([good, *bad]) == "5 % of 21 valid; 18 of 20 refused: no_format (one\\x1b[2J two)"
    config = Config(max_new_tokens=8)
    assert display.keeps_no_form([good, *bad[:19]], config) == ""
    text = display.keeps_no_form([good, *bad], config)
    assert "5 % of 21" in text and "needs a warm start" in text and "--temperature" not in text and "Most" not in text
    # first what a flag may mend
    assert "Try --temperature 1 instead of 2.5. " in display.keeps_no_form([good, *bad], Config(temperature=2.5))
    text = display.keeps_no_form([proposal("no_format", end="length")] * 9 + bad[:8], config)
    assert "Most end at --max-new-tokens 8" in text and "needs a warm start" in text


def test_a_long_phase_says_how_far_it_is_and_a_short_one_nothing(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0, 63.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    advance = console.pulse("step 3, solve", 512, "answers")
    for count in (1, 127, 64, 400, 9):
        advance(count, 31 * count)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 3, solve: 128 of 512 answers, 128 tokens/s, 1:33 min left"
    assert len(lines) == 2 and lines[1].startswith("step 3, solve: 512 of 512")  # what is counted twice is no more
    clock = iter([0.0, 31.0])
    console.pulse("seed, 0", 0, "answers")(1)  # a process whose share was nothing
    assert capsys.readouterr().err == "seed, 0: 0 of 0 answers, 0:00 min left\n"
    clock = iter([0.0, 31.0, 70.0])
    advance = console.pulse("step 4, propose", 2, "responses")
    advance(0, more=6)  # answers have come to the proposals before one of them has ended
    assert capsys.readouterr().err == ""
    advance(2)
    assert capsys.readouterr().err == "step 4, propose: 2 of 8 responses, 3:30 min left\n"
    clock = iter([0.0, 31.0])
    console.pulse("seed-1, propose", 12, "responses")(1, 40)  # the shortest says nothing about the others
    assert capsys.readouterr().err == "seed-1, propose: 1 of 12 responses\n"


def test_on_a_terminal_a_phase_has_one_line_that_goes_away(monkeypatch, capsys):
    for seconds, shown in (([0, 4, 4.5], ""), ([0, 6, 7], "\x1b[Kthe update: 1 of 2 rows, 0:06 min left\r\x1b[K\r")):
        clock = iter(seconds)
        monkeypatch.setattr(console.time, "perf_counter", lambda clock=clock: next(clock))
        monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        advance = console.pulse("the update", 2, "rows")
        advance(1)
        advance(1)
        assert capsys.readouterr().err == shown

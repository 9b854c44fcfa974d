"""What dynamics measures, on runs whose answers are known, and tolerant reading of run directories."""

import json

import numpy as np
import pytest

import analyze
from azr.analysis import dynamics, reader
from azr.runs import RunError
from bench_report import write_run
from in_process import run_here


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "synthetic"
    write_run(path, 20, 6)
    return path


def test_distance_of_trees():
    same, renamed, other, deep, broken = dynamics.profiles(
        [
            "def f(x):\n    return x + 1",
            "def f(value):\n    return value + 2",
            "def f(x):\n    return x[::-1]",
            "def f(x):\n    return " + "(" * 5000 + "x" + ")" * 5000,
            "def f(:",
        ]
    )
    assert dynamics.tree_distance(same, same) == 0
    assert dynamics.tree_distance(same, renamed) == 0
    assert 0.3 < dynamics.tree_distance(same, other) <= 1
    assert dynamics.tree_distance(same, other) == dynamics.tree_distance(other, same)
    assert deep is None and broken is None
    apart = dynamics.tree_distance(same, other)
    assert dynamics.mean_distances([same, renamed, other], 0).tolist() == [apart / 2, apart / 2, apart]
    assert np.isnan(dynamics.mean_distances([same], 0)).all()


def test_length_is_controlled_for_being_right():
    """Right answers have 10 tokens and wrong ones 20 all along, but the solver gets better: no drift of length."""
    rng = np.random.default_rng(0)
    step = np.repeat(np.arange(1, 101), 40)
    correct = rng.random(len(step)) < step / 100
    tokens = np.where(correct, 10, 20) + rng.integers(-2, 3, len(step))
    columns = {"step": step, "tokens": tokens, "correct": correct}
    digest = reader.Digest([], {}, {"deduction": columns}, {}, [])
    found = dynamics.lengths(digest)["deduction"]
    assert found["per_100_steps"]["low"] < 0 < found["per_100_steps"]["high"]
    assert found["right_minus_wrong"]["mean"] == pytest.approx(-10, abs=0.2)
    raw = np.polyfit(step / 100, tokens, 1)[0]
    assert raw < -8  # uncontrolled, it looks as if answers became shorter


def test_numbers_of_a_known_run(run_dir):
    run = reader.read_run(run_dir)
    digest = reader.read_samples(run, (1, 20))
    found = dynamics.dynamics(run, digest, 4)
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    mine = [r for r in rows if r["role"] == "proposer" and r["mode"] == "deduction" and r["step"] <= 5]
    window = found["validity"]["deduction"][0]
    assert window["n"] == len(mine) and window["ok"]["mean"] == pytest.approx(np.mean([bool(r["task"]) for r in mine]))
    assert sum(window["shares"].values()) == pytest.approx(1)
    rates = [r["solve_rate"] for r in mine if r["task"]]
    assert found["solve_rate"]["deduction/first"]["mean"]["mean"] == pytest.approx(np.mean(rates))
    assert found["time"]["update"]["mean"] == 5.0 and found["time"]["update"]["share"] == pytest.approx(5 / 9)
    assert 0 < found["diversity"]["first"]["program_distance"]["mean"] < 1
    assert digest.lines == len(rows) and set(digest.examples) == {(s, m) for s in (1, 20) for m in reader.MODES}
    _, proposal, answer = digest.examples[1, "deduction"]
    assert answer["task"] == proposal["task"]


def test_gaps_tears_and_damage_become_notes(run_dir, tmp_path):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:3] + ["{broken}"] + lines[5:8] + [lines[8][:40]]))
    run = reader.read_run(tmp_path)
    values = run.column("train/log_prob_gap")
    assert (
        run.steps.tolist() == list(range(1, 9)) and np.isnan(values).tolist() == [False] * 3 + [True] * 2 + [False] * 3
    )
    said = " ".join(run.notes)
    assert "torn" in said and "line 4" in said and "2 step(s)" in said and not run.finished
    (tmp_path / "samples.jsonl").write_text((run_dir / "samples.jsonl").read_text()[:30_000] + '\n{"step": 1}\n{"st')
    digest = reader.read_samples(run)
    assert digest.lines > 5 and len(digest.notes) == 3  # torn, cut in the middle, without fields


def test_what_is_no_run_is_refused(run_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"hidden_size": 4}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"model": "ti')
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_text((run_dir / "config.json").read_text())
    (tmp_path / "young" / "metrics.jsonl").write_text('{"step": 1, "tr')
    for name, said in (
        ("none", "no such"),
        ("empty", "is empty"),
        ("foreign", "not a run"),
        ("half", "cannot be read"),
        ("young", "no step"),
    ):
        with pytest.raises(RunError, match=said) as error:
            reader.read_run(tmp_path / name)
        assert "\n" not in str(error.value)
        done = run_here(analyze.main, "dynamics", tmp_path / name)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_command(run_dir, tmp_path):
    files = ("--json", tmp_path / "d.json", "--out", tmp_path / "plots")
    done = run_here(analyze.main, "dynamics", run_dir, *files)
    assert done.returncode == 0, done.stderr
    assert "Share of proposals that are valid" in done.stdout
    assert json.loads((tmp_path / "d.json").read_text())["lengths"]["induction"]["n"] > 0
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3

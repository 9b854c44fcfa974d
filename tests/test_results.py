"""The experiments: every arm is a valid command, the page's tables are those of the files beside it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "results"))

import experiments  # noqa: E402
import tables  # noqa: E402

from azr.config import parse, resolve  # noqa: E402
from azr.passk import Interval  # noqa: E402


@pytest.mark.parametrize("arm", experiments.ARMS)
def test_every_arm_is_a_command(arm, tmp_path):
    (tmp_path / "tiny-half").symlink_to(ROOT / "azr" / "tiny")
    for name in ("tasks.jsonl", "gold.jsonl"):
        (tmp_path / name).touch()
    settings = experiments.ARMS[arm]
    flags = ["--model", settings.model.format(runs=tmp_path), *experiments.COMMON]
    config, _ = resolve(parse(flags + settings.flags.format(runs=tmp_path).split(), ""))
    assert config.steps == experiments.STEPS and config.steps % config.eval_every == 0


def test_the_order_has_every_run_and_ends_with_what_each_needs():
    last = {(arm, seed): samples for arm, seed, samples in experiments.order()}
    assert last == {(a, seed): s.wanted(seed) for a, s in experiments.ARMS.items() for seed in range(s.seeds)}
    assert last["joint", 2] == experiments.WIDE and last["joint", 3] == experiments.NARROW


def test_the_page_is_what_the_files_say(tmp_path):
    arms, text = tables.load(), (ROOT / "RESULTS.md").read_text()
    assert text == tables.filled(text, arms)
    first = json.loads((ROOT / "results" / "joint" / "0.json").read_text())
    first["held_out"]["correct"] = [0] * len(first["held_out"]["correct"])
    arms["joint"][0] = first
    assert text != tables.filled(text, arms)
    with pytest.raises(ValueError, match="no <!-- sharpening -->"):
        tables.fill("", "sharpening", "")


def test_results_of_a_run(tmp_path):
    """Counts per task are sorted by id, numbers are short, and what was written is what is read."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text(json.dumps({"samples_per_problem": 2, "decoding": {}, "quantization": "none"}))
    rows = [("deduction/b", 0, True, "1"), ("abduction/a", 0, True, "[1,2]"), ("abduction/a", 1, True, "[1, 2]"),
            ("deduction/b", 1, False, "2")]  # fmt: skip
    (out / "graded.jsonl").write_text("".join(
        json.dumps({"task_id": task, "sample": i, "correct": right, "answer": answer}) + "\n"
        for task, i, right, answer in rows))  # fmt: skip
    found = experiments.counts(out)
    assert found["n"] == 2 and found["correct"] == [2, 1] and found["distinct_correct"] == [1, 1]
    assert found["commonest"] == {"abduction": ["[1,2]", 0.5], "deduction": ["1", 0.5]}
    experiments.write(tmp_path / "x.json", {"a": 1 / 3, "b": [{"c": 2.0}]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 0.3333, "b": [{"c": 2.0}]}


def test_set_figures_and_pooled_spread():
    a, b = np.array([1.0, 1.0, 0.0, 0.5]), np.array([1.0, 0.0, 1.0, 0.5])
    srr, ndr = tables.sets(a, b)
    assert srr == pytest.approx(1.25 / 2.5) and ndr == pytest.approx(1.25 / 2.5)
    pooled = tables.Pooled({"x": [1.0, 3.0], "y": [5.0, 5.0, 8.0], "z": [2.0]})
    assert pooled.freedom == 3 and pooled.sd == pytest.approx(np.sqrt((2 + 6) / 3))
    alone, pair = pooled.mean("z"), pooled.mean("x")
    assert alone.mean == 2 and (alone.high - 2) == pytest.approx((pair.high - 2) * np.sqrt(2))
    assert pooled.minus("y", "x").mean == pytest.approx(4)
    assert pooled.p_value(3.182) == pytest.approx(0.05, abs=2e-3) and pooled.p_value(0) == pytest.approx(1, abs=2e-3)
    far = tables.Pooled({"joint": [0.0, 0.1, 0.2], "a": [0.1, 0.2], "b": [5.0, 5.1], "c": [1.0]})
    assert far.standing(["a", "b"]) == "b (+4.950) of 2" and far.standing(["a"]) == "none of 1"
    assert tables.show(Interval(0.1, 0.05, 0.2)).startswith("**+0.100") and tables.show(Interval(np.nan, 0, 0)) == ""


def test_error_from_the_answers():
    """k = 1: the binomial's own; two samples halve the variance."""
    sample = {"held_out": {"n": 100, "correct": [20, 50, 0, 100]}}
    expected = np.sqrt((0.2 * 0.8 + 0.5 * 0.5) / 100) / 4
    assert tables.answer_error([sample], 1, 4000) == pytest.approx(expected, rel=0.05)
    assert tables.answer_error([sample] * 2, 1, 4000) == pytest.approx(expected / np.sqrt(2), rel=0.05)


def test_without_results_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.main() == 2 and "experiments.py run" in capsys.readouterr().err


def test_a_name_that_is_no_run(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments.py", "run", "joint/first"])
    assert experiments.main() == 2 and "no ARM/SEED" in capsys.readouterr().err

"""The experiments: every arm is a valid command, the page's tables are those of the files beside it."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "results"))

import experiments
import seed_references
import tables
from azr.passk import Interval
from azr.tasks import Buffers, Task
from azr.train.config import Config, parse, resolve


@pytest.mark.parametrize("arm", experiments.ARMS)
def test_every_arm_is_a_command(arm, tmp_path):
    (tmp_path / "tiny-half").symlink_to(ROOT / "azr" / "tiny")
    for name in ("tasks.jsonl", "gold.jsonl"):
        (tmp_path / name).touch()
    settings = experiments.ARMS[arm]
    flags = ["--model", settings.model.format(runs=tmp_path), *experiments.COMMON]
    config, _ = resolve(parse(flags + settings.flags.format(runs=tmp_path).split(), ""))
    assert config.steps == experiments.STEPS and config.steps % config.eval_every == 0


def test_references_of_the_seed_stage_alone():
    usual, seed = Buffers(), seed_references.SeedBuffers()
    made = [Task("deduction", f"def f(x):\n    return x + {i}", "1", str(1 + i)) for i in range(1, 13)]
    for task in made[:6]:
        assert usual.add(task, 0) and seed.add(task, 0)

    def draws(buffers):
        rng = random.Random(0)
        return [(buffers.sample("deduction", 4, rng), buffers.sample_program(rng)) for _ in range(20)]

    before = draws(usual)
    assert draws(seed) == before  # until something newer comes the two are the same
    for task in made[6:]:
        assert usual.add(task, 1) and seed.add(task, 1)
    seed.load_state_dict(seed.state_dict())  # as a resume does
    assert draws(seed) == before != draws(usual) and seed.size("deduction") == 12 and not seed.add(made[7], 2)
    assert experiments.ARMS["seed-references"].flags == experiments.ARMS["fresh"].flags
    settings = (Config(), Config(solver_tasks="fresh"), Config(solver_tasks="fresh", algorithm="rlvr"))
    assert [seed_references.SeedReferences.refuses(c)[0][0] for c in settings] == [True, False, True]


def test_the_order_has_every_run_and_ends_with_what_each_needs():
    last = {(arm, seed): samples for arm, seed, samples in experiments.order()}
    assert last == {(a, seed): s.wanted(seed) for a, s in experiments.ARMS.items() for seed in range(s.seeds)}
    assert last["joint", 2] == experiments.WIDE and last["joint", 3] == experiments.NARROW


def made_up(arm: str, seed: int, gain: float) -> dict:
    """A file of results as experiments.py writes it: 12 tasks, one answer in four right, `gain` more after training."""
    rng, n = np.random.default_rng([seed, len(arm)]), 512
    held_out = {
        "n": n,
        "correct": [int(x) for x in rng.binomial(n, 0.25 + gain, 12)],
        "distinct_correct": [2] * 12,
        "commonest": {mode: ["0", 0.3] for mode in tables.MODES},
    }
    if arm == "base":
        return {"arm": arm, "seed": seed, "held_out": held_out}
    noise = lambda mean: float(mean + 0.01 * rng.standard_normal())  # noqa: E731
    sizes = {"S1": 0.9, "S2": 0.9, "U1_rms": noise(0.02), "S5": {"excess": 0.0, "null": 0.9}}
    step = lambda: sizes | {"U1_rel_fro": noise(0.1), "skill": noise(0.8), **{k: noise(0.1) for k in KLS}}  # noqa: E731
    ends = lambda value: [{"mean": noise(value)} for _ in range(4)]  # noqa: E731
    names = [*experiments.SERIES, "proposer/all/entropy", "solver/all/entropy"]
    return {
        "arm": arm,
        "seed": seed,
        "flags": "",
        "held_out": held_out,
        "skill_base": 0.9,
        "series": {name: [noise(0.5) for _ in range(20)] for name in names},
        "checkpoints": {at: step() for at in ("40", "80")},
        "probe_entropy": {at: {"proposer/all": noise(0.5), "solver/all": noise(0.5)} for at in ("0", "40", "80")},
        "update": {"adapted": sizes | {"at_rms_3e-5": sizes, "R1_effective_rank": 12.0}},
        "greedy": {"accuracy": {"80": [noise(0.3)] * 3}},
        "diversity": [{"program_distance": noise(0.5)}],
        "solve_rate": {f"{mode}/last": [1, *[2] * 7, 1] for mode in tables.MODES},
        "difficulty": {
            "solvers": ["base", "80"],
            "rate": {"base": ends(0.3), "80": ends(0.4)},
            "tokens": {"base": ends(12)},
            "logged_rate": ends(0.3),
        },
    }


KLS = ("kl_forward/solver", "kl_forward/untrained", "kl_reverse/solver")


def test_tables_and_plots_of_the_page_from_files(tmp_path, monkeypatch):
    """Every table has its place in RESULTS.md; a planted gain comes back in the first one, bold."""
    (tmp_path / "RESULTS.md").write_text((ROOT / "RESULTS.md").read_text())
    (tmp_path / "results").mkdir()
    gains = {"joint": 0.2, "rlvr": 0.2} | dict.fromkeys(("base", "no-update", "frozen-base", "half-peak"), 0)
    for arm, gain in gains.items():
        for seed in range(3):
            experiments.write(tmp_path / "results" / arm / f"{seed}.json", made_up(arm, seed, gain))
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    assert tables.main() == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert page == tables.filled(page, tables.load())
    for make in tables.TABLES:
        assert len(page.partition(f"<!-- {make.__name__} -->")[2].partition("<!-- end -->")[0]) > 100, make
    joint, frozen = (tables.gain(tables.load(), arm, 1).mean() for arm in ("joint", "frozen-base"))
    assert joint == pytest.approx(0.2, abs=0.02) and frozen == pytest.approx(0, abs=0.02)
    assert f"**{joint:+.3f} [" in page and f"**{frozen:+.3f} [" not in page
    assert len(list((tmp_path / "results" / "plots").glob("*.png"))) == 5
    with pytest.raises(ValueError, match="no <!-- sharpening -->"):
        tables.fill("", "sharpening", "")


def test_the_page_is_what_the_files_say():
    """Where there are results: what stands in RESULTS.md was made from them."""
    arms, text = tables.load(), (ROOT / "RESULTS.md").read_text()
    assert all(text.count(f"<!-- {make.__name__} -->") == 1 for make in tables.TABLES)
    assert not arms or text == tables.filled(text, arms)


def test_results_of_a_run(tmp_path):
    """Counts per task are sorted by id, numbers are short, and what was written is what is read."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text(json.dumps({"samples_per_problem": 2, "decoding": {}, "quantization": "none"}))
    rows = [
        ("deduction/b", 0, True, "1"),
        ("abduction/a", 0, True, "[1,2]"),
        ("abduction/a", 1, True, "[1, 2]"),
        ("deduction/b", 1, False, "2"),
    ]
    (out / "graded.jsonl").write_text(
        "".join(
            json.dumps({"task_id": task, "sample": i, "correct": right, "answer": answer}) + "\n"
            for task, i, right, answer in rows
        )
    )
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

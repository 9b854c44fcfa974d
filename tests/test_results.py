"""The experiments: every arm is a valid command, the page's tables are those of the files beside it."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "results"))

import experiments
import findings
import gate_base
import measure
import measured
import other_operations
import reach
import seed_references
from azr.fits import over_runs
from azr.passk import Interval
from azr.tasks import Buffers, Task, judge
from azr.tiny import operations
from azr.tiny.operations import kind_of
from azr.train.config import Config, parse, resolve
from sandbox import Sandbox

FEW = len(measured.few_tasks())
TASKS = len(measured.tasks())


@pytest.mark.parametrize("arm", experiments.ALL)
def test_every_arm_is_a_command(arm, tmp_path):
    (tmp_path / "tiny-half").symlink_to(ROOT / "azr" / "tiny")
    (tmp_path / "tiny-nf4").symlink_to(ROOT / "azr" / "tiny")
    for name in (*experiments.FILES, "worded", "operations", "proposed-5"):
        (tmp_path / f"{name}.jsonl").touch()
    settings = experiments.ALL[arm]
    flags = ["--model", settings.model.format(runs=tmp_path), "--steps", str(settings.steps), *experiments.COMMON]
    config, _ = resolve(parse(flags + settings.flags.format(runs=tmp_path, seed=settings.first).split(), ""))
    assert config.steps == settings.steps and (arm in experiments.FULL) == (config.train == "full")


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


def test_a_wording_that_the_base_never_saw(tmp_path):
    row = {"mode": "deduction", "response": "p=5+3=8;q=p;len([8])>1 no;</think><answer>```output\n8\n```\n</answer>"}
    (tmp_path / "traces.jsonl").write_text(json.dumps(row) + "\n")
    experiments.reword(tmp_path / "traces.jsonl", tmp_path / "worded.jsonl")
    (made,) = map(json.loads, (tmp_path / "worded.jsonl").read_text().splitlines())
    assert made["response"] == row["response"].replace("p=5+3=8", "8=5+3=p") and made["mode"] == "deduction"


def test_other_operations_are_right_and_other(tmp_path):
    """What their texts do in the sandbox is what their functions say; the embedded model saw none of them."""
    tables = ("OPERATIONS", "LOOPS", "TESTS")
    kinds = [{kind_of(entry) for name in tables for entry in getattr(m, name)} for m in (other_operations, operations)]
    assert not kinds[0] & kinds[1]
    file = tmp_path / "others.jsonl"
    command = [sys.executable, ROOT / "results" / "other_operations.py", "make", "tiny", file, "--count", "30"]
    subprocess.run(command, check=True, capture_output=True)
    made = [Task.from_json(json.loads(line)) for line in file.read_text().splitlines()]
    pairs = [(task, task.program) for task in made if task.mode == "induction"]
    # the output of a deduction would be believed: its program is run, as for an abduction
    pairs += [(replace(task, mode="abduction"), task.input) for task in made if task.mode != "induction"]
    with Sandbox(workers=1) as sandbox:
        assert all(verdict.ok for verdict in judge(pairs, sandbox)) and len(pairs) == 90


# ---------------------------------------------------------------- tables


def made_up(arm: str, seed: int, gain: float, light: bool = False) -> dict:
    """A file of results as measure.py writes it: one answer in four right, `gain` more after training."""
    rng = np.random.default_rng([seed, len(arm)])

    def answers(n: int) -> dict:
        return {"n": n, "right": rng.binomial(n, 0.25 + gain, FEW).tolist(), "traced": [0] * FEW, "tokens": 9.0}

    right = "".join(map(str, rng.binomial(1, 0.25 + gain, TASKS)))
    result = {"arm": arm, "seed": seed, "greedy": {"right": right, "style": "3" * TASKS, "tokens": [9.0] * 7}}
    result["sampled"] = {} if light else {"1": answers(64), "0.8": answers(32), "0.6": answers(32)}
    result["sampled"] |= {} if light else {"0.4": answers(32), "0.2": answers(32)}
    if arm == "base":
        return result
    noise = lambda mean: float(mean + 0.01 * rng.standard_normal())  # noqa: E731
    rate = lambda: {"mean": noise(0.4), "low": 0.3, "high": 0.5, "n": 9}  # noqa: E731
    lengths = {"programs": [9] * 8, "statements": [noise(2) for _ in range(8)], "depth": [noise(7) for _ in range(8)]}
    result |= {
        "flags": "",
        "model": "tiny",
        "proposals": None if arm == "rlvr" else {**lengths, "base_rate": [rate(), rate()]},
    }
    result["series"] = {name: [noise(0.5) for _ in range(8)] for name in measure.SERIES}
    if not light:
        sizes = {"S0": 0.0, "S1": noise(0.9), "S2": 0.9, "U1_rms": 0.02, "U1_rel_fro": noise(0.1)}
        result["update"] = sizes | {"S5": {"excess": noise(0), "low": -1, "high": 1}, "at_rms_3e-5": {"S1": 0.9}}
        result["probe"] = {step: {"proposer/all": noise(0.9), "solver/all": noise(0.3)} for step in ("0", "80")}
        kl = {"kl_forward/solver": noise(0.1), "kl_forward/untrained": noise(0.1)}
        result["forgetting"] = {**kl, "skill_base": 0.9, "skill": noise(0.8)}
    return result


def full(name: str) -> dict:
    """A file of a training of every weight."""
    result = made_up("joint", 0, 0.0) | {"arm": name, "accuracy": {"0": 0.2, "40": 0.3}}
    return {key: result[key] for key in ("arm", "seed", "accuracy", "update", "series")}


def test_tables_and_plots_of_the_page_from_files(tmp_path, monkeypatch):
    """Every table has its place in RESULTS.md; a planted gain comes back in the first one, bold."""
    (tmp_path / "RESULTS.md").write_text((ROOT / "RESULTS.md").read_text())
    (tmp_path / "results").mkdir()
    for name in ("tiny", "reach.json"):
        (tmp_path / "results" / name).symlink_to(ROOT / "results" / name)
    (tmp_path / "azr").symlink_to(ROOT / "azr")
    gains = {"joint": 0.2, "rlvr": 0.2} | dict.fromkeys(("base", "no-update", "uniform"), 0)
    for arm, gain in gains.items():
        for seed in range(3):
            path = tmp_path / "results" / "arms" / f"{arm}-{seed}.json"
            measure.write(path, made_up(arm, seed, gain, light=arm == "uniform"))
    for name in ("full-joint-1e-6-bf16", "full-sft-worded-1e-4-fp32"):
        measure.write(tmp_path / "results" / "arms" / f"{name}-0.json", full(name))
    monkeypatch.setattr(findings, "RESULTS", tmp_path / "results")
    assert findings.main() == 0
    page, arms = (tmp_path / "RESULTS.md").read_text(), measured.load(findings.RESULTS / "arms")
    assert page == findings.filled(page, arms)
    for make in findings.TABLES:
        assert len(page.partition(f"<!-- {make.__name__} -->")[2].partition("<!-- end -->")[0]) > 100, make
    base = np.mean(measured.greedy(arms["base"][0]))
    joint, still = (np.mean([measured.greedy(r).mean() for r in arms[arm]]) - base for arm in ("joint", "no-update"))
    assert joint == pytest.approx(0.2, abs=0.03) and still == pytest.approx(0, abs=0.03)
    assert f"**+{joint:.3f} [".replace("0.", ".") in page and "| no-update | 3 | **-" in page
    assert len(list((tmp_path / "results" / "plots").glob("*.png"))) == 5
    with pytest.raises(ValueError, match="no <!-- learned -->"):
        findings.fill("", "learned", "")


def test_tasks_out_of_reach(tmp_path, monkeypatch):
    """With few tries: tasks never solved are asked again, of another sample and of the base made to think."""
    monkeypatch.setattr(reach, "LOOKS", [1, 2])
    monkeypatch.setattr(reach, "TRIES", 3)
    monkeypatch.setattr(reach, "OTHERS", (0.6,))
    monkeypatch.setattr(reach, "asked", lambda lab: [i for i in lab.part(1) if lab.tasks[i].mode != "induction"])
    reach.measure({}, tmp_path / "reach.json")
    text = (tmp_path / "reach.json").read_text()
    parts = json.loads(text)["parts"]
    found = {place: (n, right) for place, n, right in parts["base"]["rows"]}
    never = [place for place, (_, right) in found.items() if not right]
    assert len(found) == 14 and {n for n, _ in found.values()} == {1, 2} == {found[place][0] for place in never} | {1}
    assert [(place, n) for place, n, _ in parts["base again"]["rows"]] == [(place, 2) for place in never]
    forced = parts["base made to think"]["rows"]
    assert [place for place, *_ in forced] == [i for i in never if measured.tasks()[i].mode == "deduction"]
    reach.measure({}, tmp_path / "reach.json")  # nothing is made again
    assert (tmp_path / "reach.json").read_text() == text

    planted = {"base": {"rows": [[0, 16, 3], [1, 1024, 0], [2, 1024, 0], [700, 1024, 0]]}}
    planted["joint/0"] = {"rows": [[1, 256, 1], [2, 256, 3], [700, 256, 0]], "tokens": 40.0}
    planted["joint/1"] = {"rows": [[1, 256, 0], [2, 256, 3], [700, 256, 0]], "tokens": 50.0}
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    (tmp_path / "reach.json").write_text(json.dumps({"parts": planted}))
    monkeypatch.setattr(findings, "MODES", ("deduction", "abduction"))
    modes = [measured.tasks()[i].mode for i in (0, 1, 2, 700)]
    assert modes == ["deduction"] * 3 + ["abduction"]
    assert "| joint (2) | 256 | 45 | 1.5, 1.0 | 0.0, 0.0 |" in findings.leash({})


def test_the_page_is_what_the_files_say():
    """What stands in RESULTS.md was made from the results."""
    arms, text = measured.load(findings.RESULTS / "arms"), (ROOT / "RESULTS.md").read_text()
    assert all(text.count(f"<!-- {make.__name__} -->") == 1 for make in findings.TABLES)
    assert text == findings.filled(text, arms)
    assert (measured.FEW_A_CELL, measured.WINDOW) == (gate_base.FEW_A_CELL, measure.WINDOW)  # copied: no torch there


def test_ten_numbers_of_the_page_come_back_from_the_files():
    """Recomputed without the code that made the tables, from results/arms alone."""
    files = [json.loads(path.read_text()) for path in (ROOT / "results" / "arms").glob("*.json")]
    text = (ROOT / "RESULTS.md").read_text()
    of = lambda arm: sorted((f for f in files if f["arm"] == arm), key=lambda f: f["seed"])  # noqa: E731
    table = lambda name: text.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]  # noqa: E731
    row = lambda name, arm: next(line for line in table(name).splitlines() if line.startswith(f"| {arm} "))  # noqa: E731
    numbers = lambda line: [float(x) for x in re.findall(r"[-+]?\d*\.\d+", line)]  # noqa: E731
    share = lambda f: f["greedy"]["right"].count("1") / len(f["greedy"]["right"])  # noqa: E731

    def pass_at(f, k):
        n = f["sampled"]["1"]["n"]
        return np.mean([1 - comb(n - c, k) / comb(n, k) for c in f["sampled"]["1"]["right"]])

    for arm in ("joint", "no-update", "frozen-base", "rlvr"):
        mean = np.mean([share(f) for f in of(arm)])
        assert numbers(row("learned", arm))[0] == pytest.approx(mean, abs=6e-4)
        for k, place in ((1, 0), (32, 15)):
            gain = np.mean([pass_at(f, k) for f in of(arm)]) - np.mean([pass_at(f, k) for f in of("base")])
            assert numbers(row("coverage", arm))[place] == pytest.approx(gain, abs=6e-4)


def test_one_more_temperature_beside_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    before = made_up("base", 0, 0.0)
    measure.write(tmp_path / "arms" / "base-0.json", before)
    monkeypatch.setattr(measure, "sampled", lambda lab, temperature, n: {"n": n, "T": temperature, "by": lab.seed})
    experiments.hotter("base", 0, tmp_path, 1.2)
    after = json.loads((tmp_path / "arms" / "base-0.json").read_text())
    assert after["sampled"].pop("1.2") == {"n": measure.ANSWERS, "T": 1.2, "by": 0} and after == before


def test_numbers_are_short_and_come_back(tmp_path):
    measure.write(tmp_path / "x.json", {"a": 1 / 3, "b": [{"c": 2.0}], "d": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 0.3333, "b": [{"c": 2.0}], "d": None}


def test_pairs_of_seeds_and_what_an_interval_allows():
    arms = {"a": [{"seed": 0, "x": 1.0}, {"seed": 2, "x": 4.0}], "b": [{"seed": s, "x": float(s)} for s in range(3)]}
    assert measured.paired(arms, "a", "b", lambda r: r["x"]) == over_runs([1.0, 2.0])
    cases = {(0.1, 0.05, 0.2): "more", (-0.1, -0.2, -0.05): "less", (0, -0.02, 0.02): "alike"}
    cases |= {(0, -0.1, 0.1): "cannot tell", (0.02, 0.01, 0.025): "more, and alike within the margin"}
    assert {ends: findings.verdict(Interval(*ends), 0.03) for ends in cases} == cases
    assert measured.show(Interval(0.1, 0.05, 0.2)) == "**+.100 [+.050, +.200]**"
    assert measured.show(Interval(np.nan, 0, 0)) == "-" and measured.show(Interval(-0.5, np.nan, np.nan)) == "-.500"


def test_depth_of_a_program():
    assert measure.depth("x") == 4 and measure.depth("def f(x):\n    return x + (x + 1)") > measure.depth("x+1")


def test_without_results_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    assert findings.main() == 2 and "experiments.py run" in capsys.readouterr().err


def test_a_name_that_is_no_run(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments.py", "run", "joint/first"])
    assert experiments.main() == 2 and "no ARM/SEED" in capsys.readouterr().err

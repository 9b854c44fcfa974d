"""Forgetting: what the fits say on made-up checkpoints, and a whole measurement on the embedded model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
from azr.analysis import forgetting
from azr.analysis.reader import RunData
from azr.evals import held_out
from azr.policy.policy import LoraSettings, Policy
from azr.tasks.prompts import template_hash
from in_process import run_here

ROOT = Path(__file__).parents[2]
TINY = ROOT / "azr" / "tiny"


def made_up(seed: int, law) -> dict:
    """Measurements of ten checkpoints: S1 and KL vary on their own; the skill falls by law(kl, s1)."""
    rng, questions = np.random.default_rng(seed), 400
    rows = {}
    for step in range(10, 110, 10):
        kl, s1 = rng.uniform(0, 1), rng.uniform(0, 1)
        right = rng.random(questions) < 0.9 - law(kl, s1)
        row = {f"kl_forward/{kind}": {"mean": kl * (1 + 0.1 * i)} for i, kind in enumerate(forgetting.KINDS)}
        rows[step] = row | {
            "S1": s1,
            "S5": {"excess": rng.normal()},
            "U1_rel_fro": kl**0.5,
            "scores": {"skill": right.tolist()},
        }
    return {"base": {"skill": [1] * 360 + [0] * 40}, "checkpoints": rows}


def test_kl_that_predicts_and_sparsity_that_does_not():
    measured = {f"run-{i}": made_up(i, lambda kl, s1: 0.5 * kl) for i in range(3)}
    found = forgetting.fits(measured)["skill"]
    assert found["n"] == 30 and found["runs"] == 3
    predictors = found["predictors"]
    assert predictors["kl_forward/solver"]["r2"]["low"] > 0.85
    assert predictors["kl_forward/solver"]["slope"]["mean"] == pytest.approx(0.5 / 1.1, abs=0.05)
    assert predictors["S1"]["r2"]["mean"] < 0.3 and predictors["S5"]["n"] == 30
    assert "kl_reverse/solver" not in predictors  # was not measured


def test_sparsity_that_predicts_is_found_too():
    measured = {f"run-{i}": made_up(i, lambda kl, s1: 0.5 * s1) for i in range(3)}
    found = forgetting.fits(measured)["skill"]
    assert found["predictors"]["S1"]["r2"]["low"] > 0.85 > found["predictors"]["kl_forward/solver"]["r2"]["mean"]


def test_a_full_update_has_no_column_of_nan(capsys):
    """S5 of full-rank updates is not measured here (azr/weights/sparsity.py, without --spectral)."""
    entry = made_up(0, lambda kl, s1: 0.5 * kl)
    for row in entry["checkpoints"].values():
        row["S5"] = None
    measured = {"run": entry}
    forgetting.print_result(measured, forgetting.fits(measured))
    shown = capsys.readouterr().out
    assert "nan" not in shown and shown.count("analyze.py sparsity --spectral") == 1
    run = RunData(Path("run"), {}, [])
    assert len(forgetting.draw([run], measured, {})["forgetting_skill"].axes) == 4  # KL twice, size, S1


def test_drops_are_paired_and_positive_when_worse():
    entry = {"base": {"skill": [1, 1, 1, 0] * 25}, "checkpoints": {5: {"scores": {"skill": [1, 0, 1, 1] * 25}}}}
    assert forgetting.drops(entry)["skill"][5]["mean"] == 0
    entry["checkpoints"][5]["scores"]["skill"] = [0, 1, 1, 0] * 25
    row = forgetting.drops(entry)["skill"][5]
    assert row["mean"] == pytest.approx(0.25) and row["low"] > 0 and row["n"] == 100


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose checkpoint at step 1 changes nothing and at step 2 much."""
    path = tmp_path_factory.mktemp("runs") / "two"
    policy = Policy.load(str(TINY), "none", LoraSettings(rank=4, alpha=8), seed=0)
    info = policy.info | {"template": "tiny", "template_hash": template_hash("tiny")}
    generator = torch.Generator().manual_seed(0)
    for step, size in ((0, 0.0), (1, 0.0), (2, 0.2)):
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.data = size * torch.randn(parameter.shape, generator=generator)
        policy.save_adapter(path / "checkpoints" / f"step_{step}")
        (path / "checkpoints" / f"step_{step}" / "azr.json").write_text(json.dumps(info))
    config = {"model": "tiny", "seed": 0, "steps": 2, "temperature": 1.0, "max_new_tokens": 24, "max_batch": 512}
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    prompt = "User: {} deduction\n```python\ndef f(x):\n    return x+1\n```\n```input\n3\n```\nAssistant: <think>"
    rows = [
        {"role": role, "mode": "deduction", "prompt": prompt.format(verb), "response": "</think><answer>"}
        for role, verb in (("proposer", "propose"), ("solver", "solve"))
        for _ in range(4)
    ]
    (path / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_command(*flags):
    return run_here(analyze.main, "forgetting", *flags)


def test_a_whole_measurement(run_dir, tmp_path, monkeypatch):
    honest = held_out.load_tasks
    monkeypatch.setattr(held_out, "load_tasks", lambda path: honest(path)[:40])  # of the 200 questions of the skill
    done = run_command(run_dir, "--held-out", 0, "--probe", 4, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "forgetting.json").read_text())["runs"][str(run_dir)]
    none, much = found["checkpoints"]["1"], found["checkpoints"]["2"]
    for kind in forgetting.KINDS:
        for way in ("forward", "reverse"):
            assert none[f"kl_{way}/{kind}"]["mean"] == 0 < much[f"kl_{way}/{kind}"]["mean"]
    assert none["scores"] == found["base"] and none["U1_rel_fro"] == 0 < much["U1_rel_fro"]
    assert sum(much["scores"]["skill"]) < sum(found["base"]["skill"])
    assert (tmp_path / "forgetting_skill.png").is_file() and "Too few checkpoints" in done.stdout
    again = run_command(run_dir, "--held-out", 0, "--probe", 4)
    assert again.returncode == 0 and "are taken from" in again.stderr


def test_bad_input_is_one_line(run_dir, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model": "tiny", "seed": 0}')
    (tmp_path / "bare" / "metrics.jsonl").write_text('{"step": 1}\n')
    for flags in (
        (tmp_path / "bare",),
        (tmp_path,),
        (run_dir, "--text", tmp_path / "none.txt"),
        (run_dir, "--probe", 0),
    ):
        done = run_command(*flags)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr

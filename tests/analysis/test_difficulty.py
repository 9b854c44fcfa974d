"""Harder tasks told from a weaker solver: on tables with known answers, and end to end with the embedded model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
from azr.analysis import difficulty
from azr.evals.held_out import evaluate, load_tasks
from azr.policy.policy import LoraSettings, Policy, Sampling
from azr.tasks import STOP
from azr.tasks.prompts import template_hash
from in_process import run_here
from sandbox import Sandbox

ROOT = Path(__file__).parents[2]
TINY = ROOT / "azr" / "tiny"


def table(first, last, solver_change, tasks=150, seed=0):
    """Two stages; the base solves `first` and `last` of them, the final solver `solver_change` more of each."""
    rng = np.random.default_rng(seed)
    stage = np.repeat([0, 1], tasks)
    chance = np.where(stage == 0, first, last)
    rates, tokens, spread = {}, {}, rng.normal(0, 0.15, 2 * tasks)
    for i, name in enumerate(("base", "step_50", "step_100")):
        own = np.clip(chance + spread + solver_change * i / 2, 0, 1)
        rates[name] = rng.binomial(8, own) / 8
        tokens[name] = rng.normal(20, 3, 2 * tasks)
    mode = np.array(["deduction", "abduction", "induction"] * (2 * tasks // 3))
    # what training would log: the base in the first stage, the final solver in the last
    logged = np.where(stage == 0, rates["base"], rates["step_100"])
    return difficulty.Table(stage, 1 + 99 * stage, mode, rates, tokens, logged)


def test_harder_tasks_are_told_from_a_weaker_solver():
    harder, weaker, both, neither = (
        difficulty.analyse(table(*values))
        for values in ((0.6, 0.4, 0), (0.5, 0.5, -0.25), (0.6, 0.4, 0.2), (0.5, 0.5, 0))
    )
    assert "get harder" in harder["verdict"][0] and "No change of the solver" in harder["verdict"][1]
    assert "No change of difficulty" in weaker["verdict"][0] and "gets weaker" in weaker["verdict"][1]
    # what is logged falls in both, and cannot tell them apart
    assert harder["logged_change"]["high"] < 0 and weaker["logged_change"]["high"] < 0
    assert "get harder" in both["verdict"][0] and "gets stronger" in both["verdict"][1]
    assert both["logged_change"]["low"] < 0 < both["logged_change"]["high"]  # and here it shows nothing
    assert "No change of difficulty" in neither["verdict"][0] and "No change of the solver" in neither["verdict"][1]


def test_the_split_adds_up_and_carries_n():
    result = difficulty.analyse(table(0.7, 0.4, 0.1))
    total = result["rate"]["step_100"][1]["mean"] - result["rate"]["base"][0]["mean"]
    assert result["split"]["tasks"]["mean"] + result["split"]["solver"]["mean"] == pytest.approx(total)
    assert result["tasks"]["n"] == 150 and result["trend_per_100_steps"]["high"] < 0
    assert sum(row["n"] for row in result["tasks_by_mode"].values()) == 150


def test_a_change_that_the_base_does_not_share_is_no_change_of_difficulty():
    """The final solver was trained on the last stage's tasks: that it solves them proves nothing about them."""
    own = table(0.3, 0.3, 0)
    last = own.stage == 1
    own.rates["step_100"][last] = np.minimum(1, own.rates["step_100"][last] + 0.5)
    own.rates["base"][last] = np.maximum(0, own.rates["base"][last] - 0.03)
    verdict = " ".join(difficulty.analyse(own)["verdict"])
    assert "get easier" not in verdict and "lead over the base grows" in verdict


@pytest.fixture(scope="module")
def ranked():
    """Held-out tasks of the embedded model in order of how often it solves them, easiest first."""
    tasks = [task for task in load_tasks(TINY / "held_out.jsonl") if task.mode != "induction"][::20]
    policy = Policy.load(str(TINY), "none", max_batch=512)
    sampling = Sampling(1.0, max_new_tokens=96, stop=(STOP,))
    with Sandbox() as sandbox:
        done = evaluate(policy, tasks, 12, sampling, "tiny", sandbox, seed=5)
    order = np.argsort([-row.correct for row in done.tasks], kind="stable")
    return [tasks[i] for i in order]


def write_run(path: Path, stages: list[list], damage: float, logged: list[float]) -> Path:
    """A run of 10 steps; its tasks come from `stages`; the last checkpoint's adapter is random with size `damage`."""
    policy = Policy.load(str(TINY), "none", LoraSettings(rank=4, alpha=8), seed=0)
    info = policy.info | {"template": "tiny", "template_hash": template_hash("tiny")}
    generator = torch.Generator().manual_seed(0)
    for step, size in ((0, 0.0), (5, damage / 2), (10, damage)):
        directory = path / "checkpoints" / f"step_{step}"
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.data = size * torch.randn(parameter.shape, generator=generator)
        policy.save_adapter(directory)
        (directory / "azr.json").write_text(json.dumps(info))
    config = {"model": "tiny", "seed": 0, "steps": 10, "temperature": 1.0, "max_new_tokens": 96, "max_batch": 512}
    (path / "config.json").write_text(json.dumps(config))
    metrics = [{"step": s, "held_out/all/accuracy": 0.2, "solver/deduction/response_tokens": 9.0} for s in range(1, 11)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    with open(path / "samples.jsonl", "w") as file:
        for number, tasks in enumerate(stages):
            for i, task in enumerate(tasks):
                row = {"step": 1 + 5 * number + i % 5, "role": "proposer", "mode": task.mode, "task": task.to_json()}
                file.write(json.dumps(row | {"solve_rate": logged[number], "reason": "ok"}) + "\n")
    return path


def run_command(path: Path, *flags):
    return run_here(analyze.main, "difficulty", path, *flags)


FLAGS = ("--stages", 2, "--mode", "deduction", "abduction", "--questions", 40, "--answers", 4)


def test_a_run_whose_tasks_get_harder(ranked, tmp_path):
    third = len(ranked) // 3
    run = write_run(tmp_path / "run", [ranked[:third], ranked[-third:]], 0.0, [0.5, 0.1])
    done = run_command(run, *FLAGS, "--json", tmp_path / "d.json")
    assert done.returncode == 0, done.stderr
    assert "The proposals get harder" in done.stdout and "No change of the solver" in done.stdout, done.stdout
    again = run_command(run, *FLAGS, "--out", tmp_path / "plots")
    assert (
        again.returncode == 0 and "are taken from" in again.stderr and (tmp_path / "plots" / "difficulty.png").is_file()
    )
    first, second = (json.loads(p.read_text()) for p in (tmp_path / "d.json", tmp_path / "plots" / "difficulty.json"))
    assert first == second


def test_a_run_whose_solver_gets_weaker(ranked, tmp_path):
    run = write_run(tmp_path / "run", [ranked[0:60:2], ranked[1:60:2]], 1.0, [0.5, 0.1])
    done = run_command(run, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "get harder" not in done.stdout and "The solver gets weaker" in done.stdout, done.stdout


def test_bad_input_is_one_line(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model": "tiny", "seed": 0, "steps": 10}')
    (bare / "metrics.jsonl").write_text('{"step": 1}\n')
    for path, flags in ((tmp_path / "none", ()), (bare, ()), (bare, ("--stages", 1))):
        done = run_command(path, *flags)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr

"""`train_azr.py --train full` as typed, on the embedded model: its checkpoints, its resume, its readers."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from azr.models import model_path
from azr.policy.policy import Policy
from azr.train import loop
from azr.train.config import Config, resolve
from azr.train.update import make_optimizer, restore_tensors, state_tensors
from in_process import run_here
from train_azr import main

SMALL = "--prompts-per-mode 2 --answers 2 --eval-samples 0 --eval-every 2 --save-every 1 --max-new-tokens 32".split()


def train(out, held_out, *flags):
    return run_here(main, "--train", "full", "--out", out, "--eval-data", held_out, "--steps", 2, *SMALL, *flags)


def reproducible(out) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]


def test_a_run_resumes_bit_for_bit_and_readers_take_it(few_held_out, tmp_path, monkeypatch):
    import analyze
    import eval_passk

    monkeypatch.setattr(loop, "SEED_ROUNDS", 1)
    monkeypatch.setattr(loop, "PROBE", 2)
    whole, again = tmp_path / "whole", tmp_path / "again"
    done = train(whole, few_held_out)
    assert done.returncode == 0 and "all 848,000 weights, in float32" in done.stdout, done.stderr
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints/step_2")
    assert train(again, few_held_out, "--resume", "auto").returncode == 0
    assert reproducible(again) == reproducible(whole)
    for name in ("model.safetensors", "state/tensors.safetensors"):
        first, second = (out / "checkpoints/step_2" / name for out in (whole, again))
        assert first.read_bytes() == second.read_bytes()
    assert not [name for name in load_file(second) if not name.startswith("adam/")]  # the weights are the model's
    start, end = (load_file(whole / f"checkpoints/step_{n}/model.safetensors") for n in (0, 2))
    assert all(not torch.equal(start[name], end[name]) for name in start if "norm" not in name)

    report = tmp_path / "sparsity.json"
    assert run_here(analyze.main, "sparsity", "--base", "tiny", "--tuned", whole, "--json", report).returncode == 0
    measured = json.loads(report.read_text())
    assert measured["kind"] == "pair" and 0 < measured["whole"]["U1_rms"] < 1e-3 and measured["whole"]["S1"] < 1
    assert run_here(main, "export", whole, "--out", tmp_path / "model").returncode == 0
    assert load_file(tmp_path / "model/model.safetensors").keys() == end.keys()
    done = run_here(eval_passk.main, "run", "--model", whole, "--benchmark", "tiny", "--samples", 1)
    assert done.returncode == 2 and "give it with --adapter" in done.stderr


def test_masters_and_moments_come_back():
    """bf16: what a checkpoint keeps, put into another policy, gives the same masters and weights after a step."""
    results = []
    policies = [Policy.load(model_path("tiny"), "none", dtype="bf16", full=True) for _ in range(2)]
    optimizers = [make_optimizer(policy, 1e-4) for policy in policies]
    for turn in range(2):
        for policy, optimizer in list(zip(policies, optimizers))[: 1 + turn]:
            for number, p in enumerate(policy.trainable_parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number + 100 * turn))
            optimizer.step()
            results.append([*policy.adapter_state().values(), *policy.model.parameters()])
        if not turn:
            restore_tensors(policies[1], optimizers[1], state_tensors(policies[0], optimizers[0]))
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"quantization": "nf4"}, "--quantization none, not nf4"),
        ({"lora_rank": 8}, "has no adapter"),
        ({"lora_targets": "attention"}, "has no adapter"),
        ({"adapter": "x"}, "give a whole model with --model"),
        ({"proposer": "frozen-base"}, "keeps no base"),
        ({"off_policy_gamma": 0.1, "off_policy_source": "base"}, "keeps no base"),
    ],
)
def test_what_needs_an_adapter_or_its_base_is_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        resolve(Config(train="full", **settings))


def test_defaults():
    tiny, qwen = (resolve(Config(train="full", model=model, dtype="bf16"))[0] for model in ("tiny", "qwen-3b"))
    assert (tiny.learning_rate, qwen.learning_rate) == (3e-4, 1e-6)
    assert tiny.quantization == qwen.quantization == "none" and tiny.lora_rank is None is qwen.lora_alpha
    again, _ = resolve(Config(**dataclasses.asdict(qwen)))  # config.json of a run
    assert again == qwen

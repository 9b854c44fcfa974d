"""Entropy and KL against float64 references, the logged metrics, the fit, and the command."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
from azr.analysis import divergence, entropy
from azr.analysis.divergence import divergences, open_policy, token_divergences
from azr.fits import difference_of_means, linear_fit, ratio_of_sums
from azr.policy.opening import agree
from azr.policy.policy import LoraSettings, Policy
from azr.train.metrics import entropy_metrics
from in_process import run_here

ROOT = Path(__file__).parents[2]
TEXTS = [
    (
        "User: solve deduction\n```python\ndef f(x):\n    return x+1\n```\n```input\n3\n```\nAssistant: <think>",
        "</think><answer>```output\n4\n```\n</answer>",
    ),
    (
        "User: solve abduction\n```python\ndef f(x):\n    return x[::-1]\n```\n"
        "```output\n'ab'\n```\nAssistant: <think>",
        "</think><answer>```input\n'ba'\n```\n</answer>",
    ),
    (
        "User: propose deduction\n```python\ndef f(x):\n    return x-4\n```\n```input\n3\n```\nAssistant: <think>",
        "</think><answer>```python\ndef f(x):\n    return x*2\n```\n```input\n5\n```\n</answer>",
    ),
]


@pytest.fixture(scope="module")
def policy():
    """The embedded model with an adapter that changes it."""
    policy = Policy.load(str(ROOT / "azr" / "tiny"), "none", LoraSettings(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable_parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def tokens(policy):
    return [policy.encode(p) for p, _ in TEXTS], [policy.encode(r) for _, r in TEXTS]


def reference(policy, prompts, responses, temperature, base=False):
    """Log-probs over the whole vocabulary at the response tokens, in float64 from the full logits."""
    rows = []
    # the adapter's forward casts to fp32, so its matrices are merged into a copy first
    model = copy.deepcopy(policy.model)
    model = model.unload() if base else model.merge_and_unload()
    model = model.double().eval()
    with torch.no_grad():
        for p, r in zip(prompts, responses):
            logits = model(torch.tensor([p + r])).logits[0, len(p) - 1 : len(p) + len(r) - 1] / temperature
            rows.append(logits.log_softmax(-1))
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_is_that_of_the_full_softmax_in_float64(policy, tokens, temperature):
    prompts, responses = tokens
    rows = [entropy.Row("solver", "deduction", p, r) for p, r in TEXTS]
    found, log_prob = entropy.score_rows(policy, rows, temperature)
    for i, full in enumerate(reference(policy, prompts, responses, temperature)):
        exact = -(full.exp() * full).sum(-1).numpy()
        assert np.abs(found[i] - exact).max() < 2e-5
        picked = full[range(len(responses[i])), responses[i]].numpy()
        assert np.abs(log_prob[i] - picked).max() < 2e-5


def test_chunks_and_micro_batches_do_not_change_it(policy, tokens):
    prompts, responses = tokens
    whole = policy.score_lists(prompts, responses)[1]
    for budget, chunk in ((64, 128), (8192, 1), (100, 7)):
        for indices, _, h, mask in policy.score(prompts, responses, 1.0, budget, chunk=chunk):
            for row, i in enumerate(indices):
                assert h[row][mask[row]].tolist() == pytest.approx(whole[i], abs=1e-5)
    one, _ = token_divergences(policy, prompts, responses)
    for budget, chunk in ((64, 128), (8192, 1)):
        other, _ = token_divergences(policy, prompts, responses, 1.0, budget, chunk)
        assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(one, other))


def test_the_probe_of_a_role_is_measured_with_its_own_adapter(policy, tmp_path, monkeypatch):
    checkpoint, state = tmp_path / "step_1", policy.adapter_state()
    weaker = {name: tensor / 2 for name, tensor in state.items()}
    policy.save_adapter(checkpoint)
    policy.save_adapter(checkpoint / "proposer", weaker)
    rows = [entropy.Row(role, "deduction", *text) for role, text in zip(("proposer", "solver", "proposer"), TEXTS)]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(vars(row)) + "\n" for row in rows))
    monkeypatch.setattr(divergence, "open_run", lambda run: policy)
    run = SimpleNamespace(path=tmp_path, checkpoints=lambda: [(1, checkpoint)])
    groups = entropy.probe_curve(run, SimpleNamespace(limit=None, temperature=1.0))["1"]
    for role, adapter in (("proposer", weaker), ("solver", state)):
        policy.load_adapter_state(adapter)
        own, _ = entropy.score_rows(policy, [row for row in rows if row.role == role], 1.0)
        assert groups[f"{role}/all"]["token_mean"]["mean"] == pytest.approx(np.concatenate(own).mean(), rel=1e-5)


def test_kl_of_known_distributions_and_of_a_model_to_itself(policy, tokens):
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    forward, reverse = divergences(p.log(), q.log())
    assert forward.item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-7)
    assert reverse.item() == pytest.approx(0.25 * math.log(0.5) + 0.5 * math.log(2), abs=1e-7)
    prompts, responses = tokens
    forward, reverse = token_divergences(policy, prompts, responses)
    base, own = (reference(policy, prompts, responses, 1.0, base) for base in (True, False))
    for i in range(len(prompts)):
        exact = (base[i].exp() * (base[i] - own[i])).sum(-1).numpy()
        assert np.abs(forward[i] - exact).max() < 2e-5 and forward[i].mean() > 1e-3
        exact = (own[i].exp() * (own[i] - base[i])).sum(-1).numpy()
        assert np.abs(reverse[i] - exact).max() < 2e-5
    with policy.disable_adapter():
        plain = open_policy(agree("tiny"))
    forward, reverse = token_divergences(plain, prompts, responses)
    assert max(row.max() for row in forward + reverse) == 0


def test_summary_token_mean_sequence_mean_and_the_top_fifth():
    rows = [np.array([2.0, 0.0, 0.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])]
    found = entropy.summary(rows, [-row for row in rows])
    assert (found["sequences"], found["tokens"]) == (2, 10)
    assert found["token_mean"]["mean"] == pytest.approx(0.4)
    assert found["sequence_mean"]["mean"] == pytest.approx((2 / 6 + 0.5) / 2)
    assert found["sampled_token_mean"]["mean"] == pytest.approx(0.4)
    assert found["top20_share"] == pytest.approx(3 / 4) and found["top20_threshold"] == 1.0
    assert entropy.summary([np.empty(0)], [np.empty(0)]) == {"sequences": 0, "tokens": 0}


def sample(role, ids, entropy_, log_probs, advantage):
    completion = SimpleNamespace(ids=ids, log_probs=log_probs)
    return SimpleNamespace(role=role, completion=completion, entropy=entropy_, old_log_prob=None, advantage=advantage)


def test_what_a_step_logs():
    rows = [sample("solver", [1, 2], [1.0, 3.0], [-1.0, -3.0], 1.0), sample("solver", [3], [0.5], [-0.2], -2.0)]
    found = entropy_metrics(rows + [sample("solver", [], [], [], 5.0)])
    assert found["entropy"] == pytest.approx(1.5) and found["entropy_sequence_mean"] == pytest.approx(1.25)
    assert found["sampled_entropy"] == pytest.approx(4.2 / 3)
    a, p = np.array([1, 1, -2]), np.array([-1, -3, -0.2])
    terms = (a - a.mean()) * (p - p.mean())
    assert found["log_prob_advantage_cov"] == pytest.approx(terms.mean())
    assert found["log_prob_advantage_cov_top"] == pytest.approx(terms.max())
    assert found["entropy_top20"] == 3.0 and found["entropy_top20_share"] == pytest.approx(3 / 4.5)
    assert all(math.isnan(value) for value in entropy_metrics([]).values())


def test_the_fit_finds_what_was_put_in_and_is_silent_on_few_points():
    rng = np.random.default_rng(0)
    h = rng.uniform(0.1, 0.8, 60)
    fit = entropy.fit_reward(h, -0.3 * np.exp(h) + 0.9 + rng.normal(0, 0.01, 60))
    assert fit["a"]["low"] < 0.3 < fit["a"]["high"] and fit["b"]["low"] < 0.9 < fit["b"]["high"]
    assert fit["ceiling"]["mean"] == pytest.approx(0.6, abs=0.02) and fit["r2"]["low"] > 0.95 and fit["n"] == 60
    assert math.isnan(entropy.fit_reward(h[:4], h[:4])["a"]["low"])


def test_fits_agree_with_numpy_and_cover():
    rng, inside = np.random.default_rng(1), 0
    for seed in range(60):
        x = rng.normal(size=40)
        y = 1 - 2 * x + rng.normal(size=40)
        fit = linear_fit(x, y, draws=400, seed=seed)
        assert fit.coefficients[1].mean == pytest.approx(np.polyfit(x, y, 1)[0])
        inside += fit.coefficients[1].low < -2 < fit.coefficients[1].high
    assert inside >= 52  # of 60, nominally 57
    assert linear_fit([1, 2, 3, np.nan], [2, 4, 6, 8]).n == 3
    assert ratio_of_sums([1, 2], [2, 6]).mean == pytest.approx(3 / 8)
    gap = difference_of_means(np.zeros(30), np.ones(30) + rng.normal(0, 0.1, 30))
    assert gap.low > 0.9 and gap.high < 1.1
    with pytest.raises(ValueError, match="nothing to fit"):
        linear_fit([np.nan], [1.0])


def run_command(*flags):
    return run_here(analyze.main, "entropy", *flags)


def test_command_on_a_file(tmp_path):
    data = tmp_path / "probe.jsonl"
    rows = [{"role": "solver", "mode": "deduction", "prompt": p, "response": r} for p, r in TEXTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    done = run_command("--model", "tiny", "--data", data, "--out", tmp_path / "plots")
    assert done.returncode == 0, done.stderr
    assert "last line is torn" in done.stderr and "nats a token" in done.stdout
    found = json.loads((tmp_path / "plots" / "entropy.json").read_text())
    assert found["groups"]["solver/deduction"]["token_mean"]["n"] == 3


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n[2]\n')
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    for flags in (
        ("--model", "tiny"),
        ("--model", "tiny", "--data", tmp_path / "none.jsonl"),
        ("--model", "tiny", "--data", tmp_path / "empty.jsonl"),
        ("--model", "tiny", "--data", tmp_path / "foreign.jsonl"),
        ("--model", "tiny", "--data", probe, "--temperature", "0"),
        ("--data", probe),
    ):
        done = run_command(*flags)
        assert done.returncode == 2, (flags, done.stdout)
        line = [line for line in done.stderr.splitlines() if line.startswith("analyze.py entropy: ")]
        assert len(line) == 1 and "Traceback" not in done.stderr, done.stderr
    done = run_command("--run", tmp_path, "--model", "tiny")
    assert done.returncode == 2 and "leave --model" in done.stderr

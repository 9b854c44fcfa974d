"""The update and what happens when memory runs out in it, in scoring or in sampling: same samples, same gradient.

Memory is made to run out by asking the allocator for more than there can be, wherever more than a limit is computed at
once, as a full card would.
"""

import json
import math
import shutil

import pytest
import torch

import train_azr
from azr.models import model_path
from azr.policy.backoff import (
    DoesNotFit,
    Sizes,
    halve_rollout,
    is_out_of_memory,
    retry,
    rollout_sizes,
    set_rollout_sizes,
)
from azr.policy.packing import pack
from azr.policy.policy import LoraSettings, Policy, Sampling
from azr.tasks import MODES, SEED_TASKS, Sample
from azr.tasks.prompts import solve_prompt
from azr.train import loop, update
from azr.train.config import Config, completed, parse, resolve

TOO_MUCH = 1 << 50  # elements
GROUPS = [(role, mode) for role in ("proposer", "solver") for mode in MODES]


def run_out() -> None:
    torch.empty(TOO_MUCH)


@pytest.fixture(scope="module")
def policy():
    return Policy.load(model_path("tiny"), "none", LoraSettings(4, 16.0, "all-linear"), seed=1, max_batch=16)


@pytest.fixture
def config():
    return resolve(Config(minibatches=1))[0]


def sampled(policy, n=3) -> list[Sample]:
    """n answers to a prompt of each mode and role, with made-up advantages."""
    samples, generator = [], torch.Generator().manual_seed(0)
    for i, (role, mode) in enumerate(GROUPS):
        prompt = solve_prompt(SEED_TASKS[mode], "tiny") + " " * i
        ids = policy.encode(prompt)
        for completion in policy.generate([ids], n, Sampling(max_new_tokens=24), [range(10 * i, 10 * i + n)])[0]:
            advantage = torch.randn((), generator=generator).item() * (len(samples) % 5 > 0)
            samples.append(Sample(role, mode, prompt, ids, completion, "", str(i), advantage=advantage))
    return samples


def state(policy, optimizer, config, sizes) -> train_azr.State:
    return train_azr.State(config, policy, optimizer, sizes=sizes)


def gradient(policy, samples, config, sizes) -> tuple[torch.Tensor, dict]:
    """(the gradient before clipping, the metrics) of one optimizer step that moves nothing."""
    optimizer, seen = torch.optim.SGD(policy.trainable_parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in policy.trainable_parameters()]))
    metrics = train_azr.optimizer_step(state(policy, optimizer, config, sizes), samples)
    flat = torch.cat([g.flatten() for g in seen[0]])
    return flat * max(1.0, metrics["grad_norm"] / train_azr.GRAD_CLIP), metrics


def test_the_gradient_is_that_of_the_written_loss(policy, config):
    """Against the loss over whole samples, one by one, without chunks or micro-batches."""
    samples = sampled(policy)
    ours, metrics = gradient(policy, samples, config, Sizes(200))
    total = 0.0
    for group in GROUPS:
        mine = [s for s in samples if (s.role, s.mode) == group]
        tokens = sum(len(s.completion.ids) for s in mine)
        for s in mine:
            ids = torch.tensor([s.prompt_ids + s.completion.ids])
            log_p = policy.model(input_ids=ids).logits[0].log_softmax(-1)
            log_prob = log_p[len(s.prompt_ids) - 1 : -1].gather(1, torch.tensor(s.completion.ids)[:, None])
            total = total - s.advantage * log_prob.sum() / tokens / 6  # the ratio is 1, its gradient that of log p
            assert s.entropy == pytest.approx(
                (-log_p.exp() * log_p).sum(-1)[len(s.prompt_ids) - 1 : -1].tolist(), abs=1e-4
            )
    for p in policy.trainable_parameters():
        p.grad = None
    total.backward()
    theirs = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    policy.model.zero_grad(set_to_none=True)
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    assert metrics["log_prob_gap"] < 1e-5 and metrics["skipped"] == 0 and metrics["clip_fraction"] == 0


def held_at_once(prompts, responses) -> int:
    """Tokens of a micro-batch."""
    return len(pack(prompts, responses).ids)


def test_out_of_memory_while_scoring_leaves_the_gradient(policy, config, monkeypatch, capsys):
    samples = sampled(policy)
    whole, metrics = gradient(policy, samples, config, Sizes(4096))
    entropy = [s.entropy for s in samples]
    honest, forward = Policy._score_batch, []

    def tight(self, indices, prompts, responses, *rest):
        forward.append(len(indices))
        if held_at_once(prompts, responses) > 300:
            run_out()
        return honest(self, indices, prompts, responses, *rest)

    monkeypatch.setattr(Policy, "_score_batch", tight)
    sizes = Sizes(4096)
    again, more = gradient(policy, samples, config, sizes)
    assert (again - whole).norm() / whole.norm() < 1e-5
    assert more["loss"] == pytest.approx(metrics["loss"], abs=1e-6) and more["tokens"] == metrics["tokens"]
    assert all(a == pytest.approx(b.entropy, abs=1e-5) for a, b in zip(entropy, samples))
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory in the update" in line]
    assert 256 <= sizes.token_budget <= 512 and f"-> {sizes.token_budget};" in told[-1] and len(told) >= 3
    forward.clear()
    gradient(policy, samples, config, sizes)  # remembered: nothing fails any more
    assert "out of memory" not in capsys.readouterr().err and max(forward) > 1


def test_out_of_memory_in_the_backward_pass_counts_no_gradient_twice(policy, config, monkeypatch):
    """The third backward pass fails: two micro-batches are in the gradient already. Once, and nothing is lowered: what
    was left behind is freed. Twice, and micro-batches are halved."""
    samples = sampled(policy)
    whole, _ = gradient(policy, samples, config, Sizes(160))
    honest, calls = train_azr.ppo_loss, []

    def tight(s, batch):
        calls.append(len(batch.samples))
        if len(calls) in failing and batch.log_prob.requires_grad:
            batch.log_prob.register_hook(lambda gradient: run_out())
        return honest(s, batch)

    monkeypatch.setattr(train_azr, "ppo_loss", tight)
    for failing, budget, most in (((3,), 160, 1e-9), ((3, 6), update.longest(samples), 1e-5)):
        calls.clear()
        sizes = Sizes(160)
        again, _ = gradient(policy, samples, config, sizes)
        assert sizes.token_budget == budget and len(calls) > failing[-1]
        assert (again - whole).norm() / whole.norm() < most


def test_out_of_memory_in_the_old_log_probs(policy, config, monkeypatch):
    samples, honest = sampled(policy), Policy._score_batch
    update.old_log_probs(state(policy, None, config, Sizes(4096)), samples)
    expected = [s.old_log_prob for s in samples]

    def tight(self, indices, prompts, responses, *rest):
        if held_at_once(prompts, responses) > 300:
            run_out()
        return honest(self, indices, prompts, responses, *rest)

    monkeypatch.setattr(Policy, "_score_batch", tight)
    update.old_log_probs(state(policy, None, config, sizes := Sizes(4096)), samples)
    assert sizes.token_budget <= 512
    assert all(s.old_log_prob == pytest.approx(e, abs=1e-5) for s, e in zip(samples, expected))


def test_out_of_memory_while_sampling_gives_the_same_samples(policy, monkeypatch, capsys):
    prompts = [policy.encode(solve_prompt(SEED_TASKS[mode], "tiny")) for mode in MODES]
    arguments = prompts, 8, Sampling(max_new_tokens=16), [range(100 * i, 100 * i + 8) for i in range(3)]
    expected = policy.generate(*arguments)
    honest, before = policy.engine.head, rollout_sizes(policy.engine)

    def tight(hidden):
        if len(hidden) > 5:
            run_out()
        return honest(hidden)

    monkeypatch.setattr(policy.engine, "head", tight)
    again = policy.generate(*arguments)
    assert [[c.ids for c in row] for row in again] == [[c.ids for c in row] for row in expected]
    assert policy.engine.max_batch == 4 and "max_batch 8 -> 4" in capsys.readouterr().err
    set_rollout_sizes(policy.engine, before)


def test_when_nothing_is_left_to_lower_the_reason_is_said(policy):
    sizes, steps = Sizes(1000), []
    with pytest.raises(DoesNotFit, match="single sample of 300 tokens; lower --max-new-tokens"):
        for _ in range(20):
            steps.append(sizes.halve(300))
    assert steps[:2] == ["token budget 1000 -> 500", "token budget 500 -> 300"] and sizes.chunk == 16
    with pytest.raises(DoesNotFit):
        retry(run_out, lambda: sizes.halve(300), "a test")
    before = rollout_sizes(policy.engine)
    with pytest.raises(DoesNotFit, match="single sequence of up to 64 tokens"):
        for _ in range(40):
            halve_rollout(policy.engine, 64, 1000)
    assert policy.engine.max_batch == 1
    set_rollout_sizes(policy.engine, before)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))
    words = "CUDA error: operation failed due to a previous error during capture (cudaErrorStreamCaptureInvalidated)"
    for first, expected in ((torch.OutOfMemoryError("x"), True), (RuntimeError("shapes differ"), False)):
        with pytest.raises(RuntimeError) as second:
            try:
                raise first
            finally:  # as torch.cuda.graph ends its capture
                raise RuntimeError(words)
        assert is_out_of_memory(second.value) == expected
    assert not is_out_of_memory(RuntimeError(words))
    with pytest.raises(RuntimeError, match="mat"):  # another error is not retried
        retry(lambda: torch.zeros(2, 2) @ torch.zeros(3, 3), lambda: "", "a test")


def test_a_response_without_tokens_is_left_out_of_the_gradient(policy, config):
    """A request that never fits the cache comes back empty: its reward counts for the others, nothing else."""
    samples = sampled(policy)
    whole, metrics = gradient(policy, samples, config, Sizes(400))
    empty = Sample("solver", "deduction", "", [5] * 100_000, type(samples[0].completion)([], [], "too_long"), "", "x")
    empty.advantage = -1.0
    again, more = gradient(policy, [*samples, empty], config, Sizes(400))
    assert (again - whole).norm() / whole.norm() < 1e-6 and more["tokens"] == metrics["tokens"]
    assert empty.entropy == []
    _, nothing = gradient_of_nothing(policy, [empty], config)
    assert nothing["tokens"] == 0 and nothing["loss"] == 0 and nothing["skipped"] == 0
    assert math.isnan(nothing["log_prob_gap"])  # no token to compare is not a gap of zero
    step = update.of_step([metrics, nothing])
    assert step["log_prob_gap"] == metrics["log_prob_gap"] and step["loss"] == metrics["loss"] / 2
    assert math.isnan(update.of_step([metrics, metrics | {"loss": math.nan}])["loss"])


def test_what_has_no_advantage_is_not_scored_unless_its_entropy_is_unknown(policy, config, monkeypatch):
    """Sampling has told its entropies; a response of a file has none, and gets the trainer's."""
    samples, scored, score = sampled(policy), [], policy.score
    for sample in samples:
        sample.entropy = list(sample.completion.entropy)
    still = [x for x in samples if not x.advantage]
    given, kept = still[0], [list(x.entropy) for x in still]
    given.entropy, given.objective = [], "truncated"
    whole, metrics = gradient(policy, samples, config, Sizes(400))

    def counted(prompts, responses, *sizes):
        scored.extend(responses)
        return score(prompts, responses, *sizes)

    monkeypatch.setattr(policy, "score", counted)
    again, _ = gradient(policy, samples, config, Sizes(400))
    assert torch.equal(whole, again) and len(scored) == len(samples) - len(still)  # given has its entropies by now
    assert all(a == pytest.approx(b, abs=2e-5) for a, b in zip([x.entropy for x in still], kept))
    assert metrics["clip_fraction"] == 0 and metrics["tokens"] == sum(len(x.completion.ids) for x in samples)
    given.entropy = []
    gradient(policy, samples, config, Sizes(400))
    assert len(scored) == 2 * (len(samples) - len(still)) + 1


def test_entropies_that_sampling_has_told_are_not_fetched_again(policy, config, monkeypatch):
    """A copy of (batch, time) numbers from the device in each micro-batch, for which it waits."""
    samples, fetched, tolist = sampled(policy), [], torch.Tensor.tolist
    for sample in samples:
        sample.entropy = list(sample.completion.entropy)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: fetched.append(self.dim()) or tolist(self))
    gradient(policy, samples, config, Sizes(400))
    assert 2 not in fetched
    samples[1].entropy = []
    gradient(policy, samples, config, Sizes(400))
    assert 2 in fetched and samples[1].entropy


def gradient_of_nothing(policy, samples, config):
    optimizer = update.make_optimizer(policy, 1e-3)
    return optimizer, train_azr.optimizer_step(state(policy, optimizer, config, Sizes(400)), samples)


# ------------------------------------------------------------------------------------------------- in a training run


SMALL = [
    "--prompts-per-mode",
    "2",
    "--answers",
    "2",
    "--eval-samples",
    "0",
    "--eval-every",
    "0",
    "--save-every",
    "1",
    "--max-new-tokens",
    "32",
]


def train(out, few_held_out, monkeypatch, *flags, tokens=None, rows=None) -> list[dict]:
    """A run of train_azr.py with memory for `tokens` a micro-batch and `rows` sequences; its reproducible metrics."""
    load, honest = Policy.load, Policy._score_batch

    def tight_score(self, indices, prompts, responses, *rest):
        # what the backward pass holds: the probe is scored without one, before the first step
        if tokens and torch.is_grad_enabled() and held_at_once(prompts, responses) > tokens:
            run_out()
        return honest(self, indices, prompts, responses, *rest)

    def tight_load(*arguments, **options):
        policy = load(*arguments, **options)
        head = policy.engine.head
        policy.engine.head = lambda hidden: run_out() if rows and len(hidden) > rows else head(hidden)
        return policy

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "_score_batch", tight_score)
        patch.setattr(Policy, "load", tight_load)
        patch.setattr(loop, "PROBE", 2)
        patch.setattr(loop, "SEED_ROUNDS", 1)
        assert train_azr.main(["--out", str(out), "--eval-data", str(few_held_out), *SMALL, *map(str, flags)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def test_a_run_that_runs_out_of_memory_learns_the_same_and_remembers(few_held_out, tmp_path, monkeypatch, capsys):
    """In every phase; and a resume, which never asks for more again, is exact to the last bit."""
    whole = train(tmp_path / "whole", few_held_out, monkeypatch, "--steps", 2)
    tight = train(tmp_path / "tight", few_held_out, monkeypatch, "--steps", 2, tokens=250, rows=3)
    told = capsys.readouterr().err
    assert "out of memory in sampling" in told and "out of memory in the update" in told
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "tight")]
    assert texts[0] == texts[1]
    for a, b in zip(whole, tight):
        assert a.keys() == b.keys()
        assert all(
            (x is None) == (b[k] is None) and (x is None or math.isclose(x, b[k], rel_tol=1e-4, abs_tol=1e-5))
            for k, x in a.items()
        )
    state = json.loads((tmp_path / "tight/checkpoints/step_2/state/state.json").read_text())
    assert state["sizes"]["scoring"]["token_budget"] <= 512 and state["sizes"]["rollout"]["max_batch"] <= 3
    shutil.copytree(tmp_path / "tight", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves/checkpoints/step_2")  # as if it had ended after its first step
    halves = train(tmp_path / "halves", few_held_out, monkeypatch, "--steps", 2, "--resume", "auto")
    assert halves == tight and "out of memory" not in capsys.readouterr().err.split("resume:")[-1]


# ----------------------------------------------------------------------------------------------------------- settings


def test_a_resumed_run_keeps_what_free_memory_would_decide_anew(tmp_path):
    run = resolve(Config(out=str(tmp_path), token_budget=777, price_per_hour=2.0))[0]
    (tmp_path / "config.json").write_text(json.dumps({**run.__dict__, "max_batch": 99}))
    again = resolve(parse(["--out", str(tmp_path), "--resume", "auto"], ""))[0]
    assert (again.token_budget, again.max_batch, again.price_per_hour) == (777, 99, 2.0)
    again = resolve(parse(["--resume", str(tmp_path), "--token-budget", "5"], ""))[0]
    assert again.token_budget == 5 and again.out == str(tmp_path)
    assert resolve(Config(out=str(tmp_path)))[0].token_budget != 777
    with pytest.raises(ValueError, match="none to copy"):
        resolve(Config(rollout_weights="bf16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU takes")
def test_the_dtype_is_resolved_and_kept(tmp_path):
    assert resolve(Config())[0].dtype == resolve(Config(dtype="auto"))[0].dtype == "fp32"
    assert resolve(Config(dtype="fp16"))[0].dtype == "fp16"
    large = Config(model="qwen-3b", preset="24gb", dry_run=True)
    assert resolve(large)[0].dtype == "bf16"  # a plan for a card that is not here
    old_card, why = resolve(Config(model="qwen-3b", preset="t4", dry_run=True))
    assert old_card.dtype == "fp16" and "no bf16 in hardware" in why
    run = resolve(Config(out=str(tmp_path), dtype="fp16"))[0]
    (tmp_path / "config.json").write_text(json.dumps(run.__dict__))
    assert resolve(parse(["--resume", str(tmp_path)], ""))[0].dtype == "fp16"
    before = {name: value for name, value in resolve(Config())[0].__dict__.items() if name != "dtype"}
    assert completed(before)["dtype"] == "fp32"  # a run from before the setting goes on as it was

"""The arms on the embedded model, most for two steps, against `none` from the same state: what changes, what not."""

import copy
import dataclasses
import itertools
import json
import math
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from arms_world import STEPS, World, reproducible

import train_azr
from azr.evals.held_out import load_tasks
from azr.policy.load import adapter_tensors
from azr.policy.opening import agree
from azr.policy.policy import Policy
from azr.runs import Run
from azr.stop import StopRequest
from azr.tasks import MODES, Buffers, parse_proposal, propose_prompt
from azr.train import arms, loop, make_data, rewards, rules, update
from azr.train.arms import Arms, entropy_control, off_policy
from azr.train.data import tokens as tokens_of

# So many answers that some tasks are solved sometimes and some ratios leave the clip's band.
MANY = {"minibatches": 4, "learning_rate": 1e-2, "steps": 2, "prompts_per_mode": 4, "answers": 8}
GROUPS = [(role, mode) for role in ("proposer", "solver") for mode in MODES]
BASE = {"off_policy_gamma": 0.25, "off_policy_source": "base"}
WARM = ("warm", ("--solutions", "--proposals"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task and solution files of the generator."""
    folder, paths = tmp_path_factory.mktemp("files"), {}
    for name, flags in (("tasks", ()), ("gold", ("--solutions",)), ("math", ("--modes", "math")), WARM):
        paths[name] = str(folder / f"{name}.jsonl")
        assert make_data.main(["tiny", paths[name], "--count", "40", *flags]) == 0
    return paths


def rollouts(result, step=1, foreign=False) -> list[tuple]:
    """What was sampled in a step, without what was made of it."""
    rows = [row for row in result.samples if row["step"] == step and (foreign or row["role"] != "off-policy")]
    return [(row["role"], row["prompt"], row["response"], row["reason"]) for row in rows]


def moved(result, other) -> bool:
    """Whether the adapters are in different places after the last step that both have made."""
    last = min(len(result.adapters), len(other.adapters)) - 1
    return any(not torch.equal(a, b) for a, b in zip(result.adapters[last].values(), other.adapters[last].values()))


def log_probs(world, adapter, samples) -> list[float]:
    """Of the samples' tokens under an adapter, flat."""
    world.policy.load_adapter_state(adapter)
    rows, _ = world.policy.score_lists([s.prompt_ids for s in samples], [s.completion.ids for s in samples])
    return [x for row in rows for x in row]


def recorded(samples) -> list[float]:
    return [x for sample in samples for x in sample.completion.log_probs]


def test_plain_self_play_logs_nothing_of_the_arms(world):
    none = world.run()
    assert len(none.rows) == STEPS and not [
        key for key in none.rows[0] if any(word in key for word in ("control", "off_policy", "tokens_", "coefficient"))
    ]
    assert rules.describe(none.state.config) == "" and not none.state.arms.arms
    assert all(s.update and not s.objective for s in none.trained[0])


# ----------------------------------------------------------------------------------------------------------- proposers


@pytest.mark.parametrize("proposer", ["no-update", "frozen-base", "no-update-matched"])
def test_an_untrained_proposer_gets_no_gradient_and_leaves_the_solver_alone(world, proposer):
    none, arm = world.run(), world.run(proposer=proposer)
    assert rollouts(arm)[: len(rollouts(none))] == rollouts(none) and moved(arm, none)
    for samples in arm.trained:
        assert all(s.advantage == 0 and not s.update for s in samples if s.role == "proposer")
    advantages = [
        [s.advantage for s in r.trained[0] if s.role == "solver" and "fill" not in s.group] for r in (none, arm)
    ]
    if proposer != "no-update-matched":  # whose added rows count in the scale of a mode
        assert advantages[0] == advantages[1]
    for row, samples in zip(arm.rows, arm.trained):
        dropped, added = row["train/tokens_dropped"], row["train/tokens_added"]
        assert dropped == tokens_of([s for s in samples if s.role == "proposer"]) > 0
        assert abs(added - dropped) <= 34 if proposer == "no-update-matched" else added == 0
        none_trained = not any(s.advantage for s in samples)  # then there is no gap
        assert row["train/log_prob_gap"] is None if none_trained else row["train/log_prob_gap"] < 1e-4
        assert row["proposer/all/entropy"] > 0


def test_frozen_proposals_are_the_bases_and_the_others_the_policys(world):
    frozen, drifting = world.run(proposer="frozen-base"), world.run(proposer="no-update")
    for result, adapter, other in (
        (frozen, world.start, frozen.adapters[-2]),
        (drifting, drifting.adapters[-2], world.start),
    ):
        proposals = [s for s in result.trained[-1] if s.role == "proposer"]
        wrote = torch.tensor(recorded(proposals))
        assert (torch.tensor(log_probs(world, adapter, proposals)) - wrote).abs().max() < 1e-4
        assert (torch.tensor(log_probs(world, other, proposals)) - wrote).abs().max() > 1e-2


def test_the_joint_gradient_is_the_solvers_of_no_update_plus_the_proposers(world):
    state = world.run().state
    samples = [dataclasses.replace(s, advantage=math.sin(i + 1)) for i, s in enumerate(world.run().trained[0])]

    def gradient(change) -> torch.Tensor:
        world.policy.load_adapter_state(world.start)
        world.policy.model.zero_grad(set_to_none=True)
        batch = [dataclasses.replace(s, **change(s)) for s in samples]
        update.gradient(state, batch, train_azr.token_weights(batch), lambda part: train_azr.ppo_loss(state, part))
        return torch.cat([p.grad.flatten() for p in world.policy.trainable_parameters()])

    joint = gradient(lambda s: {})
    solver = gradient(lambda s: {"update": s.role == "solver", "advantage": s.advantage * (s.role == "solver")})
    proposer = gradient(lambda s: {"advantage": s.advantage * (s.role == "proposer")})
    assert (joint - solver - proposer).norm() < 1e-5 * joint.norm() and proposer.norm() > 0 < solver.norm()


# -------------------------------------------------------------------------------------------------------- two adapters


def flat(tensors: dict) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.fixture(scope="module")
def apart(world):
    """The same state with a policy of its own, which may have a second adapter."""
    world.run()  # the seed stage
    made = copy.copy(world)
    made.policy, made.found = world.load(), {}
    return made


def test_each_role_moves_its_own_adapter_and_nothing_else(world, apart):
    joint, alone, arm = world.run(), world.run(proposer="no-update"), apart.run(proposer="separate")
    assert rollouts(arm) == rollouts(joint) and arm.rows[0]["train/tokens"] == joint.rows[0]["train/tokens"]
    # the solver's: bit for bit as if the proposer had learned nothing
    assert torch.equal(flat(arm.adapters[0]), flat(alone.adapters[0]))
    assert moved(arm, joint)
    # the proposer's, by hand: minus the advantage times the log-prob, each group with 1/6, clipped to norm 1; the first
    # step of Adam is the learning rate in the direction of the gradient
    proposals = [s for s in arm.trained[0] if s.role == "proposer"]
    tokens = {mode: tokens_of([s for s in proposals if s.mode == mode]) for mode in MODES}
    world.policy.load_adapter_state(world.start)
    world.policy.model.zero_grad(set_to_none=True)
    prompts, responses = [s.prompt_ids for s in proposals], [s.completion.ids for s in proposals]
    for indices, log_prob, _, mask in world.policy.score(prompts, responses, with_grad=True):
        weight = torch.tensor([-proposals[i].advantage / 6 / tokens[proposals[i].mode] for i in indices])
        (log_prob * mask * weight[:, None]).sum().backward()
    gradients = {name: p.grad for name, p in adapter_tensors(world.policy.model).items()}
    gradient, start, end = (flat(x) for x in (gradients, world.start, arm.proposers[0]))
    gradient /= max(1.0, gradient.norm())
    by_hand = start - arm.state.config.learning_rate * gradient / (gradient.abs() + 1e-8)
    error, clear = (end - by_hand).abs(), gradient.abs() > 1e-6
    assert error[clear].max() < 1e-6 and clear.sum() > 1000 and (end != start).sum() > 1000
    assert error.max() < 1e-5  # a hundredth of a step: near Adam's epsilon the rounding of a gradient is seen


def test_a_role_samples_and_is_measured_with_its_own_adapter(world, apart):
    arm = apart.run(proposer="separate")
    for role, own, other in (
        ("proposer", arm.proposers[0], arm.adapters[0]),
        ("solver", arm.adapters[0], arm.proposers[0]),
    ):
        mine = [s for s in arm.trained[1] if s.role == role]
        wrote = torch.tensor(recorded(mine))
        assert (torch.tensor(log_probs(world, own, mine)) - wrote).abs().max() < 1e-4
        assert (torch.tensor(log_probs(world, other, mine)) - wrote).abs().max() > 1e-2
        world.policy.load_adapter_state(own)
        _, entropies = world.policy.score_lists([s.prompt_ids for s in mine], [s.completion.ids for s in mine])
        entropy = sum(map(sum, entropies)) / tokens_of(mine)
        assert arm.rows[1][f"{role}/all/entropy"] == pytest.approx(entropy, rel=1e-4)
    assert all(row["train/log_prob_gap"] < 1e-4 for row in arm.rows)


def test_micro_batches_of_two_adapters_give_one_gradient(apart):
    arm = apart.run(proposer="separate")
    state, found, failures = arm.state, [], []
    samples = [dataclasses.replace(s, advantage=math.sin(i + 1)) for i, s in enumerate(arm.trained[1])]

    def loss_of(part):
        assert len({sample.role for sample in part.samples}) == 1
        if part.samples[0].role == "proposer" and failures:
            raise torch.OutOfMemoryError(failures.pop())
        return train_azr.ppo_loss(state, part)

    for budget, failures in ((4000, []), (200, []), (400, ["in use: the proposer's adapter"] * 2)):
        state.sizes.token_budget = budget
        update.gradient(state, samples, train_azr.token_weights(samples), loss_of)
        groups = [group["params"] for group in state.optimizer.param_groups]
        found.append([torch.cat([p.grad.flatten() for p in group]) for group in groups])
        assert state.policy.adapter == "default"
    for one, *others in zip(*found):
        assert all((one - other).norm() < 1e-5 * one.norm() for other in others) and one.norm() > 0
    assert len(found[0]) == 2 and not failures and state.sizes.token_budget < 400


def test_two_adapters_beside_arms_that_switch_them_off_or_mark_tokens(world, apart):
    arm = apart.run(**BASE, proposer="separate", entropy_control="top-entropy")
    mixed = [sample for samples in arm.trained for sample in foreign(samples)]
    assert (torch.tensor(log_probs(world, world.start, mixed)) - torch.tensor(recorded(mixed))).abs().max() < 1e-4
    assert abs(arm.rows[0]["train/kl_to_base"]) < 1e-6 < arm.rows[1]["train/kl_to_base"]
    assert all(0 < row["train/control_share"] < 1 and row["train/log_prob_gap"] < 1e-4 for row in arm.rows)


def test_two_adapters_resume_bit_for_bit(apart):
    whole, (parts, saved) = apart.run(proposer="separate"), apart.run_in_two(1, 2, proposer="separate")
    assert parts == whole.rows
    for folder, expected in ((saved, whole.adapters[-1]), (saved / "proposer", whole.proposers[-1])):
        opened = Policy.open(agree(None, folder))
        assert all(torch.equal(expected[name], tensor) for name, tensor in opened.adapter_state().items())
    assert moved(whole, SimpleNamespace(adapters=whole.proposers))


def test_the_kl_of_the_probe_is_that_of_the_full_softmax_and_of_each_roles_adapter(apart, tmp_path, monkeypatch):
    """At the temperature of the training; the solver's adapter moves, then the proposer's, each its own role alone."""

    def distributions(s, adapter: str, row: dict) -> torch.Tensor:
        prompt = s.policy.encode(row["prompt"])
        with s.policy.using(adapter), torch.no_grad():
            logits = s.policy.model(torch.tensor([prompt + row["ids"]])).logits[0, len(prompt) - 1 : -1]
        return (logits.double() / 1.2).log_softmax(-1)  # (tokens, vocabulary)

    monkeypatch.setattr(loop, "PROBE", 8)
    with StopRequest() as stop, Run.open(tmp_path / "run", {"steps": 0}, "none") as run:
        s = apart.state(run, stop, proposer="separate", temperature=1.2)
        loop.freeze_probe(s, train_azr.propose, train_azr.solve)
        rows = [json.loads(line) for line in (run.dir / "probe.jsonl").read_text().splitlines()]
        still = loop.probe_kl(s)
        assert {name for name in still if "/all/" not in name} == {f"{r}/{m}/probe_kl" for r, m in GROUPS}
        assert all(0 <= value < 1e-10 for value in still.values())
        for role, adapter in (("solver", "default"), ("proposer", "proposer")):
            mine = [row for row in rows if row["role"] == role]
            before = [distributions(s, adapter, row) for row in mine]
            generator = torch.Generator().manual_seed(0)
            for tensor in adapter_tensors(s.policy.model, adapter).values():
                tensor.data += 0.02 * torch.randn(tensor.shape, generator=generator)
            kl, pairs = loop.probe_kl(s), list(zip(before, (distributions(s, adapter, row) for row in mine)))
            log_ratio = torch.cat(
                [(q - p).gather(1, torch.tensor(r["ids"])[:, None]) for (p, q), r in zip(pairs, mine)]
            )
            assert kl[f"{role}/all/probe_kl"] == pytest.approx(
                (log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-3
            )
            exact = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean().item()
            # of some 400 tokens
            assert 1e-3 < exact and kl[f"{role}/all/probe_kl"] == pytest.approx(exact, rel=0.5)
            assert role == "proposer" or kl["proposer/all/probe_kl"] < 1e-10
        s.arms = SimpleNamespace(proposes=False, adapter=lambda role, name: name)  # of a run on given tasks
        assert {name.split("/")[0] for name in loop.probe_kl(s)} == {"solver"}
        (run.dir / "probe.jsonl").write_text(json.dumps({"role": "solver", "prompt": "a", "response": "b"}) + "\n{")
        assert loop.probe_kl(s) == {}  # of a run that is older than the log-probs


# ------------------------------------------------------------------------------------------------------------- rewards


def test_a_reward_shape_changes_what_proposers_earn_and_nothing_else(world):
    none, arm = world.run(**MANY), world.run(**MANY, proposer_reward="half-peak", ends_penalty=0.5)
    assert rollouts(arm) == rollouts(none) and moved(arm, none)
    for row in arm.samples:
        if row["role"] == "proposer":
            rate = row["solve_rate"]
            valid = row["reward"]["valid"] and row["reward"]["well_formed"]
            expected = 1 - 2 * abs(rate - 0.5) - 0.5 * (rate in (0, 1)) if valid else -1
            assert row["reward"]["reward"] == pytest.approx(expected)
    parts = [[(s.reward, s.advantage) for s in r.trained[0] if s.role == "solver"] for r in (none, arm)]
    assert parts[0] == parts[1]


def test_every_shape_reaches_the_proposers_of_a_step(world):
    none, found = world.run(**MANY), {}
    for shape in rewards.SHAPES:
        config = dataclasses.replace(none.state.config, proposer_reward=shape)
        state = train_azr.State(config, None, None, arms=Arms.of(config))
        samples = [dataclasses.replace(s) for s in itertools.chain(*none.trained)]
        proposals = [s for s in samples if s.role == "proposer"]
        train_azr.set_rewards(state, proposals, [s for s in samples if s.role == "solver"], [])
        found[shape] = [s.reward for s in proposals]
        for s in proposals:
            valid = s.task is not None and s.parsed.well_formed
            rate = (
                rewards.above_chance(s.solve_rate, s.task.chance) if valid and shape == "above-chance" else s.solve_rate
            )
            expected = rewards.task_reward(shape, rate, 0.0, s.task.hash) if valid else -1
            assert s.reward == pytest.approx(expected)
    assert len({tuple(values) for values in found.values()}) == len(rewards.SHAPES)


# ---------------------------------------------------------------------------------------------------- entropy controls


CONTROLS = {
    "bonus": {},
    "adaptive": {"steps": 3},  # its first coefficient is 0
    "clip-cov": {},
    "top-entropy": {},
    "high-advantage-clip": {},
    "clip-higher": MANY,  # ratios of 1.2 to 1.28 are rare
    "kl-cov": {**MANY, "prompts_per_mode": 2, "answers": 3},
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_touches_tokens_and_nothing_before_the_update(world, control, monkeypatch):
    monkeypatch.setattr(entropy_control, "TARGET", 2.0)  # far above: the adaptive bonus acts all the time
    settings = CONTROLS[control]
    none, arm = world.run(**{**settings, "steps": 2}), world.run(entropy_control=control, **settings)
    assert rollouts(arm) == rollouts(none) and moved(arm, none)
    fields = [[(s.reward, s.advantage, s.completion.ids) for s in r.trained[0]] for r in (none, arm)]
    assert fields[0] == fields[1]
    shares = [row["train/control_share"] for row in arm.rows]
    assert max(shares) > 0 and all(0 <= share <= 1 for share in shares), shares
    if control in ("clip-cov", "kl-cov"):
        assert max(shares) <= 0.05  # 2 % of the tokens, at least one a minibatch
    assert all(row["train/log_prob_gap"] < 1e-4 and row["train/skipped"] == 0 for row in arm.rows)
    tokens = [sum(len(sample.completion.ids) for sample in samples) for samples in arm.trained]
    assert [row["train/tokens"] for row in arm.rows] == tokens  # of all minibatches


def test_the_bonus_in_the_loss_is_the_weighted_entropy(world):
    none, arm = world.run().rows[0], world.run(entropy_control="bonus").rows[0]
    entropy = sum(arm[f"{role}/{mode}/entropy"] or 0.0 for role, mode in GROUPS) / 6
    assert none["train/loss"] - arm["train/loss"] == pytest.approx(1e-3 * entropy, rel=1e-3)


def test_the_adaptive_bonus_follows_its_rule(world, monkeypatch):
    monkeypatch.setattr(entropy_control, "TARGET", 2.0)  # far above: it rises all the time
    rows = world.run(entropy_control="adaptive", steps=3).rows
    assert [row["train/entropy_coefficient"] for row in rows] == pytest.approx([0, 1e-4, 2e-4])
    assert [row["train/control_share"] for row in rows] == [0, 1, 1]


# ---------------------------------------------------------------------------------------------------------- off-policy


def foreign(samples) -> list:
    return [sample for sample in samples if sample.objective]


def test_solutions_of_the_base_join_the_groups_of_tasks_that_are_seldom_solved(world):
    none, arm = world.run(), world.run(**BASE)
    assert rollouts(arm) == rollouts(none) and moved(arm, none)
    mixed = [sample for samples in arm.trained for sample in foreign(samples)]
    assert mixed and all(s.objective == "truncated" and s.correct and s.reward == 1 for s in mixed)
    wrote = torch.tensor(recorded(mixed))
    assert (torch.tensor(log_probs(world, world.start, mixed)) - wrote).abs().max() < 1e-4
    for samples, row in zip(arm.trained, arm.rows):
        own = {s.group: s for s in samples if s.role == "solver" and not s.objective}
        assert all(
            own[s.group].task.hash == s.task.hash and s.solve_rate <= off_policy.SELDOM for s in foreign(samples)
        )
        assert row["train/off_policy_gamma"] == 0.25 and row["train/off_policy_solutions"] == len(foreign(samples))
        if foreign(samples):
            assert 0 < row["train/off_policy_ess"] <= 1 and 0 <= row["train/off_policy_truncated"] <= 1
        assert row["train/log_prob_gap"] < 1e-4
    kl = [row["train/kl_to_base"] for row in arm.rows]
    assert abs(kl[0]) < 1e-6 < max(kl[1:])


def test_the_controls_of_off_policy_data(world):
    arm = world.run(**BASE)
    more = {**BASE, "prompts_per_mode": 8}  # two tasks of a mode to exchange
    shuffled = world.run(**more, off_policy_control="shuffled")
    wrong = [sample for samples in shuffled.trained for sample in foreign(samples)]
    assert wrong and all(s.reason == "shuffled" and s.reward == 1 for s in wrong)
    assert (torch.tensor(log_probs(world, world.start, wrong)) - torch.tensor(recorded(wrong))).abs().max() < 1e-4
    extra = world.run(**BASE, off_policy_control="on-policy")
    for samples, row in zip(extra.trained, extra.rows):
        assert not foreign(samples) and row["train/off_policy_solutions"] == 0
        rates, sizes = {}, {}
        for s in samples:
            if s.role == "solver":
                sizes[s.group] = sizes.get(s.group, 0) + 1
                rates[s.group] = s.solve_rate  # of the first answers, as without the extra ones
        n, drawn = extra.state.config.answers, off_policy.SAMPLES
        assert all(size == n + drawn * (rates[group] <= off_policy.SELDOM) for group, size in sizes.items())
    assert rollouts(arm) == rollouts(world.run()) and moved(extra, arm) and moved(shuffled, arm)


def test_a_file_of_solutions_with_shaping(world, files):
    arm = world.run(off_policy_gamma=0.25, off_policy_source=files["gold"], off_policy_weight="luffy")
    proposals = [row for row in rollouts(world.run()) if row[0] == "proposer"]
    assert [row for row in rollouts(arm) if row[0] == "proposer"] == proposals
    gold = {(task.hash, task.response) for task in load_tasks(files["gold"], True)}
    for samples, row in zip(arm.trained, arm.rows):
        assert foreign(samples) and all((s.task.hash, s.response) in gold for s in foreign(samples))
        assert row["train/off_policy_gamma"] == 0.25
        assert row["train/off_policy_ess"] is None  # nobody knows who wrote them
    with pytest.raises(ValueError, match="a response without log_probs"):
        world.run(off_policy_gamma=0.25, off_policy_source=files["gold"])


# ----------------------------------------------------------------------------------------------------- rlvr, sft, noise


def test_rlvr_solves_the_tasks_of_its_file_and_proposes_nothing(world, files):
    arm = world.run(algorithm="rlvr", data=files["tasks"])
    known = {task.hash for task in load_tasks(files["tasks"])}
    count, config = 0, arm.state.config
    for samples, row in zip(arm.trained, arm.rows):
        count += len(samples)
        assert all(s.role == "solver" and s.task.hash in known for s in samples)
        assert not [key for key in row if key.startswith("proposer/")] and row["train/log_prob_gap"] < 1e-4
    assert count == STEPS * 3 * config.prompts_per_mode * config.answers  # as many as plain self-play could have
    assert [row["buffer/deduction/size"] for row in arm.rows] == [arm.rows[0]["buffer/deduction/size"]] * STEPS
    assert moved(arm, world.run())


def test_rlvr_takes_mathematics_and_a_number_of_tokens(world, files):
    pytest.importorskip("math_verify")
    arm = world.run(algorithm="rlvr", data=files["math"], step_tokens=150)
    for row, samples in zip(arm.rows, arm.trained):
        assert abs(row["train/tokens"] - 150) <= 34 and {s.mode for s in samples} == {"math"}
        right = [s.correct == (s.parsed.value == s.task.answer) for s in samples if s.parsed.value]
        assert all(right)
    assert any(row["solver/math/accuracy"] > 0 for row in arm.rows)
    assert any(s.advantage for samples in arm.trained for s in samples)


def test_sft_is_cross_entropy_on_given_responses(world, files):
    arm = world.run(algorithm="sft", data=files["gold"])
    gold = {(task.hash, task.response) for task in load_tasks(files["gold"], True)}
    for samples, row in zip(arm.trained, arm.rows):
        assert all((s.task.hash, s.response) in gold and s.advantage == 1 for s in samples)
        negative = sum(row[f"solver/{mode}/sampled_entropy"] for mode in MODES) / 6
        assert row["train/loss"] == pytest.approx(negative, rel=1e-4) and row["train/log_prob_gap"] is None
    chosen = arm.trained[0]
    before, after = (sum(log_probs(world, adapter, chosen)) for adapter in (world.start, arm.adapters[-1]))
    assert after > before


def test_a_warm_start_trains_proposals_too_and_needs_no_seed_stage(world, files):
    arm = world.run(algorithm="sft", data=files["warm"])
    file = load_tasks(files["warm"], solutions=True, proposals=True)
    proposals = {task.response: task for task in file if task.references}
    assert len(proposals) == 120
    for samples, row in zip(arm.trained, arm.rows):
        groups = Counter((s.role, s.mode) for s in samples)
        assert len(groups) == 6 and len(set(groups.values())) == 1  # as many of each role and mode
        for sample in (s for s in samples if s.role == "proposer"):
            task = proposals[sample.response]
            assert sample.prompt == propose_prompt(sample.mode, list(task.references), "tiny")
            parsed = parse_proposal(sample.mode, sample.response, task.references[0].program)
            assert parsed.well_formed and parsed.value.program == task.program
        entropies = [row[f"{role}/{mode}/sampled_entropy"] for role in ("proposer", "solver") for mode in MODES]
        assert row["train/loss"] == pytest.approx(sum(entropies) / 6, rel=1e-4)
    arm.state.buffers = Buffers()
    arm.state.arms.start(arm.state, None)
    loop.seed_stage(arm.state, None, None)  # nothing is sampled: there are tasks enough
    assert [arm.state.buffers.size(mode) for mode in MODES] == [41, 41, 41]  # the file's and the identity program's
    with pytest.raises(ValueError, match="is a proposal, which --algorithm sft alone takes"):
        world.run(algorithm="rlvr", data=files["warm"])


def test_hotter_rollouts_are_scored_at_their_temperature(world):
    arm = world.run(temperature=1.2)
    assert all(row["train/log_prob_gap"] < 1e-4 for row in arm.rows)
    mine = arm.trained[0]
    assert rollouts(arm) != rollouts(world.run())
    plain = torch.tensor(log_probs(world, world.start, mine))
    assert (plain - torch.tensor(recorded(mine))).abs().max() > 0.05  # at temperature 1 they are others
    assert arm.state.evaluation.sampling.temperature == 1.0 and arm.state.sampling.temperature == 1.2


def test_fresh_solver_tasks_are_this_steps_proposals(world):
    fresh, backfill = world.run(solver_tasks="fresh"), world.run()

    def strangers(result) -> int:
        count = 0
        for samples in result.trained:
            own = {s.task.hash for s in samples if s.role == "proposer" and s.task}
            count += sum(s.task.hash not in own for s in samples if s.role == "solver")
        return count

    assert strangers(fresh) == 0 < strangers(backfill)
    assert [r for r in rollouts(fresh) if r[0] == "proposer"] == [r for r in rollouts(backfill) if r[0] == "proposer"]


# ---------------------------------------------------------------------------------------------- an arm in its own file


def test_an_arm_is_one_file_and_one_line(few_held_out, tmp_path, monkeypatch):
    """docs/icepop.py as a user runs it, and what it does to a token that leaves the band."""
    for name in ("SEED_ROUNDS", "PROBE"):
        monkeypatch.setattr(loop, name, 1)
    monkeypatch.setattr(arms, "REGISTRY", [*arms.REGISTRY])
    file = Path(train_azr.__file__).with_name("docs") / "icepop.py"
    assert len(file.read_text().splitlines()) < 40
    flags = "--steps 2 --prompts-per-mode 2 --answers 3 --max-new-tokens 48 --eval-every 0 --eval-samples 0"
    monkeypatch.setattr(
        sys, "argv", [str(file), *flags.split(), "--eval-data", str(few_held_out), "--out", str(tmp_path / "run")]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    rows = reproducible(tmp_path / "run")
    assert ended.value.code == 0 and [row["train/icepop_masked"] for row in rows] == [0, 0]
    arm = Arms([arms.REGISTRY[-1][1](None)])
    old, sampler = torch.zeros(1, 4), -torch.tensor([[0.6, 0.4, 4.9, 5.1]]).log()
    batch = SimpleNamespace(old_log_prob=old, sampler_log_prob=sampler)
    assert arm.token_loss(batch, torch.ones(1, 4)).tolist() == [[1, 0, 1, 0]]


# ------------------------------------------------------------------------------------------------- resuming, bad input


def test_what_a_controller_knows_survives_a_resume(world, monkeypatch):
    monkeypatch.setattr(entropy_control, "TARGET", 2.0)
    settings = {"entropy_control": "adaptive", "proposer": "frozen-base", "solver_tasks": "fresh"}
    whole, (parts, _) = world.run(steps=3, **settings), world.run_in_two(2, 3, **settings)
    assert parts == whole.rows


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--algorithm", "sft", "--data", "TASKS"], 'has no "response"'),
        (["--algorithm", "rlvr", "--data", "/nowhere"], "/nowhere: no such file"),
        (["--eval-data", "MATH"], "has math tasks"),
        (["--proposer", "frozen"], "invalid choice: 'frozen'"),
        (["--off-policy-gamma", "0.5"], "needs --off-policy-source"),
        (["--off-policy-gamma", "0.5", "--off-policy-source", "GOLD"], "a response without log_probs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, files, tmp_path, capsys):
    flags = [{"TASKS": files["tasks"], "MATH": files["math"], "GOLD": files["gold"]}.get(flag, flag) for flag in flags]
    try:
        code = train_azr.main(["--out", str(tmp_path / "run"), *flags])
    except SystemExit as stop:
        code = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_azr.py")]
    assert code == 2 and len(lines) == 1 and words in lines[0] and not (tmp_path / "run").exists()


def test_a_runs_tasks_and_answers_become_files(world, tmp_path, capsys):
    run = world.run(**MANY)
    buffers, policy = run.state.buffers, run.state.policy
    run.state.run.save_checkpoint(2, policy.save_adapter, {}, {"buffers": buffers.state_dict()}, {})
    tasks, own = tmp_path / "tasks.jsonl", tmp_path / "own.jsonl"
    assert make_data.main(["run", str(run.out), str(tasks)]) == 0
    assert "--step-tokens" in capsys.readouterr().out
    assert len(load_tasks(tasks)) == sum(buffers.size(mode) for mode in MODES) - 3
    assert make_data.main(["run", str(run.out), str(own), "--solutions", "--per-task", "2"]) == 0
    right = {(row["prompt"], row["response"]) for row in run.samples if row["reward"].get("correct")}
    from azr.tasks.prompts import solve_prompt

    written = load_tasks(own, True)
    assert written and all((solve_prompt(task, "tiny"), task.response) in right for task in written)
    assert all(json.loads(line)["response"] for line in own.read_text().splitlines())

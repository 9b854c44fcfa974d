"""Formulas of the arms against hand-computed cases, closed forms, finite differences; draws, files, refusals."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import train_azr
from azr.analysis import rewards as rewards_plot
from azr.evals.held_out import load_tasks
from azr.policy.sampling import Completion
from azr.tasks import Task, judge, parse_answer
from azr.tasks.task import Parsed, Sample
from azr.train import arms, make_data, rewards, rules, update
from azr.train.arms import entropy_control, off_policy
from azr.train.config import Config, resolve
from azr.train.data import draw, fill, tokens, trimmed


def made(length: int) -> Sample:
    return Sample("solver", "math", "", [1], Completion([0] * length, [], "stop"), "", "g")


# ------------------------------------------------------------------------------------------------------------ rewards


def earned(shape: str, rate: float | None, penalty: float = 0.0, valid: bool = True, well_formed: bool = True) -> float:
    """What a proposal earns in the loop whose task was solved at this rate."""
    config = Config(proposer_reward=shape, ends_penalty=penalty)
    task = Task("deduction", "def f(x):\n    return x", "1", "1") if valid else None
    parsed = Parsed(well_formed, None, "ok")
    sample = Sample("proposer", "deduction", "", [], None, "", "g", parsed=parsed, task=task, solve_rate=rate)
    return train_azr.proposer_reward(train_azr.State(config, None, None, arms=arms.Arms.of(config)), sample)


def test_proposer_rewards_by_hand():
    expected = {  # at r = 0, 1/4, 1/2, 1
        "learnability": [0, 0.75, 0.5, 0],
        "half-peak": [0, 0.5, 1, 0],
        "uniform": [1, 1, 1, 1],
        "variance": [0, 0.75, 1, 0],
        "gaussian": [0, math.exp(-0.78125), 1, 0],
        "gate": [0, 1, 1, 0],
    }
    for shape, values in expected.items():
        rates = (0.0, 0.25, 0.5, 1.0)
        assert [rewards.task_reward(shape, r) for r in rates] == pytest.approx(values)
        assert [earned(shape, r) for r in rates] == pytest.approx(values)
        penalised = [values[0] - 0.5, values[1], values[2], values[3] - 0.5]
        assert [earned(shape, r, 0.5) for r in rates] == pytest.approx(penalised)
        assert earned(shape, None, 0.5, valid=False) == -1 == earned(shape, 0.5, well_formed=False)
    assert Config().proposer_reward == "learnability"  # the default is the published one
    assert set(expected) | {"random", "above-chance"} == set(rewards.SHAPES)
    assert [rewards.above_chance(r, 0.5) for r in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 0, 0.5, 1]
    assert rewards.above_chance(0.3, 0.0) == 0.3 and rewards.above_chance(1.0, 1.0) == 0.0


def test_the_random_reward_is_uniform_and_follows_from_the_task_alone():
    tasks = [Task("deduction", "def f(x):\n    return x", str(i), str(i)) for i in range(2000)]
    values = [rewards.task_reward("random", r, 0.0, task.hash) for task in tasks for r in (0.0, 0.5)]
    assert values[::2] == values[1::2] and 0 <= min(values) and max(values) < 1
    ordered = sorted(values[::2])
    assert max(abs(v - i / 2000) for i, v in enumerate(ordered)) < 1.63 / 2000**0.5  # Kolmogorov-Smirnov at 1 %


def test_the_expected_reward_has_its_closed_forms_and_its_peak():
    for n, p in itertools.product((1, 2, 8, 16), (0.0, 0.1, 0.5, 0.9, 1.0)):
        e = lambda shape, x=0.0: rewards.expected_reward(shape, p, n, x)  # noqa: E731
        assert e("learnability") == pytest.approx(1 - p - (1 - p) ** n, abs=1e-12)
        assert e("variance") == pytest.approx(4 * p * (1 - p) * (n - 1) / n, abs=1e-12)
        assert e("gate") == pytest.approx(1 - p**n - (1 - p) ** n, abs=1e-12)
        assert e("uniform") == pytest.approx(1)
        assert e("random", 0.5) == pytest.approx(0.5 - 0.5 * (p**n + (1 - p) ** n))
        assert e("gate", 0.5) == pytest.approx(e("gate") - 0.5 * (p**n + (1 - p) ** n), abs=1e-12)
    curve = rewards.curves(8)
    peak = curve["p"][curve["learnability"].index(max(curve["learnability"]))]
    assert peak == pytest.approx(1 - 8 ** (-1 / 7), abs=1e-3) == pytest.approx(0.257, abs=1e-3)
    rng = random.Random(0)  # and against drawing solve rates
    drawn = [rewards.gaussian(sum(rng.random() < 0.3 for _ in range(8)) / 8) for _ in range(20_000)]
    assert sum(drawn) / 20_000 == pytest.approx(rewards.expected_reward("gaussian", 0.3, 8), abs=0.01)


def test_the_plot_of_expected_rewards(tmp_path, capsys):
    options = SimpleNamespace(answers=8, ends_penalty=0.0, json=None, out=str(tmp_path))
    assert rewards_plot.main(options) == 0
    assert "learnability  highest at p = 0.257" in capsys.readouterr().out
    assert (tmp_path / "proposer_rewards.png").read_bytes()[:4] == b"\x89PNG"


# --------------------------------------------------------------------------------------------------- entropy controls


def test_which_tokens_each_control_takes():
    advantage, log_prob = torch.tensor([2.0, 2, 0, 0, -4]), torch.tensor([-0.1, -2.0, -0.1, -1.0, -4.8])
    cov = entropy_control.covariance(advantage, log_prob)
    assert cov.tolist() == pytest.approx([3.0, -0.8, 0.0, 0.0, 12.8], abs=1e-5)
    assert cov.mean().item() == pytest.approx(
        (advantage * log_prob).mean().item() - advantage.mean().item() * log_prob.mean().item(), abs=1e-5
    )
    generator = torch.Generator().manual_seed(0)
    assert entropy_control.clip_cov(cov, 0.9, generator).tolist() == [True] + [False] * 4  # 12.8 is above the band
    assert not entropy_control.clip_cov(cov - 20, 0.9, generator).any()
    assert entropy_control.largest(cov, 0.4).tolist() == [True, False, False, False, True]  # kl-cov
    assert entropy_control.largest(cov, 1e-9).sum() == 1
    advantage = torch.tensor([1.0] * 8 + [3.0, 3.0])
    chosen = entropy_control.high_advantage(advantage, torch.tensor([-0.01] * 9 + [-0.5]), 0.2)
    assert chosen.tolist() == [False] * 8 + [True, False]  # above the 80th percentile, and p above 0.8


def test_clip_cov_draws_its_fraction_uniformly_from_the_band():
    cov = torch.tensor([0.5, 2.0, 3.0, 4.0, 6.0] * 20)
    counts = torch.zeros(100)
    for seed in range(600):
        chosen = entropy_control.clip_cov(cov, 0.05, torch.Generator().manual_seed(seed))
        assert chosen.sum() == 5
        counts += chosen
    band = (cov > 1) & (cov < 5)
    assert counts[~band].sum() == 0
    assert counts[band].min() > 25 and counts[band].max() < 85  # 50 expected, six standard deviations


def control(name: str, **settings):
    """The arm of an entropy control, with =VALUE or the default strength of the embedded model."""
    minibatches = 4 if name.split("=")[0] in rules.NEED_RATIO else 1
    [arm] = arms.Arms.of(resolve(Config(entropy_control=name, minibatches=minibatches, **settings))[0]).arms
    return arm


def test_marked_tokens_lose_their_gradient_and_kl_cov_adds_its_own():
    old, marked = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[True, True, False]])
    log_prob = torch.tensor([[-1.1, -0.9, -1.1]], requires_grad=True)

    def loss(name: str, x: torch.Tensor, old: torch.Tensor = old) -> torch.Tensor:
        return control(name).controlled(SimpleNamespace(log_prob=x, old_log_prob=old), 3 * x, marked).sum()

    loss("clip-cov", log_prob).backward()
    assert log_prob.grad.tolist() == [[0, 0, 3]]
    log_prob.grad = None
    loss("kl-cov", log_prob).backward()
    assert log_prob.grad.tolist() == [[3 - 1, 3 + 1, 3]]  # beta |d|: towards the old policy
    step = torch.tensor([[1e-3, 0, 0]])
    ends = [loss("kl-cov", log_prob.detach() + sign * step).item() for sign in (1, -1)]
    assert log_prob.grad[0, 0].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, abs=1e-2)
    log_prob.grad = None  # while nothing has moved, kl-cov changes nothing
    loss("kl-cov", log_prob, log_prob.detach()).backward()
    assert log_prob.grad.tolist() == [[3, 3, 3]]


def test_clip_bounds_and_what_counts_as_touched():
    assert control("clip-higher").clip(0.2, 0.2) == (0.2, 0.28)
    assert control("clip-higher=0.5").clip(0.2, 0.2) == (0.2, 0.5)
    assert control("clip-cov").clip(0.2, 0.2) == (1, 1)
    assert control("bonus").clip(0.2, 0.2) == (0.2, 0.2) == arms.Arms().clip(0.2, 0.2)
    old, sample = torch.zeros(5), made(5)
    log_prob = torch.tensor([1.1, 1.25, 1.25, 1.35, 0.7]).log()
    advantage = torch.tensor([1.0, 1, -1, 1, -1])

    def share(name, log_prob=log_prob):
        arm = control(name)
        arm.marks = {id(sample): [1.0, 1.0, 0.0, 0.0, 0.0]}
        columns = update.Columns([sample], log_prob, old, old, advantage, arm.clip(0.2, 0.2), old.numel())
        return arm.metrics(columns)["control_share"]

    assert share("clip-higher") == pytest.approx(1 / 5)  # 1.25 with A > 0; 1.35 stays clipped
    assert share("high-advantage-clip") == pytest.approx(2 / 5)
    assert share("kl-cov") == pytest.approx(2 / 5) and share("kl-cov", log_prob=old) == 0
    assert share("bonus") == 1


def test_the_adaptive_coefficient_by_hand():
    arm, found = control("adaptive=0.05"), []
    for entropy in (0.8, 0.71, 0.72, 0.73, 0.9, 0.9):
        arm.state = entropy_control.adapt(arm.state, entropy, arm.strength)
        found.append(arm.coefficient)
    assert arm.state["target"] == pytest.approx(0.72)
    assert found == pytest.approx([0, 0.001, 0.002, 0, 0, 0])  # active at or below the target only
    assert arm.state["coefficient"] == 0 and not arm.every_token
    for _ in range(80):
        arm.state = entropy_control.adapt(arm.state, 0.1, arm.strength)
    assert arm.coefficient == pytest.approx(0.05) and arm.every_token  # the cap
    assert control("bonus=0.3").coefficient == 0.3


# --------------------------------------------------------------------------------------------------------- off-policy


def test_luffy_shaping_has_its_closed_form_gradient():
    log_prob = torch.linspace(-8, -0.001, 50, dtype=torch.float64).requires_grad_()
    off_policy.luffy_token_loss(log_prob, torch.tensor(2.0)).sum().backward()
    p = log_prob.detach().exp()
    assert log_prob.grad.tolist() == pytest.approx((-2 * 0.1 * p / (p + 0.1) ** 2).tolist())
    at = lambda x: off_policy.luffy_token_loss(torch.tensor(x, dtype=torch.float64), 1.0).item()  # noqa: E731
    weights = [-(at(math.log(p) + 1e-5) - at(math.log(p) - 1e-5)) / 2e-5 for p in (0.05, 0.1, 0.2)]
    assert weights[1] == pytest.approx(0.25, abs=1e-6) and weights[1] == max(weights)  # highest at p = 0.1


def weighed(groups: list[tuple[str, str, str]], lengths: list[int]) -> list[Sample]:
    """Samples of (role, mode, objective) with so many tokens."""
    return [
        Sample(role, mode, "", [1], Completion([0] * n, [], "stop"), "", "g", objective=objective)
        for (role, mode, objective), n in zip(groups, lengths)
    ]


def test_mixing_gives_gamma_of_each_group_that_has_both():
    both, solver = ("solver", "deduction"), "solver"
    groups = [(*both, ""), (*both, "luffy"), (*both, "luffy")]
    groups += [(solver, "abduction", ""), (solver, "induction", "luffy")]
    samples = weighed([*groups, ("proposer", "deduction", "")], [2, 3, 4, 5, 7, 6])
    plain = train_azr.token_weights(samples)
    mixed = off_policy.mixed_token_weights(samples, plain, 0.3)
    assert mixed == pytest.approx([0.7 / 12, 0.3 / 42, 0.3 / 42, 1 / 30, 1 / 42, 1 / 36])
    own = [sample for sample in samples if not sample.objective]
    assert off_policy.mixed_token_weights(own, train_azr.token_weights(own), 0.3) == train_azr.token_weights(own)
    zero = off_policy.mixed_token_weights(samples, plain, 0.0)
    assert [w for w, s in zip(zero, samples) if not s.objective] == pytest.approx(train_azr.token_weights(own))


def test_effective_sample_size_and_truncation():
    behaviour = torch.zeros(4)
    stats = off_policy.ratio_statistics(torch.tensor([1.0, 1.0, 1.0, 3.0]).log(), behaviour)
    assert stats["ess"] == pytest.approx(36 / (4 * 12)) and stats["truncated"] == 0.25
    assert off_policy.ratio_statistics(behaviour, behaviour) == {"ess": 1.0, "truncated": 0.0}
    assert math.isnan(off_policy.ratio_statistics(torch.zeros(0), torch.zeros(0))["ess"])


def answer(task: int, mode: str = "deduction") -> Sample:
    text, completion = f"response {task}", Completion([task], [-1.0 * task], "stop")
    return Sample("solver", mode, "", [1], completion, text, f"g{task}", task=Task(mode, "p", str(task)), correct=True)


def test_shuffled_solutions_are_those_of_other_tasks_of_the_mode():
    samples = [answer(1), answer(1), answer(2), answer(3), answer(9, "abduction")]
    found = off_policy.exchanged(samples)
    assert len(found) == 4 and all(s.mode == "deduction" and s.correct for s in found)
    for sample in found:
        assert sample.response != f"response {sample.task.input}" and sample.completion.ids != [int(sample.task.input)]
    assert {s.task.input for s in found} == {"1", "2", "3"}


# ------------------------------------------------------------------------------------------------------ files and draws


def test_an_epoch_shows_every_task_once_and_depends_on_nothing_but_the_step():
    data = [Task("deduction", "p", str(i)) for i in range(10)] + [Task("abduction", "p", str(i)) for i in range(5)]
    steps = [draw(data, step, 10, seed=1) for step in range(1, 5)]
    assert all(sum(task.mode == "abduction" for task in tasks) == 5 for tasks in steps)
    first = [task.input for tasks in steps[:2] for task in tasks if task.mode == "deduction"]
    assert sorted(first) == sorted(str(i) for i in range(10)) and first != sorted(first)
    assert draw(data, 3, 10, seed=1) == steps[2] != draw(data, 3, 10, seed=2)
    assert len(draw(data, 1, 7, seed=1)) == 7
    assert draw(data, 1, 6, 1, wave=0) != draw(data, 1, 6, 1, wave=1)


def test_filling_a_step_comes_within_a_sample_of_its_tokens(capsys):
    assert len(trimmed([made(5)] * 10, 23)) == 5 and len(trimmed([made(5)] * 10, 22)) == 4
    assert trimmed([made(9)], 4) == []
    rng, keys = random.Random(0), []

    def solve(tasks, key):
        keys.append(key)
        return [made(rng.randint(3, 20)) for _ in range(4 * tasks)]

    samples = fill(500, 4, lambda wave, count: count, solve)
    assert abs(tokens(samples) - 500) <= 10 and keys == [f"fill-{i}" for i in range(len(keys))]
    assert fill(50, 4, lambda wave, count: 0, lambda tasks, key: []) == []
    assert "warning: 0 of 50 tokens" in capsys.readouterr().err


def test_task_files_of_the_generator(tmp_path, capsys):
    path, modes = tmp_path / "gold.jsonl", "deduction,abduction,induction,math"
    assert make_data.main(["tiny", str(path), "--count", "12", "--modes", modes, "--solutions"]) == 0
    assert "48 solutions (deduction 12, abduction 12, induction 12, math 12)" in capsys.readouterr().out
    solutions = load_tasks(path, solutions=True)
    parsed = [parse_answer(task.mode, task.response) for task in solutions]
    assert all(p.well_formed for p in parsed)
    from sandbox import Sandbox

    code = [(task, p.value) for task, p in zip(solutions, parsed) if task.mode != "math"]
    with Sandbox(1) as sandbox:
        assert all(verdict.ok for verdict in judge(code, sandbox))  # gold solutions are right
    assert all(p.value == task.answer for task, p in zip(solutions, parsed) if task.mode == "math")
    again = tmp_path / "tasks.jsonl"
    assert make_data.main(["tiny", str(again), "--count", "12", "--modes", modes]) == 0
    assert {t.hash for t in load_tasks(again)} == {t.hash for t in solutions}
    with pytest.raises(ValueError, match="line 1: has no .response."):
        load_tasks(again, solutions=True)
    assert make_data.main(["run", str(tmp_path), str(again)]) == 2
    assert make_data.main(["tiny", str(tmp_path), "--count", "1"]) == 2  # before it draws
    assert f"is a directory; give the name of a file, such as {tmp_path}/tasks.jsonl" in capsys.readouterr().err
    assert make_data.main(["tiny", str(tmp_path / "new" / "deep.jsonl"), "--count", "1"]) == 0
    capsys.readouterr()
    for flags, words in (
        (["--modes", "poetry"], "poetry: there are"),
        (["--statements", "0"], "from 1 to 8"),
        (["--statements", "2,x"], "from 1 to 8"),
        (["--style", "full"], "needs --solutions"),
        (["--proposals"], "need --solutions"),
    ):
        assert make_data.main(["tiny", str(again), *flags]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line


def test_task_files_of_one_difficulty_and_style(tmp_path):
    """What experiments need: programs of given lengths, thoughts of a given style, nothing that is held out."""
    from azr.tiny import split
    from azr.train.evaluation import statements

    def written(*flags):
        assert make_data.main(["tiny", str(tmp_path / "made.jsonl"), "--count", "30", *flags]) == 0
        return load_tasks(tmp_path / "made.jsonl", "--solutions" in flags)

    for sizes in ("1", "3,6", "8"):
        assert {statements(task.program) for task in written("--statements", sizes)} == set(map(int, sizes.split(",")))
    thoughts = {}
    for style in make_data.STYLES:
        rows = written("--modes", "deduction", "--statements", "2", "--solutions", "--style", style)
        assert not any(split.held_out(task.program) for task in rows)
        thoughts[style] = {task.hash: task.response.partition("</think>")[0] for task in rows}
    assert len({tuple(rows) for rows in thoughts.values()}) == 1  # the same tasks
    assert set(thoughts["none"].values()) == {""} and set(thoughts["junk"].values()) == {"p;q;"}
    assert all(text.startswith("p=") and text.count(";") == 2 for text in thoughts["coarse"].values())
    for text in thoughts["check"].values():
        trace, _, again = text.partition("again ")
        assert again and trace.endswith(again)
    assert sum(len(text) for text in thoughts["full"].values()) > sum(len(t) for t in thoughts["coarse"].values())
    assert len({bool(text) for text in thoughts["ladder"].values()}) == 2


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"algorithm": "rlvr"}, "needs --data"),
        ({"data": "x"}, "selfplay makes its own tasks"),
        ({"step_tokens": 9}, "--step-tokens is for"),
        ({"algorithm": "rlvr", "data": "x", "proposer_reward": "gate"}, "nothing is proposed"),
        ({"algorithm": "rlvr", "data": "x", "proposer": "no-update"}, "nothing is proposed"),
        ({"algorithm": "rlvr", "data": "x", "ends_penalty": 0.5}, "nothing is proposed"),
        ({"algorithm": "rlvr", "data": "x", "solver_tasks": "fresh"}, "nothing is proposed"),
        ({"algorithm": "rlvr", "data": "x", "recipe": "azr"}, "recipe of self-play"),
        ({"recipe": "azr", "solver_tasks": "fresh"}, "contradicts --recipe azr"),
        ({"algorithm": "sft", "data": "x", "solver_reward": "binary"}, "nothing is rewarded"),
        ({"algorithm": "sft", "data": "x", "entropy_control": "bonus"}, "samples none"),
        ({"algorithm": "sft", "data": "x", "off_policy_gamma": 0.1, "off_policy_source": "base"}, "but solutions"),
        ({"algorithm": "sft", "data": "x", "temperature": 1.2}, "nothing is sampled"),
        ({"proposer": "frozen-base", "proposer_reward": "gate"}, "are not trained"),
        ({"entropy_control": "clip-higher"}, "--minibatches 4"),
        ({"entropy_control": "kl-cov"}, "--minibatches 4"),
        ({"entropy_control": "none=1"}, "has no strength"),
        ({"entropy_control": "bonus=x"}, "not a number"),
        ({"entropy_control": "boost"}, "must be one of"),
        ({"entropy_control": "top-entropy=2"}, "below 1"),
        ({"entropy_control": "bonus=0"}, "above 0"),
        ({"off_policy_gamma": 0.1}, "needs --off-policy-source"),
        ({"off_policy_source": "base"}, "without --off-policy-gamma"),
        ({"off_policy_weight": "luffy"}, "without --off-policy-gamma"),
        ({"off_policy_gamma": 1.0, "off_policy_source": "base"}, "below 1"),
        ({"off_policy_gamma": 0.1, "off_policy_source": "base", "recipe": "azr"}, "--recipe lean"),
        ({"off_policy_gamma": 0.1, "off_policy_source": "f", "off_policy_control": "on-policy"}, "a file costs none"),
    ],
)
def test_what_contradicts_itself_or_does_nothing_is_refused_with_the_reason(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        resolve(Config(**settings))
    assert "\n" not in str(caught.value)


def test_the_strength_of_a_control_is_filled_in_and_can_be_passed_back():
    config = resolve(Config(entropy_control="kl-cov", minibatches=4))[0]
    assert config.entropy_control == "kl-cov=0.02" and (config.control, config.control_strength) == ("kl-cov", 0.02)
    assert resolve(config)[0] == config
    assert rules.with_strength("kl-cov", tiny=False) == "kl-cov=0.002" and rules.with_strength("none", True) == "none"
    assert rules.describe(config) == "--minibatches 4 --entropy-control kl-cov=0.02"
    azr = resolve(Config(recipe="azr"))[0]
    assert (azr.ends_penalty, azr.entropy_control, rules.describe(azr)) == (0.5, "bonus=0.001", "")
    typed = resolve(Config(recipe="azr", ends_penalty=0.0, entropy_control="none"))[0]
    assert rules.describe(typed) == "--ends-penalty 0.0 --entropy-control none" and not arms.Arms.of(typed).arms
    frozen = resolve(Config(recipe="azr", proposer="frozen-base"))[0]
    assert frozen.ends_penalty == 0 and resolve(frozen)[0] == frozen
    plain = resolve(Config())[0]
    assert rules.describe(plain) == "" and json.dumps(plain.__dict__) and not arms.Arms.of(plain).arms

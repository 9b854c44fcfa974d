"""fp16 with a scaled loss: gradients against fp32, what overflows and what would be lost, the state across a resume.

Everything runs in real fp16 on the CPU, on the embedded model, which is small enough for that.
"""

import dataclasses
import json
import math
import shutil

import pytest
import torch

import train_azr
from azr import runs
from azr.models import model_path
from azr.policy.backoff import Sizes
from azr.policy.policy import LoraSettings, Policy, Sampling
from azr.tasks import MODES, SEED_TASKS, Sample
from azr.tasks.prompts import solve_prompt
from azr.train import loop, loss_scale
from azr.train.config import Config, resolve
from azr.train.loss_scale import FIRST, GROW_AFTER, MOST, LossScale


def stirred(dtype: str) -> Policy:
    """The embedded model in a dtype, its adapter moved off zero, the same in each."""
    policy = Policy.load(model_path("tiny"), "none", LoraSettings(8, 32.0), dtype=dtype, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def policies():
    return {dtype: stirred(dtype) for dtype in ("fp32", "fp16")}


@pytest.fixture(scope="module")
def samples(policies) -> list[Sample]:
    found, generator = [], torch.Generator().manual_seed(0)
    for i, mode in enumerate(MODES):
        ids = policies["fp32"].encode(solve_prompt(SEED_TASKS[mode], "tiny"))
        [row] = policies["fp32"].generate([ids], 2, Sampling(max_new_tokens=12), [range(10 * i, 10 * i + 2)])
        for completion in row:
            advantage = torch.randn((), generator=generator).item()
            found.append(Sample("solver", mode, "", ids, completion, "", str(i), advantage=advantage))
    return found


def step(policy, samples, scale, times=1.0) -> tuple[torch.Tensor, dict]:
    """(the last gradient that reached the clipping, the metrics) of an optimizer step that moves nothing; the
    advantages are taken `times` theirs."""
    samples = [dataclasses.replace(sample, advantage=times * sample.advantage) for sample in samples]
    optimizer, honest, seen = torch.optim.SGD(policy.trainable_parameters(), lr=0.0), train_azr.apply_gradient, []
    s = train_azr.State(resolve(Config())[0], policy, optimizer, sizes=Sizes(512), loss_scale=scale or LossScale())

    def watched(*arguments):
        seen.append(torch.cat([p.grad.flatten().clone() for p in policy.trainable_parameters()]))
        return honest(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_azr, "apply_gradient", watched)
        metrics = train_azr.optimizer_step(s, samples)
    return seen[-1], metrics


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def test_the_gradient_is_that_of_fp32_within_the_rounding_of_fp16(policies, samples):
    wanted, plain = step(policies["fp32"], samples, None)
    found, metrics = step(policies["fp16"], samples, LossScale.of("float16"))
    assert relative(found, wanted) < 1e-2
    assert metrics["loss"] == pytest.approx(plain["loss"], abs=1e-3)  # told without the scale
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=5e-3)
    assert (metrics["loss_scale"], metrics["overflows"], metrics["skipped"]) == (FIRST, 0, 0)
    assert 0 < metrics["log_prob_gap"] < 0.01 and metrics["gap_outside_10"] == 0
    assert not {"loss_scale", "overflows"} & set(plain)


def test_small_gradients_are_lost_without_the_scale_and_kept_with_it(policies, samples):
    """Each token weighs as in a step of 100,000 tokens with advantages of a hundredth."""
    tokens = sum(len(sample.completion.ids) for sample in samples)
    times = tokens / 100_000 / 100
    wanted, _ = step(policies["fp32"], samples, None, times)
    kept, _ = step(policies["fp16"], samples, LossScale.of("float16"), times)
    lost, _ = step(policies["fp16"], samples, LossScale(), times)
    assert wanted.norm() > 0 and relative(kept, wanted) < 1e-2 and relative(lost, wanted) > 0.3


def test_an_overflow_halves_the_scale_and_the_step_is_repeated(policies, samples, capsys):
    usual, _ = step(policies["fp16"], samples, LossScale.of("float16"))
    scale = LossScale(True, MOST)
    found, metrics = step(policies["fp16"], samples, scale)
    halvings = metrics["overflows"]
    assert halvings >= 2 and metrics["skipped"] == 0 and metrics["loss_scale"] == MOST / 2**halvings
    assert scale == LossScale(True, metrics["loss_scale"], 1, halvings, 0)
    assert relative(found, usual) < 2e-3
    [said] = [line for line in capsys.readouterr().err.splitlines() if "overflowed" in line]  # the first time only
    assert "fp16" in said and "repeated" in said


def test_what_no_scale_can_mend_is_skipped_and_leaves_the_scale(policies, samples):
    scale, parameter = LossScale(True, 4.0), policies["fp16"].trainable_parameters()[0]
    hook = parameter.register_hook(lambda gradient: gradient * math.nan)
    try:
        _, metrics = step(policies["fp16"], samples, scale)
    finally:
        hook.remove()
    assert metrics["skipped"] == 1 and metrics["overflows"] == 0 and scale == LossScale(True, 4.0)
    _, metrics = step(policies["fp16"], samples, scale, math.inf)  # the loss itself is no number: one attempt
    assert metrics["skipped"] == 1 and scale == LossScale(True, 4.0)


def test_good_steps_double_the_scale_up_to_a_bound():
    scale = LossScale.of("float16")
    for _ in range(GROW_AFTER - 1):
        assert not scale.again(0.5, skipped=False)
    assert scale.value == FIRST
    scale.again(0.5, skipped=False)
    assert (scale.value, scale.good) == (2 * FIRST, 0)
    assert scale.again(0.5, skipped=True) and scale.value == FIRST
    for _ in range(20 * GROW_AFTER):
        scale.again(0.5, skipped=False)
    assert scale.value == MOST


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_are_not_scaled(dtype):
    scale, x = LossScale.of(dtype), torch.tensor([3.0], requires_grad=True)
    loss = (x * x).sum()
    scale.backward(loss)
    scale.unscale([x])
    assert scale == LossScale() and x.grad.item() == 6
    assert not scale.again(0.5, skipped=True) and not scale.again(math.nan, skipped=True) and scale == LossScale()


# ------------------------------------------------------------------------------------------------- in a training run


SMALL = "--dtype fp16 --prompts-per-mode 2 --answers 2 --max-new-tokens 48 --eval-samples 0 --eval-every 0"


def train(out, few_held_out, *flags) -> list[dict]:
    flags = [*SMALL.split(), "--minibatches", "2", "--eval-data", *map(str, (few_held_out, *flags))]
    assert train_azr.main(["--out", str(out), *flags]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def test_a_run_in_fp16_goes_on_bit_for_bit(few_held_out, tmp_path, monkeypatch, capsys):
    """With overflows in the first step and a scale that grows in the second."""
    monkeypatch.setattr(loop, "PROBE", 1)
    monkeypatch.setattr(loop, "SEED_ROUNDS", 1)
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**26)
    monkeypatch.setattr(loss_scale, "MOST", 2.0**27)
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 3)
    monkeypatch.setattr(runs, "KEEP_STATES", 4)
    whole = train(tmp_path / "whole", few_held_out, "--steps", 3, "--save-every", 1)
    assert whole[0]["train/overflows"] > 0 and all(row["train/skipped"] == 0 for row in whole)
    assert capsys.readouterr().err.count("overflowed") == 1
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (2, 3):  # as if it had ended after its first step
        shutil.rmtree(tmp_path / f"parts/checkpoints/step_{step}")
    state = json.loads((tmp_path / "parts/checkpoints/step_1/state/state.json").read_text())["loss_scale"]
    assert state["active"] and state["value"] < 2.0**26 and state["overflows"] == whole[0]["train/overflows"]
    flags = ("--steps", 3, "--save-every", 1, "--resume", "auto")
    assert train(tmp_path / "parts", few_held_out, *flags) == whole
    for name in ("adapter_model.safetensors", "state/tensors.safetensors"):
        one, other = ((tmp_path / run / "checkpoints/step_3" / name).read_bytes() for run in ("whole", "parts"))
        assert one == other
    assert json.loads((tmp_path / "whole/checkpoints/step_3/azr.json").read_text())["dtype"] == "float16"
    assert json.loads((tmp_path / "whole/config.json").read_text())["dtype"] == "fp16"
    other = [*SMALL.replace("fp16", "fp32").split(), "--minibatches", "2", "--steps", "4", "--resume", "auto"]
    other += ["--eval-data", str(few_held_out)]
    assert train_azr.main(["--out", str(tmp_path / "whole"), *other]) == 2
    assert "cannot resume with other settings (dtype" in capsys.readouterr().err


def test_a_run_whose_forward_pass_is_no_number_gives_up_and_says_what_to_take(
    few_held_out, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "PROBE", 1)
    monkeypatch.setattr(loop, "SEED_ROUNDS", 1)
    honest = train_azr.ppo_loss
    monkeypatch.setattr(train_azr, "ppo_loss", lambda s, batch: honest(s, batch) * math.inf)
    flags = [*SMALL.split(), "--steps", "5", "--eval-data", str(few_held_out)]
    assert train_azr.main(["--out", str(tmp_path / "run"), *flags]) == 1
    said = capsys.readouterr().err
    assert "3 updates in a row were not finite; lower --learning-rate, or take --dtype bf16 or fp32" in said
    assert "overflowed" not in said

"""Which settings go together, and the strengths of the entropy controls. No torch.

refuse(config)                        # ValueError for what contradicts itself or does nothing
control_of("kl-cov=0.01")             # ("kl-cov", 0.01)
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from azr.train import arms

if TYPE_CHECKING:
    from azr.train.config import Config

# The default strength of each control, as published; None: it has none.
CONTROLS: dict[str, float | None] = {
    "none": None,
    "bonus": 1e-3,  # coefficient of the entropy in the loss
    "adaptive": 5e-3,  # the highest coefficient
    "clip-higher": 0.28,  # upper bound of PPO's clip
    "clip-cov": 2e-4,  # share of tokens that lose their gradient
    "kl-cov": 2e-3,  # share of tokens that get a KL penalty
    "top-entropy": 0.2,  # share of tokens that keep their gradient
    "high-advantage-clip": 0.2,  # share of tokens among the highest advantages
}
# On the embedded model a published share of tokens would be one token or none.
TINY_STRENGTH = {"clip-cov": 2e-2, "kl-cov": 2e-2}
SHARES = ("clip-cov", "kl-cov", "top-entropy", "high-advantage-clip")
NEED_RATIO = ("clip-higher", "kl-cov")  # controls that do nothing while the ratio of PPO is 1
ARM_FLAGS = "proposer proposer_reward ends_penalty entropy_control solver_tasks minibatches temperature".split()


def control_of(text: str | None) -> tuple[str, float | None]:
    """(name, strength or None where none is given) of NAME[=VALUE]; None is "none". ValueError for what cannot be."""
    name, given, value = (text or "none").partition("=")
    if name not in CONTROLS:
        raise ValueError(f"--entropy-control must be one of {', '.join(CONTROLS)}, each with =VALUE, not {text!r}")
    if not given:
        return name, None
    if CONTROLS[name] is None:
        raise ValueError(f"--entropy-control {name} has no strength: leave {given}{value} out")
    try:
        strength = float(value)
    except ValueError as error:
        raise ValueError(f"--entropy-control {text}: {value!r} is not a number") from error
    if not 0 < strength < math.inf or (name in SHARES and strength >= 1):
        below = " and below 1, a share of the tokens" if name in SHARES else ""
        raise ValueError(f"--entropy-control {text}: the strength must be above 0{below}")
    return name, strength


def of_recipe(config: Config) -> dict[str, float | str]:
    """The settings that --recipe azr has unless they are typed, where they act: its code takes 0.5 off at both ends,
    its `paper` branch has an entropy bonus of 0.001."""
    published = config.recipe == "azr" and config.algorithm == "selfplay"
    rewarded = published and config.proposer in ("joint", "separate")  # else no proposal is trained
    return {"ends_penalty": 0.5 if rewarded else 0.0, "entropy_control": "bonus=0.001" if published else "none"}


def with_strength(text: str, tiny: bool) -> str:
    """NAME=VALUE with the default where no strength is given; a control that has none as it is."""
    name, strength = control_of(text)
    default = TINY_STRENGTH.get(name, CONTROLS[name]) if tiny else CONTROLS[name]
    strength = default if strength is None else strength
    return name if strength is None else f"{name}={strength}"


def refuse(config: Config) -> None:
    """ValueError, in one line with the reason, for a combination that contradicts itself or does nothing."""
    of_arms = [rule for kind in arms.chosen(config) for rule in kind.refuses(config)]
    for wrong, reason in _rules(config) + of_arms:
        if wrong:
            raise ValueError(reason)


def _rules(c: Config) -> list[tuple[bool, str]]:
    """Those that belong to no arm that the settings ask for."""
    selfplay, gamma = c.algorithm == "selfplay", c.off_policy_gamma
    full = c.train == "full"
    # of each mode: the proposals, and the answers to them
    samples = {"selfplay": 2 if c.recipe == "azr" else 1 + c.answers}.get(c.algorithm, c.answers)
    most = math.inf if c.step_tokens else 3 * c.prompts_per_mode * samples
    others = (c.off_policy_source, c.off_policy_weight, c.off_policy_control) != (None, "truncated", "none")
    return [
        (selfplay and bool(c.data), "--data is for --algorithm rlvr or sft: selfplay makes its own tasks"),
        (selfplay and c.step_tokens is not None, "--step-tokens is for --algorithm rlvr or sft, not for selfplay"),
        (
            c.recipe == "azr" and c.solver_tasks == "fresh",
            "--solver-tasks fresh contradicts --recipe azr, whose solver prompts come from the buffer",
        ),
        (
            c.control in NEED_RATIO and c.minibatches == 1,
            f"--entropy-control {c.control} does nothing with one update a step, where every ratio is 1: give "
            "--minibatches 4, and compare with --entropy-control none --minibatches 4",
        ),
        (full and c.quantization == "nf4", "--train full trains the weights themselves: --quantization none, not nf4"),
        (
            full and (c.lora_rank, c.lora_alpha, c.lora_targets) != (None, None, "all-linear"),
            "--lora-... flags contradict --train full, which has no adapter",
        ),
        (full and bool(c.adapter), "--adapter is a warm start of --train lora; give a whole model with --model"),
        (
            full and (c.proposer in ("frozen-base", "separate") or c.off_policy_source == "base"),
            "--train full keeps no base beside the policy: --proposer frozen-base and separate and --off-policy-source "
            "base need --train lora",
        ),
        (
            c.minibatches > most,
            f"--minibatches {c.minibatches} is more than the {most} samples that a step can have: give fewer",
        ),
        (
            c.rollout_weights == "bf16" and c.quantization == "none",
            "--rollout-weights bf16 copies a 4-bit base; with --quantization none there is none to copy",
        ),
        (gamma == 0 and others, "--off-policy-... flags do nothing without --off-policy-gamma above 0"),
    ]


def describe(config: Config) -> str:
    """The flags by which a run differs from plain self-play; "" if by none."""
    names = [f for f in dataclasses.fields(config) if f.name in ARM_FLAGS or f.name.startswith("off_policy_")]
    usual = {f.name: f.default for f in names} | of_recipe(config)
    given = [(name, getattr(config, name)) for name in usual if getattr(config, name) not in (usual[name], None)]
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given)

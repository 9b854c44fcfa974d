"""Solutions that the policy did not write, mixed into the solver's groups with a weight gamma.

    gamma = gamma_at(config.off_policy_gamma, "linear", step, steps)
    weight = mixed_token_weights(group, lengths, foreign, gamma)          # gamma of a group's weight to the foreign
    token_loss = luffy_token_loss(log_prob, advantage)
    samples = Foreign(config, policy, template, given, solve, judge, score).solutions(step, answers)

The behaviour policy is the base (adapter off, its log-probs recorded) or the unknown author of a file. Solutions of the
base cannot widen what the base can do, they can only undo what training narrowed; a file can do both.

Left out: prefixes of solutions (Prefix-RFT, arXiv 2507.01679), replay of the policy's own (ExGRPO, arXiv 2510.02245).
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from azr.train import arms, ppo
from azr.tasks.prompts import solve_prompt
from azr.policy.sampling import Completion
from azr.tasks import Sample, Task, parse_answer

if TYPE_CHECKING:
    from azr.train.config import Config
    from azr.policy.policy import Policy

SHAPING = 0.1  # of LUFFY (Yan et al. 2025, arXiv 2504.14945)
CAP = 2.0  # of the truncated importance ratio
SELDOM = 0.5  # tasks solved at most this often get solutions of the base


def gamma_at(gamma: float, schedule: str, step: int, steps: int) -> float:
    """The weight at a step, 1 to `steps`: constant, or linear from gamma down to gamma / steps."""
    return gamma * (1 - (step - 1) / steps) if schedule == "linear" else gamma


def luffy_token_loss(log_prob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """-A f(p), f(p) = p / (p + 0.1): policy shaping of LUFFY (arXiv 2504.14945), for tokens of anyone.

    The weight on A grad log p is f'(p) p = 0.1 p / (p + 0.1)^2, highest at p = 0.1, where plain importance weighting
    with behaviour probability 1 has p: rare tokens are lifted. No clip.
    """
    p = log_prob.exp()
    return -advantage * p / (p + SHAPING)


def sft_token_loss(log_prob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """-A log p with A = 1: cross-entropy of a given response."""
    return -advantage * log_prob


def mixed_token_weights(group, lengths, foreign, gamma: float, weighting: str = "group", groups: int = ppo.GROUPS):
    """The weight of every token of a sample, (samples,) fp32, where `foreign` (samples,) bool were not sampled.

    In a group that has both, foreign tokens share gamma of its weight and sampled ones 1 - gamma; a group that has one
    kind gives it all. Without foreign samples these are ppo.token_weights. weighting "token": all samples one group.
    """
    if not foreign.any():
        return ppo.token_weights(group, lengths, weighting, groups=groups)
    part = group if weighting == "group" else torch.zeros_like(group)
    weight = torch.empty(len(lengths))
    counts = [ppo.group_token_counts(part[rows], lengths[rows], groups) for rows in (foreign, ~foreign)]
    both = (counts[0] > 0) & (counts[1] > 0)
    for rows, share in ((foreign, gamma), (~foreign, 1 - gamma)):
        own = ppo.token_weights(group[rows], lengths[rows], weighting, groups=groups)
        weight[rows] = own * torch.where(both[part[rows]], share, 1.0).float()
    return weight


def on_policy_baseline(rewards, foreign, group_ids, mode_ids) -> torch.Tensor:
    """Lean advantages, (samples,) fp32, whose mean and std come from the sampled answers alone.

    The union of both (ppo.lean_advantages over all) lowers what the own right answers of a group earn; this does not.
    A foreign solution to a task without own answers gets its reward over the mode's std.
    """
    own = ~foreign
    values = torch.zeros(len(rewards))
    values[own] = ppo.lean_advantages(rewards[own], group_ids[own], mode_ids[own])
    for i in foreign.nonzero().squeeze(-1).tolist():
        task, mode = rewards[own & (group_ids == group_ids[i])], rewards[own & (mode_ids == mode_ids[i])]
        scale = (mode.double().var() + 1e-8).sqrt() if len(mode) > 1 and mode.max() > mode.min() else 1.0
        values[i] = (rewards[i] - (task.double().mean() if len(task) else 0.0)) / scale
    return values


def ratio_statistics(log_prob: torch.Tensor, behaviour: torch.Tensor) -> dict[str, float]:
    """Of the ratio rho = p / p_behaviour over tokens, both (tokens,): effective sample size and truncated share.

    ess = (sum rho)^2 / (N sum rho^2), the share of tokens that the weighted ones are worth; 1 while the two agree.
    """
    rho = (log_prob.double() - behaviour.double()).exp()
    if not len(rho):
        return {"ess": float("nan"), "truncated": float("nan")}
    ess = rho.sum() ** 2 / (len(rho) * (rho**2).sum())
    return {"ess": ess.item(), "truncated": (rho > CAP).double().mean().item()}


# -------------------------------------------------------------------------------------------- the solutions of a step


def given_sample(policy: Policy, task: Task, template: str, group: str) -> Sample:
    """The response of a solution file as a sample; its log-probs if the file has them."""
    prompt = solve_prompt(task, template)
    completion = Completion(policy.encode(task.response), list(task.log_probs or ()), "given")
    parsed = parse_answer(task.mode, task.response)
    ids = policy.encode(prompt)
    return Sample("solver", task.mode, prompt, ids, completion, task.response, group, parsed=parsed, task=task)


def supervised(policy: Policy, tasks: list[Task], template: str) -> list[Sample]:
    """The responses of a solution file as what sft trains on: advantage 1, nothing rewarded."""
    samples = [given_sample(policy, task, template, task.hash) for task in tasks]
    for sample in samples:
        sample.objective, sample.reason, sample.advantage, sample.reward = "sft", "given", 1.0, float("nan")
    return samples


def exchanged(samples: list[Sample]) -> list[Sample]:
    """The control: each sample with the response of the next of its mode that is about another task, as if right.

    A mode with solutions to a single task has none to exchange: its samples are left out. Log-probs are to be redone.
    """
    result = []
    for mode in dict.fromkeys(sample.mode for sample in samples):
        mine = [sample for sample in samples if sample.mode == mode]
        for i, sample in enumerate(mine):
            others = (mine[(i + j) % len(mine)] for j in range(1, len(mine)))
            other = next((o for o in others if o.task.hash != sample.task.hash), None)
            if other is not None:
                completion = dataclasses.replace(other.completion)
                taken = {"completion": completion, "response": other.response, "parsed": other.parsed}
                result.append(dataclasses.replace(sample, **taken, reason="shuffled"))
    return result


class Foreign:
    """What a run mixes into the groups of its solver; nothing at gamma 0.

    given: the solutions of a file, [] for the base. solve(step, tasks, n, key) -> judged samples of the policy as it is
    set now. judge(samples) -> the samples with their verdicts. score(samples, base) -> copies with log-probs.
    """

    def __init__(self, config: Config, policy: Policy, template: str, given: list[Task], solve, judge, score):
        self.config, self.policy, self.solve, self.score = config, policy, solve, score
        self.given: dict[str, list[Sample]] = {}
        samples = [given_sample(policy, task, template, "") for task in given]
        for sample in samples if config.off_policy_weight == "truncated" else []:
            self._check_log_probs(sample)
        right = [sample for sample in judge(samples) if sample.correct and sample.parsed.well_formed]
        if given and not right:
            raise ValueError(
                f"{config.off_policy_source}: none of its {len(given)} responses is right and well-formed"
            )
        if len(right) < len(given):
            said = f"{len(given) - len(right)} of {len(given)} responses are wrong or malformed and are left out"
            print(f"warning: {config.off_policy_source}: {said}", file=sys.stderr, flush=True)
        for sample in right:
            self.given.setdefault(sample.task.hash, []).append(sample)

    def _check_log_probs(self, sample: Sample) -> None:
        have, tokens = len(sample.completion.log_probs), len(sample.completion.ids)
        if have != tokens:
            what = (
                f"{have} log_probs for the {tokens} tokens of a response" if have else "a response without log_probs"
            )
            raise ValueError(
                f"{self.config.off_policy_source}: {what}; the ratio of --off-policy-weight truncated needs one a "
                "token under this model's tokenizer; --off-policy-weight luffy needs none"
            )

    def gamma(self, step: int) -> float:
        return gamma_at(self.config.off_policy_gamma, self.config.off_policy_schedule, step, self.config.steps)

    def tasks(self, step: int) -> list[Task]:
        """Tasks of the file that self-play solves besides its own: gamma of the prompts of each mode, at least one."""
        if not self.given or not self.gamma(step):
            return []
        tasks = [samples[0].task for samples in self.given.values()]
        modes = len({task.mode for task in tasks})
        count = max(1, round(self.gamma(step) * self.config.prompts_per_mode)) * modes
        return list({task.hash: task for task in arms.draw(tasks, step, count, self.config.seed)}.values())

    def solutions(self, step: int, answers: list[Sample]) -> list[Sample]:
        """Foreign solutions to the tasks of the answers, in their groups; the control's instead, if there is one."""
        if not self.gamma(step):
            return []
        groups = {sample.task.hash: sample.group for sample in answers}
        if self.given:
            found = [sample for task in groups for sample in self.given.get(task, ())]
        else:
            found = self._of_the_base(step, answers)
        control = self.config.off_policy_control
        if control == "on-policy":
            return [dataclasses.replace(sample, group=groups[sample.task.hash]) for sample in found]
        if control == "shuffled":
            found = exchanged(found)
            if not self.given:  # under their new prompts
                for sample, scored in zip(found, self.score(found, base=True)):
                    sample.completion.log_probs = scored.old_log_prob
        weight = self.config.off_policy_weight
        return [dataclasses.replace(s, group=groups[s.task.hash], objective=weight) for s in found]

    def _of_the_base(self, step: int, answers: list[Sample]) -> list[Sample]:
        """Right answers of the base to tasks that are solved at most half the time (control on-policy: any of the
        policy's own, as many as the base would have drawn)."""
        own = self.config.off_policy_control == "on-policy"
        right: dict[str, list[bool]] = {}
        for sample in answers:
            right.setdefault(sample.task.hash, []).append(sample.correct)
        tasks = {s.task.hash: s.task for s in answers if sum(right[s.task.hash]) <= SELDOM * len(right[s.task.hash])}
        with nullcontext() if own else self.policy.disable_adapter():
            drawn = self.solve(step, list(tasks.values()), self.config.off_policy_samples, "off-policy")
        return drawn if own else [sample for sample in drawn if sample.correct and sample.parsed.well_formed]

    def metrics(self, step: int, samples: list[Sample]) -> dict[str, float]:
        """Of a step's samples before their update: how many are foreign, their ratio to the behaviour policy, and the
        KL of the policy to the base on the solver's own answers (k3). {} at gamma 0."""
        if not self.gamma(step):
            return {}
        foreign = [sample for sample in samples if sample.objective]
        own = [s for s in samples if s.role == "solver" and not s.objective and len(s.completion.ids)]
        known = [(s, now) for s, now in zip(foreign, self.score(foreign)) if s.completion.log_probs]
        ratio = ratio_statistics(
            torch.tensor([x for _, now in known for x in now.old_log_prob]),
            torch.tensor([x for sample, _ in known for x in sample.completion.log_probs]),
        )
        sampled = torch.tensor([x for sample in own for x in sample.completion.log_probs])
        base = torch.tensor([x for scored in self.score(own, base=True) for x in scored.old_log_prob])
        return {
            "off_policy_gamma": self.gamma(step),
            "off_policy_solutions": len(foreign),
            "off_policy_tokens": sum(len(sample.completion.ids) for sample in foreign),
            "off_policy_ess": ratio["ess"],
            "off_policy_truncated": ratio["truncated"],
            "kl_to_base": ppo.kl_k3(sampled, base).mean().item() if len(sampled) else float("nan"),
        }

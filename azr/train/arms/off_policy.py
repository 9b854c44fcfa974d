"""--off-policy-...: solutions that the policy did not write, mixed into the solver's groups with a weight gamma.

The behaviour policy is the base (adapter off, its log-probs recorded) or the unknown author of a file. Solutions of the
base cannot widen what the base can do, they can only undo what training narrowed; a file can do both.

Left out: prefixes of solutions (Prefix-RFT, arXiv 2507.01679), replay of the policy's own (ExGRPO, arXiv 2510.02245).
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from azr.console import warn
from azr.evals.held_out import load_tasks
from azr.policy.sampling import Completion
from azr.tasks import Sample, Task, parse_answer, parse_proposal
from azr.train import ppo, update
from azr.train.arms import Arm
from azr.train.data import draw, fitting, group_share, prompt_of, tokens

if TYPE_CHECKING:
    from azr.policy.policy import Policy

SHAPING = 0.1  # of LUFFY (Yan et al. 2025, arXiv 2504.14945)
CAP = 2.0  # of the truncated importance ratio
SELDOM = 0.5  # tasks solved at most this often get solutions of the base
SAMPLES = 8  # answers that the base draws to such a task: as many as the policy has drawn


def luffy_token_loss(log_prob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """-A f(p), f(p) = p / (p + 0.1): policy shaping of LUFFY (arXiv 2504.14945), for tokens of anyone.

    The weight on A grad log p is f'(p) p = 0.1 p / (p + 0.1)^2, highest at p = 0.1, where plain importance weighting
    with behaviour probability 1 has p: rare tokens are lifted. No clip.
    """
    p = log_prob.exp()
    return -advantage * p / (p + SHAPING)


def mixed_token_weights(samples: list[Sample], weights: list[float], gamma: float) -> list[float]:
    """The weight of every token of a sample; those with an `objective` were not sampled by the policy.

    In a (role, mode) group that has both, foreign tokens share gamma of its weight and sampled ones 1 - gamma; a group
    that has one kind keeps what it has in `weights`.
    """
    # shares are by token, as the loss is: a few long foreign solutions must not outweigh gamma
    parts: dict[tuple, int] = {}
    for sample in samples:
        key = (sample.role, sample.mode, bool(sample.objective))
        parts[key] = parts.get(key, 0) + len(sample.completion.ids)
    mixed = []
    for sample, weight in zip(samples, weights):
        foreign, group = bool(sample.objective), (sample.role, sample.mode)
        own, other = parts[(*group, foreign)], parts.get((*group, not foreign), 0)
        if own and other:  # the weight of the group, by its own tokens
            share = torch.tensor(gamma if foreign else 1 - gamma)  # fp32, as the weights are
            weight = (torch.tensor(group_share(samples) / own) * share).item()
        mixed.append(weight)
    return mixed


def ratio_statistics(log_prob: torch.Tensor, behaviour: torch.Tensor) -> dict[str, float]:
    """Of the ratio rho = p / p_behaviour over tokens, both (tokens,): effective sample size and truncated share.

    ess = (sum rho)^2 / (N sum rho^2), the share of tokens that the weighted ones are worth; 1 while the two agree.
    """
    rho = (log_prob.double() - behaviour.double()).exp()
    if not len(rho):
        return {"ess": float("nan"), "truncated": float("nan")}
    ess = rho.sum() ** 2 / (len(rho) * (rho**2).sum())
    return {"ess": ess.item(), "truncated": (rho > CAP).double().mean().item()}


def given_sample(policy: Policy, task: Task, template: str, group: str) -> Sample:
    """The response of a solution file as a sample of the role that it is of; its log-probs if the file has them."""
    role, prompt = ("proposer" if task.references else "solver"), prompt_of(task, template)
    completion = Completion(policy.encode(task.response), list(task.log_probs or ()), "given")
    if task.references:
        parsed = parse_proposal(task.mode, task.response, task.references[0].program)
    else:
        parsed = parse_answer(task.mode, task.response)
    ids = policy.encode(prompt)
    return Sample(role, task.mode, prompt, ids, completion, task.response, group, parsed=parsed, task=task)


def exchanged(samples: list[Sample]) -> list[Sample]:
    """The control: each sample with the response of the next of its mode that is about another task, as if right.

    A mode with solutions to a single task has none to exchange: its samples are left out. Log-probs are to be redone.
    """
    result = []
    for mode in dict.fromkeys(sample.mode for sample in samples):
        # in turn, not at random: the control is then the same in every repetition of the step
        mine = [sample for sample in samples if sample.mode == mode]
        for i, sample in enumerate(mine):
            others = (mine[(i + j) % len(mine)] for j in range(1, len(mine)))
            other = next((o for o in others if o.task.hash != sample.task.hash), None)
            if other is not None:
                completion = dataclasses.replace(other.completion)
                taken = {"completion": completion, "response": other.response, "parsed": other.parsed}
                result.append(dataclasses.replace(sample, **taken, reason="shuffled"))
    return result


class OffPolicy(Arm):
    """Puts foreign solutions into the solver's groups. ValueError for a file that it cannot read."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.from_file = config.off_policy_source != "base"
        self.judged = load_tasks(config.off_policy_source, solutions=True) if self.from_file else []
        self.solutions: dict[str, list[Sample]] = {}  # of the file, right and well-formed, by the hash of their task

    @classmethod
    def refuses(cls, c):
        """Settings under which foreign solutions have no source, no group to join or no effect."""
        source, own = c.off_policy_source, c.off_policy_control == "on-policy"
        gamma, control = "--off-policy-gamma", "--off-policy-control on-policy"
        weight = own and c.off_policy_weight != "truncated"
        return [
            (not source, f"{gamma} needs --off-policy-source: base (its solutions, adapter off) or a FILE of them"),
            (c.algorithm == "sft", f"{gamma} mixes solutions into sampled groups; sft trains on nothing but solutions"),
            (c.recipe == "azr", f"{gamma} mixes solutions into the groups of --recipe lean; azr has single answers"),
            (own and source != "base", f"{control} is about the cost of sampling from the base; a file costs none"),
            (weight, f"{control} has no foreign solutions: --off-policy-weight does nothing"),
        ]

    def files(self):
        """The file of solutions, if they do not come from the base."""
        return [self.config.off_policy_source] if self.from_file else []

    def start(self, s, judge):
        """Keeps the right, well-formed solutions of the file."""
        source, count = self.config.off_policy_source, len(self.judged)
        samples = [given_sample(s.policy, task, s.template, "") for task in fitting(s, self.judged)]
        for sample in samples if self.config.off_policy_weight == "truncated" else ():
            have, needed = len(sample.completion.log_probs), len(sample.completion.ids)
            if have != needed:
                what = f"{have} log_probs for the {needed} tokens of a response"
                raise ValueError(
                    f"{source}: {what if have else 'a response without log_probs'}; --off-policy-weight truncated "
                    "needs one a token under this model's tokenizer, luffy needs none"
                )
        right = [sample for sample in judge(s, samples) if sample.correct and sample.parsed.well_formed]
        if self.from_file and not right:
            raise ValueError(f"{source}: none of its {count} responses is right and well-formed")
        if len(right) < len(samples):
            wrong = len(samples) - len(right)
            warn(f"{source}: {wrong} of {len(samples)} responses are wrong or malformed and are left out")
        for sample in right:
            self.solutions.setdefault(sample.task.hash, []).append(sample)

    def tasks(self, s, step):
        """Tasks of the file that self-play solves besides its own: gamma of the prompts of each mode, at least one."""
        if not self.solutions or self.config.algorithm != "selfplay":
            return []
        tasks = [samples[0].task for samples in self.solutions.values()]
        # gamma counts prompts of one mode, and a file need not have tasks of all of them
        modes = len({task.mode for task in tasks})
        count = max(1, round(self.config.off_policy_gamma * self.config.prompts_per_mode)) * modes
        # a file that comes to its end begins anew: a task drawn twice would get twice the answers
        return list({task.hash: task for task in draw(tasks, step, count, self.config.seed)}.values())

    def samples(self, s, step, proposals, answers, solve):
        """Foreign solutions to the tasks of the answers, in their groups; the control's instead, if there is one."""
        # the group of the policy's own answers, so that a foreign one is measured against their mean
        groups = {sample.task.hash: sample.group for sample in answers}
        if self.from_file:
            solutions = [sample for task in groups for sample in self.solutions.get(task, ())]
        else:
            solutions = self.of_the_base(s, step, answers, solve)
        if self.config.off_policy_control == "on-policy":
            return [dataclasses.replace(sample, group=groups[sample.task.hash]) for sample in solutions]
        if self.config.off_policy_control == "shuffled":
            solutions = exchanged(solutions)
            if not self.from_file:  # under their new prompts
                for sample, of_base in zip(solutions, update.scored(s, solutions, base=True)):
                    sample.completion.log_probs = of_base.old_log_prob
        weight = self.config.off_policy_weight
        return [dataclasses.replace(x, group=groups[x.task.hash], objective=weight) for x in solutions]

    def of_the_base(self, s, step: int, answers: list[Sample], solve) -> list[Sample]:
        """Right answers of the base to tasks that are solved at most half the time (control on-policy: any of the
        policy's own, as many as the base would have drawn)."""
        own = self.config.off_policy_control == "on-policy"
        right: dict[str, list[bool]] = {}
        for sample in answers:
            right.setdefault(sample.task.hash, []).append(sample.correct)
        tasks = {x.task.hash: x.task for x in answers if sum(right[x.task.hash]) <= SELDOM * len(right[x.task.hash])}
        with nullcontext() if own else s.policy.disable_adapter():
            drawn = solve(s, step, list(tasks.values()), SAMPLES, "off-policy")
        return drawn if own else [sample for sample in drawn if sample.correct and sample.parsed.well_formed]

    def prepare(self, s, step, samples):
        """How many samples are foreign, their ratio to the behaviour policy, and the KL of the policy to the base on
        the solver's own answers (k3)."""
        foreign = [sample for sample in samples if sample.objective]
        own = [x for x in samples if x.role == "solver" and not x.objective and len(x.completion.ids)]
        recorded = [(x, now) for x, now in zip(foreign, update.scored(s, foreign)) if x.completion.log_probs]
        ratio = ratio_statistics(
            torch.tensor([x for _, now in recorded for x in now.old_log_prob]),
            torch.tensor([x for sample, _ in recorded for x in sample.completion.log_probs]),
        )
        sampled = torch.tensor([x for sample in own for x in sample.completion.log_probs])
        # k3 is unbiased only on tokens of the policy, hence its own answers and not the foreign ones
        base = torch.tensor([x for of_base in update.scored(s, own, base=True) for x in of_base.old_log_prob])
        return {
            "off_policy_gamma": self.config.off_policy_gamma,
            "off_policy_solutions": len(foreign),
            "off_policy_tokens": tokens(foreign),
            "off_policy_ess": ratio["ess"],
            "off_policy_truncated": ratio["truncated"],
            "kl_to_base": ppo.kl_k3(sampled, base).mean().item() if len(sampled) else float("nan"),
        }

    def weights(self, samples, weights):
        """Foreign tokens share gamma of the weight of their group, see `mixed_token_weights`."""
        return mixed_token_weights(samples, weights, self.config.off_policy_gamma)

    def token_loss(self, batch, loss):
        """luffy: its shaping. truncated: PPO's own guard (GAP_CAP) is the truncated ratio to the behaviour policy."""
        rows = [sample.objective == "luffy" for sample in batch.samples]
        if not any(rows):  # asked on the host: asking a tensor would wait for the device
            return loss
        rows = torch.tensor(rows, device=loss.device)[:, None]
        return torch.where(rows, luffy_token_loss(batch.log_prob, batch.advantage), loss)

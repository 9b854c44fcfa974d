"""The update of a step: the gradient of PPO's clipped surrogate over micro-batches, then one AdamW step.

    optimizer = make_optimizer(policy, config.learning_rate)
    advantages(samples, config.recipe)                      # from their rewards
    if config.minibatches > 1:
        old_log_probs(policy, samples, config, sizes)       # the ratio needs them before the first of several updates
    metrics = optimizer_step(policy, optimizer, samples, config, sizes)

Samples get their advantages and the entropy of each token. Memory that runs out costs a repetition with
smaller micro-batches (backoff.py), never a sample. Left out: a schedule of the learning rate, several GPUs.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from azr.train import arms, entropy_control, off_policy, ppo
from azr.policy.backoff import DoesNotFit, Sizes, retry
from azr.train.loss_scale import LossScale
from azr.tasks import MODES, Sample

if TYPE_CHECKING:
    from azr.train.config import Config
    from azr.policy.policy import Policy

BETAS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.99), 0.0, 1.0
CLIP_LOW, CLIP_HIGH, GAP_CAP = 0.2, 0.2, 2.0
GROUPS = [(role, mode) for role in ("proposer", "solver") for mode in MODES]  # the six groups of the loss


def group_number(sample: Sample) -> int:
    """Which group of the loss: one of the six, or a seventh of the same weight, mathematics from a file."""
    return len(GROUPS) if sample.mode == "math" else GROUPS.index((sample.role, sample.mode))


def make_optimizer(policy: Policy, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(policy.trainable_parameters(), lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)


def moments_to_come(policy: Policy, optimizer) -> int:
    """Bytes of the two fp32 moments that Adam has not made yet."""
    return sum(8 * p.numel() for p in policy.trainable_parameters() if p not in optimizer.state)


def advantages(samples: list[Sample], recipe: str, baseline: str = "union") -> None:
    """Sets each sample's advantage: lean: per task for solvers, per mode for proposers; azr: TRR++ per (role, mode).

    baseline: whether solutions the policy did not sample count in the means ("union") or not ("on-policy"). A sample
    that is not to be trained gets 0: what the others get, and their weight in the loss, is as if it were.
    """
    key = torch.tensor([group_number(sample) for sample in samples])
    rewards = torch.tensor([sample.reward for sample in samples])
    if recipe == "azr":
        values = ppo.trr_advantages(rewards, torch.tensor([len(sample.completion.ids) for sample in samples]), key)
    else:
        number = {group: i for i, group in enumerate(dict.fromkeys(sample.group for sample in samples))}
        group = torch.tensor([number[sample.group] for sample in samples])
        values, solver = torch.zeros(len(samples)), key >= len(MODES)
        values[~solver] = ppo.proposer_advantages(rewards[~solver], key[~solver])
        if baseline == "on-policy":
            foreign = torch.tensor([bool(sample.objective) for sample in samples])[solver]
            values[solver] = off_policy.on_policy_baseline(rewards[solver], foreign, group[solver], key[solver])
        else:
            values[solver] = ppo.lean_advantages(rewards[solver], group[solver], key[solver])
    for sample, value in zip(samples, values.tolist()):
        sample.advantage = value if sample.update else 0.0


def old_log_probs(policy: Policy, samples: list[Sample], config: Config, sizes: Sizes) -> None:
    """Fills in each sample's log-probs, and entropies, under the present weights."""

    def work() -> None:
        for indices, log_prob, entropy, _ in score(policy, samples, config, sizes, with_grad=False):
            for i, row, uncertain in zip(indices, log_prob.tolist(), entropy.tolist()):
                samples[i].old_log_prob = row[: len(samples[i].completion.ids)]
                samples[i].entropy = uncertain[: len(samples[i].completion.ids)]

    if samples:
        retry(work, lambda: sizes.halve(longest(samples)), "scoring")


def scored(policy: Policy, samples: list[Sample], config: Config, sizes: Sizes, base: bool = False) -> list[Sample]:
    """Copies of the samples with the log-probs and entropies of the present weights, or of the base, filled in."""
    copies = [dataclasses.replace(sample) for sample in samples]
    with policy.disable_adapter() if base else nullcontext():
        old_log_probs(policy, copies, config, sizes)
    return copies


def prepare(policy: Policy, samples: list[Sample], config: Config, sizes: Sizes) -> dict[str, float]:
    """Fills in what an arm must know of the samples under the weights that sampled them; returns the arm's metrics.

    Entropies for top-entropy (with minibatches `old_log_probs` gives them), entropies of a frozen proposer under the
    base that wrote them, and the tokens that an untrained proposer takes out of the update or that replace them.
    """
    metrics = {}
    if config.entropy_control == "top-entropy" and config.minibatches == 1:
        for sample, now in zip(samples, scored(policy, samples, config, sizes)):
            sample.entropy = now.entropy
    if frozen := [sample for sample in samples if sample.from_base]:
        for sample, base in zip(frozen, scored(policy, frozen, config, sizes, base=True)):
            sample.entropy = base.entropy
    if config.entropy_control in entropy_control.BONUS:
        metrics["entropy_coefficient"] = config.entropy_coefficient
    if config.proposer != "joint":
        metrics["tokens_dropped"] = arms.tokens([sample for sample in samples if not sample.update])
        metrics["tokens_added"] = arms.tokens([sample for sample in samples if arms.FILL in sample.group])
    return metrics


def optimizer_step(
    policy: Policy, optimizer, samples: list[Sample], config: Config, sizes: Sizes, scale: LossScale | None = None
) -> dict[str, float]:
    """One AdamW step on the gradient of all samples, if it is finite ("skipped" is 1 if not). Returns the metrics.

    scale: of the loss, for fp16; a gradient that overflows in it is computed again at a lower one.
    """
    scale = scale or LossScale()
    overflows = scale.overflows

    def work() -> tuple[float, list]:
        optimizer.zero_grad(set_to_none=True)  # what a failed attempt has added must not count twice
        return accumulate_gradient(policy, samples, config, sizes, scale)

    while True:
        loss, columns = retry(work, lambda: sizes.halve(longest(samples)), "the update")
        scale.unscale(policy.trainable_parameters())
        used, applied = scale.value, apply_gradient(policy, optimizer, loss)
        if not scale.again(loss, bool(applied["skipped"])):
            break
    if scale.active:
        applied |= {"loss_scale": used, "overflows": scale.overflows - overflows}
    return {"loss": loss, **applied, **statistics(columns, samples, config)}


def accumulate_gradient(
    policy: Policy, samples: list[Sample], config: Config, sizes: Sizes, scale: LossScale | None = None
) -> tuple[float, list]:
    """(loss, columns for `statistics`); adds the gradient of the loss, micro-batch by micro-batch, to the parameters,
    times the scale. The loss is returned without it.

    Samples without advantage have no gradient (but for an entropy bonus): for the metrics they are scored without one.
    Samples of the base, adapter off, are not the policy's to score.
    """
    scale, groups = scale or LossScale(), [group_number(sample) for sample in samples]
    lengths = [len(sample.completion.ids) for sample in samples]
    # Every token's share of the loss, counted over all samples: micro-batches cannot change the gradient.
    foreign = torch.tensor([bool(sample.objective) for sample in samples], dtype=torch.bool)
    weights = off_policy.mixed_token_weights(
        torch.tensor(groups), torch.tensor(lengths), foreign, config.off_policy_gamma, config.loss_weighting,
        max([ppo.GROUPS, *(group + 1 for group in groups)]),
    ).tolist()  # fmt: skip
    bonus = config.entropy_coefficient if config.entropy_control in entropy_control.BONUS else 0.0
    loss_sum, kept = 0.0, []
    for with_grad in (True, False):
        part = [
            i
            for i, sample in enumerate(samples)
            if lengths[i] and not sample.from_base
            and (sample.update and bool(sample.advantage or bonus)) == with_grad
        ]  # fmt: skip
        for indices, log_prob, entropy, mask in score(policy, [samples[i] for i in part], config, sizes, with_grad):
            batch = [samples[part[i]] for i in indices]
            weight = torch.tensor([weights[part[i]] for i in indices], device=log_prob.device)
            loss, columns = batch_loss(batch, log_prob, mask, weight, config)
            if with_grad and bonus:
                own = torch.tensor([not s.objective for s in batch], device=weight.device)
                loss = loss - bonus * ppo.weighted_sum(entropy, weight * own, mask)
            if with_grad:
                scale.backward(loss)
                loss_sum += loss.item()  # the CPU waits for the device here, once a micro-batch
            kept.append(columns)
            for sample, row, scored in zip(batch, entropy.tolist(), log_prob.tolist()):
                sample.entropy = row[: len(sample.completion.ids)]
                if sample.objective == "sft":  # nobody sampled it: these are its log-probs before the update
                    sample.old_log_prob = scored[: len(sample.completion.ids)]
    return loss_sum, kept


def score(policy: Policy, samples: list[Sample], config: Config, sizes: Sizes, with_grad: bool):
    """Micro-batches of (indices, log_prob, entropy, mask) over the responses of the samples."""
    prompts, responses = [s.prompt_ids for s in samples], [s.completion.ids for s in samples]
    return policy.score(prompts, responses, config.temperature, sizes.token_budget, with_grad, sizes.chunk)


def batch_loss(batch: list[Sample], log_prob: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, config: Config):
    """(part of the loss, columns for `statistics`); log_prob, mask (batch, time), weight (batch,)."""
    sampler = padded([s.completion.log_probs for s in batch], log_prob)
    old = log_prob.detach()
    if all(s.old_log_prob is not None for s in batch):
        old = padded([s.old_log_prob for s in batch], log_prob)
    advantage = torch.tensor([s.advantage for s in batch], device=log_prob.device)[:, None]
    # For "truncated" samples of the base this guard is the truncated importance ratio itself.
    guard = ppo.importance_weight(old, sampler, GAP_CAP)
    clip = entropy_control.clip_bounds(config.entropy_control, CLIP_LOW, CLIP_HIGH)
    token_loss = guard * ppo.ppo_token_loss(log_prob, old, advantage, *clip)
    for name, loss in (("luffy", off_policy.luffy_token_loss), ("sft", off_policy.sft_token_loss)):
        rows = [s.objective == name for s in batch]
        if any(rows):  # asked on the host: asking a tensor would wait for the device
            rows = torch.tensor(rows, device=log_prob.device)[:, None]
            token_loss = torch.where(rows, loss(log_prob, advantage), token_loss)
    columns = [log_prob.detach(), old, sampler, advantage.expand_as(mask)]
    if config.entropy_control in entropy_control.MARKING:
        columns.append(padded([s.marks for s in batch], log_prob))
        token_loss = entropy_control.controlled(token_loss, columns[-1], log_prob, old, config)
    own = mask & torch.tensor([not s.objective for s in batch], device=mask.device)[:, None]
    return ppo.weighted_sum(token_loss, weight, mask), [column[own] for column in columns]


def apply_gradient(policy: Policy, optimizer, loss: float) -> dict[str, float]:
    """Clips the gradient's norm and steps, unless loss or norm is not finite; the gradient is gone afterwards."""
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable_parameters(), GRAD_CLIP).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        take_step(policy, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, "skipped": float(not finite)}


def take_step(policy: Policy, optimizer) -> None:
    """optimizer.step(), from the same state again if memory runs out inside: half of it may be done by then."""
    try:
        before = state_tensors(policy, optimizer, None)  # a GPU copies within itself in milliseconds
    except torch.OutOfMemoryError:
        before = state_tensors(policy, optimizer)
    begun = []

    def attempt() -> None:
        if begun:
            restore_tensors(policy, optimizer, before)
        begun.append(True)
        optimizer.step()

    def one_by_one() -> str:
        if all(group.get("foreach") is False for group in optimizer.param_groups):
            raise DoesNotFit("out of memory in the optimizer step, one matrix at a time; lower --lora-rank")
        for group in optimizer.param_groups:
            group["foreach"] = False  # a GPU's default takes all matrices at once
        return "one matrix at a time"

    retry(attempt, one_by_one, "the optimizer step")


def statistics(kept: list[list[torch.Tensor]], samples: list[Sample], config: Config) -> dict[str, float]:
    """Over the sampled tokens of an optimizer step: (log_prob, old, sampler, advantage[, marks]), each (tokens,)."""
    columns = zip(*kept) if kept else [[torch.zeros(0)]] * 5
    log_prob, old, sampler, advantage, *marks = (torch.cat(list(column)) for column in columns)
    every = torch.ones_like(log_prob, dtype=torch.bool)
    gap = ppo.gap_statistics(old, sampler, every, GAP_CAP)
    clip = entropy_control.clip_bounds(config.entropy_control, CLIP_LOW, CLIP_HIGH)
    result = {
        "log_prob_gap": gap["mean"],
        "log_prob_gap_max": gap["max"],
        "gap_p99": gap["p99"],
        "gap_outside_10": gap["outside_10"],
        "gap_k3": gap["k3"],
        "gap_capped": gap["capped"],
        "tokens": sum(len(sample.completion.ids) for sample in samples if not sample.from_base),
        "clip_fraction": ppo.clip_fraction(log_prob, old, advantage, every, *clip),
    }
    if config.entropy_control != "none":
        flat = log_prob, old, advantage, marks[0] if marks else None
        result["control_share"] = entropy_control.touched_share(config, *flat, CLIP_LOW, CLIP_HIGH)
    return result


def of_step(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its optimizer steps: counts are added, all else is averaged, but for the
    greatest gap and the lowest loss scale."""
    together = {"tokens": sum, "skipped": sum, "overflows": sum, "log_prob_gap_max": max, "loss_scale": min}
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {name: together.get(name, mean)([metrics[name] for metrics in updates]) for name in updates[0]}


def padded(rows: list[list[float]], like: torch.Tensor) -> torch.Tensor:
    """(batch, time) from lists of numbers, zeros behind, on the device of `like`."""
    out = torch.zeros(like.shape)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out.to(like.device)


def longest(samples: list[Sample]) -> int:
    return max(len(s.prompt_ids) + len(s.completion.ids) for s in samples)


# ------------------------------------------------------------------------------------ what an update changes, to keep


def state_tensors(policy: Policy, optimizer, device="cpu") -> dict[str, torch.Tensor]:
    """Copies of all that an update changes, adapter and Adam moments; device None: each where it is."""
    tensors = {f"adapter/{name}": tensor for name, tensor in policy.adapter_state(device).items()}
    for i, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"adam/{i}/{name}"] = value.detach().to(device or value.device, copy=True)
    return tensors


def restore_tensors(policy: Policy, optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what `state_tensors` gave."""
    policy.load_adapter_state(
        {name.removeprefix("adapter/"): t for name, t in tensors.items() if name.startswith("adapter/")}
    )
    moments: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("adam/"):
            _, i, key = name.split("/")
            moments.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})

"""Micro-batches of an update, and what happens when memory runs out in one: the loss itself is in train_azr.py.

    optimizer = make_optimizer(policy, config.learning_rate)
    loss, columns = gradient(s, samples, weights, loss_of)     # loss_of(batch) -> the part of the loss of a Batch

`s` is the State of train_azr.py: its policy, config, sizes, loss_scale, arms and ranks are used. Memory that runs out
costs a repetition with smaller micro-batches (backoff.py), never a sample. Left out: a schedule of the learning rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from azr.console import pulse
from azr.policy.backoff import retry
from azr.tasks import Sample
from azr.train import ppo

if TYPE_CHECKING:
    from azr.policy.policy import Policy

BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.0  # of AdamW, as in the published recipe
CLIP = 0.2  # PPO's clip: the ratio may move so far from 1 (Schulman et al. 2017)
GAP_CAP = 2.0  # of the importance weight between sampler and trainer (TIS, Yao et al. 2025)


@dataclasses.dataclass
class Batch:
    """A micro-batch: its samples, and tensors of (batch, time) whose padding `mask` leaves out."""

    samples: list[Sample]
    log_prob: torch.Tensor  # of the trainer, with its gradient
    entropy: torch.Tensor  # nats, exact
    mask: torch.Tensor  # bool, True on response tokens
    old_log_prob: torch.Tensor  # of the trainer, before the first optimizer step of this training step
    sampler_log_prob: torch.Tensor  # what sampling recorded
    advantage: torch.Tensor  # (batch, 1)
    weight: torch.Tensor  # (batch,) what each token of the sample weighs in the loss
    own: torch.Tensor  # (batch, 1) bool, False for what the policy did not sample


@dataclasses.dataclass
class Columns:
    """The sampled tokens with a gradient of a whole optimizer step, flat (tokens,), and their samples, in order."""

    samples: list[Sample]
    log_prob: torch.Tensor
    old: torch.Tensor
    sampler: torch.Tensor
    advantage: torch.Tensor
    clip: tuple[float, float]  # the bounds that were used
    sampled: int  # tokens of the step that the policy sampled, those without a gradient among them


def make_optimizer(policy: Policy, learning_rate: float) -> torch.optim.AdamW:
    """AdamW on the adapter, or on all weights, at a constant learning rate."""
    parameters, settings = policy.trainable_parameters(), {"betas": BETAS, "weight_decay": WEIGHT_DECAY}
    # one matrix after the other: a GPU's default takes all at once, with copies of all that could run out of memory in
    # the middle of a step
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, foreach=False, **settings)
    if policy.full:  # the steps are those of fp32 masters, which the model computes with rounded
        optimizer.register_step_post_hook(lambda *_: policy.full.round())
    return optimizer


def moments_to_come(policy: Policy, optimizer) -> int:
    """Bytes of the two fp32 moments that Adam has not made yet."""
    return sum(8 * p.numel() for p in policy.trainable_parameters() if p not in optimizer.state)


# -------------------------------------------------------------------------------------------- scoring without gradient


def old_log_probs(s, samples: list[Sample]) -> None:
    """Fills in each sample's log-probs, and entropies, under the present weights."""

    def work() -> None:
        for indices, log_prob, entropy, _ in score(s, samples, with_grad=False):
            # one copy to the host per tensor; rows are padded to the longest response of the micro-batch
            for i, row, uncertain in zip(indices, log_prob.tolist(), entropy.tolist()):
                samples[i].old_log_prob = row[: len(samples[i].completion.ids)]
                samples[i].entropy = uncertain[: len(samples[i].completion.ids)]

    if samples:
        retry(lambda: s.ranks.agreed(work), lambda: s.sizes.halve(longest(samples)), "scoring")


def scored(s, samples: list[Sample], base: bool = False) -> list[Sample]:
    """Copies of the samples with the log-probs and entropies of the present weights, or of the base, adapter off."""
    # old_log_probs overwrites what its samples hold, and the originals are still to be trained on
    copies = [dataclasses.replace(sample) for sample in samples]
    with s.policy.disable_adapter() if base else nullcontext():
        old_log_probs(s, copies)
    return copies


def has_ratio(sample: Sample) -> bool:
    """Whether PPO's ratio needs the sample's old log-probs: not where the base proposed, nor for a given response."""
    return not sample.from_base and sample.objective != "sft"


def has_gradient(s, sample: Sample) -> bool:
    """Whether a sample moves the weights: without an advantage it does not, unless an arm says so."""
    return sample.update and not sample.from_base and bool(sample.advantage or s.arms.every_token)


def score(s, samples: list[Sample], with_grad: bool):
    """Micro-batches of (indices, log_prob, entropy, mask) over the responses of the samples, each of one adapter."""
    adapters = [s.arms.adapter(sample.role, "default") for sample in samples]
    for adapter in dict.fromkeys(adapters):
        part = [i for i, name in enumerate(adapters) if name == adapter]
        prompts, responses = [samples[i].prompt_ids for i in part], [samples[i].completion.ids for i in part]
        sizes = s.config.temperature, s.sizes.token_budget, with_grad, s.sizes.chunk
        # around the `yield` too: the backward pass, which recomputes activations, must run with the same adapter
        with s.policy.using(adapter):
            for scored in s.policy.score(prompts, responses, *sizes):
                yield scored._replace(indices=[part[i] for i in scored.indices])


# --------------------------------------------------------------------------------------------------------- the gradient


def gradient(s, samples: list[Sample], weights: list[float], loss_of: Callable[[Batch], torch.Tensor]):
    """(loss, Columns): leaves the gradient of the loss of all samples in the parameters, without the scale of fp16.

    weights: what every token of a sample weighs, counted over all samples, so micro-batches cannot change the gradient.
    """

    def work() -> tuple[float, list]:
        s.optimizer.zero_grad(set_to_none=True)  # what a failed attempt has added must not count twice
        return accumulate(s, samples, weights, loss_of)

    loss, parts = retry(lambda: s.ranks.agreed(work), lambda: s.sizes.halve(longest(samples)), "the update")
    s.loss_scale.unscale(s.policy.trainable_parameters())
    # the tensors of a micro-batch are gone with it: only these flat columns are kept for the metrics
    own = [x for part, _ in parts for x in part]
    # an optimizer step may have nothing to score, and its metrics are still asked for
    columns = zip(*(tensors for _, tensors in parts)) if parts else [[torch.zeros(0)]] * 4
    sampled = sum(len(x.completion.ids) for x in samples if not x.from_base and not x.objective)
    return loss, Columns(own, *(torch.cat(list(column)) for column in columns), s.arms.clip(CLIP, CLIP), sampled)


def accumulate(s, samples: list[Sample], weights: list[float], loss_of) -> tuple[float, list]:
    """(loss, parts of the columns); adds the gradient, micro-batch by micro-batch, to the parameters, times the scale.

    Samples without a gradient are not scored: sampling has told their entropies. What was not sampled (a response of a
    file) has none yet, and gets them here.
    """
    graded = [i for i, sample in enumerate(samples) if sample.completion.ids and has_gradient(s, sample)]
    unknown = [i for i, x in enumerate(samples) if x.completion.ids and not x.entropy and not has_gradient(s, x)]
    loss_sum, parts, advance = 0.0, [], pulse("update", len(graded) + len(unknown), "responses")
    # two passes: a micro-batch is scored either with activations kept for a gradient or, far cheaper, without
    for with_grad, part in ((True, graded), (False, unknown)):
        for indices, log_prob, entropy, mask in score(s, [samples[i] for i in part], with_grad):
            chosen = [part[i] for i in indices]
            batch = make_batch([samples[i] for i in chosen], [weights[i] for i in chosen], log_prob, entropy, mask)
            loss = loss_of(batch)
            if with_grad:
                if log_prob.requires_grad:  # else another process has the gradient of this micro-batch
                    s.loss_scale.backward(loss)
                loss_sum += loss.item()  # the CPU waits for the device here, once a micro-batch
            parts.append(columns_of(batch))
            advance(len(indices), sum(len(sample.completion.ids) for sample in batch.samples))
            if not all(sample.entropy for sample in batch.samples):  # else nothing is copied from the device
                for sample, row in zip(batch.samples, entropy.tolist()):
                    sample.entropy = sample.entropy or row[: len(sample.completion.ids)]
    return loss_sum, parts


def make_batch(samples: list[Sample], weights: list[float], log_prob, entropy, mask) -> Batch:
    """The tensors of a micro-batch, on the device of log_prob (batch, time)."""
    old = log_prob.detach()  # the first optimizer step of a training step: the ratio is 1, its gradient that of log p
    if all(sample.old_log_prob is not None for sample in samples):
        old = padded([sample.old_log_prob for sample in samples], log_prob)
    # a file's response may have none: zeros then, which only PPO's loss would use; luffy's and sft's replace it
    sampler = padded([sample.completion.log_probs for sample in samples], log_prob)
    device = log_prob.device
    advantage = torch.tensor([sample.advantage for sample in samples], device=device)[:, None]
    own = torch.tensor([not sample.objective for sample in samples], device=device)[:, None]
    weight = torch.tensor(weights, device=device)
    return Batch(samples, log_prob, entropy, mask, old, sampler, advantage, weight, own)


def columns_of(batch: Batch) -> tuple[list[Sample], list[torch.Tensor]]:
    """The sampled tokens of a micro-batch, in the order of their samples."""
    own = batch.mask & batch.own
    tensors = batch.log_prob.detach(), batch.old_log_prob, batch.sampler_log_prob, batch.advantage.expand_as(own)
    return [x for x in batch.samples if not x.objective], [tensor[own] for tensor in tensors]


def statistics(columns: Columns, samples: list[Sample]) -> dict[str, float]:
    """Metrics of an optimizer step: the gap between sampler and trainer, of the tokens with a gradient, and the share
    of all sampled tokens that the clip took the gradient from."""
    every = torch.ones_like(columns.log_prob, dtype=torch.bool)
    gap = ppo.gap_statistics(columns.old, columns.sampler, every, GAP_CAP)
    clipped = ppo.clipped(columns.log_prob, columns.old, columns.advantage, *columns.clip)
    return {
        "log_prob_gap": gap["mean"],
        "log_prob_gap_max": gap["max"],
        "gap_p99": gap["p99"],
        "gap_outside_10": gap["outside_10"],
        "gap_k3": gap["k3"],
        "gap_capped": gap["capped"],
        "tokens": sum(len(sample.completion.ids) for sample in samples if not sample.from_base),
        "clip_fraction": clipped.sum().item() / max(1, columns.sampled),
    }


def of_step(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its optimizer steps: counts are added, all else is averaged, but for the
    greatest gap and the lowest loss scale. An optimizer step without a sampled token has no gap, NaN, and is left out
    of it; any other NaN stays one."""
    # a mean would hide the one bad token or the one overflow that these are logged for
    together = {"tokens": sum, "skipped": sum, "overflows": sum, "log_prob_gap_max": max, "loss_scale": min}

    def of(name: str) -> float:
        values = [metrics[name] for metrics in updates]
        if "gap" in name:
            values = [value for value in values if not math.isnan(value)]
        return together.get(name, lambda numbers: sum(numbers) / len(numbers))(values) if values else math.nan

    return {name: of(name) for name in updates[0]}


def padded(rows: list[list[float]], like: torch.Tensor) -> torch.Tensor:
    """(batch, time) from lists of numbers, zeros behind, on the device of `like`."""
    # filled on the CPU and moved once: writing row by row to a GPU would be a transfer for every row
    out = torch.zeros(like.shape)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out.to(like.device)


def longest(samples: list[Sample]) -> int:
    """Tokens of the longest prompt with its response. ValueError without samples."""
    return max(len(s.prompt_ids) + len(s.completion.ids) for s in samples)


# ------------------------------------------------------------------------------------ what an update changes, to keep


def state_tensors(policy: Policy, optimizer) -> dict[str, torch.Tensor]:
    """Copies on the CPU of all that an update changes: adapters (or masters of all weights) and Adam moments."""
    tensors = {
        f"{place(adapter)}/{name}": tensor
        for adapter in policy.adapters
        for name, tensor in policy.adapter_state(adapter=adapter).items()
    }
    for i, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"adam/{i}/{name}"] = value.detach().to("cpu", copy=True)
    return tensors


def place(adapter: str) -> str:
    """What the names of an adapter's matrices begin with in `state_tensors`."""
    return "adapter" if adapter == "default" else adapter


def of_adapter(tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
    """The matrices of one adapter among what `state_tensors` gave, under PEFT's names."""
    prefix = f"{place(adapter)}/"
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def restore_tensors(policy: Policy, optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what `state_tensors` gave."""
    for adapter in policy.adapters:
        policy.load_adapter_state(of_adapter(tensors, adapter), adapter)
    moments: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("adam/"):
            _, i, key = name.split("/")
            moments.setdefault(int(i), {})[key] = value
    # the groups stay as they are: their learning rate is the settings'
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})

"""What a training step is measured by: flat metrics `role/mode/name`, and the rows of samples.jsonl. No torch."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter

import numpy as np

from azr.tasks import MODES, Sample

GUESSABLE = 1 / 3  # chance of a task (azr/tasks/behaviour.py) from which a guess pays


def mean(values) -> float:
    """NaN for nothing, so that an empty group shows as null and never as 0."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def step_metrics(proposals: list[Sample], answers: list[Sample], trained: list[Sample], n: int) -> dict[str, float]:
    """Metrics of one step. `answers` measured the solve rates with n answers a task; `trained` went into the update.

    Entropies are over what was trained, see `entropy_metrics`; solve rates are over this step's own proposals.
    Solutions that the policy did not sample count only where there is nothing else (sft).
    """
    trained = [sample for sample in trained if not sample.objective] or trained
    metrics: dict[str, float] = {}
    given = [sample for sample in trained if sample.role == "proposer" and not proposals]  # of a warm start
    for role in ("proposer", "solver") if proposals or given else ("solver",):
        metrics |= under(f"{role}/all", entropy_metrics([sample for sample in trained if sample.role == role]))
    metrics |= under("train", entropy_metrics([sample for sample in trained if not sample.from_base]))
    own = {id(sample): sample for sample in [*proposals, *answers, *trained] if not sample.objective}
    metrics["train/sampled_tokens"] = sum(len(sample.completion.ids) for sample in own.values())
    for mode in (*MODES, *["math"] * any(sample.mode == "math" for sample in trained)):
        if proposals and mode != "math":
            metrics |= proposer_metrics(mode, proposals, trained, n)
        elif given and mode != "math":
            metrics |= under(f"proposer/{mode}", _group([], [sample for sample in given if sample.mode == mode]))
        metrics |= solver_metrics(mode, answers, trained)
    return metrics


def under(path: str, values: dict[str, float]) -> dict[str, float]:
    """The values by the names path/NAME."""
    return {f"{path}/{name}": value for name, value in values.items()}


def commonest_share(answers: list[Sample]) -> float:
    """Share of the answers that are one and the same text, whatever the task; NaN where nothing was answered.

    Proposer and solver can agree on one literal: tasks with the input 0, answered by 0, as runs did.
    """
    texts = Counter(sample.parsed.value for sample in answers if sample.parsed.value is not None)
    return texts.most_common(1)[0][1] / len(answers) if texts else math.nan


def solver_metrics(mode: str, answers: list[Sample], trained: list[Sample]) -> dict[str, float]:
    """Of the answers of a mode; see `step_metrics`."""
    mine = [sample for sample in answers if sample.mode == mode]
    metrics = {
        "accuracy": mean(sample.correct for sample in mine),
        "well_formed_rate": mean(sample.parsed.well_formed for sample in mine),
        "timeout_rate": mean(sample.reason == "timeout" for sample in mine),
        "tasks": len({sample.task.hash for sample in mine}),
        "commonest_share": commonest_share(mine),
        **_group(mine, [sample for sample in trained if sample.role == "solver" and sample.mode == mode]),
    }
    return under(f"solver/{mode}", metrics)


def proposer_metrics(mode: str, proposals: list[Sample], trained: list[Sample], n: int) -> dict[str, float]:
    """Of the proposals of a mode; see `step_metrics`."""
    mine = [sample for sample in proposals if sample.mode == mode]
    valid = [sample for sample in mine if sample.task is not None and sample.solve_rate is not None]
    metrics = {
        "valid_rate": mean(sample.task is not None for sample in mine),
        "well_formed_rate": mean(sample.parsed.well_formed for sample in mine),
        "duplicate_rate": mean(sample.reason == "duplicate" for sample in mine),
        "held_out_rate": mean(sample.reason == "held_out" for sample in mine),
        "solve_rate": mean(sample.solve_rate for sample in valid),
        "learnable_rate": mean(0 < sample.solve_rate < 1 for sample in valid),
        "guessable_rate": mean(sample.task.chance >= GUESSABLE for sample in valid),
        "guessable_reward": mean(sample.reward for sample in valid if sample.task.chance >= GUESSABLE),
        **_group(mine, [sample for sample in trained if sample.role == "proposer" and sample.mode == mode]),
    }
    refused = Counter(sample.reason for sample in mine if sample.task is None)
    metrics |= under("refused", dict(sorted(refused.items())))
    histogram = Counter(round(sample.solve_rate * n) for sample in valid)
    metrics |= {f"solved_of_{n}/{c}": histogram[c] for c in range(n + 1)}
    return under(f"proposer/{mode}", metrics)


def _group(sampled: list[Sample], trained: list[Sample]) -> dict[str, float]:
    """What both roles share: over all sampled responses, and over those in the update."""
    return {
        "reward": mean(sample.reward for sample in trained),
        **entropy_metrics(trained),
        "response_tokens": mean(len(sample.completion.ids) for sample in sampled),
        "truncated_rate": mean(sample.completion.finish_reason == "length" for sample in sampled),
        "zero_advantage_rate": mean(sample.advantage == 0 for sample in trained),
    }


def entropy_metrics(trained: list[Sample]) -> dict[str, float]:
    """Entropy of the trained responses in nats, at the temperature they were sampled and scored with.

    entropy: exact, full vocabulary, mean over tokens; entropy_sequence_mean: mean over responses of their token means;
    sampled_entropy: -log p of the sampled tokens, same mean, more variance (the estimator of arXiv 2510.27072).
    log_prob_advantage_cov: mean over tokens of (A - mean A)(log p - mean log p), whose negative drives the change of
    entropy (Cui et al. 2025, arXiv 2505.22617), and the largest 0.2 % of its terms (what KL-Cov picks).
    entropy_top20: the entropy that the top 20 % of tokens exceed; entropy_top20_share: how much of the sum they carry
    (Wang et al. 2025, arXiv 2506.01939).
    """
    rows = [sample for sample in trained if len(sample.completion.ids)]
    entropy = np.concatenate([np.asarray(sample.entropy, np.float64) for sample in rows] or [np.empty(0)])
    # of the weights that sampled: after the update they would be another policy's
    log_probs = [np.asarray(s.old_log_prob or s.completion.log_probs, np.float64) for s in rows]
    log_prob = np.concatenate(log_probs or [np.empty(0)])
    advantage = np.repeat([float(s.advantage) for s in rows], [len(row) for row in log_probs]) if rows else log_prob
    result = {
        "entropy": mean(entropy.tolist()),
        "entropy_sequence_mean": mean(float(np.mean(s.entropy)) for s in rows if len(s.entropy)),
        "sampled_entropy": mean((-log_prob).tolist()),
        **dict.fromkeys(("log_prob_advantage_cov", "log_prob_advantage_cov_top"), math.nan),
        **dict.fromkeys(("entropy_top20", "entropy_top20_share"), math.nan),
    }
    if len(log_prob):
        terms = (advantage - advantage.mean()) * (log_prob - log_prob.mean())
        largest = np.sort(terms)[-max(1, len(terms) // 500) :]
        result |= {"log_prob_advantage_cov": terms.mean(), "log_prob_advantage_cov_top": largest.mean()}
    if len(entropy):
        ordered = np.sort(entropy)
        top, total = ordered[-max(1, round(0.2 * len(ordered))) :], ordered.sum()
        result |= {"entropy_top20": top[0], "entropy_top20_share": top.sum() / total if total > 0 else math.nan}
    return {name: float(value) for name, value in result.items()}


def sample_row(step: int, sample: Sample) -> dict:
    """One line of samples.jsonl; the role of what the policy did not sample is "off-policy"."""
    parts = {"reward": sample.reward, "well_formed": sample.parsed.well_formed}
    parts |= {"valid": sample.task is not None} if sample.role == "proposer" else {"correct": sample.correct}
    return {
        "step": step,
        "role": "off-policy" if sample.objective else sample.role,
        "mode": sample.mode,
        "task": sample.task.to_json() if sample.task else None,
        "prompt": sample.prompt,
        "response": sample.response,
        "tokens": len(sample.completion.ids),
        "finish_reason": sample.completion.finish_reason,
        "reward": parts,
        "reason": sample.reason,
        "solve_rate": sample.solve_rate,
    }


def memory(at_once: dict | None = None) -> dict[str, float]:
    """Peak memory so far in GB (1e9 bytes): of this process, and of the GPU if there is one.

    at_once: {part: {name: size}}, what is computed at once, which memory running out lowers; the numbers are added.
    """
    peak = {"memory/peak_process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["memory/peak_gpu"] = torch.cuda.max_memory_allocated() / 1e9
    sizes = [item for part in (at_once or {}).values() for item in part.items()]
    return peak | {f"memory/{name}": size for name, size in sizes if isinstance(size, int)}


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.counts: dict[str, int] = {}  # of what depends on the machine, as times do

    def lap(self, name: str) -> None:
        """Adds the seconds since the last lap, or since the start, to the phase `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def count(self, name: str, number: int) -> None:
        """Adds a number to the count `name`."""
        self.counts[name] = self.counts.get(name, 0) + number

    def total(self) -> float:
        """Seconds since the start of the step."""
        return time.perf_counter() - self.start

    def metrics(self) -> dict[str, float]:
        """time/PHASE and time/step in seconds, and the counts under time/ too."""
        return {
            **{f"time/{name}": round(seconds, 4) for name, seconds in self.laps.items()},
            "time/step": round(self.total(), 4),
            **{f"time/{name}": number for name, number in self.counts.items()},
        }

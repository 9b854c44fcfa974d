"""What a training step is measured by: flat metrics `role/mode/name`, and the rows of samples.jsonl. No torch."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter

from azr.tasks import MODES, Sample


def mean(values) -> float:
    """NaN for nothing, so that an empty group shows as null and never as 0."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def step_metrics(proposals: list[Sample], answers: list[Sample], trained: list[Sample], n: int) -> dict[str, float]:
    """Metrics of one step. `answers` measured the solve rates with n answers a task; `trained` went into the update.

    Entropies and lengths are token means over what was trained; solve rates are over this step's own proposals.
    """
    metrics: dict[str, float] = {}
    for mode in MODES:
        mine = [sample for sample in proposals if sample.mode == mode]
        valid = [sample for sample in mine if sample.task is not None and sample.solve_rate is not None]
        metrics |= {
            f"proposer/{mode}/{name}": value
            for name, value in {
                "valid_rate": mean(sample.task is not None for sample in mine),
                "well_formed_rate": mean(sample.parsed.well_formed for sample in mine),
                "duplicate_rate": mean(sample.reason == "duplicate" for sample in mine),
                "solve_rate": mean(sample.solve_rate for sample in valid),
                "learnable_rate": mean(0 < sample.solve_rate < 1 for sample in valid),
                **_group(mine, [sample for sample in trained if sample.role == "proposer" and sample.mode == mode]),
            }.items()
        }
        refused = Counter(sample.reason for sample in mine if sample.task is None)
        metrics |= {f"proposer/{mode}/refused/{reason}": count for reason, count in sorted(refused.items())}
        histogram = Counter(round(sample.solve_rate * n) for sample in valid)
        metrics |= {f"proposer/{mode}/solved_of_{n}/{c}": histogram[c] for c in range(n + 1)}
        mine = [sample for sample in answers if sample.mode == mode]
        metrics |= {
            f"solver/{mode}/{name}": value
            for name, value in {
                "accuracy": mean(sample.correct for sample in mine),
                "well_formed_rate": mean(sample.parsed.well_formed for sample in mine),
                "tasks": len({sample.task.hash for sample in mine}),
                **_group(mine, [sample for sample in trained if sample.role == "solver" and sample.mode == mode]),
            }.items()
        }
    return metrics


def _group(sampled: list[Sample], trained: list[Sample]) -> dict[str, float]:
    """What both roles share: over all sampled responses, and over those in the update."""
    return {
        "reward": mean(sample.reward for sample in trained),
        "entropy": mean(h for sample in trained for h in sample.entropy),
        "response_tokens": mean(len(sample.completion.ids) for sample in sampled),
        "truncated_rate": mean(sample.completion.finish_reason == "length" for sample in sampled),
        "zero_advantage_rate": mean(sample.advantage == 0 for sample in trained),
    }


def sample_row(step: int, sample: Sample) -> dict:
    """One line of samples.jsonl."""
    parts = {"reward": sample.reward, "well_formed": sample.parsed.well_formed}
    parts |= {"valid": sample.task is not None} if sample.role == "proposer" else {"correct": sample.correct}
    return {
        "step": step,
        "role": sample.role,
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


def memory() -> dict[str, float]:
    """Peak memory so far in GB (1e9 bytes): of this process, and of the GPU if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = {"memory/peak_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["memory/peak_gpu"] = torch.cuda.max_memory_allocated() / 1e9
    return peak


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def total(self) -> float:
        return time.perf_counter() - self.start

    def metrics(self) -> dict[str, float]:
        return {
            **{f"time/{name}": round(seconds, 4) for name, seconds in self.laps.items()},
            "time/step": round(self.total(), 4),
        }

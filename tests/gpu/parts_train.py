"""Part train: train_azr.py itself with random weights of the 3B shape, and what it runs on where the sandbox refuses.

Random weights write no program, so every answer would earn the same and no gradient would flow: rewards are made up,
in turn, which the line says. Programs run in the sandbox only where its doctor agrees; elsewhere none is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from azr.machine import plan
from azr.models import model_path
from azr.train import metrics
from azr.train.ahead import RememberingSandbox
from gpu.bench import GB, Bench, patched
from gpu.step_ways import in_ways, ways

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("propose", "validate", "solve", "judge", "reward", "update", "evaluate", "step")


def train(bench: Bench) -> None:
    bench.drop()
    with tempfile.TemporaryDirectory() as out:
        sizes = ["--prompts-per-mode", "8", "--max-new-tokens", "512", "--preset", "80gb"]
        if bench.cpu:
            sizes = ["--prompts-per-mode", "2", "--answers", "4", "--max-new-tokens", "8", "--preset", "8gb"]
        flags = [
            "--model",
            "qwen-3b",
            "--quantization",
            nf4_or_none(bench),
            "--eval-every",
            "0",
            "--save-every",
            "1",
            "--lora-rank",
            "32",
            "--out",
            f"{out}/run",
            "--eval-samples",
            "0",
            "--eval-data",
            held_out(out),
            *sizes,
            *allow_cpu(bench),
        ]
        bench.measure("two steps", lambda: run(bench, [*flags, "--steps", "2"], out), 75, "train")
        resumed, found = [*flags, "--steps", "3", "--resume", "auto"], {}
        before = lambda *given: found.update(ways(bench, *given))  # noqa: E731
        bench.measure("resumed, one more", lambda: run(bench, resumed, out, since=2, before=before), 85, "train")
        bench.measure("a step in several ways", lambda: in_ways(found), 1, "train, in several ways")


def nf4_or_none(bench: Bench) -> str:
    """NF4 unless bitsandbytes was seen to fail."""
    row = bench.done.get(("hardware", "bitsandbytes"))
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # a broken package fails in many ways
        return "none"
    return "nf4" if row is None or row["ok"] or "Injected" in row.get("error", "") else "none"


def allow_cpu(bench: Bench) -> list[str]:
    from azr.train.config import Config

    known = {field.name for field in dataclasses.fields(Config)}
    return ["--allow-cpu"] if bench.cpu and "allow_cpu" in known else []


def held_out(directory: str) -> str:
    """A few tasks, so that no hub is asked."""
    lines = Path(model_path("tiny"), "held_out.jsonl").read_text().splitlines()[:4]
    path = Path(directory, "tasks.jsonl")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def run(bench: Bench, flags: list[str], out: str, since: int = 0, real: bool = False, before=None) -> dict:
    """train_azr.main(flags) in this process; seconds by phase and memory after each. real: weights and rewards are.
    before(train_step, s, step, laps): called before each step; laps grow by a row a phase."""
    import train_azr
    from azr.train import ahead, loop, rollouts

    why, laps, text = sandbox_refuses(), [], io.StringIO()
    start, turn = time.perf_counter(), itertools.count()
    with contextlib.ExitStack() as stack:
        changes = [(metrics.Clock, "lap", watched(bench, laps)), (loop, "PROBE", 2)]
        if not real:
            made_up = lambda *_, **__: float((-1) ** next(turn))  # noqa: E731
            changes += [
                (loop, "Policy", random_weights(bench)),
                (loop, "SEED_ROUNDS", 1),
                (train_azr, "solver_reward", made_up),
                (train_azr, "proposer_reward", made_up),
            ]
        else:
            changes += [(loop, "SEED_ROUNDS", 2)]
        if why:
            changes += [
                (loop, "RememberingSandbox", NoSandbox),
                *((module, "validate", made_up_validate) for module in (train_azr, ahead)),
                *((module, "judge", made_up_judge) for module in (rollouts, ahead)),
            ]
        if before:
            honest = train_azr.train_step
            changes += [(train_azr, "train_step", lambda s, step: before(honest, s, step, laps) or honest(s, step))]
        for owner, name, value in changes:
            stack.enter_context(patched(owner, name, value))
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(text))
        try:
            code = train_azr.main(flags)
        except SystemExit as error:
            code = error.code
    if code:
        last = [line for line in text.getvalue().splitlines() if line.strip()][-8:]
        raise RuntimeError(f"train_azr.py ended with {code}: {' | '.join(last)}")
    rows = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("step", 0) > since]
    return {
        "seconds in all": time.perf_counter() - start,
        **summary(rows),
        "rewards": "real" if real else "made up",
        "verdicts": f"made up: {why}" if why else "of the sandbox",
        **planner(bench, flags, laps, real),
        "each": [by_phase(row) for row in rows],
        "memory after each phase": laps,
        "ok": bool(rows) and all(row["train/skipped"] == 0 for row in rows),
    }


def summary(rows: list[dict]) -> dict:
    last = rows[-1] if rows else {}
    return {
        "steps": len(rows),
        "s a step": [row["time/step"] for row in rows],
        **{name: last.get(f"train/{name}") for name in ("log_prob_gap", "log_prob_gap_max", "grad_norm", "loss")},
        **{name[7:]: value for name, value in last.items() if name.startswith("memory/")},
    }


def by_phase(row: dict) -> dict:
    """Seconds of a step's phases; tokens/s of what was sampled and trained."""
    found = {"step": row["step"]} | {f"{p} s": row[f"time/{p}"] for p in PHASES if f"time/{p}" in row}
    sampled, rollout = row.get("train/sampled_tokens", 0), row.get("time/propose", 0) + row.get("time/solve", 0)
    return {
        **found,
        "sampled tokens": sampled,
        "sampled/s": sampled / max(rollout, 1e-9),
        "trained/s": row.get("train/tokens", 0) / max(row.get("time/update", 0), 1e-9),
    }


def watched(bench: Bench, laps: list):
    """`Clock.lap` that notes memory, and the peaks since the last lap."""
    lap = metrics.Clock.lap

    def noted(clock, name: str) -> None:
        lap(clock, name)
        row = {"phase": name, **bench.memory()}
        if not bench.cpu:
            row |= {
                "peak GB": torch.cuda.max_memory_allocated() / GB,
                "peak reserved GB": torch.cuda.max_memory_reserved() / GB,
            }
            torch.cuda.reset_peak_memory_stats()
        laps.append(row)

    return noted


def planner(bench: Bench, flags: list[str], laps: list, real: bool) -> dict:
    """The plan's largest phase for the same sizes beside the largest peak."""
    from azr.train.config import parse, resolve

    config, _ = resolve(parse(flags, ""))
    sizes = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(plan.Preset)}
    preset = dataclasses.replace(plan.PRESETS["80gb"], **{k: v for k, v in sizes.items() if v is not None})
    shape = plan.shape_of(config.model) if real else bench.shape("3B")
    room = None if bench.cpu else torch.cuda.get_device_properties(0).total_memory - plan.CUDA_CONTEXT
    made = plan.plan_memory(shape, preset, room)
    found = {f"planned {phase} GB": total / GB for phase, total in made.totals.items()}
    peak = lambda *names: max([row.get("peak reserved GB", 0.0) for row in laps if row["phase"] in names], default=0.0)  # noqa: E731
    return {**found, "measured rollout GB": peak("propose", "solve"), "measured training GB": peak("update")}


# ---------------------------------------------------------------- stand-ins


def random_weights(bench: Bench):
    from azr.policy.policy import Policy
    from random_weights import random_policy

    class RandomWeights(Policy):
        @classmethod
        def load(cls, name, quantization="nf4", lora=None, **more):
            kept = {key: more[key] for key in ("max_batch", "attn", "rollout_weights") if key in more}
            policy = random_policy(
                bench.shape("3B"),
                quantization,
                bench.device,
                lora.rank if lora else None,
                tokenizer=bench.tokenizer(),
                **kept,
            )
            policy.info["base_model"] = name  # a resume looks whether it is the base that the run began with
            return policy

    return RandomWeights


@functools.cache
def sandbox_refuses() -> str | None:
    """Why programs must not be run here; None where the doctor agrees."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sandbox", "doctor"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return "the sandbox's doctor did not answer within 60 s"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return None if done.returncode == 0 else f"the sandbox's doctor refuses ({(lines or [done.returncode])[-1]})"


class NoSandbox(RememberingSandbox):
    """In the place of the sandbox: runs nothing."""

    state = {"workers": 0, "lanes": 0, "lanes_lost": 0, "weak": True}

    def __init__(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass


def coin(*parts) -> bool:
    return hashlib.sha256(repr(parts).encode()).digest()[0] < 128


def made_up_validate(proposals, sandbox, known, max_output_chars=0, exempt=frozenset(), held_out=frozenset()) -> list:
    """Half of the proposals are valid, by their hash; what a program returns is not known, so it is None."""
    from azr.tasks import Task, Verdict

    verdicts = []
    for p in proposals:
        valid = p.mode != "induction" and coin(p.program, p.inputs)
        task = Task(p.mode, p.program, p.inputs[0], "None") if valid else None
        verdicts.append(Verdict(valid, "ok" if valid else "made_up", task=task))
    return verdicts


def made_up_judge(pairs, sandbox) -> list:
    from azr.tasks import Verdict

    return [Verdict(coin(task.hash, answer), "ok" if coin(task.hash, answer) else "wrong") for task, answer in pairs]

"""Warnings in words, with the flag to try, from the metrics of the last steps of a run.

    python analyze.py health runs/tiny-0               what a run was warned of; works while it runs too
    python analyze.py health runs/tiny-0 --limits      every limit with its reason

`Health.add` takes the rows of metrics.jsonl one by one and returns what is new at each; it knows nothing else, so a
resumed run says the same as one that was never stopped, and a finished one can be asked again. A warning is about
the mean of the last 10 steps, is said once, and again when it is twice as far past its limit, shows in another mode,
or has lasted 50 steps. Left out: any change of settings on its own; a warning never stops or alters a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from azr.tasks import task
from azr.runs import RunError, read_metrics

MODES = (*task.MODES, "math")
WINDOW = 10  # steps a mean is over: a step of 8 proposals a mode moves by 12 points when one of them changes
AGAIN_AFTER = 50  # steps until a warning that still holds is repeated
FEW_TASKS = 3  # tasks of a step whose answers would make the share of one answer
WORSE = 2.0  # times further past its limit: said again before that
TAIL = 32 << 20  # bytes of samples.jsonl that are searched for an example: several steps of any model


@dataclass(frozen=True)
class Limit:
    """A warning is given past `at`, on at least `steps` rows."""

    at: float
    steps: int
    why: str


# "Healthy": the worst 10-step mean of ten runs of the embedded model, 80 to 120 steps each, that learned.
LIMITS = {
    "entropy": Limit(0.60, 2 * WINDOW, "share lost since the first 10 steps; healthy up to 47 %, as they learn"),
    "entropy-rise": Limit(1.50, 8, "times that of the first 3, in the last 5 steps; healthy up to 1.05"),
    "valid": Limit(0.10, 5, "share of a mode's proposals; healthy 48 to 98 %; below, the group is one long refusal"),
    "refused": Limit(0.50, 5, "share of a mode's proposals refused for one reason; healthy up to 33 %"),
    "format": Limit(0.50, 5, "share of answers without the asked form; healthy up to 6 %, an untrained base more"),
    "no-advantage": Limit(0.95, 5, "share of answers in groups that are all alike: no gradient; healthy up to 88 %"),
    "one-answer": Limit(0.40, 5, "share of a mode's answers that are one text; 101 of 109 runs stayed below 37 %"),
    "gap": Limit(0.10, 3, "nats a token between sampler and trainer in bf16; healthy 0.02: rounding"),
    "duplicates": Limit(0.30, 5, "share of a mode's proposals that were proposed before; healthy up to 13 %"),
    "cut-off": Limit(0.10, 3, "share of responses that end at --max-new-tokens; healthy up to 2.5 %"),
    "held-out": Limit(0.04, 1, "lost since the best: 3 standard errors, 600 tasks of which 12 % change sides"),
    "skipped": Limit(2, 1, "of the last 10 updates had a non-finite gradient; one can be chance"),
    "sandbox": Limit(0.02, 3, "share of a mode's proposals without a verdict, the machine's fault; healthy 0"),
    "timeout": Limit(0.20, 5, "share of proposals or answers that ran out of CPU time; healthy up to 0.6 %"),
    "memory": Limit(4, 1, "times smaller micro-batches or fewer sequences than planned: two back-offs or more"),
}  # fmt: skip

# Of the gap in other dtypes. Measured on a CPU, sampled at temperature 1, LoRA of rank 16: mean |difference|, share of
# tokens whose ratio is outside [0.9, 1.1]. SmolLM2-135M: fp32 3.2e-6, 0 % (n 461; NF4 3.2e-6, 0 %, n 470); fp16 3.9e-3,
# 0 % (n 461; NF4 4.6e-3, 0 %, n 480); bf16 2.8e-2, 4.1 % (n 461; NF4 3.6e-2, 8.3 %, n 480). The embedded model (n 432
# to 438): fp32 5e-7, fp16 4e-4, bf16 4e-3, all 0 %. Published shares, of a trainer alone at two batch sizes: Qwen2.5-3B
# 6.9 %, 7B 5.6 % in bf16, 0.00 % in fp16 and fp32 (verl, issue 6280); TRL 7.5 to 8 % in bf16 (issue 6789).
GAP = {
    "fp16": Limit(0.02, 3, "the same in fp16; healthy 0.004 to 0.005"),
    "fp32": Limit(0.001, 3, "the same in fp32; healthy 3e-6"),
}


@dataclass(frozen=True)
class Finding:
    """What is past its limit at a step. level: how far, 1 at the limit; places: the modes or roles it is about."""

    check: str
    step: int
    what: str
    advice: str
    level: float
    places: tuple[str, ...] = ()
    example: tuple[str, str] | None = None  # (mode, reason) of a refused proposal that shows it

    def text(self) -> str:
        return f"step {self.step}: {self.what}. {self.advice}"


class Window:
    """The first and the last rows of a run, and the settings it runs with."""

    def __init__(self, config: dict) -> None:
        self.config, self.count = config, 0
        self.first: list[dict] = []
        self.last: deque[dict] = deque(maxlen=WINDOW)
        self.held_out: list[tuple[int, float, float]] = []  # step, held-out accuracy, accuracy in training

    def add(self, row: dict) -> None:
        if len(self.first) < WINDOW:
            self.first.append(row)
        self.last.append(row)
        self.count += 1
        accuracy = number(row, "held_out/all/accuracy")
        if accuracy is not None:
            values = [self.mean(f"solver/{mode}/accuracy") for mode in MODES]
            values = [value for value in values if value is not None]
            self.held_out.append((row["step"], accuracy, sum(values) / len(values) if values else math.nan))

    def mean(self, key: str, rows: Iterable[dict] | None = None) -> float | None:
        """Over the last rows that have it; None if none has."""
        values = [number(row, key) for row in (self.last if rows is None else rows)]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    def over(self, keys: dict[str, str], limit: float) -> dict[str, float]:
        """{place: mean} of the keys {place: key} whose mean is at least the limit."""
        means = {place: self.mean(key) for place, key in keys.items()}
        return {place: value for place, value in means.items() if value is not None and value >= limit}

    def refusals(self, mode: str) -> tuple[Counter, int]:
        """Refused proposals of a mode by reason, and all its proposals, over the last rows."""
        refused, valid, start = Counter(), 0, f"proposer/{mode}/"
        for row in self.last:
            for key, count in row.items():
                if key.startswith(start + "refused/"):
                    refused[key.rsplit("/", 1)[1]] += count or 0
                elif key.startswith(start + "solved_of_"):
                    valid += count or 0
        return refused, valid + refused.total()


def number(row: dict, key: str) -> float | None:
    """The value, None for what is missing, null or NaN (a live row has NaN where its line in the file has null)."""
    value = row.get(key)
    return None if value is None or value != value else float(value)


def listed(shares: dict[str, float]) -> str:
    """{"deduction": 0.04} as "deduction 4 %"."""
    return ", ".join(f"{place} {100 * share:.0f} %" for place, share in shares.items())


def both_roles(name: str) -> dict[str, str]:
    return {f"{role} {mode}": f"{role}/{mode}/{name}" for role in ("proposer", "solver") for mode in MODES}


def per_mode(role: str, name: str) -> dict[str, str]:
    return {mode: f"{role}/{mode}/{name}" for mode in MODES}


# ------------------------------------------------------------------------------------------- the flags that may help


def lower_rate(config: dict, times: float = 2) -> str:
    return (
        f"--learning-rate {config['learning_rate'] / times:g}" if config.get("learning_rate") else "--learning-rate"
    )


def cooler(config: dict) -> str:
    now = config.get("temperature") or 1.0
    if now > 1:
        return "--temperature 1"
    return f"--temperature {now - 0.2:.2g}" if now > 0.7 else "a larger or instruction-tuned --model"


def more_references(config: dict) -> str:
    return f"--references {2 * (config.get('references') or 3)} (it is shown more examples)"


def longer(w: Window) -> str:
    most = max([w.mean(key) or 0 for key in both_roles("truncated_rate").values()])
    return f"--max-new-tokens {(4 if most > 0.5 else 2) * (w.config.get('max_new_tokens') or 512)}"


# ------------------------------------------------------------------------------------------------------- the checks


def entropy(w: Window) -> Iterable[Finding]:
    limit = LIMITS["entropy"]
    for role in ("proposer", "solver"):
        first, last = w.mean(f"{role}/all/entropy", w.first), w.mean(f"{role}/all/entropy")
        if not first or last is None or 1 - last / first < limit.at:
            continue
        control = w.config.get("entropy_control") or "none"
        flag = (
            "--entropy-control adaptive" if control == "none" else f"more than --entropy-control {control} does now"
        )
        moved = f"({first:.2f} -> {last:.2f} nats a token, mean of the first and of the last {WINDOW} steps)"
        what = f"{role} entropy fell {100 * (1 - last / first):.0f} % {moved}: its samples become alike"
        level = (1 - limit.at) / max(last / first, 1e-3)
        yield finding(w, "entropy", what, f"Try {flag}, or {lower_rate(w.config)}", level, (role,))


def entropy_rise(w: Window) -> Iterable[Finding]:
    limit, rise, moved = LIMITS["entropy-rise"], {}, []
    for role in ("proposer", "solver"):
        first, last = w.mean(f"{role}/all/entropy", w.first[:3]), w.mean(f"{role}/all/entropy", list(w.last)[-5:])
        if first and last and last >= limit.at * first:
            rise[role] = last / first
            moved.append(f"{role} {first:.2f} -> {last:.2f}")
    if rise:
        what = f"entropy rose {max(rise.values()):.1f}-fold ({', '.join(moved)} nats a token): the text falls apart"
        advice = f"Begin again with {lower_rate(w.config, 4)} or less"
        yield finding(w, "entropy-rise", what, advice, max(rise.values()) / limit.at, tuple(rise))


def valid(w: Window) -> Iterable[Finding]:
    limit = LIMITS["valid"]
    low = {m: w.mean(key) for m, key in per_mode("proposer", "valid_rate").items()}
    low = {mode: share for mode, share in low.items() if share is not None and share < limit.at}
    if not low:
        return
    reasons = sum((w.refusals(mode)[0] for mode in low), Counter())
    common = reasons.most_common(3)
    reason = common[0][0] if common else ""
    worst = max(low, key=lambda mode: w.refusals(mode)[0][reason])
    named = ", ".join(f"{name} {count}" for name, count in common)
    what = f"hardly a proposal is valid ({listed(low)}); of {reasons.total()} refusals: {named}"
    level = limit.at / max(min(low.values()), limit.at / 4)  # zero is four times past it
    yield finding(w, "valid", what, remedy(w, worst, reason), level, tuple(low), (worst, reason))


FORM = ("no_format", "no_program", "no_input", "no_message", "no_entry", "wrong_count", "message_has_code")


def remedy(w: Window, mode: str, reason: str) -> str:
    """What to try when a mode's proposals are mostly refused for a reason."""
    if (w.mean(f"proposer/{mode}/truncated_rate") or 0) >= LIMITS["cut-off"].at:
        return f"Many are cut off: try {longer(w)}"
    if reason == "too_long":
        return "Prompts do not fit: try fewer --references or a lower --prompt-tokens"
    if reason == "duplicate":
        return warmer(w.config)
    if reason == "held_out":
        return f"They are programs of --eval-data, names and constants aside. {warmer(w.config)}"
    if reason in ("infra", "timeout", "memory"):
        return "See what the sandbox says: python -m sandbox doctor"
    flags = [cooler(w.config)]
    if mode != "induction":  # its prompt is one given program
        flags.insert((w.config.get("temperature") or 1) > 1, more_references(w.config))
    before = w.mean(f"proposer/{mode}/valid_rate", w.first) or 0
    if before >= 2 * (w.mean(f"proposer/{mode}/valid_rate") or 0) and before >= 2 * LIMITS["valid"].at:
        flags = [lower_rate(w.config) + " (it was better before)"]
    if reason in FORM:
        return f"The proposer does not keep the asked form: try {', or '.join(flags)}"
    return (
        f"If the example looks right, the validator (azr/tasks/__init__.py) is too strict; if not, try {', or '.join(flags)}"
    )


def warmer(config: dict) -> str:
    now = config.get("temperature") or 1.0
    shown = (
        "" if (config.get("references") or 0) <= 1 else f", {more_references(config)} or --proposer-reward half-peak"
    )
    return f"Try --temperature {now + 0.2:g}{shown}"


def refused(w: Window) -> Iterable[Finding]:
    limit, found = LIMITS["refused"], {}
    for mode in MODES:
        reasons, total = w.refusals(mode)
        reasons = Counter({r: n for r, n in reasons.items() if r not in ("infra", "duplicate", "timeout")})  # below
        if total and reasons:
            reason, count = reasons.most_common(1)[0]
            if count / total >= limit.at:
                found[mode] = (count / total, reason)
    if not found:
        return
    worst = max(found, key=found.get)
    share, reason = found[worst]
    named = ", ".join(f"{mode} {100 * part:.0f} % {name}" for mode, (part, name) in found.items())
    what = f"one reason refuses many proposals ({named})"
    yield finding(w, "refused", what, remedy(w, worst, reason), share / limit.at, tuple(found), (worst, reason))


def malformed(w: Window) -> Iterable[Finding]:
    limit = LIMITS["format"]
    kept = {mode: w.mean(key) for mode, key in per_mode("solver", "well_formed_rate").items()}
    broken = {mode: 1 - share for mode, share in kept.items() if share is not None and 1 - share >= limit.at}
    if not broken:
        return
    if max(w.mean(f"solver/{mode}/truncated_rate") or 0 for mode in broken) >= LIMITS["cut-off"].at:
        advice = f"Many are cut off: try {longer(w)}"
    else:
        advice = f"Try {cooler(w.config)} or {lower_rate(w.config)}; samples.jsonl has them under no_format"
    what = f"answers without the asked form ({listed(broken)})"
    yield finding(w, "format", what, advice, max(broken.values()) / limit.at, tuple(broken))


def no_advantage(w: Window) -> Iterable[Finding]:
    limit = LIMITS["no-advantage"]
    idle = w.over(per_mode("solver", "zero_advantage_rate"), limit.at)
    if not idle:
        return
    solved = {mode: w.mean(f"solver/{mode}/accuracy") or 0.0 for mode in idle}
    n = w.config.get("answers") or 8
    shape = "" if w.config.get("proposer_reward") == "learnability" else ", or --proposer-reward learnability"
    if max(solved.values()) < 0.5:
        advice = f"Too hard (solved: {listed(solved)}): try --answers {2 * n}, or a larger --model{shape}"
    else:
        advice = f"Too easy (solved: {listed(solved)}): try --ends-penalty 0.5, or --answers {2 * n}{shape}"
    what = f"nearly all groups of answers are alike and teach nothing ({listed(idle)})"
    level = (1 - limit.at) / max(1 - max(idle.values()), (1 - limit.at) / 4)
    yield finding(w, "no-advantage", what, advice, level, tuple(idle))


def one_answer(w: Window) -> Iterable[Finding]:
    """Not where so few tasks were answered that one of them makes the share."""
    limit = LIMITS["one-answer"]
    same = w.over(per_mode("solver", "commonest_share"), limit.at)
    same = {mode: share for mode, share in same.items() if share * (w.mean(f"solver/{mode}/tasks") or 0) >= FEW_TASKS}
    if not same:
        return
    what = f"the same answer to everything ({listed(same)}): proposals and answers have settled on it"
    flags = ["an earlier checkpoint", lower_rate(w.config)]
    flags += ["--minibatches 1"] if (w.config.get("minibatches") or 1) > 1 else []
    flags += ["--solver-tasks backfill"] if w.config.get("solver_tasks") == "fresh" else []
    advice = f"It costs coverage (eval_passk.py shows it at large k): try {' or '.join(flags)}"
    yield finding(w, "one-answer", what, advice, max(same.values()) / limit.at, tuple(same))


def gap_limit(config: dict) -> Limit:
    """Of the dtype of computation; bf16 for runs that do not say, which is the widest."""
    return GAP.get(config.get("dtype"), LIMITS["gap"])


def gap(w: Window) -> Iterable[Finding]:
    limit, value, outside = gap_limit(w.config), w.mean("train/log_prob_gap"), w.mean("train/gap_outside_10")
    if value is None or value < limit.at:
        return
    config, dtype, flags = w.config, w.config.get("dtype") or "bf16", []
    if config.get("rollout_weights") == "bf16":
        flags.append("--rollout-weights stored (samples with the very weights that are trained)")
    if config.get("attn") != "sdpa":
        flags.append("--attn sdpa (no other kernels)")
    if dtype == "bf16":
        flags.append("--dtype fp16 (rounds eight times finer)")
    flags.append("train_azr.py --doctor")
    advice = f"More than rounding in {dtype}, so perhaps a fault of a kernel: try {' or '.join(flags)}"
    share = "" if outside is None else f", {100 * outside:.0f} % of tokens by more than 10 %"
    what = f"sampler and trainer disagree by {value:.3f} nats a token{share}: not the policy that is trained"
    yield finding(w, "gap", what, advice, value / limit.at)


def duplicates(w: Window) -> Iterable[Finding]:
    limit = LIMITS["duplicates"]
    if same := w.over(per_mode("proposer", "duplicate_rate"), limit.at):
        level = max(same.values()) / limit.at
        what = f"proposals repeat earlier ones ({listed(same)})"
        yield finding(w, "duplicates", what, warmer(w.config), level, tuple(same))


def cut_off(w: Window) -> Iterable[Finding]:
    limit = LIMITS["cut-off"]
    cut = w.over(both_roles("truncated_rate"), limit.at)
    if not cut:
        return
    longest = f" {w.config['max_new_tokens']}" if w.config.get("max_new_tokens") else ""
    what = f"responses are cut off at --max-new-tokens{longest} ({listed(cut)})"
    before = [w.mean(both_roles("truncated_rate")[place], w.first[:2]) for place in cut]
    if max(share for share in before if share is not None) < limit.at / 2:
        advice = f"At first they were not: {lower_rate(w.config)} if they ramble, {longer(w)} if they think longer"
    else:
        advice = f"Cut-off ones count as malformed: try {longer(w)} (--dry-run says what memory it takes)"
    yield finding(w, "cut-off", what, advice, max(cut.values()) / limit.at, tuple(cut))


def held_out(w: Window) -> Iterable[Finding]:
    """Held-out accuracy below its best while that of the training rose."""
    limit = LIMITS["held-out"]
    if len(w.held_out) < 2:
        return
    best, now = max(w.held_out, key=lambda point: point[1]), w.held_out[-1]
    if best[1] - now[1] >= limit.at and now[2] > best[2]:
        fell = f"{100 * best[1]:.1f} -> {100 * now[1]:.1f} % since step {best[0]}"
        rose = f"{100 * best[2]:.0f} -> {100 * now[2]:.0f} %"
        what = f"held-out accuracy fell {fell}, while that on own tasks rose {rose}: these became easier or narrower"
        advice = (
            f"checkpoints/step_{best[0]} is the best so far; try {lower_rate(w.config)} or more --prompts-per-mode"
        )
        yield finding(w, "held-out", what, advice, (best[1] - now[1]) / limit.at)


def skipped(w: Window) -> Iterable[Finding]:
    limit, count = LIMITS["skipped"], sum(number(row, "train/skipped") or 0 for row in w.last)
    if count >= limit.at:
        what = f"{count:.0f} of the last {len(w.last)} updates were not finite and were skipped"
        yield finding(
            w,
            "skipped",
            what,
            f"Try {lower_rate(w.config)}; non_finite_step_*.jsonl has the batches",
            count / limit.at,
        )


def sandbox(w: Window) -> Iterable[Finding]:
    limit, share = LIMITS["sandbox"], {}
    for mode in MODES:
        reasons, total = w.refusals(mode)
        if total and reasons["infra"] / total >= limit.at:
            share[mode] = reasons["infra"] / total
    if share:
        what = f"the sandbox gave no verdict on proposals ({listed(share)}): the machine is too busy"
        advice = "They count for nothing; run python -m sandbox doctor, and stop what else uses the CPU"
        yield finding(w, "sandbox", what, advice, max(share.values()) / limit.at, tuple(share))


def timeouts(w: Window) -> Iterable[Finding]:
    limit = LIMITS["timeout"]
    slow = w.over({f"answers {mode}": key for mode, key in per_mode("solver", "timeout_rate").items()}, limit.at)
    for mode in MODES:
        reasons, total = w.refusals(mode)
        if total and reasons["timeout"] / total >= limit.at:
            slow[f"proposals {mode}"] = reasons["timeout"] / total
    if slow:
        what = f"programs run out of CPU time ({listed(slow)})"
        advice = f"Steps get slow; see them in samples.jsonl under timeout; try {cooler(w.config)}"
        yield finding(w, "timeout", what, advice, max(slow.values()) / limit.at, tuple(slow))


def memory(w: Window) -> Iterable[Finding]:
    limit, shrunk = LIMITS["memory"], {}
    for name, what in (("token_budget", "tokens of a micro-batch"), ("max_batch", "sequences at once")):
        planned, now = (
            w.config.get(name) or number(w.first[0], f"memory/{name}"),
            number(w.last[-1], f"memory/{name}"),
        )
        if planned and now and planned / now >= limit.at:
            shrunk[f"{what} {planned:g} -> {now:g}"] = planned / now
    if shrunk:
        advice = "Results stay, but steps get slower: try a smaller --preset, --max-new-tokens or --prompt-tokens"
        what = f"memory ran out again and again ({', '.join(shrunk)})"
        yield finding(
            w, "memory", what, advice, max(shrunk.values()) / limit.at, tuple(sorted(s.split()[0] for s in shrunk))
        )


CHECKS: tuple[Callable[[Window], Iterable[Finding]], ...] = (
    skipped, memory, gap, entropy_rise, cut_off, malformed, valid, refused, duplicates, no_advantage, one_answer,
    entropy, held_out, sandbox, timeouts,
)  # fmt: skip
DERIVED = ("cut-off", "format", "valid", "refused", "no-advantage")


def finding(w: Window, check: str, what: str, advice: str, level: float, places: tuple = (), example=None) -> Finding:
    return Finding(check, w.last[-1]["step"], what, advice, level, places, example)


# ------------------------------------------------------------------------------------------------------ what is said


def causes(found: list[Finding]) -> list[Finding]:
    """Without what another finding explains: one fault, one warning."""
    places = {f.check: set(f.places) for f in found}
    if "entropy-rise" in places:  # all the rest follows from it
        found = [f for f in found if f.check not in DERIVED]
    cut = {place.removeprefix("solver ") for place in places.get("cut-off", ()) if place.startswith("solver ")}
    explained = {
        "refused": places.get("valid", set()),  # which names the reason
        "format": cut,
        "no-advantage": cut | places.get("format", set()),  # all alike, since all malformed
    }
    return [f for f in found if f.check not in explained or not set(f.places) <= explained[f.check]]


class Health:
    """The warnings of a run, row by row.

    config: its settings as in config.json. said: every warning given; now: those that hold after the last row;
    until: the last step at which each held.
    """

    def __init__(self, config: dict) -> None:
        self.window, self.said, self.now = Window(config), [], []
        self.until: dict[str, int] = {}
        self._last: dict[tuple[str, str], Finding] = {}

    def add(self, row: dict) -> list[Finding]:
        """Takes the next row; returns the warnings to say at it."""
        self.window.add(row)
        found = [f for check in CHECKS for f in check(self.window) if self.window.count >= LIMITS[f.check].steps]
        self.now = found = causes(found)
        self.until |= {f.check: f.step for f in found}
        new = [f for f in found if self._is_news(f)]
        for f in new:
            self._last |= {(f.check, place): f for place in f.places or ("",)}
        self.said += new
        return new

    def _is_news(self, f: Finding) -> bool:
        earlier = [self._last.get((f.check, place)) for place in f.places or ("",)]
        if any(e is not None and f.step - e.step < WINDOW for e in earlier):
            return False  # the same rows, mostly
        return any(e is None or f.level >= WORSE * e.level or f.step - e.step >= AGAIN_AFTER for e in earlier)

    def summary(self) -> list[str]:
        """Lines for the end of a run: each warning once, the last time it was said, and whether it still holds."""
        latest: dict[tuple[str, str], Finding] = {}
        first: dict[tuple[str, str], int] = {}
        for f in [*self.said, *self.now]:
            key = (f.check, f.places[0] if f.check.startswith("entropy") else "")
            first.setdefault(key, f.step)
            latest[key] = f
        if not latest:
            return [
                f"health: nothing to warn of in {self.window.count} steps (checks: python analyze.py health --limits)"
            ]
        lines = ["what to look at:"]
        for (check, _), f in latest.items():
            when = f"step {f.step}" if first[(check, _)] == f.step else f"steps {first[(check, _)]} to {f.step}"
            if f not in self.now:
                when += ", gone by the end" if self.until[check] < self.window.last[-1]["step"] else ""
            lines.append(f"- {when}: {f.what}. {f.advice}")
        return lines


def example(run_dir: Path, f: Finding) -> str | None:
    """The last proposal of samples.jsonl up to the finding's step that was refused for its reason, on one line."""
    path = Path(run_dir) / "samples.jsonl"
    if f.example is None or not path.is_file():
        return None
    mode, reason = f.example
    mark, latest = json.dumps({"reason": reason})[1:-1].encode(), None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        for line in file:
            if mark not in line or not line.endswith(b"\n") or not line.startswith(b"{"):
                continue
            row = json.loads(line)
            if row["step"] > f.step:
                break
            if (row["role"], row["mode"], row["reason"]) == ("proposer", mode, reason):
                latest = row["response"]
    return None if latest is None else ascii(latest if len(latest) <= 90 else latest[:90] + " ...")


class Watch:
    """Says the warnings of a running run as they come; of what is in metrics.jsonl already, they were said before."""

    def __init__(self, config: dict, run_dir: Path, say: Callable[[str], None]) -> None:
        """config: the settings; say: prints a line, `console.warn`."""
        self.health, self.run_dir, self.say = Health(config), Path(run_dir), say
        if (self.run_dir / "metrics.jsonl").exists():
            for row in steps_of(self.run_dir):
                self.health.add(row)

    def add(self, row: dict) -> None:
        for f in self.health.add(row):
            shown = example(self.run_dir, f)
            self.say(f.text() + (f"; example of {f.example[1]}: {shown}" if shown else ""))


def steps_of(run_dir: Path) -> list[dict]:
    return [row for row in read_metrics(run_dir) if row["step"] > 0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run directory; the run may still be going on")
    parser.add_argument("--limits", action="store_true", help="print the limit of every check, with its reason")


def main(args) -> int:
    """Returns the exit code."""
    if args.limits:
        for name, limit in (LIMITS | {f"gap, {dtype}": limit for dtype, limit in GAP.items()}).items():
            print(f"{name:13s}{limit.at:5g}  from step {limit.steps:2d}  {limit.why}")
        return 0
    if args.run is None:
        print("analyze.py health: which run? give its directory (or --limits)", file=sys.stderr)
        return 2
    try:
        rows = steps_of(args.run)
        config = json.loads((args.run / "config.json").read_text(encoding="utf-8"))
    except (RunError, OSError, ValueError) as error:
        print(f"analyze.py health: {error}", file=sys.stderr)
        return 2
    health = Health(config)
    with contextlib.suppress(BrokenPipeError):  # | head
        for row in rows:
            for f in health.add(row):
                print(f.text())
                if shown := example(args.run, f):
                    print(f"    example of {f.example[1]}: {shown}")
        print("\n".join(health.summary()), flush=True)
        return 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
    return 0

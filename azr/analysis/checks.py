"""The table of warnings: what is measured over the last rows of a run, with its limit, its words and the flag to try.

A check is a function of a Window. It hands its values, {place: value}, to `past`, which returns those beyond the limit
(a place is a mode, a role, or "" for the run as a whole), and returns these with a sentence and an advice. Its
docstring is the reason of the limit, which `analyze.py health --limits` prints. `azr/analysis/health.py` asks them all
at every step. Left out: when a warning is repeated, and which one explains another.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MODES = ("deduction", "abduction", "induction", "math")
ROLES = ("proposer", "solver")
WINDOW = 10  # steps a mean is over: a step of 8 proposals a mode moves by 12 points when one of them changes
FEW_TASKS = 3  # tasks of a step whose answers would make the share of one answer
CUT_OFF = 0.10  # share of responses; also what decides whether malformed ones are malformed because they were cut off
HARDLY_VALID = 0.10  # share of a mode's proposals
# Refusals that are no fault of a proposal's form and have a check of their own.
COUNTED_ELSEWHERE = ("infra", "duplicate", "timeout")
FORM = ("no_format", "no_program", "no_input", "no_message", "no_entry", "wrong_count", "message_has_code")


class Window:
    """The first and the last rows of a run, and the settings it runs with (config.json)."""

    def __init__(self, config: dict) -> None:
        """config: the settings of the run, as in config.json; no row yet."""
        self.config, self.count = config, 0
        self.first: list[dict] = []
        self.last: deque[dict] = deque(maxlen=WINDOW)
        self.held_out: list[tuple[int, float, float]] = []  # step, held-out accuracy, accuracy in training

    def add(self, row: dict) -> None:
        """Takes the next row of metrics.jsonl."""
        if len(self.first) < WINDOW:
            self.first.append(row)
        self.last.append(row)
        self.count += 1
        accuracy = number(row, "held_out/all/accuracy")
        if accuracy is not None:
            values = self.rates("solver", "accuracy").values()
            self.held_out.append((row["step"], accuracy, sum(values) / len(values) if values else math.nan))

    def mean(self, key: str, rows: Iterable[dict] | None = None) -> float | None:
        """Over the last rows that have it; None if none has."""
        values = [number(row, key) for row in (self.last if rows is None else rows)]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    def rates(self, role: str, name: str) -> dict[str, float]:
        """{mode: mean} of a metric, for the modes that have it."""
        means = {mode: self.mean(f"{role}/{mode}/{name}") for mode in MODES}
        return {mode: value for mode, value in means.items() if value is not None}

    def entropies(self, first: int, last: int) -> dict[str, tuple[float, float]]:
        """{role: entropy of the first and of the last so many rows, nats a token}."""
        ends = {}
        for role in ROLES:
            key = f"{role}/all/entropy"
            pair = self.mean(key, self.first[:first]), self.mean(key, list(self.last)[-last:])
            if pair[0] and pair[1] is not None:
                ends[role] = pair
        return ends

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

    def refused_for(self, reason: str) -> dict[str, float]:
        """{mode: share of its proposals refused for this reason}, for the modes that were proposed for."""
        counts = {mode: self.refusals(mode) for mode in MODES}
        return {mode: refused[reason] / total for mode, (refused, total) in counts.items() if total}


def number(row: dict, key: str) -> float | None:
    """The value, None for what is missing, null or NaN (a live row has NaN where its line in the file has null)."""
    value = row.get(key)
    return None if value is None or value != value else float(value)


def listed(shares: dict[str, float]) -> str:
    """{"deduction": 0.04} as "deduction 4 %"."""
    return ", ".join(f"{place} {100 * share:.0f} %" for place, share in shares.items())


# ---------------------------------------------------------------- what a check is


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
        """The warning as it is printed, without the example."""
        return f"step {self.step}: {self.what}. {self.advice}"


@dataclass(frozen=True)
class Check:
    """A row of the table. It warns if a value is at the limit or above it (`below`: under it)."""

    name: str
    limit: float
    steps: int  # rows before it is asked
    ask: Callable  # (window, past) -> None or (values past the limit, sentence, advice[, example of a refusal])
    why: str  # the reason of the limit
    below: bool
    short: bool  # asked at the end of a run that has fewer steps, too

    def past(self, values: dict[str, float]) -> dict[str, float]:
        """The values that are past the limit."""
        return {place: v for place, v in values.items() if (v < self.limit if self.below else v >= self.limit)}

    def look(self, w: Window) -> Finding | None:
        """What is past the limit after the last row; None if nothing is, or it is too early to ask."""
        if w.count < (min(self.steps, w.config.get("steps") or self.steps) if self.short else self.steps):
            return None
        if (answer := self.ask(w, self.past)) is None:
            return None
        values, sentence, advice, *example = answer
        level = max(values.values()) / self.limit
        if self.below:  # where zero counts as four times below the limit
            level = self.limit / max(min(values.values()), self.limit / 4)
        places = tuple(place for place in values if place)
        return Finding(self.name, w.last[-1]["step"], sentence, advice, level, places, *example)


CHECKS: list[Check] = []


def check(limit: float, steps: int, below: bool = False, short: bool = False) -> Callable:
    """Puts a function into the table, under its own name and with its docstring as the reason."""

    def add(ask: Callable) -> Callable:
        name = ask.__name__.rstrip("_").replace("_", "-")
        CHECKS.append(Check(name, limit, steps, ask, ask.__doc__, below, short))
        return ask

    return add


# ---------------------------------------------------------------- the flags that may help


def lower_rate(config: dict, times: float = 2) -> str:
    """The flag with the learning rate divided."""
    return f"--learning-rate {config['learning_rate'] / times:g}" if config.get("learning_rate") else "--learning-rate"


def cooler(config: dict) -> str:
    """A lower temperature, or a better model where it is low already."""
    now = config.get("temperature") or 1.0
    if now > 1:
        return "--temperature 1"
    return f"--temperature {now - 0.2:.2g}" if now > 0.7 else "a larger or instruction-tuned --model"


def more_references(config: dict) -> str:
    """Twice as many examples in the proposer's prompt."""
    return f"--references {2 * (config.get('references') or 3)} (it is shown more examples)"


def warmer(config: dict) -> str:
    """Against proposals that repeat: a higher temperature, other examples, another reward."""
    other = f", {more_references(config)} or --proposer-reward half-peak" if (config.get("references") or 0) > 1 else ""
    return f"Try --temperature {(config.get('temperature') or 1.0) + 0.2:g}{other}"


def longer(w: Window) -> str:
    """A higher limit of the response's length: by how much depends on how many are cut off."""
    most = max([rate for role in ROLES for rate in w.rates(role, "truncated_rate").values()], default=0)
    return f"--max-new-tokens {(4 if most > 0.5 else 2) * (w.config.get('max_new_tokens') or 512)}"


def was_better(w: Window, mode: str) -> bool:
    """Whether twice as many of a mode's proposals and more were valid in the first two steps as in the last three."""
    parts = w.first[:2], list(w.last)[-3:]
    before, now = (w.mean(f"proposer/{mode}/valid_rate", rows) or 0 for rows in parts)
    return before >= 2 * max(now, HARDLY_VALID)


def remedy(w: Window, mode: str, reason: str) -> str:
    """What to try when a mode's proposals are mostly refused for a reason."""
    if (w.mean(f"proposer/{mode}/truncated_rate") or 0) >= CUT_OFF:
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
    if was_better(w, mode):
        flags = [lower_rate(w.config) + " (it was better before)"]
    flags = ", or ".join(flags)
    if reason in FORM:
        return f"The proposer does not keep the asked form: try {flags}"
    return f"If the example looks right, the validator (azr/tasks/validation.py) is too strict; if not, try {flags}"


# ---------------------------------------------------------------- the table

# "Healthy": the worst 10-step mean of a run of the embedded model that learned: three of 80 to 100 steps of the present
# base, and ten of 80 to 120 steps of the one before it, where that one was worse. What those have is no warning.


@check(2, steps=1)
def skipped(w: Window, past: Callable):
    """Updates of the last 10 with a non-finite gradient; one can be chance."""
    if over := past({"": sum(number(row, "train/skipped") or 0 for row in w.last)}):
        what = f"{over['']:.0f} of the last 10 updates were not finite and were skipped"
        return over, what, f"Try {lower_rate(w.config)}; non_finite_step_*.jsonl has the batches"


@check(4, steps=1)
def memory(w: Window, past: Callable):
    """Times smaller micro-batches, or fewer sequences, than planned: two back-offs or more."""
    sizes = {}
    for name, what in (("token_budget", "tokens of a micro-batch"), ("max_batch", "sequences at once")):
        planned = w.config.get(name) or number(w.first[0], f"memory/{name}")
        now = number(w.last[-1], f"memory/{name}")
        if planned and now:
            sizes[what] = planned, now
    if over := past({what: planned / now for what, (planned, now) in sizes.items()}):
        moved = ", ".join(f"{what} {sizes[what][0]:g} -> {sizes[what][1]:g}" for what in over)
        advice = "Results stay, but steps get slower: try a smaller --preset, --max-new-tokens or --prompt-tokens"
        return over, f"memory ran out again and again ({moved})", advice


# The gap was measured on a CPU, sampled at temperature 1, LoRA of rank 16: mean |difference|, share of tokens whose
# ratio is outside [0.9, 1.1]. SmolLM2-135M: fp32 3.2e-6, 0 % (n 461; NF4 3.2e-6, 0 %, n 470); fp16 3.9e-3, 0 % (n 461;
# NF4 4.6e-3, 0 %, n 480); bf16 2.8e-2, 4.1 % (n 461; NF4 3.6e-2, 8.3 %, n 480). The embedded model before this one (n
# 432 to 438): fp32 5e-7, fp16 4e-4, bf16 4e-3, all 0 %. Published shares, of a trainer alone at two batch sizes:
# Qwen2.5-3B 6.9 %, 7B 5.6 % in bf16, 0.00 % in fp16 and fp32 (verl, issue 6280); TRL 7.5 to 8 % in bf16 (issue 6789).
GAPS = {"bf16": 0.10, "fp16": 0.02, "fp32": 0.001}  # nats a token, above what rounding makes of them


@check(1, steps=3)
def gap(w: Window, past: Callable):
    """Times the gap of sampler and trainer that its dtype allows: 0.1 nats a token in bf16, 0.02 fp16, 0.001 fp32."""
    mean, dtype = w.mean("train/log_prob_gap"), w.config.get("dtype")
    dtype = dtype if dtype in GAPS else "bf16"  # the widest, for runs that do not say
    if mean is None or not (over := past({"": mean / GAPS[dtype]})):
        return None
    outside = w.mean("train/gap_outside_10")
    share = "" if outside is None else f", {100 * outside:.0f} % of tokens by more than 10 %"
    what = f"sampler and trainer disagree by {mean:.3f} nats a token{share}: not the policy that is trained"
    flags = ["train_azr.py --doctor"]
    if dtype == "bf16":
        flags.insert(0, "--dtype fp16 (rounds eight times finer)")
    if w.config.get("attn") != "sdpa":
        flags.insert(0, "--attn sdpa (no other kernels)")
    if w.config.get("rollout_weights") == "bf16":
        flags.insert(0, "--rollout-weights stored (samples with the very weights that are trained)")
    return over, what, f"More than rounding in {dtype}, so perhaps a fault of a kernel: try {' or '.join(flags)}"


@check(1.50, steps=8)
def entropy_rise(w: Window, past: Callable):
    """Entropy of the last 5 steps over that of the first 3, as a text falls apart within a few; healthy up to 1.11."""
    ends = w.entropies(3, 5)
    if over := past({role: last / first for role, (first, last) in ends.items()}):
        moved = ", ".join(f"{role} {ends[role][0]:.2f} -> {ends[role][1]:.2f}" for role in over)
        what = f"entropy rose {max(over.values()):.1f}-fold ({moved} nats a token): the text falls apart"
        return over, what, f"Begin again with {lower_rate(w.config, 4)} or less"


@check(CUT_OFF, steps=3)
def cut_off(w: Window, past: Callable):
    """Share of responses that end at --max-new-tokens; healthy up to 8 %."""
    rates = {f"{role} {mode}": value for role in ROLES for mode, value in w.rates(role, "truncated_rate").items()}
    if over := past(rates):
        advice = f"Cut-off ones count as malformed: try {longer(w)} (--dry-run says what memory it takes)"
        first = [w.mean(f"{place.replace(' ', '/')}/truncated_rate", w.first[:2]) for place in over]
        if max(share for share in first if share is not None) < CUT_OFF / 2:
            advice = f"At first they were not: {lower_rate(w.config)} if they ramble, {longer(w)} if they think longer"
        what = f"responses are cut off at --max-new-tokens {w.config.get('max_new_tokens')} ({listed(over)})"
        return over, what, advice


@check(0.50, steps=5)
def format_(w: Window, past: Callable):
    """Share of answers without the asked form; healthy up to 6 %, an untrained base more."""
    if over := past({mode: 1 - value for mode, value in w.rates("solver", "well_formed_rate").items()}):
        advice = f"Try {cooler(w.config)} or {lower_rate(w.config)}; samples.jsonl has them under no_format"
        return over, f"answers without the asked form ({listed(over)})", advice


@check(HARDLY_VALID, steps=3, below=True, short=True)
def valid(w: Window, past: Callable):
    """Share of a mode's proposals that are valid; healthy from 25 %; below, the group is one long refusal."""
    if under := past(w.rates("proposer", "valid_rate")):
        reasons = sum((w.refusals(mode)[0] for mode in under), Counter())
        named = ", ".join(f"{name} {count}" for name, count in reasons.most_common(3))
        what = f"hardly a proposal is valid ({listed(under)}); of {reasons.total()} refusals: {named}"
        reason = reasons.most_common(1)[0][0] if reasons else ""
        shown = max(under, key=lambda mode: w.refusals(mode)[0][reason]), reason
        return under, what, remedy(w, *shown), shown


@check(0.50, steps=3, short=True)
def no_task(w: Window, past: Callable):
    """Share of steps without any valid proposal: most of the run proposes for nothing."""
    steps = [[number(row, f"proposer/{mode}/valid_rate") for mode in MODES] for row in w.last]
    steps = [not any(rates) for rates in steps if any(rate is not None for rate in rates)]
    if over := past({"": sum(steps) / len(steps)} if steps else {}):
        what = f"{100 * over['']:.0f} % of the last steps had no valid proposal, so no new task"
        better = any(was_better(w, mode) for mode in MODES)
        flag = f"{lower_rate(w.config)} (it was better before)" if better else cooler(w.config)
        return over, what, f"Try {flag}; samples.jsonl has the reasons"


@check(0.75, steps=5)
def refused(w: Window, past: Callable):
    """Share of a mode's proposals refused for one reason; healthy up to 72 % (wrong_count)."""
    main = {}  # mode -> (commonest reason, share of the proposals that it refuses)
    for mode in MODES:
        reasons, total = w.refusals(mode)
        reasons = Counter({name: n for name, n in reasons.items() if name not in COUNTED_ELSEWHERE})
        if total and reasons:
            reason, count = reasons.most_common(1)[0]
            main[mode] = reason, count / total
    if over := past({mode: share for mode, (_, share) in main.items()}):
        named = ", ".join(f"{mode} {100 * share:.0f} % {main[mode][0]}" for mode, share in over.items())
        worst = max(over, key=over.get)
        shown = worst, main[worst][0]
        return over, f"one reason refuses many proposals ({named})", remedy(w, *shown), shown


@check(0.30, steps=5)
def duplicates(w: Window, past: Callable):
    """Share of a mode's proposals that were proposed before; healthy up to 13 %."""
    if over := past(w.rates("proposer", "duplicate_rate")):
        return over, f"proposals repeat earlier ones ({listed(over)})", warmer(w.config)


@check(0.50, steps=5)
def guessable(w: Window, past: Callable):
    """Share of a mode's valid tasks whose answer is guessed at least every third time."""
    if over := past(w.rates("proposer", "guessable_rate")):
        return over, f"many tasks can be guessed ({listed(over)})", "Try --proposer-reward above-chance"


@check(0.95, steps=5)
def no_advantage(w: Window, past: Callable):
    """Share of answers in groups that are all alike: no gradient; healthy up to 89 %."""
    if over := past(w.rates("solver", "zero_advantage_rate")):
        solved = {mode: w.mean(f"solver/{mode}/accuracy") or 0.0 for mode in over}
        answers = f"--answers {2 * (w.config.get('answers') or 8)}"
        shape = "" if w.config.get("proposer_reward") == "learnability" else ", or --proposer-reward learnability"
        advice = f"Too easy (solved: {listed(solved)}): try --ends-penalty 0.5, or {answers}{shape}"
        if max(solved.values()) < 0.5:
            advice = f"Too hard (solved: {listed(solved)}): try {answers}, or a larger --model{shape}"
        return over, f"nearly all groups of answers are alike and teach nothing ({listed(over)})", advice


@check(0.50, steps=3, short=True)
def no_update(w: Window, past: Callable):
    """Share of steps in which no sample had an advantage: most of the run trains nothing."""
    norms = [norm for row in w.last if (norm := number(row, "train/grad_norm")) is not None]
    if over := past({"": sum(norm == 0 for norm in norms) / len(norms)} if norms else {}):
        what = f"{100 * over['']:.0f} % of the last steps trained nothing: no sample had an advantage"
        return over, what, "Try more --prompts-per-mode, more --answers, or a larger --model"


@check(0.40, steps=5)
def one_answer(w: Window, past: Callable):
    """Share of a mode's answers that are one text; 101 of 109 runs stayed below 37 %."""
    shares = w.rates("solver", "commonest_share")
    # not where so few tasks were answered that one makes the share
    shares = {mode: s for mode, s in shares.items() if s * (w.mean(f"solver/{mode}/tasks") or 0) >= FEW_TASKS}
    if over := past(shares):
        flags = ["an earlier checkpoint", lower_rate(w.config)]
        flags += ["--minibatches 1"] if (w.config.get("minibatches") or 1) > 1 else []
        flags += ["--solver-tasks backfill"] if w.config.get("solver_tasks") == "fresh" else []
        what = f"the same answer to everything ({listed(over)}): proposals and answers have settled on it"
        return over, what, f"It costs coverage (eval_passk.py shows it at large k): try {' or '.join(flags)}"


@check(0.70, steps=2 * WINDOW)
def entropy(w: Window, past: Callable):
    """Share of the entropy lost since the first 10 steps; healthy up to 60 %, as they learn."""
    ends = w.entropies(WINDOW, WINDOW)
    if over := past({role: 1 - last / first for role, (first, last) in ends.items()}):
        fell = " and ".join(
            f"{role} entropy fell {100 * lost:.0f} % ({ends[role][0]:.2f} -> {ends[role][1]:.2f} nats a token)"
            for role, lost in over.items()
        )
        control = w.config.get("entropy_control") or "none"
        flag = "--entropy-control adaptive" if control == "none" else f"more than --entropy-control {control} does now"
        what = f"{fell}, mean of the first and of the last {WINDOW} steps: samples become alike"
        return over, what, f"Try {flag}, or {lower_rate(w.config)}"


@check(0.055, steps=1)
def held_out(w: Window, past: Callable):
    """Held-out accuracy lost since the best: 3 standard errors, 360 tasks of which 12 % change sides."""
    if len(w.held_out) < 2:
        return None
    best, now = max(w.held_out, key=lambda point: point[1]), w.held_out[-1]
    # only where that of the training rose: else nothing was learned in its place
    if over := past({"": best[1] - now[1]} if now[2] > best[2] else {}):
        fell = f"{100 * best[1]:.1f} -> {100 * now[1]:.1f} % since step {best[0]}"
        rose = f"{100 * best[2]:.0f} -> {100 * now[2]:.0f} %"
        what = f"held-out accuracy fell {fell}, while that on own tasks rose {rose}: these became easier or narrower"
        advice = f"checkpoints/step_{best[0]} is the best so far; try {lower_rate(w.config)} or more --prompts-per-mode"
        return over, what, advice


@check(0.005, steps=3)
def sandbox(w: Window, past: Callable):
    """Share of the proposals or of the answers without a verdict, the machine's fault; healthy 0."""
    refusals = [w.refusals(mode) for mode in MODES]
    tasks = sum(number(row, f"solver/{mode}/tasks") or 0 for row in w.last for mode in MODES)
    counts = {
        "proposals": (sum(reasons["infra"] for reasons, _ in refusals), sum(total for _, total in refusals)),
        "answers": (sum(number(row, "time/unjudged") or 0 for row in w.last), tasks * (w.config.get("answers") or 8)),
    }
    if over := past({what: missing / total for what, (missing, total) in counts.items() if total}):
        shares = ", ".join(f"{100 * share:.1f} % of the {what}" for what, share in over.items())
        advice = "They are left out, so nothing is learned from them: run python -m sandbox doctor, and stop what else "
        return over, f"the machine gave no verdict on {shares}", advice + "uses the CPU or the memory"


@check(0.20, steps=5)
def timeout(w: Window, past: Callable):
    """Share of proposals or answers that ran out of CPU time; healthy up to 0.8 %."""
    values = {f"answers {mode}": value for mode, value in w.rates("solver", "timeout_rate").items()}
    if over := past(values | {f"proposals {mode}": value for mode, value in w.refused_for("timeout").items()}):
        advice = f"Steps get slow; see them in samples.jsonl under timeout; try {cooler(w.config)}"
        return over, f"programs run out of CPU time ({listed(over)})", advice

"""The conditions of the table in azr/analysis/health.py: what is measured over the last rows of a run, and its words.

A measure takes a Window and returns {place: value}, place being a mode, a role or "" for the run as a whole; a sentence
and an advice take the Window and the places that are past their limit. Neither knows a limit, but for two that decide
what is the cause of what.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable

MODES = ("deduction", "abduction", "induction", "math")
ROLES = ("proposer", "solver")
WINDOW = 10  # steps a mean is over: a step of 8 proposals a mode moves by 12 points when one of them changes
FEW_TASKS = 3  # tasks of a step whose answers would make the share of one answer
CUT_OFF = 0.10  # share of responses; also what decides whether malformed ones are malformed because they were cut off
HARDLY_VALID = 0.10  # share of a mode's proposals
# Refusals that are no fault of a proposal's form and have a check of their own.
COUNTED_ELSEWHERE = ("infra", "duplicate", "timeout")
FORM = ("no_format", "no_program", "no_input", "no_message", "no_entry", "wrong_count", "message_has_code")
Measure = Callable[["Window"], dict[str, float]]


class Window:
    """The first and the last rows of a run, and the settings it runs with (config.json)."""

    def __init__(self, config: dict) -> None:
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
            values = known({mode: self.mean(f"solver/{mode}/accuracy") for mode in MODES}).values()
            self.held_out.append((row["step"], accuracy, sum(values) / len(values) if values else math.nan))

    def mean(self, key: str, rows: Iterable[dict] | None = None) -> float | None:
        """Over the last rows that have it; None if none has."""
        values = [number(row, key) for row in (self.last if rows is None else rows)]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    def rates(self, role: str, name: str) -> dict[str, float]:
        """{mode: mean} of a metric, for the modes that have it."""
        return known({mode: self.mean(f"{role}/{mode}/{name}") for mode in MODES})

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


def known(values: dict[str, float | None]) -> dict[str, float]:
    """Without the places that have no value."""
    return {place: value for place, value in values.items() if value is not None}


def listed(shares: dict[str, float]) -> str:
    """{"deduction": 0.04} as "deduction 4 %"."""
    return ", ".join(f"{place} {100 * share:.0f} %" for place, share in shares.items())


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


def warmer(config: dict) -> str:
    """Against proposals that repeat: a higher temperature, other examples, another reward."""
    now = config.get("temperature") or 1.0
    shown = (
        "" if (config.get("references") or 0) <= 1 else f", {more_references(config)} or --proposer-reward half-peak"
    )
    return f"Try --temperature {now + 0.2:g}{shown}"


def more_references(config: dict) -> str:
    """Twice as many examples in the proposer's prompt."""
    return f"--references {2 * (config.get('references') or 3)} (it is shown more examples)"


def longer(w: Window) -> str:
    """A higher limit of the response's length: by how much depends on how many are cut off."""
    most = max([rate for role in ROLES for rate in w.rates(role, "truncated_rate").values()], default=0)
    return f"--max-new-tokens {(4 if most > 0.5 else 2) * (w.config.get('max_new_tokens') or 512)}"


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
    before = w.mean(f"proposer/{mode}/valid_rate", w.first) or 0
    if before >= 2 * (w.mean(f"proposer/{mode}/valid_rate") or 0) and before >= 2 * HARDLY_VALID:
        flags = [lower_rate(w.config) + " (it was better before)"]
    flags = ", or ".join(flags)
    if reason in FORM:
        return f"The proposer does not keep the asked form: try {flags}"
    return f"If the example looks right, the validator (azr/tasks/validation.py) is too strict; if not, try {flags}"


# ---------------------------------------------------------------- measures: {place: value}


def rate(role: str, name: str) -> Measure:
    """The mean of a metric of a role, by mode."""
    return lambda w: w.rates(role, name)


def non_finite(w: Window) -> dict[str, float]:
    """Updates of the last rows that were skipped."""
    return {"": sum(number(row, "train/skipped") or 0 for row in w.last)}


def at_once(w: Window) -> dict[str, tuple[float, float]]:
    """{what is computed at once: (planned, now)}; running out of memory lowers it."""
    sizes = {}
    for name, what in (("token_budget", "tokens of a micro-batch"), ("max_batch", "sequences at once")):
        planned = w.config.get(name) or number(w.first[0], f"memory/{name}")
        now = number(w.last[-1], f"memory/{name}")
        if planned and now:
            sizes[what] = planned, now
    return sizes


def shrunk(w: Window) -> dict[str, float]:
    """How many times smaller what is computed at once has become."""
    return {what: planned / now for what, (planned, now) in at_once(w).items()}


def gap_in(dtype: str) -> Measure:
    """The sampler-trainer gap of a run that computes in this dtype; bf16 for runs that do not say, as the widest."""

    def measure(w: Window) -> dict[str, float]:
        own = w.config.get("dtype") if w.config.get("dtype") in ("fp16", "fp32") else "bf16"
        return known({"": w.mean("train/log_prob_gap")}) if own == dtype else {}

    return measure


def entropy_ends(w: Window, first: int, last: int) -> dict[str, tuple[float, float]]:
    """{role: entropy of the first and of the last rows, nats a token}."""
    ends = {}
    for role in ROLES:
        key = f"{role}/all/entropy"
        pair = w.mean(key, w.first[:first]), w.mean(key, list(w.last)[-last:])
        if pair[0] and pair[1] is not None:
            ends[role] = pair
    return ends


def entropy_rise(w: Window) -> dict[str, float]:
    """Times the entropy of the first 3 steps, by role; of 5 steps, as a text falls apart within a few."""
    return {role: last / first for role, (first, last) in entropy_ends(w, 3, 5).items()}


def entropy_loss(w: Window) -> dict[str, float]:
    """Share of the entropy of the first 10 steps that is lost, by role."""
    return {role: 1 - last / first for role, (first, last) in entropy_ends(w, WINDOW, WINDOW).items()}


def cut_off(w: Window) -> dict[str, float]:
    """Share of responses that the length limit ended, by role and mode."""
    return {f"{role} {mode}": value for role in ROLES for mode, value in w.rates(role, "truncated_rate").items()}


def malformed(w: Window) -> dict[str, float]:
    """Share of answers without the asked form, by mode."""
    return {mode: 1 - value for mode, value in w.rates("solver", "well_formed_rate").items()}


def no_task(w: Window) -> dict[str, float]:
    """Share of steps in which no mode had a valid proposal."""
    steps = [known({mode: number(row, f"proposer/{mode}/valid_rate") for mode in MODES}) for row in w.last]
    steps = [not any(rates.values()) for rates in steps if rates]
    return {"": sum(steps) / len(steps)} if steps else {}


def no_update(w: Window) -> dict[str, float]:
    """Share of steps whose gradient was 0 everywhere."""
    norms = [norm for row in w.last if (norm := number(row, "train/grad_norm")) is not None]
    return {"": sum(norm == 0 for norm in norms) / len(norms)} if norms else {}


def main_refusals(w: Window) -> dict[str, tuple[str, float]]:
    """{mode: (commonest reason, share of the proposals that it refuses)}."""
    result = {}
    for mode in MODES:
        reasons, total = w.refusals(mode)
        reasons = Counter({name: n for name, n in reasons.items() if name not in COUNTED_ELSEWHERE})
        if total and reasons:
            reason, count = reasons.most_common(1)[0]
            result[mode] = reason, count / total
    return result


def refused(w: Window) -> dict[str, float]:
    """Share of proposals that the commonest reason refuses, by mode."""
    return {mode: share for mode, (_, share) in main_refusals(w).items()}


def one_answer(w: Window) -> dict[str, float]:
    """Share of answers that are one text, by mode; not where so few tasks were answered that one makes the share."""
    shares = w.rates("solver", "commonest_share")
    return {mode: s for mode, s in shares.items() if s * (w.mean(f"solver/{mode}/tasks") or 0) >= FEW_TASKS}


def held_out_loss(w: Window) -> dict[str, float]:
    """Held-out accuracy lost since its best evaluation, where that of the training rose."""
    if len(w.held_out) < 2:
        return {}
    best, now = max(w.held_out, key=lambda point: point[1]), w.held_out[-1]
    return {"": best[1] - now[1]} if now[2] > best[2] else {}


def no_verdict(w: Window) -> dict[str, float]:
    """Share of proposals on which the sandbox gave no verdict, by mode."""
    return w.refused_for("infra")


def slow(w: Window) -> dict[str, float]:
    """Share of programs that ran out of CPU time: of answers and of proposals, by mode."""
    values = {f"answers {mode}": value for mode, value in w.rates("solver", "timeout_rate").items()}
    return values | {f"proposals {mode}": value for mode, value in w.refused_for("timeout").items()}


# ---------------------------------------------------------------- sentences and advice that need more than the values


def memory_words(w: Window, past: dict[str, float]) -> str:
    """From which size to which."""
    sizes = ", ".join(f"{what} {planned:g} -> {now:g}" for what, (planned, now) in at_once(w).items() if what in past)
    return f"memory ran out again and again ({sizes})"


def gap_words(w: Window, past: dict[str, float]) -> str:
    """With the share of tokens whose ratio is off by more than a tenth."""
    outside = w.mean("train/gap_outside_10")
    share = "" if outside is None else f", {100 * outside:.0f} % of tokens by more than 10 %"
    return f"sampler and trainer disagree by {past['']:.3f} nats a token{share}: not the policy that is trained"


def gap_advice(w: Window, past: dict[str, float]) -> str:
    """What brings sampler and trainer together, by what the run does not do yet."""
    dtype, flags = w.config.get("dtype") or "bf16", []
    if w.config.get("rollout_weights") == "bf16":
        flags.append("--rollout-weights stored (samples with the very weights that are trained)")
    if w.config.get("attn") != "sdpa":
        flags.append("--attn sdpa (no other kernels)")
    if dtype == "bf16":
        flags.append("--dtype fp16 (rounds eight times finer)")
    flags.append("train_azr.py --doctor")
    return f"More than rounding in {dtype}, so perhaps a fault of a kernel: try {' or '.join(flags)}"


def rise_words(w: Window, past: dict[str, float]) -> str:
    """From which entropy to which, by role."""
    ends = entropy_ends(w, 3, 5)
    moved = ", ".join(f"{role} {ends[role][0]:.2f} -> {ends[role][1]:.2f}" for role in past)
    return f"entropy rose {max(past.values()):.1f}-fold ({moved} nats a token): the text falls apart"


def loss_words(w: Window, past: dict[str, float]) -> str:
    """From which entropy to which, by role."""
    ends = entropy_ends(w, WINDOW, WINDOW)
    fell = " and ".join(
        f"{role} entropy fell {100 * lost:.0f} % ({ends[role][0]:.2f} -> {ends[role][1]:.2f} nats a token)"
        for role, lost in past.items()
    )
    return f"{fell}, mean of the first and of the last {WINDOW} steps: samples become alike"


def loss_advice(w: Window, past: dict[str, float]) -> str:
    """An entropy control, or a stronger one."""
    control = w.config.get("entropy_control") or "none"
    flag = "--entropy-control adaptive" if control == "none" else f"more than --entropy-control {control} does now"
    return f"Try {flag}, or {lower_rate(w.config)}"


def cut_off_words(w: Window, past: dict[str, float]) -> str:
    """With the limit."""
    longest = f" {w.config['max_new_tokens']}" if w.config.get("max_new_tokens") else ""
    return f"responses are cut off at --max-new-tokens{longest} ({listed(past)})"


def cut_off_advice(w: Window, past: dict[str, float]) -> str:
    """A lower learning rate where responses have become longer, else a higher limit."""
    first = [w.mean(f"{place.replace(' ', '/')}/truncated_rate", w.first[:2]) for place in past]
    if max(share for share in first if share is not None) < CUT_OFF / 2:
        return f"At first they were not: {lower_rate(w.config)} if they ramble, {longer(w)} if they think longer"
    return f"Cut-off ones count as malformed: try {longer(w)} (--dry-run says what memory it takes)"


def malformed_advice(w: Window, past: dict[str, float]) -> str:
    """A higher limit where answers are cut off, else less randomness."""
    if max(w.mean(f"solver/{mode}/truncated_rate") or 0 for mode in past) >= CUT_OFF:
        return f"Many are cut off: try {longer(w)}"
    return f"Try {cooler(w.config)} or {lower_rate(w.config)}; samples.jsonl has them under no_format"


def valid_words(w: Window, past: dict[str, float]) -> str:
    """With the commonest reasons."""
    reasons = sum((w.refusals(mode)[0] for mode in past), Counter())
    named = ", ".join(f"{name} {count}" for name, count in reasons.most_common(3))
    return f"hardly a proposal is valid ({listed(past)}); of {reasons.total()} refusals: {named}"


def valid_example(w: Window, past: dict[str, float]) -> tuple[str, str]:
    """(mode, reason): the commonest reason, and the mode that has it most."""
    reasons = sum((w.refusals(mode)[0] for mode in past), Counter())
    reason = reasons.most_common(1)[0][0] if reasons else ""
    return max(past, key=lambda mode: w.refusals(mode)[0][reason]), reason


def refused_words(w: Window, past: dict[str, float]) -> str:
    """With the reason of each mode."""
    reasons = main_refusals(w)
    named = ", ".join(f"{mode} {100 * share:.0f} % {reasons[mode][0]}" for mode, share in past.items())
    return f"one reason refuses many proposals ({named})"


def refused_example(w: Window, past: dict[str, float]) -> tuple[str, str]:
    """(mode, reason) of the mode with most refusals."""
    worst = max(past, key=past.get)
    return worst, main_refusals(w)[worst][0]


def no_advantage_advice(w: Window, past: dict[str, float]) -> str:
    """Other tasks, by whether these are too hard or too easy."""
    solved = {mode: w.mean(f"solver/{mode}/accuracy") or 0.0 for mode in past}
    n = w.config.get("answers") or 8
    shape = "" if w.config.get("proposer_reward") == "learnability" else ", or --proposer-reward learnability"
    if max(solved.values()) < 0.5:
        return f"Too hard (solved: {listed(solved)}): try --answers {2 * n}, or a larger --model{shape}"
    return f"Too easy (solved: {listed(solved)}): try --ends-penalty 0.5, or --answers {2 * n}{shape}"


def one_answer_advice(w: Window, past: dict[str, float]) -> str:
    """Back to before it settled, and more slowly."""
    flags = ["an earlier checkpoint", lower_rate(w.config)]
    flags += ["--minibatches 1"] if (w.config.get("minibatches") or 1) > 1 else []
    flags += ["--solver-tasks backfill"] if w.config.get("solver_tasks") == "fresh" else []
    return f"It costs coverage (eval_passk.py shows it at large k): try {' or '.join(flags)}"


def held_out_words(w: Window, past: dict[str, float]) -> str:
    """From which accuracy to which, held out and in training."""
    best, now = max(w.held_out, key=lambda point: point[1]), w.held_out[-1]
    fell = f"{100 * best[1]:.1f} -> {100 * now[1]:.1f} % since step {best[0]}"
    rose = f"{100 * best[2]:.0f} -> {100 * now[2]:.0f} %"
    return f"held-out accuracy fell {fell}, while that on own tasks rose {rose}: these became easier or narrower"


def held_out_advice(w: Window, past: dict[str, float]) -> str:
    """The best checkpoint, and what makes the next run slower to narrow."""
    best = max(w.held_out, key=lambda point: point[1])[0]
    return f"checkpoints/step_{best} is the best so far; try {lower_rate(w.config)} or more --prompts-per-mode"

"""What a run shows: a line a step, tables of sample tasks, the before/after table. Plain lines in a log file."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from azr.console import INDENT, console, counted, duration, prose, say
from azr.evals.held_out import EvalResult, difference, well_formed_difference
from azr.models import base_description
from azr.passk import shown
from azr.tasks import MODES, Sample
from azr.train import rules
from azr.train.metrics import mean

if TYPE_CHECKING:
    from azr.train.config import Config

PROJECT_AFTER = 3  # steps of this process, then what the whole run takes
TIMING_EVERY = 10  # steps between two lines of what the time and the memory go to
PHASES = {
    "sampling": ("propose", "solve"),
    "sandbox": ("validate", "judge"),
    "update": ("update",),
    "held-out": ("evaluate",),
}
HARDLY_ANY = 0.05  # valid proposals of the first rounds: a model below does not keep the form
INITIALS = "/".join(mode[0] for mode in MODES)


def percent(values: list[float]) -> str:
    """Shares as whole percents, three columns each; a dash where a value is NaN."""
    return " ".join("  -" if v != v else f"{100 * v:3.0f}" for v in values)


def numbers(values: list[float]) -> str:
    """Values with two decimals, four columns each; a dash where a value is NaN."""
    return " ".join("   -" if v != v else f"{v:4.2f}" for v in values)


def header(config, why: str, policy, environment: dict) -> None:
    """What will be trained, on what, and what protects this machine from what it runs."""
    trained, info = sum(p.numel() for p in policy.trainable_parameters()), policy.info
    base = f"4-bit nf4 and {info['dtype']}" if info["quantization"] == "nf4" else info["dtype"]
    lora = f"base in {base}, LoRA rank {config.lora_rank} on {config.lora_targets} ({trained:,} weights)"
    masters = ", stepped as fp32 masters" if policy.full and policy.full.rounds else ""
    prose(
        f"{config.model}: {f'all {trained:,} weights, in {base}{masters}' if policy.full else lora}"
        f", on {environment['gpu'] or 'the CPU'}; {why}"
    )
    count, steps = 3 * config.prompts_per_mode, counted(config.steps, "step")
    what = {
        "selfplay": f"recipe {config.recipe}: {steps} of {count} proposals, {config.answers} answers to "
        "each valid task",
        "rlvr": f"rlvr on {config.data}: {steps} of {count} tasks, {config.answers} answers to each",
        "sft": f"sft on {config.data}: {steps} of {count * config.answers} solutions",
    }[config.algorithm]
    if config.step_tokens:
        what += f", or as many as make {config.step_tokens} tokens"
    prose(f"{what}, learning rate {config.learning_rate:g}, seed {config.seed}")
    if arm := rules.describe(config):
        prose(f"arm: {arm}")
    box = environment["sandbox"]
    layers = [name for name in ("seccomp", "landlock", "limits", "uid") if box.get(name)]
    prose(f"sandbox: {box['workers']} workers, a fresh process for every program, under {', '.join(layers)}")


def refusals(proposals: list[Sample]) -> str:
    """What became of the proposals of a round: the share that is valid, the commonest refusal with an example."""
    reasons = Counter(sample.reason for sample in proposals if sample.task is None)
    valid = f"{100 * (len(proposals) - reasons.total()) / max(1, len(proposals)):.0f} % of {len(proposals)} valid"
    if not reasons:
        return valid
    reason, count = reasons.most_common(1)[0]
    one = next(sample for sample in proposals if sample.task is None and sample.reason == reason)
    shown = visible(" ".join(one.detail.split()) or " ".join(one.response.split()))
    example = shown[:60] + "..." * (len(shown) > 60)
    return f"{valid}; {count} of {reasons.total()} refused: {reason} ({example})"


def keeps_no_form(proposals: list[Sample], config: Config) -> str:
    """What to do about a model of whose first proposals hardly any is valid; "" where there is nothing to do."""
    valid = sum(sample.task is not None for sample in proposals) / max(1, len(proposals))
    if valid >= HARDLY_ANY:
        return ""
    first = ""  # what a flag may mend; a model that only rambles ends at the limit too
    if sum(sample.completion.finish_reason == "length" for sample in proposals) > len(proposals) / 2:
        first = f"Most end at --max-new-tokens {config.max_new_tokens}: give them more, unless they only ramble. "
    elif config.temperature > 1:
        first = f"Try --temperature 1 instead of {config.temperature:g}. "
    return (
        f"{100 * valid:.0f} % of {len(proposals)} proposals are valid after three rounds. {first}A model that does not "
        "keep their form needs a warm start (--algorithm sft on files of python -m azr.tasks make, then --adapter): "
        "docs/real_model.md"
    )


def what_next(config: Config, run: Path) -> None:
    """The commands that look at a finished run, ready to paste, with its own paths."""
    tiny = base_description(config.model) is not None
    # enough to tell base from trained in minutes on the embedded model's own tasks; a real model has real ones
    benchmark = "tiny --samples 8 --temperature 1,.4,0" if tiny else "humaneval+ --samples 32 --temperature 1,.6,0"
    how, path = f"--benchmark {benchmark} --out", shlex.quote(str(run))
    model, out = shlex.quote(config.model), Path(run) / "eval"
    base, tuned = (shlex.quote(str(out / name)) for name in ("base-frontier", "tuned-frontier"))
    for words in (
        f"python analyze.py report {path}",
        f"python eval_passk.py run --model {model} {how} {base}",
        f"python eval_passk.py run --adapter {path} {how} {tuned}",
        f"python eval_passk.py compare {base} {tuned}",
        f"python train_azr.py export {path} --out {shlex.quote(str(run) + '-merged')}",
    ):
        say(f"next: {words}")


class StepLines:
    """A line a step, with the time that is left and, at a price, what it has cost; now and then where time goes.

    Making one says what the columns are.
    """

    def __init__(self, steps: int, price_per_hour: float | None) -> None:
        self.steps, self.price = steps, price_per_hour
        self.seconds: list[float] = []
        self.recent: list[dict] = []
        prose(
            f"columns {INITIALS} ({', '.join(MODES)}): valid proposals in %, solved answers in %; H: entropy in nats "
            "a token, proposer and solver"
        )

    def show(self, metrics: dict) -> None:
        """Shows a step, and where they are due the held-out accuracy, the projection and where time goes."""
        step, elapsed = metrics["step"], metrics["time/elapsed"]
        self.seconds.append(metrics["time/step"])
        self.recent = [*self.recent, metrics][-TIMING_EVERY:]
        median = sorted(self.seconds[-15:])[len(self.seconds[-15:]) // 2]  # evaluations and the first step aside
        left, price = median * (self.steps - step), self.price
        # as wide as fits; a file gets all
        lines = step_lines(metrics, self.steps, left, price)
        say(next((line for line in lines if not console.is_terminal or len(line) < console.width), lines[-1]))
        if "held_out/deduction/accuracy" in metrics or "held_out/all/accuracy" in metrics:
            held_out(metrics, INDENT)
        moved = {role: metrics.get(f"{role}/all/probe_kl") for role in ("proposer", "solver")}
        if moved := ", ".join(f"{role} {kl:.4f}" for role, kl in moved.items() if kl is not None):
            say(f"{INDENT}KL from step 0, nats a token: {moved}")
        if len(self.seconds) == PROJECT_AFTER and left:
            whole, shares = elapsed + left, where_time_goes(self.recent).split(";")[0]
            cost = f", ${whole / 3600 * price:.2f} at ${price:g} an hour" if price else ""
            line = f"{INDENT}measured: {median:.1f} s a step ({shares}); all {self.steps} steps: {duration(whole)}"
            prose(f"{line}{cost}; start-up and evaluations come on top")
        if step % TIMING_EVERY == 0:
            cost = f", ${price * elapsed / 3600:.2f}" if price else ""
            prose(f"{INDENT}{where_time_goes(self.recent)}; {duration(elapsed)} of training{cost}")


def step_lines(metrics: dict, steps: int, left: float, price: float | None) -> tuple[str, str, str]:
    """A step in words: with the entropy of every mode, with its means, and for 80 columns."""

    def column(role: str, name: str) -> list[float]:
        modes = (*MODES, *["math"] * (f"{role}/math/{name}" in metrics))
        return [metrics.get(f"{role}/{mode}/{name}", float("nan")) for mode in modes]

    step, entropy = metrics["step"], [column(role, "entropy") for role in ("proposer", "solver")]
    rates = f"valid {percent(column('proposer', 'valid_rate'))} | solved {percent(column('solver', 'accuracy'))}"
    means = numbers([mean(value for value in row if value == value) for row in entropy])
    each = f"{numbers(entropy[0])} ; {numbers(entropy[1])}"
    to_go, cost = f"{duration(left)} left", f", ${price * metrics['time/elapsed'] / 3600:.2f}" if price else ""
    count = f"{step:{len(str(steps))}d}/{steps}"
    front, rest = f"step {count} {100 * step // steps:3d} % | {rates}", f"{metrics['time/step']:.1f} s, {to_go}{cost}"
    return f"{front} | H {each} | {rest}", f"{front} | H {means} | {rest}", f"{count} | {rates} | H {means} | {to_go}"


def where_time_goes(rows: list[dict]) -> str:
    """Shares of the phases, tokens a second of sampling and of the update, and the peak of memory, over steps."""
    total = sum(row["time/step"] for row in rows)
    shares, seconds = [], {}
    for name, phases in PHASES.items():
        seconds[name] = sum(row.get(f"time/{phase}", 0.0) for row in rows for phase in phases)
        tokens = {"sampling": "train/sampled_tokens", "update": "train/tokens"}.get(name)
        rate = sum(row.get(tokens) or 0 for row in rows) / seconds[name] if tokens and seconds[name] else 0
        if seconds[name] >= total / 200:
            shares.append(f"{name} {100 * seconds[name] / total:.0f} %" + (f" ({rate:,.0f} tokens/s)" if rate else ""))
    peaks = {"GPU": "memory/peak_gpu", "process": "memory/peak_process"}
    peak = [f"{name} {rows[-1][key]:.1f} GB" for name, key in peaks.items() if rows[-1].get(key)]
    return f"time: {', '.join(shares)}; peak memory: {', '.join(peak)}"


def sample_table(step: int, proposals: list[Sample], answers: list[Sample]) -> None:
    """One proposal a mode with what became of it and its first answer."""
    table = Table(title=f"samples of step {step}", title_justify="left", show_lines=True)
    for name in ("mode", "proposed", "verdict", "solved", "an answer"):
        table.add_column(name, overflow="fold")
    for mode in MODES:
        mine = [sample for sample in proposals if sample.mode == mode]
        chosen = next((s for s in mine if s.solve_rate is not None and 0 < s.solve_rate < 1), mine[0] if mine else None)
        if chosen is None:
            continue
        tried = [a for a in answers if chosen.task is not None and a.task.hash == chosen.task.hash]
        rate = "-" if chosen.solve_rate is None else f"{chosen.solve_rate:.2f}"
        answer = f"{brief(tried[0].response, 3)}\n-> {tried[0].reason}" if tried else "-"
        proposed = brief(chosen.response, 8)
        if mode == "induction" and chosen.task is not None:  # the program was given, the inputs are the proposal
            proposed = f"{chosen.task.program}\n{brief(chosen.response, 3)}"
        table.add_row(mode, Text(proposed), chosen.reason, rate, Text(answer))
    console.print(table)


def brief(response: str, lines: int) -> str:
    """A response without tags and fences, cut for the screen."""
    for mark in ("<answer>", "</answer>", "</think>"):
        response = response.replace(mark, "\n")
    lines_with_text = [line for line in response.splitlines() if line.strip() and not line.startswith("```")]
    shown = "\n".join(visible(line[:60]) for line in lines_with_text[:lines])
    return shown + ("\n..." if len(lines_with_text) > lines else "")


def visible(text: str) -> str:
    """With escapes for control characters: a model can write ones that clear the screen or change its colours."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.expandtabs(4))


def held_out(metrics: dict, before: str) -> None:
    """The line of what is solved greedily."""
    held = [metrics.get(f"held_out/{mode}/accuracy", float("nan")) for mode in MODES]
    say(f"{before}held-out greedy accuracy in % ({INITIALS}): {percent(held)}")


def before_after(greedy: Sequence[EvalResult], sampled: Sequence[EvalResult], ks: list[int]) -> None:
    """Base against trained on the held-out tasks, each pair or nothing: greedy accuracy, pass@k, with 95 % intervals
    paired over the tasks."""
    said = [f"{len(greedy[0].tasks)} greedily"] if greedy else []
    if sampled:
        samples, temperature = sampled[0].settings["samples"], sampled[0].settings["sampling"]["temperature"]
        said += [f"{len(sampled[0].tasks)} with {samples} answers at T {temperature:g}"]
    table = Table(title=f"held-out tasks: {', '.join(said)}; * without 0", title_justify="left")
    for name in ("mode", "what", "base", "trained", "difference [95 %]"):
        table.add_column(name, justify="left" if name in ("mode", "what") else "right")
    for mode in [*(greedy or sampled)[0].modes, None]:
        measured = [("greedy", greedy, 1)] if greedy else []
        measured += [(f"pass@{k}", sampled, k) for k in dict.fromkeys((1, ks[-1]))] if sampled else []
        rows = [
            (what, *(f"{result.pass_at_k(k, mode).mean:.3f}" for result in pair), signed(difference(*pair, k, mode)))
            for what, pair, k in measured
        ]
        if sampled:
            shares = (f"{result.share('correct_well_formed', 'well_formed', mode):.3f}" for result in sampled)
            rows.append(("@1, well-formed", *shares, signed(well_formed_difference(*sampled, mode))))
        for row in rows:
            table.add_row(mode or "all", *row, end_section=row is rows[-1])
    console.print(table)


def signed(gain) -> str:
    """The mean of a difference with its interval, and a star if the interval leaves 0 out."""
    mark = "*" if gain.excludes_zero else " "
    return f"{shown(gain, sign=True)} {mark}"


def training_table(first: list[dict], last: list[dict]) -> None:
    """Means over the first and the last steps of what was measured while training."""
    steps = "step" if len(first) == 1 else f"{len(first)} steps"
    table = Table(title=f"while training: mean of the first and the last {steps}", title_justify="left")
    names = {key for row in [*first, *last] for key, value in row.items() if value is not None}
    modes = [mode for mode in (*MODES, "math") if any(f"/{mode}/" in name for name in names)]
    for name in ("", *modes):
        table.add_column(name, justify="left" if not name else "right")
    rows = [
        ("valid proposals", "proposer/{}/valid_rate"),
        ("solve rate of own proposals", "proposer/{}/solve_rate"),
        ("learnable (0 < r < 1)", "proposer/{}/learnable_rate"),
        ("duplicates", "proposer/{}/duplicate_rate"),
        ("well-formed answers", "solver/{}/well_formed_rate"),
        ("proposer entropy", "proposer/{}/entropy"),
        ("solver entropy", "solver/{}/entropy"),
        ("answer tokens", "solver/{}/response_tokens"),
    ]
    for title, key in rows:
        if not any(key.format(mode) in names for mode in modes):
            continue  # a run without proposers, or one that samples nothing
        cells = [f"{average(first, key.format(mode))} -> {average(last, key.format(mode))}" for mode in modes]
        table.add_row(title, *cells)
    console.print(table)


def average(rows: list[dict], key: str) -> str:
    """The mean of a metric over the rows that have it, with two decimals; a dash if none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{sum(values) / len(values):.2f}" if values else "-"

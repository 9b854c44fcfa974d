"""One page about one or more runs: curves, pass@k, sample tasks, warnings in words, what the numbers do not show.

    python analyze.py report runs/tiny-0                                writes runs/tiny-0/report.html
    python analyze.py report runs/tiny-0 runs/tiny-1 --out comparison   writes comparison/report.html and its plots

A single HTML file with inline plots: no network, no script. It works on a run that is still going. What other
instruments have left in RUN/eval (difficulty, forgetting, the probe's entropy, sparsity.json) is included; what is not
there is named with the command that makes it. No model is loaded.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from azr import drawing
from azr.analysis import difficulty, dynamics, entropy, figures, forgetting, html
from azr.analysis.figures import STEP
from azr.analysis.health import Health
from azr.analysis.reader import (
    MODES,
    ROLES,
    TREND_STEPS,
    Digest,
    RunData,
    ends,
    mean_row,
    read_run,
    read_samples,
    same_model,
)
from azr.console import warn
from azr.evals.held_out import EvalResult, difference, plot_pass_at_k
from azr.fits import difference_of_means, over_runs
from azr.jsonl import read_object, replacing, tolerant_lines
from azr.palette import style
from azr.passk import powers_of_two, share_interval, shown

STAGES_SHOWN = 4
CONFIG_SHOWN = "model seed steps recipe algorithm learning_rate prompts_per_mode answers lora_rank quantization".split()
# What other instruments leave in a run -> the file, and the arguments of analyze.py that make it.
EXTRAS = {
    "difficulty": ("eval/difficulty_result.json", "difficulty {run}"),
    "probe": ("eval/probe_entropy.json", "entropy --run {run}"),
    "forgetting": ("eval/forgetting.json", "forgetting {run}"),
    "sparsity": (
        "eval/sparsity.json",
        "sparsity --base {model} --adapter {run} --json {run}/eval/sparsity.json",
    ),
}
CAPTIONS = {
    "validity": (
        "Why proposals were refused",
        "Stacked, mean of a tenth of the steps; the other proposals were valid.",
    ),
    "rewards": ("Rewards", "Faint: every step, strong: running mean."),
    "time": ("Time", "Seconds of every step, stacked; phases of less than a thousandth of them are left out."),
}
RATES = {  # metric -> title, and what is plotted
    "valid_rate": ("valid proposals", "share of proposals"),
    "solve_rate": ("solve rate of its tasks", "share of right answers"),
    "learnable_rate": ("solved sometimes but not always", "share of valid proposals"),
}
PROGRAM_LINES = 16  # of a sample that are shown
SIZES = {
    "U1_rms": "U1, RMS of the change",
    "U1_rel_fro": "U1, relative to the weights",
    "S1": "S1, unchanged in bf16",
    "S2": "S2, within 1e-5",
    "R1_effective_rank": "R1, effective rank",
}


@dataclass
class Entry:
    """A run and all that is known about it."""

    run: RunData
    digest: Digest | None
    dynamics: dict | None
    greedy: tuple[EvalResult, EvalResult, int] | None  # base, trained, its step: one greedy answer a task
    passes: tuple[EvalResult, EvalResult, int] | None  # many answers a task
    extra: dict  # what other instruments left: a key of EXTRAS -> what its file holds
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    @property
    def ks(self) -> list[int]:
        """The k of pass@k that are named: 1 and the largest power of two up to the answers a task has."""
        return list(dict.fromkeys((1, powers_of_two(self.passes[0].settings["samples"])[-1])))


# ------------------------------------------------------------------------------------------------------- reading


def read_entry(path: str) -> Entry:
    """Everything of a run; what is damaged is left out with a warning. RunError: no run, or no step yet."""
    run = read_run(path)
    shown_steps = tuple(int(s) for s in np.linspace(run.steps[0], run.steps[-1], STAGES_SHOWN).round())
    try:
        digest = read_samples(run, shown_steps)
        changes = dynamics.dynamics(run, digest)
    except ValueError as error:
        run.notes.append(f"{error}; what is made of samples is left out")
        digest = changes = None
    extra = {name: optional(run, place) for name, (place, _) in EXTRAS.items()}
    extra = {name: value for name, value in extra.items() if value}
    entry = Entry(run, digest, changes, before_and_after(run, "greedy_"), before_and_after(run, ""), extra)
    entry.warnings, entry.facts = warnings_of(entry), facts_of(entry)
    return entry


def optional(run: RunData, place: str) -> dict | None:
    """The JSON object in a file of the run; None, and if it is damaged a note, if there is none."""
    try:
        return read_object(run.path / place) if (run.path / place).is_file() else None
    except ValueError as error:
        run.notes.append(f"{error}: left out")
        return None


def answers_in(run: RunData, name: str) -> EvalResult | None:
    """RUN/eval/NAME.json; None, and if it is damaged a note, if there is none."""
    stored = optional(run, f"eval/{name}.json")
    try:
        return EvalResult.from_json(stored) if stored else None
    except ValueError as error:
        run.notes.append(f"eval/{name}.json: left out ({error})")
        return None


def before_and_after(run: RunData, kind: str) -> tuple[EvalResult, EvalResult, int] | None:
    """KINDbase.json and the newest KINDstep_N.json of RUN/eval, if they are comparable."""
    found = [re.fullmatch(rf"{kind}step_(\d+)", path.stem) for path in (run.path / "eval").glob("*.json")]
    if not (steps := [int(match[1]) for match in found if match]):
        return None
    base, newest = (answers_in(run, f"{kind}{name}") for name in ("base", f"step_{max(steps)}"))
    try:
        if base and newest:
            difference(base, newest)
    except ValueError as error:
        run.notes.append(f"eval/: before and after are left out ({error})")
        return None
    return (base, newest, max(steps)) if base and newest else None


# ------------------------------------------------------------------------------------------------------- words


def warnings_of(entry: Entry) -> list[str]:
    """What a reader must know before believing a curve: what is missing or damaged, and the run's own warnings."""
    run, lines = entry.run, []
    if not run.finished:
        lines = [f"Step {run.steps[-1]} of {run.config.get('steps')}: the run goes on or was stopped."]
    health = Health(run.config)
    for row in run.rows:
        if row["step"] > 0:
            health.add(row)
    notes = run.notes + (entry.digest.notes if entry.digest else []) + health.warnings()
    return lines + [note[0].upper() + note[1:] for note in notes]


def facts_of(entry: Entry) -> list[str]:
    """What happened, in sentences with n and intervals."""
    run, sentences = entry.run, []
    measured = [(entry.greedy, 1, "Greedy accuracy")] if entry.greedy else []
    measured += [(entry.passes, k, f"pass@{k}") for k in (entry.ks if entry.passes else ())]
    for (base, trained, step), k, what in measured:
        before, after, gain = base.pass_at_k(k), trained.pass_at_k(k), difference(base, trained, k)
        sentences.append(
            f"{what} on {len(base.tasks)} held-out tasks: {before.mean:.3f} before, {after.mean:.3f} after "
            f"{step} steps, difference {shown(gain, sign=True)}."
        )
    for role in ROLES:
        if pair := mean_ends(run, role):
            first, last = pair
            sentences.append(
                f"Entropy of the {role}, mean of the modes, nats per token: {first.mean():.2f} in the first tenth of "
                f"the steps, {last.mean():.2f} in the last, difference {shown(difference_of_means(first, last))} "
                f"(n {len(first)}, {len(last)} steps)."
            )
    moved = {role: rows for role in ROLES if (rows := dynamics.probe_kl(run).get(f"{role}/all"))}
    if moved:
        last = ", ".join(f"{role} {rows[max(rows)]:.4f}" for role, rows in moved.items())
        step = max(max(rows) for rows in moved.values())
        sentences.append(f"KL from the policy of step 0 to that of step {step}, on its text, nats per token: {last}.")
    if len(run.steps) < TREND_STEPS:
        sentences.append(f"{len(run.steps)} steps are too few to say how entropy changed: that takes {TREND_STEPS}.")
    if stored := entry.extra.get("forgetting"):
        for outcome, lost in forgetting.drops(forgetting.by_step(stored)).items():
            step, row = max(lost.items())
            sentences.append(
                f"{forgetting.OUTCOMES[outcome].capitalize()}, greedy, at step {step}: {shown(row)} of "
                f"{np.mean(stored['base'][outcome]):.3f} before (n {row['n']})."
            )
    return sentences + entry.extra.get("difficulty", {}).get("verdict", [])


def mean_ends(run: RunData, role: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The entropy of a role, mean of its modes, in the first and in the last tenth of the steps; None without any, and
    where the steps are too few to tell a trend."""
    if len(run.steps) < TREND_STEPS:
        return None
    return ends(np.mean([run.column(f"{role}/{mode}/entropy") for mode in MODES], axis=0))


CAVEATS = [
    "Brackets are 95 % intervals over tasks (pass@k, difficulty), steps (entropies) or responses (the probe). None of "
    "them is about another training seed: only several runs are.",
    "Entropy on its own samples changes with the policy and with the text it writes. The frozen probe keeps the text "
    "fixed, but it is text of the untrained model, which the trained one might never write.",
    "The solve rate logged in training mixes harder tasks with a weaker solver. Only fixed solvers tell the two apart, "
    "and only the base was trained on none of the tasks.",
    "Held-out tasks look like the training tasks. They say nothing about other abilities; see forgetting.",
    "A base in 4 bits has a higher entropy than the same base in bf16: measure both with analyze.py entropy "
    "--quantization nf4 and none, on the same text.",
    "Sparsity is mostly a reading of the size of the update: compare it at matched size.",
]


# ------------------------------------------------------------------------------------------------------- the page


def summary_table(entries: list[Entry]) -> str:
    """A row per setting, a column per run, so that a narrow screen shows it whole; the last rows are what was done."""
    columns = []
    for entry in entries:
        run, seconds = entry.run, entry.run.column("time/elapsed")
        done = {"steps done": int(run.steps[-1])}
        done["hours"] = f"{np.nanmax(seconds) / 3600:.2f}" if np.isfinite(seconds).any() else "?"
        done["samples"] = f"{entry.digest.lines:,}" if entry.digest else "?"
        columns.append({key.replace("_", " "): run.config.get(key, "") for key in CONFIG_SHOWN} | done)
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    rows = [row for row in rows if any(cell != "" for cell in row[1:])]
    return html.table(["setting", *(entry.run.name for entry in entries)], rows)


def pass_table(entry: Entry) -> str:
    """pass@k of the base and of the last evaluated step, by mode and k, with the paired difference."""
    base, trained, step = entry.passes
    rows = []
    for mode in [*base.modes, None]:
        for k in sorted(entry.ks):
            gain = difference(base, trained, k, mode)
            verdict = "cannot tell" if not gain.excludes_zero else "better" if gain.mean > 0 else "worse"
            cells = [str(base.pass_at_k(k, mode)), str(trained.pass_at_k(k, mode)), shown(gain, sign=True), verdict]
            rows.append([mode or "all", len(base.of(mode)), k, *cells])
    return html.table(["mode", "tasks", "k", "base", f"step {step}", "difference, paired", f"step {step} is"], rows)


def sample_tasks(entry: Entry) -> str:
    """Three modes per stage."""
    parts = []
    for step in sorted({step for step, _ in entry.digest.examples}):
        parts.append(f"<h3>step {step}</h3><div class=tasks>")
        for mode in MODES:
            parts.append(f"<div>{one_task(entry.digest.examples.get((step, mode)), mode)}</div>")
        parts.append("</div>")
    return "".join(parts)


def one_task(example, mode: str) -> str:
    """A proposal: what the solver is asked, the expected answer, its first answer; example: as in `Digest.examples`, or
    None."""
    if example is None:
        return html.paragraph(f"{mode}: none in this step", "quiet")
    _, row, answer = example
    task, rate = row["task"], row["solve_rate"]
    if not task:
        why = f"<h4>{mode}: refused, {html.escape(row['reason'].replace('_', ' '))}</h4>"
        return why + html.code(row["response"], PROGRAM_LINES)
    body = f"<h4>{mode}: {f'solved {100 * rate:.0f} % of the time' if rate is not None else 'valid'}</h4>"
    parts = {"program": task["program"]}
    if mode == "induction":
        pairs = "\n".join(f"f({a}) == {b}" for a, b in task["visible"])
        parts = {"asked, a program for": f"# {task['message']}\n{pairs}"}
        parts["expected, or one that does the same"] = task["program"]
    elif mode == "deduction":
        parts |= {"asked, the output": f"f({task['input']}) == ?", "expected": task["output"]}
    else:
        parts |= {"asked, an input": f"f(?) == {task['output']}", "expected, or another that fits": task["input"]}
    if answer:
        right = "right" if answer["reward"].get("correct") else answer["reason"].replace("_", " ")
        parts[f"an answer ({right})"] = answer["response"]
    return body + "".join(
        html.paragraph(f"{name}:", "quiet") + html.code(t, PROGRAM_LINES) for name, t in parts.items()
    )


def across_runs(entries: list[Entry]) -> str:
    """What changed in every run, and the mean over runs with an interval across training seeds."""
    columns: dict[str, list[float]] = {}
    for entry in entries:
        for k in entry.ks if entry.passes else ():
            gain = difference(entry.passes[0], entry.passes[1], k).mean
            columns.setdefault(f"pass@{k}, after minus before", []).append(gain)
        if entry.greedy:
            columns.setdefault("greedy accuracy, likewise", []).append(difference(*entry.greedy[:2], 1).mean)
        for role in ROLES:
            if pair := mean_ends(entry.run, role):
                change = pair[1].mean() - pair[0].mean()
                columns.setdefault(f"{role} entropy, nats per token, last minus first tenth", []).append(change)
    rows = []
    for name, values in columns.items():
        if len(values) == len(entries):
            rows.append([name, *(f"{value:+.3f}" for value in values), shown(over_runs(values)), len(values)])
    if not rows:
        return html.paragraph("Nothing was measured in all of them that could be compared.")
    text = "The interval is Student's t over the runs: about other training seeds, if only the seed differs."
    heads = ["change", *(e.run.name for e in entries), "mean over runs", "runs"]
    return html.table(heads, rows) + html.paragraph(text, "quiet")


def run_sections(entry: Entry, drawn: dict) -> list[tuple[str, str]]:
    """The details of one run, (title, HTML); adds their figures to `drawn`."""
    parts, name = [], entry.run.name
    for title, figure in dynamics.plots(entry.run, entry.dynamics).items() if entry.dynamics else ():
        heading, caption = CAPTIONS[title]
        inside = picture(drawn, f"{name}_{title}", figure, heading) + html.paragraph(caption, "quiet")
        parts.append((heading, inside))
    if stored := entry.extra.get("difficulty"):
        alt, figure = "fixed solvers on the proposals of each stage", difficulty.draw(name, stored)
        inside = html.bullets(stored["verdict"]) + picture(drawn, f"{name}_difficulty", figure, alt)
        parts.append(("Harder tasks, or a weaker solver?", inside))
    if row := entry.extra.get("sparsity", {}).get("adapted"):
        cells = [[text, f"{row[key]:.4g}"] for key, text in SIZES.items() if isinstance(row.get(key), (int, float))]
        parts.append(("The update", html.table(["what", "value, adapted matrices"], cells)))
    if entry.digest and entry.digest.examples:
        text = "One per mode: the first of the step that was neither always nor never solved, else the first valid one."
        parts.append(("Tasks it proposed, by stage", html.paragraph(text, "quiet") + sample_tasks(entry)))
    return parts


def picture(drawn: dict[str, bytes], name: str, figure, alt: str) -> str:
    """The HTML of a figure, which is drawn once, for the page and for the file of that name."""
    drawn[name] = drawing.png(figure)
    return html.image(drawn[name], alt)


def build(entries: list[Entry]) -> tuple[str, dict]:
    """(HTML, figures by name)."""
    names, drawn = ", ".join(entry.run.name for entry in entries), {}
    commit = (optional(entries[0].run, "environment.json") or {}).get("git")
    made = f"Written {time.strftime('%Y-%m-%d %H:%M')}{f', code at commit {commit[:10]}' if commit else ''}."
    top = html.paragraph(f"{made} Numbers in brackets are 95 % intervals.", "quiet") + summary_table(entries)
    sections = [("Across the runs", across_runs(entries))] if len(entries) > 1 else []
    for entry in entries:
        lines = list(entry.warnings)
        if len(entries) == 1:
            lines.append("One run, one seed: what follows may be luck. Give several runs to see.")
        sections.append((f"{entry.run.name} in short", html.bullets(entry.facts) + "".join(map(html.warning, lines))))
    sections += curves(entries, drawn)
    for entry in entries:
        parts = run_sections(entry, drawn)
        if len(entries) > 1:
            inside = "".join(f"<h3>{html.escape(title)}</h3>{part}" for title, part in parts)
            parts = [(f"{entry.run.name} in detail", html.details("plots and tasks", inside))]
        sections += parts
    sections.append(("What these numbers do and do not show", html.bullets(CAVEATS)))
    missing = [
        f"python analyze.py {command.format(run=entry.run.path, model=entry.run.config['model'])}"
        for entry in entries
        for name, (_, command) in EXTRAS.items()
        if name not in entry.extra
    ]
    if missing:
        sections.append(("Not measured yet", "".join(map(html.code, missing))))
    inside = "".join(html.paragraph(e.run.name) + html.code(json.dumps(e.run.config, indent=1)) for e in entries)
    sections.append(("Settings", html.details("config.json", inside)))
    return html.page(f"Self-play: {names}", top, sections), drawn


def curves(entries: list[Entry], drawn: dict) -> list[tuple[str, str]]:
    """(title, HTML) of entropy and held-out accuracy, of pass@k and the proposer; adds their figures to `drawn`."""
    runs = [entry.run for entry in entries]
    text = (
        "Exact token entropy of the training samples; faint: every step, strong: running mean. Bars: 95 % over tasks."
    )
    inside = picture(drawn, "overview", draw_overview(runs), "entropy, held-out accuracy")
    inside += html.paragraph(text, "quiet")
    probes = [entry.extra.get("probe", {}).get("probe") for entry in entries]
    moved = [dynamics.probe_kl(run) for run in runs]
    if panels := [panel for panel in ((entropy.draw_probe, probes), (draw_probe_kl, moved)) if any(panel[1])]:
        figure, axes = drawing.figure(len(panels), 5.2, 3.2)
        for one, (draw, rows) in zip(axes, panels):
            draw(one, runs, rows)
        drawing.legend(figure, axes)
        inside += picture(drawn, "probe", figure, "entropy on the frozen probe, and KL from the policy of step 0")
    sections = [("Entropy and held-out accuracy", inside)]
    for entry in (entry for entry in entries if entry.passes):
        base, trained, step = entry.passes
        figure = plot_pass_at_k(base, trained, f"step {step}")
        inside = picture(drawn, f"{entry.run.name}_pass_at_k", figure, "pass@k") + pass_table(entry)
        sections.append((f"pass@k of {entry.run.name}, before and after", inside))
    if any("proposer" in run.roles for run in runs):
        alt = "valid, solved and learnable proposals"
        sections.append(("The proposer", picture(drawn, "proposer", draw_proposer(runs), alt)))
    return sections


# ------------------------------------------------------------------------------------------------------- plots


def draw_overview(runs: list[RunData]):
    """Entropy of the roles there are and held-out accuracy; by mode for one run, else by run."""
    roles = [role for role in ROLES if any(role in run.roles for run in runs)]
    drawn, axes = drawing.figure(len(roles) + 1, 3.7, 3.1)
    entropy.draw_training(axes[:-1], runs, roles)
    counts = set()
    for i, (run, own) in enumerate(zip(runs, figures.looks(runs))):
        for j, mode in enumerate(MODES if len(runs) == 1 else ("all",)):
            steps, rows = held_out(run, mode)
            if rows:
                name, shape = (mode, drawing.look(style(mode))) if len(runs) == 1 else (run.name, own)
                drawing.points(axes[-1], steps, rows, name, shape, shift=0.6 * (i + j))
                counts.add(rows[0]["n"])
    axes[-1].set_xlim(left=0)
    axes[-1].set_ylim(bottom=0)
    tasks = " to ".join(str(n) for n in sorted({min(counts), max(counts)})) if all(counts) and counts else ""
    per_mode = " per mode" if len(runs) == 1 else ""
    title = f"held-out accuracy, greedy{f', {tasks} tasks{per_mode}' if tasks else ''}"
    drawing.label(axes[-1], title, STEP, "share solved")
    drawing.legend(drawn, axes)
    return drawn


def draw_probe_kl(axes, runs: list[RunData], moved: list[dict]) -> None:
    """How far both roles are from the policy of step 0, from 0 there; moved: of `dynamics.probe_kl`."""
    for run, rows, own in zip(runs, moved, figures.looks(runs)):
        for role in (role for role in ROLES if f"{role}/all" in rows):
            steps = {0: 0.0} | rows[f"{role}/all"]
            axes.plot(steps.keys(), steps.values(), **entropy.look_of_role(role, run, own, runs))
    axes.set_ylim(bottom=0)
    drawing.label(axes, "KL from the policy of step 0, on the frozen probe", STEP, "nats per token")


def held_out(run: RunData, mode: str) -> tuple[list[int], list[dict]]:
    """The steps with a greedy held-out accuracy, and that accuracy with its interval over tasks (none if the tasks'
    file is missing, and n is 0)."""
    values, path = run.column(f"held_out/{mode}/accuracy"), run.path / "eval" / "held_out.jsonl"
    tasks = tolerant_lines(path, []) if path.is_file() else ()
    n = sum(mode in ("all", row.get("mode")) for row in tasks)
    steps, rows = [], []
    if before := answers_in(run, "greedy_base"):
        right = before.column("correct", None if mode == "all" else mode)
        steps, rows = ([0], [mean_row(right, share_interval)]) if len(right) else ([], [])
    for step, value in zip(run.steps.tolist(), values.tolist()):
        if np.isfinite(value):
            # each task was right or wrong
            right = round(value * n)
            answers = np.repeat([1.0, 0.0], [right, n - right])
            steps.append(step)
            rows.append(mean_row(answers, share_interval) or {"mean": value, "low": None, "high": None, "n": 0})
    return steps, rows


def draw_proposer(runs: list[RunData]):
    """Valid, solved and learnable shares by step."""
    drawn, axes = drawing.figure(3, 3.7, 2.9)
    for one, (key, (title, what)) in zip(axes, RATES.items()):
        figures.curves(one, runs, f"proposer/{{}}/{key}")
        one.set_ylim(0, 1)
        drawing.label(one, title, STEP, figures.of_modes(runs, what))
    drawing.legend(drawn, axes)
    return drawn


# ------------------------------------------------------------------------------------------------------- flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `analyze.py report`."""
    parser.add_argument("run", nargs="+", metavar="RUN", help="run directories of one model; a running run is fine")
    figures.add_output_arguments(parser)


def main(args) -> int:
    """Returns the exit code; ValueError or OSError, in one line, for bad input (analyze.py prints it)."""
    same_model([read_run(path) for path in args.run])
    entries = [read_entry(path) for path in args.run]
    body, drawn = build(entries)
    out = Path(args.out) if args.out else entries[0].run.path if len(entries) == 1 else Path(".")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "report.html") as file:
        file.write(body.encode())
    for entry in entries:
        print(f"{entry.run.path}:")
        for line in entry.facts:
            print(f"  {line}")
        for line in entry.warnings:
            warn(line)
    result = {str(e.run.path): {"facts": e.facts, "warnings": e.warnings, "dynamics": e.dynamics} for e in entries}
    figures.write_outputs(args, "report", result, drawn)
    print(f"\nreport: {out / 'report.html'} ({len(body) / 1e6:.1f} MB, open it in a browser)")
    return 0

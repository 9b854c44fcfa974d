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
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from azr.analysis import dynamics, entropy, figures, html, report_plots
from azr.analysis.figures import shown
from azr.analysis.health import Health
from azr.analysis.reader import MODES, ROLES, Digest, RunData, read_run, read_samples, same_model
from azr.console import warn
from azr.evals.held_out import EvalResult, difference
from azr.fits import difference_of_means, over_runs
from azr.jsonl import replacing
from azr.passk import powers_of_two

STAGES_SHOWN = 4
CONFIG_SHOWN = "model seed steps recipe algorithm learning_rate prompts_per_mode answers lora_rank quantization".split()


@dataclass
class Entry:
    """A run and all that is known about it."""

    run: RunData
    digest: Digest | None
    dynamics: dict | None
    passes: tuple[EvalResult, EvalResult, int] | None  # base, trained, its step
    extra: dict = field(default_factory=dict)  # what other instruments left in RUN/eval
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


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
    entry = Entry(run, digest, changes, _passes(run), _extra(run))
    entry.warnings, entry.facts = warnings_of(entry), facts_of(entry)
    return entry


def _passes(run: RunData) -> tuple[EvalResult, EvalResult, int] | None:
    """base.json and the newest step_N.json of RUN/eval, if they are comparable."""
    steps = [
        (int(m[1]), p) for p in (run.path / "eval").glob("step_*.json") if (m := re.fullmatch(r"step_(\d+)", p.stem))
    ]
    base = run.path / "eval" / "base.json"
    if not steps or not base.is_file():
        return None
    step, newest = max(steps)
    try:
        results = [EvalResult.from_json(json.loads(p.read_text())) for p in (base, newest)]
        difference(*results)
        return results[0], results[1], step
    except (ValueError, KeyError, TypeError, OSError) as error:
        run.notes.append(f"eval/: pass@k is left out ({error})")
        return None


def _extra(run: RunData) -> dict:
    results = {}
    for name, places in {
        "difficulty": ["eval/difficulty_result.json"],
        "forgetting": ["eval/forgetting.json"],
        "probe": ["eval/probe_entropy.json"],
        "sparsity": ["eval/sparsity.json", "plots/sparsity.json", "sparsity.json"],
    }.items():
        for place in places:
            if (run.path / place).is_file():
                try:
                    results[name] = json.loads((run.path / place).read_text())
                    break
                except (ValueError, OSError) as error:
                    run.notes.append(f"{place} cannot be read ({error}): left out")
    return results


# ------------------------------------------------------------------------------------------------------- words


def per_cent(value: float) -> str:
    """A share, as 0 to 100 %."""
    return f"{100 * value:.0f} %"


def warnings_of(entry: Entry) -> list[str]:
    """What a reader must know before believing a curve: what is missing or damaged, and the run's own warnings."""
    run, lines = entry.run, []
    if not run.finished:
        lines.append(
            f"Step {run.steps[-1]} of {run.config.get('steps')}: the run goes on or was stopped. All below is of the "
            "steps so far."
        )
    health = Health(run.config)
    for row in run.rows:
        if row["step"] > 0:
            health.add(row)
    notes = run.notes + (entry.digest.notes if entry.digest else []) + health.warnings()
    return lines + [note[0].upper() + note[1:] for note in notes]


def facts_of(entry: Entry) -> list[str]:
    """What happened, in sentences with n and intervals."""
    run, sentences = entry.run, []
    if entry.passes:
        base, trained, step = entry.passes
        samples = base.settings["samples"]
        n = len(base.tasks)
        for k in dict.fromkeys((1, powers_of_two(samples)[-1])):
            before, after, gain = base.pass_at_k(k), trained.pass_at_k(k), difference(base, trained, k)
            sentences.append(
                f"pass@{k} on {n} held-out tasks: {before.mean:.3f} before, {after.mean:.3f} after {step} "
                f"steps, difference {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]."
            )
    tenth = max(1, len(run.steps) // 10)
    for role in ROLES:
        values = np.mean([run.column(f"{role}/{mode}/entropy") for mode in MODES], axis=0)
        first, last = (part[np.isfinite(part)] for part in (values[:tenth], values[-tenth:]))
        if len(first) and len(last):
            sentences.append(
                f"Entropy of the {role}, mean of the modes, nats a token: {first.mean():.2f} in the first tenth of the "
                f"steps, {last.mean():.2f} in the last, difference {shown(difference_of_means(first, last))} "
                f"(n {len(first)}, {len(last)} steps)."
            )
    if "forgetting" in entry.extra:
        from azr.analysis import forgetting

        for outcome, lost in forgetting.drops(forgetting_of(entry)).items():
            step, row = list(lost.items())[-1]
            before = np.mean(entry.extra["forgetting"]["base"][outcome])
            sentences.append(
                f"{forgetting.OUTCOMES[outcome].capitalize()}, greedy, at step {step}: {shown(row)} of "
                f"{before:.3f} before (n {row['n']})."
            )
    sentences += entry.extra.get("difficulty", {}).get("verdict", [])
    return sentences


def ends_table(entry: Entry) -> str:
    """First and last tenth of the steps, a row a quantity and mode."""
    rows, summary, changes = [], entropy.training_summary(entry.run), entry.dynamics
    for role in ROLES:
        for mode in MODES:
            if row := summary.get(f"{role}/{mode}"):
                n = f"{row['first']['n']}, {row['last']['n']} steps"
                rows.append([f"{role} entropy, nats a token", mode, shown(row["first"], 2), shown(row["last"], 2), n])
    for key, title in (
        ("ok", "valid proposals"),
        ("mean", "solve rate of own tasks"),
        ("learnable", "0 < solve rate < 1"),
    ):
        for mode in MODES if changes else ():
            if key == "ok":
                windows = [row for row in changes["validity"].get(f"proposer/{mode}", []) if row]
                pair = [windows[0], windows[-1]] if windows else []
            else:
                pair = [row for end in ("first", "last") if (row := changes["solve_rate"].get(f"{mode}/{end}"))]
            if len(pair) == 2:
                n = f"{pair[0]['n']}, {pair[1]['n']} proposals"
                rows.append([title, mode, shown(pair[0][key], 2), shown(pair[1][key], 2), n])
    return html.table(["", "mode", "first tenth of the steps", "last tenth", "n"], rows)


CAVEATS = [
    "Brackets are 95 % intervals. Those of pass@k and difficulty are over tasks, those of entropies over steps, those "
    "of the probe over responses. None of them is about another training seed: only several runs are.",
    "Entropy on its own samples changes with the policy and with the text it writes. The frozen probe keeps the text "
    "fixed, but it is text of the untrained model, which the trained one might never write.",
    "The solve rate logged in training mixes harder tasks with a weaker solver. Only fixed solvers tell the two apart, "
    "and only the base was trained on none of the tasks.",
    "Held-out tasks look like the training tasks. They say nothing about other abilities; see forgetting.",
    "A base in 4 bits has a higher entropy than the same base in bf16: compare entropies with published bf16 runs only "
    "after subtracting the offset (analyze.py entropy --offset).",
    "Sparsity is mostly a reading of the size of the update: compare it at matched size.",
    "Correlations over the checkpoints of one run are of few points that follow each other.",
]


# ------------------------------------------------------------------------------------------------------- the page


def summary_table(entries: list[Entry]) -> str:
    """A row a run: settings, steps, hours."""
    heads = [
        "run",
        *[key.replace("_", " ") for key in CONFIG_SHOWN if any(key in e.run.config for e in entries)],
        "steps done",
        "hours",
        "samples",
    ]
    rows = []
    for entry in entries:
        run = entry.run
        seconds = run.column("time/elapsed")
        hours = f"{np.nanmax(seconds) / 3600:.2f}" if np.isfinite(seconds).any() else "?"
        cells = [run.config.get(key, "") for key in CONFIG_SHOWN if any(key in e.run.config for e in entries)]
        rows.append([run.name, *cells, int(run.steps[-1]), hours, f"{entry.digest.lines:,}" if entry.digest else "?"])
    return html.table(heads, rows)


def pass_table(entry: Entry) -> str:
    """pass@k of the base and of the last evaluated step, by mode, with the paired difference."""
    base, trained, step = entry.passes
    rows = []
    for mode in [*base.modes, None]:
        for k in dict.fromkeys((1, 8, powers_of_two(base.settings["samples"])[-1])):
            if k <= base.settings["samples"]:
                gain = difference(base, trained, k, mode)
                cells = [str(base.pass_at_k(k, mode)), str(trained.pass_at_k(k, mode))]
                mark = "" if gain.excludes_zero else "not shown"
                change = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
                rows.append([mode or "all", len(base.of(mode)), f"@{k}", *cells, change, mark])
    heads = ["mode", "tasks", "pass", "base", f"step {step}", "difference, paired", ""]
    return html.table(heads, rows)


def sample_tasks(entry: Entry) -> str:
    """A row of three modes a stage."""
    parts = []
    for step in sorted({step for step, _ in entry.digest.examples}):
        parts.append(f"<h3>step {step}</h3><div class=tasks>")
        for mode in MODES:
            parts.append(f"<div>{one_task(entry.digest.examples.get((step, mode)), mode)}</div>")
        parts.append("</div>")
    return "".join(parts)


def one_task(example, mode: str) -> str:
    """A proposal with its first answer; example: (rank, row of samples.jsonl, its answers), or None."""
    if example is None:
        return html.paragraph(f"{mode}: none in this step", "quiet")
    _, row, answers = example
    task, rate = row["task"], row["solve_rate"]
    outcome = (
        row["reason"] if not task else ("not measured" if rate is None else f"solved {per_cent(rate)} of the time")
    )
    body = f"<h4>{mode}: {outcome}</h4>"
    if not task:
        return body + html.code(cleaned(row["response"]))
    body += html.code(task["program"])
    if mode == "induction":
        body += html.code(task["message"]) + html.code("\n".join(f"{a} -> {b}" for a, b in task["visible"][:3]))
    else:
        body += html.code(f"f({task['input']}) = {task['output']}")
    for answer in answers[:1]:
        right = "right" if answer["reward"].get("correct") else answer["reason"]
        body += html.paragraph(f"an answer ({right}):", "quiet") + html.code(cleaned(answer["response"]), 8)
    return body


def cleaned(response: str) -> str:
    """A response without tags and fences: thoughts, then the answer."""
    thoughts, _, answer = response.partition("</think>")
    if not answer:
        thoughts, answer = "", response
    for mark in ("<think>", "<answer>", "</answer>"):
        answer = answer.replace(mark, "\n")
    lines = [line for line in answer.splitlines() if line.strip() and not line.lstrip().startswith("```")]
    thought = [f"(thinks: {thoughts.strip()[:200]})"] if thoughts.strip() else []
    return "\n".join(thought + lines) or "(empty)"


def forgetting_of(entry: Entry) -> dict:
    """RUN/eval/forgetting.json with steps as numbers, in order."""
    stored = entry.extra["forgetting"]
    rows = sorted((int(step), row) for step, row in stored["checkpoints"].items())
    return {"base": stored["base"], "checkpoints": dict(rows)}


def across_runs(entries: list[Entry]) -> str:
    """What changed in every run, and the mean over runs with an interval across training seeds."""
    columns: dict[str, list[float]] = {}
    for entry in entries:
        if entry.passes:
            for k in dict.fromkeys((1, powers_of_two(entry.passes[0].settings["samples"])[-1])):
                gain = difference(entry.passes[0], entry.passes[1], k).mean
                columns.setdefault(f"pass@{k}, after minus before", []).append(gain)
        summary = entropy.training_summary(entry.run)
        for role in ROLES:
            rows = [summary[f"{role}/{m}"] for m in MODES if f"{role}/{m}" in summary]
            if rows:
                change = np.mean([row["last"]["mean"] - row["first"]["mean"] for row in rows])
                columns.setdefault(f"{role} entropy, last minus first tenth", []).append(change)
    rows = []
    for name, values in columns.items():
        if len(values) == len(entries):
            rows.append([name, *(f"{value:+.3f}" for value in values), shown(over_runs(values)), len(values)])
    return html.table(["change", *(e.run.name for e in entries), "mean over runs", "runs"], rows)


def update_section(entry: Entry) -> str:
    """Size and sparsity at the end, and what was forgotten, if measured."""
    body, row = "", entry.extra.get("sparsity", {}).get("adapted")
    if row:
        names = {
            "U1_rms": "U1, RMS of the change",
            "U1_rel_fro": "U1, relative to the weights",
            "S1": "S1, unchanged in bf16",
            "S2": "S2, within 1e-5",
            "R1_effective_rank": "R1, effective rank",
        }
        cells = [[text, f"{row[key]:.4g}"] for key, text in names.items() if isinstance(row.get(key), (int, float))]
        body += html.table(["what", "value, adapted matrices"], cells)
    if "forgetting" in entry.extra:
        from azr.analysis import forgetting

        scores = forgetting_of(entry)
        lost = forgetting.drops(scores)
        rows = [
            [
                step,
                *(shown(lost[o][step]) for o in lost),
                *(shown(r.get(f"kl_forward/{k}") or {"mean": None}) for k in forgetting.KINDS),
                *(f"{forgetting.value_of(r, p):.4f}" for p in ("U1_rel_fro", "S1", "S5")),
            ]
            for step, r in scores["checkpoints"].items()
        ]
        heads = [
            "step",
            *(forgetting.OUTCOMES[o] for o in lost),
            *(f"KL to the base, {k} text" for k in forgetting.KINDS),
        ]
        body += html.table([*heads, "size |D|/|W|", "S1: unchanged in bf16", "S5: S1 minus chance"], rows)
    return body


def missing_of(entries: list[Entry]) -> list[str]:
    """Commands that would make what the page lacks."""
    commands = []
    for entry in entries:
        path = entry.run.path
        if "difficulty" not in entry.extra:
            commands.append(f"python analyze.py difficulty {path}")
        if "probe" not in entry.extra:
            commands.append(f"python analyze.py entropy --run {path}")
        if "forgetting" not in entry.extra:
            commands.append(f"python analyze.py forgetting {path}")
        if "sparsity" not in entry.extra:
            commands.append(
                f"python analyze.py sparsity --base {entry.run.config['model']} --adapter {path} --json "
                f"{path}/eval/sparsity.json"
            )
    return commands


def run_section(entry: Entry, drawn: dict) -> str:
    """The details of one run."""
    parts, name = [], entry.run.name
    if entry.dynamics:
        made = {title: fig for title, fig in dynamics.plots(entry.run, entry.dynamics).items()}
        drawn |= {f"{name}_{title}": fig for title, fig in made.items()}
        captions = {
            "validity": "Why proposals were refused, stacked; what is missing to the top was valid.",
            "solve_rates": "How many of its answers were right, over the valid tasks of the first and the last tenth.",
            "lengths": "Tokens of right and of wrong answers; intervals over steps.",
            "diversity": "Distance of syntax trees, names aside, between proposals and between induction answers.",
            "rewards": "Rewards by step (faint) and their running mean; seconds by phase.",
        }
        for title, fig in made.items():
            parts.append(html.image(fig, captions[title]) + html.paragraph(captions[title], "quiet"))
        rows = [
            [m, shown(r["per_100_steps"], 2), shown(r["right_minus_wrong"], 2), r["n"]]
            for m, r in entry.dynamics["lengths"].items()
        ]
        parts.append(html.paragraph("Answer length in tokens, controlled for being right:"))
        parts.append(html.table(["mode", "drift per 100 steps", "right minus wrong", "answers"], rows))
    if "difficulty" in entry.extra:
        from azr.analysis import difficulty

        drawn[f"{name}_difficulty"] = fig = difficulty.draw(name, entry.extra["difficulty"])
        parts.append("<h3>Harder tasks, or a weaker solver?</h3>" + html.bullets(entry.extra["difficulty"]["verdict"]))
        parts.append(html.image(fig, "fixed solvers on the proposals of each stage"))
    if body := update_section(entry):
        parts.append("<h3>The update, and what it cost</h3>" + body)
    if entry.digest and entry.digest.examples:
        parts.append("<h3>Tasks it proposed, by stage</h3>")
        text = "One a mode: the first of the step that was neither always nor never solved, else the first valid one."
        parts.append(html.paragraph(text, "quiet") + sample_tasks(entry))
    return "".join(parts)


def build(entries: list[Entry]) -> tuple[str, dict]:
    """(HTML, figures by name)."""
    names, drawn = ", ".join(entry.run.name for entry in entries), {}
    parts = [f"<h1>Self-play: {html.escape(names)}</h1>"]
    when = time.strftime("%Y-%m-%d %H:%M")
    info = entries[0].run.environment.get("git")
    made = f"Written {when}{f', code at commit {info[:10]}' if info else ''}."
    parts.append(html.paragraph(f"{made} Numbers in brackets are 95 % intervals.", "quiet"))
    parts.append(summary_table(entries))
    if len(entries) > 1:
        parts.append("<h2>Across the runs</h2>" + across_runs(entries))
        text = (
            "The interval is Student's t over the runs: about other training seeds of the same settings, if only the "
        )
        parts.append(html.paragraph(text + "seed differs.", "quiet"))
    for entry in entries:
        parts.append(f"<h2>{html.escape(entry.run.name)} in short</h2>" + html.bullets(entry.facts))
        parts.append(html.details("numbers by mode", ends_table(entry)) if len(entries) > 1 else ends_table(entry))
        parts += [f'<div class="warning">{html.escape(text)}</div>' for text in entry.warnings]
    if len(entries) == 1:
        parts.append(
            '<div class="warning">One run, one seed: what follows may be luck. Give several runs to see.</div>'
        )
    parts += curves(entries, drawn)
    drawn["proposer"] = report_plots.draw_proposer(entries)
    parts.append("<h2>The proposer</h2>" + html.image(drawn["proposer"], "valid, solved and learnable proposals"))
    for entry in entries:
        inside = run_section(entry, drawn)
        parts.append(inside if len(entries) == 1 else html.details(f"{entry.run.name} in detail", inside))
    parts.append("<h2>What these numbers do and do not show</h2>" + html.bullets(CAVEATS))
    if missing := missing_of(entries):
        parts.append("<h2>Not measured yet</h2>" + "".join(html.code(line) for line in missing))
    inside = "".join(html.paragraph(e.run.name) + html.code(json.dumps(e.run.config, indent=1), 80) for e in entries)
    parts.append("<h2>Settings</h2>" + html.details("config.json", inside))
    return html.page(f"Self-play: {names}", parts), drawn


def curves(entries: list[Entry], drawn: dict) -> list[str]:
    """Entropy, held-out accuracy, the probe and pass@k; adds their figures to `drawn`."""
    drawn["overview"] = report_plots.draw_overview(entries)
    parts = ["<h2>Entropy and held-out accuracy</h2>" + html.image(drawn["overview"], "entropy, held-out accuracy")]
    text = "Exact token entropy of the training samples; faint: every step, strong: running mean. A grey bar is a step "
    parts.append(html.paragraph(text + "without a line in metrics.jsonl.", "quiet"))
    parts += fit_section(entries)
    if with_probe := [entry for entry in entries if "probe" in entry.extra]:
        drawn["probe"] = report_plots.draw_probe(with_probe)
        parts.append(html.image(drawn["probe"], "entropy on the frozen probe"))
    if with_pass := [entry for entry in entries if entry.passes]:
        drawn["pass_at_k"] = report_plots.draw_pass_at_k(with_pass)
        parts.append("<h2>pass@k, before and after</h2>" + html.image(drawn["pass_at_k"], "pass@k"))
        text = "The band is the 95 % interval of the paired difference from the base, drawn around the trained curve: "
        parts.append(html.paragraph(text + "where it leaves the base's curve, a difference is shown.", "quiet"))
        for entry in with_pass:
            inside = pass_table(entry)
            parts.append(inside if len(entries) == 1 else html.details(f"table of {entry.run.name}", inside))
    return parts


def fit_section(entries: list[Entry]) -> list[str]:
    """The fit of held-out accuracy against entropy, or why there is none."""
    fit = entropy.fits_of([entry.run for entry in entries]).get("held_out_accuracy")
    if not fit:
        return [html.paragraph("Fewer than three held-out evaluations: no fit of accuracy against entropy.", "quiet")]
    if fit["a"]["low"] is None or math.isnan(fit["a"]["low"]):
        text = f"{fit['n']} evaluations are too few to fit accuracy against entropy, R = -a exp(H) + b, with intervals."
        return [html.paragraph(text, "quiet")]
    text = (
        f"R = -a exp(H) + b with R the held-out accuracy and H the solver's entropy, {fit['n']} evaluations: "
        f"a = {shown(fit['a'])}, b = {shown(fit['b'])}, R^2 = {shown(fit['r2'], 2)}."
    )
    if fit["a"]["low"] <= 0:
        text += " The interval of a holds 0 or less: no exchange of entropy for accuracy is shown."
    return [html.paragraph(text)]


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
    print(
        f"\nreport: {out / 'report.html'} ({(out / 'report.html').stat().st_size / 1e6:.1f} MB, open it in a browser)"
    )
    return 0

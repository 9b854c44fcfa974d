"""The gates, passed or not (between two markers of docs/tiny.md), what was measured for each (docs/tiny-gates.md), and
proposals and answers as text (docs/tiny-examples.md)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from azr.passk import Interval, share_interval
from azr.tasks import MODES
from gate_base import base_report, base_store, forced_differences, forced_report, forced_store
from gate_lab import Lab, Store
from gate_numbers import TRACED, Counts, paired, spearman_interval
from gate_proposals import examples_report, followed, proposals_report
from gate_text import table
from gate_training import (
    base_counts,
    best_of,
    gain,
    oracle_report,
    rlvr_report,
    selfplay_report,
    trained_counts,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "tiny.md"
DETAILS = "tiny-gates.md"
DETAILS_HEAD = """# The gates of the embedded model: what was measured

`python results/tiny_gates.py table` wrote this page; [tiny.md](tiny.md#what-it-can-do) has the summary. Level: number
of statements of a held-out task, 7 for seven or eight. Brackets: 95 % over tasks, paired where two models are
compared. Minutes and seconds are those of a machine that did other work too.
"""
EXAMPLES = "tiny-examples.md"
EXAMPLES_HEAD = """# Proposals and answers of the embedded model, before and after self-play

The base and the end of `python train_azr.py --seed 0`, at temperature 1, with the same prompts and seeds: the first
ones that come, not chosen. Each prompt stands once, below it what the two wrote and the verdict of the sandbox. Fences
and tags are left out here.

```
python results/tiny_gates.py examples --adapter runs/tiny-0/checkpoints/step_80
```
"""
BEGIN, END = "<!-- gates: results/tiny_gates.py table -->", "<!-- end of the gates -->"


class Gate(NamedTuple):
    """One line of the table. passed: None where nothing is asked."""

    gate: str
    what: str
    value: object
    n: str
    seed: object
    command: str
    passed: bool | None


def report(options: argparse.Namespace) -> str:
    """The Markdown of everything in OUT that is about this model, the summary first; into docs/ too, except with
    --quick."""
    with Lab(options.model) as lab:
        parts = list(sections(options, lab))
        examples = examples_of(options, lab)
    if not parts:
        raise ValueError(f"{options.out}: has no results of this model yet")
    gates = [gate for _, _, rows in parts for gate in rows]
    gates += every_seed(gates)
    words = {True: "passed", False: "**failed**", None: "-"}
    rows = [[*g[:-1], words[g.passed]] for g in gates]
    summary = squeezed(table(["gate", "what", "value", "n", "seed", "command", ""], rows))
    details = squeezed("\n".join(f"## {title}\n\n{text}\n" for title, text, _ in parts))
    if not options.quick:
        put(PAGE, summary)
        (DOCS / DETAILS).write_text(f"{DETAILS_HEAD}\n{details}")
        if examples:
            (DOCS / EXAMPLES).write_text(f"{EXAMPLES_HEAD}\n{squeezed(examples)}")
    return f"{summary}\n{details}"


def examples_of(options: argparse.Namespace, lab: Lab) -> str:
    """The Markdown of the examples of the base and of a training, if both were made."""
    paths = sorted(set(options.out.glob("examples-*.json")) - {base := options.out / "examples-base.json"})
    if not paths or not base.exists():
        return ""
    return examples_report([Store(base, {"model": lab.digest}), Store(paths[0], {})])


def squeezed(text: str) -> str:
    """The text with at most one empty line in a row."""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip() + "\n"


def put(page: Path, text: str) -> None:
    """The text between the markers of the page, which are added at its end if they are missing."""
    old = page.read_text() if page.exists() else "# The embedded model: can it be learned on?\n"
    if BEGIN not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n"
    head, _, rest = old.partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")


def sections(options: argparse.Namespace, lab: Lab) -> Iterator[tuple[str, str, list[Gate]]]:
    """(title, Markdown, gates) of each file of results."""
    zero = argparse.Namespace(**{**vars(options), "seed": 0})
    if (store := base_store(zero, lab)).parts.get("reach"):
        yield "The base", base_report(lab, store), reach_gates(store)
    if (store := forced_store(zero, lab)).parts.get("own T0.6"):
        yield "The base, made to think", forced_report(lab, store), forced_gates(lab, store)
    for path in sorted(options.out.glob("proposals.json")):
        store = Store(path, {"model": lab.digest})
        if set(MODES) <= set(store.parts):
            yield "Proposals of the base", proposals_report(store), proposal_gates(store)
    for name, text, gates in TRAININGS:
        for path in sorted(options.out.glob(f"{name}-*.json")):
            store, seed = Store(path, {"model": lab.digest}), path.stem.rpartition("-")[2]
            if "many" in store.parts or "hard" in store.parts:
                before = base_counts(options, lab)
                given = before["T0"] if name == "oracle" else before
                yield f"{name}, seed {seed}", text(lab, given, store), gates(lab, before, store, seed)


# ---------------------------------------------------------------- gates


def reach_gates(store: Store) -> list[Gate]:
    """Gate d: shares of tasks without one right answer, and with more than .95 right, at temperature 1."""
    _, n, right = (np.array(column) for column in zip(*store.parts["reach"]))
    never, sure = share_interval((right == 0) * 1.0), share_interval((right / n > 0.95) * 1.0)
    size = f"{len(n)} tasks, {n.max()} answers"
    return [
        Gate("d", "tasks below 1/256, at least 25 %", never, size, 0, "base", never.mean >= 0.25),
        Gate("d", "tasks above .95, at most 20 %", sure, size, 0, "base", sure.mean <= 0.20),
    ]


def forced_gates(lab: Lab, store: Store) -> list[Gate]:
    """Gate b: what a full thought adds to a direct answer, greedy; for induction nothing has to be passed."""
    results = {name: lab.counts(rows) for name, rows in store.parts.items()}
    rules = {
        "4-7": ("4 statements or more, 25 points", lambda x: x >= 0.25),
        "1": ("one statement, within 10 points", lambda x: abs(x) <= 0.10),
    }
    gates = []
    for mode, at, levels, n, value in forced_differences(results):
        if levels in rules and at == "T0":
            what, rule = rules[levels]
            passed = rule(value.mean) if mode == "deduction" else None
            what = f"{mode}, full less direct, greedy, {what}"
            gates.append(Gate("b", what, value, f"{n} tasks", 0, "forced", passed))
    return gates


def proposal_gates(store: Store) -> list[Gate]:
    """Gates c and g: proposals follow their references' size, are valid, and 10 to 60 % are solved."""
    gates = []
    for mode in ("deduction", "abduction"):
        pairs = followed(store, mode)
        value = spearman_interval(*zip(*pairs)) if len(pairs) > 2 else Interval(np.nan, np.nan, np.nan)
        gates.append(
            Gate(
                "c",
                f"{mode}, Spearman of references and proposal, .5",
                value,
                f"{len(pairs)} proposals",
                0,
                "proposals",
                bool(value.mean >= 0.5),
            )
        )
    for mode in MODES:
        rows, solved = store.parts[mode]["rows"], store.parts[mode]["solved"]
        valid = share_interval(np.array([r[2] == "ok" and not r[3] for r in rows]) * 1.0)
        gates.append(
            Gate(
                "g",
                f"{mode}, valid proposals, 60 %",
                valid,
                f"{len(rows)} proposals",
                0,
                "proposals",
                valid.mean >= 0.6,
            )
        )
        if solved:
            rate = share_interval(np.array([right / n for _, _, n, right in solved]))
            gates.append(
                Gate(
                    "g",
                    f"{mode}, own proposals solved, 10 to 60 %",
                    rate,
                    f"{len(solved)} tasks",
                    0,
                    "proposals",
                    0.1 <= rate.mean <= 0.6,
                )
            )
    return gates


def rlvr_gates(lab: Lab, before: dict[str, Counts], store: Store, seed: str) -> list[Gate]:
    """Gates a and b2 of one training on fixed tasks: the greedy gain over the base, also at its best decoding."""
    after, command = trained_counts(lab, store), f"rlvr --seed {seed}"
    best = best_of(before)
    first, above = paired(before["T0"], after["T0"]), paired(before[best], after["T0"])
    gates = [
        Gate("a", "greedy gain, 8 points", first, f"{len(after['T0'])} tasks", seed, command, first.mean >= 0.08),
        Gate(
            "a",
            f"greedy, less the base at its best, {best}",
            above,
            f"{len(before['T1'])} tasks",
            seed,
            command,
            bool(above.low > 0),
        ),
    ]
    return gates + moonshot(before, after, seed, command)


def moonshot(before: dict[str, Counts], after: dict[str, Counts], seed: str, command: str) -> list[Gate]:
    """Against the base that is forced to its full style; nothing asks that this be passed."""
    gates = []
    for mode in ("deduction", "induction"):
        value = gain(before["full T0"].of(mode), after["T0"].of(mode))
        n = f"{len(before['full T0'].of(mode))} tasks"
        gates.append(Gate("b2", f"{mode}, greedy, less the base forced to think", value, n, seed, command, None))
    return gates


def oracle_gates(lab: Lab, before: dict[str, Counts], store: Store, seed: str) -> list[Gate]:
    """Gate e: training on hard tasks and training on easy ones must come out different, greedy."""
    easy, hard = (lab.counts(store.parts[kind]) for kind in ("easy", "hard"))
    value = paired(easy, hard)
    return [
        Gate(
            "e",
            "hard less easy proposer, greedy, other than 0",
            value,
            f"{len(easy)} tasks",
            seed,
            f"oracle --seed {seed}",
            bool(value.excludes_zero),
        )
    ]


def selfplay_gates(lab: Lab, before: dict[str, Counts], store: Store, seed: str) -> list[Gate]:
    """Gates f and b2 of one self-play training: the greedy gain; do thoughts get more frequent and longer?"""
    after, command = trained_counts(lab, store), f"selfplay --seed {seed}"
    value = paired(before["T0"], after["T0"])
    thoughts = [1 - c["T1"].shares()["none"] for c in (before, after)]
    traced = [sum(c["T1"].shares()[style] for style in TRACED) for c in (before, after)]
    tokens = [c["T1"].tokens() for c in (before, after)]
    n = f"{len(after['T0'])} tasks"
    answers = f"{after['T1'].n.sum()} answers"
    gates = [Gate("f", GAIN, value, n, seed, command, value.mean >= 0.05)]
    for what, (a, b), form in (
        ("share of thoughts, T1, up", thoughts, "{:.3f}"),
        ("share of worked-out thoughts, T1, up", traced, "{:.3f}"),
        ("tokens of a response, T1, up", tokens, "{:.1f}"),
    ):
        gates.append(Gate("f", what, f"{form.format(a)} to {form.format(b)}", answers, seed, command, bool(b > a)))
    return gates + moonshot(before, after, seed, command)


def every_seed(gates: list[Gate]) -> list[Gate]:
    """The mean and the range of self-play's gains, if several seeds were run; five are asked for."""
    gains = [gate.value.mean for gate in gates if gate.what == GAIN]
    if len(gains) < 2:
        return []
    value = f"{np.mean(gains):.3f}, from {min(gains):.3f} to {max(gains):.3f}"
    passed = len(gains) >= 5 and min(gains) >= 0.05
    return [Gate("f", f"{GAIN}, in every seed: mean and range", value, f"{len(gains)} seeds", "-", "selfplay", passed)]


GAIN = "greedy gain, 5 points"
TRAININGS = (
    ("rlvr", rlvr_report, rlvr_gates),
    ("oracle", oracle_report, oracle_gates),
    ("selfplay", selfplay_report, selfplay_gates),
)

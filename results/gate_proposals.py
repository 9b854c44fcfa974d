"""Gates c and g: whether proposals follow their references, how many are valid, how often their author solves them.

And `examples`: proposals and answers as text, of a base or of a trained adapter, from the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from azr.evals.held_out import sample_seed
from azr.passk import share_interval
from azr.tasks import MODES, Parsed, Task, Verdict, duplicate_key, parse_proposal, validate
from azr.tasks.prompts import propose_prompt, solve_prompt
from azr.tiny import documents
from azr.tiny.programs import arguments_text
from gate_lab import Lab, Store
from gate_numbers import spearman_interval, statements
from gate_text import table

PROPOSALS = 300  # of a mode
SIZES = (1, 2, 3, 4, 5, 6)  # statements of both references
SOLVED, ANSWERS = 100, 8  # valid proposals of a mode that are answered, and answers to each
EXAMPLES = 5


class Asked(NamedTuple):
    """A proposer's prompt: its references, and how many statements each of them has."""

    mode: str
    references: list[Task]
    size: int


class Proposed(NamedTuple):
    """A proposal as it came and what validation said; `again`: it is one of its references."""

    asked: Asked
    response: str
    parsed: Parsed
    verdict: Verdict
    again: bool


def draw_asked(mode: str, rng: random.Random, size: int) -> Asked:
    """Two references of `size` statements, drawn from the generator; for induction one program."""
    if mode == "induction":
        drawn = documents.draw_task("induction", rng)
        size = len(drawn.example.program.statements)
        return Asked(mode, [Task(mode="deduction", program=drawn.task.program, input="", output="")], size)
    examples = [documents.draw(rng, count=size) for _ in range(2)]
    tasks = [
        Task(mode=mode, program=e.program.text, input=arguments_text(e.arguments), output=repr(e.output))
        for e in examples
    ]
    return Asked(mode, tasks, size)


def propose(lab: Lab, asked: list[Asked], key: str) -> list[Proposed]:
    """One proposal at temperature 1 for each prompt, validated on its own (nothing but its references is known)."""
    prompts = [lab.policy.encode(propose_prompt(a.mode, a.references, lab.template)) for a in asked]
    seeds = [[sample_seed(lab.seed, f"{key}/{i}", 0)] for i in range(len(asked))]
    responses = [lab.policy.decode(done[0].ids) for done in lab.generate(prompts, 1, 1.0, seeds)]
    parsed = [
        parse_proposal(a.mode, text, a.references[0].program if a.mode == "induction" else None)
        for a, text in zip(asked, responses)
    ]
    readable = [i for i, reading in enumerate(parsed) if reading.value is not None]
    verdicts = dict(zip(readable, validate([parsed[i].value for i in readable], lab.sandbox, known=None)))
    found = []
    for i, (a, text, reading) in enumerate(zip(asked, responses, parsed)):
        again = (
            reading.value is not None
            and a.mode != "induction"
            and duplicate_key(reading.value) in {duplicate_key(task) for task in a.references}
        )
        verdict = verdicts.get(i, Verdict(False, reading.reason, reading.detail))
        found.append(Proposed(a, text, reading, verdict, again))
    return found


# ---------------------------------------------------------------- the gates


def proposals(options: argparse.Namespace) -> str:
    """Measures what proposals.json lacks; the report as Markdown."""
    count = 12 if options.quick else PROPOSALS
    with Lab(options.model, seed=options.seed) as lab:
        settings = {"model": lab.digest, "seed": options.seed, "proposals": count}
        store = Store(options.out / "proposals.json", settings)
        for mode in MODES:
            store.get(mode, measure, lab, mode, count)
    return proposals_report(store)


def measure(lab: Lab, mode: str, count: int) -> dict:
    """Rows [references' statements, the proposal's or null, reason, is one of its references, key]; and
    [references' statements, the proposal's, answers, right ones] of those that were answered."""
    rng = random.Random(f"{lab.seed}/{mode}/references")
    attempts = propose(lab, [draw_asked(mode, rng, SIZES[i % len(SIZES)]) for i in range(count)], f"gate/{mode}")
    rows = []
    for p in attempts:
        own = statements(p.parsed.value.program) if p.parsed.value is not None else None
        key = duplicate_key(p.verdict.task) if p.verdict.ok else None
        rows.append([p.asked.size, own, p.verdict.reason, p.again, key])
    valid = [p for p in attempts if p.verdict.ok and not p.again][:SOLVED]
    answers = lab.respond([p.verdict.task for p in valid], ANSWERS, 1.0)
    solved = [
        [p.asked.size, statements(p.verdict.task.program), ANSWERS, sum(answer[2] for answer in mine)]
        for p, mine in zip(valid, answers)
    ]
    return {"rows": rows, "solved": solved}


def proposals_report(store: Store) -> str:
    """The Markdown of gates c and g: valid proposals, sizes beside those of the references, solve rates."""
    rows = []
    for mode in MODES:
        found = store.parts[mode]["rows"]
        ok = [r[2] == "ok" and not r[3] for r in found]
        keys = [r[4] for r, fine in zip(found, ok) if fine]
        refused = Counter(r[2] for r in found if r[2] != "ok")
        reasons = ", ".join(f"{reason} {times}" for reason, times in refused.most_common()) or "-"
        repeated = 1 - len(set(keys)) / len(keys) if keys else None
        rows.append(
            [
                mode,
                len(found),
                share_interval(np.array(ok) * 1.0),
                float(np.mean([r[3] for r in found])),
                repeated,
                reasons,
            ]
        )
    header = ["mode", "proposals", "valid", "one of its references", "repeated among the valid", "refused"]
    lines = ["Valid proposals (gate g):", table(header, rows)]
    lines.append("Statements of valid proposals by statements of their references (gate c):")
    rows = []
    for mode in ("deduction", "abduction"):
        pairs = followed(store, mode)
        means = [np.mean([own for size, own in pairs if size == at] or [np.nan]) for at in SIZES]
        value = spearman_interval(*zip(*pairs)) if len(pairs) > 2 else None
        rows.append([mode, *(f"{mean:.2f}" for mean in means), value, len(pairs)])
    lines.append(table(["mode", *(f"of {size}" for size in SIZES), "Spearman", "proposals"], rows))
    lines.append(f"{ANSWERS} answers of their author to valid proposals, temperature 1 (gate g):")
    rows = []
    for mode in MODES:
        rates = np.array([right / n for _, _, n, right in store.parts[mode]["solved"]])
        if len(rates):
            mixed = share_interval(((rates > 0) & (rates < 1)) * 1.0)
            rows.append([mode, len(rates), share_interval(rates), mixed])
    return "\n".join([*lines, table(["mode", "tasks", "right", "some right, some wrong"], rows)])


def followed(store: Store, mode: str) -> list[tuple[int, int]]:
    """(references' statements, the proposal's) of the valid proposals."""
    return [(size, own) for size, own, reason, again, _ in store.parts[mode]["rows"] if reason == "ok" and not again]


# ---------------------------------------------------------------- as text


def examples(options: argparse.Namespace) -> str:
    """Proposals and answers of each mode as text, of the base and, with --adapter, of a training's end beside them:
    the same prompts, tasks and seeds. Stored as examples-NAME.json, NAME the run of the adapter, or base."""
    adapters = [None, options.adapter] if options.adapter else [None]
    stores = []
    for adapter in adapters:
        name = "base" if adapter is None else adapter.resolve().parents[1].name
        with Lab(options.model, adapter, options.seed) as lab:
            store = Store(options.out / f"examples-{name}.json", {"model": lab.digest, "seed": options.seed})
            store.get("proposals", proposal_texts, lab)
            store.get("answers", answer_texts, lab)
        stores.append(store)
    return examples_report(stores)


def proposal_texts(lab: Lab) -> list[dict]:
    """A few proposals of each mode with prompt, response and verdict, one for each size of the references."""
    texts = []
    for mode in MODES:
        rng = random.Random(f"{lab.seed}/{mode}/examples")
        for p in propose(lab, [draw_asked(mode, rng, size) for size in SIZES[:EXAMPLES]], f"examples/{mode}"):
            prompt = propose_prompt(mode, p.asked.references, lab.template)
            verdict = "one of its references" if p.again else p.verdict.reason
            texts.append({"mode": mode, "prompt": prompt, "response": p.response, "verdict": verdict})
    return texts


def answer_texts(lab: Lab) -> list[dict]:
    """The first answer to the first held-out task of the levels 1, 2, ... of each mode, at temperature 1."""
    texts = []
    for mode in MODES:
        tasks = [lab.tasks[i] for i in lab.part(1, mode)][:EXAMPLES]
        for task, answers in zip(tasks, lab.respond(tasks, 1, 1.0)):
            response, _, right, _, _ = answers[0]
            prompt, verdict = solve_prompt(task, lab.template), "right" if right else "wrong"
            texts.append({"mode": mode, "prompt": prompt, "response": response, "verdict": verdict})
    return texts


def examples_report(stores: list[Store]) -> str:
    """The Markdown of what `examples` stored: each prompt once, below it the response of every model."""
    lines = []
    for kind in ("proposals", "answers"):
        for mode in MODES:
            lines += [f"## {mode.capitalize()}: {kind}", ""]
            for rows in zip(*(store.parts[kind] for store in stores)):
                if rows[0]["mode"] == mode:
                    prompt = brief(rows[0]["prompt"].removesuffix("<think>").removesuffix("Assistant: "))
                    lines += ["````text", prompt]
                    names = ("before", "after") if len(rows) > 1 else ("base",)
                    for name, row in zip(names, rows):
                        lines += [f"--- {name}: {row['verdict']}", brief("<think>" + row["response"])]
                    lines += ["````", ""]
    return "\n".join(lines)


def brief(text: str) -> str:
    """A prompt or a response with each fence of one line on that line, and without the tags of the answer."""
    text = re.sub(r"```(input|output|message)\n(.*)\n```", r"\1: \2", text)
    text = re.sub(r"</?answer>", "", text).replace("<think></think>", "").replace("</think>", "</think>\n")
    return re.sub(r"```python\n|```", "", text).replace("\n\n", "\n").strip()

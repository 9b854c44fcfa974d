"""What validation refuses of proposals that real models made, and what looking at their behaviour costs.

    python tests/bench_validation.py FILE... [--list REASON] [--json FILE] [--quick]

    3b_coder_seed_io.jsonl 7b_coder_seed_io.jsonl                   tasks published with AZR (deduction)
    3b_coder_code_f_seed_io.jsonl 7b_coder_code_f_seed_io.jsonl     its induction tasks
    cruxeval.jsonl                                                  programs chosen to be tricky
    runs/tiny-0/samples.jsonl                                       the valid proposals of a run, replayed step by step

The figures of docs/validation.md come from here. Files that are given together are one list: a task of the second may
repeat one of the first. `trivial_by_text`, `duplicate_by_text`: what the text alone tells, before anything runs.
`no_key`: valid tasks that are compared by their text; `most_tasks_of_a_program`: programs told apart by what they do,
of any mode. `cpu_ms_per_task`: CPU time of the fresh inputs of a valid task, this process and its children together.
`--list`: the programs that are refused for this reason, to be looked at. `--quick`: 32 rows of each file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from azr.jsonl import strict_lines
from azr.tasks import Buffers, Proposal, Task, validate
from azr.tasks.behaviour import observe
from azr.tasks.program import read_program
from sandbox import Sandbox

STEPS = 20  # the first and the last of a replayed run are counted apart: a proposer learns to repeat what is paid


def proposals_of(path: Path, quick: bool) -> list[tuple[int, Proposal]]:
    """(step, proposal) of each row; step 0 where the file is no run's. Raises ValueError for rows of another kind."""
    rows = [row for _, row in strict_lines(path) if row.get("role", "proposer") == "proposer" and row.get("task", True)]
    return [(row.get("step", 0), _proposal(row)) for row in (rows[:32] if quick else rows)]


def _proposal(row: dict) -> Proposal:
    if "task" in row:
        task = Task.from_json(row["task"])
        inputs = tuple(given for given, _ in task.visible + task.hidden) or (task.input,)
        return Proposal(task.mode, task.program, inputs, task.message)
    if "code" in row:
        return Proposal("deduction", row["code"], (row["input"],))
    if "snippet" not in row:
        raise ValueError(f"a row with the keys {', '.join(row)} is no seed task, no problem of CRUXEval and no sample")
    if "inputs" in row:
        return Proposal("induction", row["snippet"], tuple(row["inputs"]), row["message"])
    return Proposal("deduction", row["snippet"], (row["input"],))


def verdicts_of(proposals: list[tuple[int, Proposal]], sandbox: Sandbox) -> list:
    """A verdict for each, in order: a step at a time, with the valid tasks of the steps before in buffers."""
    buffers, verdicts = Buffers(), []
    for step in sorted({step for step, _ in proposals}):
        batch = validate([p for s, p in proposals if s == step], sandbox, known=buffers.keys())
        for verdict in batch:
            if verdict.ok:
                buffers.add(verdict.task, step)
        verdicts += batch
    return verdicts


def figures_of(proposals: list[tuple[int, Proposal]], verdicts: list, sandbox: Sandbox) -> dict:
    """The counts and the cost, by name."""
    reasons = Counter(verdict.reason for verdict in verdicts)
    figures = {"proposals": len(verdicts), **{f"reason_{reason}": n for reason, n in reasons.most_common()}}
    refused = [(p, verdict) for (_, p), verdict in zip(proposals, verdicts) if not verdict.ok]
    trivial = [v.detail == read_program(p.program).trivial for p, v in refused if v.reason == "trivial"]
    figures["trivial_by_text"] = sum(trivial)
    figures["duplicate_by_text"] = sum(v.reason == "duplicate" and "layout aside" in v.detail for _, v in refused)
    for what in ("code fence", "function definition", "encoded text", "shows the pairs"):
        count = sum(v.reason == "message_has_code" and what in v.detail for _, v in refused)
        figures[f"message_{what.replace(' ', '_')}"] = count
    tasks = [verdict.task for verdict in verdicts if verdict.ok]
    figures["no_key"] = sum(not task.behaviour for task in tasks)
    programs = Counter(task.behaviour for task in tasks if task.behaviour)
    figures["most_tasks_of_a_program"] = max(programs.values(), default=0)
    figures["guessable"] = sum(task.chance >= 1 / 3 for task in tasks)
    last = proposals[-1][0]
    for name, first in (("first", 1), ("last", last - STEPS + 1)) if last else ():
        some = [v.reason for (step, _), v in zip(proposals, verdicts) if first <= step < first + STEPS]
        figures |= {f"{name}_steps_proposals": len(some), f"{name}_steps_duplicates": some.count("duplicate")}
    before = time.process_time() + sandbox.state["children_cpu_seconds"]
    observe(tasks, sandbox)
    spent = time.process_time() + sandbox.state["children_cpu_seconds"] - before
    figures["cpu_ms_per_task"] = round(1000 * spent / max(1, len(tasks)), 2)
    return figures


def main() -> int:
    """Prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description="What validation refuses of proposals that real models made.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--list", metavar="REASON", help="also print the programs refused for it")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="32 rows of each file")
    options = parser.parse_args()
    try:
        proposals = [pair for path in options.files for pair in proposals_of(path, options.quick)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    proposals.sort(key=lambda pair: pair[0])  # stable: a run's steps in their order
    with Sandbox() as sandbox:
        verdicts = verdicts_of(proposals, sandbox)
        figures = figures_of(proposals, verdicts, sandbox)
    for (step, proposal), verdict in zip(proposals, verdicts):
        if verdict.reason == options.list:
            print(f"# --- {verdict.detail}; input {', '.join(proposal.inputs)[:200]}\n{proposal.program}\n")
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

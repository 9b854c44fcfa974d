"""What the embedded model's training text has in common with its held-out tasks, and how diverse it is.

    python tests/bench_tiny.py leakage [--draws 200000] [--seed 0] [--json FILE]

Draws programs as the documents do and counts, over all draws: skeletons and behaviours that a held-out task has too
(both must be 0), distinct programs, skeletons, behaviours and results, the most frequent results, and how often a
source is the newest variable. The same two of the wrong programs that thoughts of induction try first, for a twentieth
as many tasks. Behaviours of the held-out tasks are computed from the recipe of held_out.jsonl, not read from the file
of hashes that drawing avoids: half a minute before the first draw; a draw takes a millisecond of CPU. Exit code 1 if
anything held out was drawn.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from azr.evals.held_out import load_tasks
from azr.models import model_path
from azr.tiny import documents as recipe
from azr.tiny import split
from azr.tiny.programs import LAST, STAGES

SHOWN = 5  # most frequent results
SAID = 20_000  # draws between two lines on stderr
STAGE = STAGES[LAST]


def held_out() -> tuple[set[str], set[str]]:
    """(skeletons, behaviours) of the held-out tasks. ValueError if the file is not what the recipe gives."""
    tasks, draws = load_tasks(Path(model_path("tiny")) / "held_out.jsonl"), recipe.held_out_draws()
    if tasks != [drawn.task for drawn in draws]:
        raise ValueError("held_out.jsonl is not what azr.tiny.documents draws: build it again (azr.tiny.make)")
    behaviours = {split.behaviour(drawn.example.program) for drawn in draws}
    return {split.skeleton(task.program) for task in tasks}, behaviours


def leakage(draws: int, seed: int) -> dict:
    """The counts of so many draws."""
    skeletons, behaviours = held_out()
    rng, begin = random.Random(f"{seed}/leakage"), time.process_time()
    seen: dict[str, set] = {"programs": set(), "skeletons": set(), "behaviours": set()}
    common, results, kinds, sizes, newest, sources = Counter(), Counter(), Counter(), Counter(), 0, 0
    for i in range(draws):
        example = recipe.draw(rng)
        program, text = example.program, example.program.text
        skeleton, behaviour = split.skeleton(text), split.behaviour(program)
        common["skeletons"] += skeleton in skeletons
        common["behaviours"] += behaviour in behaviours
        for name, value in zip(seen, (text, skeleton, behaviour)):
            seen[name].add(value)
        results[repr(example.output)] += 1
        kinds[type(example.output).__name__] += 1
        sizes[len(program.statements)] += 1
        known = list(program.parameters)
        for statement in program.statements:
            newest += statement.sources.count(known[-1])
            sources += len(statement.sources)
            known.append(statement.name)
        if (i + 1) % SAID == 0:
            print(f"{i + 1} of {draws} draws", file=sys.stderr, flush=True)
    seconds = time.process_time() - begin
    tried = hypotheses(draws // 20, seed)
    return {
        "draws": draws,
        "seed": seed,
        "held_out": {"skeletons": len(skeletons), "behaviours": len(behaviours)},
        "in_common": {name: common[name] for name in ("skeletons", "behaviours")},
        "wrong_hypotheses": {"programs": len(tried)}
        | {"skeletons": sum(split.skeleton(program.text) in skeletons for program in tried)}
        | {"behaviours": sum(split.behaviour(program) in behaviours for program in tried)},
        "distinct": {name: len(values) for name, values in seen.items()} | {"results": len(results)},
        "commonest_results": {text: round(n / draws, 5) for text, n in results.most_common(SHOWN)},
        "types_of_results": {name: round(n / draws, 4) for name, n in kinds.most_common()},
        "statements": {str(size): round(sizes[size] / draws, 4) for size in sorted(sizes)},
        "sources_that_are_the_newest": round(newest / sources, 4),
        "draws_per_cpu_second": round(draws / seconds, 1),
        "documents_per_cpu_second": documents_per_second(max(200, min(2000, draws // 20)), seed),
    }


def hypotheses(count: int, seed: int) -> list:
    """The wrong programs that thoughts about so many induction tasks may try before the right one."""
    rng, found = random.Random(f"{seed}/hypotheses"), []
    for _ in range(count):
        drawn = recipe.draw_task("induction", rng)
        found.append(recipe.wrong_hypothesis(drawn.example.program, drawn.pairs[0], rng, STAGE))
    return [program for program in found if program is not None]


def documents_per_second(count: int, seed: int) -> float:
    """How fast whole documents are drawn, prompts and thoughts included."""
    begin = time.process_time()
    recipe.documents(f"{seed}/speed", count)
    return round(count / (time.process_time() - begin), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("leakage", help="training programs against held-out tasks")
    command.add_argument("--draws", type=int, default=200_000)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.draws < 1:
        parser.error(f"--draws {args.draws}: at least one is needed")
    try:
        found = leakage(args.draws, args.seed)
    except ValueError as error:
        print(f"bench_tiny.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    shared = [found[part][name] for part in ("in_common", "wrong_hypotheses") for name in ("skeletons", "behaviours")]
    return 1 if any(shared) else 0


if __name__ == "__main__":
    sys.exit(main())

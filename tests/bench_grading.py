r"""How right and how fast grading is: the public files' own answers, and answers that are wrong.

    python tests/bench_grading.py DIR [--only maths,numbers,cruxeval,code] [--json FILE] [--quick]

DIR holds math500.jsonl, ..., cruxeval.jsonl, HumanEvalPlus.jsonl.gz and MbppPlus.jsonl.gz; a maths file that is not
there is left out.

maths       each reference answer in a boxed sentence, and the different answers of the next three problems of its file
numbers     each reference that is a number, in SPELLINGS that are right and in five texts that are not
cruxeval    `eval_passk.py score` of 20 answers to each problem, of both kinds: the reference 20 times, and then the
            references of 20 problems, which no two share
code        `eval_passk.py score` of the reference solutions of HumanEval+ and MBPP+, twice: the outputs that are
            expected are computed, and then taken from the cache (an empty one of its own, not the user's)
Times are CPU seconds (user and system, of all processes) and seconds by the clock. --quick: every twentieth problem.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from azr.evals.benchmarks import load
from azr.evals.math_answers import MathGrader, extract
from azr.evals.math_numbers import value
from azr.jsonl import strict_lines

MATHS = {name: name for name in ("math500", "aime24", "aime25", "amc23", "olympiadbench", "gsm8k")}
MATHS["minerva"] = "minerva_math"
BOXED = "So it is $\\boxed{%s}$."
SPELLINGS = (
    "%s",
    "$%s$.",
    r"\ %s\,",
    "x = %s",
    r"x \approx %s",
    r"\approx %s",
    r"%s\ \mathrm{kg \cdot m/s^2}",
    r"\text{Area} = %s \text{ cm}^2",
    r"\text{There are } %s \text{ apples}",
    r"\text{The answer is %s.}",
    "the final value is %s",
)
WRONG = ("1e-25", "%s or 17", r"\text{not } %s", "perhaps %s")  # and the reference with the other sign
SAMPLES = 20


def references(folder: Path, step: int) -> list[list[str]]:
    """The reference answers of each maths file that is there."""
    files = {name: folder / f"{file}.jsonl" for name, file in MATHS.items()}
    return [
        [item.task.answer for item in load(f"{name}={path}").items][::step]
        for name, path in files.items()
        if path.is_file()
    ]


def graded(right: list[tuple[str, str]], wrong: list[tuple[str, str]]) -> dict:
    """How many of the pairs (reference, answer) have the verdict that they should have, and those that have not."""
    with MathGrader() as grader:
        verdicts = [verdict.ok for verdict in grader.grade([(a, extract(BOXED % b)) for a, b in right + wrong])]
    refused = [pair for pair, ok in zip(right, verdicts) if not ok]
    taken = [pair for pair, ok in zip(wrong, verdicts[len(right) :]) if ok]
    return {"right": len(right), "refused": refused, "wrong": len(wrong), "taken": taken}


def maths(folder: Path, step: int) -> dict:
    """References against themselves and against those of other problems."""
    files = references(folder, step)
    others = [(a, b) for rows in files for i, a in enumerate(rows) for b in rows[i + 1 : i + 4] if a != b]
    return graded([(a, a) for rows in files for a in rows], others)


def numbers(folder: Path, step: int) -> dict:
    """References that are numbers against other ways to write them, and against texts that are no answer."""
    answers = [text for rows in references(folder, step) for text in rows if value(text) is not None]
    right = [(text, spelling.replace("%s", text)) for text in answers for spelling in SPELLINGS]
    wrong = [(text, other.replace("%s", text)) for text in answers for other in WRONG]
    wrong += [(text, text[1:] if text[0] == "-" else f"-{text}") for text in answers if value(text)]
    return graded(right, wrong)


def scored(name: str, file: Path, rows: list[dict], cache: str = "") -> dict:
    """What `eval_passk.py score` says of these samples, and the time it takes. cache: see azr/evals/kept.py."""
    with tempfile.TemporaryDirectory() as out:
        samples = Path(out) / "samples.jsonl"
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, str(ROOT / "eval_passk.py"), "score", str(samples), "--out", out, "--k", "1"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        environment = {**os.environ, "AZR_CACHE": cache}
        command += ["--benchmark", f"{name}={file}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        result = json.loads((Path(out) / "result.json").read_text())
    return {
        "answers": len(rows),
        "reasons": result["reasons"],
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "seconds": seconds,
        "workers": len(os.sched_getaffinity(0)),
    }


def cruxeval(folder: Path, step: int) -> dict:
    """Times of 20 answers to a problem: equal ones, which are graded once, and different ones."""
    file = folder / "cruxeval.jsonl"
    rows = [row for _, row in strict_lines(file)][::step]
    result = {}
    for name, field in (("cruxeval-o", "output"), ("cruxeval-i", "input")):
        texts = list(dict.fromkeys(row[field] for row in rows))
        equal = [{"task_id": row["id"], "answer": row[field]} for row in rows for _ in range(SAMPLES)]
        different = []
        for row in rows:
            start = texts.index(row[field])
            others = (texts + texts)[start : start + SAMPLES]
            different += [{"task_id": row["id"], "answer": text} for text in others]
        result |= {f"{name}, equal": scored(name, file, equal), f"{name}, different": scored(name, file, different)}
    return result


def code(folder: Path, step: int) -> dict:
    """Times and verdicts of the reference solutions of HumanEval+ and MBPP+."""
    result = {}
    for name, file in (("humaneval+", "HumanEvalPlus"), ("mbpp+", "MbppPlus")):
        path = folder / f"{file}.jsonl.gz"
        rows = [row for _, row in strict_lines(path)][::step]
        samples = [{"task_id": row["task_id"], "solution": row["prompt"] + row["canonical_solution"]} for row in rows]
        with tempfile.TemporaryDirectory() as cache:
            result[name] = scored(name, path, samples, cache)
            result[f"{name}, again"] = scored(name, path, samples, cache)
    return result


def main() -> None:
    """Runs the parts that are asked for and prints each as it ends."""
    parts = {part.__name__: part for part in (maths, numbers, cruxeval, code)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(parts))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    result = {}
    for name in args.only.split(","):
        result[name] = parts[name](args.folder, 20 if args.quick else 1)
        print(name, json.dumps(result[name], indent=1), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

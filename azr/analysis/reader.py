"""Reads run directories that may be unfinished, torn or damaged: what is missing becomes a note in words and a gap.

    run = read_run("runs/tiny-0")                       # RunError, in one line, if this is no run
    run.column("solver/deduction/entropy")              # (steps,) with NaN where a step or a value is missing
    digest = read_samples(run)                          # one pass over samples.jsonl, compact

`azr/runs.py` writes these files and refuses damage when a run goes on; a reader may leave a bad line out and say so.
Left out: torch, models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from azr.console import note, warn
from azr.fits import as_json
from azr.jsonl import read_object, tolerant_lines, write_json_atomic
from azr.passk import bootstrap_interval
from azr.runs import RunError, step_directories, weights_of
from azr.tasks.task import MODES

ROLES = ("proposer", "solver")
GROUPS = [(role, mode) for role in ROLES for mode in MODES]
TREND_STEPS = 25  # of a run with fewer no trend is told: a tenth of it is a step or two, which differ by luck


@dataclass
class RunData:
    """A run directory as read: `rows` of metrics.jsonl in order of step, `notes` on what is missing or damaged."""

    path: Path
    config: dict
    rows: list[dict]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last part of the run directory's path, as legends show it."""
        return self.path.name

    @property
    def steps(self) -> np.ndarray:
        """(steps,) every step from the first to the last: a step without a line is there, as a gap."""
        return np.arange(self.rows[0]["step"], self.rows[-1]["step"] + 1)

    @property
    def finished(self) -> bool:
        """Whether the last logged step is the last one configured; False if no number of steps is configured."""
        return self.rows[-1]["step"] >= (self.config.get("steps") or math.inf)

    def column(self, key: str) -> np.ndarray:
        """(steps,) the values of a metric, NaN where there is none."""
        values = np.full(len(self.steps), np.nan)
        for row in self.rows:
            value = row.get(key)
            if isinstance(value, (int, float)):
                values[row["step"] - self.rows[0]["step"]] = value
        return values

    @property
    def roles(self) -> list[str]:
        """The roles that logged anything: a run on given tasks has no proposer. Both, if none did."""
        return [role for role in ROLES if any(key.startswith(f"{role}/") for row in self.rows for key in row)] or [
            *ROLES
        ]

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory) of every checkpoint with its adapter or model and its azr.json."""
        steps = step_directories(self.path)
        return [(step, path) for step, path in steps if weights_of(path) and (path / "azr.json").is_file()]

    def trained(self) -> list[tuple[int, Path]]:
        """`checkpoints` after step 0; RunError if there is none."""
        if after := [(step, path) for step, path in self.checkpoints() if step > 0]:
            return after
        raise RunError(f"{self.path} has no checkpoint after step 0, so there is nothing to compare the base with")

    def base(self) -> dict:
        """azr.json of the first checkpoint: what the run trained on; RunError if there is none yet."""
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise RunError(f"{self.path} has no checkpoint yet (checkpoints/step_0 is written before the first step)")
        return read_object(checkpoints[0][1] / "azr.json", RunError)


def read_run(path: str | Path) -> RunData:
    """RunError: no directory, no run directory, or no finished step yet."""
    path, notes = Path(path), []
    if not path.is_dir():
        raise RunError(f"{path}: no such directory; give the directory of a run, such as runs/tiny-0")
    if not (path / "config.json").is_file():
        what = "is empty" if not any(path.iterdir()) else "has no config.json"
        raise RunError(f"{path} {what}, so it is not the directory of a run; give one that train_azr.py wrote")
    config = read_object(path / "config.json", RunError)
    if "model" not in config or "seed" not in config:
        raise RunError(f"{path}/config.json has no model or no seed: some other program's directory, not a run")
    rows = _metric_rows(path, notes)
    if not rows:
        raise RunError(f"{path}: no step is finished yet (metrics.jsonl has no complete line); try again after one")
    return RunData(path, config, rows, notes)


def _metric_rows(path: Path, notes: list[str]) -> list[dict]:
    """Lines of metrics.jsonl by step; damage becomes a note."""
    by_step: dict[int, dict] = {}
    if not (path / "metrics.jsonl").is_file():
        return []
    for row in tolerant_lines(path / "metrics.jsonl", notes):
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            notes.append("metrics.jsonl: a line without a step is left out")
        else:
            if step in by_step:
                notes.append(f"metrics.jsonl: step {step} is there twice; the later line counts")
            by_step[step] = row
    rows = [by_step[step] for step in sorted(by_step)]
    if rows and (missing := rows[-1]["step"] - rows[0]["step"] + 1 - len(rows)):
        notes.append(f"metrics.jsonl: {missing} step(s) between the first and the last are missing: gaps in the curves")
    return rows


def same_model(runs: list[RunData]) -> None:
    """RunError in one line if the runs differ in base, quantization or template."""
    known: dict[tuple, RunData] = {}
    for run in runs:
        info = run.base() if run.checkpoints() else {"base_model": run.config["model"]}
        # a directory's revision is a hash of its weights: the same model may lie in two places
        key = (info.get("revision") or info["base_model"], *(info.get(k) for k in ("quantization", "template_hash")))
        known.setdefault(key, run)
    if len(known) > 1:
        trained = (f"{run.path} trained {', '.join(str(part) for part in key if part)}" for key, run in known.items())
        raise RunError(f"runs of different models cannot be put together: {'; '.join(trained)}; name runs of one model")


def read_runs(paths: list[str]) -> list[RunData]:
    """Runs of one model, saying what is damaged in them; see `read_run` and `same_model`."""
    runs = [read_run(path) for path in paths]
    same_model(runs)
    for run in runs:
        for line in run.notes:
            warn(f"{run.path}: {line}")
    return runs


# ------------------------------------------------------------------------------------------------------- samples


@dataclass
class Proposal:
    """A proposal as logged. `task` is None unless it was valid."""

    step: int
    mode: str
    task: dict | None
    reason: str
    solve_rate: float | None


@dataclass
class Digest:
    """samples.jsonl in one pass: all proposals, compact columns of the answers, and some of both as they are."""

    proposals: list[Proposal]
    reasons: dict  # mode -> {step: Counter of what became of its proposals}
    answers: dict  # mode -> {"step", "tokens", "correct"}: arrays (answers,)
    examples: dict  # (step, mode) -> [rank, a proposal's row, the first answer to its task or None]
    notes: list[str]
    lines: int = 0


def read_samples(run: RunData, example_steps: tuple[int, ...] = ()) -> Digest:
    """One pass over samples.jsonl; RunError if the file is missing or holds nothing that can be read."""
    path = run.path / "samples.jsonl"
    if not path.is_file():
        raise RunError(f"{path}: no such file; the run has not logged any sample yet")
    digest = Digest([], {mode: defaultdict(Counter) for mode in MODES}, {}, {}, [])
    columns = {mode: ([], [], []) for mode in MODES}
    strange = 0
    for row in tolerant_lines(path, digest.notes):
        try:
            step, role, mode, reason, task = (row[name] for name in ("step", "role", "mode", "reason", "task"))
            if role == "proposer":
                digest.reasons[mode][step][reason] += 1
                digest.proposals.append(Proposal(step, mode, task, reason, row["solve_rate"]))
            elif role == "solver":
                for column, value in zip(columns[mode], (step, row["tokens"], row["reward"].get("correct", False))):
                    column.append(value)
            if step in example_steps:
                _keep_example(digest.examples, row)
            digest.lines += 1
        except (KeyError, TypeError, AttributeError):
            strange += 1
    if strange:
        digest.notes.append(f"samples.jsonl: {strange} line(s) lack fields of a sample: left out")
    if not digest.lines:
        raise RunError(f"{path}: holds no complete sample; the run has not logged any yet")
    for mode, (steps, tokens, correct) in columns.items():
        steps, tokens = np.array(steps, np.int32), np.array(tokens, np.int32)
        digest.answers[mode] = {"step": steps, "tokens": tokens, "correct": np.array(correct, bool)}
    return digest


def _keep_example(examples: dict, row: dict) -> None:
    """The first learnable proposal of a step and mode, else the first valid, else the first; and an answer to it."""
    key = (row["step"], row["mode"])
    if row["role"] == "proposer":
        rate = row["solve_rate"]
        rank = 2 if rate is not None and 0 < rate < 1 else int(row["task"] is not None)
        if key not in examples or rank > examples[key][0]:
            examples[key] = [rank, row, None]
    elif key in examples and examples[key][1]["task"] == row["task"]:
        examples[key][2] = examples[key][2] or row


# ------------------------------------------------------------------------------------------------- parts of a run


def stages(steps: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(first, last) step of `count` equal stages, fewer if there are fewer steps."""
    parts = np.array_split(np.asarray(steps), max(1, min(count, len(steps))))
    return [(int(part[0]), int(part[-1])) for part in parts]


def ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """What is finite of (steps,) in the first and in the last tenth of the steps; None if one of them has nothing."""
    tenth = max(1, len(values) // 10)
    first, last = (part[np.isfinite(part)] for part in (values[:tenth], values[-tenth:]))
    return (first, last) if len(first) and len(last) else None


def mean_row(values: np.ndarray, interval: Callable = bootstrap_interval) -> dict | None:
    """{"mean", "low", "high", "n"} of the values that are finite, which are resampled; None without any."""
    values = values[np.isfinite(values)]
    return as_json(interval(values), len(values)) if len(values) else None


def first_and_last(run: RunData, metric: str, modes: Sequence[str]) -> dict:
    """{"role/mode": {"first", "last"}}: means of a metric in the first and the last tenth of the steps, with intervals
    over steps."""
    pairs = {f"{role}/{mode}": ends(run.column(f"{role}/{mode}/{metric}")) for role in ROLES for mode in modes}
    return {name: {"first": mean_row(pair[0]), "last": mean_row(pair[1])} for name, pair in pairs.items() if pair}


def remembered(path: Path, key: list, fresh: bool, make: Callable[[], dict]) -> dict:
    """What `make()` returns, or what it did: it is stored at `path` with a hash of `key`, which says what it depends
    on (plain data; of a Path the hash of that file), and made again if the key differs, the file is damaged, or
    `fresh`."""
    parts = [hashlib.sha256(part.read_bytes()).hexdigest() if isinstance(part, Path) else part for part in key]
    mark = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    if path.is_file() and not fresh:
        try:
            stored = read_object(path)
        except ValueError:
            warn(f"{path} cannot be read and is made again")
        else:
            if stored.pop("key", None) == mark:
                note(f"measurements are taken from {path} (--fresh measures again)")
                return stored
    path.parent.mkdir(exist_ok=True)
    made = make()
    write_json_atomic(path, {"key": mark, **made})
    return made

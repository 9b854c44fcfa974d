"""Held-out evaluation: sample answers to fixed tasks, judge them, and say how sure the numbers are.

    tasks = load_tasks("held_out.jsonl")
    base = evaluate(policy, tasks, n=16, sampling=Sampling(temperature=1.0), template="tiny", sandbox=sandbox, seed=0)
    difference(base, trained, k=1, mode="deduction")        # Interval(mean, low, high), paired over problems
    plot_pass_at_k({"base": base, "trained": trained}, "pass_at_k.png")

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374). Every interval resamples PROBLEMS only: the
answers to a problem are already part of its pass@k, and resampling them too counts their noise twice. An interval is
thus about other problems like these, not about other training runs. Left out: k beyond n. No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from azr.rollout import Policy, Sampling
    from azr.tasks import Task
    from sandbox import Sandbox

DRAWS = 2000                # bootstrap resamples
ANSWERS_PER_CALL = 2048     # samples between two reports of progress


# ---------------------------------------------------------------- pass@k

def pass_at_k(n: int | Sequence[int], c: Sequence[int], k: int | Sequence[int]) -> np.ndarray:
    """Unbiased pass@k = 1 - C(n-c, k) / C(n, k) of each problem, from c correct answers among n.

    n: one number or one a problem; c: (problems,). Returns (problems,) for one k, (problems, ks) for several.
    Product form of Chen et al. 2021: 1 - prod_{i=n-c+1..n} (1 - k/i), cumulated once per n for every c, so no
    factorials and no loop over problems. ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    c, ks = np.asarray(c, dtype=np.int64), np.atleast_1d(np.asarray(k, dtype=np.int64))
    n = np.broadcast_to(np.asarray(n, dtype=np.int64), c.shape)
    if np.any(c < 0) or np.any(c > n):
        raise ValueError("pass@k: the number of correct answers must lie between 0 and the number of samples")
    if np.any(ks < 1) or (n.size and ks.max() > n.min()):
        raise ValueError(f"pass@k: k must lie between 1 and the samples a problem has ({n.min()}), not {ks.tolist()}")
    result = np.empty((c.size, ks.size))
    for samples in np.unique(n):
        rows = n == samples
        factors = np.maximum(0.0, 1 - ks / np.arange(samples, 0, -1)[:, None])          # (i = n..1, ks)
        failure = np.concatenate([np.ones((1, ks.size)), np.cumprod(factors, axis=0)])  # row c: all k answers wrong
        result[rows] = 1 - failure[c[rows]]
    return result if np.ndim(k) else result[:, 0]


# ---------------------------------------------------------------- intervals

RARE, FEW = 3, 10           # solved (or unsolved) problems that are too few for a variance, for a bootstrap


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval: floats, or arrays of one shape."""

    mean: Any
    low: Any
    high: Any

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> Any:
        return (np.asarray(self.low) > 0) | (np.asarray(self.high) < 0)


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean over problems with its interval. values: (problems,) or (problems, columns), resampled as whole rows."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no problems, so there is nothing to average")
    sums = _resampled_sums(values.reshape(len(values), -1), draws, seed)
    means = values.mean(axis=0)
    return _interval(means, sums.reshape(draws, *means.shape) / len(values), len(values), confidence)


def share_interval(values: np.ndarray, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """`bootstrap_interval` for values in [0, 1], such as pass@k, with an answer near 0 and 1.

    All 30 problems solved would give [1, 1], a certainty that 30 problems do not have. Where the values (or what they
    lack to 1) sum to less than FEW problems, the interval is Wilson's (1927) for as many problems with values 0 or 1
    as would vary by as much; below RARE the variance is not known either, and it is that of values 0 or 1.
    """
    values = np.asarray(values, dtype=np.float64)
    result, n, mean = bootstrap_interval(values, confidence, draws, seed), len(values), values.mean(axis=0)
    z2, binary = NormalDist().inv_cdf((1 - confidence) / 2) ** 2, mean * (1 - mean)
    events, variance = n * np.minimum(mean, 1 - mean), values.var(axis=0, ddof=min(1, n - 1))
    size = np.where((events < RARE) | (variance == 0), n, n * binary / np.where(variance == 0, 1, variance))
    half = np.sqrt(z2 / size * (binary + z2 / (4 * size)))
    wilson = [np.clip((mean + z2 / (2 * size) + sign * half) / (1 + z2 / size), 0, 1) for sign in (-1, 1)]
    # Rounding must not put the mean outside.
    low = np.minimum(mean, np.where(events < FEW, wilson[0], result.low))
    high = np.maximum(mean, np.where(events < FEW, wilson[1], result.high))
    return Interval(mean, low, high) if mean.ndim else Interval(float(mean), float(low), float(high))


def paired_difference(c_a: Sequence[int], c_b: Sequence[int], n: int | Sequence[int], k: int | Sequence[int],
                      confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """pass@k of b minus that of a, on the same problems in the same order, n samples each: a paired bootstrap."""
    if len(c_a) != len(c_b):
        raise ValueError(f"paired difference: {len(c_a)} problems against {len(c_b)}")
    return bootstrap_interval(pass_at_k(n, c_b, k) - pass_at_k(n, c_a, k), confidence, draws, seed)


def ratio_difference(hits_a: Sequence[int], of_a: Sequence[int], hits_b: Sequence[int], of_b: Sequence[int],
                     confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """sum(hits_b)/sum(of_b) - sum(hits_a)/sum(of_a) with a paired bootstrap over problems; all (problems,).

    For shares whose denominator varies, such as correct answers among the well-formed ones. NaN where nothing counts.
    """
    columns = np.stack([hits_a, of_a, hits_b, of_b], axis=1).astype(np.float64)
    if not len(columns):
        raise ValueError("no problems, so there is nothing to average")

    def statistic(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]
    return _interval(statistic(columns.sum(axis=0)), statistic(_resampled_sums(columns, draws, seed)),
                     len(columns), confidence)


def _resampled_sums(columns: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws, columns): column sums of `draws` resamples of the rows, with replacement."""
    problems, rng, sums = len(columns), np.random.default_rng(seed), []
    for start in range(0, draws, 100):              # counts of 100 resamples at a time, so memory stays small
        size = min(100, draws - start)
        picks = rng.integers(problems, size=(size, problems)) + problems * np.arange(size)[:, None]
        counts = np.bincount(picks.ravel(), minlength=size * problems).reshape(size, problems)
        sums.append(counts.astype(np.float64) @ columns)
    return np.concatenate(sums)


def _interval(estimate: np.ndarray, replicates: np.ndarray, problems: int, confidence: float) -> Interval:
    """Expanded percentile interval (Hesterberg 2015, arXiv 1411.5279, section 5.3): the percentile bootstrap is too
    narrow by sqrt((n-1)/n) and by normal for t, which shows at 30 problems. One problem: NaN."""
    if problems < 2:
        low = high = np.full_like(estimate, np.nan)
    else:
        tail = NormalDist().cdf(math.sqrt(problems / (problems - 1)) * _t_quantile((1 - confidence) / 2, problems - 1))
        low, high = np.quantile(replicates, [tail, 1 - tail], axis=0)
    if np.ndim(estimate) == 0:
        return Interval(float(estimate), float(low), float(high))
    return Interval(estimate, low, high)


def _t_quantile(probability: float, freedom: int) -> float:
    """Student's t by its expansion in 1/freedom (Abramowitz and Stegun 26.7.5); 3e-3 off at 5 degrees, 95 %."""
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2) + (
        3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)


# ---------------------------------------------------------------- tasks

def load_tasks(path: str | Path) -> list[Task]:
    """The tasks of a JSON-lines file. ValueError with file and line for a bad one; repeats are left out, loudly."""
    from azr.tasks import Task

    path, tasks, repeats = Path(path), {}, 0
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected one task as JSON a line")
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                if not isinstance(data, dict):
                    raise ValueError(f"expected a JSON object, found {type(data).__name__}")
                task = Task.from_json(data)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            repeats += task.hash in tasks
            tasks.setdefault(task.hash, task)
    if not tasks:
        raise ValueError(f"{path}: holds no tasks; expected one task as JSON a line")
    if repeats:
        print(f"warning: {path}: {repeats} lines repeat an earlier task and are left out", file=sys.stderr, flush=True)
    return list(tasks.values())


CRUXEVAL = ("cruxeval-org/cruxeval", "test.jsonl")      # dataset on the hub and its file


def cruxeval_tasks(count: int, path: str | Path | None = None) -> list[Task]:
    """`count` problems of CRUXEval (arXiv 2401.03065) as deduction and as abduction tasks, always the same ones.

    path: a local copy of its file; None: through the hub. ValueError, in one line, if it cannot be had or read.
    """
    import random

    from azr.tasks import Task

    if path is None:
        from huggingface_hub import hf_hub_download

        from azr.hub import only_cached
        try:
            path = hf_hub_download(*CRUXEVAL, repo_type="dataset", local_files_only=only_cached(CRUXEVAL[0]))
        except Exception as error:                  # the hub's client raises a dozen kinds, of three libraries
            raise ValueError(f"CRUXEval cannot be had from the hub ({type(error).__name__})") from error
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        chosen = random.Random(0).sample(rows, min(count, len(rows)))
        return [Task.from_json({"mode": mode, "program": row["code"], "input": row["input"], "output": row["output"]})
                for mode in ("deduction", "abduction") for row in chosen]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not CRUXEval's file ({error})") from error


# ---------------------------------------------------------------- results

@dataclass
class TaskResult:
    """What n answers to one task came to."""

    hash: str
    mode: str
    n: int
    correct: int                        # once parsed, whatever their format
    well_formed: int                    # in the think/answer format
    correct_well_formed: int
    distinct_correct: int               # different correct answers
    truncated: int                      # ended by the length limit
    infra: int                          # no verdict because of the machine; counted as wrong
    tokens: list[int] = field(default_factory=list)     # length of each response


@dataclass
class EvalResult:
    """Results of every task, in order, and what they were made with."""

    tasks: list[TaskResult]
    settings: dict                      # samples, seed, template, template_hash, sampling

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(task.mode for task in self.tasks))

    def of(self, mode: str | None) -> list[TaskResult]:
        """The tasks of a mode; None: all."""
        return [task for task in self.tasks if mode in (None, task.mode)]

    def column(self, name: str, mode: str | None = None) -> np.ndarray:
        """(problems,) of one count, such as "correct"."""
        return np.array([getattr(task, name) for task in self.of(mode)], dtype=np.int64)

    def pass_at_k(self, k: int | Sequence[int], mode: str | None = None) -> Interval:
        return share_interval(pass_at_k(self.column("n", mode), self.column("correct", mode), k))

    def share(self, hits: str, of: str, mode: str | None = None) -> float:
        """sum(hits) / sum(of): ("correct_well_formed", "well_formed") is accuracy for well-formed answers only."""
        total = self.column(of, mode).sum()
        return float(self.column(hits, mode).sum() / total) if total else math.nan

    def metrics(self, prefix: str = "held_out") -> dict[str, float]:
        """Flat metrics a mode, and over "all" when there are several modes."""
        result = {}
        for mode in [*self.modes, *([None] if len(self.modes) > 1 else [])]:
            name = f"{prefix}/{mode or 'all'}"
            tasks = self.of(mode)
            result |= {
                f"{name}/accuracy": self.share("correct", "n", mode),
                f"{name}/accuracy_well_formed": self.share("correct_well_formed", "well_formed", mode),
                f"{name}/well_formed_rate": self.share("well_formed", "n", mode),
                f"{name}/truncated_rate": self.share("truncated", "n", mode),
                f"{name}/solved_rate": float(np.mean(self.column("correct", mode) > 0)),
                f"{name}/distinct_correct": float(self.column("distinct_correct", mode).mean()),
                f"{name}/response_tokens": float(np.mean([count for task in tasks for count in task.tokens])),
            }
        return result

    def to_json(self) -> dict:
        return {"settings": self.settings, "tasks": [dataclasses.asdict(task) for task in self.tasks]}

    @classmethod
    def from_json(cls, data: dict) -> EvalResult:
        """ValueError if it is not what `to_json` gave."""
        try:
            return cls([TaskResult(**task) for task in data["tasks"]], data["settings"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an evaluation result: {error}") from error


def difference(base: EvalResult, trained: EvalResult, k: int | Sequence[int] = 1, mode: str | None = None) -> Interval:
    """pass@k of trained minus base, paired over problems. ValueError if they are not the same problems and settings."""
    check_comparable(base, trained)
    values = [pass_at_k(result.column("n", mode), result.column("correct", mode), k) for result in (base, trained)]
    return bootstrap_interval(values[1] - values[0])


def well_formed_difference(base: EvalResult, trained: EvalResult, mode: str | None = None) -> Interval:
    """The same for the share of correct answers among the well-formed ones: is the gain more than format?"""
    check_comparable(base, trained)
    names = ("correct_well_formed", "well_formed")
    return ratio_difference(*(result.column(name, mode) for result in (base, trained) for name in names))


def check_comparable(a: EvalResult, b: EvalResult) -> None:
    """ValueError unless problems, template and decoding are the same."""
    if [task.hash for task in a.tasks] != [task.hash for task in b.tasks]:
        raise ValueError("the two results are not about the same tasks in the same order")
    for key in ("template", "template_hash", "sampling"):
        if a.settings.get(key) != b.settings.get(key):
            raise ValueError(f"the two results differ in {key}: {a.settings.get(key)} and {b.settings.get(key)}")


# ---------------------------------------------------------------- evaluation

def sample_seed(seed: int, task_hash: str, sample: int) -> int:
    """A 64-bit seed that depends on nothing else, so any answer can be made again alone, on any machine."""
    text = json.dumps([seed, task_hash, sample]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def evaluate(policy: Policy, tasks: list[Task], n: int, sampling: Sampling, template: str, sandbox: Sandbox, seed: int,
             progress: Callable[[int, int], None] | None = None) -> EvalResult:
    """n answers to each task, judged. progress(tasks done, tasks) is called as it goes.

    ValueError if there is nothing to do or a prompt does not fit the model's context.
    """
    from azr.prompts import template_hash

    if not tasks or n < 1:
        raise ValueError(f"nothing to evaluate: {len(tasks)} tasks with {n} samples each")
    results = []
    for part in _parts(tasks, max(1, ANSWERS_PER_CALL // n)):
        results += _evaluate_part(policy, part, n, sampling, template, sandbox, seed)
        if progress:
            progress(len(results), len(tasks))
    if missing := sum(result.infra for result in results):
        print(f"warning: {missing} of {n * len(tasks)} answers could not be judged (machine too busy?) and count as "
              "wrong", file=sys.stderr, flush=True)
    settings = {"samples": n, "seed": seed, "template": template, "template_hash": template_hash(template),
                "sampling": json.loads(json.dumps(dataclasses.asdict(sampling)))}
    return EvalResult(results, settings)


def _parts(items: list, size: int) -> Iterator[list]:
    return (items[start:start + size] for start in range(0, len(items), size))


def _evaluate_part(policy: Policy, tasks: list[Task], n: int, sampling: Sampling, template: str, sandbox: Sandbox,
                   seed: int) -> list[TaskResult]:
    from azr.prompts import solve_prompt
    from azr.tasks import judge, parse_answer

    prompts = [policy.encode(solve_prompt(task, template)) for task in tasks]
    seeds = [[sample_seed(seed, task.hash, sample) for sample in range(n)] for task in tasks]
    completions = policy.generate(prompts, n, sampling, seeds)
    parsed = [[parse_answer(task.mode, policy.decode(completion.ids)) for completion in row]
              for task, row in zip(tasks, completions, strict=True)]
    # Equal answers to a task are judged once: the sandbox is the slow part.
    pairs = list({(i, answer.value): None for i, row in enumerate(parsed) for answer in row})
    verdicts = dict(zip(pairs, judge([(tasks[i], value) for i, value in pairs], sandbox), strict=True))
    return [_task_result(task, row, answers, [verdicts[i, answer.value] for answer in answers])
            for i, (task, row, answers) in enumerate(zip(tasks, completions, parsed))]


def _task_result(task: Task, completions: list, answers: list, verdicts: list) -> TaskResult:
    """One task's rows: completions, parsed answers and verdicts, each (n,)."""
    correct = [verdict.ok for verdict in verdicts]
    return TaskResult(
        hash=task.hash, mode=task.mode, n=len(answers), correct=sum(correct),
        well_formed=sum(answer.well_formed for answer in answers),
        correct_well_formed=sum(ok and answer.well_formed for ok, answer in zip(correct, answers)),
        distinct_correct=len({answer_key(task.mode, answer.value) for ok, answer in zip(correct, answers) if ok}),
        truncated=sum(completion.finish_reason == "length" for completion in completions),
        infra=sum(verdict.reason == "infra" for verdict in verdicts),
        tokens=[len(completion.ids) for completion in completions])


def answer_key(mode: str, answer: str) -> str:
    """Equal for answers that differ in layout only: literals in canonical form, programs without line-end spaces."""
    if mode in ("deduction", "abduction"):
        from sandbox import literal
        try:
            return literal.canon_args(*literal.parse_args(answer))
        except literal.LiteralError:
            pass                                    # an answer the judge reads in another way stands for itself
    return "\n".join(line.rstrip() for line in answer.strip().splitlines())


# ---------------------------------------------------------------- the plot

def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n/2: at k = n, pass@k is a single draw a problem. Just 1 if n is 1."""
    return [2**i for i in range(max(1, (n // 2).bit_length()))]


def plot_pass_at_k(results: dict[str, EvalResult], path: str | Path, ks: Sequence[int] | None = None) -> None:
    """pass@k over k as PNG: a panel a mode and one for all tasks; the first result is the base of the comparison.

    The band around another curve is the 95 % interval of its paired difference from the base, so the difference is
    established where the band leaves the base's curve. Needs matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    base = next(iter(results.values()))
    for result in results.values():
        check_comparable(base, result)
    ks = list(ks or powers_of_two(min(int(result.column("n").min()) for result in results.values())))
    panels = [*base.modes, *([None] if len(base.modes) > 1 else [])]
    figure = Figure(figsize=(3.3 * len(panels), 3.4), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _draw_panel(axes, results, ks, mode)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([str(k) for k in ks])
        axes.set_title(f"{mode or 'all'} ({len(base.of(mode))} tasks)", fontsize=10)
        axes.set_xlabel("k (answers a task)")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("pass@k")
    figure.axes[0].legend(loc="upper left", fontsize=8)
    if len(results) > 1:
        figure.supxlabel("band: 95 % interval of the paired difference from the first curve", fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _draw_panel(axes: Any, results: dict[str, EvalResult], ks: list[int], mode: str | None) -> None:
    base = next(iter(results.values()))
    for index, (name, result) in enumerate(results.items()):
        curve, color = result.pass_at_k(ks, mode), f"C{index}"
        axes.plot(ks, curve.mean, marker="o", markersize=3.5, color=color, label=name)
        if result is not base:
            gap = difference(base, result, ks, mode)
            around = curve.mean - gap.mean          # the base's curve
            axes.fill_between(ks, np.clip(around + gap.low, 0, 1), np.clip(around + gap.high, 0, 1),
                              color=color, alpha=0.2, linewidth=0)

"""Tables and plots of RESULTS.md from results/ARM/SEED.json: `python results/tables.py`.

Replaces what stands between `<!-- NAME -->` and `<!-- end -->` in RESULTS.md and draws results/plots/*.png. No torch.
Unless a table says otherwise, an interval is Student's t over training seeds: it is about other seeds on the same
held-out tasks, and the n in front of it is the number of seeds.

Left out: a correction of the intervals; where many arms are compared with one, Holm's says which differences stand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

from azr.fits import linear_fit, over_runs
from azr.passk import Interval, difference_interval, holm, pass_at_k, t_quantile

MODES = ("deduction", "abduction", "induction")
REWARDS = {"learnability": "joint"} | {
    name: name for name in ("half-peak", "uniform", "variance", "gaussian", "gate", "random")
}
CONTROLS = (
    "joint fresh answers-4 answers-16 temperature nf4 bonus adaptive clip-cov top-entropy high-advantage-clip "
    "minibatches clip-higher kl-cov off-policy off-policy-more off-policy-shuffled off-policy-gold"
).split()
REFERENCE = {"clip-higher": "minibatches", "kl-cov": "minibatches"}  # what an arm is compared with, if not with joint
SEVERAL_UPDATES = ("minibatches", "clip-higher", "kl-cov")
MAIN = ("joint", "frozen-base", "rlvr", "sft", "off-policy")
PROPOSERS = ("joint", "no-update", "no-update-matched", "frozen-base")
FEWEST = 2  # seeds of an arm whose own spread is shown


def load() -> dict[str, list[dict]]:
    """Results of each arm, in the order of their seeds."""
    arms: dict[str, list[dict]] = {}
    for path in sorted(RESULTS.glob("*/[0-9]*.json"), key=lambda path: (path.parent.name, int(path.stem))):
        arms.setdefault(path.parent.name, []).append(json.loads(path.read_text()))
    return arms


# ---------------------------------------------------------------- numbers of a run


def solved(result: dict, k: int) -> np.ndarray:
    """(tasks,) pass@k of each held-out task."""
    held_out = result["held_out"]
    return pass_at_k(held_out["n"], held_out["correct"], k)


def answer_error(results: list[dict], k: int, draws: int = 400) -> float:
    """Standard error of the mean pass@k that is due to which answers were sampled, of the mean of `results`."""
    rng, variances = np.random.default_rng(0), []
    for held_out in (result["held_out"] for result in results):
        n, correct = held_out["n"], np.array(held_out["correct"])
        means = [pass_at_k(n, rng.binomial(n, correct / n), k).mean() for _ in range(draws)]
        variances.append(np.var(means, ddof=1))
    return float(np.sqrt(np.sum(variances)) / len(results))


def modes_of_tasks(arms: dict) -> np.ndarray:
    """(tasks,) the mode of each: they are sorted by id, and every mode has as many."""
    return np.repeat(sorted(MODES), len(arms["base"][0]["held_out"]["correct"]) // len(MODES))


def gain(arms: dict, name: str, k: int) -> np.ndarray:
    """(seeds, tasks): pass@k of an arm minus that of its base, whose samples are pooled; seeds with n >= 2 k."""
    base = "half-base" if name.startswith("half-") and name != "half-peak" else "base"
    reference = np.mean([solved(result, k) for result in arms[base]], axis=0)
    rows = [solved(result, k) - reference for result in arms[name] if result["held_out"]["n"] >= 2 * k]
    return np.array(rows).reshape(-1, len(reference))


def ends(result: dict, name: str, part: int = 10) -> tuple[float, float]:
    """Means of a series over the first and the last `part` steps; steps without a value left out."""
    values = np.array([np.nan if value is None else value for value in result["series"][name]], float)
    return float(np.nanmean(values[:part])), float(np.nanmean(values[-part:]))


def probe(result: dict, role: str) -> tuple[np.ndarray, np.ndarray]:
    """Entropy on the frozen probe and the update's relative norm, at step 0 and every checkpoint."""
    checkpoints = sorted(map(int, result["checkpoints"]))
    entropy = [result["probe_entropy"][str(step)][f"{role}/all"] for step in (0, *checkpoints)]
    norm = [0.0, *(result["checkpoints"][str(step)]["U1_rel_fro"] for step in checkpoints)]
    return np.array(entropy), np.array(norm)


def at(sizes: np.ndarray, values: np.ndarray, where: float) -> float:
    """Linear interpolation along the sizes of a run's checkpoints (steps,); NaN outside of what was seen."""
    order, inside = np.argsort(sizes), sizes.min() <= where <= sizes.max() + 1e-9
    return float(np.interp(where, sizes[order], values[order])) if inside else np.nan


def pooled(arms: dict, value) -> Pooled:
    """value(result) of every run on the larger base that has what it needs."""
    groups: dict[str, list[float]] = {}
    for name, results in arms.items():
        if "flags" in results[0] and not is_half(name):
            try:
                groups[name] = [float(value(result)) for result in results]
            except KeyError:  # rlvr and sft propose nothing
                continue
    return Pooled(groups)


class Pooled:
    """One standard deviation between training seeds for all arms, so that one or two seeds of an arm say something.

    groups: a value a seed of each arm. Assumes that arms differ in mean only; `sd` and `freedom` are printed.
    """

    def __init__(self, groups: dict[str, np.ndarray]):
        self.groups = {name: np.asarray(values, float) for name, values in groups.items()}
        several = [values for values in self.groups.values() if len(values) > 1]
        self.freedom = sum(len(values) - 1 for values in several)
        self.sd = np.sqrt(sum(((values - values.mean()) ** 2).sum() for values in several) / max(1, self.freedom))
        self.t = t_quantile(0.975, max(1, self.freedom))

    def mean(self, name: str) -> Interval:
        """The mean of an arm over its seeds, with a 95 % interval from the pooled deviation."""
        values = self.groups[name]
        return self.around(values.mean(), 1 / len(values))

    def minus(self, name: str, other: str) -> Interval:
        """The mean of an arm minus that of another, with a 95 % interval from the pooled deviation."""
        a, b = self.groups[name], self.groups[other]
        return self.around(a.mean() - b.mean(), 1 / len(a) + 1 / len(b))

    def standing(self, names: list[str]) -> str:
        """Which of the differences of these arms to REFERENCE are there at a family-wise error of 5 % (Holm 1979)."""
        means, p = [], []
        for name in names:
            other = REFERENCE.get(name, "joint")
            share = 1 / len(self.groups[name]) + 1 / len(self.groups[other])
            means.append(self.minus(name, other).mean)
            p.append(self.p_value(means[-1] / (self.sd * np.sqrt(share))))
        stand = [f"{name} ({mean:+.3f})" for name, mean, value in zip(names, means, holm(p)) if value < 0.05]
        return f"{', '.join(stand) or 'none'} of {len(names)}"

    def p_value(self, t: float) -> float:
        """Two-sided, by bisection of the quantile: 1e-6 off at most."""
        low, high = 1e-6, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if t_quantile(1 - middle / 2, self.freedom) < abs(t) else (middle, high)
        return high

    def around(self, mean: float, share: float) -> Interval:
        """The 95 % interval of a mean; `share` is 1 / n, or for a difference the sum of both."""
        half = self.t * self.sd * np.sqrt(share)
        return Interval(mean, mean - half, mean + half)

    def __str__(self) -> str:
        return f"standard deviation between training seeds {self.sd:.3f}, {self.freedom} degrees of freedom"


# ---------------------------------------------------------------- text


def over_seeds(values) -> Interval:
    """Student's t over the values that there are; NaN without any."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return over_runs(values) if len(values) else Interval(np.nan, np.nan, np.nan)


def show(interval: Interval, digits: int = 3, sign: bool = True) -> str:
    """`+.045 [+.031, +.058]`, bold where the interval leaves zero out and `sign` says that this matters."""
    form = f"{{:+.{digits}f}}" if sign else f"{{:.{digits}f}}"
    if np.isnan(interval.mean):
        return ""
    mean = form.format(interval.mean)
    if not np.isfinite(interval.low):
        return mean
    text = f"{mean} [{form.format(interval.low)}, {form.format(interval.high)}]"
    return f"**{text}**" if sign and (interval.low > 0 or interval.high < 0) else text


def table(head: str, rows: list[list[str]]) -> str:
    """A Markdown table; head: the titles of the columns with " | " between them."""
    lines = [head, " | ".join(["---"] * len(head.split(" | "))), *map(" | ".join, rows)]
    return "\n".join(f"| {line} |" for line in lines)


def available(arms: dict, names) -> list[str]:
    """The arms of these that have at least FEWEST results."""
    return [name for name in names if len(arms.get(name, [])) >= FEWEST]


# ---------------------------------------------------------------- the tables


def sharpening(arms: dict) -> str:
    """Finding 1: gains at each k, set figures within k = 256, different right answers."""
    names = available(arms, MAIN)
    rows = []
    for k in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        base = over_seeds([solved(result, k).mean() for result in arms["base"]])
        rows.append(
            [str(k), f"{base.mean:.3f}", *(show(over_seeds(gain(arms, name, k).mean(axis=1))) for name in names)]
        )
    counts = [f"{name} ({len(arms[name])} seeds)" for name in names]
    errors = ", ".join(f"{answer_error(arms['base'], k):.3f} at k = {k}" for k in (1, 64, 256))
    made = table(" | ".join(["k", "base", *counts]), rows)
    return (
        f"{made}\n\nThe base's figure has a standard error of its own, from its "
        f"{len(arms['base'])} x {arms['base'][0]['held_out']['n']} answers a task: {errors}. It is common to all "
        "columns and not in the intervals."
    )


def per_mode(arms: dict) -> str:
    """Finding 1, by mode: pass@1 and pass@64 against the base."""
    tasks = modes_of_tasks(arms)
    rows = []
    for name in available(arms, (*MAIN, "no-update", "no-update-matched")):
        cells = []
        for k in (1, 64):
            values = gain(arms, name, k)
            cells += [show(over_seeds(values[:, tasks == mode].mean(axis=1))) for mode in MODES]
        rows.append([f"{name} ({len(arms[name])})", *cells])
    return table(" | ".join(["arm (seeds)", *(f"{mode} @{k}" for k in (1, 64) for mode in MODES)]), rows)


def sets(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """SRR and NDR (arXiv 2507.14843, section 3) of b against a from chances (tasks,) of solving each task."""
    both, lost, found = (a * b).sum(), (a * (1 - b)).sum(), ((1 - a) * b).sum()
    with np.errstate(invalid="ignore"):  # nothing solved: NaN
        return both / (both + lost), found / (both + found)


def support(arms: dict) -> str:
    """Finding 1: what is distinct, found and how varied, beside a second sample of the base."""
    k, first, second = 256, *arms["base"][:2]
    varied = modes_of_tasks(arms) != "deduction"  # there it is one

    def different(result: dict) -> float:
        return np.array(result["held_out"]["distinct_correct"], float)[varied].mean()

    rows = []
    for name in ("base, second sample", *available(arms, MAIN)):
        results = arms.get(name, [second])
        wide = [result for result in results if result["held_out"]["n"] >= 2 * k]
        pairs = np.array([sets(solved(first, k), solved(result, k)) for result in wide]).reshape(-1, 2)
        distinct = np.array([different(result) for result in results])
        label = name if results == [second] else f"{name} ({len(wide)}, {len(results)})"
        columns = (pairs[:, 0], pairs[:, 1], distinct, distinct / different(first))
        rows.append([label, *(show(over_seeds(x), sign=False) for x in columns)])
    head = (
        "(seeds with 512 answers, all seeds) | SRR: of what the base solves, kept | "
        "NDR: of what is solved, new | different right answers a task, of 128 | ratio to the base"
    )
    return table(head, rows)


def entropy(arms: dict) -> str:
    """Finding 2: own samples and the frozen probe, at the end and at the same norm of the update."""
    half = [name for name in ("half-joint", "half-no-update", "half-frozen-base") if arms.get(name)]
    names = available(arms, (*PROPOSERS, "rlvr", "sft")) + half
    norms = {name: [probe(result, "solver")[1].max() for result in arms[name]] for name in names}
    rows = []
    for name in names:
        cells = []
        for role in ("proposer", "solver"):
            if f"{role}/all/entropy" in arms[name][0]["series"] and name != "sft":
                pairs = np.array([ends(result, f"{role}/all/entropy") for result in arms[name]])
                cells.append(f"{pairs[:, 0].mean():.2f} -> {show(over_seeds(pairs[:, 1]), 2, sign=False)}")
            else:
                cells.append("")
        for role in ("proposer", "solver"):
            change = [probe(result, role)[0][-1] - probe(result, role)[0][0] for result in arms[name]]
            cells.append(show(over_seeds(change), 2))
        size = min(min(norms[other]) for other in names if is_half(other) == is_half(name))
        for role in ("proposer", "solver"):
            curves = [probe(result, role) for result in arms[name]]
            change = [at(norm, values, size) - values[0] for values, norm in curves]
            cells.append(show(over_seeds(change), 2))
        rows.append([f"{name} ({len(arms[name])})", *cells, show(over_seeds(norms[name]), 3, sign=False)])
    head = (
        "arm (seeds) | proposer, own samples | solver, own samples | probe, proposer | probe, solver | "
        "proposer at equal norm | solver at equal norm | norm of the update / base"
    )
    return table(head, rows)


def is_half(name: str) -> bool:
    """Whether an arm is on the smaller base; the arm half-peak is named after its reward and is not."""
    return name.startswith("half-") and name != "half-peak"


def sparsity(arms: dict) -> str:
    """Finding 3: unchanged shares of the adapted weights at the real size, at RMS 3e-5, at equal norm; S5."""
    names = available(arms, (*MAIN, "no-update"))
    size = min(row["U1_rms"] for name in names for result in arms[name] for row in [last(result)])
    rows = []
    for name in names:
        parts = [result["update"]["adapted"] for result in arms[name]]
        curves = [[(np.log(row["U1_rms"]), row["S1"]) for row in in_order(result)] for result in arms[name]]
        equal = [at(*np.array(curve).T, np.log(size)) for curve in curves]
        matched = [part["at_rms_3e-5"] for part in parts]
        shares = [[part[key] for part in group] for group in (parts, matched) for key in ("S1", "S2")]
        rows.append(
            [
                f"{name} ({len(parts)})",
                f"{np.mean([part['U1_rms'] for part in parts]):.1e}",
                *(show(over_seeds(100 * np.array(values)), 2, sign=False) for values in (*shares, equal)),
                *(show(over_seeds([100 * part["S5"]["excess"] for part in group]), 3) for group in (parts, matched)),
                show(over_seeds([part["R1_effective_rank"] for part in parts]), 1, sign=False),
            ]
        )
    head = (
        f"arm (seeds) | U1: RMS | S1, % | S2, % | S1 at RMS 3e-5, % | S2 at RMS 3e-5, % | "
        f"S1 at RMS {size:.1e}, % | S5, points | S5 at RMS 3e-5 | effective rank of 16"
    )
    return table(head, rows)


def in_order(result: dict) -> list[dict]:
    """What a result says about each checkpoint, by step."""
    return [result["checkpoints"][str(step)] for step in sorted(map(int, result["checkpoints"]))]


def last(result: dict) -> dict:
    """What a result says about its last checkpoint."""
    return in_order(result)[-1]


def rewards(arms: dict) -> str:
    """Finding 4: seven rewards; intervals from the spread pooled over all arms."""
    base = {k: np.mean([solved(result, k).mean() for result in arms["base"]]) for k in (1, 64)}
    columns = {
        "pass@1 - base": pooled(arms, lambda r: solved(r, 1).mean() - base[1]),
        "pass@64 - base": pooled(arms, lambda r: solved(r, 64).mean() - base[64]),
        "greedy held-out, %": pooled(arms, lambda r: 100 * np.mean(final_greedy(r))),
        "valid, %": pooled(arms, lambda r: 100 * np.mean([ends(r, f"proposer/{m}/valid_rate")[1] for m in MODES])),
        "distance of programs": pooled(arms, lambda r: r["diversity"][-1]["program_distance"]),
    }
    rows = []
    for reward, name in REWARDS.items():
        if arms.get(name):
            shares = np.mean([rate_shares(result) for result in arms[name]], axis=0)
            cells = [
                show(part.mean(name), 3 if "%" not in label else 1, sign="base" in label)
                for label, part in columns.items()
            ]
            rows.append([f"{reward} ({len(arms[name])})", *cells, " / ".join(f"{100 * x:.0f}" for x in shares)])
    head = ["reward (seeds)", *columns, "own tasks solved never / sometimes / always, %"]
    return table(" | ".join(head), rows)


def rate_shares(result: dict) -> np.ndarray:
    """(3,) of the valid proposals of the last quarter: solved by none, some, all of the answers; mean over modes."""
    rows = [np.array(result["solve_rate"][f"{mode}/last"]) for mode in MODES]
    return np.mean([[row[0], row[1:-1].sum(), row[-1]] for row in rows], axis=0)


def power(arms: dict) -> str:
    """Finding 4: what differs from learnability, and what could have been seen four times in five."""
    lines = []
    for label, value in (
        ("greedy held-out accuracy", lambda result: np.mean(final_greedy(result))),
        ("pass@1", lambda result: solved(result, 1).mean()),
        ("pass@64", lambda result: solved(result, 64).mean()),
    ):
        spread = pooled(arms, lambda result: 100 * value(result))
        reach = spread.t + t_quantile(0.8, spread.freedom)
        several, one = (reach * spread.sd * np.sqrt(2 / n) for n in (3, 1))
        names = [name for name in REWARDS.values() if arms.get(name) and name != "joint"]
        cells = ", ".join(f"{name} {show(spread.minus(name, 'joint'), 1)}" for name in names)
        lines.append(
            f"- {label}, points: {spread}; with a power of 80 % three seeds against three show {several:.1f} points, "
            f"one run against one {one:.1f}. Minus learnability: {cells}. "
            f"After Holm's correction: {spread.standing(names)}."
        )
    return "\n".join(lines)


def final_greedy(result: dict) -> list[float]:
    """The greedy held-out accuracy of each mode after the last evaluated step."""
    accuracy = result["greedy"]["accuracy"]
    return accuracy[max(accuracy, key=int)]


def difficulty(arms: dict) -> str:
    """Finding 5: fixed solvers on the proposals of the first and the last quarter."""
    rows = []
    for name in available(arms, ("joint", "no-update", "frozen-base", "half-peak")):
        tables = [result["difficulty"] for result in arms[name] if "difficulty" in result]
        if len(tables) < FEWEST:
            continue
        base = [t["rate"]["base"][-1]["mean"] - t["rate"]["base"][0]["mean"] for t in tables]
        final = [t["rate"][t["solvers"][-1]][-1]["mean"] - t["rate"][t["solvers"][-1]][0]["mean"] for t in tables]
        stronger = [
            np.mean([b["mean"] - a["mean"] for a, b in zip(t["rate"]["base"], t["rate"][t["solvers"][-1]])])
            for t in tables
        ]
        longer = [t["tokens"]["base"][-1]["mean"] - t["tokens"]["base"][0]["mean"] for t in tables]
        own = [
            ends(r, f"solver/{mode}/response_tokens")[1] - ends(r, f"solver/{mode}/response_tokens")[0]
            for r in arms[name]
            for mode in MODES
        ]
        own = np.array(own).reshape(len(arms[name]), len(MODES)).mean(axis=1)
        logged = [t["logged_rate"][-1]["mean"] - t["logged_rate"][0]["mean"] for t in tables]
        cells = [show(over_seeds(x)) for x in (logged, base, final, stronger)]
        cells += [show(over_seeds(x), 2) for x in (own, longer)]
        rows.append([f"{name} ({len(tables)})", *cells])
    head = (
        "arm (seeds) | solve rate as logged | of the base: the tasks | of the final model: the tasks | "
        "final minus base, same tasks: the solver | tokens of answers, logged | tokens of the base's answers: the tasks"
    )
    return table(head, rows)


def controls(arms: dict) -> str:
    """Finding 6: what each control does at k = 1 and k = 64, and to the solver's entropy; pooled spread."""
    base = {k: np.mean([solved(result, k).mean() for result in arms["base"]]) for k in (1, 64)}
    gains = {k: pooled(arms, lambda result: solved(result, k).mean() - base[k]) for k in base}
    own = pooled(arms, lambda result: ends(result, "solver/all/entropy")[1])
    frozen = pooled(arms, lambda result: np.diff(probe(result, "solver")[0][[0, -1]])[0])
    rows = []
    for name in (name for name in CONTROLS if arms.get(name)):
        touched = [x for result in arms[name] for x in result["series"].get("train/control_share", []) if x is not None]
        tokens = np.mean([np.mean(result["series"]["train/tokens"]) for result in arms[name]])
        rows.append(
            [
                f"{name} ({len(arms[name])})",
                *(show(gains[k].mean(name)) for k in gains),
                *("" if name == "joint" else show(gains[k].minus(name, REFERENCE.get(name, "joint"))) for k in gains),
                show(own.mean(name), 2, sign=False),
                show(frozen.mean(name), 2),
                f"{100 * np.mean(touched):.1f}" if touched else "",
                f"{tokens:.0f}",
            ]
        )
    head = (
        "arm (seeds) | pass@1 - base | pass@64 - base | pass@1 - joint (*) | pass@64 - joint (*) | "
        "solver entropy at the end | on the probe | tokens touched, % | tokens a step"
    )
    spread = "; ".join(f"pass@{k}: {gains[k]}" for k in gains)
    names = [name for name in CONTROLS if arms.get(name) and name != "joint"]
    stand = "; ".join(f"pass@{k}: {gains[k].standing(names)}" for k in gains)
    others = ", ".join(f"{name} minus {other}" for name, other in REFERENCE.items() if arms.get(name))
    return (
        f"{table(head, rows)}\n\n(*) {others}. Intervals from the spread pooled over all arms ({spread}). "
        f"Differences to joint (*) that stand after Holm's correction: {stand}."
    )


PREDICTORS = {
    "kl_forward/solver": "forward KL, solver prompts",
    "kl_forward/untrained": "forward KL, untrained text",
    "kl_reverse/solver": "reverse KL, solver prompts",
    "U1_rel_fro": "norm of the update",
    "S1": "sparsity S1",
}


def forgetting(arms: dict) -> str:
    """Finding 6: what was lost of a skill never trained on, against KL, norm, sparsity; R^2 with runs resampled."""
    points = forgetting_points(arms)
    lost, runs = (np.array([point[key] for point in points]) for key in ("drop", "run"))
    text = np.array([point["kl_forward/untrained"] for point in points])
    once = np.array([point["arm"] not in SEVERAL_UPDATES for point in points])  # the others lose most by far
    rows = []
    for key, label in (*PREDICTORS.items(), ("S5", "excess sparsity S5")):
        x = np.array([point[key] for point in points])
        line = linear_fit(x, lost, groups=runs)
        both = linear_fit(np.column_stack([x, text]), lost, groups=runs)
        added = both.r2.mean - linear_fit(text, lost, groups=runs).r2.mean
        fewer = linear_fit(x[once], lost[once], groups=runs[once])
        more = "" if key == "kl_forward/untrained" else f"{added:+.2f}"
        rows.append([label, show(line.r2, 2, sign=False), more, show(fewer.r2, 2, sign=False)])
    n = f"{len(points)} checkpoints of {len(set(runs))} runs"
    head = (
        f"the drop against ({n}) | R^2 | added to forward KL on that text | "
        f"R^2 with one update a step ({once.sum()} checkpoints)"
    )
    return table(head, rows)


def forgetting_points(arms: dict) -> list[dict]:
    """One a checkpoint of every run on the larger base: predictors and the drop of the untrained skill."""
    points = []
    for name, results in arms.items():
        for result in results:
            if "checkpoints" in result and not is_half(name):
                for row in in_order(result):
                    point = {key: row[key] for key in PREDICTORS} | {"S5": row["S5"]["excess"]}
                    drop = result["skill_base"] - row["skill"]
                    points.append(point | {"arm": name, "run": f"{name}/{result['seed']}", "drop": drop})
    return points


def lost_by_arm(arms: dict) -> str:
    """Finding 6: the drop and the KL of each arm at the end."""
    rows = []
    for name in available(arms, (*MAIN, "no-update", "off-policy-gold", "bonus")):
        results = arms[name]
        drop = [100 * (result["skill_base"] - last(result)["skill"]) for result in results]
        kl = [last(result)["kl_forward/untrained"] for result in results]
        new = [last(result)["kl_forward/solver"] for result in results]
        divergences = [show(over_seeds(values), 3, sign=False) for values in (kl, new)]
        rows.append([f"{name} ({len(results)})", show(over_seeds(drop), 1), *divergences])
    head = "arm (seeds) | untrained skill lost, points | forward KL there, nats a token | on solver prompts"
    return table(head, rows)


def seeds_and_tasks(arms: dict) -> str:
    """Finding 1: how much of the uncertainty is about tasks, how much about training seeds."""
    rows = []
    for name in available(arms, MAIN):
        for k in (1, 64, 256):
            values = gain(arms, name, k)
            if not len(values):
                continue
            each, over_tasks = values.mean(axis=1), difference_interval(values.mean(axis=0))
            seeds = " / ".join(f"{x:+.3f}" for x in each)
            rows.append([name, str(k), show(over_seeds(each)), show(over_tasks), seeds])
    return table("arm | k | over training seeds | over tasks (mean of the seeds) | seed by seed", rows)


def constants(arms: dict) -> str:
    """Finding 1: runs whose abduction answers are one and the same for a fifth of all tries, and what that costs."""
    names = [name for name in arms if not is_half(name) and name != "half-base"]
    part = modes_of_tasks(arms) == "abduction"
    tries = [
        (result["held_out"]["commonest"]["abduction"], loss, f"{name}/{result['seed']}")
        for name in names
        for result, loss in zip(arms[name], gain(arms, name, 64)[:, part].mean(axis=1))
    ]
    shares, losses = (np.array(x) for x in zip(*((share, loss) for (_, share), loss, _ in tries)))
    rows = [
        [run, f"`{answer}`", f"{100 * share:.0f} %", f"{loss:+.3f}"]
        for (answer, share), loss, run in sorted(tries, key=lambda row: -row[0][1])
        if share >= 0.2
    ]
    fit = linear_fit(shares, losses)
    head = "run | commonest answer to abduction tasks | share | abduction pass@64 - base"
    return (
        f"{table(head, rows)}\n\nOver all {len(tries)} samplings the share explains {show(fit.r2, 2, sign=False)} of "
        f"the variance of that loss; its median is {100 * np.median(shares):.0f} %, the base has "
        f"{100 * arms['base'][0]['held_out']['commonest']['abduction'][1]:.0f} %."
    )


FIRST = (sharpening, seeds_and_tasks, per_mode, support, constants, entropy, sparsity)
TABLES = (*FIRST, rewards, power, difficulty, controls, forgetting, lost_by_arm)


# ---------------------------------------------------------------- the script


def fill(text: str, name: str, content: str) -> str:
    """The text with `content` between the marker of that name and the next end marker. ValueError without marker."""
    start, end = f"<!-- {name} -->", "<!-- end -->"
    before, marker, rest = text.partition(start)
    if not marker or end not in rest:
        raise ValueError(f"the page has no {start} ... {end}")
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def filled(text: str, arms: dict) -> str:
    """The page with every table made anew."""
    for make in TABLES:
        text = fill(text, make.__name__, make(arms))
    return text


def main() -> int:
    """Makes the tables of RESULTS.md and the plots anew; returns the exit code, 2 without base and joint."""
    arms = load()
    if not {"base", "joint"} <= arms.keys():
        print("results/tables.py: no results of base and joint; python results/experiments.py run", file=sys.stderr)
        return 2
    page = RESULTS.parent / "RESULTS.md"
    page.write_text(filled(page.read_text(), arms))
    import plots  # beside this file

    main_arms, proposers = available(arms, MAIN), available(arms, (*PROPOSERS, "rlvr", "sft"))
    plots.save(plots.sharpening(arms, main_arms), RESULTS / "plots" / "pass_at_k.png")
    plots.save(plots.entropy(arms, proposers, probe), RESULTS / "plots" / "entropy.png")
    plots.save(plots.sparsity(arms, main_arms), RESULTS / "plots" / "sparsity.png")
    plots.save(plots.rewards(arms, REWARDS), RESULTS / "plots" / "rewards.png")
    plots.save(plots.forgetting(forgetting_points(arms)), RESULTS / "plots" / "forgetting.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

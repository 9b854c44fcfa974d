"""Does the tuned model solve more, or only sooner? Two graded results on the same problems, compared in pairs.

    eval_passk.py compare BASE TUNED [--k 1,2,4,...] [--margin 0.02] [--out DIR]

BASE and TUNED are result directories (`result.json`, `graded.jsonl`) with the same problems, template, decoding and
base quantization; anything else is refused. Writes compare.json, compare.md and compare.png. Intervals and tests are
over problems (see azr/passk.py): they say nothing about other training runs.

What the sentence means. A difference at some k is ESTABLISHED if its 95 % interval excludes 0 and its sign-flip p,
corrected over all k by Holm, is below 0.05. The sentence says at which k tuned is established ahead or behind ("cannot
tell" at the others), or where the lead changes: if one is established ahead at some k and the other at some larger k.
About capacity it speaks only at k of CAPACITY_K or more with n >= 2k; let K be the largest such k.
  "capacity gain": tuned is established ahead at K.
  "sharpening without capacity gain": tuned is established ahead at k = 1; at K the interval's upper end is below the
      margin, so a gain of that size is excluded; and the base leaves room at K for twice the margin.
  "no capacity gain": likewise at K, but not established ahead at k = 1.
"Cannot tell" is no claim that there is no effect. All of it is about these two decodings: more than the base can do is
claimed against the base at its best temperature (azr/evals/frontier.py).
Left out: effects of training seeds, which need several trained runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from azr import passk
from azr.console import warn
from azr.jsonl import read_object, strict_lines

LEVEL = 0.05
CAPACITY_K = 16  # below it, more problems solved within k tries may just be surer answers
GRID = 64  # points of the curve on which a crossing is looked for
INTERVALS = "95 %, over problems: about other problems like these, not about other training runs"
FIGURES = ("SRR", "NDR")
SETS = ("both", "base_only", "tuned_only", "neither")


# ---------------------------------------------------------------- reading


@dataclass
class Graded:
    """One result directory: n verdicts a problem, problems in the order of their ids."""

    where: Path
    info: dict  # result.json
    ids: list[str]
    correct: np.ndarray  # (problems, n) bool
    answers: list[list[str | None]]  # (problems, n)
    truncated: np.ndarray  # (problems, n): 1 where the length limit ended the answer, NaN where that is not recorded

    @property
    def n(self) -> int:
        """The number of samples a problem has, the same for all problems."""
        return self.correct.shape[1]

    @property
    def c(self) -> np.ndarray:
        """The number of correct samples of each problem, (problems,)."""
        return self.correct.sum(axis=1)

    def first(self, n: int) -> Graded:
        """Only the first n samples of each problem."""
        answers = [row[:n] for row in self.answers]
        return Graded(self.where, self.info, self.ids, self.correct[:, :n], answers, self.truncated[:, :n])


def read(where: str | Path) -> Graded:
    """A result directory of `run` or `score`. ValueError, one line, if it is not one or is not finished."""
    where = Path(where)
    info = read_object(where / "result.json")
    problems = _read_rows(where / "graded.jsonl")
    counts = [len(rows) for rows in problems.values()]
    if info.get("problems", len(counts)) != len(counts):
        raise ValueError(
            f"{where}: graded.jsonl has {len(counts)} problems, result.json says {info['problems']}: finish the run"
        )
    n = min(counts)
    if n < max(counts):
        warn(f"{where}: between {n} and {max(counts)} samples a problem; only the first {n} of each are used")
    ids = sorted(problems)
    samples = [[problems[name][sample] for sample in sorted(problems[name])[:n]] for name in ids]
    correct, answers, truncated = ([[row[i] for row in rows] for rows in samples] for i in range(3))
    return Graded(where, info, ids, np.array(correct, dtype=bool), answers, np.array(truncated, dtype=float))


def _read_rows(path: Path) -> dict[str, dict[int, tuple]]:
    """{task_id: {sample: (correct, answer, truncated)}}; ValueError names the file and the line."""
    problems: dict[str, dict[int, tuple]] = {}
    seen: dict = {}  # one object for equal rows, of which there are many
    for where, line in strict_lines(path):
        task, sample, correct, answer = (line.get(key) for key in ("task_id", "sample", "correct", "answer"))
        known = isinstance(task, str) and type(sample) is int and type(correct) is bool
        if not (known and isinstance(answer, str | None)):
            raise ValueError(f"{where}: needs task_id (text), sample (number), correct (bool), answer (text or null)")
        rows, finish = problems.setdefault(task, {}), line.get("finish_reason")
        if sample in rows:
            raise ValueError(f"{where}: sample {sample} of {ascii(task)} is there twice")
        row = correct, answer, None if finish is None else finish == "length"
        rows[sample] = seen.setdefault(row, row)
    if not problems:
        raise ValueError(f"{path}: holds no samples")
    return problems


# ---------------------------------------------------------------- like with like


def check(base: Graded, tuned: Graded, any_temperature: bool = False) -> list[str]:
    """ValueError unless problems, template, decoding and base quantization are the same; notes on what is not known.

    Of the decoding every setting but the seed, and with `any_temperature` but the temperature. A temperature that was
    raised to match the base's entropy is said, not refused.
    """
    if base.ids != tuned.ids:
        odd = sorted(set(base.ids) ^ set(tuned.ids))
        raise ValueError(
            f"{base.where} and {tuned.where} are not about the same problems: {len(odd)} are in one only, "
            f"such as {ascii(odd[0])}"
        )
    notes = []
    keys = ["benchmark", "benchmark_file_hash", "template", "template_hash", "quantization"]
    if tuned.info.get("adapter") is not None:
        keys += ["base_model", "revision"]
    pairs = {key: (base.info.get(key), tuned.info.get(key)) for key in keys}
    a, b = (result.info.get("decoding") for result in (base, tuned))
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted({*a, *b} - {"seed", "match_entropy"} - ({"temperature"} if any_temperature else set()))
        if "temperature" in names and b.get("match_entropy") and a.get("temperature") != b.get("temperature"):
            names.remove("temperature")
            notes.append(
                f"the tuned model's temperature {b.get('temperature')} was matched to the base's entropy at "
                f"{a.get('temperature')}"
            )
        pairs |= {f"decoding ({name})": (a.get(name, "none"), b.get(name, "none")) for name in names}
    else:
        pairs["decoding"] = None, None
    for key, (of_base, of_tuned) in pairs.items():
        if of_base is None or of_tuned is None:
            notes.append(f"{key} is not recorded in both results, so it could not be checked")
        elif of_base != of_tuned:
            raise ValueError(
                f"{key} differs: {ascii(of_base)} in {base.where}, {ascii(of_tuned)} in {tuned.where}; "
                "compare like with like"
            )
    dtypes = [result.info.get("dtype") for result in (base, tuned)]
    if dtypes[0] != dtypes[1]:
        notes.append(f"dtype differs: {dtypes[0]} in {base.where}, {dtypes[1]} in {tuned.where}")
    if base.n == tuned.n and np.array_equal(base.correct, tuned.correct) and base.answers == tuned.answers:
        notes.append("every answer and verdict of the two results is the same")
    return notes


# ---------------------------------------------------------------- what is compared


def run(base: Graded, tuned: Graded, ks: list[int] | None = None, margin: float = 0.02) -> dict:
    """What compare.json holds of two results at one temperature each; the smaller n of them is used for both.

    ks: None for the powers of two up to n/2. ValueError: they cannot be compared, one problem alone, a k above n.
    """
    notes, n = check(base, tuned), min(base.n, tuned.n)
    for result in (base, tuned):
        if result.n > n:
            warn(f"{result.where}: has {result.n} samples a problem; only the first {n} are used, like the other's")
    base, tuned, ks = base.first(n), tuned.first(n), ks or passk.powers_of_two(n)
    if ks[-1] > n:
        raise ValueError(f"k = {ks[-1]} is beyond the {n} samples a problem has: take more samples, or a smaller --k")
    if len(base.ids) < 2:
        raise ValueError("one problem only: there is nothing to pair over")
    if 1 < n < 2 * ks[-1]:
        notes.append(f"n = {n} is less than 2k at k = {ks[-1]}: pass@k is close to a single draw a problem there")
    rows = curve_rows(base.c, tuned.c, n, ks)
    point = crossing(base.c, tuned.c, n, ks, rows)
    name, sentence = verdict(rows, point, n, margin)
    return {
        "verdict": name,
        "sentence": sentence,
        "base": str(base.where),
        "tuned": str(tuned.where),
        "benchmark": base.info.get("benchmark"),
        "problems": len(base.ids),
        "samples_per_problem": n,
        "margin": margin,
        "pass@k": rows,
        "crossing": point,
        "solved_in_n": solved_in_n(base, tuned),
        "sets": set_figures(base, tuned),
        "answers": answer_figures(base, tuned),
        "intervals": INTERVALS,
        "notes": notes,
    }


def curve_rows(c_base: np.ndarray, c_tuned: np.ndarray, n: int, ks: list[int], draws: int = passk.DRAWS) -> list[dict]:
    """A row a k: both pass@k, their paired difference, its sign-flip p, plain and corrected, and who is ahead."""
    values = [passk.pass_at_k(n, c, ks) for c in (c_base, c_tuned)]
    gain = values[1] - values[0]
    own = [passk.share_interval(v, draws=draws) for v in values]
    difference = passk.difference_interval(gain, draws=draws)
    p = passk.sign_flip_test(gain)
    corrected = passk.holm(p)
    rows = []
    for i, k in enumerate(ks):
        sure = bool(difference.excludes_zero[i]) and corrected[i] < LEVEL
        ahead = ("tuned" if difference.mean[i] > 0 else "base") if sure else None
        rows.append(
            {
                "k": k,
                "base": figure(own[0][i], values[0][:, i]),
                "tuned": figure(own[1][i], values[1][:, i]),
                "difference": figure(difference[i], gain[:, i]),
                "p": float(p[i]),
                "p_holm": float(corrected[i]),
                "ahead": ahead,
            }
        )
    return rows


def figure(interval: passk.Interval, values: np.ndarray) -> dict:
    """{"mean", "low", "high"} of (problems,) values, with "all_equal" where they leave a bootstrap nothing to resample:
    then the interval is Wilson's (of 0 or 1), Agresti and Min's (of no difference) or the rule of three's."""
    return interval.to_json() | ({"all_equal": True} if np.ptp(values) == 0 else {})


def verdict(rows: list[dict], point: dict | None, n: int, margin: float) -> tuple[str, str]:
    """Returns (name, sentence) as the module's docstring defines them. rows: of `curve_rows`; point: of `crossing`."""
    wide = [row for row in rows if row["k"] >= CAPACITY_K and 2 * row["k"] <= n]
    name, lead = who_leads(rows, point)
    capacity, claim = None, f"No claim about capacity: that takes k = {CAPACITY_K} or more and n >= 2k samples, "
    claim += f"here k is up to {rows[-1]['k']} and n = {n}."
    if wide:
        capacity, claim = about_capacity(rows, wide[-1], margin)
    shown = {
        row["k"]: passk.shown(row["difference"], sign=True) for row in (rows[0], (wide or rows)[-1])
    }  # one, if there is one k
    numbers = ", ".join(text if len(rows) == 1 else f"{text} at k = {k}" for k, text in shown.items())
    return capacity or name, f"{lead}: {numbers}. {claim}"


def who_leads(rows: list[dict], point: dict | None) -> tuple[str, str]:
    """Returns (name, words) for the established leads over the k of `rows`."""
    if point:
        low, high, ks = point["k"]["low"], point["k"]["high"], [row["k"] for row in rows]
        left, right = ("<= " if low <= ks[0] * 1.001 else ""), (">= " if high >= ks[-1] * 0.999 else "")
        first, then = ("ahead", "behind") if point["first"] == "tuned" else ("behind", "ahead")
        return "crosses", (
            f"Crosses at k = {point['k']['mean']:.1f} [{left}{low:.1f}, {right}{high:.1f}], tuned is {first} below and "
            f"{then} above"
        )
    words = {"tuned": "ahead", "base": "behind", None: "cannot tell"}
    ahead = {word: [row["k"] for row in rows if row["ahead"] == side] for side, word in words.items()}
    everywhere = "every k measured" if len(rows) > 1 else f"k = {rows[0]['k']}, the only k measured"
    places = {
        word: everywhere if len(ks) == len(rows) else f"k = {', '.join(map(str, ks))}"
        for word, ks in ahead.items()
        if ks
    }
    text = "; ".join(f"{word} at {where}" for word, where in places.items())
    sides = [word for word in places if word != "cannot tell"]
    name = "cannot tell" if not sides else " and ".join(sides) + (" at some k" if len(places) > 1 else " at every k")
    return name, text[0].upper() + text[1:]


def about_capacity(rows: list[dict], last: dict, margin: float) -> tuple[str | None, str]:
    """Returns (name or None, sentence) for the largest k at which something may be said of capacity."""
    k, missed = last["k"], 1 - last["base"]["mean"]
    if last["ahead"] == "tuned":
        return "capacity gain", f"Capacity gain at k = {k}."
    if missed < 2 * margin:
        return None, f"No room for a capacity gain: the base solves all but {100 * missed:.1f} % at k = {k}."
    if last["difference"]["high"] >= margin:
        return None, f"Capacity: cannot tell, a gain of {margin:g} or more at k = {k} is not excluded."
    sharper = rows[0]["k"] == 1 and rows[0]["ahead"] == "tuned"
    name = "sharpening without capacity gain" if sharper else "no capacity gain"
    why = "the base is ahead" if last["ahead"] == "base" else f"a gain of {margin:g} or more is excluded"
    return name, f"{name.capitalize()}: at k = {k} {why}."


def crossing(c_base, c_tuned, n: int, ks: list[int], rows: list[dict]) -> dict | None:
    """Where the lead changes, with its interval; None unless a lead is established on both sides.

    The curves' difference is followed on up to GRID values of k and is linear in log k between them; the last change
    of the lead counts. A resample without one counts at the end of the range where it would lie beyond.
    """
    leads = [row["ahead"] for row in rows if row["ahead"]]
    if not leads or leads[0] == leads[-1]:
        return None
    grid = np.unique(np.rint(np.geomspace(ks[0], ks[-1], GRID)).astype(int))
    sign = 1 if leads[0] == "tuned" else -1
    values = sign * (passk.pass_at_k(n, c_tuned, grid) - passk.pass_at_k(n, c_base, grid))
    interval = passk.bootstrap_statistic(values, lambda sums: _last_change(np.atleast_2d(sums), np.log(grid)))
    low, mean, high = (float(np.exp(np.squeeze(value))) for value in (interval.low, interval.mean, interval.high))
    return {"first": leads[0], "then": leads[-1], "k": {"mean": mean, "low": low, "high": high}}


def _last_change(lead: np.ndarray, log_k: np.ndarray) -> np.ndarray:
    """(rows,) log k where each row of (rows, grid) was last positive, interpolated; an end if never or always."""
    positive = lead > 0
    last = np.where(positive.any(axis=1), lead.shape[1] - 1 - np.argmax(positive[:, ::-1], axis=1), -1)
    i = np.clip(last, 0, lead.shape[1] - 2)
    rows = np.arange(len(lead))
    above, below = lead[rows, i], lead[rows, i + 1]
    inside = log_k[i] + (log_k[i + 1] - log_k[i]) * above / np.where(above > below, above - below, 1)
    return np.where(last < 0, log_k[0], np.where(last == lead.shape[1] - 1, log_k[-1], inside))


def solved_in_n(base: Graded, tuned: Graded) -> dict:
    """Which problems each solved at least once in its n samples, and McNemar's exact p (k = n, where it applies)."""
    a, b = base.c > 0, tuned.c > 0
    members = dict(zip(SETS, (a & b, a & ~b, ~a & b, ~a & ~b), strict=True))
    counts = {name: int(flags.sum()) for name, flags in members.items()}
    names = {name: [base.ids[i] for i in np.flatnonzero(members[name])] for name in ("base_only", "tuned_only")}
    return counts | {"mcnemar_p": passk.mcnemar(counts["base_only"], counts["tuned_only"]), "problems": names}


# ---------------------------------------------------------------- support: what was kept, lost and found


def set_figures(base: Graded, tuned: Graded, draws: int = passk.DRAWS) -> dict:
    """Shares of problems solved by both, one, neither, and the support retention and novel discovery rates SRR and NDR
    (arXiv 2507.14843, section 3), beside the same figures for a second sample of the base: two samples of ONE model
    already differ.

    Within h = n // 2 samples: the base is set against itself as the mean over all ways to split its samples in halves
    (exact, no draw), and against h of the tuned model's samples, also averaged.
    """
    n, h = base.n, base.n // 2
    if h < 1:
        return {"samples": 0, "second_base": None}
    solved = [passk.pass_at_k(n, result.c, h) for result in (base, tuned)]
    neither = 1 - passk.pass_at_k(n, base.c, 2 * h)
    alone = 1 - solved[0] - neither  # one half has a right answer, the other has none
    a, b = solved
    sets = [a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)]  # of independent samples: SETS
    columns = np.stack([*sets, solved[0] - alone, alone, alone, neither], axis=1)
    sums, difference = columns.sum(axis=0), _figure_difference(columns, draws)
    figures = {"samples": h, "second_base": "halves of the base's samples"}
    for i, name in enumerate([*SETS, *FIGURES]):
        values = {"tuned": _figures(sums[:4])[i], "second_base": _figures(sums[4:])[i]}
        known = {side: float(value) if math.isfinite(value) else None for side, value in values.items()}
        figures[name] = known | {"difference": difference[i].to_json()}
    return figures


def _figure_difference(columns: np.ndarray, draws: int) -> passk.Interval:
    """Tuned minus second base with its interval, (6,), from the sets of both, (problems, 8).

    Often a handful of problems decide, which a bootstrap of the ratios does not survive (it then found a difference
    between two samples of one model in half of all cases). So each problem's influence is taken from leaving it out,
    and the interval is `difference_interval` of these, in units in which a problem weighs at most about 1.
    """
    problems, sums = len(columns), columns.sum(axis=0)
    estimate = _gap(sums)
    influence = (problems - 1) * (estimate - _gap(sums - columns))
    finite = np.isfinite(influence).all(axis=0)
    solved = min(sums[0] + sums[2], sums[4] + sums[6], sums[0] + sums[1]) / problems
    unit = np.array([1, 1, 1, 1, *np.ones(2) / max(solved, 1 / problems)])
    around = passk.difference_interval(np.where(finite, influence, 0) / unit, draws=draws)
    low, high = (np.where(finite, estimate + unit * end, np.nan) for end in (around.low, around.high))
    return passk.Interval(estimate, low, high)


def _gap(sums: np.ndarray) -> np.ndarray:
    """Tuned minus second base of (..., 8) sums, (..., 6)."""
    return _figures(sums[..., :4]) - _figures(sums[..., 4:])


def _figures(sums: np.ndarray) -> np.ndarray:
    """The four shares and FIGURES of the sums of SETS, (..., 4) to (..., 6); NaN where nothing is solved."""
    both, base_only, other_only, neither = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        srr, ndr = both / (both + base_only), other_only / (both + other_only)
    total = both + base_only + other_only + neither
    return np.stack([both / total, base_only / total, other_only / total, neither / total, srr, ndr], axis=-1)


# ---------------------------------------------------------------- summaries


def pair(a: np.ndarray, b: np.ndarray, most: float | None = None) -> dict:
    """{"base", "tuned", "difference"} of two (problems,) columns of shares, or of values from 0 to `most`."""
    own, paired = passk.share_interval, passk.difference_interval
    if most is not None:
        own, paired = (partial(passk.bootstrap_interval, ends=ends) for ends in ((0, most), (-most, most)))
    return {"base": figure(own(a), a), "tuned": figure(own(b), b), "difference": figure(paired(b - a), b - a)}


def answer_figures(base: Graded, tuned: Graded) -> dict:
    """Means over problems of the distinct correct answers and of the entropy of all answers (nats), at equal n.

    None where a result does not record it; entropy over the problems for which both have one.
    """
    cut = [each.truncated.mean(axis=1) for each in (base, tuned)]
    result = {"truncated": pair(*cut) if np.isfinite(cut).all() else None}
    if not all(any(answer is not None for row in each.answers for answer in row) for each in (base, tuned)):
        return result | {"distinct_correct": None, "entropy": None}
    distinct = [
        np.array([passk.distinct_correct(*rows) for rows in zip(each.answers, each.correct, strict=True)], dtype=float)
        for each in (base, tuned)
    ]
    entropy = np.array([[passk.answer_entropy(row) for row in each.answers] for each in (base, tuned)])
    finite = np.isfinite(entropy).all(axis=0)
    return result | {
        "distinct_correct": pair(*distinct, most=base.n),
        "entropy": pair(*entropy[:, finite], most=math.log(base.n)) if finite.any() else None,
        "entropy_problems": int(finite.sum()),
    }

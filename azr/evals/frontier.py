"""One model at several temperatures, pass@1 against pass@k, and two models each at its best one.

    points = read("runs/base")                 # {1.0: Graded, 0.8: Graded, ..., 0.0: Graded}, the hottest first
    frontier = figures(points)                 # what frontier.json holds
    result = against(points, read("runs/tuned"))        # what compare.json holds

A lower temperature raises pass@1 and costs pass@k, for nothing. So "more than the base can do" is claimed against the
base at its BEST temperature, greedy included: pass@1 of each model at its own best temperature, and pass@k of each at
its own best one, for the largest power of two k with n >= 2k, in pairs over problems. The best are taken on the very
problems that are compared, on both sides, which favours the side with more temperatures; with six each, two samples of
one model differ less often than the level of the interval says (tests/evals/test_frontier.py).
Greedy takes one answer a problem and has no pass@k: more of the same answer.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import numpy as np

from azr import passk
from azr.console import say
from azr.evals import compare, compare_view
from azr.evals.compare import CAPACITY_K, Graded
from azr.jsonl import read_object, replacing, write_json_atomic

LADDER = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)  # what a claim against the base needs
Points = dict[float, Graded]


# ---------------------------------------------------------------- reading


def temperatures_in(where: Path) -> dict[float, Path]:
    """{temperature: directory} of WHERE/T1, WHERE/T0.8 and so on that `run` has begun, the hottest first."""
    places = {}
    for path in where.glob("T*"):
        try:
            places[float(path.name[1:])] = path
        except ValueError:  # something else whose name begins with T
            continue
    begun = {t for t, path in places.items() if any((path / f"{name}.json").is_file() for name in ("config", "result"))}
    return {t: places[t] for t in sorted(begun, reverse=True)}


def read(where: str | Path) -> Points:
    """The results at one temperature (WHERE/result.json) or several. ValueError, one line: none, unfinished, unlike."""
    where = Path(where)
    alone = any((where / name).is_file() for name in ("result.json", "config.json"))  # the latter of a run's too
    places = [where] if alone else list(temperatures_in(where).values())
    model = (where / "config.json").is_file() and "benchmark" not in read_object(where / "config.json")
    if not places or model or (where / "metrics.jsonl").exists():
        raise ValueError(f"{where}: no result directory of `eval_passk.py run` or `score`: it has no result.json")
    if absent := [path for path in places if not (path / "result.json").is_file()]:
        raise ValueError(f"{absent[0]}: is not finished; repeat the command that made it")
    points = {temperature(result): result for result in map(compare.read, places)}
    first, *others = points.values()
    for other in others:
        compare.check(first, other, any_temperature=True)
        if other.info.get("adapter") != first.info.get("adapter"):
            raise ValueError(f"{other.where} and {first.where} are results of different adapters")
    return points


def temperature(result: Graded) -> float:
    """The temperature of a result; NaN where none is recorded."""
    t = (result.info.get("decoding") or {}).get("temperature")
    return float(t) if type(t) in (int, float) else math.nan


# ---------------------------------------------------------------- one model


def figures(points: Points, ks: list[int] | None = None) -> dict:
    """What frontier.json holds: at each temperature pass@1, pass@k and the share of answers that are the greedy one,
    with intervals over problems. ks: k is the largest of them with n >= 2k; None: of the powers of two."""
    k, greedy, rows = largest_k([points], ks), points.get(0.0), {}
    for t, result in points.items():
        rows[f"{t:g}"] = {
            "samples_per_problem": result.n,
            "pass@1": _interval(solved(result, 1)),
            "pass@k": _interval(solved(result, k)) if t and k else None,
            "greedy_share": _interval(_same(result, greedy)) if t and greedy else None,
        }
    first = next(iter(points.values()))
    return {
        "benchmark": first.info.get("benchmark"),
        "model": first.info.get("model"),
        "adapter": first.info.get("adapter"),
        "problems": len(first.ids),
        "k": k,
        "best": {"pass@1": best(points, 1), "pass@k": best(points, k) if k else None},
        "temperatures": rows,
    }


def conclude(out: Path, ks: list[int] | None) -> None:
    """Writes OUT/frontier.json and frontier.png about all temperatures in OUT, and shows them as a table."""
    result = figures(read(out), ks)
    write_json_atomic(out / "frontier.json", result)
    side = "tuned" if result["adapter"] else "base"
    with replacing(out / "frontier.png") as file:
        file.write(compare_view.frontier_plot({side: result["temperatures"]}, result["k"], result["problems"]))
    for line in compare_view.frontier_table(result).splitlines():
        say(line)
    one, many = (result["best"][name] for name in ("pass@1", "pass@k"))
    say(f"best: pass@1 {named(one)}" + (f", pass@{result['k']} {named(many)}" if many is not None else ""))
    say(
        f"written: {out / 'frontier.json'}, {out / 'frontier.png'}; a result directory for each temperature beside them"
    )


def largest_k(sides: list[Points], ks: list[int] | None = None) -> int | None:
    """The largest k above 1 with n >= 2k for every result that is not greedy; None if there is none."""
    n = min((result.n for points in sides for t, result in points.items() if t), default=0)
    return max((k for k in ks or passk.powers_of_two(max(1, n)) if k > 1 and 2 * k <= n), default=None)


def solved(result: Graded, k: int) -> np.ndarray:
    """(problems,) pass@k."""
    return passk.pass_at_k(result.n, result.c, k)


def best(points: Points, k: int) -> float:
    """The temperature with the highest pass@k over all problems, the lowest such; greedy counts at k = 1 only."""
    return min((t for t in points if t or k == 1), key=lambda t: (-solved(points[t], k).mean(), t))


def _same(result: Graded, greedy: Graded) -> np.ndarray:
    """(problems,) share of the answers that are the greedy one in normal form; none is like no other."""
    return np.array(
        [
            np.mean([x is not None and x == row[0] for x in answers])
            for answers, row in zip(result.answers, greedy.answers)
        ]
    )


def _interval(values: np.ndarray) -> dict:
    return compare.figure(passk.share_interval(values), values)


# ---------------------------------------------------------------- two models


def run(a: str | Path, b: str | Path, ks: list[int] | None = None, margin: float = 0.02) -> dict:
    """What compare.json holds, of two result directories, each at one temperature or at several; ValueError, one line,
    if they cannot be compared."""
    base, tuned = read(a), read(b)
    one_each = len(base) == len(tuned) == 1
    result = compare.run(*base.values(), *tuned.values(), ks, margin) if one_each else against(base, tuned, ks, margin)
    return result | {"base": str(a), "tuned": str(b), "needs": needs(base, tuned, Path(a))}


def against(base: Points, tuned: Points, ks: list[int] | None = None, margin: float = 0.02) -> dict:
    """What compare.json holds where one of the two at least has several temperatures. ValueError: results that are not
    alike, or do not say their temperature."""
    first, notes = next(iter(base.values())), []
    for result in tuned.values():
        notes += compare.check(first, result, any_temperature=True)
    if silent := [points[t].where for points in (base, tuned) for t in points if math.isnan(t)]:
        raise ValueError(f"{silent[0]}: result.json does not say at which temperature the samples were made")
    if len(first.ids) < 2:
        raise ValueError("one problem only: there is nothing to pair over")
    k, rows = largest_k([base, tuned], ks), {}
    for t in sorted({*base, *tuned}, reverse=True):
        sides = base.get(t), tuned.get(t)
        rows[f"{t:g}"] = {"pass@1": _pair(*sides, 1), "pass@k": _pair(*sides, k) if t and k else None}
    at_best = {"pass@1": _at_best(base, tuned, 1), "pass@k": _at_best(base, tuned, k) if k else None}
    verdicts, sentence = verdict(at_best, (len(base), len(tuned)), k, margin)
    return {
        "verdict": verdicts,
        "sentence": sentence,
        "benchmark": first.info.get("benchmark"),
        "problems": len(first.ids),
        "k": k,
        "margin": margin,
        "best": at_best,
        "temperatures": rows,
        "intervals": compare.INTERVALS,
        "notes": list(dict.fromkeys(notes)),
    }


def _pair(base: Graded | None, tuned: Graded | None, k: int) -> dict:
    """`compare.pair` of pass@k; None for a side that was not measured there, and for the difference then."""
    if base and tuned:
        return compare.pair(solved(base, k), solved(tuned, k))
    alone = {name: _interval(solved(one, k)) for name, one in (("base", base), ("tuned", tuned)) if one}
    return {"base": None, "tuned": None, "difference": None} | alone


def _at_best(base: Points, tuned: Points, k: int) -> dict | None:
    """`_pair` with each side at its own best temperature; None if one side was measured greedily only and k > 1."""
    if k > 1 and not (any(base) and any(tuned)):
        return None
    a, b = best(base, k), best(tuned, k)
    return {"base_temperature": a, "tuned_temperature": b} | _pair(base[a], tuned[b], k)


def verdict(at_best: dict, counts: tuple[int, int], k: int | None, margin: float) -> tuple[dict, str]:
    """Returns ({"pass@1", "coverage"}, sentences): "above", "below" or "cannot tell", by whether the interval leaves
    out 0; coverage None where k or the samples do not allow a claim. counts: temperatures of the base and of tuned."""
    one, many = at_best["pass@1"], at_best["pass@k"]
    of = (f"its best of {count} temperatures" if count > 1 else "its only temperature" for count in counts)
    base, tuned = (f"{place} ({named(one[f'{side}_temperature'])})" for place, side in zip(of, ("base", "tuned")))
    first = place_of(one["difference"])
    lead = f"Cannot tell tuned at {tuned} from" if first == "cannot tell" else f"Tuned at {tuned} is {first}"
    lead += f" the base at {base}: pass@1 {passk.shown(one['difference'], sign=True)}."
    if many is None or k < CAPACITY_K:
        claim = f"No claim about coverage: that takes k = {CAPACITY_K} or more, and n >= 2k samples above temperature 0"
        return {"pass@1": first, "coverage": None}, f"{lead} {claim}{f', here k is {k}' if k else ''}."
    then, gain = place_of(many["difference"]), many["difference"]
    places = f"{named(many['tuned_temperature'])} against {named(many['base_temperature'])}"
    text = f"pass@{k} {passk.shown(gain, sign=True)} ({places})"
    missed = 1 - many["base"]["mean"]
    if then != "cannot tell":
        claim = f"Its coverage is {then} {'all that' if then == 'above' else 'what'} the base reaches: {text}."
    elif gain["high"] < margin and missed >= 2 * margin:
        claim = f"No more coverage than the base reaches: {text}, a gain of {margin:g} or more is excluded."
    else:
        room = f"; the base leaves no room, it solves all but {100 * missed:.1f} %" if missed < 2 * margin else ""
        claim = f"Coverage: cannot tell, {text}{room}."
    return {"pass@1": first, "coverage": then}, f"{lead} {claim}"


def place_of(difference: dict) -> str:
    """Puts a difference with its interval into words."""
    return "above" if difference["low"] > 0 else "below" if difference["high"] < 0 else "cannot tell"


def named(t: float) -> str:
    """A temperature in words."""
    return f"T {t:g}" if t else "greedy"


# ---------------------------------------------------------------- what is missing


def needs(base: Points, tuned: Points, where: Path) -> str | None:
    """A line where the base lacks temperatures that a claim against it needs, with the command that measures them."""
    lacks = {*(LADDER if len(base) == 1 else (*tuned, 0.0))} - {*base}
    if not lacks:
        return None
    text = "More than the base can do is claimed against its best temperature, greedy included; it was measured "
    if any(map(math.isnan, base)):
        return text + "at one that is not recorded."
    text += f"at {', '.join(f'{t:g}' for t in base)} only"
    if not next(iter(base.values())).info.get("base_model"):  # samples made elsewhere
        return f"{text}."
    return f"{text}: {command(base, sorted({*base, *lacks}, reverse=True), where)}"


def command(base: Points, temperatures: list[float], where: Path) -> str:
    """The command line that measures `base` at these temperatures as it was measured at its own."""
    from azr.evals.benchmarks import load

    info, n = next(iter(base.values())).info, max(result.n for result in base.values())
    decoding, name = info["decoding"], info["benchmark"]
    if name == "tiny" and info.get("benchmark_file_hash") != load("tiny").file_hash:
        name = "tiny=FILE"
    given = {
        "--model": info.get("base_model"),
        "--adapter": info.get("adapter"),
        "--benchmark": name,
        "--limit": info.get("problems"),
        "--samples": max(n, 2 * CAPACITY_K),
        "--temperature": ",".join(f"{t:g}" for t in temperatures),
        "--top-p": decoding.get("top_p"),
        "--max-new-tokens": decoding.get("max_new_tokens"),
        "--seed": decoding.get("seed") or None,
        "--template": info.get("template"),
        "--quantization": info.get("quantization"),
        "--dtype": info.get("dtype"),
        "--out": where if len(base) > 1 else f"{where}-temperatures",
    }
    words = (f"{flag} {shlex.quote(str(value))}" for flag, value in given.items() if value is not None)
    return f"python eval_passk.py run {' '.join(words)}"

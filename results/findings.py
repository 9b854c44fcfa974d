"""Tables and plots of RESULTS.md from results/arms/ARM-SEED.json: `python results/findings.py`.

Replaces what stands between `<!-- NAME -->` and `<!-- end -->` in RESULTS.md and draws results/plots/*.png. No torch.
Unless a table says otherwise, an interval is Student's t over training seeds, 95 %: it is about other seeds on the same
held-out tasks, and the n in brackets behind an arm is the number of seeds. Two arms are compared by the differences of
runs with the same seed. Every arm has a spread of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]

from azr.fits import linear_fit, over_runs
from azr.passk import Interval, difference_interval
from gate_numbers import LEVELS, level
from measured import (
    EARLY,
    HELD,
    KS,
    LONG,
    MODES,
    RATES,
    TEMPERATURES,
    Arms,
    accuracy,
    available,
    best_temperature,
    gate,
    greedy,
    is_full,
    last,
    less,
    load,
    over_seeds,
    paired,
    show,
    solved,
    solved_or_none,
    table,
    tasks,
    titled,
    traced,
)

FEW_ARMS = ("joint", "rlvr", "sft", "sft-traces")  # where what the others show is what joint shows
FOREIGN = ("sft-operations", "sft-worded")  # their text is foreign to the model: only what they do to it is of interest
LONGER = ("joint", "no-update", "frozen-base", "separate", "rlvr", "sft-traces")  # ran for twice the steps too
OFTEN = 0.01  # of its answers are right: a task that is solved more than now and then
MARGIN = 0.2  # two arms are called alike within this share of what joint gains


# ---------------------------------------------------------------- the tables


def brief(arms: Arms, *more: str) -> list[str]:
    """Of the arms that were sampled from, those of FEW_ARMS and others by name."""
    return [name for name in available(arms, "sampled") if name in (*FEW_ARMS, *more)]


def familiar(arms: Arms, key: str) -> list[str]:
    """The arms in which this was measured, but for FOREIGN."""
    return [name for name in available(arms, key) if name not in FOREIGN]


def learned(arms: Arms) -> str:
    """Greedy accuracy against the untrained model greedy, at its best temperature and made to think in full."""
    base, (best, at_best), full = arms["base"][0], best_temperature(), gate("forced", "full T0").of("deduction")
    rows = []
    for name in (name for name in available(arms) if arms[name][0]["sampled"] or name == "azr"):
        results = arms[name]
        gain = np.mean([greedy(result) for result in results], axis=0) - greedy(base)
        cells = [over_seeds(results, accuracy, sign=False)]
        cells += [over_seeds(results, lambda r: (greedy(r) - greedy(base)).mean()), show(difference_interval(gain))]
        cells += [over_seeds(results, lambda r: less(r, at_best)), over_seeds(results, lambda r: less(r, full))]
        cells += [f"{np.mean([traced(r) for r in results]):.2f}"]
        rows.append([titled(arms, name), *cells])
    head = [f"arm (seeds); base: {accuracy(base):.3f}", "greedy, 2,100 tasks", "less base greedy, over seeds"]
    head += ["the same, over tasks"]
    head += [
        f"less base at its best, T {best}, {len(at_best)} tasks",
        f"less base forced to think, {len(full)} deductions",
    ]
    return table([*head, f"worked-out thoughts; base: {traced(base):.3f}"], rows)


def by_mode(arms: Arms) -> str:
    """Gain in greedy accuracy by mode and by number of statements."""
    base, mode = arms["base"][0], np.array([task.mode for task in tasks()])
    size = np.array([level(task) for task in tasks()])
    masks = {m: mode == m for m in MODES} | {f"{n} st." if n < 7 else "7-8 st.": size == n for n in LEVELS}
    rows = []
    for name in brief(arms):
        cells = []
        for what, mask in masks.items():
            gains = [(greedy(r) - greedy(base))[mask].mean() for r in arms[name]]
            cells.append(show(over_runs(gains)) if what in MODES else f"{np.mean(gains):+.3f}")
        rows.append([titled(arms, name), *cells])
    return table(["arm (seeds)", *masks], rows)


def coverage(arms: Arms) -> str:
    """pass@k at temperature 1, less the untrained model's."""
    base = {k: np.mean([solved(result, k) for result in arms["base"]], axis=0) for k in KS}
    rows = [["base", *(f"{base[k].mean():.3f}" for k in KS), ""]]
    for name in familiar(arms, "sampled"):
        results = arms[name]
        cells = [over_seeds(results, lambda r, k=k: (solved(r, k) - base[k]).mean()) for k in KS]
        tasks_too = show(difference_interval(np.mean([solved(r, 32) for r in results], axis=0) - base[32]))
        rows.append([titled(arms, name), *cells, tasks_too])
    return table([f"arm (seeds), {len(base[1])} tasks", *(f"k = {k}" for k in KS), "k = 32, over tasks"], rows)


def frontier(arms: Arms) -> str:
    """pass@1 against pass@16 at every temperature."""
    rows = []
    for name in ("base", *available(arms, "sampled")):
        wide = [result for result in arms[name] if set(TEMPERATURES) <= {*result["sampled"], "0"}]
        if wide:
            points = [[np.mean([solved(r, k, t).mean() for r in wide]) for k in (1, 16)] for t in TEMPERATURES]
            rows.append([f"{name} ({len(wide)})", *(f"{one:.3f}, {many:.3f}" for one, many in points)])
    return table(["pass@1, pass@16 of (seeds)", *(f"T {t}" for t in TEMPERATURES)], rows)


def early(arms: Arms) -> str:
    """After few steps: who has learned more by then?"""
    base, rows, joint = arms["base"][0], [], f"joint{EARLY}"
    for name in sorted((name for name in arms if name.endswith(EARLY)), key=lambda name: name != joint):
        cells = []
        for value in (lambda r: accuracy(r) - accuracy(base), traced):
            cells += [over_seeds(arms[name], value, sign=value is not traced)]
            cells += ["" if name == joint else show(paired(arms, name, joint, value))]
        rows.append([titled(arms, name).replace(EARLY, ""), *cells])
    head = [f"after {EARLY[1:]} steps (seeds)", "greedy, less base", "less joint", "worked-out thoughts", "less joint"]
    return table(head, rows)


def leash(_arms: Arms) -> str:
    """Of the tasks that the untrained model never solved in all its tries: what training solves, or being made to
    think. `results/reach.py` measured them."""
    parts = json.loads((RESULTS / "reach.json").read_text())["parts"]
    search = parts.pop("base")["rows"]
    most, mode = max(n for _, n, _ in search), {place: tasks()[place].mode for place, _, _ in search}
    never = {m: [place for place, _, right in search if not right and mode[place] == m] for m in MODES}
    rows = []
    names = dict.fromkeys(name.partition("/")[0] for name in parts)
    for name in sorted(names, key=lambda name: not name.startswith("base")):
        runs = [part for key, part in parts.items() if key.partition("/")[0] == name]
        right = [{place: (r, n) for place, n, r in run["rows"]} for run in runs]
        cells = [str(right[0][next(iter(right[0]))][1]), f"{np.mean([run['tokens'] for run in runs]):.0f}"]
        for m in MODES:
            made = [[run[place] for place in never[m] if place in run] for run in right]
            some = np.mean([sum(r > 0 for r, _ in run) for run in made])
            often = np.mean([sum(r >= OFTEN * n for r, n in run) for run in made])
            cells.append(f"{some:.1f}, {often:.1f}" if made[0] else "-")
        rows.append([f"{name} ({len(runs)})", *cells])
    head = ["who (samples or seeds)", "answers a task", "tokens an answer"]
    made = table([*head, *(f"{len(never[m])} {m}s: once, in {OFTEN:.0%}" for m in MODES)], rows)
    asked = ", ".join(f"{sum(value == m for value in mode.values())} {m}s" for m in MODES)
    return f"{made}\n\nTasks that the untrained model solved in none of {most:,} answers at temperature 1; of {asked}."


def entropy(arms: Arms) -> str:
    """Entropy of each role on its own samples and on the frozen probe, and less joint's at the end."""
    rows = []
    for name in familiar(arms, "probe"):
        own, less_joint, probe = [], [], []
        for role in ("proposer", "solver"):
            series = f"{role}/all/entropy"
            if series in arms[name][0]["series"] and not name.startswith("sft"):  # whose series is about given text
                first = np.mean([r["series"][series][0] for r in arms[name]])
                own.append(f"{first:.3f} -> {over_seeds(arms[name], last(series), sign=False)}")
                less_joint.append("" if name == "joint" else show(paired(arms, name, "joint", last(series))))
            else:
                own, less_joint = [*own, "-"], [*less_joint, "-"]
            probe.append(over_seeds(arms[name], lambda r, role=role: probe_change(r, role)))
        rows.append([titled(arms, name), *own, *less_joint, *probe])
    head = ["arm (seeds)", "proposer, own samples, first and last 10 steps", "solver, own samples"]
    head += ["proposer less joint", "solver less joint", "probe, proposer: change", "probe, solver: change"]
    return table(head, rows)


def held(arms: Arms) -> str:
    """What controls of entropy do to the entropies of own samples in the last steps, and to greedy accuracy."""
    rows = []
    for name in (name for name in HELD if name in arms):
        entropies = [last(f"{role}/all/entropy") for role in ("solver", "proposer")]
        cells = [show(paired(arms, name, "joint", value)) for value in (*entropies, accuracy)]
        built = name in HELD[-2:] and "minibatches" in arms
        cells += [show(paired(arms, name, "minibatches", entropies[0])) if built else ""]
        rows.append([titled(arms, name), *cells, over_seeds(arms[name], statements_change, 2)])
    head = ["less joint (seeds)", "solver's entropy", "proposer's entropy", "greedy", "solver's, less minibatches"]
    return table([*head, "statements: change"], rows)


def probe_change(result: dict, role: str) -> float | None:
    """Entropy on the frozen probe after the training minus before; None where it was not measured."""
    if "probe" not in result:
        return None
    before, after = (result["probe"][step][f"{role}/all"] for step in sorted(result["probe"], key=int))
    return after - before


def proposed(arms: Arms) -> str:
    """Do proposals get harder? Their length and how often the untrained model solves them, first and last steps."""
    rows = []
    for name in available(arms):
        results = [r for r in arms[name] if r["proposals"]]
        if not results:
            continue
        first, change = [], []
        for key in ("statements", "depth"):
            first.append(f"{np.mean([r['proposals'][key][0] for r in results]):.2f}")
            change.append(over_seeds(results, lambda r, key=key: r["proposals"][key][-1] - r["proposals"][key][0], 2))
        rate = over_seeds(results, rate_change)
        start = f"{np.mean([r['proposals']['base_rate'][0]['mean'] for r in results]):.3f}"
        less_joint = "" if name == "joint" else show(paired(arms, name, "joint", rate_change))
        rows.append([titled(arms, name), first[0], change[0], first[1], change[1], start, rate, less_joint])
    head = ["arm (seeds)", "statements", "change", "depth of the tree", "change"]
    head += ["the untrained model solves", "change", "change less joint's"]
    return f"{table(head, rows)}\n\n{goes_with_accuracy(arms)}"


def goes_with_accuracy(arms: Arms) -> str:
    """R^2 of a run's greedy accuracy against what its proposals and its thoughts became."""
    runs = [r for name in available(arms) for r in arms[name] if r["proposals"]]
    columns = {
        "the change of statements": statements_change,
        "how much more often the untrained model solves them": rate_change,
        "the share of worked-out thoughts": traced,
    }
    y = [accuracy(r) for r in runs]
    fits = []
    for what, of in columns.items():
        x = [np.nan if (value := of(r)) is None else value for r in runs]
        fits.append(f"{what} {show(linear_fit(x, y).r2, 2, sign=False)}")
    return f"R^2 of the greedy accuracy of the {len(runs)} runs of these arms: {'; '.join(fits)}."


def rate_change(result: dict) -> float | None:
    """How much more often the untrained model solves the last proposals than the first; None without proposals."""
    if not result["proposals"] or None in (rates := result["proposals"]["base_rate"]):
        return None
    return rates[1]["mean"] - rates[0]["mean"]


def longer(arms: Arms) -> str:
    """After twice the steps, of self-play, RLVR and SFT: less the base, and less the same arm after the usual ones."""
    base, rows = {k: np.mean([solved(result, k) for result in arms["base"]], axis=0) for k in (1, 32)}, []
    for name in sorted((name for name in LONGER if name + LONG in arms), key=LONGER.index):
        runs = arms[name + LONG]
        cells = [over_seeds(runs, lambda r: (greedy(r) - greedy(arms["base"][0])).mean())]
        cells += [over_seeds(runs, lambda r, k=k: (solved(r, k) - base[k]).mean()) for k in base]
        cells += [show(paired(arms, name + LONG, name, lambda r: solved_or_none(r, 32)))]
        cells += [over_seeds(runs, statements_change, 2), over_seeds(runs, rate_change)]
        cells += [over_seeds(runs, lambda r, role=role: probe_change(r, role)) for role in ("proposer", "solver")]
        rows.append([titled(arms, name + LONG), *cells])
    head = ["less base (seeds)", "greedy", "k = 1", "k = 32", "k = 32, less 80 steps", "statements: change"]
    return table([*head, "the untrained model solves: change", "probe, proposer: change", "solver"], rows)


def statements_change(result: dict) -> float | None:
    """How many statements more the last proposals have than the first; None without proposals."""
    if not result["proposals"]:
        return None
    first, *_, final = result["proposals"]["statements"]
    return final - first


def lengths(arms: Arms) -> str:
    """Tokens of a greedy answer to frozen tasks, by number of statements."""
    rows = [["base", *(f"{x:.0f}" for x in arms["base"][0]["greedy"]["tokens"])]]
    for name in brief(arms):
        tokens = np.mean([r["greedy"]["tokens"] for r in arms[name]], axis=0)
        rows.append([titled(arms, name), *(f"{x:.0f}" for x in tokens)])
    return table(["arm (seeds)", *(f"{n} st." if n < 7 else "7-8 st." for n in LEVELS)], rows)


def compared(arms: Arms) -> str:
    """Each arm less joint, by pairs of one seed."""
    base = arms["base"][0]
    gain = np.mean([accuracy(r) for r in arms["joint"]]) - accuracy(base)
    rows = []
    for name in available(arms, aside=True):
        if name != "joint":
            both = {r["seed"] for r in arms[name]} & {r["seed"] for r in arms["joint"]}
            one = paired(arms, name, "joint", accuracy)
            cells = [show(one), verdict(one, MARGIN * gain)]
            cells += [show(paired(arms, name, "joint", lambda r, k=k: solved_or_none(r, k))) for k in (1, 32)]
            tokens = [np.mean(r["series"]["train/tokens"]) for r in arms[name]]
            rows.append([name, str(len(both)), *cells, f"{np.mean(tokens):,.0f}"])
    head = [
        "less joint",
        "seeds",
        "greedy",
        f"verdict (alike: within {MARGIN * gain:.3f}, {MARGIN:.0%} of joint's gain)",
    ]
    return table([*head, "pass@1, T 1", "pass@32, T 1", "trained tokens a step"], rows)


def rates(arms: Arms) -> str:
    """What joint and the published recipe gain at other rates, and after twice the steps."""
    base, rows = arms["base"][0], []
    for arm in ("joint", "azr"):
        names = [arm if rate == "1e-3" else f"{arm}-{rate}" for rate in RATES] + [arm + LONG]
        cells = [
            f"{over_seeds(arms[name], lambda r: (greedy(r) - greedy(base)).mean())} ({len(arms[name])})"
            if name in arms
            else "-"
            for name in names
        ]
        rows.append([arm, *cells])
    return table(["greedy, less base (seeds)", *RATES, "1e-3, 160 steps"], rows)


def verdict(interval: Interval, margin: float) -> str:
    """more, fewer, alike or cannot tell; all that an interval allows."""
    if not np.isfinite(interval.low):
        return "one seed"
    inside = -margin < interval.low and interval.high < margin
    if interval.low > 0 or interval.high < 0:
        return ("more" if interval.mean > 0 else "less") + (", and alike within the margin" if inside else "")
    return "alike" if inside else "cannot tell"


def updates(arms: Arms) -> str:
    """Size of the update of each arm of adapters, and what of the weights is unchanged."""
    rows = []
    for name in brief(arms, *FOREIGN):
        part = [r["update"] for r in arms[name]]
        cells = [f"{np.mean([u['U1_rms'] for u in part]):.1e}", f"{np.mean([u['U1_rel_fro'] for u in part]):.3f}"]
        cells += [f"{100 * np.mean([u['S1'] for u in part]):.1f} %"]
        cells += [f"{100 * np.mean([u['at_rms_3e-5']['S1'] for u in part]):.1f} %"]
        cells += [show(over_runs([u["S5"]["excess"] for u in part]), 4)]
        rows.append([titled(arms, name), *cells])
    head = ["arm (seeds)", "RMS of the change", "norm / base's", "S1", "S1 at RMS 3e-5", "S5: S1 less null's"]
    return table(head, rows)


def every_weight(arms: Arms) -> str:
    """The same for trainings of every weight, by learning rate and dtype; means over seeds."""
    rows = []
    for name in sorted((n for n in arms if is_full(n)), key=_rate_first):
        part = [r["update"] for r in arms[name]]
        _, rate, dtype = _rate_first(name)
        share = [f"{100 * np.mean([u[key] for u in part]):.1f} %" for key in ("S0", "S1", "S2")]
        # what bf16 has stored is rounded already: scaled, it would say how often, not how much
        scaled = [u["at_rms_3e-5"]["S1"] for u in part if dtype == "fp32"]
        share += [f"{100 * np.mean(scaled):.1f} %" if scaled else "-"]
        share += [over_seeds(part, lambda u: u["S5"] and u["S5"]["excess"], 4)]
        ends = [accuracy[max(accuracy, key=int)] for r in arms[name] if (accuracy := r["accuracy"])]
        cells = [f"{np.mean([u['U1_rms'] for u in part]):.1e}", *share, f"{np.mean(ends):.3f}" if ends else "-"]
        arm = name.removeprefix("full-").rsplit("-", 3)[0]
        rows.append([f"{arm} ({len(part)})", rate, dtype, *cells])
    head = ["arm (seeds)", "learning rate", "weights", "RMS of the change", "S0", "S1", "S2", "S1 at RMS 3e-5", "S5"]
    return table([*head, "greedy"], rows)


def _rate_first(name: str) -> tuple[str, str, str]:
    """(dtype and rate for sorting, learning rate, dtype) of full-ARM-1e-6-bf16."""
    _, base, exponent, dtype = name.rsplit("-", 3)
    rate = f"{base}-{exponent}"
    return f"{dtype} {9 - int(exponent)} {name}", rate, dtype


def forgotten(arms: Arms) -> str:
    """What was lost of a skill that no arm trains, and what goes with it over runs."""
    rows = []
    for name in available(arms, "forgetting"):
        cells = [over_seeds(arms[name], lambda r: 100 * (r["forgetting"]["skill_base"] - r["forgetting"]["skill"]), 1)]
        cells += [over_seeds(arms[name], new_task, sign=False)]
        cells += [over_seeds(arms[name], lambda r: r["forgetting"]["kl_forward/untrained"], sign=False)]
        rows.append([titled(arms, name), *cells])
    head = ["arm (seeds)", "skill lost, points", "forward KL, new task", "forward KL, that skill's text"]
    return f"{table(head, rows)}\n\n{predictors(arms)}"


def new_task(result: dict) -> float:
    """KL(base || policy) a token on the prompts that were trained on: the probe's solver prompts are such, but for an
    arm whose tasks are others."""
    return result["forgetting"].get("kl_forward/new", result["forgetting"]["kl_forward/solver"])


def predictors(arms: Arms) -> str:
    """R^2 of the loss against each predictor, the last checkpoint of every run a point; with the arms whose text is
    foreign to the model, which lose much, and without them."""
    told = []
    for without in ((), FOREIGN):
        runs = [r for name in available(arms, "forgetting") if name not in without for r in arms[name]]
        lost = np.array([r["forgetting"]["skill_base"] - r["forgetting"]["skill"] for r in runs])
        columns = {
            "forward KL on the new task": [new_task(r) for r in runs],
            "norm of the update": [r["update"]["U1_rel_fro"] for r in runs],
            "S1": [r["update"]["S1"] for r in runs],
            "S5": [r["update"]["S5"]["excess"] for r in runs],
            "forward KL on that skill's text (nearly the outcome itself)": [
                r["forgetting"]["kl_forward/untrained"] for r in runs
            ],
        }
        fits = {name: show(linear_fit(np.array(x), lost).r2, 2, sign=False) for name, x in columns.items()}
        if not without:
            text = "; ".join(f"{name} {r2}" for name, r2 in fits.items())
            told.append(f"R^2 over {len(runs)} runs, their last checkpoints: {text}.")
        else:
            names = " or ".join(name for name in without if name in arms)
            told.append(f"Over the {len(runs)} that are not {names}: {', '.join(fits.values())}.")
    return " ".join(told)


TABLES = (
    learned,
    by_mode,
    coverage,
    frontier,
    leash,
    compared,
    early,
    rates,
    entropy,
    held,
    proposed,
    lengths,
    longer,
    updates,
    every_weight,
    forgotten,
)


# ---------------------------------------------------------------- the script


def fill(text: str, name: str, content: str) -> str:
    """The text with `content` between the marker of that name and the next end marker. ValueError without marker."""
    start, end = f"<!-- {name} -->", "<!-- end -->"
    before, marker, rest = text.partition(start)
    if not marker or end not in rest:
        raise ValueError(f"the page has no {start} ... {end}")
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def filled(text: str, arms: Arms) -> str:
    """The page with every table made anew."""
    for make in TABLES:
        text = fill(text, make.__name__, make(arms))
    return text


def main() -> int:
    """Makes the tables of RESULTS.md and the plots anew; returns the exit code, 2 without base and joint."""
    arms = load(RESULTS / "arms")
    if not {"base", "joint"} <= arms.keys():
        print("results/findings.py: no results of base and joint; python results/experiments.py run", file=sys.stderr)
        return 2
    page = RESULTS.parent / "RESULTS.md"
    page.write_text(filled(page.read_text(), arms))
    import plots  # beside this file

    plots.save_all(arms, RESULTS / "plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What training took away, and what predicts it: KL to the base, size of the update, or its sparsity.

    python analyze.py forgetting runs/tiny-0 runs/tiny-1 runs/tiny-2 --out plots
    python analyze.py forgetting runs/qwen-3b-0 --text general.txt --held-out 200

At every checkpoint: forward KL(base || policy) along text that the base wrote and reverse KL(policy || base) along text
that the policy wrote, exact at every token, on proposer prompts, solver prompts and text never trained on (the
embedded model's own untouched skill; --text FILE for others); greedy accuracy on the held-out tasks and on that skill,
minus that of the base, paired over tasks; size U1, sparsity S1 and S5 of the update. Then the drop against each of
these over the checkpoints of all runs, R^2 with intervals: "RL's Razor" (arXiv 2509.04259) says KL predicts it and
sparsity does not. Measurements stay in RUN/eval/forgetting.json. Left out: public benchmarks (eval_passk.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

import numpy as np

from azr import drawing
from azr.analysis import figures
from azr.analysis.reader import ROLES, RunData, read_runs, remembered
from azr.command import Number
from azr.console import note, warn
from azr.fits import FEW, as_json, linear_fit, ratio_of_sums
from azr.models import model_path
from azr.passk import difference_interval, share_interval, shown
from azr.policy.opening import ModelError
from azr.runs import weights_of

PROBE_ROWS, HELD_OUT, CHECKPOINTS, TEXTS = 96, 300, 6, 200
TEXT_TOKENS = 512  # of a text of --text
KINDS = ("proposer", "solver", "untrained")
RUNS_AS_UNITS = 6  # with as many runs, whole runs are resampled
PREDICTORS = {
    "kl_forward/proposer": "KL(base || policy), proposer prompts",
    "kl_forward/solver": "KL(base || policy), solver prompts",
    "kl_forward/untrained": "KL(base || policy), untrained text",
    "kl_reverse/proposer": "KL(policy || base), proposer prompts",
    "kl_reverse/solver": "KL(policy || base), solver prompts",
    "kl_reverse/untrained": "KL(policy || base), untrained text",
    "U1_rel_fro": "size of the update, |D| / |W|",
    "S1": "S1: share unchanged in bf16",
    "S5": "S5: S1 minus that of chance",
}
SIZES = ("U1_rel_fro", "S1", "S5")
OUTCOMES = {"skill": "drop on the untouched skill", "held_out": "drop on held-out tasks"}


# ------------------------------------------------------------------------------------------------------- what is asked


def questions(run: RunData, policy, args) -> dict:
    """{"proposer": [(prompt, base's response)], "solver": ..., "untrained": ..., "skill": tasks, "held_out": tasks}.

    RunError or ValueError if the run has no probe. Prompts and responses are token ids; "untrained" of a --text file
    has fixed responses, that of the skill is written by the base here.
    """
    from azr.analysis.entropy import read_rows
    from azr.evals.held_out import load_tasks
    from azr.tasks.prompts import solve_prompt

    rows = read_rows(run.path / "probe.jsonl")
    asked: dict = {"fixed": set()}
    for role in ROLES:
        mine = [row for row in rows if row.role == role]
        step = max(1, len(mine) // args.probe)  # evenly over the modes, which follow each other
        asked[role] = [(policy.encode(r.prompt), policy.encode(r.response)) for r in mine[::step][: args.probe]]
    held_out = run.path / "eval" / "held_out.jsonl"
    tasks = load_tasks(held_out) if held_out.is_file() and args.held_out else []
    asked["held_out"] = tasks[:: max(1, -(-len(tasks) // args.held_out))] if tasks else []
    skill = Path(model_path(str(run.config["model"]))) / "skill.jsonl"
    asked["skill"] = load_tasks(skill) if skill.is_file() else []
    if args.text:
        asked["untrained"] = texts(policy, Path(args.text))
        asked["fixed"] = {"untrained"}
    elif asked["skill"]:
        template = run.base()["template"]
        asked["untrained"] = [(policy.encode(solve_prompt(task, template)), None) for task in asked["skill"]]
    else:
        warn("no text that was never trained on: give --text FILE (plain text); that column is left out")
        asked["untrained"] = []
    return asked


def texts(policy, path: Path) -> list[tuple[list[int], list[int]]]:
    """(first token, the next ones) of the paragraphs of a text file."""
    parts = path.read_text(encoding="utf-8").split("\n\n")
    ids = [policy.encode(part.strip())[:TEXT_TOKENS] for part in parts if part.strip()][:TEXTS]
    pairs = [(row[:1], row[1:]) for row in ids if len(row) > 1]
    if not pairs:
        raise ValueError(f"--text {path}: holds no text of two tokens or more")
    return pairs


# ------------------------------------------------------------------------------------------------------- measuring


def write_responses(policy, prompts: list[list[int]], run: RunData, seed: int) -> list[list[int]]:
    """One sampled response to each prompt, at the run's temperature and length."""
    from azr.evals.held_out import sample_seed
    from azr.policy.policy import Sampling
    from azr.tasks import STOP

    sampling = Sampling(run.config.get("temperature", 1.0), max_new_tokens=run.config["max_new_tokens"], stop=(STOP,))
    seeds = [[sample_seed(seed, "forgetting", i)] for i in range(len(prompts))]
    return [row[0].ids for row in policy.generate(prompts, 1, sampling, seeds)]


def per_token(rows: list[np.ndarray]) -> dict:
    """Token mean of a divergence with its interval over sequences."""
    rows = [row for row in rows if len(row)]
    return as_json(ratio_of_sums([row.sum() for row in rows], [len(row) for row in rows]), len(rows))


def kl_at(policy, run: RunData, asked: dict) -> dict:
    """Forward and reverse KL of the loaded adapter on every kind of prompt."""
    from azr.analysis.divergence import token_divergences

    temperature, result = run.config.get("temperature", 1.0), {}
    for kind in KINDS:
        if not asked[kind]:
            continue
        prompts, written = [p for p, _ in asked[kind]], [r for _, r in asked[kind]]
        forward, along = token_divergences(policy, prompts, written, temperature)
        if kind not in asked["fixed"]:
            own = write_responses(policy, prompts, run, seed=1)
            _, along = token_divergences(policy, prompts, own, temperature)
        result[f"kl_forward/{kind}"], result[f"kl_reverse/{kind}"] = per_token(forward), per_token(along)
    return result


def scores(policy, run: RunData, asked: dict, sandbox) -> dict[str, list[int]]:
    """Greedy answers: 1 or 0 for every held-out task and every question of the skill."""
    from azr.evals.held_out import evaluate
    from azr.policy.policy import Sampling
    from azr.tasks import STOP, parse_answer
    from azr.tasks.prompts import solve_prompt

    greedy = Sampling(0.0, max_new_tokens=run.config["max_new_tokens"], stop=(STOP,))
    template, result = run.base()["template"], {}
    if asked["held_out"]:
        done = evaluate(policy, asked["held_out"], 1, greedy, template, sandbox, 0)
        result["held_out"] = [task.correct for task in done.tasks]
    if asked["skill"]:
        prompts = [policy.encode(solve_prompt(task, template)) for task in asked["skill"]]
        rows = policy.generate(prompts, 1, greedy, [[0]] * len(prompts))
        answers = [parse_answer("math", policy.decode(row[0].ids)).value for row in rows]
        result["skill"] = [int((a or "").strip() == t.answer.strip()) for a, t in zip(answers, asked["skill"])]
    return result


def sizes(run: RunData, checkpoint: Path) -> dict:
    """U1, S1 and S5 of the adapter, by azr/weights/sparsity.py; {} with a warning if they cannot be had."""
    from azr.weights.sparsity import add_arguments, analyse

    arguments = ["--base", str(run.config["model"]), "--adapter", str(checkpoint), "--workers", "1"]
    add_arguments(parser := argparse.ArgumentParser())
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its progress lines
            norms = analyse(parser.parse_args(arguments))["adapted"]
    except ModelError as error:
        warn(f"{checkpoint}: size and sparsity of the update are left out: {error}")
        return {}
    return {name: norms.get(name) for name in SIZES}


def chosen_checkpoints(run: RunData, count: int) -> dict[int, Path]:
    """step -> directory of up to `count` checkpoints after step 0, evenly spaced, the last included."""
    checkpoints = run.trained()
    picks = np.linspace(0, len(checkpoints) - 1, min(count, len(checkpoints))).round().astype(int)
    return dict(checkpoints[i] for i in np.unique(picks))


def measure(run: RunData, args) -> dict:
    """{"base": scores, "checkpoints": {step: row}}, from RUN/eval/forgetting.json if it was measured before."""
    checkpoints = chosen_checkpoints(run, args.checkpoints)
    adapters = [weights_of(path) for path in checkpoints.values()]
    key = [args.probe, args.held_out, args.text and Path(args.text), *checkpoints, *adapters]
    where = run.path / "eval" / "forgetting.json"
    return by_step(remembered(where, key, args.fresh, lambda: _measure(run, args, checkpoints)))


def by_step(stored: dict) -> dict:
    """What RUN/eval/forgetting.json holds, with steps as numbers."""
    return {"base": stored["base"], "checkpoints": {int(step): row for step, row in stored["checkpoints"].items()}}


def _measure(run: RunData, args, checkpoints: dict[int, Path]) -> dict:
    """As `measure`, with steps as text, as JSON has them."""
    from azr.analysis.divergence import open_run, use
    from sandbox import Sandbox

    policy, rows = open_run(run), {}
    asked = questions(run, policy, args)
    with Sandbox() as sandbox:
        with policy.disable_adapter():
            if asked["untrained"] and "untrained" not in asked["fixed"]:
                prompts = [p for p, _ in asked["untrained"]]
                asked["untrained"] = list(zip(prompts, write_responses(policy, prompts, run, seed=0)))
            base = scores(policy, run, asked, sandbox)
        for step, directory in checkpoints.items():
            use(policy, directory)
            row = kl_at(policy, run, asked) | {"scores": scores(policy, run, asked, sandbox)}
            rows[str(step)] = row | sizes(run, directory)
            note(f"{run.path}: checkpoint {len(rows)} of {len(checkpoints)} (step {step}) measured")
    return {"base": base, "checkpoints": rows}


# ------------------------------------------------------------------------------------------------------- the question


def value_of(row: dict, name: str) -> float:
    """A predictor of a checkpoint as one number; NaN if it was not measured."""
    value = row.get(name)
    value = value.get("mean", value.get("excess")) if isinstance(value, dict) else value
    return float("nan") if value is None else float(value)


def drops(entry: dict) -> dict:
    """{outcome: {step: drop with interval, paired over tasks}}; positive: worse than the base."""
    result = {}
    for name in OUTCOMES:
        if entry["base"].get(name):
            base = np.array(entry["base"][name], float)
            result[name] = {
                step: as_json(difference_interval(base - np.array(row["scores"][name], float)), len(base))
                for step, row in entry["checkpoints"].items()
            }
    return result


def fits(measured: dict[str, dict]) -> dict:
    """A straight line of each drop on each predictor over all checkpoints: slope and R^2 with intervals."""
    result: dict = {}
    for outcome in OUTCOMES:
        points = [
            (number, entry["checkpoints"][step], drop["mean"])
            for number, entry in enumerate(measured.values())
            for step, drop in drops(entry).get(outcome, {}).items()
        ]
        if len(points) < 3:
            continue
        y, runs = (np.array([point[i] for point in points]) for i in (2, 0))
        groups = runs if len(set(runs)) >= RUNS_AS_UNITS else None
        predictors = {}
        for name in PREDICTORS:
            x = np.array([value_of(row, name) for _, row, _ in points])
            if np.isfinite(x).all() and np.std(x) > 0:
                line = linear_fit(x, y, groups)
                predictors[name] = {"slope": as_json(line.coefficients[1]), "r2": as_json(line.r2), "n": line.n}
        result[outcome] = {"n": len(points), "runs": len(set(runs)), "predictors": predictors}
    return result


# ------------------------------------------------------------------------------------------------------- the screen


def print_result(measured: dict[str, dict], fitted: dict) -> None:
    """Prints the drops, divergences and norms of every checkpoint, then how well each predicts the drop."""
    for name, entry in measured.items():
        base = {o: share_interval(np.array(v, float)) for o, v in entry["base"].items() if v}
        solved = (f"{o.replace('_', '-')} {shown(i)} (n {len(entry['base'][o])})" for o, i in base.items())
        print(f"{name}: base solves, greedy, {', '.join(solved)}")
        lost = drops(entry)
        heads = "".join(f"{OUTCOMES[o].replace('drop on ', 'drop: '):27s}" for o in lost)
        print(f"  {'step':>5s}  {heads}{'KL(base||policy) a token: ' + ', '.join(KINDS):54s}|D|/|W|    S1      S5")
        for step, row in entry["checkpoints"].items():
            cells = "".join(f"{shown(lost[o][step]):27s}" for o in lost)
            kl = ", ".join(f"{value_of(row, f'kl_forward/{kind}'):.3f}" for kind in KINDS)
            sizes_of = [value_of(row, name) for name in SIZES]
            size = "  ".join(f"{value:.4f}" if np.isfinite(value) else "-     " for value in sizes_of)
            print(f"  {step:5d}  {cells}{kl:54s}{size}")
        if np.isnan(sizes_of[-1]) and np.isfinite(sizes_of[0]):
            print("  S5 of updates of full rank takes their singular values: analyze.py sparsity --spectral has it")
        print()
    for outcome, row in fitted.items():
        print(f"R^2 of the {OUTCOMES[outcome]} over {row['n']} checkpoints of {row['runs']} run(s), straight line:")
        for name, fit in sorted(row["predictors"].items(), key=lambda item: -item[1]["r2"]["mean"]):
            print(f"  {PREDICTORS[name]:40s}{shown(fit['r2'], 2)}")
        if row["n"] < FEW:
            print(f"  {row['n']} points are too few for intervals.")
    if not fitted:
        print("Too few checkpoints to ask what predicts the drop: three are needed.")
        return
    print("The untrained text is the skill itself unless --text gave another: KL there is close to the drop by design.")
    print("Checkpoints of one run are not independent: the intervals are too narrow unless several runs are given")
    print(f"(from {RUNS_AS_UNITS} runs on, whole runs are resampled).")


def draw(runs: list[RunData], measured: dict[str, dict], fitted: dict) -> dict:
    """{"forgetting_OUTCOME": figure}: the drop against each predictor, a colour and marker per run."""
    rows = [row for entry in measured.values() for row in entry["checkpoints"].values()]
    names = [
        name
        for name in ("kl_forward/solver", "kl_forward/untrained", *SIZES)
        if any(np.isfinite(value_of(row, name)) for row in rows)
    ]
    drawn = {}
    for outcome in OUTCOMES:
        lost = {run: drops(entry).get(outcome, {}) for run, entry in measured.items()}
        if not any(lost.values()):
            continue
        drawn[f"forgetting_{outcome}"], axes = drawing.figure(len(names), 2.6, 2.9)
        for j, (one, name) in enumerate(zip(axes, names)):
            for own, (run, rows) in zip(figures.looks(runs), lost.items()):
                x = [value_of(measured[run]["checkpoints"][step], name) for step in rows]
                drawing.points(one, x, list(rows.values()), Path(run).name, own | {"linestyle": ""})
            drawing.zero_line(one)
            one.locator_params(axis="x", nbins=4)
            fit = fitted.get(outcome, {}).get("predictors", {}).get(name)
            title = f"R² {shown(fit['r2'], 2)}, n {fit['n']}" if fit and fit["n"] >= FEW else "too few points for R²"
            drawing.label(one, title, PREDICTORS[name], f"{OUTCOMES[outcome]}, share" if j == 0 else "")
        drawing.legend(drawn[f"forgetting_{outcome}"], axes)
    return drawn


# ------------------------------------------------------------------------------------------------------- flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `analyze.py forgetting` to its parser."""
    parser.add_argument("run", nargs="+", metavar="RUN", help="run directories of one model")
    parser.add_argument(
        "--text", metavar="FILE", help="plain text never trained on, with blank lines between paragraphs"
    )
    some, any_number = Number(int, 1, 10**6), Number(int, 0, 10**6)
    parser.add_argument("--probe", type=some, default=PROBE_ROWS, help=f"prompts a role (default {PROBE_ROWS})")
    what = f"held-out tasks (default {HELD_OUT}; 0: none)"
    parser.add_argument("--held-out", type=any_number, default=HELD_OUT, help=what)
    parser.add_argument("--checkpoints", type=some, default=CHECKPOINTS, help=f"of each run (default {CHECKPOINTS})")
    parser.add_argument("--fresh", action="store_true", help="measure again instead of using RUN/eval/forgetting.json")
    figures.add_output_arguments(parser)


def main(args) -> int:
    """Measures, prints, writes. ValueError, in one line, for bad input."""
    if args.text:
        try:
            Path(args.text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"--text {args.text}: no text in UTF-8 that can be read ({error})") from error
    runs = read_runs(args.run)
    for run in runs:
        chosen_checkpoints(run, 1)  # refused before anything is measured
    measured = {str(run.path): measure(run, args) for run in runs}
    fitted = fits(measured)
    print_result(measured, fitted)
    result = {"runs": measured, "drops": {name: drops(entry) for name, entry in measured.items()}, "fits": fitted}
    figures.write_outputs(args, "forgetting", result, draw(runs, measured, fitted))
    return 0

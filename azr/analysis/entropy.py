"""Entropy: exact per token on given text, and sampled; the curves of a run, with R = -a exp(H) + b.

    python analyze.py entropy --model tiny --data runs/tiny-0/probe.jsonl                  the base on the frozen probe
    python analyze.py entropy --model tiny --adapter runs/tiny-0/checkpoints/step_100 --data runs/tiny-0/probe.jsonl
    python analyze.py entropy --run runs/tiny-0                 training curves, the probe at every checkpoint, the fit
    python analyze.py entropy --model qwen-3b --data FILE --quantization none     what 4 bits alone add: see with nf4

Exact: H_t = -sum_v p log p over the whole vocabulary at temperature T, at every response token. Sampled: -log p of the
token that is there, an estimate of H only where this model wrote the text at this T; elsewhere a cross-entropy.
--data takes JSON lines with "prompt" and "response" (probe.jsonl, samples.jsonl) or "completion". Left out: the entropy
over answers to one problem (`eval_passk.py compare` has it); text of a real tokenizer is tokenized again, which may
split words differently than sampled.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from azr import drawing
from azr.analysis import figures
from azr.analysis.figures import STEP, looks, print_change
from azr.analysis.reader import GROUPS, MODES, ROLES, RunData, first_and_last, read_runs
from azr.command import Number
from azr.console import warn
from azr.fits import FEW, as_json, linear_fit, ratio_of_sums
from azr.jsonl import tolerant_lines, write_json_atomic
from azr.models import portable
from azr.palette import BLACK, style
from azr.passk import bootstrap_interval, shown
from azr.policy.opening import agree

if TYPE_CHECKING:
    from azr.policy.policy import Policy

TOP_SHARE = 0.2  # of the tokens, arXiv 2506.01939
SOLVER = "solver/all/entropy"


@dataclass(frozen=True)
class Row:
    """A response to measure."""

    role: str
    mode: str
    prompt: str
    response: str


# ------------------------------------------------------------------------------------------------------- reading


def read_rows(path: str | Path, limit: int | None = None) -> list[Row]:
    """The (first so many) rows of a JSON-lines file that have a prompt and a response. ValueError: there are none."""
    path, notes, rows = Path(path), [], []
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give JSON lines with prompt and response, such as RUN/probe.jsonl")
    for row in tolerant_lines(path, notes):
        prompt, response = row.get("prompt"), row.get("response", row.get("completion"))
        if isinstance(response, str) and isinstance(prompt, str) and prompt:
            rows.append(Row(str(row.get("role", "solver")), str(row.get("mode", "all")), prompt, response))
        if limit and len(rows) >= limit:
            break
    for line in notes:
        warn(f"{path}{line.removeprefix(path.name)}")  # tolerant_lines gives the bare name
    if not rows:
        raise ValueError(f"{path}: no line has a prompt and a response")
    return rows


# ------------------------------------------------------------------------------------------------------- scoring


def score_rows(policy: Policy, rows: list[Row], temperature: float) -> tuple[list, list]:
    """(exact entropies, log-probs) of every response: lists of arrays (tokens,)."""
    prompts, ids = ([policy.encode(getattr(row, name)) for row in rows] for name in ("prompt", "response"))
    log_prob, entropy = policy.score_lists(prompts, ids, temperature)
    return tuple([np.array(row, np.float32) for row in rows] for rows in (entropy, log_prob))


def summary(entropy: list[np.ndarray], log_prob: list[np.ndarray]) -> dict:
    """Token means and sequence means in nats with intervals over sequences; where the entropy sits."""
    nonempty = [i for i, h in enumerate(entropy) if len(h)]
    if not nonempty:
        return {"sequences": 0, "tokens": 0}
    counts = np.array([len(entropy[i]) for i in nonempty])
    sums = np.array([entropy[i].sum(dtype=np.float64) for i in nonempty])
    surprise = np.array([-log_prob[i].sum(dtype=np.float64) for i in nonempty])
    # over all responses together: a token counts by its entropy, not by its rank within its own response
    ordered = np.sort(np.concatenate([entropy[i] for i in nonempty]))[::-1].astype(np.float64)
    top = ordered[: max(1, round(TOP_SHARE * len(ordered)))]
    return {
        "sequences": len(nonempty),
        "tokens": int(counts.sum()),
        # tokens of one response are not independent: responses are resampled, with all their tokens
        "token_mean": as_json(ratio_of_sums(sums, counts), len(nonempty)),
        "sequence_mean": as_json(bootstrap_interval(sums / counts), len(nonempty)),
        "sampled_token_mean": as_json(ratio_of_sums(surprise, counts), len(nonempty)),
        "top20_threshold": float(top[-1]),
        "top20_share": float(top.sum() / ordered.sum()) if ordered.sum() > 0 else math.nan,
    }


def by_group(rows: list[Row], entropy: list, log_prob: list) -> dict:
    """`summary` of every (role, mode) there is, in the usual order, of each role, and of all."""
    names, usual = [f"{row.role}/{row.mode}" for row in rows], [f"{role}/{mode}" for role, mode in GROUPS]
    order = sorted(dict.fromkeys(names), key=lambda name: usual.index(name) if name in usual else len(usual))
    picks = {name: [i for i, own in enumerate(names) if own == name] for name in order}
    for role in dict.fromkeys(row.role for row in rows):
        picks[f"{role}/all"] = [i for i, row in enumerate(rows) if row.role == role]
    picks["all"] = list(range(len(rows)))
    return {n: summary([entropy[i] for i in pick], [log_prob[i] for i in pick]) for n, pick in picks.items()}


# ------------------------------------------------------------------------------------------------------- the fit


def fit_reward(entropy, reward) -> dict:
    """R = -a exp(H) + b (Cui et al. 2025, arXiv 2505.22617, eq. 3) by least squares: a, b, the ceiling b - a at H = 0,
    R^2, with intervals that resample observations."""
    entropy, reward = np.asarray(entropy, float), np.asarray(reward, float)
    direct = linear_fit(np.exp(entropy), reward)
    ceiling = linear_fit(np.exp(entropy) - 1, reward).coefficients[0]  # the intercept is then R at H = 0
    slope, complete = direct.coefficients[1], np.isfinite(entropy) & np.isfinite(reward)
    return {
        "a": {"mean": -slope.mean, "low": -slope.high, "high": -slope.low},
        "b": as_json(direct.coefficients[0]),
        "ceiling": as_json(ceiling),
        "r2": as_json(direct.r2),
        "n": direct.n,
        "entropy_range": [float(entropy[complete].min()), float(entropy[complete].max())],
    }


def fit_of(runs: list[RunData]) -> dict | None:
    """`fit_reward` of the held-out accuracy against the solver's entropy, over the evaluations of all runs; None with
    fewer than three. (Accuracy on a run's own tasks says nothing here: these change with the proposer.)"""
    h, r = (np.concatenate([run.column(key) for run in runs]) for key in (SOLVER, "held_out/all/accuracy"))
    return fit_reward(h, r) if np.sum(np.isfinite(h) & np.isfinite(r)) >= 3 else None


# ------------------------------------------------------------------------------------------------------- commands


def measure(args) -> int:
    """--model and --data."""
    from azr.analysis.divergence import open_policy

    rows = read_rows(args.data, args.limit)
    if args.model is None:
        raise ValueError("--data needs --model (the model that is asked for its entropy), or give --run RUN")
    opening = agree(args.model, args.adapter, args.quantization)
    policy = open_policy(opening)
    entropy, log_prob = score_rows(policy, rows, args.temperature)
    result = {
        "data": str(args.data),
        "temperature": args.temperature,
        **{name: policy.info[name] for name in ("base_model", "revision", "quantization", "dtype")},
        "adapter": str(opening.adapter) if opening.adapter else None,
        "groups": by_group(rows, entropy, log_prob),
    }
    print_groups(result)
    figures.write_outputs(args, "entropy", result, {})
    return 0


def curves(args) -> int:
    """--run: what was logged while training, the frozen probe at every checkpoint, and the fit."""
    runs = read_runs(args.run)
    result = {"runs": {}, "fit": fit_of(runs)}
    for run in runs:
        probe = probe_curve(run, args) if not args.no_probe else {}
        result["runs"][str(run.path)] = {"training": first_and_last(run, "entropy", (*MODES, "all")), "probe": probe}
    print_curves(result)
    figures.write_outputs(args, "entropy", result, {"entropy": draw_curves(runs, result)})
    return 0


def adapter_of(checkpoint: Path, role: str) -> Path:
    """Where the adapter of a role lies: --proposer separate has the proposer's in a folder of the checkpoint."""
    own = checkpoint / role
    return own if own.is_dir() else checkpoint


def probe_curve(run: RunData, args) -> dict:
    """{step: groups} of the frozen probe under every checkpoint; {} with a warning if there is no probe."""
    from azr.analysis.divergence import open_run, use

    path, checkpoints = run.path / "probe.jsonl", run.checkpoints()
    if not path.is_file() or not checkpoints:
        warn(f"{run.path} has no probe.jsonl or no checkpoint: the entropy on fixed text is left out")
        return {}
    rows, policy, result = read_rows(path, args.limit), open_run(run), {}
    for step, checkpoint in checkpoints:
        adapters, measured = [adapter_of(checkpoint, row.role) for row in rows], {}
        for adapter in dict.fromkeys(adapters):
            use(policy, adapter)
            part = [i for i, own in enumerate(adapters) if own == adapter]
            measured |= zip(part, zip(*score_rows(policy, [rows[i] for i in part], args.temperature)))
        result[str(step)] = by_group(rows, *zip(*(measured[i] for i in range(len(rows)))))
    (run.path / "eval").mkdir(exist_ok=True)
    write_json_atomic(run.path / "eval" / "probe_entropy.json", {"temperature": args.temperature, "probe": result})
    return result


# ------------------------------------------------------------------------------------------------------- the screen


def print_groups(result: dict) -> None:
    """Prints the entropies of `by_group`, in nats a token."""
    held = "unquantized" if result["quantization"] == "none" else f"in {result['quantization']}"
    what = f"{portable(result['base_model'])}, {held} ({result['dtype']})"
    what += f" with {result['adapter']}" if result["adapter"] else ", no adapter"
    print(f"Entropy of {what}, at temperature {result['temperature']:g}, on {result['data']}, in nats a token.")
    print(
        "Exact over the vocabulary; [95 % intervals over responses]. 'written' is -log p of the tokens that are there,"
    )
    print("an estimate of it only if this model wrote them. 'top 20 %': their share of all the entropy.\n")
    heads = ("mean over tokens", "mean over responses", "written")
    print(f"{'':22s}{'responses':>10s}{'tokens':>8s}  " + "".join(f"{head:24s}" for head in heads) + "top 20 %")
    for name, row in result["groups"].items():
        if row["tokens"]:
            cells = "".join(f"{shown(row[key]):24s}" for key in ("token_mean", "sequence_mean", "sampled_token_mean"))
            share = f"{100 * row['top20_share']:5.0f} %"
            print(f"{name:22s}{row['sequences']:10d}{row['tokens']:8d}  {cells}{share}")


def print_curves(result: dict) -> None:
    """Prints the result of --run: logged entropies, the frozen probe, and the fit of R = -a exp(H) + b."""
    for path, run in result["runs"].items():
        print(f"{path}: entropy while training, nats a token, first and last tenth of the steps [interval over steps]")
        for name, row in run["training"].items():
            print_change(f"{name:22s}", row["first"], row["last"])
        if run["probe"]:
            start, end = list(run["probe"])[0], list(run["probe"])[-1]
            print(f"  on the frozen probe (text of the untrained model), step {start} -> {end}, n responses:")
            for name, row in run["probe"][start].items():
                if name != "all" and row["tokens"]:
                    print_change(f"{name:22s}", row["token_mean"], run["probe"][end][name]["token_mean"])
    if (fit := result["fit"]) is None:
        print("\nToo few held-out evaluations for the fit of R = -a exp(H) + b: three are needed (--eval-every).")
        return
    print(f"\nR = -a exp(H) + b with R = held-out accuracy, H = solver entropy, n = {fit['n']}:")
    print(f"  a {shown(fit['a'])}, b {shown(fit['b'])}, at H = 0: {shown(fit['ceiling'])}, R^2 {shown(fit['r2'])}")
    if fit["n"] < FEW:
        print(f"  {fit['n']} points are too few for intervals: give several runs or evaluate more.")
    low, high = fit["entropy_range"]
    print(f"  H was between {low:.2f} and {high:.2f}; the value at H = 0 lies outside of what was seen.")
    if fit["a"]["low"] <= 0:
        print("  The interval of a holds 0 or less: this run does not show that accuracy was bought with entropy.")


# ------------------------------------------------------------------------------------------------------- plots


def draw_training(panels, runs: list[RunData], roles: Sequence[str] = ROLES) -> None:
    """A panel per role: per mode for one run, over all modes for several."""
    for axes, role in zip(panels, roles):
        figures.curves(axes, runs, f"{role}/{{}}/entropy")
        what = figures.of_modes(runs, "nats per token")
        drawing.label(axes, f"{role}: entropy on its own samples", STEP, what)
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)  # the same scale, so that the roles can be compared by eye


def look_of_role(role: str, run: RunData, own: dict, runs: list[RunData]) -> dict:
    """How a role's curve on the probe looks, with its label: of several runs in the run's look, the proposer dashed."""
    if len(runs) == 1:
        return drawing.look(style(role)) | {"label": role}
    return own | ({"linestyle": "--"} if role == "proposer" else {}) | {"label": f"{run.name}, {role}"}


def draw_probe(axes, runs: list[RunData], probes: list[dict | None]) -> None:
    """Both roles on the frozen probe at each checkpoint; probes: {step: groups} of each run, nothing of one that was
    not measured."""
    for run, probe, own in zip(runs, probes, looks(runs)):
        for role in ROLES if probe else ():
            rows = [groups.get(f"{role}/all", {}).get("token_mean") for groups in probe.values()]
            shape = look_of_role(role, run, own, runs)
            drawing.points(axes, list(map(int, probe)), rows, shape.pop("label"), shape)
    axes.set_ylim(bottom=0)
    drawing.label(axes, "entropy on the frozen probe", STEP, "nats per token")


def draw_curves(runs: list[RunData], result: dict):
    """The figure of --run: both roles while training, the frozen probe, and held-out accuracy against entropy."""
    probes = [result["runs"][str(run.path)]["probe"] for run in runs]
    drawn, axes = drawing.figure(4 if any(probes) else 3, 3.4, 3.1)
    draw_training(axes[:2], runs)
    if any(probes):
        draw_probe(axes[2], runs, probes)
    for run, own in zip(runs, looks(runs)):
        reward = run.column("held_out/all/accuracy")
        axes[-1].plot(run.column(SOLVER), reward, label=run.name, **own | {"linestyle": ""})
    title, fit = "held-out accuracy against entropy", result["fit"]
    if fit and fit["n"] >= FEW:
        x, title = np.linspace(*fit["entropy_range"], 50), f"R = -a exp(H) + b, n = {fit['n']} evaluations"
        axes[-1].plot(x, fit["b"]["mean"] - fit["a"]["mean"] * np.exp(x), color=BLACK, linewidth=1)
    drawing.label(axes[-1], title, "solver entropy H, nats per token", "held-out accuracy R, share solved")
    drawing.legend(drawn, axes)
    return drawn


# ------------------------------------------------------------------------------------------------------- flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `analyze.py entropy` to its parser."""
    parser.add_argument("--model", help="tiny, qwen-3b, qwen-7b, a hub id or a directory")
    parser.add_argument("--adapter", metavar="DIR", help="a checkpoint of a run, or any PEFT adapter of this model")
    parser.add_argument("--data", metavar="FILE", help="JSON lines with prompt and response, such as RUN/probe.jsonl")
    parser.add_argument("--run", nargs="+", metavar="RUN", help="curves and fit of one or more runs of one model")
    parser.add_argument("--no-probe", action="store_true", help="with --run: no model is loaded, logged values only")
    parser.add_argument("--quantization", choices=("nf4", "none"), help="of the base (default: as the adapter's)")
    above_0 = Number(float, 0.01, 100)  # at 0 there is no distribution
    parser.add_argument("--temperature", type=above_0, default=1.0, help="divides the logits (default 1.0)")
    parser.add_argument("--limit", type=Number(int, 1, 10**9), help="only the first so many responses")
    figures.add_output_arguments(parser)


def main(args) -> int:
    """Measures, prints, writes. ValueError, in one line, for bad input."""
    if bool(args.run) == bool(args.data):
        raise ValueError("give either --data FILE (with --model) or --run RUN")
    if args.run and (args.model or args.adapter or args.quantization):
        raise ValueError("--run takes the model that its run names: leave --model, --adapter and --quantization out")
    return curves(args) if args.run else measure(args)

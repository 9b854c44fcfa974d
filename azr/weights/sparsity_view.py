"""The screen and the plot of `analyze.py sparsity`: plain words first, ids beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from azr.weights.files import layer_of
from azr.weights.sizes import MATCHED, PAPER_TOLERANCE

KINDS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "pair": "full checkpoint"}
WIDTH = 60  # of the plain words; the ids stand behind


def percent(share: float | None, digits: int = 1) -> str:
    """Writes a share in percent, and "-" where it is undefined."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def interval(excess: dict | None) -> str:
    """Writes an excess over the null with its interval, and "-" where there is none."""
    return "-" if excess is None else f"{excess['excess']:+.4f} [{excess['low']:+.4f}, {excess['high']:+.4f}]"


def fact(words: str, value: str, ids: str) -> str:
    """Returns a line of the screen: the words, the value, and behind them the ids of the figures."""
    return f"  {words:{WIDTH}} {value:28} {ids}".rstrip()


# ---------------------------------------------------------------- the screen


def lines(report: dict) -> list[str]:
    """Everything that is printed."""
    adapted = report["adapted"]
    out = [
        "",
        f"{report['update']}: {KINDS[report['kind']]}, {report['matrices']} matrices",
        f"with {adapted['parameters']:,} of the {report['parameters']:,} weights "
        f"({percent(adapted['S4']['adapted_fraction'])})",
        f"against {report['base']}, held as {report['reference']}",
    ]
    if adapted["U1_rms"]:
        out += [*size_part(adapted, report["whole"], report["rounded"]), *structure_part(adapted, report["rounded"])]
        if "R2_margin" in adapted:
            out += spectral_part(adapted)
        out += table(report)
    else:
        out += ["", "the update is exactly 0: nothing was trained yet, every weight is unchanged"]
    return out + [f"not counted: {name} ({why})" for name, why in report["excluded"].items()]


ROUNDED = "  (both are stored in bf16: what was too small for it is gone, and scaled it does not come back)"


def size_part(adapted: dict, whole: dict, rounded: bool) -> list[str]:
    """Returns the lines about the size of the update (U1), the share that stays unchanged (S0, S1, S2, U2), and a merge
    back into 4 bits (S3)."""
    changed = f"{percent(1 - adapted['S1'])} / {percent(1 - whole['S1'])}"
    near, matched, curve = f"{percent(adapted['S2'])} / {percent(whole['S2'])}", adapted[MATCHED], adapted["U2"]
    out = [
        "",
        "how large is it, and what would it change?",
        fact("root mean square of the change of a weight", f"{adapted['U1_rms']:.2e}", "U1"),
        fact("its norm, of the norm of the base", percent(adapted["U1_rel_fro"], 2), "U1"),
        fact(
            "weights that a merge to bf16 would change: adapted / whole", changed, f"1 - S1 = 1 - {adapted['S1']:.4f}"
        ),
        fact(f"unchanged within {PAPER_TOLERANCE:g}, as papers count: adapted / whole", near, "S2"),
        fact("unchanged before any rounding", percent(adapted["S0"]), "S0"),
        fact("the same update scaled to RMS 3e-5: unchanged in bf16", percent(matched["S1"]), f"S1 {MATCHED}"),
        fact("  and within the tolerance", percent(matched["S2"]), f"S2 {MATCHED}"),
        *([ROUNDED] if rounded else []),
        "the share of unchanged weights for any tolerance (U2)",
        "  |change| at most  " + "".join(f"{tolerance:>11.0e}" for tolerance in curve["tolerance"][::2]),
    ]
    for kind in ("absolute", "relative"):
        out.append(f"  {kind + ' share':18}" + "".join(f"{percent(share):>11}" for share in curve[kind][::2]))
    if adapted["S3_code_requantized"] is not None:
        codes = f"{percent(adapted['S3_code_frozen_scale'])} / {percent(adapted['S3_code_requantized'])}"
        out += [
            "if it were merged back into 4 bits",
            fact("codes that stay: scales frozen / quantized anew", codes, "S3"),
            fact("block scales that stay", percent(adapted["S3_scale_unchanged"]), "S3_scale_unchanged"),
            fact("share of the update that survives", percent(adapted["S3_survival"]), "S3_survival"),
        ]
    return out


def structure_part(adapted: dict, rounded: bool) -> list[str]:
    """Returns the lines about chance (S5), concentration (S6) and rank (R1)."""
    shape, excess, out = adapted["S6"], adapted["S5"], ["is it more concentrated than chance?"]
    if excess is None:
        out.append(fact("needs the singular values of full-rank updates: add --spectral", "-", "S5"))
    else:
        verdict = "no: a structureless update leaves as much unchanged"
        if excess["low"] > 0:
            verdict = "yes: more stays unchanged than with a structureless update"
        elif excess["high"] < 0:
            verdict = "no, less: more changes than with a structureless update"
        out += [
            fact(verdict, interval(excess), "S5 [95 %], S1 less the null's"),
            fact("  against a flat spectrum, which takes rank for structure", interval(excess["flat"]), "flat"),
        ]
        if not rounded:
            out.append(fact("  the same at RMS 3e-5", interval(adapted[MATCHED]["S5"]), f"S5 {MATCHED}"))
    chance = "rounding does that" if rounded else "Gaussian: 8.5 %"
    words = f"energy in the largest 1 % of the entries ({chance})"
    out.append(fact(words, percent(shape["top_1%_energy"]), f"S6, Gini {shape['gini']:.3f} (0.637)"))
    if shape.get("rows_striped_share") is not None:
        striped = f"{percent(shape['rows_striped_share'], 0)} / {percent(shape['columns_striped_share'], 0)}"
        out.append(fact("matrices whose rows / columns are unequal beyond chance", striped, "S6 (chance: 2.5 %)"))
    if adapted["R1_effective_rank"] is not None:
        rank, stable = f"{adapted['R1_effective_rank']:.1f} of {adapted['R1_rank']:g}", adapted["R1_stable_rank"]
        out.append(fact("directions in use, mean of the matrices", rank, f"R1, stable rank {stable:.1f}"))
    return out


def spectral_part(adapted: dict) -> list[str]:
    """Returns the lines about what --spectral measured: R2, G1, G2 and G3."""
    scale, energy, count = adapted["R2_critical_scale"], adapted["G1_both"], adapted["R2_intruders"]["0.5"]
    first = "not below 1024 times" if scale is None else f"at {scale:.1f} times the update" if scale > 1 else "is there"
    out = [
        "singular vectors, means of the matrices",
        fact("intruders among the leading 10 at 0.5", f"{count:.2f}", f"R2, least margin {adapted['R2_margin']:.3f}"),
        fact("the first intruder of any matrix appears", first, "R2_critical_scale"),
        fact("largest rotation of the principal directions", f"{adapted['G2_left_angle']['max']:.2f} degrees", "G2"),
    ]
    if energy is not None:
        value = f"{percent(energy['share'], 2)} ({percent(energy['random'], 2)})"
        out.append(fact("energy along the base's principal directions (random)", value, "G1"))
    for key, words in (("G3_principal", "large rank-k part"), ("G3_low_magnitude", "small weights")):
        if adapted.get(key) and adapted[key].get("overlap") is not None:
            value = f"{percent(adapted[key]['overlap'])} ({percent(adapted[key]['null'])})"
            out.append(fact(f"changed entries in the half of {words} (null)", value, key))
    return out


def table(report: dict) -> list[str]:
    """By matrix type, and at most twelve of the layers: U1, S1, S2, S1 at RMS 3e-5, the effective rank, S5."""
    out = ["", f"  {'':12}{'RMS':>10}{'of base':>10}{'S1':>9}{'S2':>9}{'S1 3e-5':>9}{'rank':>7}   S5"]
    layers = list(report["layers"])
    groups = report["types"] | {f"layer {n}": report["layers"][n] for n in layers[:: max(1, -(-len(layers) // 12))]}
    for name, group in groups.items():
        cells = f"{group['U1_rms']:10.1e}{percent(group['U1_rel_fro'], 2):>10}"
        cells += "".join(f"{percent(share):>9}" for share in (group["S1"], group["S2"], group[MATCHED]["S1"]))
        rank = "-" if group["R1_effective_rank"] is None else f"{group['R1_effective_rank']:.1f}"
        out.append(f"  {name:12}{cells}{rank:>7}   {interval(group['S5'])}")
    return out


# ---------------------------------------------------------------- the plot


def plot(report: dict, file: Path) -> None:
    """Layer by matrix type: size, bf16 sparsity, excess over the null."""
    from matplotlib.figure import Figure

    types, layers = list(report["types"]), list(report["layers"])
    panels = {
        "U1_rms": ("size of the update (U1)", "RMS of the change"),
        "S1": ("unchanged in bf16 (S1)", "share of the weights"),
        "S5": ("unchanged beyond chance (S5)", "share less chance"),
    }
    every = max(1, len(layers) // 12)
    figure = Figure(figsize=(13, 1.5 + 0.16 * max(6, len(layers))), layout="constrained")
    for axis, (key, (title, unit)) in zip(figure.subplots(1, 3), panels.items()):
        grid = np.full((len(layers), len(types)), np.nan)
        for name, module in report["modules"].items():
            layer, kind = str(layer_of(name)), name.rpartition(".")[2]
            if layer in layers and kind in types and module[key] is not None:
                value = module[key]["excess"] if key == "S5" else module[key]
                grid[layers.index(layer), types.index(kind)] = value
        scale = {"cmap": "viridis"}
        if key == "S5" and np.isfinite(grid).any():  # has two signs: white is chance
            scale = {"cmap": "PuOr", "vmin": -np.nanmax(abs(grid)), "vmax": np.nanmax(abs(grid))}
        figure.colorbar(axis.imshow(grid, aspect="auto", **scale), ax=axis).set_label(unit, fontsize=8.5)
        axis.set_xticks(range(len(types)), types, rotation=45, ha="right")
        axis.set_yticks(range(0, len(layers), every), layers[::every])
        axis.set_title(title, fontsize=9.5, loc="left")
        axis.set_ylabel("layer", fontsize=8.5)
    figure.savefig(file, dpi=130)

"""The screen and the plots of `analyze.py sparsity`: plain words first, ids beside them."""

from __future__ import annotations

from pathlib import Path

from azr.weights.sizes import PAPER_TOLERANCE

MATCHED = "at_rms_3e-5"
KINDS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "pair": "full checkpoint"}
WIDTH = 60  # of the plain words; the ids stand behind


def percent(share: float | None, digits: int = 1) -> str:
    """Writes a share in percent, and "-" where it is undefined."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def number(value: float | None, form: str = ".3f") -> str:
    """Writes a number in the given format, and "-" where it is undefined."""
    return "-" if value is None else format(value, form)


def interval(excess: dict | None) -> str:
    """Writes an excess over the null with its interval, and "-" where there is none."""
    return "-" if excess is None else f"{excess['excess']:+.4f} [{excess['low']:+.4f}, {excess['high']:+.4f}]"


def fact(words: str, value: str, ids: str) -> str:
    """Returns a line of the screen: the words, the value, and behind them the ids of the figures."""
    return f"  {words:{WIDTH}} {value:28} {ids}".rstrip()


# ---------------------------------------------------------------- the screen


def lines(report: dict) -> list[str]:
    """Everything that is printed."""
    out = [*heading(report), *main_part(report), *quantized_part(report), *structure_part(report)]
    if "R2_margin" in report["adapted"]:
        out += spectral_part(report["adapted"])
    out += [*tolerance_part(report), *table(report)]
    if "along" in report:
        out += along_part(report["along"])
    if "cross_run" in report:
        out += cross_part(report["cross_run"])
    out += [f"not counted: {name} ({why})" for name, why in report["excluded"].items()]
    return out


def heading(report: dict) -> list[str]:
    """Returns the lines that say what was compared with what."""
    adapted = report["adapted"]
    share = percent(adapted["S4"]["adapted_fraction"])
    return [
        "",
        f"{report['update']}: {KINDS[report['kind']]}, {report['matrices']} matrices",
        f"with {adapted['parameters']:,} of the {report['parameters']:,} weights ({share})",
        f"against {report['base']}, held as {report['reference']}",
        *reason(report),
    ]


def reason(report: dict) -> list[str]:
    """Returns the lines that say why the reference is the dequantised base; none for a base without quantization."""
    if report["quantization"] != "nf4":
        return []
    return [
        "  the reference is the DEQUANTISED 4-bit base, because the forward pass of the training used it; against the",
        "  original checkpoint any adapter would seem to change 97 % of the weights, by the error of the quantization",
    ]


def main_part(report: dict) -> list[str]:
    """Returns the lines about the size of the update (U1) and the share that stays unchanged (S0, S1, S2)."""
    adapted, whole = report["adapted"], report["whole"]
    if not adapted["U1_rms"]:
        return ["", "the update is exactly 0: nothing was trained yet, every weight is unchanged"]
    out = ["", "how large is it, and what would it change?"]
    out.append(fact("root mean square of the change of a weight", f"{adapted['U1_rms']:.2e}", "U1"))
    out.append(fact("its norm, of the norm of the base", percent(adapted["U1_rel_fro"], 2), "U1"))
    changed = f"{percent(1 - adapted['S1'])} / {percent(1 - whole['S1'])}"
    out.append(
        fact("weights that a merge to bf16 would change: adapted / whole", changed, f"1 - S1 = 1 - {adapted['S1']:.4f}")
    )
    if adapted["zero_base_share"] > 0.001:
        words = f"  of the weights whose base is not 0 (it is for {percent(adapted['zero_base_share'])})"
        out.append(fact(words, percent(1 - adapted["S1_nonzero_base"]), "1 - S1_nonzero_base"))
    pair = f"{percent(adapted['S2'])} / {percent(whole['S2'])}"
    out.append(fact(f"unchanged within {PAPER_TOLERANCE:g}, as papers count: adapted / whole", pair, "S2"))
    out.append(fact("unchanged before any rounding", percent(adapted["S0"]), "S0"))
    matched = adapted[MATCHED]
    out.append(fact("the same update scaled to RMS 3e-5: unchanged in bf16", percent(matched["S1"]), f"S1 {MATCHED}"))
    out.append(fact("  and within the tolerance", percent(matched["S2"]), f"S2 {MATCHED}"))
    return out


def quantized_part(report: dict) -> list[str]:
    """Returns the lines about a merge back into 4 bits (S3); none without an NF4 base, or for an update of 0."""
    adapted = report["adapted"]
    if adapted["S3_code_requantized"] is None or not adapted["U1_rms"]:
        return []
    scales = f"{percent(adapted['S3_code_frozen_scale'])} / {percent(adapted['S3_code_requantized'])}"
    return [
        "if it were merged back into 4 bits",
        fact("codes that stay: scales frozen / quantized anew", scales, "S3"),
        fact("block scales that stay", percent(adapted["S3_scale_unchanged"]), "S3_scale_unchanged"),
        fact("share of the update that survives", percent(adapted["S3_survival"]), "S3_survival"),
    ]


def structure_part(report: dict) -> list[str]:
    """Returns the lines about chance (S5), concentration (S6) and rank (R1); none for an update of 0."""
    adapted = report["adapted"]
    if not adapted["U1_rms"]:
        return []
    out = ["is it more concentrated than chance?"]
    if adapted["S5"] is None:
        out.append(fact("needs the singular values of full-rank updates: add --spectral", "-", "S5"))
    else:
        out.append(fact(verdict(adapted["S5"]), interval(adapted["S5"]), "S5 [95 %], S1 less the null's"))
        flat = "  against a flat spectrum, which takes rank for structure"
        out.append(fact(flat, interval(adapted["S5"]["flat"]), "flat"))
        out.append(fact("  the same at RMS 3e-5", interval(adapted[MATCHED]["S5"]), f"S5 {MATCHED}"))
        outside = [m["S5"] for m in report["modules"].values() if m["S5"]]
        above, below = sum(e["low"] > 0 for e in outside), sum(e["high"] < 0 for e in outside)
        out.append(
            fact(
                "  matrices above / below their interval (chance: 2.5 % each)",
                f"{above} / {below} of {len(outside)}",
                "",
            )
        )
    shape = adapted["S6"]
    words = "energy in the largest 1 % of the entries (Gaussian: 8.5 %)"
    out.append(fact(words, percent(shape["top_1%_energy"]), f"S6, Gini {shape['gini']:.3f} (0.637)"))
    striped = f"{percent(shape.get('rows_striped_share'), 0)} / {percent(shape.get('columns_striped_share'), 0)}"
    if shape.get("rows_striped_share") is not None:
        out.append(fact("matrices whose rows / columns are unequal beyond chance", striped, "S6 (chance: 2.5 %)"))
    if adapted["R1_effective_rank"] is not None:
        rank = f"{adapted['R1_effective_rank']:.1f} of {adapted['R1_rank']:g}"
        out.append(
            fact("directions in use, mean of the matrices", rank, f"R1, stable rank {adapted['R1_stable_rank']:.1f}")
        )
    return out


def verdict(excess: dict) -> str:
    """Says in words on which side of 0 the interval of an excess lies."""
    if excess["low"] > 0:
        return "yes: more stays unchanged than with a structureless update"
    if excess["high"] < 0:
        return "no, less: more changes than with a structureless update"
    return "no: a structureless update leaves as much unchanged"


def spectral_part(adapted: dict) -> list[str]:
    """Returns the lines about what --spectral measured: R2, G1, G2 and G3."""
    count = number(adapted["R2_intruders"]["0.5"], ".2f")
    scale = adapted["R2_critical_scale"]
    energy, angle = adapted["G1_both"], adapted["G2_left_angle"]
    out = ["singular vectors, means of the matrices"]
    out.append(fact("intruders among the leading 10 at 0.5", count, f"R2, least margin {number(adapted['R2_margin'])}"))
    first = (
        "not below 1024 times" if scale is None else "is there" if scale == 1 else f"at {scale:.1f} times the update"
    )
    out.append(fact("the first intruder of any matrix appears", first, "R2_critical_scale"))
    if energy is not None:
        value = f"{percent(energy['share'], 2)} ({percent(energy['random'], 2)})"
        out.append(fact("energy along the base's principal directions (random)", value, "G1"))
    out.append(fact("largest rotation of the principal directions", f"{angle['max']:.2f} degrees", "G2"))
    for key, words in (("G3_principal", "large rank-k part"), ("G3_low_magnitude", "small weights")):
        if adapted.get(key) and adapted[key].get("overlap") is not None:
            value = f"{percent(adapted[key]['overlap'])} ({percent(adapted[key]['null'])})"
            out.append(fact(f"changed entries in the half of {words} (null)", value, key))
    return out


def tolerance_part(report: dict) -> list[str]:
    """Returns the table of unchanged shares at every second tolerance (U2), absolute and relative to the weight."""
    curve = report["adapted"]["U2"]
    places = range(0, len(curve["tolerance"]), 2)
    rows = [("|change| at most", [f"{curve['tolerance'][i]:.0e}" for i in places])]
    rows += [(f"{kind} share", [percent(curve[kind][i]) for i in places]) for kind in ("absolute", "relative")]
    return ["", "the share of unchanged weights for any tolerance (U2)"] + [
        f"  {name:18}" + "".join(f"{cell:>11}" for cell in cells) for name, cells in rows
    ]


def table(report: dict) -> list[str]:
    """By matrix type, and at most twelve of the layers."""
    head = f"  {'':12}{'RMS':>10}{'of base':>10}{'S1':>9}{'S2':>9}{'S1 3e-5':>9}{'rank':>7}   S5"
    layers = list(report["layers"])
    selection = layers[:: max(1, -(-len(layers) // 12))]
    rows = [(name, group) for name, group in report["types"].items()]
    rows += [(f"layer {name}", report["layers"][name]) for name in selection]
    return ["", head, *(row(name, group) for name, group in rows)]


def row(name: str, group: dict) -> str:
    """Returns a line of the table for one group: U1, S1, S2, S1 at RMS 3e-5, the effective rank, S5."""
    shares = (group["U1_rel_fro"], group["S1"], group["S2"], group[MATCHED]["S1"])
    cells = "".join(f"{percent(share, 2 if i == 0 else 1):>{10 if i == 0 else 9}}" for i, share in enumerate(shares))
    rank = number(group["R1_effective_rank"], ".1f")
    return f"  {name:12}{group['U1_rms']:10.1e}{cells}{rank:>7}   {interval(group['S5'])}"


def along_part(along: dict) -> list[str]:
    """Returns the lines about the path along a run (T1), and a line a checkpoint."""
    out = ["", f"along {len(along['steps'])} checkpoints, from {along['rows_a_matrix']} rows a matrix"]
    out.append(
        fact("net change over the length of the path", percent(along["T1_net_over_path"]), "T1 (straight: 100 %)")
    )
    out.append(fact("movement that was undone", percent(along["T1_cancelled_mass"]), "T1_cancelled_mass"))
    out.append(fact("weights that moved both ways", percent(along["T1_moved_both_ways"]), "T1_moved_both_ways"))
    value = " / ".join(
        percent(along[f"T1_{key}"]) for key in ("never_changed", "changed_then_cancelled", "changed_at_the_end")
    )
    out.append(fact("in bf16 never changed / changed and back / changed at the end", value, "T1"))
    for step, rms, s1, rank in zip(along["steps"], along["U1_rms"], along["S1"], along["R1_effective_rank"]):
        out.append(f"  step {step:6}   RMS {rms:.2e}   S1 {percent(s1):>8}   effective rank {number(rank, '.1f')}")
    return out


def cross_part(cross: dict) -> list[str]:
    """Returns the lines about what the update shares with that of another run (X1)."""
    out = ["", f"shared with {cross['other']}"]
    value = f"{number(cross['X1_jaccard'])} ({number(cross['X1_jaccard_independent'])})"
    out.append(fact("changed entries in both, of those in either (independent)", value, "X1"))
    if cross["X1_mean_cos2"] is not None:
        value = f"{number(cross['X1_mean_cos2'])} ({number(cross['X1_mean_cos2_random'])})"
        out.append(fact("mean cos^2 between the column spaces (random)", value, "X1"))
    return out


# ---------------------------------------------------------------- the plots


def plots(report: dict, directory: Path) -> None:
    """modules.png, tolerance.png and, of a run, along.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {"modules": plot_modules, "tolerance": plot_tolerance}
    if "along" in report:
        figures["along"] = plot_along
    for name, draw in figures.items():
        figure = draw(report, plt)
        figure.savefig(directory / f"{name}.png", dpi=130, bbox_inches="tight")
        plt.close(figure)


def plot_modules(report: dict, plt):
    """Layer by matrix type: size, bf16 sparsity, excess over the null."""
    import numpy as np

    types, layers = list(report["types"]), list(report["layers"])
    panels = {"RMS of the update (U1)": "U1_rms", "unchanged in bf16 (S1)": "S1", "excess over chance (S5)": "S5"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.5 + 0.16 * max(6, len(layers))), layout="constrained")
    for axis, (title, key) in zip(axes, panels.items()):
        grid = np.full((len(layers), len(types)), np.nan)
        for name, module in report["modules"].items():
            parts = name.split(".")
            layer = next((part for part in parts if part.isdigit()), None)
            if layer in layers and parts[-1] in types and module[key] is not None:
                value = module[key]["excess"] if key == "S5" else module[key]
                grid[layers.index(layer), types.index(parts[-1])] = value
        limit = np.nanmax(np.abs(grid)) if key == "S5" and np.isfinite(grid).any() else None
        limits = {"vmin": -limit, "vmax": limit, "cmap": "RdBu"} if limit else {"cmap": "viridis"}
        image = axis.imshow(grid, aspect="auto", **limits)
        axis.set_xticks(range(len(types)), types, rotation=45, ha="right")
        axis.set_yticks(range(0, len(layers), max(1, len(layers) // 12)), layers[:: max(1, len(layers) // 12)])
        axis.set_title(title)
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("layer")
    return figure


def plot_tolerance(report: dict, plt):
    """U2: what "unchanged" reads for any tolerance, by matrix type."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    groups = {"all adapted": report["adapted"], **report["types"]}
    for axis, kind, label in zip(axes, ("absolute", "relative"), ("|change| at most", "|change| / |weight| at most")):
        for name, group in groups.items():
            width = 2.5 if name == "all adapted" else 1
            axis.semilogx(group["U2"]["tolerance"], group["U2"][kind], label=name, linewidth=width)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].axvline(PAPER_TOLERANCE, color="grey", linestyle=":")
    axes[0].set_ylabel("share counted as unchanged")
    axes[1].legend(fontsize=8)
    return figure


def plot_along(report: dict, plt):
    """Size, sparsity and rank at each checkpoint of a run."""
    along = report["along"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    ranks = [float("nan") if value is None else value for value in along["R1_effective_rank"]]
    axes[0].plot(along["steps"], along["U1_rms"], marker="o")
    axes[1].plot(along["steps"], along["S1"], marker="o", label="same bf16 bits (S1)")
    axes[1].plot(along["steps"], along["S2"], marker="s", label="within 1e-5 (S2)")
    axes[1].legend(fontsize=8)
    axes[2].plot(along["steps"], ranks, marker="o")
    for axis, title in zip(axes, ("RMS of the update (U1)", "unchanged share", "effective rank (R1)")):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return figure

"""`analyze.py sparsity`: base against an adapter or a second checkpoint, tensor by tensor.

    python analyze.py sparsity --base tiny --adapter runs/tiny-0          a run: its last checkpoint
    python analyze.py sparsity --base qwen-3b --adapter runs/qwen-3b-0/checkpoints/step_500 --json s.json --out plots
    python analyze.py sparsity --base BASE --tuned MERGED_OR_FINE_TUNED   any two safetensors checkpoints
    python analyze.py sparsity --base tiny --tuned runs/full              a run of --train full: its last checkpoint

The reference is what the forward pass of the training used (reference.py). Ids (U1, S1, ...) are explained in sizes.py
and spectra.py. Memory is that of a few matrices per worker. Left out: optimizer states, biases and norms of adapters,
models whose experts are stored as 3-d tensors.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from azr import console
from azr.command import MAX_WORKERS, Number
from azr.jsonl import write_json_atomic
from azr.models import model_path
from azr.policy.opening import agree, is_full, read_record, settle
from azr.weights import sizes, spectra
from azr.weights.files import Checkpoint, WeightsError, is_matrix, layer_of
from azr.weights.reference import (
    AdapterUpdate,
    PairUpdate,
    difference,
    merged_from_4bit,
    open_change,
    open_pair,
    reference_of,
)

PIECE = 1 << 24  # entries; larger tensors (embeddings) are read in pieces of rows


# ---------------------------------------------------------------- one tensor


@dataclass
class Measured:
    """Counts and findings of one tensor; `adapted`: a matrix that the update could change."""

    name: str
    adapted: bool
    size: sizes.Sizes
    shares: sizes.Shares
    matched: sizes.Shares | None = None
    ranks: dict = field(default_factory=dict)
    spectral: dict = field(default_factory=dict)
    stripes: dict = field(default_factory=dict)
    null: sizes.NullDraws | None = None
    overlaps: dict = field(default_factory=dict)


def measure(update, name: str, factor: float, spectral: bool) -> Measured:
    """Everything about one matrix. factor: what brings the whole update to MATCHED_RMS; 0 for an update of 0."""
    change = update.load(name)
    w0, delta = change.w0, change.delta
    size = sizes.sizes(w0, delta)
    check_finite(update, name, size)
    shares = sizes.compare(w0, delta, change.original, 1.0, change.stored)
    matched = sizes.compare(w0, delta, change.original, factor, change.stored)
    result = Measured(name, True, size, shares, matched)
    masks = {}
    if spectral:
        result.spectral, masks = spectra.principal(w0, delta)
    if change.singular is None and spectral:
        change.rank, change.singular = min(delta.shape), spectra.full_spectrum(delta)
    if change.singular is not None:
        result.ranks = spectra.rank_summary(change.singular, change.rank)
        if size.energy:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            rounded = delta if change.stored is None and stored_in_bf16(update, name) else None
            result.null = sizes.null_draws(w0, change.singular, factor, generator, masks, rounded)
    result.stripes = stripes(delta, result.null)
    result.overlaps = mask_overlaps(w0, delta, masks, result.null)
    return result


def stored_in_bf16(update, name: str) -> bool:
    """Whether the update is the difference of two bf16 tensors: what was too small for bf16 is not in it."""
    pair = () if update.tuned is None else (update.base, update.tuned)
    return bool(pair) and all(checkpoint.entries[name].dtype == torch.bfloat16 for checkpoint in pair)


def check_finite(update, name: str, size: sizes.Sizes) -> None:
    """Raises WeightsError with file and tensor if the sums of squares of base or update are NaN or infinite."""
    if math.isfinite(size.energy) and math.isfinite(size.base_energy):
        return
    bad = update.base if update.tuned is None or not update.base.tensor(name).isfinite().all() else update.tuned
    raise WeightsError(f"{bad.entries[name].file}: NaN or infinity in {name}")


def stripes(delta: torch.Tensor, null: sizes.NullDraws | None) -> dict:
    """S6: whether rows or columns hold more of the energy than chance gives."""
    report = {}
    for axis, energy in zip(("row", "column"), sizes.axis_energies(delta)):
        if (profile := sizes.profile(energy)) is not None:
            draws = getattr(null, f"{axis}_gini", None)
            report[f"{axis}s"] = {**profile, "gini_excess": sizes.excess(profile["gini"], draws)}
    return report


def mask_overlaps(w0: torch.Tensor, delta: torch.Tensor, masks: dict, null: sizes.NullDraws | None) -> dict:
    """G3: share of the changed entries that lies in each mask, with that of the null."""
    if not masks:
        return {}
    changed = sizes.bf16_bits(w0.float() + delta) != sizes.bf16_bits(w0)
    total = int(changed.sum())
    return {
        name: {
            "overlap": (share := sizes.ratio(int((changed & mask).sum()), total)),
            "null": float(null.overlaps[name].mean()) if null else None,
            "excess": sizes.excess(share, null.overlaps[name]) if null and total else None,
        }
        for name, mask in masks.items()
    }


def measure_rest(update, name: str) -> Measured:
    """A tensor that is no adapted matrix: of a pair it is compared, of an adapter only counted. Large: in pieces."""
    entry = update.base.entries[name]
    quantized = update.reference.quantization == "nf4" and is_matrix(name, entry.shape)
    size = shares = 0
    for first, last in row_pieces(entry):
        w0 = update.base.tensor(name, first, last)
        if update.tuned is None:
            counts = sizes.untouched(w0, quantized)
        else:
            delta = difference(update.tuned.tensor(name, first, last), w0)
            counts = sizes.sizes(w0, delta), sizes.compare(w0, delta, w0)
        check_finite(update, name, counts[0])
        size, shares = size + counts[0], shares + counts[1]
    return Measured(name, False, size, shares)


def row_pieces(entry) -> list[tuple[int, int | None]]:
    """[(first, last)] rows of pieces of at most PIECE entries, but at least one row; (0, None) is all of a tensor."""
    if entry.size <= PIECE or len(entry.shape) < 2:
        return [(0, None)]
    rows = entry.shape[0]
    step = max(1, PIECE * rows // entry.size)
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]


# ---------------------------------------------------------------- sums


def group_report(parts: list[Measured], parameters: int) -> dict:
    """The figures of a set of tensors, by their ids. parameters: of the whole model, for S4."""
    size, shares = sum(part.size for part in parts), sum(part.shares for part in parts)
    report = {**size.report(), **shares.report(), "S4": denominators(size.n, shares.s1, parameters)}
    matched = sum(part.matched or part.shares for part in parts)
    report[sizes.MATCHED] = {"S0": report["S0"], **matched.report(), "S4": denominators(size.n, matched.s1, parameters)}
    report["S5"], report[sizes.MATCHED]["S5"] = group_excess(parts, shares, matched)
    changed = [part for part in parts if part.adapted]
    for key in ("R1_effective_rank", "R1_stable_rank", "R1_participation_ratio", "R1_rank"):
        report[key] = mean_of([part.ranks[key] for part in changed if part.ranks.get(key) is not None])
    if len(parts) == 1 and parts[0].stripes:
        report["S6"] = {**(report["S6"] or {}), **parts[0].stripes}
    elif report["S6"] is not None:
        report["S6"] |= striped_share(changed)
    return report


def denominators(n: int, s1: float, parameters: int) -> dict:
    """S4: the unchanged share s1 of n weights, the same of all (the others do not change), and n / parameters."""
    share = n / parameters
    return {"S_adapted": s1, "S_whole": 1 - share * (1 - s1), "adapted_fraction": share}


def group_excess(parts: list[Measured], shares, matched) -> tuple[dict | None, dict | None]:
    """S5 as it is and at MATCHED_RMS: the observed share less the null, summed draw by draw over the matrices."""
    with_null = [part for part in parts if part.null is not None]
    moved = [part for part in parts if part.size.energy]
    if not with_null or len(with_null) != len(moved):
        return None, None
    still, excesses = shares.n - sum(part.size.n for part in with_null), []
    for observed, kind in ((shares, "spectrum"), (matched, "matched"), (shares, "flat")):
        draws = [part.size.n * values for part in with_null if (values := getattr(part.null, kind)) is not None]
        null = (sum(draws) + still) / shares.n if len(draws) == len(with_null) else None
        excesses.append(sizes.excess(observed.s1, null))
    return {**excesses[0], "flat": excesses[2]}, excesses[1]


def striped_share(parts: list[Measured]) -> dict:
    """Returns the share of a group's matrices whose rows (columns) are unequal beyond chance; chance gives 2.5 %."""
    result = {}
    for axis in ("rows", "columns"):
        excesses = [excess for part in parts if (excess := part.stripes.get(axis, {}).get("gini_excess"))]
        result[f"{axis}_striped_share"] = sizes.ratio(sum(e["low"] > 0 for e in excesses), len(excesses))
    return result


def spectral_report(parts: list[Measured]) -> dict:
    """Means over the matrices of what --spectral found, under the same keys."""
    report = {}
    for key in parts[0].spectral | parts[0].overlaps:
        values = [(part.spectral | part.overlaps)[key] for part in parts]
        report[key] = mean_of([value for value in values if value is not None])
    critical = [part.spectral["R2_critical_scale"] for part in parts]
    scales = [scale for scale in critical if scale is not None]
    report["R2_critical_scale"] = min(scales) if scales else None  # the matrix that is nearest to an intruder
    report["R2_margin"] = min(part.spectral["R2_margin"] for part in parts)
    return report


def mean_of(values: list):
    """Returns the mean of numbers, None without any; of dictionaries the means by key, leaving out None."""
    if not values or not isinstance(values[0], dict):
        return sum(values) / len(values) if values else None
    return {key: mean_of([value[key] for value in values if value[key] is not None]) for key in values[0]}


def report_of(parts: list[Measured], base: Checkpoint, spectral: bool) -> dict:
    """Returns the figures of all tensors, of the adapted ones, of each layer and matrix type, and of each tensor."""
    adapted = [part for part in parts if part.adapted]
    groups: dict[str, dict] = {"layers": {}, "types": {}}
    for part in adapted:
        groups["layers"].setdefault(str(layer_of(part.name)), []).append(part)
        groups["types"].setdefault(part.name.split(".")[-2], []).append(part)  # q_proj of ...q_proj.weight
    report = {
        "whole": group_report(parts, base.parameters),
        "adapted": group_report(adapted, base.parameters) | (spectral_report(adapted) if spectral else {}),
        **{kind: {key: group_report(group, base.parameters) for key, group in groups[kind].items()} for kind in groups},
        "modules": {
            part.name.removesuffix(".weight") if part.adapted else part.name: group_report([part], base.parameters)
            | part.spectral
            | part.overlaps
            for part in parts
            if part.adapted or part.size.energy
        },
    }
    ids = ("R2_", "G1_", "G2_", "G3_")  # the rest of the model does not turn: they are those of the adapted
    report["whole"] |= {key: value for key, value in report["adapted"].items() if key[:3] in ids}
    return report


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `analyze.py sparsity` to its parser."""
    parser.add_argument("--base", required=True, metavar="M", help="tiny, qwen-3b, a hub id, or a directory")
    which = parser.add_mutually_exclusive_group(required=True)
    what = "a LoRA, rsLoRA or DoRA adapter, or a run (of --train full too): its last checkpoint"
    which.add_argument("--adapter", type=Path, metavar="DIR", help=what)
    which.add_argument("--tuned", metavar="M", help="a merged or fully fine-tuned checkpoint in safetensors")
    what = "singular vectors: intruders, rotation, principal energy, and the null (S5) of full-rank updates; minutes"
    parser.add_argument("--spectral", action="store_true", help=what)
    parser.add_argument("--quantization", choices=("nf4", "none"), help="of the base in training; default: azr.json's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write modules.png and sparsity.json here")
    most = min(2, len(os.sched_getaffinity(0)))
    what = f"matrices at a time (default {most}; each adds up to 600 MB for a 3B model)"
    parser.add_argument("--workers", type=Number(int, 1, MAX_WORKERS), default=most, help=what)


def main(args: argparse.Namespace) -> int:
    """Measures, prints, writes. ModelError, in one line, for what cannot be measured."""
    # it recommends a kernel package that is not needed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the workers are the parallelism
    report = analyse(args)
    from azr.weights import sparsity_view

    for line in sparsity_view.lines(report):
        console.say(line)
    if args.out:
        sparsity_view.plot(report, args.out / "modules.png")
        console.say(f"\nplot: {args.out / 'modules.png'}")
    for path in filter(None, (args.json, args.out and args.out / "sparsity.json")):
        write_json_atomic(path, report)
    return 0


def analyse(args: argparse.Namespace) -> dict:
    """The whole report. WeightsError: what cannot be measured, before anything is written."""
    for folder in filter(None, (args.out, args.json and args.json.parent)):
        folder.mkdir(parents=True, exist_ok=True)  # before measuring, as it may be refused
    base = Checkpoint.open(model_path(args.base))
    if not base.matrices:
        raise WeightsError(f"{args.base} has no linear layers in numbered blocks: nothing to measure")
    update, notes = open_update(args, base)
    for note in notes:
        console.warn(note)

    energy = sum(parallel(update.energy, update.adapted, "size of the update", args.workers))
    size = sum(base.entries[name].size for name in update.adapted)
    if not math.isfinite(energy):
        energy = 0.0  # the matrix is found and named below
    factor = sizes.MATCHED_RMS / math.sqrt(energy / size) if energy else 0.0
    adapted = set(update.adapted)

    def one(name: str) -> Measured:
        return measure(update, name, factor, args.spectral) if name in adapted else measure_rest(update, name)

    # the largest first: no worker is left with one at the end
    names = sorted(base.entries, key=lambda name: -base.entries[name].size)
    by_name = {part.name: part for part in parallel(one, names, "tensors", args.workers)}
    parts = [by_name[name] for name in base.entries]
    return {**about(args, base, update, notes, factor), **report_of(parts, base, args.spectral)}


def open_update(args, base: Checkpoint) -> tuple[AdapterUpdate | PairUpdate, list[str]]:
    """Opens what is compared with the base: (update, lines to say). ModelError if it does not belong to the base."""
    of_run = args.tuned and (is_full(Path(args.tuned)) or (Path(args.tuned) / "checkpoints").is_dir())
    if args.tuned and not of_run:
        tuned = Checkpoint.open(args.tuned)
        notes = open_pair(base, tuned)
        record, where = read_record(tuned.directory), tuned.directory / "azr.json"
        quantization = settle("quantization", args.quantization, record, where) or "none"
        reference, more = reference_of(quantization, record, where, False)
        update = PairUpdate(base, tuned, reference)
        if merged_from_4bit(update):
            more.append(
                f"{args.tuned} is closer to the 4-bit base than to {args.base}: a merged adapter of a 4-bit base? Then "
                "add --quantization nf4, or the error of the quantization is measured, not the update"
            )
        return update, notes + more
    return open_change(agree(args.base, args.adapter or args.tuned, args.quantization), base)


def parallel(task: Callable, names: list[str], title: str, workers: int) -> Iterator:
    """task(name) of every name, in order; the first error stops the rest."""
    with console.bar(title) as advance, ThreadPoolExecutor(workers) as pool:
        for done, result in enumerate(pool.map(task, names), 1):
            yield result
            advance(done, len(names))


def about(args, base: Checkpoint, update, notes: list[str], factor: float) -> dict:
    """What was measured, for whoever finds the file later."""
    adapter = update.adapter
    kind = "pair"
    if adapter is not None:
        kind = "dora" if adapter.config.get("use_dora") else "rslora" if adapter.config.get("use_rslora") else "lora"
    return {
        "base": args.base,
        "update": str(adapter.directory) if adapter is not None else update.tuned.name,
        "kind": kind,
        "quantization": update.reference.quantization,
        "reference": str(update.reference),
        "rounded": update.reference.quantization == "none" and any(stored_in_bf16(update, n) for n in update.adapted),
        "parameters": base.parameters,
        "matrices": len(update.adapted),
        "matched_factor": factor,
        "excluded": base.excluded,
        "notes": notes,
    }

"""An update in time: its path along a run's checkpoints (T1).

    path_along(base, reference, {0: adapter, 25: adapter, ...}, run=map)

Mukherjee et al. 2025 (arXiv 2505.11711) found 72 % of the entries never touched, 8 % touched and cancelled, 20 %
changed in the end.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable

import numpy as np
import torch

from azr.weights import sizes, spectra
from azr.weights.files import Adapter, Checkpoint, WeightsError
from azr.weights.reference import Reference, energy_of

PATH_ROWS = 256  # of a matrix that the path along checkpoints looks at


def path_along(base: Checkpoint, reference: Reference, checkpoints: dict[int, Adapter], run: Callable) -> dict:
    """T1 of a run's checkpoints: net over path length, what was cancelled, and size and sparsity at each.

    From up to PATH_ROWS random rows of every matrix, weighted to the whole. The path starts at an update of 0.
    """
    names, steps = list(next(iter(checkpoints.values())).targets), list(checkpoints)
    if different := [step for step in steps if list(checkpoints[step].targets) != names]:
        raise WeightsError(f"step {different[0]} adapts other matrices than step {steps[0]}: not one run")
    rows = list(run(lambda name: path_of(base, reference, checkpoints, name), names, "along the run"))
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    n, path, moved = total["n"], float(np.sqrt(total["moved"]).sum()), total["absolute"]
    return {
        "T1_net_over_path": sizes.ratio(math.sqrt(total["energy"][-1]), path),
        "T1_cancelled_mass": 1 - total["net"] / moved if moved else None,
        "T1_moved_both_ways": total["both_ways"] / n,
        "T1_never_changed": total["never"] / n,
        "T1_changed_then_cancelled": total["cancelled"] / n,
        "T1_changed_at_the_end": 1 - (total["never"] + total["cancelled"]) / n,
        "rows_a_matrix": PATH_ROWS,
        "steps": steps,
        "U1_rms": np.sqrt(total["energy"] / n).tolist(),
        "S1": (total["same"] / n).tolist(),
        "S2": (total["near"] / n).tolist(),
        "R1_effective_rank": [sizes.ratio(a, b) for a, b in zip(total["effective"], total["ranked"])],
    }


def path_of(base: Checkpoint, reference: Reference, checkpoints: dict[int, Adapter], name: str) -> dict:
    """Sums of one matrix over a sample of rows, times rows / sampled rows; arrays have an entry a checkpoint."""
    w0, original, _ = reference.weights(base.tensor(name))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    rows = torch.randperm(len(w0), generator=generator)[:PATH_ROWS].sort()[0]
    w0, original = w0[rows], original[rows]
    weight, bits = base.entries[name].shape[0] / len(rows), sizes.bf16_bits(w0)
    last = torch.zeros(w0.shape)
    absolute, ever, up, down = torch.zeros(w0.shape), *(torch.zeros(w0.shape, dtype=torch.bool) for _ in range(3))
    sums = {key: np.zeros(len(checkpoints)) for key in ("energy", "moved", "same", "near", "effective", "ranked")}
    for i, adapter in enumerate(checkpoints.values()):
        factors = adapter.factors(name)
        magnitude = None if factors.magnitude is None else factors.magnitude[rows]
        delta = dataclasses.replace(factors, b=factors.b[rows], magnitude=magnitude).delta(w0)
        step, changed = delta - last, sizes.bf16_bits(w0.float() + delta) != bits
        shares = sizes.compare(w0, delta, w0 if original is w0 else original)
        sums["energy"][i], sums["moved"][i] = weight * energy_of(delta), weight * energy_of(step)
        sums["same"][i], sums["near"][i] = weight * shares.same, weight * shares.near
        if magnitude is None and (sums["energy"][i] > 0):
            summary = spectra.rank_summary(spectra.factor_spectrum(factors.b, factors.a, factors.scale), len(factors.a))
            sums["effective"][i], sums["ranked"][i] = summary["R1_effective_rank"], 1
        absolute += step.abs()
        up, down, ever, last = up | (step > 0), down | (step < 0), ever | changed, delta
    return {
        **sums,
        "n": weight * w0.numel(),
        "net": weight * last.abs().sum().item(),
        "absolute": weight * absolute.sum().item(),
        "both_ways": weight * int((up & down).sum()),
        "never": weight * int((~ever).sum()),
        "cancelled": weight * int((ever & ~changed).sum()),
    }

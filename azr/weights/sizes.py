"""What an update did to the weights of a matrix, definition by definition: sizes, sparsity, the null of chance.

    size, shares = sizes(w0, delta), compare(w0, delta, original)        # additive: sum them over matrices
    shares.s1, size.report()["U1_rms"]                                   # S is always the UNCHANGED share
    draws = null_draws(w0, singular_values, generator)                   # structureless updates of the same spectrum

w0: the weights that the forward pass used (with a 4-bit base the dequantised ones); original: those of the checkpoint;
delta: what was added, fp32. "Unchanged" means a different thing in each definition, and all of them read mostly the
size of the update: S1 in units of bf16 spacing, S2 against a fixed 1e-5, S3 against the distance between NF4 codes.
Everything runs over pieces that stay in the cache, and memory is that of one matrix. Left out: how files become
tensors (files.py), singular vectors (spectra.py), the command (sparsity.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from azr.weights.nf4 import NF4, PIECE, code_values, codes_under, pieces, quantize_pieces

TOLERANCES = tuple(10 ** (k / 2) for k in range(-16, -3))  # 1e-8 .. 1e-2, two a decade
PAPER_TOLERANCE = 1e-5  # Mukherjee et al. 2025, arXiv 2505.11711
MATCHED_RMS, MATCHED = 3e-5, "at_rms_3e-5"  # updates of different size are compared at this one; its key in reports
BIN_SHIFT = 18  # of the bits of an fp32 number: 5 bits of mantissa stay, bins 3 % wide
BINS = 1 << (31 - BIN_SHIFT)
DRAWS, T_QUANTILE = 16, 2.131  # null draws; Student's t for 95 % and 15 degrees of freedom
SAMPLE = 1024  # rows and columns of a null draw that are compared; all of a smaller matrix


class Additive:
    """Dataclasses of counts: the sum over matrices is the count of the union."""

    def __add__(self, other):
        """Field by field."""
        values = (getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self))
        return type(self)(*values)

    def __radd__(self, zero: int):
        """For `sum`, which begins with 0."""
        return self


def ratio(part: float, whole: float) -> float | None:
    """Returns part / whole, and None if the whole is 0."""
    return float(part) / float(whole) if whole else None


# ---------------------------------------------------------------- how large: U1, U2, S0, S6


@dataclass
class Sizes(Additive):
    """n entries; sums of squares; counts of |delta| at most each tolerance, absolute and relative to |w0|."""

    n: int
    zeros: int
    energy: float
    base_energy: float
    within: np.ndarray  # (tolerances,)
    within_relative: np.ndarray  # (tolerances,)
    histogram: np.ndarray  # (BINS,) entries by the leading bits of |delta|

    def report(self) -> dict:
        """U1, U2, S0 and the concentration part of S6, by their ids."""
        return {
            "parameters": self.n,
            "U1_rms": math.sqrt(self.energy / self.n),  # in the units of the weights
            "U1_rel_fro": ratio(math.sqrt(self.energy), math.sqrt(self.base_energy)),
            "U2": {
                "tolerance": list(TOLERANCES),
                "absolute": (self.within / self.n).tolist(),
                "relative": (self.within_relative / self.n).tolist(),
            },
            "S0": float(self.zeros / self.n),
            "S6": concentration(*binned_energy(self.histogram)),
        }


def sizes(w0: torch.Tensor, delta: torch.Tensor) -> Sizes:
    """Counts one tensor. w0: any float dtype, delta: fp32, any equal shapes."""
    w0, delta = w0.reshape(-1), delta.reshape(-1)
    within, relative = np.zeros(len(TOLERANCES), np.int64), np.zeros(len(TOLERANCES), np.int64)
    zeros, energy, base_energy, histogram = 0, 0.0, 0.0, np.zeros(BINS, np.int64)
    thresholds = np.array(TOLERANCES, np.float32)
    for start, end in pieces(delta.numel()):
        a, d = w0[start:end].float(), delta[start:end]
        energy += torch.dot(d, d).item()
        base_energy += torch.dot(a, a).item()
        d = d.abs()
        plain, share = d.numpy(), (d / a.abs()).numpy()
        zeros += np.count_nonzero(plain == 0)
        relative += np.count_nonzero(share != share)  # 0 / 0: what did not change is within every tolerance
        for i, tolerance in enumerate(thresholds):
            within[i] += np.count_nonzero(plain <= tolerance)
            relative[i] += np.count_nonzero(share <= tolerance)
        histogram += np.bincount(plain.view(np.int32) >> BIN_SHIFT, minlength=BINS)
    return Sizes(delta.numel(), zeros, energy, base_energy, within, relative, histogram)


def untouched(w0: torch.Tensor, quantized: bool) -> tuple[Sizes, Shares]:
    """Counts of a tensor that the update leaves as it is; only its norm and its zeros have to be read."""
    n, base_energy, zero_base = w0.numel(), 0.0, 0
    for start, end in pieces(n):
        a = w0.reshape(-1)[start:end].float()
        base_energy += torch.dot(a, a).item()
        zero_base += a.numel() - int(torch.count_nonzero(a))
    full, histogram = np.full(len(TOLERANCES), n), np.zeros(BINS, np.int64)
    histogram[0] = n
    size = Sizes(n, n, 0.0, base_energy, full, full.copy(), histogram)
    return size, Shares(n, n, zero_base, zero_base, n, *((n, n, n, 0, 0) if quantized else (0, 0, 0, 0, 0)))


def binned_energy(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(entries, mean of delta^2) of every bin that has entries, ascending."""
    bins = np.flatnonzero(histogram)
    low, high = (((bins + k).astype(np.uint32) << BIN_SHIFT).view(np.float32).astype(np.float64) for k in (0, 1))
    return histogram[bins], np.where(bins == 0, 0.0, (low * low + low * high + high * high) / 3)


def concentration(count: np.ndarray, energy: np.ndarray) -> dict | None:
    """Gini coefficient of an energy and the share that its largest 1 % holds; energies ascending, with their counts.

    Gini = 1 - sum_b (F_b - F_(b-1)) (L_b + L_(b-1)), L the Lorenz curve: 0 all equal, 1 all in one entry; 2/pi = 0.637
    for squares of a Gaussian. None for an update of 0.
    """
    total = float((count * energy).sum())
    if not total:
        return None
    entries = np.concatenate([[0.0], np.cumsum(count) / count.sum()])
    lorenz = np.concatenate([[0.0], np.cumsum(count * energy) / total])
    gini = 1 - float((np.diff(entries) * (lorenz[1:] + lorenz[:-1])).sum())
    return {"gini": gini, "top_1%_energy": 1 - float(np.interp(0.99, entries, lorenz))}


def axis_energies(delta: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """||delta||^2 of every row (m,) and of every column (n,), fp64."""
    m, n = delta.shape
    rows, columns, step = torch.empty(m, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), max(1, PIECE // n)
    for start in range(0, m, step):
        square = delta[start : start + step].square()
        rows[start : start + step] = square.sum(1)
        columns += square.sum(0)
    return rows.numpy(), columns.numpy()


def profile(energy: np.ndarray) -> dict | None:
    """`concentration` of the energies of rows (or columns): high if the update sits in stripes."""
    return concentration(np.ones(len(energy)), np.sort(energy))


# ---------------------------------------------------------------- what changed: S1, S2, S3


@dataclass
class Shares(Additive):
    """Counts of unchanged entries under each definition."""

    n: int
    same: int  # S1: the same bf16 bits
    zero_base: int
    zero_base_same: int
    near: int  # S2: within 1e-5 of the original, both in bf16
    coded: int = 0  # S3: entries with an NF4 code
    frozen: int = 0
    requantized: int = 0
    recovered: float = 0.0  # <dq(Q(w0 + delta)) - w0, delta> and ||delta||^2
    energy: float = 0.0
    blocks: int = 0
    scales: int = 0

    @property
    def s1(self) -> float:
        """S1: the share of the entries whose bf16 bits stay the same."""
        return float(self.same / self.n)

    def report(self) -> dict:
        """S1, S2 and S3 by their ids; None where there is nothing to count (no zero weights, no 4-bit base)."""
        return {
            "S1": self.s1,
            "S1_zero_base": ratio(self.zero_base_same, self.zero_base),
            "S1_nonzero_base": ratio(self.same - self.zero_base_same, self.n - self.zero_base),
            "zero_base_share": float(self.zero_base / self.n),
            "S2": float(self.near / self.n),
            "S3_code_frozen_scale": ratio(self.frozen, self.coded),
            "S3_code_requantized": ratio(self.requantized, self.coded),
            "S3_scale_unchanged": ratio(self.scales, self.blocks),
            "S3_survival": ratio(self.recovered, self.energy),
        }


def bf16_bits(x: torch.Tensor) -> torch.Tensor:
    """Returns the bits of x rounded to bf16, int16 of the same shape. 0 and -0 differ in them."""
    return x.bfloat16().view(torch.int16)


def compare(
    w0: torch.Tensor, delta: torch.Tensor, original: torch.Tensor, factor: float = 1.0, stored: NF4 | None = None
) -> Shares:
    """Counts of one matrix for factor * delta. original: the checkpoint's weights, w0 itself for an unquantized base;
    stored: the NF4 codes of the base, whose S3 is then counted too."""
    n, alone = w0.numel(), original is w0
    w0, delta, original = w0.reshape(-1), delta.reshape(-1), original.reshape(-1)
    same = zero_base = zero_base_same = near = 0
    for start, end in pieces(n):
        a, d = w0[start:end].float(), delta[start:end]
        before, after = a.bfloat16(), torch.add(a, d, alpha=factor).bfloat16()
        # numpy's comparisons are several times as fast as torch's on pieces of this size
        equal, zero = before.view(torch.int16).numpy() == after.view(torch.int16).numpy(), a.numpy() == 0
        same += np.count_nonzero(equal)
        if count := np.count_nonzero(zero):
            zero_base += count
            zero_base_same += np.count_nonzero(equal & zero)
        if not alone:
            a = original[start:end].float()
            before, after = a.bfloat16(), torch.add(a, d, alpha=factor).bfloat16()
        near += np.count_nonzero((after.float() - before.float()).abs_().numpy() <= np.float32(PAPER_TOLERANCE))
    codes = compare_codes(w0, delta, factor, stored) if stored is not None else ()
    return Shares(n, same, zero_base, zero_base_same, near, *codes)


def compare_codes(w0: torch.Tensor, delta: torch.Tensor, factor: float, stored: NF4) -> tuple:
    """The S3 counts: w0 + delta under the frozen scales, and quantized anew. The sum is in fp32, the kindest case: a
    merge that rounds it to bf16 first loses more."""

    def source(start: int, end: int) -> torch.Tensor:
        return torch.add(w0[start:end].float(), delta[start:end], alpha=factor)

    n = len(stored.codes)
    # by the scales as they are read back, which a merge that keeps them would have, not by the block's own maxima
    frozen = np.count_nonzero(codes_under(source, stored.scales, n, stored.block) == stored.codes)
    new = quantize_pieces(source, n, stored.block, stored.scale_codes is not None)
    requantized = np.count_nonzero(new.codes == stored.codes)
    if stored.scale_codes is None:
        scales = torch.count_nonzero(new.scales == stored.scales)
    else:
        scales = torch.count_nonzero(new.scale_codes == stored.scale_codes)
    values, recovered, energy = code_values(), 0.0, 0.0
    for start, end in pieces(n):
        d = delta[start:end]
        recovered += factor * torch.dot(new.piece(start, end, values) - w0[start:end].float(), d).item()
        energy += factor * factor * torch.dot(d, d).item()
    return n, frozen, requantized, recovered, energy, len(stored.scales), int(scales)


# ---------------------------------------------------------------- the null: S5


@dataclass
class NullDraws:
    """S1 of structureless updates, one a draw: (DRAWS,) each. Row and column profiles where they are known."""

    spectrum: np.ndarray  # the same singular values
    matched: np.ndarray | None  # the same, at MATCHED_RMS; None of an update that rounding has changed already
    flat: np.ndarray  # as many equal singular values, the same norm
    row_gini: np.ndarray | None
    column_gini: np.ndarray | None
    overlaps: dict[str, np.ndarray]  # share of the changed entries that lies in a mask


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, columns) fp32 with orthonormal columns, uniform over all such."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def null_draws(
    w0: torch.Tensor,
    singular: torch.Tensor,
    factor: float,
    generator: torch.Generator,
    masks: dict[str, torch.Tensor] | None = None,
    rounded: torch.Tensor | None = None,
) -> NullDraws:
    """S1 of DRAWS updates U diag(s) V^T with the given singular values (k,) and random orthonormal U, V.

    w0: (m, n). Compared on SAMPLE random rows x SAMPLE random columns, other ones in every draw: the spread of the
    draws contains the sampling error. factor scales to MATCHED_RMS. masks: name -> (m, n) bool. rounded: (m, n), the
    update itself where base and tuned weights are stored in bf16. What was too small for bf16 is gone from it, so the
    draws are rounded too, after they are scaled to have as much energy then (`scale_to_stored`). The spectrum is that
    of the rounded update: one of rank 4 and RMS 3e-5 reads 1.5 points sparser than it is, of rank 16 or more as it is.
    """
    m, n = w0.shape
    full = len(singular) > min(SAMPLE, m, n) // 2
    if full and n < m:  # few of the short axis, all of the long one: see null_block
        turned = {name: mask.T for name, mask in (masks or {}).items()}
        return null_draws(w0.T, singular, factor, generator, turned, None if rounded is None else rounded.T)
    flat = torch.full_like(singular, float(singular.square().mean().sqrt()))
    shares = {name: [] for name in ("spectrum", "matched", "flat", "row", "column")}
    overlaps = {name: [] for name in masks or {}}
    for _ in range(DRAWS):
        rows = torch.randperm(m, generator=generator)[: SAMPLE // 8 if full else SAMPLE]
        columns = torch.arange(n) if full else torch.randperm(n, generator=generator)[:SAMPLE]
        base = w0[rows][:, columns].float()
        if full:
            update, level = (null_block(s, len(rows), m, n, generator) for s in (singular, flat))
        else:
            u, v = orthonormal(m, len(singular), generator), orthonormal(n, len(singular), generator)
            update, level = ((u[rows] * s) @ v[columns].T for s in (singular, flat))
            shares["row"].append(profile((u.square() @ singular.square()).numpy())["gini"])
            shares["column"].append(profile((v.square() @ singular.square()).numpy())["gini"])
        if rounded is not None:
            part = rounded[rows][:, columns]
            update, level = (draw * scale_to_stored(base, draw, part) for draw in (update, level))
        bits = bf16_bits(base)
        changed = bf16_bits(base + update) != bits
        shares["spectrum"].append(1 - changed.float().mean().item())
        if rounded is None:
            shares["matched"].append((bf16_bits(base + factor * update) == bits).float().mean().item())
        shares["flat"].append((bf16_bits(base + level) == bits).float().mean().item())
        for name, mask in (masks or {}).items():
            overlaps[name].append((changed & mask[rows][:, columns]).sum().item() / max(1, changed.sum().item()))
    values = {name: np.array(shares[name]) if shares[name] else None for name in shares}
    return NullDraws(*values.values(), {name: np.array(draws) for name, draws in overlaps.items()})


def null_block(singular: torch.Tensor, rows: int, m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, n): random rows of U diag(s) V^T for a spectrum of (nearly) full rank k <= m <= n, without U or V.

    With U square, its rows are `rows` orthonormal vectors of R^m; U diag(s) = P S Q^T, and V Q is distributed as V:
    the block is P S V'^T, and V' (n, rows) is drawn directly.
    """
    rows_of_u = orthonormal(m, rows, generator).T[:, : len(singular)]
    p, s, _ = torch.linalg.svd(rows_of_u * singular, full_matrices=False)
    return (p * s) @ orthonormal(n, len(s), generator).T


def scale_to_stored(base: torch.Tensor, update: torch.Tensor, stored: torch.Tensor) -> float:
    """The c for which bf16(base + c * update) - base has the energy of `stored`, to some 1 %; all (rows, columns) fp32,
    base in bf16's values. Secants in logarithms: the energy grows with c, nearly as a power of it."""
    target = float(stored.square().sum())
    if not target or not float(update.square().sum()):
        return 0.0

    def energy(c: float) -> float:
        return float(((base + c * update).bfloat16().float() - base).square().sum())

    low, high, c = -60.0, 60.0, 1.0  # logarithms of the c between which it lies
    for _ in range(40):
        found = energy(c)
        if abs(found / target - 1) < 0.01:
            break
        low, high = (low, math.log(c)) if found > target else (math.log(c), high)
        guess = math.log(c) + math.log(target / found) / 2 if found else high
        c = math.exp(guess if low < guess < high else (max(low, -20) + min(high, 20)) / 2)
    return c


def excess(observed: float, null: np.ndarray | None) -> dict | None:
    """observed minus the mean of the null, and the 95 % interval within which the difference of a structureless update
    would lie around it: outside if 0 is not in [low, high].

    A prediction interval, t * sd * sqrt(1 + 1/draws): one more draw of the null, not the mean of many. `null`:
    (draws,), of one matrix, or weighted sums over matrices.
    """
    if null is None:
        return None
    mean, half = float(null.mean()), T_QUANTILE * float(null.std(ddof=1)) * math.sqrt(1 + 1 / len(null))
    return {"excess": observed - mean, "low": observed - mean - half, "high": observed - mean + half, "null": mean}

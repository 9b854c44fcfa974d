"""Spectra of an update: how many directions it uses, whether it is on or off the base's principal ones.

    s = factor_spectrum(b, a, scale)                     # all singular values of scale * B A, from r x r matrices
    rank_summary(s, rank=r)                              # R1: effective and stable rank, participation ratio
    found, masks = principal(w0, delta)                  # R2, G1, G2 and the masks of G3; minutes for a 3B model

R1 is exact and free for LoRA: QR of B and of A^T, then the r x r core. The rest needs the singular vectors of the base
and of the tuned matrix; they come from an eigendecomposition of W W^T on the shorter side. Plain rank / min(m, n) is
not here: for LoRA it is r / min(m, n) whatever was learned. Left out: iterative solvers (their top vectors do not
converge on the nearly flat spectra of real weights, and an unconverged vector looks like an intruder).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

INTRUDER_TOP = 10  # leading singular vectors that are looked at, Shuttleworth et al. 2024, arXiv 2410.21228
INTRUDER_EPSILON = 0.5
EPSILONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LARGEST_SCALE = 1024.0  # multiples of the update beyond which no threshold is looked for
PRINCIPAL_SHARE = 0.1  # of the shorter side: how many singular vectors are "principal"
MASK_SHARE = 0.5  # of the entries: the principal and the low-magnitude mask of arXiv 2511.08567


# ---------------------------------------------------------------- R1


def factor_spectrum(b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """Singular values of scale * B A, (r,) fp32, descending. b: (m, r), a: (r, n)."""
    left, right = torch.linalg.qr(b.double())[1], torch.linalg.qr(a.double().T)[1]
    return abs(scale) * torch.linalg.svdvals(left @ right.T).float()


def full_spectrum(delta: torch.Tensor) -> torch.Tensor:
    """All singular values of an update that has no factors, (min(m, n),) fp32, descending: seconds for a large one."""
    return Eigen.of(delta).s.float()


def rank_summary(s: torch.Tensor, rank: int) -> dict:
    """R1 of singular values s: effective rank exp(-sum p log p), p = s_i / sum s (Roy and Vetterli 2007); stable rank
    ||D||_F^2 / ||D||_2^2; participation ratio (sum s^2)^2 / sum s^4. 1 .. rank each; None for an update of 0."""
    s = s.double()
    names = ("R1_effective_rank", "R1_stable_rank", "R1_participation_ratio")
    if not s.max() > 0:
        return {**dict.fromkeys(names), "R1_rank": rank}
    # In the limit p log p is 0 at p = 0; in floating point it is NaN.
    p = s[s > 0] / s.sum()
    energy = s.square()
    values = (
        math.exp(-(p * p.log()).sum().item()),
        (energy.sum() / energy.max()).item(),
        (energy.sum().square() / energy.square().sum()).item(),
    )
    return {**dict(zip(names, values)), "R1_rank": rank}


# ---------------------------------------------------------------- singular vectors


@dataclass(frozen=True)
class Eigen:
    """W (m, n) with m <= n or the transpose of a taller one: u (m, m) its left singular vectors, s (m,) descending."""

    w: torch.Tensor
    u: torch.Tensor
    s: torch.Tensor

    @classmethod
    def of(cls, w: torch.Tensor) -> Eigen:
        """Decomposes a matrix of any shape: its `working` form, by way of W W^T."""
        w = working(w)
        return cls(w, *decompose(w @ w.T))

    def other(self, k: int) -> torch.Tensor:
        """Returns the singular vectors on the longer side that belong to the first k, (n, k)."""
        return (self.w.T @ self.u[:, :k]) / self.s[:k].clamp(min=1e-30)


def working(w: torch.Tensor) -> torch.Tensor:
    """Short side first, fp64 where that is cheap."""
    w = w if w.shape[0] <= w.shape[1] else w.T
    return w.double() if w.shape[0] <= 1024 else w.float()


def decompose(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns left singular vectors (m, m) and singular values (m,), descending, of W from W W^T (m, m)."""
    # Eigenvalues are squares of singular values; by rounding the least of them can come out below 0.
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), values.flip(0).clamp(min=0).sqrt()


# ---------------------------------------------------------------- R2, G1, G2, masks of G3


def principal(w0: torch.Tensor, delta: torch.Tensor) -> tuple[dict, dict[str, torch.Tensor]]:
    """R2, G1 and G2 of w0 -> w0 + delta, and the masks of G3: name -> (m, n) bool. A delta of 0 gives None values.

    k, the number of principal directions, is a tenth of the shorter side.
    """
    tall = w0.shape[0] > w0.shape[1]
    base, update = Eigen.of(w0), working(delta)
    cross = base.w @ update.T
    # The three parts of (W0 + t D)(W0 + t D)^T, so that this matrix costs no product for any t that is tried.
    gram, cross, square = base.w @ base.w.T, cross + cross.T, update @ update.T

    def tuned(scale: float) -> Eigen:
        return Eigen(base.w + scale * update, *decompose(gram + scale * cross + scale * scale * square))

    k = max(1, round(PRINCIPAL_SHARE * len(base.s)))
    one = tuned(1.0)
    figures = {
        "U1_rel_spectral": (decompose(square)[1][0] / base.s[0]).item(),
        **intruders(base, one, tuned, tall),
        **principal_energy(base, update, k, tall),
        **rotation(base, one, k, tall),
    }
    return figures, masks(w0, base, k, tall)


def intruder_cosines(base: Eigen, one: Eigen, tall: bool) -> torch.Tensor:
    """(top,): of each leading left singular vector of the tuned matrix, the largest |cosine| to any of the base."""
    top = min(INTRUDER_TOP, len(base.s))
    if not tall:
        return (base.u.T @ one.u[:, :top]).abs().amax(0)
    # the left side is the longer one: U0^T u = S0^-1 V0^T W0^T u, over directions that the base has at all
    keep = base.s > 1e-6 * base.s[0]
    return ((base.u[:, keep].T @ (base.w @ one.other(top))) / base.s[keep, None]).abs().amax(0)


def intruders(base: Eigen, one: Eigen, tuned: Callable[[float], Eigen], tall: bool) -> dict:
    """R2: leading tuned vectors that resemble no base vector, and how far the update is from having one.

    R2_critical_scale: the multiple of the update, to a factor of sqrt(2), at which the first intruder appears; None if
    not below LARGEST_SCALE. A small update has none, so the distance is what tells two of them apart.
    """
    cosines = intruder_cosines(base, one, tall)
    low, high = 1.0, LARGEST_SCALE

    def appears(scale: float) -> bool:
        return bool((intruder_cosines(base, tuned(scale), tall) < INTRUDER_EPSILON).any())

    if (cosines < INTRUDER_EPSILON).any():
        high = 1.0
    elif not appears(high):
        high = None
    # Bisection of log scale, as if an intruder that has appeared stayed when the update grows on.
    while high is not None and high / low > math.sqrt(2):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if appears(middle) else (middle, high)
    return {
        "R2_intruders": {str(epsilon): int((cosines < epsilon).sum()) for epsilon in EPSILONS},
        "R2_margin": cosines.min().item() - INTRUDER_EPSILON,
        "R2_critical_scale": high,
    }


def principal_energy(base: Eigen, update: torch.Tensor, k: int, tall: bool) -> dict:
    """G1: share of ||D||^2 in the span of the first k singular vectors of the base, with what a random update has."""
    total = update.square().sum()
    if not total > 0:
        return dict.fromkeys(("G1_both", "G1_left", "G1_right"))
    short, long = base.u[:, :k].T @ update, update @ base.other(k)
    sides = {"short": short.square().sum() / total, "long": long.square().sum() / total}
    # An update without preference has in k of m directions k / m of its energy.
    expected = {"short": k / update.shape[0], "long": k / update.shape[1]}
    left, right = ("long", "short") if tall else ("short", "long")
    both = (base.u[:, :k].T @ long).square().sum() / total
    return {
        "G1_both": {"share": both.item(), "random": expected["short"] * expected["long"], "k": k},
        "G1_left": {"share": sides[left].item(), "random": expected[left], "k": k},
        "G1_right": {"share": sides[right].item(), "random": expected[right], "k": k},
    }


def rotation(base: Eigen, one: Eigen, k: int, tall: bool) -> dict:
    """G2: principal angles between the first k singular vectors before and after, degrees, and the normalised spectral
    shift ||s(W) - s(W0)|| / ||s(W0)||."""
    short = angles(base.u[:, :k], one.u[:, :k])
    # W^T u / s is orthonormal only as far as u is exact, and `angles` would take the rest for a rotation.
    long = angles(torch.linalg.qr(base.other(k))[0], torch.linalg.qr(one.other(k))[0])
    left, right = (long, short) if tall else (short, long)
    shift = (one.s - base.s).norm() / base.s.norm()
    return {"G2_left_angle": left, "G2_right_angle": right, "G2_spectral_shift": shift.item()}


def angles(p: torch.Tensor, q: torch.Tensor) -> dict:
    """Principal angles between the spans of orthonormal columns, degrees. From sines: cosines lose small angles."""
    residual = q - p @ (p.T @ q)
    degrees = torch.rad2deg(torch.linalg.svdvals(residual).clamp(max=1).asin())
    return {"mean": degrees.mean().item(), "max": degrees.max().item(), "k": p.shape[1]}


def masks(w0: torch.Tensor, base: Eigen, k: int, tall: bool) -> dict[str, torch.Tensor]:
    """The masks of G3, each half of the entries: the largest of the rank-k part of W0, and the smallest of W0."""
    principal_part = base.u[:, :k] @ (base.u[:, :k].T @ base.w)
    principal_part = (principal_part.T if tall else principal_part).abs()
    magnitude = w0.float().abs()
    return {"G3_principal": principal_part > kth(principal_part), "G3_low_magnitude": magnitude <= kth(magnitude)}


def kth(x: torch.Tensor) -> torch.Tensor:
    """The value that MASK_SHARE of the entries do not exceed."""
    return x.reshape(-1).kthvalue(max(1, int(MASK_SHARE * x.numel())))[0]

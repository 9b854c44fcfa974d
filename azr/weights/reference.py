"""What is compared with what: an adapter or a second checkpoint, against the weights that the training really used.

    reference, notes = reference_of("nf4", adapter.info, adapter.directory / "azr.json", adapter=True)
    change = AdapterUpdate(base, adapter, reference).load("model.layers.0.mlp.up_proj.weight")
    change.w0, change.original, change.delta            # (m, n): reference, checkpoint, update in fp32

The reference of an adapter on a 4-bit base is the DEQUANTISED base: it is what the forward pass used. Against the
original checkpoint an adapter of any size changes 97 % of the weights, by the error of the quantization. Left out:
what the numbers mean (sizes.py, spectra.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from azr.policy.opening import Opening, check_base, is_full
from azr.weights import nf4, spectra
from azr.weights.files import Adapter, Checkpoint, WeightsError, is_matrix, revision_of

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------- the reference


@dataclass(frozen=True)
class Reference:
    """How the forward pass of the training held the base's matrices."""

    quantization: str  # "nf4" | "none"
    dtype: torch.dtype | None  # None: as stored
    block: int = 64
    double: bool = True

    def __str__(self) -> str:
        dtype = "stored" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        if self.quantization == "none":
            return dtype
        double = "double quantization" if self.double else "single quantization"
        return f"NF4, blocks of {self.block}, {double}, dequantised to {dtype}"

    def weights(self, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, nf4.NF4 | None]:
        """(w0, original, NF4 codes), each of the shape of `original` (m, n); w0 is original for an unquantized base.

        WeightsError: in 4 bits, and n is no multiple of the block size. A block then goes on in the next row, which
        bitsandbytes' CPU and GPU kernels (0.50.2) read differently: what the training used cannot be told.
        """
        held = original if self.dtype is None else original.to(self.dtype)
        if self.quantization == "none":
            return held, held, None
        if original.shape[1] % self.block:
            raise WeightsError(
                f"rows of {original.shape[1]} weights are no whole number of NF4's blocks of {self.block}"
            )
        stored = nf4.quantize(held, self.block, self.double)
        return stored.dequantize(held.dtype).view_as(original), original, stored


def reference_of(quantization: str, record: dict, where: Path, adapter: bool) -> tuple[Reference, list[str]]:
    """How the base was held, by the agreed quantization and the azr.json at `where`; the lines say what was assumed."""
    lines, name = [], record.get("dtype")
    if name is None and adapter:
        lines.append(f"{where.parent} does not say in which dtype its base was computed: bfloat16 is assumed")
        name = "bfloat16"
    if name is not None and name not in COMPUTE_DTYPES:
        raise WeightsError(f"{where}: dtype {name} is unknown")
    block, double = int(record.get("block_size") or 64), record.get("double_quant")
    if nf4.PIECE % block:
        raise WeightsError(f"{where}: block size {block} is none of NF4's")
    return Reference(quantization, COMPUTE_DTYPES.get(name), block, True if double is None else double), lines


# ---------------------------------------------------------------- what is compared


@dataclass
class Change:
    """One matrix: reference, checkpoint, update; of a LoRA also what its factors give away."""

    w0: torch.Tensor
    original: torch.Tensor
    delta: torch.Tensor
    stored: nf4.NF4 | None
    rank: int | None = None
    singular: torch.Tensor | None = None  # (rank,)


@dataclass(frozen=True)
class AdapterUpdate:
    """The update that an adapter makes to the matrices of its base."""

    base: Checkpoint
    adapter: Adapter
    reference: Reference
    tuned = None  # a `PairUpdate` has a second checkpoint instead of an adapter

    @property
    def adapted(self) -> list[str]:
        """The names of the matrices that the adapter changes."""
        return list(self.adapter.targets)

    def load(self, name: str) -> Change:
        """Reads one matrix and makes its update (m, n); rank and singular values (r,) only for LoRA, not for DoRA."""
        w0, original, stored = self.reference.weights(self.base.tensor(name))
        factors = self.adapter.factors(name)
        change = Change(w0, original, factors.delta(w0), stored)
        if factors.magnitude is None:
            change.rank = factors.a.shape[0]
            change.singular = spectra.factor_spectrum(factors.b, factors.a, factors.scale)
        return change

    def energy(self, name: str) -> float:
        """||delta||^2, for plain LoRA from r x r matrices: s^2 <B^T B, A A^T>."""
        factors = self.adapter.factors(name)
        if factors.magnitude is not None:
            return energy_of(self.load(name).delta)
        a, b = factors.a.double(), factors.b.double()
        return factors.scale**2 * max(0.0, ((b.T @ b) * (a @ a.T)).sum().item())


@dataclass(frozen=True)
class PairUpdate:
    """The update that leads from a base to a second checkpoint of the same architecture."""

    base: Checkpoint
    tuned: Checkpoint
    reference: Reference
    adapter = None

    @property
    def adapted(self) -> list[str]:
        """The names of the matrices that could differ: all of the base."""
        return self.base.matrices

    def load(self, name: str) -> Change:
        """Reads one matrix of both and subtracts, (m, n); without factors, rank and singular values are None."""
        w0, original, stored = self.reference.weights(self.base.tensor(name))
        return Change(w0, original, difference(self.tuned.tensor(name), w0), stored)

    def energy(self, name: str) -> float:
        """Returns ||delta||^2 of one matrix, which takes reading and subtracting all of it."""
        return energy_of(self.load(name).delta)


def difference(tuned: torch.Tensor, w0: torch.Tensor) -> torch.Tensor:
    """tuned - w0 in fp32, piece by piece: as a whole it takes four times as long."""
    out = torch.empty(w0.shape)
    flat, after, before = out.view(-1), tuned.view(-1), w0.reshape(-1)
    for start, end in nf4.pieces(flat.numel()):
        torch.sub(after[start:end].float(), before[start:end].float(), out=flat[start:end])
    return out


def energy_of(delta: torch.Tensor) -> float:
    """Returns ||delta||^2 of an fp32 tensor of any shape, summed piece by piece."""
    flat = delta.reshape(-1)
    return sum(torch.dot(flat[start:end], flat[start:end]).item() for start, end in nf4.pieces(flat.numel()))


def open_pair(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Checks that the two belong together; what is named in base.excluded is not counted. Returns lines to say."""
    for name in sorted(base.entries.keys() ^ tuned.entries.keys()):
        if name != "lm_head.weight":
            has, lacks = (base, tuned) if name in base.entries else (tuned, base)
            raise WeightsError(f"{lacks.name} lacks {name}, which {has.name} has: not the same architecture")
        base.excluded.setdefault(name, "stored apart in one of the two, tied to the embedding in the other")
    for name in (name for name in base.entries if name in tuned.entries):
        if (ours := base.entries[name].shape) != (theirs := tuned.entries[name].shape):
            if is_matrix(name, ours) or len(ours) != 2 or ours[1:] != theirs[1:]:
                raise WeightsError(f"{name} has shape {ours} in {base.name} and {theirs} in {tuned.name}")
            base.excluded[name] = f"{ours[0]} rows in the base, {theirs[0]} in the tuned model (another vocabulary)"
    for name in base.excluded:
        base.entries.pop(name, None)
    if base.dtypes() != tuned.dtypes():
        return [
            f"stored dtypes differ: {base.dtypes()} and {tuned.dtypes()}; U and S0 compare the stored values, "
            "S1 and S2 both rounded to bf16"
        ]
    return []


def open_change(opening: Opening, base: Checkpoint) -> tuple[AdapterUpdate | PairUpdate, list[str]]:
    """(the adapter, or the checkpoint of --train full, of `opening` on its base; lines to say). ModelError if they do
    not belong together."""
    notes = [*opening.doubts, *check_base(opening, {"revision": revision_of(base.directory)})]
    whole = is_full(opening.adapter)
    change = Checkpoint.open(opening.adapter) if whole else Adapter.open(opening.adapter, base)
    reference, assumed = reference_of(opening.quantization, opening.record, opening.adapter / "azr.json", True)
    if whole:
        assumed += open_pair(base, change)
    return (PairUpdate if whole else AdapterUpdate)(base, change, reference), notes + assumed


def merged_from_4bit(update: PairUpdate) -> bool:
    """Whether `tuned` lies much closer to the dequantised base than to the base: an adapter merged on a 4-bit base."""
    name = next((name for name in update.adapted if update.base.entries[name].shape[1] % 64 == 0), None)
    if name is None or update.reference.quantization == "nf4":
        return False
    tuned, base = update.tuned.tensor(name).float(), update.base.tensor(name)
    held = nf4.quantize(base).dequantize(torch.float32).view_as(tuned)
    return bool((tuned - held).norm() < (tuned - base.float()).norm() / 2)

"""`train_azr.py export`: a run's adapter merged into its base, as a plain bf16 model that any other program reads.

    python train_azr.py export runs/qwen-3b-0 --out models/azr-3b                     the last checkpoint, verified
    python train_azr.py export runs/qwen-3b-0 --checkpoint best --out models/azr-3b   best by held-out accuracy
    python train_azr.py export runs/a/checkpoints/step_50 --out models/a-50
    hf upload NAME models/a-50 --private                                              and onto the hub, if you like

Merge: the base's weights as the forward pass of the training used them (a 4-bit base dequantised, also where it has no
adapter) + (alpha / r) B A in fp32, rounded once to bf16. One tensor at a time, so a 7B model needs no more memory than
its largest matrices; the verification (export_check.py) loads the models. DIR is written aside and renamed: a kill
leaves DIR.tmp-PID, which the next export of DIR removes. What fails its verification becomes DIR.unverified.

Exit codes: 0 verified (or asked not to be), 1 verification failed, 2 bad input, nothing written. Left out:
GGUF (llama.cpp's convert_hf_to_gguf.py reads DIR), 4-bit merges (they lose the update), adapters (PEFT reads them).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from azr.command import Parser
from azr.console import bar, say, warn
from azr.jsonl import write_json_atomic
from azr.models import only_cached
from azr.policy.opening import ModelError, Opening, agree, check_base, checkpoints_of
from azr.runs import RunError, fault, read_metrics
from azr.tasks import MODES
from azr.weights import model_card, nf4
from azr.weights.files import Adapter, Checkpoint, WeightsError, is_matrix, read_json, revision_of
from azr.weights.reference import Reference, reference_of
from azr.weights.sizes import Additive
from azr.weights.sparsity import describe, row_pieces

SHARD_BYTES = 4e9  # of the largest file: one upload that fails costs no more than that
WELL_STORED = 0.9  # share of the update along its own direction, below which a warning says that rounding lost it
# of the base, as they are; base.json and tokenizer_check.json: of the embedded model, which this repository reads
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "base.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_check.json",
    "generation_config.json",
)
FROM_HUB = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]


class ExportError(ValueError):
    """Nothing can be exported; one line that says why and what to do. Exit code 2."""


# ---------------------------------------------------------------- what is exported


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the run directory it lies in (None: it was copied out of one)."""

    checkpoint: Path
    step: int | None
    run: Path | None

    @property
    def trained_on_gpu(self) -> bool:
        """Whether environment.json of the run names a GPU; False without that file."""
        return self.run is not None and read_json(self.run / "environment.json").get("gpu") is not None


def find_source(path: Path, asked: str | None) -> Source:
    """`path`: a run directory or one of its checkpoints; asked: step_N, best, last (None: last). ExportError."""
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        if asked is not None:
            raise ExportError(f"{path} is a checkpoint already; give the run directory with --checkpoint {asked}")
        number = path.name.removeprefix("step_")
        run = path.absolute().parent.parent
        return _intact(
            Source(path, int(number) if number.isdigit() else None, run if (run / "metrics.jsonl").is_file() else None)
        )
    checkpoints = checkpoints_of(path)
    if not checkpoints:
        what = "has no checkpoint" if path.is_dir() else "does not exist"
        raise ExportError(f"{path} {what}: export takes a run directory, or a checkpoint directory in it")
    asked = asked or "last"
    if asked in ("last", "best"):
        step = max(checkpoints) if asked == "last" else best_step(path, list(checkpoints))
    elif (number := asked.removeprefix("step_")).isdigit() and int(number) in checkpoints:
        step = int(number)
    else:
        have = ", ".join(f"step_{step}" for step in checkpoints)
        raise ExportError(f"{path} has no checkpoint {asked}: take last, best or one of {have}")
    return _intact(Source(checkpoints[step], step, path))


def _intact(source: Source) -> Source:
    if (source.checkpoint / "state" / "checksums.json").is_file() and (wrong := fault(source.checkpoint)):
        raise ExportError(f"{source.checkpoint} is damaged: {wrong}; export another checkpoint with --checkpoint")
    return source


def best_step(run: Path, steps: list[int]) -> int:
    """The checkpoint with the highest held-out greedy accuracy (mean over the modes): training marks it, in runs from
    before that it is found in metrics.jsonl. ExportError: none was evaluated."""
    record = read_json(run / "checkpoints" / "best.json")
    scores = {record["step"]: record["value"]} if {"step", "value"} <= set(record) else {}
    for row in read_metrics(run) if not scores else ():
        modes = [row[key] for mode in MODES if row.get(key := f"held_out/{mode}/accuracy") is not None]
        if modes:
            scores[row["step"]] = sum(modes) / len(modes)
    scores = {step: score for step, score in scores.items() if step in steps}
    if not scores:
        raise ExportError(
            f"{run} evaluated no step that has a checkpoint (--eval-every), so none is best; "
            "take --checkpoint last or step_N"
        )
    # Of equal ones the earliest, as training marks it.
    step = max(scores, key=lambda step: (scores[step], -step))
    say(f"best checkpoint: step {step}, held-out greedy accuracy {100 * scores[step]:.1f} %, mean over the modes")
    return step


def open_base(opening: Opening) -> Checkpoint:
    """The base of an adapter, in the revision of its azr.json. ModelError if it is not that one or not there."""
    path, revision = opening.model, opening.record.get("revision") or ""
    if not Path(path).is_dir():
        # A fingerprint of files is no revision that the hub knows; check_base compares it below.
        path = str(_snapshot(path, None if revision.startswith("sha256:") else revision or None))
    base = Checkpoint.open(path)
    for doubt in (*opening.doubts, *check_base(opening, {"revision": revision_of(base.directory)})):
        warn(doubt)
    if not revision:
        warn(f"{opening.adapter} does not say which revision of its base it was trained on: {base.directory} is taken")
    return base


def _snapshot(name: str, revision: str | None) -> Path:
    """Weights, tokenizer and licence of a hub model, from the cache or the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=FROM_HUB, local_files_only=only_cached(name))
        )
    except LocalEntryNotFoundError as error:
        raise ExportError(
            f"{name} in revision {revision or 'main'} is not in the local cache, and the hub cannot be "
            "reached: export where there is a network, or give a directory with --base"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ExportError(f"no model {name} ({revision or 'main'}): {str(error).strip().splitlines()[0]}") from error


# ---------------------------------------------------------------- the merge


@dataclass
class Rounding(Additive):
    """What bf16 made of the adapted matrices: counts of weights, sums of squares."""

    updated: int = 0  # weights with an update other than 0
    still: int = 0  # of these: the same bf16 value as without the update
    update: float = 0.0  # ||delta||^2
    error: float = 0.0  # ||stored - exact||^2
    along: float = 0.0  # <stored - bf16(w0), delta>

    def report(self) -> dict:
        """Returns updated_weights and ratios of sums over all of them: unmoved_share, the share that keeps its bf16
        value; error_over_update, ||stored - exact|| / ||delta||; survival, <stored - bf16(w0), delta> / ||delta||^2.
        The last two are NaN for an update of 0."""
        energy = self.update or math.nan
        return {
            "updated_weights": self.updated,
            "unmoved_share": self.still / max(1, self.updated),
            "error_over_update": math.sqrt(self.error / energy),
            "survival": self.along / energy,
        }


@dataclass(frozen=True)
class Merge:
    """base + adapter, tensor by tensor, under the names that the base has in its files."""

    base: Checkpoint
    adapter: Adapter
    reference: Reference
    on_gpu: bool = False  # where the training ran: kernels differ if rows are no whole number of blocks

    def quantized(self, name: str) -> bool:
        """Tells whether the training held this tensor in NF4."""
        return self.reference.quantization == "nf4" and is_matrix(name, self.base.entries[name].shape)

    def held(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows of a tensor as the forward pass held it; a quantized one only as a whole."""
        tensor, dtype = self.base.tensor(name, first, last), self.reference.dtype
        if not self.quantized(name):
            return tensor if dtype is None else tensor.to(dtype)
        # A GPU follows a block into the next row; Reference.weights reads such rows as the CPU's kernel does.
        if self.on_gpu and self.reference.straddles(tuple(tensor.shape)):
            tensor = tensor if dtype is None else tensor.to(dtype)
            codes = nf4.quantize(tensor, self.reference.block, self.reference.double)
            return codes.dequantize(tensor.dtype).view_as(tensor)
        return self.reference.weights(tensor)[0]

    def delta(self, name: str, held: torch.Tensor) -> torch.Tensor | None:
        """(alpha / r) B A, fp32; None for a tensor without adapter."""
        return self.adapter.factors(name).delta(held) if name in self.adapter.targets else None

    def exact(self, name: str) -> torch.Tensor:
        """The merged tensor before it is rounded, fp32."""
        held = self.held(name)
        delta = self.delta(name, held)
        return held.float() if delta is None else delta.add_(held)

    def rounded(self, name: str) -> tuple[torch.Tensor, Rounding]:
        """(bf16 tensor, what that cost). WeightsError: NaN or infinity."""
        held = self.held(name)
        delta = self.delta(name, held)
        if delta is None:
            return held.bfloat16(), Rounding()
        out, cost = torch.empty(held.shape, dtype=torch.bfloat16), Rounding()
        flat, before, update = out.view(-1), held.reshape(-1), delta.view(-1)
        for start, end in nf4.pieces(flat.numel()):
            w0, d = before[start:end].float(), update[start:end]
            # The sum is in fp32 and the assignment rounds it, the only rounding there is.
            flat[start:end] = w0 + d
            # Measured from the rounded base: rounding w0 itself is no part of the update, in either direction.
            stored, unmoved = flat[start:end].float(), w0.bfloat16().float()
            cost += Rounding(
                int(torch.count_nonzero(d)),
                int(((stored == unmoved) & (d != 0)).sum()),
                torch.dot(d, d).item(),
                # In fp64, where the sum that it is the distance from has no rounding of its own.
                (stored.double() - w0 - d).square().sum().item(),
                torch.dot(stored - unmoved, d).item(),
            )
        if not math.isfinite(cost.error):
            raise WeightsError(f"{self.adapter.directory}: NaN or infinity in the merged {name}")
        return out, cost

    def pieces(self, name: str) -> Iterator[tuple[torch.Tensor, Rounding]]:
        """The bf16 tensor in pieces of rows, so that an embedding is never there as a whole."""
        if self.quantized(name) or name in self.adapter.targets:
            yield self.rounded(name)
            return
        for first, last in row_pieces(self.base.entries[name]):
            yield self.held(name, first, last).bfloat16(), Rounding()


def open_merge(source: Source, base_name: str | None) -> Merge:
    """Checks that adapter, base and azr.json belong together. ExportError, WeightsError."""
    opening = agree(base_name, source.checkpoint)
    base = open_base(opening)
    adapter = Adapter.open(source.checkpoint, base)
    reference, notes = reference_of(opening.quantization, opening.record, source.checkpoint / "azr.json", True)
    for note in notes:
        warn(note)
    merge = Merge(base, adapter, reference, source.trained_on_gpu)
    if any(merge.quantized(name) and reference.straddles(base.entries[name].shape) for name in base.entries):
        warn(
            f"some rows are no whole number of NF4 blocks ({reference.block}), where bitsandbytes' CPU kernel reads "
            f"scales of other blocks: merged as the {'GPU' if merge.on_gpu else 'CPU'} that trained it read them, and "
            "the weights of this machine's forward pass are measured against that"
        )
    return merge


# ---------------------------------------------------------------- files


def plan_shards(base: Checkpoint, limit: float) -> list[list[str]]:
    """Names in files of at most `limit` bytes, in order; a tensor larger than that has one for itself."""
    shards, filled = [[]], 0
    for name, entry in base.entries.items():
        if shards[-1] and filled + 2 * entry.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * entry.size
    return shards


def write_weights(merge: Merge, directory: Path, limit: float = SHARD_BYTES) -> Rounding:
    """model.safetensors, or shards of at most `limit` bytes and their index."""
    shards = plan_shards(merge.base, limit)
    count, total, where = len(shards), Rounding(), {}
    with bar(f"merging {len(merge.base.entries)} tensors") as advance:
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            total += write_shard(
                merge, names, directory / file, lambda: advance(len(where), len(merge.base.entries)), where
            )
    if count > 1:
        index = {"metadata": {"total_size": 2 * merge.base.parameters}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def write_shard(merge: Merge, names: list[str], file: Path, done, where: dict) -> Rounding:
    """One safetensors file, whose header is known before its first tensor: none has to be kept."""
    header, offset, total = {"__metadata__": {"format": "pt"}}, 0, Rounding()
    for name in names:
        entry = merge.base.entries[name]
        end = offset + 2 * entry.size
        header[name] = {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # As safetensors' own writer pads it, so that tensors start at a multiple of 8.
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for tensor, cost in merge.pieces(name):
                stream.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
                total += cost
            where[name] = file.name
            done()
        # On disk before the directory gets its name: a complete name must not lead to half a file.
        stream.flush()
        os.fsync(stream.fileno())
    return total


def write_files(merge: Merge, directory: Path) -> None:
    """config.json without a trace of quantization, generation_config.json, tokenizer files and licence of the base."""
    config = {
        key: value for key, value in merge.base.config.items() if key not in ("quantization_config", "_name_or_path")
    }
    # Newer transformers call it dtype and read either; older ones know torch_dtype only.
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    source = merge.base.directory
    for file in [*(source / name for name in COPIED), *source.glob("LICENSE*")]:
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
    # Some programs look for the stop token there, others in config.json.
    if not (directory / "generation_config.json").is_file():
        ids = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
        }
        (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def refuse_taken(out: Path) -> None:
    """Raises ExportError unless DIR is absent or empty, and DIR.unverified absent."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is there and not empty: choose another --out")
    if (unverified := out.with_name(out.name + ".unverified")).exists():
        raise ExportError(f"{unverified} is there from an earlier export: remove it, or choose another --out")


def free_place(out: Path, need: int) -> Path:
    """Where to write before the rename. ExportError: the disk is too full, or refuses."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f"{out.name}.tmp-*"):
            # A second export to the same place may be at work: only what no process owns is removed.
            if not _alive(stale.name.rpartition("-")[2]):
                warn(f"removing {stale}, left by an export that was killed")
                shutil.rmtree(stale)
        if (free := shutil.disk_usage(out.parent).free) < need:
            raise ExportError(f"{out.parent} has {free / 1e9:.1f} GB free, and the model needs {need / 1e9:.1f}")
        aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
        aside.mkdir()
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}") from error
    return aside


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    # The process is there and belongs to another user.
    except PermissionError:
        return True
    except (ValueError, ProcessLookupError):
        return False
    return True


# ---------------------------------------------------------------- the command


def export(args) -> int:
    """Everything after the command line; returns the exit code."""
    out, source = Path(args.out).absolute(), find_source(Path(args.run), args.checkpoint)
    refuse_taken(out)
    merge = open_merge(source, args.base)
    need = 2 * merge.base.parameters
    aside = free_place(out, int(1.02 * need) + 20_000_000)
    try:
        say(
            f"{source.checkpoint}: {len(merge.adapter.targets)} adapted matrices, onto {merge.base.directory}, "
            f"{describe(merge.reference)}, revision {merge.adapter.info.get('revision')}"
        )
        cost = write_weights(merge, aside).report()
        write_files(merge, aside)
        say(rounding_line(cost))
        if cost["updated_weights"] and cost["survival"] < WELL_STORED:
            warn(
                f"bf16 stores {100 * cost['survival']:.0f} % of this update, the rest is smaller than its steps: the "
                "exported model lies between base and policy; for the policy itself use base and adapter"
            )
        report, failures = verify(args, source, merge, aside)
        provenance = {"checkpoint": str(source.checkpoint), "step": source.step, "rounding": cost, **report}
        (aside / "azr.json").write_text(json.dumps({**merge.adapter.info, "merged": True}, indent=2) + "\n")
        write_json_atomic(aside / "export.json", provenance)
        (aside / "README.md").write_text(model_card.card(source, merge, provenance), encoding="utf-8")
        # Kept for whoever looks into it, but not under the name that a script would go on with.
        place = out if not failures else out.with_name(out.name + ".unverified")
        os.rename(aside, place)
    finally:
        # After the rename it is not there any more; after an error it must not stay.
        shutil.rmtree(aside, ignore_errors=True)
    if failures:
        print(f"train_azr.py export: NOT VERIFIED, files are in {place}: {'; '.join(failures)}", file=sys.stderr)
        return 1
    size = f"{need / 1e9:.1f} GB" if need > 1e9 else f"{need / 1e6:.1f} MB"
    say(f"{out}: {size}, {'NOT VERIFIED' if args.no_verify else 'verified'}")
    return 0


def rounding_line(cost: dict) -> str:
    """Says in one line what `Rounding.report` found."""
    if not cost["updated_weights"]:
        return "the adapter is 0 everywhere: this is the base as the training held it"
    return (
        f"rounding to bf16: {100 * cost['unmoved_share']:.1f} % of the {cost['updated_weights']:,} updated weights "
        f"keep the value they had; ||rounded - exact|| is {cost['error_over_update']:.3g} of ||update||; along it "
        f"{100 * cost['survival']:.1f} % of the update is stored"
    )


def verify(args, source: Source, merge: Merge, aside: Path) -> tuple[dict, list[str]]:
    """Compares the written model with the policy: (figures, what failed in words). --no-verify leaves it out."""
    if args.no_verify:
        warn("--no-verify: nobody has compared this model with the policy")
        return {"verified": None}, []
    from azr.weights import export_check

    report, failures = export_check.check(merge, aside, source.run, args.verify_samples)
    export_check.show(report)
    return {"verified": not failures, **report}, failures


def parse(arguments: list[str]):
    """Reads the command line. A bad one ends the process with exit code 2."""
    parser = Parser(prog="train_azr.py export", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory, or a checkpoint directory")
    parser.add_argument("--out", metavar="DIR", required=True, help="must be absent or empty")
    parser.add_argument("--checkpoint", metavar="WHICH", help="step_N, best (by held-out accuracy) or last (default)")
    parser.add_argument("--base", help="where the base lies now, if not where azr.json says")
    parser.add_argument("--verify-samples", type=int, default=4, help="of each role and mode (default %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="when memory is too short to load the two models")
    args = parser.parse_args(arguments)
    if args.verify_samples < 1:
        parser.error("--verify-samples must be at least 1")
    return args


def main(arguments: list[str]) -> int:
    """Exports and returns the exit code, see the module; 130 if Ctrl-C stopped it."""
    args = parse(arguments)
    try:
        return export(args)
    except (ExportError, WeightsError, RunError, ModelError) as error:
        print(f"train_azr.py export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_azr.py export: stopped, nothing written", file=sys.stderr)
        return 130

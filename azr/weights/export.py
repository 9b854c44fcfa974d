"""`train_azr.py export`: a run's adapter merged into its base, as a plain bf16 model that any other program reads.

    python train_azr.py export runs/qwen-3b-0 --out models/azr-3b                     the last checkpoint, verified
    python train_azr.py export runs/qwen-3b-0 --checkpoint best --out models/azr-3b   best by held-out accuracy
    python train_azr.py export runs/a/checkpoints/step_50 --out models/a-50           of --train full: as it is
    hf upload NAME models/a-50 --private                                              and onto the hub, if you like

Merge: the base's weights as the forward pass of the training used them (a 4-bit base dequantised, also where it has no
adapter) + (alpha / r) B A in fp32, rounded once to bf16, file by file of at most 2 GB, which is the memory that it
takes; the verification (export_check.py) loads the models. DIR is written aside and renamed: a kill
leaves DIR.tmp, which the next export of DIR removes. What fails its verification becomes DIR.unverified.

Exit codes: 0 verified (or asked not to be), 1 verification failed, 2 bad input, nothing written. Left out:
GGUF (llama.cpp's convert_hf_to_gguf.py reads DIR), 4-bit merges (they lose the update), adapters (PEFT reads them).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from azr.command import Number, Parser
from azr.console import bar, say, warn
from azr.jsonl import sync, write_json_atomic
from azr.policy.opening import ModelError, Opening, agree, checkpoints_of, is_full, read_record
from azr.runs import RunError, fault, weights_of
from azr.weights import model_card, nf4
from azr.weights.files import Checkpoint, WeightsError, find_directory, is_matrix, read_json
from azr.weights.reference import AdapterUpdate, open_change
from azr.weights.sizes import Additive

SHARD_BYTES = 2e9  # of the largest file, which is in memory as a whole
WELL_STORED = 0.9  # share of the update along its own direction, below which a warning says that rounding lost it
# of the base, as they are; base.json and tokenizer_check.json: of the embedded model, which this repository reads
COPIED = (
    "tokenizer.json tokenizer_config.json tokenizer.model tokenizer_check.json vocab.json merges.txt base.json "
    "special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json generation_config.json"
).split()


class ExportError(ValueError):
    """Nothing can be exported; one line that says why and what to do. Exit code 2."""


# ---------------------------------------------------------------- what is exported


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the run directory it lies in (None: it was copied out of one)."""

    checkpoint: Path
    step: int | None
    run: Path | None


def find_source(path: Path, asked: str | None) -> Source:
    """`path`: a run directory or one of its checkpoints; asked: step_N, best, last (None: last). ExportError, also if
    a file is not as it was written, where its checksums are there."""
    if weights_of(path):
        if asked is not None:
            raise ExportError(f"{path} is a checkpoint already; give the run directory with --checkpoint {asked}")
        number, run = path.name.removeprefix("step_"), path.absolute().parent.parent
        step, run = int(number) if number.isdigit() else None, run if (run / "metrics.jsonl").is_file() else None
        source = Source(path, step, run)
    else:
        checkpoints = checkpoints_of(path)
        if not checkpoints:
            what = "has no checkpoint" if path.is_dir() else "does not exist"
            raise ExportError(f"{path} {what}: export takes a run directory, or a checkpoint directory in it")
        steps = {f"step_{step}": step for step in checkpoints} | {"last": max(checkpoints), None: max(checkpoints)}
        if asked == "best":
            steps["best"] = best_step(path, list(checkpoints))
        if asked not in steps:
            have = ", ".join(f"step_{step}" for step in checkpoints)
            raise ExportError(f"{path} has no checkpoint {asked}: take last, best or one of {have}")
        source = Source(checkpoints[steps[asked]], steps[asked], path)
    if (source.checkpoint / "state" / "checksums.json").is_file() and (wrong := fault(source.checkpoint)):
        raise ExportError(f"{source.checkpoint} is damaged: {wrong}; export another checkpoint with --checkpoint")
    return source


def best_step(run: Path, steps: list[int]) -> int:
    """The checkpoint with the highest held-out greedy accuracy (mean over the modes), as training marked it.
    ExportError: it marked none, or that one is gone."""
    best = read_json(run / "checkpoints" / "best.json")
    if best.get("step") not in steps:
        raise ExportError(f"{run} marked no checkpoint as best (--eval-every); take --checkpoint last or step_N")
    say(f"best checkpoint: step {best['step']}, held-out greedy accuracy {100 * best['value']:.1f} %, mean of modes")
    return best["step"]


def open_base(opening: Opening) -> Checkpoint:
    """The base of an adapter, in the revision of its azr.json. ModelError if it is not there."""
    revision = opening.record.get("revision") or ""
    # A fingerprint of files is no revision that the hub knows; open_change compares it.
    base = Checkpoint.open(opening.model, None if revision.startswith("sha256:") else revision or None)
    if not revision:
        warn(f"{opening.adapter} does not say which revision of its base it was trained on: {base.directory} is taken")
    return base


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


class Merge(AdapterUpdate):
    """base + adapter, tensor by tensor, under the names that the base has in its files."""

    def quantized(self, name: str) -> bool:
        """Tells whether the training held this tensor in NF4."""
        return self.reference.quantization == "nf4" and is_matrix(name, self.base.entries[name].shape)

    def held(self, name: str) -> torch.Tensor:
        """A tensor as the forward pass held it."""
        tensor, dtype = self.base.tensor(name), self.reference.dtype
        if self.quantized(name):
            return self.reference.weights(tensor)[0]
        return tensor if dtype is None else tensor.to(dtype)

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


def open_merge(source: Source, base_name: str | None) -> Merge:
    """Checks that adapter, base and azr.json belong together. ExportError, WeightsError."""
    opening = agree(base_name, source.checkpoint)
    update, notes = open_change(opening, open_base(opening))
    for note in notes:
        warn(note)
    return Merge(update.base, update.adapter, update.reference)


# ---------------------------------------------------------------- files


def write_weights(merge: Merge, directory: Path, limit: float = SHARD_BYTES) -> Rounding:
    """model.safetensors, or shards of at most `limit` bytes and their index."""
    shards, filled, total, where = [[]], 0, Rounding(), {}
    for name, entry in merge.base.entries.items():
        if shards[-1] and filled + 2 * entry.size > limit:  # a tensor larger than that has a file for itself
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * entry.size
    with bar(f"merging {len(merge.base.entries)} tensors") as advance:
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name], cost = merge.rounded(name)
                total, where[name] = total + cost, file
                advance(len(where), len(merge.base.entries))
            save_file(tensors, directory / file, metadata={"format": "pt"})
            # On disk before the directory gets its name: a complete name must not lead to half a file.
            sync(directory / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 2 * merge.base.parameters}, "weight_map": where}
        write_json_atomic(directory / "model.safetensors.index.json", index)
    return total


def write_files(merge: Merge, directory: Path) -> None:
    """config.json without a trace of quantization, generation_config.json, tokenizer files and licence of the base."""
    config = {k: value for k, value in merge.base.config.items() if k not in ("quantization_config", "_name_or_path")}
    # Newer transformers call it dtype and read either; older ones know torch_dtype only.
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    source = merge.base.directory
    for file in [*(source / name for name in COPIED), *source.glob("LICENSE*")]:
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
    # Some programs look for the stop token there, others in config.json.
    if not (generation := directory / "generation_config.json").is_file():
        ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation.write_text(json.dumps({k: v for k, v in ids.items() if v is not None}, indent=2) + "\n")


def free_place(out: Path, need: int) -> Path:
    """Where to write before the rename. ExportError: DIR or DIR.unverified is taken, the disk too full or refusing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is there and not empty: choose another --out")
    if (unverified := out.with_name(out.name + ".unverified")).exists():
        raise ExportError(f"{unverified} is there from an earlier export: remove it, or choose another --out")
    aside = out.with_name(f"{out.name}.tmp")
    try:
        if aside.exists():
            warn(f"removing {aside}, left by an export that was killed")
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        if (free := shutil.disk_usage(aside).free) < need:
            aside.rmdir()
            raise ExportError(f"{out.parent} has {free / 1e9:.1f} GB free, and the model needs {need / 1e9:.1f}")
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}") from error
    return aside


def write_merged(merge: Merge, source: Source, aside: Path, args) -> tuple[dict, list[str], str]:
    """The merged model in `aside`: (what export.json says of it, what failed in words, the model card)."""
    say(
        f"{source.checkpoint}: {len(merge.adapter.targets)} adapted matrices, onto {merge.base.directory}, "
        f"{merge.reference}, revision {merge.adapter.info.get('revision')}"
    )
    cost = write_weights(merge, aside).report()
    write_files(merge, aside)
    if not cost["updated_weights"]:
        say("the adapter is 0 everywhere: this is the base as the training held it")
    else:
        say(
            f"rounding to bf16: {100 * cost['unmoved_share']:.1f} % of the {cost['updated_weights']:,} updated "
            f"weights keep the value they had; {100 * cost['survival']:.1f} % of the update is stored"
        )
    if cost["survival"] < WELL_STORED:
        warn(
            "the rest of this update is smaller than the steps of bf16: the exported model lies between base and "
            "policy; for the policy itself use base and adapter"
        )
    figures, failures = {"rounding": cost, "verified": None}, []
    compared = "NOT compared with the policy that was trained"
    if args.no_verify:
        warn("--no-verify: nobody has compared this model with the policy")
    else:
        from azr.weights import export_check

        report, failures = export_check.check(merge, aside, source.run, args.verify_samples)
        figures |= {"verified": not failures, **report}
        compared = "NOT verified" if failures else "verified"
    held = merge.reference.quantization
    base = "an unquantized base" if held == "none" else f"a base in {held}"
    update = f"LoRA rank {merge.adapter.config.get('r')} on\n{len(merge.adapter.targets)} matrices of {base}"
    result = f"The update is merged into the base and rounded to bf16, {compared};\n`export.json` has the figures."
    return figures, failures, model_card.card(source, merge.base.directory, update, result, "bfloat16")


def copy_whole(source: Source, aside: Path) -> tuple[dict, list[str], str]:
    """A checkpoint of --train full without its state/: a plain model as it is. Returns what `write_merged` does."""
    info = read_record(source.checkpoint)
    try:
        base = find_directory(info["base_model"], info["revision"])
    except WeightsError as error:
        warn(f"the licence of the base is not known: {error}")
        base = source.checkpoint
    for file in [*whole_files(source), *base.glob("LICENSE*")]:
        shutil.copyfile(file, aside / file.name)
        sync(aside / file.name)
    result = f"These are the trained weights themselves, in {info['dtype']}."
    update = f"every weight\ntrained in {info['dtype']}"
    return {}, [], model_card.card(source, base, update, result, info["dtype"])


def whole_files(source: Source) -> list[Path]:
    """The files of a checkpoint of --train full that are its model."""
    return [file for file in source.checkpoint.iterdir() if file.is_file() and file.name not in ("azr.json", "keep")]


# ---------------------------------------------------------------- the command


def export(args) -> int:
    """Everything after the command line; returns the exit code."""
    out, source = Path(args.out).absolute(), find_source(Path(args.run), args.checkpoint)
    merge = None if is_full(source.checkpoint) else open_merge(source, args.base)
    need = 2 * merge.base.parameters if merge else sum(file.stat().st_size for file in whole_files(source))
    aside = free_place(out, int(1.02 * need) + 20_000_000)
    try:
        figures, failures, card = write_merged(merge, source, aside, args) if merge else copy_whole(source, aside)
        info = {**read_record(source.checkpoint), "merged": True}
        (aside / "azr.json").write_text(json.dumps(info, indent=2) + "\n")
        provenance = {"checkpoint": str(source.checkpoint), "step": source.step}
        write_json_atomic(aside / "export.json", provenance | figures)
        (aside / "README.md").write_text(card, encoding="utf-8")
        # Kept for whoever looks into it, but not under the name that a script would go on with.
        place = out if not failures else out.with_name(out.name + ".unverified")
        os.rename(aside, place)
    finally:
        # After the rename it is not there any more; after an error it must not stay.
        shutil.rmtree(aside, ignore_errors=True)
    if failures:
        print(f"train_azr.py export: NOT VERIFIED, files are in {place}: {'; '.join(failures)}", file=sys.stderr)
        return 1
    state = "NOT VERIFIED" if args.no_verify else "verified"
    size = f"{need / 1e9:.1f} GB" if need > 1e9 else f"{need / 1e6:.1f} MB"
    say(f"{out}: {size}, {state if merge else f'the weights of {source.checkpoint} as they are'}")
    return 0


def parse(arguments: list[str]):
    """Reads the command line. A bad one ends the process with exit code 2."""
    shape = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(prog="train_azr.py export", allow_abbrev=False, **shape)
    parser.add_argument("run", metavar="RUN", help="a run directory, or a checkpoint directory")
    parser.add_argument("--out", metavar="DIR", required=True, help="must be absent or empty")
    parser.add_argument("--checkpoint", metavar="WHICH", help="step_N, best (by held-out accuracy) or last (default)")
    parser.add_argument("--base", help="where the base lies now, if not where azr.json says")
    what = "of each role and mode (default %(default)s)"
    parser.add_argument("--verify-samples", type=Number(int, 1, 10**5), default=4, help=what)
    parser.add_argument("--no-verify", action="store_true", help="when memory is too short to load the two models")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Exports and returns the exit code, see the module; 130 if Ctrl-C stopped it."""
    args = parse(arguments)
    try:
        return export(args)
    except (ExportError, WeightsError, RunError, ModelError) as error:
        print(f"train_azr.py export: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        print("train_azr.py export: stopped, for nobody reads its output any more", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train_azr.py export: stopped, nothing written", file=sys.stderr)
        return 130

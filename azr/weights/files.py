"""Weights on disk, one tensor at a time: safetensors checkpoints of any size and LoRA, rsLoRA and DoRA adapters.

    base = Checkpoint.open("Qwen/Qwen2.5-Coder-3B")          # alias, hub id in the cache, or directory
    adapter = Adapter.open("runs/qwen-3b-0/checkpoints/step_500", base)
    for name in adapter.targets:
        weight, factors = base.tensor(name), adapter.factors(name)

Files are read by offset, not mapped: pages of a mapped file count as memory of the process, and a shard has 5 GB.
Every way in which files can be incomplete or not belong together is a WeightsError of one line that names the tensor.
Left out: pickled (.bin) weights, quantized checkpoints, adapters that train more than LoRA matrices.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from azr.jsonl import read_object
from azr.models import model_path, only_cached
from azr.policy.opening import ModelError, by_pattern, check_adapter, fingerprint, not_finite, read_record

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FROM_HUB = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]


class WeightsError(ModelError):
    """The files cannot be measured; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file

    @property
    def size(self) -> int:
        """The number of entries, 1 for a scalar."""
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, which must be as long as its header says."""
    tensors = {}
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            (header,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(header) if header < length else "")
    except (OSError, struct.error, ValueError) as error:
        raise WeightsError(f"{file} is no safetensors file, or only its start: copy or download it again") from error
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise WeightsError(
                f"{file}: {name} is stored as {entry['dtype']}, a quantized or unusual format; "
                f"give the checkpoint in {', '.join(DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        tensors[name] = Entry(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + header + begin)
        if 8 + header + end > length or end - begin != tensors[name].size * tensors[name].dtype.itemsize:
            raise WeightsError(f"{file} is truncated: {name} is not there as a whole; copy or download it again")
    return tensors


def read(entry: Entry, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Rows first..last of a tensor in its stored dtype; WeightsError if the file ends early."""
    last = entry.shape[0] if last is None and entry.shape else last
    shape = (last - first, *entry.shape[1:]) if entry.shape else ()
    row, size = math.prod(entry.shape[1:]) * entry.dtype.itemsize, math.prod(shape) * entry.dtype.itemsize
    data = np.fromfile(entry.file, np.uint8, size, offset=entry.start + first * row)
    if len(data) < size:
        raise WeightsError(f"{entry.file} ended while it was read")
    return torch.from_numpy(data).view(entry.dtype).view(shape)


def read_json(file: Path) -> dict:
    """An object, {} if there is no such file."""
    return read_object(file, WeightsError) if file.is_file() else {}


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """A linear layer of a numbered block: what LoRA goes on and what bitsandbytes quantizes."""
    return len(shape) == 2 and name.endswith(".weight") and layer_of(name) is not None


def layer_of(name: str) -> int | None:
    """Returns the number of a tensor's block, 3 of model.layers.3.mlp.up_proj.weight; None outside the blocks."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


# ---------------------------------------------------------------- a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model, tied ones once. `excluded`: name -> why it is not counted."""

    name: str
    directory: Path
    config: dict
    entries: dict[str, Entry]
    excluded: dict[str, str]

    @classmethod
    def open(cls, model: str, revision: str | None = None) -> Checkpoint:
        """`model`: an alias (tiny, qwen-3b), a hub id (of that revision), or a directory. WeightsError."""
        directory = find_directory(model, revision)
        config = read_json(directory / "config.json")
        if quantization := config.get("quantization_config"):
            method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
            raise WeightsError(f"{model} is stored quantized ({method}); give the unquantized model")
        entries, excluded = find_tensors(directory), {}
        if config.get("tie_word_embeddings") and "lm_head.weight" in entries:
            del entries["lm_head.weight"]
            excluded["lm_head.weight"] = "tied to the embedding by config.json, which counts once"
        return cls(str(model), directory, config, entries, excluded)

    @property
    def parameters(self) -> int:
        """The number of weights of all tensors that are counted."""
        return sum(entry.size for entry in self.entries.values())

    @property
    def matrices(self) -> list[str]:
        """The names of the linear layers in numbered blocks; see `is_matrix`."""
        return [name for name, entry in self.entries.items() if is_matrix(name, entry.shape)]

    def tensor(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Reads rows first..last of a tensor (default: all) in its stored dtype; see `read`."""
        return read(self.entries[name], first, last)

    def dtypes(self) -> str:
        """Returns the stored dtypes as text: "bfloat16", or "bfloat16/float32" where there are several."""
        return "/".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in self.entries.values()}))


def find_directory(model: str, revision: str | None = None) -> Path:
    """Where the weights, the tokenizer and the licence of a model lie. WeightsError if nowhere."""
    path = model_path(str(model))
    if (directory := Path(path)).is_dir():
        if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
            raise WeightsError(f"{directory} holds an adapter, no model: give it with --adapter")
        return directory
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise WeightsError(f"no model {model!r}: there is no such directory, and it is no hub id (OWNER/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    cached = only_cached(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=FROM_HUB, local_files_only=cached))
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # not in the cache: an OSError too
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"{path} ({revision or 'main'}) is neither in the local cache nor to be had from the hub"
        raise WeightsError(f"{where}: download it where there is a network, or give its directory ({why})") from error


def find_tensors(directory: Path) -> dict[str, Entry]:
    """All tensors of model.safetensors or of the shards that the index names, in the order of their names."""
    where = read_json(directory / "model.safetensors.index.json").get("weight_map") or {}
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    files = sorted(set(where.values())) or (["model.safetensors"] if "model.safetensors" in present else present)
    if not where and len(files) != 1:
        raise WeightsError(f"{directory} holds no model.safetensors and no index of shards (.bin weights are not read)")
    if missing := [name for name in files if name not in present]:
        raise WeightsError(f"{directory} lacks {missing[0]} ({len(missing)} of {len(files)} shards are missing)")
    entries: dict[str, Entry] = {}
    for name in files:
        entries |= read_header(directory / name)
    if missing := sorted(set(where) - set(entries)):
        raise WeightsError(f"{directory}: no shard holds {missing[0]} ({len(missing)} tensors are missing)")
    return dict(sorted(entries.items(), key=lambda item: natural(item[0])))


def natural(name: str) -> list:
    """Sorting key: layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


# ---------------------------------------------------------------- an adapter


@dataclass(frozen=True)
class Factors:
    """The update of one matrix: scale * B A, B (m, r), A (r, n), fp32; magnitude (m,) makes it DoRA."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """(m, n) fp32: what the adapter adds to `base` (m, n), the weights that the forward pass used.

        DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5): magnitude * (W + s B A) / ||W + s B A|| by rows, minus W.
        """
        update = (self.b * self.scale) @ self.a
        if self.magnitude is None:
            return update
        base = base.float()
        update += base
        update *= (self.magnitude / update.norm(dim=1))[:, None]
        return update.sub_(base)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter, checked against its base: every target names a matrix of the base, with its shape."""

    directory: Path
    config: dict
    info: dict  # azr.json: quantization, block size, dtype of the base in training; {} for other people's adapters
    entries: dict[str, Entry]
    targets: dict[str, str]  # base tensor -> prefix of the adapter's names

    @classmethod
    def open(cls, directory: Path, base: Checkpoint) -> Adapter:
        """ModelError: it is no adapter, or not one of this base; see `check_adapter`."""
        directory = Path(directory)
        file = directory / "adapter_model.safetensors"
        entries = read_header(file)
        shapes = ({name: entry.shape for name, entry in table.items()} for table in (entries, base.entries))
        config, targets = check_adapter(directory, *shapes, base.name)
        targets = dict(sorted(targets.items(), key=lambda item: natural(item[0])))
        return cls(directory, config, read_record(directory), entries, targets)

    def factors(self, name: str) -> Factors:
        """Reads the update of one base tensor. WeightsError: NaN or infinity in it."""
        prefix = self.targets[name]
        read_one = {}
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
            if (entry := self.entries.get(f"{prefix}.{part}")) is not None:
                read_one[part] = read(entry).float()
                if not read_one[part].isfinite().all():
                    raise not_finite(entry.file, f"{prefix}.{part}")
        rank = read_one["lora_A.weight"].shape[0]
        scale = by_pattern(self.config.get("alpha_pattern"), prefix, self.config["lora_alpha"])
        scale /= math.sqrt(rank) if self.config.get("use_rslora") else rank
        return Factors(
            read_one["lora_B.weight"], read_one["lora_A.weight"], scale, read_one.get("lora_magnitude_vector")
        )


def revision_of(directory: Path) -> str:
    """What checkpoints keep of a base (`Policy.info`): the commit of a hub's snapshot, else a fingerprint."""
    return directory.name if directory.parent.name == "snapshots" else fingerprint(directory)

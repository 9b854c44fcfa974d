"""The one way to open a base with its adapter: what the flags and azr.json agree on, and what is refused.

    opening = agree("tiny", "runs/tiny-0")                  # an adapter, or a run directory for its newest checkpoint
    policy = Policy.open(opening)                           # to sample and to score, azr/policy/policy.py
    Adapter.open(opening.adapter, Checkpoint.open(opening.model))       # tensor by tensor, azr/weights/files.py

A tuned model is measured as it was trained: on its own base, held in the same quantization, asked with the same
prompts. eval_passk.py, analyze.py and export all come through here, so that each refuses the same contradictions in
the same words: a flag against azr.json, another base, matrices of other names or shapes, NaN in them. A checkpoint of
--train full is a whole model and is opened like an adapter, over the base that it was trained from. Left out: the
loading itself. No torch is imported here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from ..jsonl import read_object
from ..models import base_description, model_path

QUANTIZATIONS = ("nf4", "none")
DTYPES = ("float32", "bfloat16", "float16")  # of computation, as azr.json names them
# What azr.json says of a base and what can be asked of the one that was opened.
BASE_FACTS = ("revision", "tokenizer_hash", "quantization", "block_size", "double_quant")
PREFIX = "base_model.model."  # of the names that PEFT gives
NOT_PLAIN = (
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "use_qalora",
    "layer_replication",
    "use_bdlora",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)


class ModelError(ValueError):
    """The model or the adapter cannot be used; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Opening:
    """What is to be opened. `notes` say where each setting comes from, `doubts` what could not be checked."""

    model: str  # a directory or a hub id
    adapter: Path | None
    record: dict  # the adapter's azr.json, {} without one
    quantization: str  # of the base: "nf4" or "none"
    dtype: str | None  # of computation; None: what the device has
    template: str | None  # of the prompts; None: neither flag nor adapter says
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def agree(
    model: str | None,
    adapter: str | Path | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    template: str | None = None,
) -> Opening:
    """Flags and azr.json put together; None is a flag that was left out.

    Without an adapter the base is in NF4, but for one that describes itself in base.json (the embedded one): none.
    A checkpoint of --train full may be given as the model too: its base is the one that azr.json names.
    ModelError: a flag contradicts azr.json; nothing says how the adapter's base was quantized, or which base it is.
    """
    notes, doubts, record, where = [], [], {}, None
    if adapter is None and model is not None:
        if is_full(Path(model)):
            model, adapter = None, model
        elif (Path(model) / "checkpoints").is_dir():
            raise ModelError(f"{model} is a run, not a model: give it with --adapter")
    if adapter is not None:
        adapter = newest_checkpoint(Path(adapter), notes)
        where = adapter / "azr.json"
        record = read_record(adapter)
    settings = {"quantization": quantization, "dtype": dtype, "template": template}
    chosen = {name: settle(name, asked, record, where) for name, asked in settings.items()}
    path = find_base(model, record, adapter)
    if chosen["quantization"] is None:
        if adapter is not None:
            raise ModelError(
                f"{adapter} has no azr.json that says whether its base was in 4 bits, on which every number depends: "
                "add --quantization nf4 or --quantization none"
            )
        chosen["quantization"] = "none" if base_description(path) else "nf4"
    if adapter is not None and not record:
        doubts.append(f"{adapter} has no azr.json: what base it was trained on cannot be checked")
    for name in ("quantization", "dtype"):
        value = chosen[name] or "of the device"
        notes.append(f"{name} {value}: {origin(settings[name], record.get(name))}")
    return Opening(path, adapter, record, **chosen, notes=tuple(notes), doubts=tuple(doubts))


def settle(name: str, asked: str | None, record: dict, where: Path | None) -> str | None:
    """A setting from its flag or from azr.json (`record`, at `where`). ModelError: they contradict each other, or
    azr.json names a quantization or dtype that does not exist."""
    stored = record.get(name)
    known = {"quantization": QUANTIZATIONS, "dtype": DTYPES}.get(name)
    if stored and known and stored not in known:
        raise ModelError(f"{where}: {name} {stored} is not supported; {', '.join(known)} are")
    if asked and stored and asked != stored:
        raise ModelError(
            f"--{name} {asked} contradicts {where}, which says {stored}: a tuned model is measured as it was trained; "
            "leave the flag out"
        )
    return asked or stored


def origin(asked: str | None, stored: str | None) -> str:
    """Where a setting comes from, in words."""
    return "as the adapter's azr.json says" if stored else "as asked" if asked else "the default"


# ---------------------------------------------------------------- where things are


def checkpoints_of(run: Path) -> dict[int, Path]:
    """step -> checkpoint with an adapter or a whole model, ascending; {} if `run` is no run directory."""
    from ..runs import step_directories, weights_of

    return {step: path for step, path in step_directories(run) if weights_of(path)}


def is_full(directory: Path) -> bool:
    """Whether a directory is a checkpoint of --train full; not if it was exported, which makes it an ordinary model."""
    record = read_record(directory) if (directory / "config.json").is_file() else {}
    return record.get("train") == "full" and not record.get("merged")


def newest_checkpoint(path: Path, notes: list[str] | None = None) -> Path:
    """`path` itself if it is an adapter, else the newest checkpoint of a run directory, which `notes` then say.
    ModelError: it is neither."""
    if (path / "adapter_config.json").is_file() or is_full(path):
        return path
    if steps := checkpoints_of(path):
        newest = steps[max(steps)]
        if notes is not None:
            notes.append(f"adapter {newest}: the newest checkpoint of {path}")
        return newest
    if not path.is_dir():
        raise ModelError(f"{path}: no such directory; give a checkpoint, such as RUN/checkpoints/step_100")
    if (path / "checkpoints").is_dir():
        raise ModelError(f"{path} has no checkpoint yet: a run writes its first one before the first step")
    raise ModelError(
        f"{path} is no adapter (it needs adapter_config.json and adapter_model.safetensors): give a run, or a "
        "checkpoint such as RUN/checkpoints/step_100"
    )


def read_record(directory: Path) -> dict:
    """azr.json of a checkpoint, {} if it has none. ModelError: it is no JSON object, or a name in it is no text."""
    file = directory / "azr.json"
    record = read_object(file, ModelError) if file.is_file() else {}
    for name in ("base_model", "revision", "tokenizer_hash", "quantization", "dtype", "template", "template_hash"):
        if not isinstance(record.get(name), str | None):
            raise ModelError(f"{file}: {name} must be text, not {str(record[name])[:60]}")
    return record


def find_base(asked: str | None, record: dict, adapter: Path | None) -> str:
    """Directory or hub id of the base: the one asked for, else the one azr.json names. ModelError: neither is there."""
    name = asked or record.get("base_model")
    if not name:
        if adapter is None:
            raise ModelError("--model is missing: tiny, qwen-3b, qwen-7b, a hub id or a directory")
        raise ModelError(f"{adapter} has no azr.json that names its base: give it with --model (export: --base)")
    path = model_path(str(name))
    if not asked and not Path(path).is_dir() and Path(path).parts[-2:] == ("azr", "tiny"):
        path = model_path("tiny")  # the embedded model of a checkout that has moved
    if not asked and not Path(path).is_dir() and path.startswith(("/", ".", "~")):
        raise ModelError(
            f"{adapter} was trained on {path}, which is not here: give the base's place with --model (export: --base)"
        )
    return path


# ---------------------------------------------------------------- the base


def check_base(opening: Opening, facts: dict) -> list[str]:
    """Compares BASE_FACTS of the base that was opened with the adapter's azr.json; None and absent are unknown.

    Returns what could not be compared, in words. ModelError: it is another base.
    """
    doubts = []
    name = opening.record.get("base_model")
    only_name = name and not (opening.record.get("revision") and facts.get("revision"))  # nothing else can tell
    if only_name and model_path(name) != model_path(opening.model):
        raise ModelError(f"{opening.adapter} was trained on another base, {name}, than {opening.model}: give that one")
    for name in BASE_FACTS:
        recorded, here = opening.record.get(name), facts.get(name)
        if recorded is None or here is None or recorded == here:
            continue
        if name == "revision" and recorded.startswith("sha256:") != here.startswith("sha256:"):
            doubts.append(
                f"{opening.adapter} was trained on revision {recorded}, and {opening.model} has {here}: a commit and "
                "a fingerprint of the files cannot be compared, so nothing says that it is the same base"
            )
            continue
        raise ModelError(
            f"{opening.adapter} was trained on another base than {opening.model} ({name} {recorded}, here {here}): "
            "give the base it was trained on"
        )
    return doubts


def check_warm_start(directory: str, info: dict, lora: dict) -> None:
    """ValueError unless an adapter that training starts from was trained on the base of `info` (Policy.info; where its
    azr.json says so: by its fingerprint, since directories move, else by its name) and has the settings `lora`."""
    record = read_record(Path(directory))
    facts = ("revision", "tokenizer_hash") if record.get("revision") and info["revision"] else ("base_model",)
    for name in facts:
        recorded = model_path(str(record.get(name)))
        if record.get(name) and recorded != info[name]:
            raise ValueError(
                f"--adapter {directory} was trained on another base than {info['base_model']} ({name} {recorded}, here "
                f"{info[name]}); give --model {record.get('base_model')}"
            )
    if info["lora"] != lora:
        has = ", ".join(f"{name} {value}" for name, value in info["lora"].items())
        raise ValueError(f"--adapter {directory} has {has}; leave the --lora flags out, or give them these values")


def fingerprint(directory: Path) -> str:
    """A model in a directory: 16 hex digits over its config and the start of its weight files."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(16 << 20))
    return f"sha256:{digest.hexdigest()[:16]}"


def check_template(opening: Opening, template: str, now: str) -> None:
    """ModelError if the adapter was trained on another wording of `template` than the one whose hash is `now`."""
    if opening.record.get("template") in (None, template) and opening.record.get("template_hash") not in (None, now):
        raise ModelError(
            f"{opening.adapter} was trained on another wording of the {template} prompts (template_hash differs): "
            "check out the version it was trained with"
        )


# ---------------------------------------------------------------- the adapter's matrices

Shapes = dict[str, tuple[int, ...]]


def check_adapter(directory: Path, tensors: Shapes, base: Shapes, base_name: str) -> tuple[dict, dict[str, str]]:
    """(adapter_config.json, base tensor -> prefix of the adapter's names) of a LoRA, rsLoRA or DoRA adapter.

    tensors: what adapter_model.safetensors holds; base: weights of the base, (out, in) by name. ModelError: another
    kind of adapter, an update without one of its factors, or a matrix that the base does not have in this shape.
    """
    config = read_object(directory / "adapter_config.json", ModelError)
    only = "only the LoRA matrices of linear layers are supported"
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{directory}: {config.get('peft_type')} is not supported; LoRA, rsLoRA and DoRA are")
    if others := [key for key in NOT_PLAIN if config.get(key)]:
        raise ModelError(f"{directory}: {others[0]} is set; {only}")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{directory}: trains biases ({config['bias']}); {only}")
    parts = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.get("use_dora") else []))
    updates: dict[str, Shapes] = {}
    for name, shape in tensors.items():
        part = next((part for part in parts if name.endswith("." + part)), None)
        if part is None:
            raise ModelError(f"{directory}: {name} is no LoRA matrix of a linear layer")
        updates.setdefault(name.removesuffix("." + part), {})[part] = tuple(shape)
    if not updates:
        raise ModelError(f"{directory}: the adapter holds no LoRA matrices")
    targets = {}
    for prefix, shapes in updates.items():
        if lacking := [part for part in parts if part not in shapes]:
            raise ModelError(f"{directory} lacks {prefix}.{lacking[0]}")
        name = prefix.removeprefix(PREFIX) + ".weight"
        _check_shapes(directory, config, prefix, shapes, base.get(name), f"{name} of {base_name}")
        targets[name] = prefix
    return config, targets


def _check_shapes(directory: Path, config: dict, prefix: str, shapes: Shapes, wanted, what: str) -> None:
    if wanted is None:
        raise ModelError(f"{directory} adapts {what}, which does not exist: an adapter of another model")
    a, b = shapes["lora_A.weight"], shapes["lora_B.weight"]
    rank = by_pattern(config.get("rank_pattern"), prefix, config.get("r"))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] != rank:
        raise ModelError(f"{directory}: {prefix} has A {a} and B {b}, but adapter_config.json says rank {rank}")
    if (b[0], a[1]) != tuple(wanted):
        raise ModelError(
            f"{directory}: {prefix} updates a matrix of {b[0]} x {a[1]}, but {what} has "
            f"{' x '.join(map(str, wanted))}: an adapter of another model"
        )


def by_pattern(patterns: dict | None, prefix: str, default):
    """PEFT's rank_pattern and alpha_pattern: the value of the first key that the module's name ends with."""
    name = prefix.removeprefix(PREFIX)
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def not_finite(file: Path, name: str) -> ModelError:
    """What to raise for a tensor that holds NaN or infinity."""
    return ModelError(f"{file}: NaN or infinity in {name}")

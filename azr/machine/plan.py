"""Which model, which sizes, and whether they fit: shapes known offline, presets, a memory plan before anything loads.

    shape = shape_of("qwen-3b")                                   # needs no network
    preset, why = choose_preset("auto", "qwen-3b", free_gpu_bytes())
    plan = plan_memory(shape, preset, capacity(preset))           # sizes lowered, loudly, until they fit
    print(render(plan))

Figures are computed from the shapes: GB = 1e9 bytes. Those of a CPU are within 15 % of what is measured at small
shapes (`python tests/bench_plan.py`); those of a GPU follow from the same parts and have not been measured. Time, disk
and dollars are in cost.py. Left out: several GPUs, models that are not decoder-only with SwiGLU (Qwen2, Llama and
their like). No torch is imported, but to ask a GPU what is free.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from azr.jsonl import read_object
from azr.models import ALIASES, model_path
from azr.policy.cache import copies_pay

GB = 1e9
GIB = 2**30
CUDA_CONTEXT = 0.9e9  # of the driver and the libraries' work spaces, before the first tensor
NF4_BYTES = 0.516  # a weight: 4 bits, and block scales that are quantized themselves
ADAPTER_STATE = 16  # bytes a LoRA parameter: weight, gradient and two Adam moments in fp32
COPIES = 12  # bytes a trained parameter: a CPU holds what a stopped step goes back to in the same memory
BACKWARD_FACTOR = 4 / 3  # memory of a recomputed layer's backward pass over what its forward pass saves
SAMPLING_BYTES = 16  # a logit: raw, tempered and normalised in fp32, one of them twice
PREFILL_TOKENS = 8192  # engine.py: tokens of one prefill, and bytes that it leaves free for what is not planned
SPARE = GIB
HOST_OVERHEAD = 25e6  # of sampling on a CPU: tables of stop tokens, lists, code loaded at the first use
LOADERS = 4  # matrices that transformers reads at the same time
LEAST_SLOTS = 8  # below, decoding is so slow that another model is the better answer


class PlanError(ValueError):
    """One clear line: what is unknown or wrong and what to do."""


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shape:
    """What a decoder's memory follows from."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool  # the head shares the embedding's weights
    head_dim: int
    qkv_bias: bool = True  # as Qwen2 has it

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the quantized matrices of a layer; LoRA goes on these."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all quantized matrices."""
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Embedding and head, biases and norms: never quantized."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return tables + self.layers * (biases + 2 * self.hidden) + self.hidden

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        return self.linear_parameters + self.other_parameters

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token in the KV cache, bf16."""
        # Keys and values, of 2 bytes each.
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def lora_parameters(self, rank: int, targets: str = "all-linear") -> int:
        """Trainable weights of an adapter; targets: all-linear or attention."""
        names = [name for name in self.linears if targets == "all-linear" or name[0] in "qkvo"]
        return self.layers * rank * sum(sum(self.linears[name]) for name in names)

    @classmethod
    def from_config(cls, config: dict) -> Shape:
        """Reads the sizes in a config.json of transformers. PlanError if it lacks one."""
        try:
            heads = config["num_attention_heads"]
            return cls(
                config["hidden_size"],
                config["num_hidden_layers"],
                heads,
                config.get("num_key_value_heads") or heads,
                config["intermediate_size"],
                config["vocab_size"],
                bool(config.get("tie_word_embeddings", False)),
                config.get("head_dim") or config["hidden_size"] // heads,
                config.get("attention_bias", config.get("model_type") == "qwen2"),
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise PlanError(f"the model's config.json does not give its sizes ({error!r})") from error


# Qwen2.5 and Qwen2.5-Coder, base and Instruct: the same shapes.
QWEN25 = {
    "0.5B": Shape(896, 24, 14, 2, 4864, 151_936, True, 64),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151_936, True, 128),
    "3B": Shape(2048, 36, 16, 2, 11008, 151_936, True, 128),
    "7B": Shape(3584, 28, 28, 4, 18944, 152_064, False, 128),
    "14B": Shape(5120, 48, 40, 8, 13824, 152_064, False, 128),
}

QWEN25_CODER_CONTEXT = 32_768  # of every size; plain Qwen2.5 has several


def context_of(model: str) -> int | None:
    """The longest prompt with its response that a model was made for, in tokens; None if that is not known offline."""
    path = model_path(model)
    if (file := Path(path) / "config.json").is_file():
        return read_object(file).get("max_position_embeddings")
    return QWEN25_CODER_CONTEXT if re.fullmatch(r"Qwen/Qwen2\.5-Coder-[\d.]+B(?:-Instruct)?", path) else None


def shape_of(model: str) -> Shape:
    """The shape of an alias, a directory with a config.json, or a Qwen2.5 hub id. PlanError for what is not known."""
    path = model_path(model)
    if (file := Path(path) / "config.json").is_file():
        return Shape.from_config(read_object(file, PlanError))
    if match := re.fullmatch(r"Qwen/Qwen2\.5(?:-Coder)?-([\d.]+B)(?:-Instruct)?", path):
        if match[1] in QWEN25:
            return QWEN25[match[1]]
    raise PlanError(
        f"the shape of {model} is not known offline; download it and give its directory, or take one of "
        f"{', '.join(ALIASES)}, Qwen/Qwen2.5-Coder-{{{','.join(QWEN25)}}}"
    )


# ---------------------------------------------------------------- presets


@dataclass(frozen=True)
class Preset:
    """The sizes of a run for one class of machine; every one can be given as a flag."""

    name: str
    gib: int  # of GPU memory; 0: none needed
    prompts_per_mode: int  # proposals a mode and step
    max_new_tokens: int  # longest response
    max_batch: int  # sequences decoded at once ("slots")
    token_budget: int  # tokens of a training micro-batch, with their padding
    prompt_tokens: int = 2048  # longest prompt that is planned for
    answers: int = 8  # a valid task
    references: int = 6
    lora_rank: int = 32
    lora_targets: str = "all-linear"
    adapters: int = 1  # 2 with --proposer separate
    quantization: str = "nf4"
    rollout_weights: str = "auto"  # "bf16": sampling holds a copy of the 4-bit layers in the dtype of computation
    dtype: str = "auto"  # of computation: fp32 takes 4 bytes on a GPU too
    train: str = "lora"  # "full": every weight
    learning_rate: float = 2e-5
    steps: int = 500
    eval_samples: int = 0  # answers a held-out task before and after, for pass@k


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("8gb", 8, 8, 512, 32, 3072, 1536, references=3),
        Preset("12gb", 12, 12, 1024, 64, 4096),
        Preset("16gb", 16, 16, 1024, 96, 4096),
        Preset("24gb", 24, 32, 2048, 192, 8192),
        Preset("32gb", 32, 40, 2048, 256, 12288),
        Preset("40gb", 40, 48, 2048, 256, 16384),
        Preset("48gb", 48, 48, 2048, 256, 16384),
        Preset("80gb", 80, 64, 4096, 384, 32768),
    )
}
TINY = Preset(
    "tiny",
    0,
    8,
    192,
    512,
    1024,
    320,
    references=2,
    lora_rank=16,
    quantization="none",
    learning_rate=1e-3,
    steps=80,
    eval_samples=64,
)


def free_gpu_bytes() -> float | None:
    """What a GPU can still give to this process; None without one. Asking wakes CUDA."""
    import torch

    from azr.policy.backoff import allocate_in_segments_that_grow, free_memory

    allocate_in_segments_that_grow()
    return free_memory(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None


def choose_preset(name: str, model: str, free: int | None) -> tuple[Preset, str]:
    """(preset, one line that says why) for a name or "auto": the largest whose memory is free, with a tenth to spare.

    `free`: bytes of GPU memory, None without a GPU.
    """
    if model == "tiny":
        return TINY, "preset tiny: sizes of the embedded model"
    if name != "auto":
        return PRESETS[name], f"preset {name}, as asked"
    smallest = next(iter(PRESETS.values()))
    if free is None:
        return smallest, f"preset {smallest.name}: no GPU found, so the smallest; name a card's size with --preset"
    # The driver and the context take their part, so no card has all of its memory free.
    preset = [smallest, *(preset for preset in PRESETS.values() if free >= 0.9 * preset.gib * GIB)][-1]
    return preset, f"preset {preset.name}: {free / GIB:.1f} GiB of GPU memory are free"


def capacity(preset: Preset, free: int | None = None) -> float | None:
    """Bytes to plan with: what is free, else the preset's card less the CUDA context; None: ordinary memory (tiny)."""
    if not preset.gib:
        return None
    return free if free is not None else preset.gib * GIB - CUDA_CONTEXT


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class Plan:
    """Bytes by phase and part, for sizes that were lowered until they fit (or could not be)."""

    shape: Shape
    preset: Preset  # with the sizes that will be used
    capacity: float | None
    phases: dict[str, dict[str, float]]
    lowered: list[str]  # "token_budget 8192 -> 4096", ...
    device: str = "cuda"

    @property
    def totals(self) -> dict[str, float]:
        """Bytes of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        """Bytes of the largest phase."""
        return max(self.totals.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the capacity; True where that is not known."""
        return self.capacity is None or self.peak <= self.capacity

    @property
    def full_length(self) -> int:
        """Responses in the cache at once if every one has the longest prompt and grows to its limit."""
        return int(self.phases["rollout"]["KV cache"] / cache_bytes(self.shape, self.preset, 1, self.device))


def weight_bytes(shape: Shape, quantization: str, value: int = 2) -> float:
    """Returns the bytes of the frozen base: its linears in NF4 or, as all the rest, in numbers of `value` bytes."""
    return shape.linear_parameters * (NF4_BYTES if quantization == "nf4" else value) + shape.other_parameters * value


def layer_bytes(shape: Shape) -> float:
    """Activations a token saves inside one layer: half-precision values, and what its two norms keep in fp32. An H200
    took 13.1 GB for a micro-batch of 32,768 tokens of a 3B, of 13.3 planned, when the residual stream was bf16 (in
    fp32 it takes 4.8 GB more there, which no card has measured)."""
    return 2 * (3 * shape.intermediate + 6 * shape.hidden) + 4 * 3 * shape.hidden


def fp32_layer_bytes(shape: Shape, rank: int) -> float:
    """Like `layer_bytes`, in fp32: inputs, norms and products are kept once, and LoRA keeps `rank` numbers a module."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return 4 * (4 * shape.hidden + 2 * q + 2 * kv + 4 * shape.intermediate + len(shape.linears) * rank)


def cache_bytes(shape: Shape, preset: Preset, sequences: int, device: str) -> float:
    """Returns the bytes of a KV cache for so many sequences of full length, in whole pages."""
    page, block = (256, 8) if device == "cuda" else (32, 1)
    factor = value_bytes(preset, device) / 2
    longest = preset.prompt_tokens + preset.max_new_tokens + block
    return sequences * -(-longest // page) * page * shape.kv_bytes * factor


def value_bytes(preset: Preset, device: str) -> int:
    """Returns the bytes of a number in the dtype of computation; "auto" is fp32 on a CPU and half of it on a GPU."""
    return {"fp32": 4, "bf16": 2, "fp16": 2}.get(preset.dtype, 2 if device == "cuda" else 4)


def memory(shape: Shape, preset: Preset, device: str = "cuda", room: float | None = None) -> dict[str, dict]:
    """Bytes of every part, by phase, on "cuda" (bf16, layers recomputed) or "cpu" (everything kept, in fp32 unless the
    preset says otherwise; activations are counted in fp32 then too, a part of which is).

    The cache takes what `room` leaves, at most what all slots need; it is freed before training, gradients after it.
    """
    on_gpu = device == "cuda"
    value = value_bytes(preset, device)
    weights = weight_bytes(shape, preset.quantization, value)
    loading, kept, updating = trained_bytes(shape, preset, value)
    largest = max(rows * columns for rows, columns in shape.linears.values())
    unpacked = {"unpacked matrix": value * largest} if preset.quantization == "nf4" else {}
    copies = {} if on_gpu else {"copies": COPIES * trained_parameters(shape, preset)}
    # Nothing is trained yet, so there are neither gradients nor moments. A CPU has the whole bf16 file in memory
    # beside the model, a GPU only the matrices that are being read.
    load = {"weights": weights, **loading, "checkpoint": 2 * shape.parameters}
    if on_gpu:
        load["checkpoint"] = LOADERS * value * largest
    rollout = {
        "weights": weights,
        **kept,
        **copies,
        **unpacked,
        **sampling(shape, preset, device),
    }
    if not on_gpu:
        rollout["overhead"] = HOST_OVERHEAD
    training = {
        "weights": weights,
        **updating,
        **copies,
        **unpacked,
        **scoring(shape, preset, device),
    }
    slots = min(preset.max_batch, in_flight(preset)) + 1  # and a prompt that is held
    cache, copied = cache_bytes(shape, preset, slots, device), value * shape.linear_parameters
    left = math.inf if room is None else room - sum(rollout.values()) - SPARE
    pays = on_gpu and preset.rollout_weights == "auto" and copies_pay(left, copied, cache)
    if preset.quantization == "nf4" and (pays or preset.rollout_weights == "bf16"):
        rollout["copied weights"] = copied
    if room is not None:
        cache = max(min(cache, room - sum(rollout.values()) - SPARE), 0)
    return {"load": load, "rollout": {**rollout, "KV cache": cache}, "training": training}


def trained_parameters(shape: Shape, preset: Preset) -> int:
    """How many numbers training changes: those of the adapters, or all."""
    if preset.train == "full":
        return shape.parameters
    return preset.adapters * shape.lora_parameters(preset.lora_rank, preset.lora_targets)


def trained_bytes(shape: Shape, preset: Preset, value: int) -> tuple[dict, dict, dict]:
    """What training adds to the weights in numbers of `value` bytes: while loading, while sampling, in an update."""
    count = trained_parameters(shape, preset)
    if preset.train != "full":
        return tuple({"LoRA + Adam": size * count} for size in (4, ADAPTER_STATE - 4, ADAPTER_STATE))
    masters = {"fp32 masters": 4 * count} if value == 2 else {}
    # The head's gradient is made in fp32 and, in half precision, rounded before its master takes it over.
    head = shape.vocabulary * shape.hidden * (6 if value == 2 else 4)
    moments = {**masters, "Adam": 8 * count}
    return masters, moments, {**moments, "gradients": 4 * count + head}


def in_flight(preset: Preset) -> int:
    """The most responses asked for at once: n answers to every proposal."""
    return 3 * preset.prompts_per_mode * preset.answers


def sampling(shape: Shape, preset: Preset, device: str) -> dict[str, float]:
    """Bytes of a prefill and of the logits of a decode step (engine.py, sampling.py)."""
    slots, prompts = min(preset.max_batch, in_flight(preset)), 3 * preset.prompts_per_mode
    # A single longer prompt is prefilled alone (scheduler.py).
    prefill = max(preset.prompt_tokens, min(PREFILL_TOKENS, min(prompts, slots) * preset.prompt_tokens))
    logits = (SAMPLING_BYTES * slots + 4 * min(prompts, slots)) * shape.vocabulary
    if device == "cuda":
        # a product of LoRA in fp32 beside the bf16 values
        activations = prefill * (8 * shape.hidden + 10 * shape.intermediate) * value_bytes(preset, device) / 2
        return {"activations": activations, "logits": logits}
    return {"activations": prefill * 4 * (4 * shape.hidden + 4 * shape.intermediate), "logits": logits}


def scoring(shape: Shape, preset: Preset, device: str) -> dict[str, float]:
    """Bytes of the forward and backward pass of the largest micro-batch; its logits come in blocks (scoring.py)."""
    longest = preset.prompt_tokens + preset.max_new_tokens
    tokens = max(preset.token_budget, longest)  # a longer sequence goes alone
    rows, columns, each = (1024, 16384, 16) if device == "cuda" else (1024, 4096, 12)
    # scoring.py: a small vocabulary takes more rows for the same number of logits.
    if shape.vocabulary < columns:
        rows, columns = rows * columns // shape.vocabulary, shape.vocabulary
    block, rank = min(rows, tokens) * columns * each, preset.lora_rank if preset.train == "lora" else 0
    if device == "cuda":
        value = value_bytes(preset, device)
        one = layer_bytes(shape) if value == 2 else fp32_layer_bytes(shape, rank)
        per_token = 4 * shape.hidden * shape.layers + one * BACKWARD_FACTOR  # the residual stream is fp32 always
        return {"activations": tokens * per_token, "logits": block + tokens * 8 * shape.hidden}
    per_token = fp32_layer_bytes(shape, rank) * shape.layers + 4 * (3 * shape.intermediate + 2 * shape.hidden)
    return {"activations": tokens * per_token, "logits": block + tokens * 12 * shape.hidden}


def plan_memory(shape: Shape, preset: Preset, room: float | None, device: str = "cuda") -> Plan:
    """The plan for `room` bytes (None: no limit): slots and micro-batch are lowered until each phase fits.

    They are halved, as a run does by itself when memory runs out. Neither changes what is learned: slots change speed
    only, and the gradient does not depend on the micro-batch. The cache must hold LEAST_SLOTS responses of full
    length; if it holds fewer than are decoded at once, the newest wait when they grow so long.
    """
    lowered, longest = [], preset.prompt_tokens + preset.max_new_tokens

    def short(phase: str) -> bool:
        parts = memory(shape, preset, device, room)[phase]
        # The planned cache takes whatever is left and always fits: what must fit is the least that it can work with.
        return sum(parts.values()) - parts.get("KV cache", 0) + (needed if phase == "rollout" else 0) > room

    needed = cache_bytes(shape, preset, min(LEAST_SLOTS, in_flight(preset)), device)
    for phase, name, least in (("rollout", "max_batch", LEAST_SLOTS), ("training", "token_budget", longest)):
        original = size = getattr(preset, name)
        while room is not None and size > least and short(phase):
            size = max(least, size // 2)  # as backoff.py does it
            preset = dataclasses.replace(preset, **{name: size})
        if size != original:
            lowered.append(f"{name} {original} -> {size}")
    phases = memory(shape, preset, device, room)
    if room is not None:  # what would be needed, where it does not fit
        phases["rollout"]["KV cache"] = max(phases["rollout"]["KV cache"], needed)
    return Plan(shape, preset, room, phases, lowered, device)


def advice(plan: Plan) -> tuple[str, Plan] | None:
    """Returns a change of flags that makes a plan fit, and the plan with it; None if none of them does.

    4 bits first, then shorter texts before a smaller adapter, one flag before several; an adapter instead of all
    weights last.
    """
    preset, full = plan.preset, plan.preset.train == "full"
    lower = {"max_new_tokens": (2048, 1024, 512), "prompt_tokens": (1536, 1024), "lora_rank": () if full else (16, 8)}
    changes = [{name: value} for name, values in lower.items() for value in values]
    changes += [{"max_new_tokens": 512, "prompt_tokens": 1024}]
    least = {"max_new_tokens": 256, "prompt_tokens": 768, "lora_rank": 8, "max_batch": LEAST_SLOTS}
    changes += [{name: size for name, size in least.items() if name != "lora_rank" or not full}]
    changes = [{name: v for name, v in change.items() if v < getattr(preset, name)} for change in changes]
    if full:
        changes += [{"train": "lora", "quantization": "nf4"}]
    elif preset.quantization == "none":
        bits = {"quantization": "nf4"}
        changes = [bits, *changes, *(change | bits for change in changes)]
    for change in filter(None, changes):
        candidate = plan_memory(plan.shape, dataclasses.replace(preset, **change), plan.capacity, plan.device)
        if candidate.fits:
            return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items()), candidate
    return None


def elsewhere(plan: Plan) -> list[str]:
    """Says what would fit if no flag helps: the largest smaller model here, the smallest card for this one. Both are
    planned to see that they do."""
    options = []
    for size, shape in reversed(QWEN25.items()):  # the largest first
        smaller = shape.parameters < plan.shape.parameters
        if smaller and plan_memory(shape, plan.preset, plan.capacity, plan.device).fits:
            options.append(f"--model qwen-{size.lower()}")
            break
    full = {"train": "full", "quantization": "none"} if plan.preset.train == "full" else {}
    for preset in (dataclasses.replace(preset, **full) for preset in PRESETS.values()):
        if preset.gib * GIB > (plan.capacity or 0) and plan_memory(plan.shape, preset, capacity(preset)).fits:
            options.append(f"a card of {preset.gib} GB with --preset {preset.name}")
            break
    return options


def render(plan: Plan, model: str = "") -> str:
    """The plan as plain text, 80 columns: a row a part, a column a phase, in GB."""
    preset, phases = plan.preset, plan.phases
    count = trained_parameters(plan.shape, preset)
    dtype = preset.dtype if preset.dtype != "auto" else "bf16" if plan.device == "cuda" else "fp32"
    base = {"nf4": f"nf4 + {dtype}", "none": dtype}[preset.quantization]
    times = "" if preset.adapters == 1 else f"{preset.adapters} x "
    trained = [f"adapter      {times}LoRA rank {preset.lora_rank}, {preset.lora_targets}: {count:,} parameters in fp32"]
    if preset.train == "full":
        trained = [f"trained      every weight, in {dtype}" + (" from fp32 masters" if dtype != "fp32" else "")]
        trained += [f"             and {COPIES * count / GB:.2f} GB of a CPU's memory, to go back to after a stop"]
    unit, name = (GB, "GB") if plan.peak > GB else (1e6, "MB")
    digits = 2 if unit == GB else 1
    lines = [
        f"model        {model_path(model) if model not in ('', 'tiny') else model or 'given by its shape'}: "
        f"{plan.shape.parameters:,} parameters, {base}",
        *trained,
        f"a step       {3 * preset.prompts_per_mode} proposals, up to {in_flight(preset)} answers of up to "
        f"{preset.max_new_tokens} tokens",
        f"sizes        {preset.max_batch} slots, {preset.token_budget} tokens a micro-batch, prompts of up to "
        f"{preset.prompt_tokens}",
        *(f"lowered      {change}: a run does so too, and learns the same" for change in plan.lowered),
    ]
    if plan.full_length < (slots := min(preset.max_batch, in_flight(preset))):
        lines += [
            f"cache        {plan.full_length} responses of full length at once, {slots} are decoded:",
            "             the newest wait if more than that grow so long",
        ]
    lines += ["", f"{f'{name}, computed':16}" + "".join(f"{phase:>12}" for phase in phases)]
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        cells = (f"{parts[part] / unit:12.{digits}f}" if part in parts else " " * 12 for parts in phases.values())
        lines.append(f"{part:16}{''.join(cells)}".rstrip())
    totals = plan.totals.values()
    lines.append(f"{'total':16}" + "".join(f"{total / unit:12.{digits}f}" for total in totals))
    if plan.capacity is not None:
        room = plan.capacity
        lines.append(f"{'head-room':16}" + "".join(f"{(room - total) / unit:12.{digits}f}" for total in totals))
        lines.append(f"overhead     {CUDA_CONTEXT / GB:.1f} GB of CUDA context lie outside the {room / GB:.1f} GB")
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Says whether the memory suffices; if not, what would: a plan was made of each suggestion to see that it does."""
    if plan.capacity is None:
        return f"{plan.peak / GB:.2f} GB of ordinary memory in use besides Python and its libraries"
    phase = max(plan.totals, key=plan.totals.get)
    text = f"{plan.peak / GB:.1f} of {plan.capacity / GB:.1f} GB of GPU memory"
    if plan.fits:
        return text
    text = f"{phase} takes {text};\n             "
    if suggestion := advice(plan):
        flag, smaller = suggestion
        return f"{text}it fits with {flag} ({smaller.peak / GB:.1f} GB)"
    others = elsewhere(plan)
    return f"{text}no flag makes this model fit" + (f"; it fits with {' or with '.join(others)}" if others else "")

"""Which model, which sizes, and whether they fit: shapes known offline, presets, a memory plan before anything loads.

    shape = shape_of("qwen-3b")                                   # needs no network
    preset, why = choose_preset("auto", "qwen-3b", free_gpu_bytes())
    plan = plan_memory(shape, preset, capacity(preset))           # sizes lowered, loudly, until they fit
    print(render(plan))

Figures are computed, not measured: GB = 1e9 bytes, from the shapes and from the bytes a token measured for PEFT and
bitsandbytes on small models. Left out: time and cost, several GPUs, models that are not decoder-only with SwiGLU
(Qwen2, Llama and their like). No torch is imported, but to ask a GPU what is free.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

ALIASES = {"tiny": str(Path(__file__).with_name("tiny")),
           "qwen-3b": "Qwen/Qwen2.5-Coder-3B", "qwen-7b": "Qwen/Qwen2.5-Coder-7B"}
GB = 1e9
GIB = 2**30
CUDA_CONTEXT = 0.9e9        # of the driver and the libraries' work spaces, before the first tensor
NF4_BYTES = 0.516           # a weight: 4 bits, and block scales that are quantized themselves
ADAPTER_STATE = 16          # bytes a LoRA parameter: weight, gradient and two Adam moments in fp32
BACKWARD_FACTOR = 4 / 3     # memory of a recomputed layer's backward pass over what its forward pass saves
SCORING_ROWS, SCORING_COPIES = 128, 3.4     # rows of logits at once, fp32 copies of them at the peak
SAMPLING_BYTES = 24         # a logit: raw, tempered and normalised in fp32, cumulated in fp64
PREFILL_TOKENS = 8192
LEAST_SLOTS = 8             # below, decoding is so slow that another model is the better answer


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
    tied: bool                  # the head shares the embedding's weights
    head_dim: int
    qkv_bias: bool = True       # as Qwen2 has it

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the quantized matrices of a layer; LoRA goes on these."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"q_proj": (self.hidden, q), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv),
                "o_proj": (q, self.hidden), "gate_proj": (self.hidden, self.intermediate),
                "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden)}

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Embedding and head, biases and norms: never quantized."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return tables + self.layers * (biases + 2 * self.hidden) + self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def kv_bytes(self) -> int:
        """Of one token in the KV cache, bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def lora_parameters(self, rank: int, targets: str = "all-linear") -> int:
        names = [name for name in self.linears if targets == "all-linear" or name[0] in "qkvo"]
        return self.layers * rank * sum(sum(self.linears[name]) for name in names)

    @classmethod
    def from_config(cls, config: dict) -> Shape:
        """From a config.json of transformers. PlanError if it lacks a size."""
        try:
            heads = config["num_attention_heads"]
            return cls(config["hidden_size"], config["num_hidden_layers"], heads,
                       config.get("num_key_value_heads") or heads, config["intermediate_size"], config["vocab_size"],
                       bool(config.get("tie_word_embeddings", False)),
                       config.get("head_dim") or config["hidden_size"] // heads,
                       config.get("attention_bias", config.get("model_type") == "qwen2"))
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


def model_path(model: str) -> str:
    """The hub id or directory behind an alias; anything else as it is."""
    return ALIASES.get(model, model)


def shape_of(model: str) -> Shape:
    """The shape of an alias, a directory with a config.json, or a Qwen2.5 hub id. PlanError for what is not known."""
    path = model_path(model)
    if (file := Path(path) / "config.json").is_file():
        try:
            return Shape.from_config(json.loads(file.read_text()))
        except ValueError as error:
            raise PlanError(f"{file}: {error}") from error
    if match := re.fullmatch(r"Qwen/Qwen2\.5(?:-Coder)?-([\d.]+B)(?:-Instruct)?", path):
        if match[1] in QWEN25:
            return QWEN25[match[1]]
    raise PlanError(f"the shape of {model} is not known offline; download it and give its directory, or take one of "
                    f"{', '.join(ALIASES)}, Qwen/Qwen2.5-Coder-{{{','.join(QWEN25)}}}")


# ---------------------------------------------------------------- presets

@dataclass(frozen=True)
class Preset:
    """The sizes of a run for one class of machine; every one can be given as a flag."""

    name: str
    gib: int                    # of GPU memory; 0: none needed
    prompts_per_mode: int       # proposals a mode and step
    max_new_tokens: int         # longest response
    max_batch: int              # sequences decoded at once ("slots")
    token_budget: int           # padded tokens of a training micro-batch
    prompt_tokens: int = 2048   # longest prompt that is planned for
    answers: int = 8            # a valid task
    references: int = 6
    lora_rank: int = 32
    lora_targets: str = "all-linear"
    quantization: str = "nf4"
    learning_rate: float = 2e-5
    steps: int = 500
    eval_samples: int = 0       # answers a held-out task before and after, for pass@k


PRESETS = {preset.name: preset for preset in (
    Preset("8gb", 8, 8, 512, 32, 3072, 1536, references=3),
    Preset("12gb", 12, 12, 1024, 64, 4096),
    Preset("16gb", 16, 16, 1024, 96, 4096),
    Preset("24gb", 24, 32, 2048, 192, 8192),
    Preset("48gb", 48, 48, 2048, 256, 16384),
    Preset("80gb", 80, 64, 4096, 384, 32768),
)}
TINY = Preset("tiny", 0, 16, 128, 512, 2048, 320, references=2, lora_rank=16, quantization="none", learning_rate=1e-3,
              steps=120, eval_samples=128)


def free_gpu_bytes() -> int | None:
    """What the GPU has free now; None without one."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def choose_preset(name: str, model: str, free: int | None) -> tuple[Preset, str]:
    """(preset, one line that says why) for a name or "auto": the largest whose memory is free, with a tenth to spare.

    `free`: bytes of GPU memory, None without a GPU. PlanError: unknown name.
    """
    if name != "auto":
        if name not in PRESETS:
            raise PlanError(f"unknown preset {name}: take auto, {', '.join(PRESETS)}")
        if model == "tiny":
            return TINY, f"preset tiny: the embedded model has its own sizes, {name} is not needed"
        return PRESETS[name], f"preset {name}, as asked"
    if model == "tiny":
        return TINY, "preset tiny: sizes of the embedded model"
    smallest = next(iter(PRESETS.values()))
    if free is None:
        return smallest, f"preset {smallest.name}: no GPU found, so the smallest; name a card's size with --preset"
    fitting = [preset for preset in PRESETS.values() if free >= 0.9 * preset.gib * GIB]
    preset = fitting[-1] if fitting else smallest
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
    preset: Preset              # with the sizes that will be used
    capacity: float | None
    phases: dict[str, dict[str, float]]
    lowered: list[str]          # "token_budget 8192 -> 4096", ...

    @property
    def peak(self) -> float:
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.peak <= self.capacity


def weight_bytes(shape: Shape, quantization: str) -> float:
    """Of the frozen base: NF4 linears and bf16 for the rest, or bf16 for all."""
    return shape.linear_parameters * (NF4_BYTES if quantization == "nf4" else 2) + shape.other_parameters * 2


def layer_bytes(shape: Shape) -> float:
    """Activations a token saves inside one layer: bf16 values, and PEFT's fp32 copy of every adapted module's input."""
    values = 3 * shape.intermediate + 6 * shape.hidden
    return 2 * values + 4 * (6 * shape.hidden + shape.intermediate)


def memory(shape: Shape, preset: Preset) -> dict[str, dict[str, float]]:
    """Bytes of every part, by phase. The KV cache is freed before training, gradients after it."""
    adapter = shape.lora_parameters(preset.lora_rank, preset.lora_targets)
    weights = weight_bytes(shape, preset.quantization)
    longest = preset.prompt_tokens + preset.max_new_tokens
    micro_batch = max(preset.token_budget, longest)         # a longer sequence goes alone
    cache = preset.max_batch * longest * shape.kv_bytes
    expanded = cache / shape.layers * shape.heads / shape.kv_heads      # one layer's keys and values for every head
    largest_matrix = 2 * max(rows * columns for rows, columns in shape.linears.values())
    unpacked = largest_matrix if preset.quantization == "nf4" else 0
    return {
        "rollout": {
            "weights": weights,
            "LoRA + Adam": adapter * (ADAPTER_STATE - 4),
            "KV cache": cache,
            "activations": max(expanded, PREFILL_TOKENS * layer_bytes(shape) / 2) + unpacked,
            "logits": preset.max_batch * shape.vocabulary * SAMPLING_BYTES,
        },
        "training": {
            "weights": weights,
            "LoRA + Adam": adapter * ADAPTER_STATE,
            "activations": micro_batch * (2 * shape.hidden * shape.layers + layer_bytes(shape) * BACKWARD_FACTOR)
            + unpacked,
            "logits": SCORING_ROWS * shape.vocabulary * 4 * SCORING_COPIES,
        },
    }


def plan_memory(shape: Shape, preset: Preset, room: float | None) -> Plan:
    """The plan for `room` bytes (None: no limit): slots and micro-batch are lowered until each phase fits.

    Neither changes what is learned: slots change speed only, and the gradient does not depend on the micro-batch.
    """
    lowered = []
    longest = preset.prompt_tokens + preset.max_new_tokens
    for phase, name, least, by in (("rollout", "max_batch", LEAST_SLOTS, 8),
                                   ("training", "token_budget", longest, 256)):
        asked = size = getattr(preset, name)
        while room is not None and size > least and sum(memory(shape, preset)[phase].values()) > room:
            size = max(least, size - by)
            preset = dataclasses.replace(preset, **{name: size})
        if size != asked:
            lowered.append(f"{name} {asked} -> {size}")
    return Plan(shape, preset, room, memory(shape, preset), lowered)


def advice(plan: Plan) -> str | None:
    """The change that makes a plan fit: shorter responses, a smaller adapter, 4 bits; None if nothing here does."""
    preset = plan.preset
    candidates = [(f"--max-new-tokens {tokens}", {"max_new_tokens": tokens})
                  for tokens in (2048, 1024, 512, 256) if tokens < preset.max_new_tokens]
    candidates += [(f"--lora-rank {rank}", {"lora_rank": rank}) for rank in (16, 8) if rank < preset.lora_rank]
    if preset.quantization == "none":
        candidates.insert(0, ("--quantization nf4", {"quantization": "nf4"}))
    if preset.max_new_tokens > 256 and preset.lora_rank > 8:
        candidates.append(("--max-new-tokens 256 --lora-rank 8", {"max_new_tokens": 256, "lora_rank": 8}))
    for flag, change in candidates:
        if plan_memory(plan.shape, dataclasses.replace(preset, **change), plan.capacity).fits:
            return flag
    for larger in PRESETS.values():
        if plan_memory(plan.shape, larger, capacity(larger)).fits:
            return f"a smaller model, or a card for --preset {larger.name}"
    return None


def checkpoint_bytes(plan: Plan) -> tuple[float, float]:
    """(an adapter, its state) on disk: fp32 weights, and in the state weights again and two Adam moments."""
    adapter = plan.shape.lora_parameters(plan.preset.lora_rank, plan.preset.lora_targets)
    return 4 * adapter, 12 * adapter


def render(plan: Plan, model: str = "") -> str:
    """The plan as plain text, 80 columns: a row a part, a column a phase, in GB."""
    preset, phases = plan.preset, plan.phases
    lines = [f"model        {model_path(model) or 'given by its shape'}: {plan.shape.parameters:,} parameters, "
             f"{preset.quantization if preset.quantization == 'nf4' else 'not quantized'}",
             f"adapter      LoRA rank {preset.lora_rank}, {preset.lora_targets}: "
             f"{plan.shape.lora_parameters(preset.lora_rank, preset.lora_targets):,} parameters in fp32",
             f"a step       {3 * preset.prompts_per_mode} proposals, up to "
             f"{3 * preset.prompts_per_mode * preset.answers} answers of up to {preset.max_new_tokens} tokens",
             f"sizes        {preset.max_batch} slots, {preset.token_budget} tokens a micro-batch, prompts of up to "
             f"{preset.prompt_tokens}",
             *(f"lowered      {change}, to fit; what is learned stays the same" for change in plan.lowered), "",
             f"{'GB, computed':16}" + "".join(f"{phase:>12}" for phase in phases)]
    names = list(dict.fromkeys(name for parts in phases.values() for name in parts))
    for name in names:
        lines.append(f"{name:16}" + "".join(f"{parts[name] / GB:12.2f}" if name in parts else " " * 12
                                            for parts in phases.values()))
    totals = [sum(parts.values()) for parts in phases.values()]
    lines.append(f"{'total':16}" + "".join(f"{total / GB:12.2f}" for total in totals))
    if plan.capacity is not None:
        lines.append(f"{'head-room':16}" + "".join(f"{(plan.capacity - total) / GB:12.2f}" for total in totals))
    adapter, state = checkpoint_bytes(plan)
    lines += ["", f"disk         {adapter / GB:.2f} GB for every kept adapter, "
              f"{2 * state / GB:.2f} GB for the newest two states"]
    if plan.fits:
        limit = "ordinary memory" if plan.capacity is None else f"the {plan.capacity / GB:.1f} GB there are"
        return "\n".join([*lines, f"fits         in {limit}"])
    flag = advice(plan)
    return "\n".join([*lines, f"DOES NOT FIT in {plan.capacity / GB:.1f} GB; " + (
        f"try {flag}" if flag else "no preset is large enough for this model")])

"""Policies of random weights in a model's true shape, for benchmarks: nothing is downloaded, nothing is written.

    policy = random_policy(QWEN25["3B"], "nf4", "cuda", lora_rank=32)

Every matrix is drawn on the device and quantized before the next one is drawn, so that building a 4-bit model takes no
more memory than the model and one of its matrices. What it samples is noise; speed and memory are the real ones.
"""

from __future__ import annotations

from pathlib import Path

import torch

from azr.machine.plan import Shape
from azr.models import model_path
from azr.policy.load import LoraSettings, _new_lora, _settle
from azr.policy.policy import Policy

SCALE = 0.02


def random_policy(
    shape: Shape,
    quantization: str,
    device: str,
    lora_rank: int | None = 32,
    dtype=None,
    tokenizer=None,
    context: int = 32_768,
    **engine_options,
) -> Policy:
    """A Qwen2 of this shape. tokenizer: a directory; None: that of the embedded model, whose ids are the first few
    hundred. lora_rank None: no adapter. Its B is random too, as after some training."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=context,
        dtype=dtype,
        attn_implementation="sdpa",
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)
    if quantization == "nf4":
        _to_4_bit(model, dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            new = torch.empty(
                parameter.shape if name != "weight" else _shape_of(module, parameter), dtype=dtype, device=device
            )
            new = new.fill_(1.0) if "Norm" in type(module).__name__ else new.normal_(0, SCALE, generator=generator)
            setattr(module, name, _parameter(parameter, new))
    if shape.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = quantization == "nf4"  # peft asks for it
    _settle(model)
    info = {
        "base_model": f"random {shape.parameters / 1e9:.1f}B",
        "revision": None,
        "quantization": quantization,
        "dtype": str(dtype).removeprefix("torch."),
        "lora": None,
    }
    if lora_rank:
        model, info["lora"] = _new_lora(model, LoraSettings(lora_rank, 2.0 * lora_rank), "random", 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 1e-3, generator=generator)
    tokenizer = AutoTokenizer.from_pretrained(Path(tokenizer or model_path("tiny")))
    return Policy(model.eval(), tokenizer, info, set(), **engine_options)


def with_values_in_B(policy: Policy, scale: float) -> Policy:
    """The policy with LoRA's B drawn from N(0, scale), as after some training: the same on every call."""
    generator = torch.Generator(policy.device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale, generator=generator)
    return policy


def _to_4_bit(model, dtype) -> None:
    from bitsandbytes.nn import Linear4bit

    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if type(linear) is torch.nn.Linear:
                    with torch.device("meta"):
                        new = Linear4bit(
                            linear.in_features,
                            linear.out_features,
                            linear.bias is not None,
                            dtype,
                            compress_statistics=True,
                            quant_type="nf4",
                        )
                    setattr(parent, name, new)


def _shape_of(module, parameter) -> tuple[int, ...]:
    return (module.out_features, module.in_features) if hasattr(module, "out_features") else tuple(parameter.shape)


def _parameter(old, values: torch.Tensor) -> torch.nn.Parameter:
    """Quantized where `old` is a 4-bit parameter; the values are gone when this returns."""
    if type(old).__name__ != "Params4bit":
        return torch.nn.Parameter(values, requires_grad=False)
    new = type(old)(values, requires_grad=False, compress_statistics=True, quant_type="nf4", module=old.module)
    return new.to(values.device)

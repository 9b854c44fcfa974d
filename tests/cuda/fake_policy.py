"""Policies of a model's true shape whose tensors are fake: devices, dtypes and shapes, without memory or numbers.

    with fake_cuda():
        policy = fake_policy(QWEN25["3B"], "nf4", lora_rank=32)

transformers, PEFT and bitsandbytes build and run their own modules, the project its own decoder and scoring; only
what a kernel would compute is left out. Needs the guard of guard.py.
"""

import contextlib
import dataclasses
import functools
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, masking_utils

from azr.machine.plan import Shape
from azr.models import model_path
from azr.policy import decode_ops, decode_triton, decoder
from azr.policy.load import LoraSettings, _new_lora, _settle
from azr.policy.policy import Policy

BLOCK, NESTED = 64, 256  # weights that share a scale, scales that share one


class Stream:
    def __init__(self, *ignored):
        pass


@contextlib.contextmanager
def fake_cuda():
    """In here new tensors are fake and may be on "cuda", and attention takes the kernel that a GPU would take."""
    patches = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "graph_pool_handle", lambda: (0, 1)),
        (F, "scaled_dot_product_attention", attention_of_a_gpu),
        (decoder, "operations", lambda device, dtype: decode_triton if device.type == "cuda" else decode_ops),
        # transformers builds a mask where it cannot look whether one is needed, as it can on a GPU
        (masking_utils, "is_tracing", lambda tensor=None: False),
    ]
    with contextlib.ExitStack() as stack:
        for patched in patches:
            stack.enter_context(patch.object(*patched))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def attention_of_a_gpu(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """flash-attn's kernel inside of torch, which SDPA chooses on a GPU for half precision without a mask.

    RuntimeError: arguments with which SDPA would choose a slower one.
    """
    if attn_mask is not None or q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"SDPA would not take its flash kernel: mask {attn_mask is not None}, {q.dtype}")
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise RuntimeError(f"{q.shape[1]} query heads, {k.shape[1]} key heads and no enable_gqa")
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]


@functools.cache
def _tokenizer():
    return AutoTokenizer.from_pretrained(model_path("tiny"))


def fake_policy(
    shape: Shape,
    quantization: str,
    lora_rank: int | None = None,
    layers: int | None = None,
    device: str = "cuda",
    **engine_options,
) -> Policy:
    """A Qwen2 of this shape in bf16, its layers in 4 bits or not, with fp32 LoRA or without; inside of `fake_cuda()`.

    layers: fewer than the shape has. device "cpu": for a backward pass, which PyTorch refuses on a pretended device.
    """
    shape = dataclasses.replace(shape, layers=layers or shape.layers)
    with _disable_current_modes():
        model = _on_meta(shape, quantization)
        info = {"quantization": quantization, "lora": None}
        if lora_rank:
            model, info["lora"] = _new_lora(model, LoraSettings(lora_rank, 2.0 * lora_rank), "fake", 0)
        tokenizer = _tokenizer()
    _materialize(model, torch.device(device))
    options = dict(attn="sdpa", rollout_weights="stored", cache_bytes=1 << 32, pages=10_000) | engine_options
    return Policy(model.eval(), tokenizer, info, set(), **options)


def _on_meta(shape: Shape, quantization: str):
    """The modules, without tensors; what `from_pretrained` makes first, too."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
        for layer in model.model.layers if quantization == "nf4" else ():
            for parent in (layer.self_attn, layer.mlp):
                for name, linear in list(parent.named_children()):
                    if type(linear) is nn.Linear:
                        setattr(
                            parent,
                            name,
                            Linear4bit(
                                linear.in_features,
                                linear.out_features,
                                linear.bias is not None,
                                torch.bfloat16,
                                compress_statistics=True,
                                quant_type="nf4",
                            ),
                        )
    model.is_loaded_in_4bit = quantization == "nf4"  # peft asks for it
    _settle(model)
    return model


def _materialize(model, device: torch.device) -> None:
    """Fake tensors on the device in place of those without one; what is shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                four_bit = key == "weight" and isinstance(module, Linear4bit)
                dtype = torch.float32 if ".lora_" in f"{name}.{key}" else torch.bfloat16
                made[id(old)] = (
                    _four_bit(module, device)
                    if four_bit
                    else nn.Parameter(
                        torch.empty(old.shape, dtype=dtype, device=device), requires_grad=old.requires_grad
                    )
                )
            setattr(module, key, made[id(old)])
        for key, old in list(module.named_buffers(recurse=False)):
            setattr(module, key, torch.empty(old.shape, dtype=old.dtype, device=device))


def _four_bit(linear: Linear4bit, device: torch.device) -> nn.Parameter:
    """What bitsandbytes keeps of a matrix: half a byte a weight, and scales that are quantized themselves."""
    shape = torch.Size((linear.out_features, linear.in_features))
    blocks = shape.numel() // BLOCK
    scales = QuantState(
        torch.empty(-(-blocks // NESTED), device=device),
        code=torch.empty(256, device=device),
        blocksize=NESTED,
        dtype=torch.float32,
    )
    weight = nn.Parameter(torch.empty(shape.numel() // 2, 1, dtype=torch.uint8, device=device), requires_grad=False)
    weight.quant_state = QuantState(
        torch.empty(blocks, dtype=torch.uint8, device=device),
        shape,
        torch.empty(16, device=device),
        BLOCK,
        "nf4",
        torch.bfloat16,
        torch.empty((), device=device),
        scales,
    )
    linear.quant_state, linear.compute_type_is_set = weight.quant_state, True
    return weight

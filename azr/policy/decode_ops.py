"""What lies between the matrix products of a decoder layer, in place where that is safe: norms, rotary, SwiGLU.

    ops = operations(device, dtype)         # this module on a CPU, azr/policy/decode_triton.py on a GPU that can run it
    y = ops.add_rms_norm(x, delta, weight, eps)

Both round where transformers rounds, so that sampler and trainer differ in nothing but the order of sums: a norm rounds
before it is scaled by its weight, both products of a rotation before they are added, silu before it is multiplied. A
GPU spends more time on launching these small operations one by one than on reading the weights; there each is one
kernel, in decode_triton.py.
"""

import sys

import torch
import torch.nn.functional as F

from ..console import warn
from ..isolated import one_line

NAME = "eager"  # how measurements call these functions, beside those of decode_triton.py
# Largest difference at which a kernel counts as right: one rounding of a value near 1, where two orders of a sum fall
# on two sides of a rounding bound.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., size) over its root mean square, times weight (size,); a new tensor in the dtype of weight.

    RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), rounded as transformers' Qwen2RMSNorm rounds.
    """
    if x.dtype == weight.dtype == torch.float32:
        return torch.rms_norm(x, weight.shape, weight, eps)  # the same operations, called from C++
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True).add_(eps))
    # First to the dtype of x, then scaled: transformers does it in this order, and the other one rounds elsewhere.
    return (weight * y.to(x.dtype)).to(weight.dtype)


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (tokens, size), fp32 or the dtype of the others, += delta; returns the norm of the sum."""
    return rms_norm(x.add_(delta), weight, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both (tokens, size), rows of any stride; a new tensor (SwiGLU: Shazeer 2020, 2002.05202)."""
    return F.silu(gate).mul_(up)


def rotate_store(q, k, v, cos, sin, cache, page, offset) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions of q (tokens, heads, dim) and k (tokens, kv_heads, dim); k and v go into the cache; q and k.

    RoPE (Su et al. 2021, arXiv 2104.09864) in the half-split layout of Llama and Qwen, not the interleaved one.
    cos, sin (tokens, 1, dim), the first half of sin with its sign changed; cache (2, pages, page_size, kv_heads, dim):
    keys and values of one layer; page, offset (tokens,) int64: where each token lies. q and k may be overwritten.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    whole = _side_by_side(q, k, v)
    # Together, since both turn by the same angles, and in place: half the launches of small operations.
    turning = whole[:, : heads + kv_heads]
    turned = turning.roll(turning.shape[-1] // 2, -1)  # the halves change places; the minus sign is in sin
    if whole.dtype == torch.float32:
        turning.mul_(cos).addcmul_(turned, sin)
    else:
        # Not addcmul_: it keeps the second product in fp32, where transformers rounds both products before it adds.
        turning.mul_(cos).add_(turned.mul_(sin))
    cache[:, page, offset] = whole[:, heads:].view(len(whole), 2, kv_heads, -1).transpose(0, 1)
    return whole[:, :heads], whole[:, heads : heads + kv_heads]


def _side_by_side(*parts: torch.Tensor) -> torch.Tensor:
    """The parts (tokens, n, dim) as one tensor (tokens, sum of n, dim): the very memory if they lie so, else a copy."""
    first, heads = parts[0], sum(part.shape[1] for part in parts)
    address = first.data_ptr()
    # A row as wide as all parts: they are slices of one tensor, and not allocations that happen to touch.
    beside = first.stride(0) >= heads * first.shape[2]
    for part in parts:
        beside = beside and part.data_ptr() == address and part.stride() == first.stride()
        address += part.shape[1] * part.shape[2] * part.element_size()
    return first.as_strided((first.shape[0], heads, first.shape[2]), first.stride()) if beside else torch.cat(parts, 1)


def operations(device: torch.device, dtype: torch.dtype):
    """The module whose functions a decoder on this device calls: decode_triton.py where it works, else this one.

    On a GPU where it does not work, a line on stderr says why.
    """
    here = sys.modules[__name__]
    if device.type != "cuda":
        return here
    try:
        from . import decode_triton

        # Tried out, not asked for: an installed Triton may lack a compiler, or miscompile for a card it does not know.
        worst = largest_difference(here, decode_triton, device, dtype)
        why = None if worst <= TOLERANCE[dtype] else f"a kernel is off by {worst:.1e}"
    except Exception as error:  # no Triton, no compiler, a card it does not know: errors of many types
        why = one_line(error)
    if why is None:
        return decode_triton
    warn(f"the fused kernels of a decode step cannot be used ({why}): sampling takes torch's operations, slower")
    return here


def largest_difference(one, other, device: torch.device, dtype: torch.dtype) -> float:
    """Of the results of every operation of two such modules on small random tensors, relative above 1."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, delta, weight = random(3, 96), random(3, 96), random(96)
    q, k, v, cos, sin = random(3, 4, 16), random(3, 2, 16), random(3, 2, 16), random(3, 1, 16), random(3, 1, 16)
    page, offset = (torch.tensor(i, device=device) for i in ([1, 0, 2], [3, 0, 1]))

    def results(ops) -> list[torch.Tensor]:
        total, cache = x.clone(), torch.zeros(2, 3, 4, 2, 16, dtype=dtype, device=device)
        out = [ops.rms_norm(x, weight, 1e-6), ops.add_rms_norm(total, delta, weight, 1e-6), total]
        out += [ops.add_rms_norm(x.float().clone(), delta, weight, 1e-6)]  # fp32 residual
        out += [ops.silu_mul(x, delta), *ops.rotate_store(q.clone(), k.clone(), v, cos, sin, cache, page, offset)]
        return [*out, cache]

    pairs = zip(results(one), results(other))
    return max(((a.float() - b.float()).abs() / b.float().abs().clamp(min=1)).max().item() for a, b in pairs)

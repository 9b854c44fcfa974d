"""A candidate: an adapted linear layer as one autograd function, beside PEFT's chain of casts, products and sums.

    with fused(policy.model): loss.backward()

Masters, their gradients and so AdamW stay fp32; the products are in the dtype of computation. Forward: y = x W^T + b,
then low = x A^T and y += low (s B)^T in place. Backward: nothing but x and low is kept; W is dequantized again.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b with an fp32 result."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def matrix(base, dtype) -> torch.Tensor:
    """(out, in) of a linear layer, dequantized if it is stored in 4 bits."""
    if getattr(base.weight, "quant_state", None) is None:
        return base.weight
    from azr.decoder import dequantized

    return dequantized(base, dtype)


class FusedLoRA(torch.autograd.Function):
    """apply(x (..., in), base layer, A (r, in) fp32, B (out, r) fp32, scaling) -> (..., out)."""

    @staticmethod
    def forward(ctx, x, base, A, B, scaling):
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, matrix(base, x.dtype), base.bias)
        low = flat @ A.to(x.dtype).t()
        y.addmm_(low, B.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, low, A, B)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        flat, low, A, B = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad @ B.to(grad.dtype)).mul_(ctx.scaling)
        grad_A = product(grad_low.t(), flat) if ctx.needs_input_grad[2] else None
        grad_B = product(grad.t(), low).mul_(ctx.scaling) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ matrix(ctx.base, grad.dtype)).addmm_(grad_low, A.to(grad.dtype)).view(ctx.shape)
        return grad_x, None, grad_A, grad_B, None


@contextmanager
def fused(model):
    """Every module with a plain LoRA computes by `FusedLoRA` inside; yields how many there are."""
    changed = []
    for module in model.modules():
        if not hasattr(module, "lora_A") or not hasattr(module, "get_base_layer"):
            continue
        names = [name for name in module.active_adapters if name in module.lora_A]
        if len(names) == 1:
            module.forward = forward_of(module, names[0])
            changed.append(module)
    try:
        yield len(changed)
    finally:
        for module in changed:
            del module.forward


def forward_of(module, name: str):
    base, A, B = module.get_base_layer(), module.lora_A[name], module.lora_B[name]
    return lambda x: FusedLoRA.apply(x, base, A.weight, B.weight, module.scaling[name])

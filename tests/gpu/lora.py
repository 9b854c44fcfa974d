"""PEFT's chain of casts, products and sums in place of azr/policy/lora.py, and one adapted layer against float64."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from azr.policy.lora import active_adapters, dequantized


@contextmanager
def by_peft(model):
    """Inside, adapted layers compute by PEFT's own forward; yields how many there are."""
    changed = [(m, type(m)) for m in model.modules() if type(m).__name__.startswith("Fused") and hasattr(m, "lora_A")]
    for module, kind in changed:
        module.__class__ = kind.__mro__[2]
    try:
        yield len(changed)
    finally:
        for module, kind in changed:
            module.__class__ = kind


def matrix(base, dtype) -> torch.Tensor:
    """(out, in) of a linear layer, dequantized if it is stored in 4 bits."""
    return base.weight.to(dtype) if getattr(base.weight, "quant_state", None) is None else dequantized(base, dtype)


def errors(module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, float]:
    """Relative errors against float64 of an adapted layer: y, dx, dA, dB, for x (tokens, in), dL/dy (tokens, out)."""
    [name] = active_adapters(module)
    A, B, base = module.lora_A[name].weight, module.lora_B[name].weight, module.get_base_layer()
    x = x.detach().requires_grad_()
    y = module(x)
    got = (y, *torch.autograd.grad(y, (x, A, B), grad))
    a, b, W = A.double(), B.double(), matrix(base, torch.float32).double()
    wide, g, s = x.detach().double(), grad.double(), module.scaling[name]
    bias = 0 if base.bias is None else base.bias.double()
    exact = (
        wide @ W.t() + bias + s * (wide @ a.t()) @ b.t(),
        g @ W + s * (g @ b) @ a,
        s * (g @ b).t() @ wide,
        s * g.t() @ (wide @ a.t()),
    )
    return {
        part: ((one.double() - other).norm() / other.norm()).item()
        for part, one, other in zip(("y", "dx", "dA", "dB"), got, exact)
    }

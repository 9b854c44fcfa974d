"""A linear layer with LoRA as one autograd function: y = x W^T + b + s (x A^T) B^T, W frozen, in 4 bits or not.

    fuse(model)             # every plain LoRA layer of a PEFT model computes like this from now on
    LoraLinear.apply(x, A, B, base, scaling)

PEFT computes it as a chain of seven operations on fp32 copies of the input, which is half of all the memory traffic of
an update; on a 4-bit base it also rounds the LoRA product before it is added. Here the products run in the dtype of x,
from copies of A and B that are made in the call, and are added inside the base's result (one rounding). The masters,
their gradients and so AdamW stay fp32. Sampling does the same products (decoder.py), so that both round alike.

Kept for the backward pass: x and x A^T, both in the dtype of x. W is dequantized again there. In fp32 the result is
PEFT's to rounding. Left out: DoRA, LoRA biases and dropout, several adapters at once (PEFT's own forward does them).
"""

import torch
import torch.nn.functional as F


def dequantized(linear, dtype) -> torch.Tensor:
    """(out, in): the very matrix that a 4-bit layer multiplies with."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype).view(linear.out_features, -1)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (m, k) times b (k, n), the result in fp32: a CPU has no such product of half-precision matrices."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class LoraLinear(torch.autograd.Function):
    """apply(x (..., in), A (r, in) fp32, B (out, r) fp32, base layer, scaling) -> (..., out) in the dtype of x.

    With g = dL/dy and u = s g B:  dL/dx = g W + u A,  dL/dA = u^T x,  dL/dB = s g^T (x A^T).
    """

    @staticmethod
    def forward(ctx, x, A, B, base, scaling):
        """y (..., out), as above."""
        y = base(x)
        flat = x.reshape(-1, x.shape[-1])
        low = F.linear(flat, A.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(low, B.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, low, A, B)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The gradients for x, in the dtype of `grad`, and for A and B, in fp32; None where none is needed."""
        x, low, A, B = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad @ B.to(grad.dtype)).mul_(ctx.scaling)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            quantized = getattr(ctx.base.weight, "quant_state", None) is not None
            weight = dequantized(ctx.base, grad.dtype) if quantized else ctx.base.weight
            grad_x = (grad @ weight).addmm_(grad_low, A.to(grad.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_A = product(grad_low.t(), x)
        if ctx.needs_input_grad[2]:
            grad_B = product(grad.t(), low).mul_(ctx.scaling)
        return grad_x, grad_A, grad_B, None, None


def active_adapters(module) -> list[str]:
    """Names of the LoRA adapters that PEFT would apply in this layer now; empty: none, or switched off."""
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def is_plain(module, name: str) -> bool:
    """Whether this adapter of a layer is LoRA and nothing else: no DoRA, no bias, no dropout."""
    variant, dropout = module.lora_variant.get(name), module.lora_dropout[name]
    return variant is None and module.lora_B[name].bias is None and not getattr(dropout, "p", 0.0)


class _Fused:
    """In front of a LoRA layer's class: its forward, where it is plain LoRA, is `LoraLinear`."""

    def forward(self, x, *arguments, **options):
        """The layer's result: of `LoraLinear` for one plain adapter, else of PEFT's own forward."""
        names = active_adapters(self)
        if arguments or options or len(names) != 1 or not is_plain(self, names[0]):
            return super().forward(x, *arguments, **options)
        A, B = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        return LoraLinear.apply(x, A, B, self.get_base_layer(), self.scaling[names[0]])


def fuse(model) -> None:
    """Gives every adapted linear layer of a PEFT model the forward above.

    Its class changes, not its attributes: a function stored in the layer would refer to the layer, and the model would
    outlive its last user until Python looks for circles.
    """
    classes: dict[type, type] = {}
    for module in model.modules():
        if not hasattr(module, "lora_A") or isinstance(module, _Fused):
            continue
        base = module.get_base_layer()
        if isinstance(base, torch.nn.Linear):  # bitsandbytes' 4-bit layer is one
            kind = type(module)
            classes.setdefault(kind, type(f"Fused{kind.__name__}", (_Fused, kind), {}))
            module.__class__ = classes[kind]

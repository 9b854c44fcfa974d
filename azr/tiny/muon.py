"""Muon (Jordan et al. 2024): momentum, then the nearest orthogonal matrix as the update of a weight matrix.

    optimizer = Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)

torch.optim.Muon does its Newton-Schulz iterations in bfloat16, which a CPU without instructions for it emulates: 0.8 s
a step for the embedded model, more than its gradient takes. This one computes in the parameters' dtype, matrices of one
shape together: 0.06 s. Left out: everything that a single small model does not need.
"""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: the singular values end near 1, not at 1
ITERATIONS = 5


@torch.no_grad()
def orthogonalized(stack: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> each matrix with all its singular values near 1."""
    turned = stack.shape[1] > stack.shape[2]
    x = stack.transpose(1, 2) if turned else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if turned else x


class Muon(torch.optim.Optimizer):
    """For matrices only. The update is scaled by sqrt(max(1, rows / columns)); weight decay is decoupled."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Updates every matrix by its gradient; those of equal shape together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                for p in parameters:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                looked_ahead = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in parameters]
                updates = orthogonalized(torch.stack(looked_ahead)) * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(parameters, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

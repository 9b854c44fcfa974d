"""Dynamic loss scaling: what fp16 needs so that small gradients are not lost on their way to the adapter.

    scale = LossScale.of("float16")
    while True:
        scale.backward(loss)                          # each micro-batch
        scale.unscale(parameters)                     # before the gradient's norm is taken
        skipped = not step_if_finite()
        if not scale.again(loss, skipped):            # True: it overflowed; now half as large, the step is repeated
            break

fp16 holds 6e-8 to 65,504. A token's share of the loss is about 1 / (tokens of the step), 1e-6 or less, and so is the
gradient of its activations: without a scale most of it becomes 0. The loss is multiplied by a power of two, the fp32
gradients of the LoRA matrices are divided by it, which is exact. A gradient that overflows halves the scale and costs a
repetition, not the samples; GROW_AFTER good steps double it (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).
In bf16 and fp32, whose exponents have 8 bits, the scale is 1 and nothing is computed differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from azr.console import warn

FIRST = 2.0**16  # GradScaler's; too high costs one repetition a factor of two, once
MOST = 2.0**24  # a token of weight 1e-9 is a normal number of fp16 by then
GROW_AFTER = 100  # good optimizer steps: at the ceiling one step in a hundred is computed twice


@dataclass
class LossScale:
    """The scale, and the state that belongs to a checkpoint: `dataclasses.asdict` gives it, `LossScale(**it)` reads."""

    active: bool = False
    value: float = 1.0
    good: int = 0  # steps since the last change
    overflows: int = 0  # of the run so far
    refused: int = 0  # halvings within the step that is being repeated

    @classmethod
    def of(cls, dtype: str) -> LossScale:
        """For the dtype of computation, by torch's name."""
        return cls(True, FIRST) if dtype == "float16" else cls()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of loss x scale to the parameters."""
        (loss * self.value if self.active else loss).backward()

    def unscale(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divides the gradients in place by the scale; parameters without a gradient are left alone."""
        if self.active:
            for gradient in (p.grad for p in parameters if p.grad is not None):
                gradient.mul_(1 / self.value)

    def again(self, loss: float, skipped: bool) -> bool:
        """After an attempt with this loss: whether to repeat it, at half the scale, since its gradient overflowed.

        Not if the loss is no number itself, which no scale changes, nor below 1: then the scale is what it was before
        the step, and the step is skipped.
        """
        if not self.active:
            return False
        if skipped and math.isfinite(loss) and self.value > 1:
            if not self.overflows:
                text = (
                    f"the gradient overflowed fp16 at a loss scale of {self.value:.0f}; halved, and the step repeated"
                )
                warn(f"{text}; from now on only train/overflows counts it")
            self.value, self.good = self.value / 2, 0
            self.overflows, self.refused = self.overflows + 1, self.refused + 1
            return True
        if skipped:
            self.value, self.overflows = self.value * 2**self.refused, self.overflows - self.refused
        else:
            self.good += 1
            if self.good == GROW_AFTER and self.value < MOST:
                self.value, self.good = 2 * self.value, 0
        self.refused = 0
        return False

"""When bitsandbytes multiplies 4-bit weights in one kernel, and when it unpacks them first: its own rule, per card.

The rule is a function of the module that talks to its CUDA library, which cannot be imported without a GPU. So the
function alone is taken out of that file's source.
"""

import ast
import functools
from pathlib import Path

import torch

# (multiprocessors, compute capability), names as in azr/machine/cost.py: what the rule looks at
CARDS = {"3090": (82, 8, 6), "4090": (128, 8, 9), "a100": (108, 8, 0), "h100": (132, 9, 0)}
LARGEST = 1536  # rows above which weights are always unpacked
UNPACKED = 4  # launches: scales, their offset, weights, product


class RuleNotFound(RuntimeError):
    """Another bitsandbytes than the one this was written for."""


@functools.cache
def _rule():
    import bitsandbytes

    file = Path(bitsandbytes.__file__).with_name("backends") / "cuda" / "ops.py"
    wanted = {"_gemm_4bit_use_custom_cuda", "_GEMM_4BIT_CUSTOM_FLOOR_M"}
    parts = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names = {getattr(node, "name", "")} | {getattr(t, "id", "") for t in getattr(node, "targets", [])}
        if wanted & names:
            wanted -= names
            parts.append(node)
    if wanted:
        raise RuleNotFound(f"bitsandbytes {bitsandbytes.__version__} has no {', '.join(sorted(wanted))} in {file.name}")
    for node in parts:
        node.decorator_list = []  # a cache that forgets which card it was asked about
    return compile(ast.Module(parts, []), str(file), "exec")


@functools.cache
def launches(card: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> int:
    """Kernels of (rows, inputs) times a 4-bit matrix (outputs, inputs) with scales that are quantized themselves.

    RuleNotFound: bitsandbytes has no such rule where it was.
    """
    if rows > LARGEST:
        return UNPACKED
    names = {"torch": torch, "_gpu_dispatch_props": lambda index: CARDS[card]}
    exec(_rule(), names)
    return 1 if names["_gemm_4bit_use_custom_cuda"](0, dtype, rows, outputs, inputs) else UNPACKED

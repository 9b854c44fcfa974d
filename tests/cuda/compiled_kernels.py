"""The Triton kernels compiled to machine code for GPUs that are not here, and what the machine code needs.

    report = compile_for(90, QWEN25["3B"])["splits"]
    report.registers, report.shared, report.spilled

Only Triton is needed: its package carries NVIDIA's assembler and the tool that reads what it made.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from azr.machine.plan import Shape
from azr.policy import decode_triton, triton_attention

PAGE = 64
# compute capability -> KiB of shared memory a program at most, and of a multiprocessor; warps and programs that one
# holds at most (CUDA's table of technical specifications)
LIMITS = {
    80: (163, 164, 64, 32),
    86: (99, 100, 48, 16),
    89: (99, 100, 48, 24),
    90: (227, 228, 64, 32),
    120: (99, 100, 48, 24),
}
CARDS = {80: "A100", 86: "3090, A10", 89: "4090, L4", 90: "H100", 120: "5090"}
REGISTERS, RESERVED = 65_536, 1 << 10  # of a multiprocessor; of shared memory a program, taken by the system
# every other argument is a stride, or a pointer to bf16; x of a norm is the residual stream
TYPES = {
    "*fp32": ("partial", "log_sum", "x"),
    "*i32": ("block_table", "lengths"),
    "*i64": ("page", "offset"),
    "fp32": ("scale", "eps"),
    "i32": ("splits", "size"),
}


@dataclass(frozen=True)
class Report:
    """registers a thread; shared bytes a program, as Triton reserves them; spilled: bytes of local memory a thread;
    tensor_cores: whether matrix instructions are used."""

    registers: int
    shared: int
    spilled: int
    warps: int
    tensor_cores: bool

    def programs(self, capability: int) -> int:
        """How many fit on a multiprocessor; registers are given out in eights."""
        _, shared, warps, programs = LIMITS[capability]
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(by_registers, (shared << 10) // (self.shared + RESERVED), warps // self.warps, programs)


def compile_for(capability: int, shape: Shape) -> dict[str, Report]:
    """All kernels of a decode step by name, with the sizes and options that their callers give."""
    group, dim, power = shape.heads // shape.kv_heads, shape.head_dim, triton.next_power_of_2
    attention = dict(
        HEADS=shape.heads,
        GROUP=group,
        ROWS=max(16, power(group)),
        DIM=dim,
        COLUMNS=max(16, power(dim)),
        PAGE=PAGE,
        SPLIT=triton_attention.SPLIT,
        BLOCK=triton_attention.BLOCK,
        TOGETHER=triton_attention.TOGETHER,
    )
    rotary, columns = dict(HEADS=shape.heads, DIM=dim, BLOCK=power(dim // 2)), power(shape.hidden)
    return {
        "splits": _compile(triton_attention._split_kernel, attention, capability, num_warps=4, num_stages=2),
        "combined": _compile(triton_attention._combine_kernel, attention, capability, num_warps=2),
        "norm": _compile(
            decode_triton._norm_kernel,
            dict(ADD=True, BLOCK=columns),
            capability,
            num_warps=max(1, min(8, columns // 256)),
        ),
        "SwiGLU": _compile(decode_triton._silu_mul_kernel, dict(BLOCK=decode_triton.COLUMNS), capability, num_warps=4),
        "rotary": _compile(decode_triton._rotate_store_kernel, rotary, capability, num_warps=1),
    }


def _compile(kernel, sizes: dict, capability: int, **options) -> Report:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else _type(name) for name in names}
    constants = {(i,): sizes[name] for i, name in enumerate(names) if name in sizes}
    # what the launcher finds out about its arguments: addresses, and strides of rows of 64 bf16 and more
    aligned = [i for i, name in enumerate(names) if name.endswith(("stride", "size")) or signature[name][0] == "*"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = _resources(compiled.asm["cubin"])
    return Report(
        used["REG"],
        compiled.metadata.shared,
        used["LOCAL"] + used["STACK"],
        options["num_warps"],
        "mma.sync" in compiled.asm["ptx"] or "wgmma" in compiled.asm["ptx"],
    )


def _type(name: str) -> str:
    if name.endswith("stride"):
        return "i32"
    return next((kind for kind, names in TYPES.items() if name in names), "*bf16")


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of the one kernel in it, as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", shown.stdout)}

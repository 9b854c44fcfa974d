"""The Triton kernels compiled to machine code for GPUs that are not here, and what the machine code needs.

    report = compile_for(90, heads=16, kv_heads=2, head_dim=128)["splits"]
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

from azr import paged_triton as kernels

PAGE = 64
# compute capability -> bytes of shared memory: of a program at most, of a multiprocessor (CUDA's table of them)
SHARED = {80: (163 << 10, 164 << 10), 86: (99 << 10, 100 << 10), 89: (99 << 10, 100 << 10),
          90: (227 << 10, 228 << 10), 120: (99 << 10, 100 << 10)}  # fmt: skip
CARDS = {80: "A100", 86: "3090, A10", 89: "4090, L4", 90: "H100", 120: "5090"}
REGISTERS, RESERVED = 65_536, 1 << 10  # of a multiprocessor; of shared memory a program, taken by the system
POINTERS = dict(q="*bf16", k_pages="*bf16", v_pages="*bf16", out="*bf16", partial="*fp32", log_sum="*fp32",
                block_table="*i32", lengths="*i32", scale="fp32")  # fmt: skip


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
        """How many fit on a multiprocessor by registers (given out in eights) and shared memory."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(by_registers, SHARED[capability][1] // (self.shared + RESERVED))


def compile_for(capability: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Report]:
    """"splits" and "combined", with the options that paged_triton.decode gives."""
    group = heads // kv_heads
    sizes = dict(HEADS=heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=head_dim,
                 COLUMNS=max(16, triton.next_power_of_2(head_dim)), PAGE=PAGE, SPLIT=kernels.SPLIT,
                 BLOCK=kernels.BLOCK, TOGETHER=kernels.TOGETHER)  # fmt: skip
    split = _compile(kernels._split_kernel, sizes, capability, num_warps=4, num_stages=2)
    return {"splits": split, "combined": _compile(kernels._combine_kernel, sizes, capability, num_warps=2)}


def _compile(kernel, sizes: dict, capability: int, **options) -> Report:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else POINTERS.get(name, "i32") for name in names}
    constants = {(i,): sizes[name] for i, name in enumerate(names) if name in sizes}
    # what the launcher finds out about its arguments: addresses, and strides of rows of 64 bf16 and more
    aligned = [i for i, name in enumerate(names) if name.endswith("stride") or signature[name].startswith("*")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    used = _resources(compiled.asm["cubin"])
    return Report(used["REG"], compiled.metadata.shared, used["LOCAL"] + used["STACK"], options["num_warps"],
                  "mma.sync" in compiled.asm["ptx"] or "wgmma" in compiled.asm["ptx"])  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of the one kernel in it, as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", shown.stdout)}

"""Part hardware: what is here, whether bitsandbytes works, and the ceilings that everything else is compared with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import torch

from gpu.bench import Bench

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "flash_attn", "accelerate", "safetensors")


def hardware(bench: Bench) -> None:
    bench.measure("versions", lambda: versions(bench), 6, "versions")
    bench.measure("bitsandbytes", lambda: bitsandbytes_works(bench), 6, "bitsandbytes")
    bench.measure("copy", lambda: copy(bench), 3, "ceilings")
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        bench.measure(f"matmul {name}", lambda: matmul(bench, dtype, tf32), 2, "ceilings")


def versions(bench: Bench) -> dict:
    found = {"python": platform.python_version(), "cpu": f"{platform.machine()}", "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    if bench.cpu:
        return {**found, "card": "CPU DRY RUN, no figure here is of a GPU"}
    card, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    found |= {
        "card": card.name,
        "total GB": total / 1e9,
        "free GB": free / 1e9,
        "cuda": torch.version.cuda,
        "capability": f"{card.major}.{card.minor}",
        "SMs": card.multi_processor_count,
        "L2 MB": getattr(card, "L2_cache_size", 0) / 1e6,
    }
    try:
        fields = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
        found["driver, max clocks, power"] = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        found["driver, max clocks, power"] = f"unknown ({error})"
    return found


def bitsandbytes_works(bench: Bench) -> dict:
    """One product in 4 bits against the dequantized matrix."""
    import bitsandbytes as bnb

    from azr.policy.decoder import dequantized

    dtype = torch.float32 if bench.cpu else torch.bfloat16
    layer = bnb.nn.Linear4bit(256, 512, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    layer = layer.to(dtype).to(bench.device)
    x = torch.randn(4, 256, device=bench.device, dtype=dtype)
    with torch.no_grad():
        expected = x.double() @ dequantized(layer, torch.float32).double().t()
        error = ((layer(x).double() - expected).norm() / expected.norm()).item()
    return {"version": bnb.__version__, "relative error": error, "ok": error < 0.02}


def copy(bench: Bench) -> dict:
    """Bytes/s, read and written, of copying 1 GiB."""
    source = torch.ones(1 << (20 if bench.cpu else 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.time(lambda: target.copy_(source), 20)
    bench.bandwidth = 2 * source.numel() / seconds
    return {"GB/s": bench.bandwidth / 1e9}


def bandwidth(bench: Bench) -> float:
    """As measured by the part, or now."""
    if bench.bandwidth is None:
        earlier = bench.done.get(("hardware", "copy"))
        if earlier and earlier["figures"]:
            bench.bandwidth = earlier["figures"]["GB/s"] * 1e9
        else:
            copy(bench)
    return bench.bandwidth


def matmul(bench: Bench, dtype, tf32: bool) -> dict:
    size = 256 if bench.cpu else (4096 if dtype == torch.float32 else 8192)
    a, b = torch.randn(2, size, size, device=bench.device, dtype=dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        seconds = bench.time(lambda: a @ b, 10, 3)
    finally:
        torch.set_float32_matmul_precision(before)
    return {"TFLOP/s": 2 * size**3 / seconds / 1e12, "size": size}

"""Part micro: the pieces of a decode step alone, on the weights of different layers in turn."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from azr.policy.attention import PAGE_SIZE, paged_decode, unusable
from gpu.bench import Bench
from gpu.lora import matrix
from gpu.parts_correct import paged
from gpu.parts_hardware import bandwidth

ROWS = (8, 16, 32, 48, 64, 128, 192, 384)
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def micro(bench: Bench) -> None:
    for name in MATRICES:
        bench.measure(f"NF4 against bf16, {name.split('.')[1]}", lambda: products(bench, name), 5, "products")
    bench.measure("LoRA products of a layer", lambda: lora(bench), 6, "LoRA products")
    bench.measure("RMSNorm", lambda: norms(bench), 3, "RMSNorm")
    for backend in ("triton", "flash", "sdpa"):
        bench.measure(f"attention {backend}", lambda: attention(bench, backend), 6, "attention of a decode step")


def rows_of(bench: Bench) -> tuple:
    return (2,) if bench.cpu else ROWS


def dtype_of(bench: Bench):
    return torch.float32 if bench.cpu else torch.bfloat16


def products(bench: Bench, name: str) -> dict:
    policy, each = bench.policy("nf4"), []
    modules = [layer.get_submodule(name) for layer in policy.backbone.layers]
    bases = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in modules]
    copies = [matrix(base, dtype_of(bench)) for base in bases]
    size, at = copies[0].shape, bandwidth(bench)
    with torch.no_grad():
        for rows in rows_of(bench):
            x = torch.randn(rows, size[1], device=bench.device, dtype=dtype_of(bench))
            packed, how = bench.time_each([lambda base=base: base(x) for base in bases])
            plain, _ = bench.time_each([lambda w=w: F.linear(x, w) for w in copies])
            each.append(
                {
                    "matrix": f"{size[1]} -> {size[0]}",
                    "rows": rows,
                    "NF4 us": 1e6 * packed,
                    "bf16 us": 1e6 * plain,
                    "bf16 % of copy": 100 * copies[0].numel() * 2 / at / plain,
                    "timed": how,
                }
            )
    return {"each": each}


def lora(bench: Bench) -> dict:
    """All fourteen small products of a layer: fp32 as PEFT has them, the same in TF32, bf16 into the base product."""
    shape, device, dtype, rank = bench.shape("3B"), bench.device, dtype_of(bench), 32
    groups = {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
    layers = []
    for _ in range(min(shape.layers, 36)):
        layers.append(
            [
                (
                    torch.randn(rank * len(names), shape.linears[names[0]][0], device=device) * 0.02,
                    [torch.randn(shape.linears[n][1], rank, device=device) * 0.02 for n in names],
                )
                for names in groups.values()
            ]
        )
    halves = [[(A.to(dtype), [(2 * B).to(dtype) for B in Bs]) for A, Bs in layer] for layer in layers]
    each = []
    for rows in rows_of(bench):
        xs = [torch.randn(rows, A.shape[1], device=device).to(dtype) for A, _ in layers[0]]
        outs = [[torch.randn(rows, B.shape[0], device=device).to(dtype) for B in Bs] for _, Bs in layers[0]]

        def as_now(layer):
            for x, out, (A, Bs) in zip(xs, outs, layer):
                low = F.linear(x.float(), A)
                for i, B in enumerate(Bs):
                    out[i].add_(low[:, rank * i : rank * (i + 1)] @ B.t(), alpha=2.0)

        def in_half(layer):
            for x, out, (A, Bs) in zip(xs, outs, layer):
                low = F.linear(x, A)
                for i, B in enumerate(Bs):
                    out[i].addmm_(low[:, rank * i : rank * (i + 1)], B.t())

        row = {"rows": rows}
        before = torch.get_float32_matmul_precision()
        for name, precision in (("fp32 us", "highest"), ("TF32 us", "high")):
            torch.set_float32_matmul_precision(precision)
            try:
                row[name] = 1e6 * bench.time_each([lambda layer=layer: as_now(layer) for layer in layers])[0]
            finally:
                torch.set_float32_matmul_precision(before)
        seconds, row["timed"] = bench.time_each([lambda layer=layer: in_half(layer) for layer in halves])
        each.append({**row, "bf16 us": 1e6 * seconds})
    return {"each": each}


def norms(bench: Bench) -> dict:
    """The decoder's norm (with the sum before it), the same in torch's operations, and torch's own, which rounds once
    less than transformers."""
    from azr.policy import decode_ops

    policy, base = bench.any_policy()
    modules, each = [layer.input_layernorm for layer in policy.backbone.layers], []
    ours = policy.engine.decoder.ops
    for rows in rows_of(bench):
        x, delta = torch.randn(2, rows, policy.base.config.hidden_size, device=bench.device).to(dtype_of(bench))
        row = {"rows": rows, "operations": ours.NAME}
        for name, ops in (("decoder's us", ours), ("torch's operations us", decode_ops)):
            calls = [lambda n=n, ops=ops: ops.add_rms_norm(x, delta, n.weight, n.variance_epsilon) for n in modules]
            row[name] = 1e6 * bench.time_each(calls)[0]
        calls = [lambda n=n: F.rms_norm(x.add_(delta), n.weight.shape, n.weight, n.variance_epsilon) for n in modules]
        each.append({**row, "F.rms_norm us": 1e6 * bench.time_each(calls)[0]})
    return {"base": base, "each": each}


def attention(bench: Bench, backend: str) -> dict:
    """GB/s of keys and values, at the 3B's heads; what is read in turn is larger than the L2 cache."""
    shape, dtype = bench.shape("3B"), dtype_of(bench)
    heads, kv_heads, dim, page = shape.heads, shape.kv_heads, shape.head_dim, PAGE_SIZE[backend]
    if reason := unusable(backend, torch.device(bench.device), dtype, heads, kv_heads, dim):
        return {"cannot run": reason, "ok": backend == "flash" or bench.cpu}
    each = []
    cases = [(2, 40)] if bench.cpu else [(r, c) for c in (600, 2500) for r in (1, 16, 64, 128, 384) if r * c < 4e5]
    for rows, context in cases:
        one = rows * context * 2 * kv_heads * dim * dtype.itemsize
        turns = 1 if bench.cpu else max(1, min(12, int(3e8 // one)))
        q, k, v, table, lengths, scale = paged(bench, [context] * rows * turns, heads, kv_heads, dim, page, dtype)
        k.nan_to_num_(0), v.nan_to_num_(0)
        parts = [slice(i * rows, (i + 1) * rows) for i in range(turns)]
        calls = [lambda s=s: paged_decode(backend, q[s], k, v, table[s], lengths[s], scale) for s in parts]
        seconds, how = bench.time_each(calls)
        speed = one / seconds
        each.append(
            {
                "backend": backend,
                "rows": rows,
                "context": context,
                "us": 1e6 * seconds,
                "GB/s": speed / 1e9,
                "% of copy": 100 * speed / bandwidth(bench),
                "timed": how,
            }
        )
    return {"each": each}

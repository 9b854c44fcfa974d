"""What torch and the packages around it really compute here: the GPU, attention, 4-bit matrices.

Each function runs one thing on small tensors and compares it with what is right, and returns Findings (see
azr/isolated.py, which runs them in children). `python train_azr.py --doctor` calls them. Importing this needs no torch.
"""

from __future__ import annotations

from azr.isolated import Findings, one_line

NF4_ERROR = 0.12  # relative, of normal weights in blocks of 64: 0.09 when right, 0.24 where scales are mixed up
PRODUCT_ERROR = 0.02  # relative, of products with the same 4-bit weights: rounding in bf16 stays below 0.01


def gpu() -> Findings:
    """Name, memory, driver against torch's CUDA, whether a product can be computed, and whether it has bf16."""
    import torch

    from azr.policy.gpu import look, why_unusable
    from azr.policy.load import auto_dtype

    facts = look()
    why = why_unusable(facts)
    if facts.error is not None:
        findings = Findings([("gpu", f"none that torch can use: {why}")])
        if facts.driver:
            findings.lines.append(("driver", facts.driver))
            findings.slows.append("there is a GPU, and this torch cannot use it: see the line gpu")
        return findings
    free, total = torch.cuda.mem_get_info(0)
    count = torch.cuda.device_count()
    text = f"{facts.name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
    findings = Findings(
        [
            ("gpu", text + (f"; the first of {count}, no other is used" if count > 1 else "")),
            ("driver", f"{facts.driver or 'unknown'}; torch has CUDA {torch.version.cuda or torch.version.hip}"),
        ]
    )
    if why:
        findings.blocks.append(why)
        return findings
    if free < 0.8 * total:
        used = f"{(total - free) / 2**30:.1f} GiB of the GPU are in use already"
        findings.slows.append(f"{used} (nvidia-smi says by whom)")
    try:
        a = torch.randn(256, 256, device="cuda")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            (a.to(dtype) @ a.to(dtype)).sum().item()
    except RuntimeError as error:
        findings.blocks.append(f"this torch cannot compute on the GPU ({one_line(error)})")
        return findings
    has = auto_dtype("cuda") == "bf16"
    findings.lines.append(("bf16", "in hardware" if has else "not in hardware: --dtype auto computes in fp16"))
    return findings


def _device_and_dtype():
    """What a run takes here with --dtype auto."""
    import torch

    from azr.policy.load import compute_dtype

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return device, compute_dtype("auto", device)


def attention(wanted: str, heads: int, kv_heads: int, head_dim: int) -> Findings:
    """Which kernel sampling would use for `--attn wanted`; each is compared with torch's own on small tensors."""
    from azr.policy.attention import AttentionError, choose_attention

    device, dtype = _device_and_dtype()
    try:
        _, _, why = choose_attention(wanted, device, dtype, heads, kv_heads, head_dim)
    except AttentionError as error:
        return Findings([("attention", one_line(error))], [one_line(error)])
    return Findings([("attention", why.removeprefix("attention "))])


def four_bit(widths: list[int]) -> Findings:
    """bitsandbytes' NF4 at each input width of the model, forward and backward."""
    bad = [width for width in widths if not nf4_is_right(width)]
    right = ", ".join(str(width) for width in widths if width not in bad)
    findings = Findings([("4-bit", f"NF4 on {_device_and_dtype()[0].type}: right at width {right or 'none'}")])
    if bad:
        findings.blocks.append(
            f"4-bit matrices of this model's width {bad[0]} come out wrong here (known of bitsandbytes 0.50 on a CPU "
            "where the width is no multiple of 64): take --quantization none"
        )
    return findings


def nf4_is_right(width: int) -> bool:
    """Whether the stored weights are near the original ones, and products and gradients those of the stored ones."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    rows, (device, dtype) = 96, _device_and_dtype()
    generator = torch.Generator().manual_seed(width)
    original = torch.randn(rows, width, generator=generator)
    layer = Linear4bit(width, rows, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    layer.weight.data = original.to(dtype)
    layer = layer.to(device)
    layer.support_avx512bf16_for_cpu = False  # as azr/policy/load.py does
    stored = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = torch.randn(5, width, generator=generator).to(device, dtype).requires_grad_()
    y = layer(x)
    y.float().sum().backward()
    gaps = [relative(y, x.float() @ stored.T), relative(x.grad, stored.sum(0).expand(5, -1))]
    with torch.no_grad():  # another kernel, for few rows
        gaps.append(relative(layer(x[:1]), x[:1].float() @ stored.T))
    return relative(stored.cpu(), original) < NF4_ERROR and all(gap < PRODUCT_ERROR for gap in gaps)


def relative(value, exact) -> float:
    """||value - exact|| / ||exact|| of two tensors of one shape."""
    return ((value.float() - exact).norm() / exact.norm()).item()

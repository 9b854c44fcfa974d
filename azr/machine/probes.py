"""What torch and the packages around it really compute here: the GPU, attention, 4-bit matrices, threads.

Each function runs one thing on small tensors and compares it with float64 or with a bound, and returns Findings (see
azr/isolated.py, which runs them in children). `python train_azr.py --doctor` calls them. Importing this needs no torch.
"""

from __future__ import annotations

import os
import time

from azr.isolated import Findings, cores, one_line

NF4_ERROR = 0.12  # relative, of normal weights in blocks of 64: 0.09 when right, 0.24 where scales are mixed up


def gpu() -> Findings:
    """Name, driver, memory, and what products in bf16, fp16 and fp32 really do."""
    import torch

    from azr.policy.gpu import look, why_unusable
    from azr.policy.load import auto_dtype

    facts = look()
    why = why_unusable(facts)
    if facts.error is not None:
        return _no_gpu(facts, why)
    found, properties = Findings(), torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(0)
    count = torch.cuda.device_count()
    found.lines = [
        ("gpu", f"{properties.name}, compute capability {capability[0]}.{capability[1]}, {total / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB free" + (f"; the first of {count}, no other is used" if count > 1 else "")),
        ("driver", f"{facts.driver or 'unknown'}; torch has CUDA {torch.version.cuda or torch.version.hip}"),
    ]  # fmt: skip
    if why:
        found.blocks.append(why)
        return found
    if free < 0.8 * total:
        found.slows.append(
            f"{(total - free) / 2**30:.1f} GiB of the GPU are in use already (nvidia-smi says by whom)"
        )
    try:
        speed = {name: _teraflops(torch, getattr(torch, name)) for name in ("bfloat16", "float16", "float32")}
    except RuntimeError as error:
        found.lines.append(("products", f"fail: {one_line(error)}"))
        found.blocks.append(f"this torch cannot compute on the GPU ({one_line(error)})")
        return found
    has = auto_dtype("cuda") == "bf16"
    found.lines.append(("bf16", "in hardware" if has else "not in hardware: --dtype auto computes in fp16"))
    found.lines.append(("products", ", ".join(f"{name} {value:.1f} TFLOP/s" for name, value in speed.items())))
    return found


def _no_gpu(facts, why: str) -> Findings:
    found = Findings([("gpu", f"none that torch can use: {why}")])
    if facts.driver:
        found.lines.append(("driver", facts.driver))
        found.slows.append("there is a GPU, and this torch cannot use it: see the line gpu")
    return found


def _teraflops(torch, dtype, size: int = 2048) -> float:
    a = torch.randn(size, size, device="cuda").to(dtype)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start) / 1e12


def threads() -> Findings:
    """Small matrix products with one thread and with all that torch would take."""
    import torch

    count, found = torch.get_num_threads(), Findings()
    a = torch.randn(512, 160)
    b = torch.randn(160, 448)

    def products(threads: int) -> float:
        torch.set_num_threads(threads)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(10):
                a @ b
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    ratio = products(count) / products(1) if count > 1 else 1.0
    asked = os.environ.get("OMP_NUM_THREADS")
    text = f"torch takes {count} (OMP_NUM_THREADS {asked or 'not set'}) on {cores():g} cores"
    found.lines.append(
        ("threads", text + (f"; small products take {ratio:.1f} x the time of one" if count > 1 else ""))
    )
    if count > cores() + 0.99:
        found.slows.append(
            f"torch takes {count} threads for {cores():g} cores: set OMP_NUM_THREADS={max(1, int(cores()))}"
        )
    elif ratio > 1.5:
        found.slows.append(
            f"{count} threads are {ratio:.1f} times slower than one (is the CPU busy?): set OMP_NUM_THREADS=1"
        )
    return found


# ---------------------------------------------------------------------------------------------------------- attention


def _device_and_dtype():
    """What a run takes here with --dtype auto."""
    import torch

    from azr.policy.load import compute_dtype

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return device, compute_dtype("auto", device)


def attention(backend: str, heads: int, kv_heads: int, head_dim: int) -> Findings:
    """Decoding attention over pages: flash, triton, sdpa, or page (the CPU's), against a softmax in float64."""
    from azr.policy import attention as paged_attention, cpu_attention

    device, dtype = _device_and_dtype()
    label, slower = f"{backend} attention", Findings()
    if backend == "page" and device.type != "cpu":
        return slower
    if backend != "page" and (why := paged_attention.unusable(backend, device, dtype, heads, kv_heads, head_dim)):
        return Findings([(label, f"does not run: {one_line(why)}")])
    q, k, v, table, lengths = case = _pages(device, dtype, heads, kv_heads, head_dim)
    if backend == "page":
        out = cpu_attention.ByPage(table, lengths, k.shape[1])(q, k, v, head_dim**-0.5)
    else:
        out = paged_attention.paged_decode(backend, *case, head_dim**-0.5)
    gap = (out.double().cpu() - _exact(*case)).abs().max().item()
    right = gap <= paged_attention.TOLERANCE[dtype]
    text = f"runs in {str(dtype)[6:]}, {gap:.0e} from float64" if right else f"WRONG: {gap:.0e} from float64"
    return Findings([(label, text)])


def _pages(device, dtype, heads: int, kv_heads: int, dim: int, size: int = 256):
    """q (3, heads, dim), keys and values (5, size, kv_heads, dim), block table and lengths of three sequences."""
    import torch

    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    table = torch.tensor([[3, 0], [1, 4], [2, 0]], dtype=torch.int32, device=device)
    lengths = torch.tensor([7, size + 9, size], dtype=torch.int32, device=device)
    return draw(3, heads, dim), draw(5, size, kv_heads, dim), draw(5, size, kv_heads, dim), table, lengths


def _exact(q, k, v, table, lengths):
    """(batch, heads, dim) in float64: each query over its own keys, one after the other."""
    import torch

    q, k, v = (t.double().cpu() for t in (q, k, v))
    rows = []
    for query, pages, length in zip(q, table.tolist(), lengths.tolist()):
        keys, values = (
            t[pages].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // k.shape[2], 1) for t in (k, v)
        )
        weights = torch.softmax(torch.einsum("hd,thd->ht", query, keys) * q.shape[2] ** -0.5, 1)
        rows.append(torch.einsum("ht,thd->hd", weights, values))
    return torch.stack(rows)


def training_attention(heads: int, kv_heads: int, head_dim: int) -> Findings:
    """Which kernels of torch's SDPA run causal attention forward and backward in the dtype of training."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device, dtype = _device_and_dtype()
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
               "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
    runs = []
    for name, kernel in kernels.items():
        q, k, v = (
            torch.randn(2, heads, 64, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        try:
            with sdpa_kernel(kernel), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the reasons why a kernel is left out
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
            runs.append(name)
        except RuntimeError:
            continue
    found = Findings([("training", f"SDPA kernels that run forward and backward: {', '.join(runs) or 'none'}")])
    if not runs:
        found.blocks.append("no kernel of torch's attention runs here: install torch again")
    elif runs == ["math"]:
        found.slows.append("attention in training takes memory that grows with the square of the length")
    return found


# ------------------------------------------------------------------------------------------------------ 4-bit matrices


def four_bit(widths: list[int], needed: bool) -> Findings:
    """bitsandbytes' NF4 at each width, forward and backward. needed: whether the run's own base would be in 4 bits.

    widths: of the model's inputs; one that is no multiple of 64 is tried too, and never blocks.
    """
    errors = {width: _nf4_errors(width) for width in sorted({*widths, 256, 160})}
    device = _device_and_dtype()[0].type
    wrong = {width: loss for width, (loss, _) in errors.items() if not loss < NF4_ERROR}
    unlike = {width: gap for width, (_, gap) in errors.items() if not gap < 0.02}
    right = [width for width in errors if width not in wrong | unlike]
    text = f"NF4 on {device}: right at width {', '.join(map(str, right)) or 'none'}"
    if right:
        text += f" ({max(100 * errors[width][0] for width in right):.1f} % off, as 4 bits are; products agree)"
    text += "".join(f"; WRONG at {width} ({100 * loss:.0f} % off instead of 9 %)" for width, loss in wrong.items())
    text += "".join(f"; products at {width} differ by {100 * gap:.1f} %" for width, gap in unlike.items())
    found = Findings([("4-bit", text)])
    if needed and (bad := [width for width in widths if width in wrong | unlike]):
        found.blocks.append(
            f"4-bit matrices of this model's width {bad[0]} come out wrong here (known of bitsandbytes 0.50 on a CPU "
            "where the width is no multiple of 64): take --quantization none"
        )
    return found


def _nf4_errors(width: int, rows: int = 96) -> tuple[float, float]:
    """(of the stored weights to the original, of products and gradients to those with the stored weights), relative."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    device, dtype = _device_and_dtype()
    generator = torch.Generator().manual_seed(width)
    original = torch.randn(rows, width, generator=generator)
    layer = Linear4bit(width, rows, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    layer.weight.data = original.to(dtype)
    layer = layer.to(device)
    layer.support_avx512bf16_for_cpu = False  # as loading.py does
    stored = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = torch.randn(5, width, generator=generator).to(device, dtype).requires_grad_()
    y = layer(x)
    y.float().sum().backward()
    gaps = [relative(y, x.float() @ stored.T), relative(x.grad, stored.sum(0).expand(5, -1))]
    with torch.no_grad():  # another kernel, for few rows
        gaps.append(relative(layer(x[:1]), x[:1].float() @ stored.T))
    return relative(stored.cpu(), original), max(gaps)


def relative(found, wanted) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()

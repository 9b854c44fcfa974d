"""azr/policy/decode_ops.py as Triton kernels, one launch each; imported only on a GPU, since Triton is optional.

The arithmetic is in fp32 and is rounded to the dtype of the tensors where transformers rounds. Nothing waits for the
device, and grids depend on shapes alone, so a CUDA graph can capture every launch. The functions at the end have the
names and arguments of decode_ops.py; the file imports nothing of the project.
"""

import torch
import triton
import triton.language as tl

NAME = "triton"
COLUMNS = 1024  # that one program of the SwiGLU kernel takes: a whole row (11,008 or 18,944) is too long for one


@triton.jit
def _norm_kernel(x, delta, weight, out, x_stride, delta_stride, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row: x += delta if ADD, then its norm."""
    # ADD is a constant of the compiler: without it the branch, and the reads of delta, do not exist.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < size
    value = tl.load(x + row * x_stride + column, mask=real, other=0.0)
    if ADD:
        change = tl.load(delta + row * delta_stride + column, mask=real, other=0.0)
        # Rounded to the dtype of x before it is normed, so that the norm reads what the residual stream holds.
        value = (value.to(tl.float32) + change.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + row * x_stride + column, value, mask=real)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (factor * normed).to(out.dtype.element_ty), mask=real)


@triton.jit
def _silu_mul_kernel(gate, up, out, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    """One row, BLOCK columns: out = silu(gate) * up."""
    # 64 bits: row x stride passes 2^31 at 57,000 tokens of a 7B model, whose gate and up lie in rows of 37,888.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < size
    g = tl.load(gate + row * gate_stride + column, mask=real, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=real, other=0.0).to(tl.float32)
    # silu is rounded before it is multiplied, as torch's two operations would.
    activated = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + column, (activated * u).to(out.dtype.element_ty), mask=real)


@triton.jit
def _turned(first, second, cos, sin):
    """first * cos + second * sin, both products rounded to the dtype of first."""
    kind = first.dtype
    a = (first.to(tl.float32) * cos.to(tl.float32)).to(kind).to(tl.float32)
    b = (second.to(tl.float32) * sin.to(tl.float32)).to(kind).to(tl.float32)
    return (a + b).to(kind)


@triton.jit
def _rotate_store_kernel(
    q,
    k,
    v,
    cos,
    sin,
    keys,
    values,
    page,
    offset,
    q_stride,
    k_stride,
    v_stride,
    page_stride,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token, one head: the query heads first, then the key heads, which also go into the cache with their values.
    A program reads both halves of its head before it writes either."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = DIM // 2  # a head is two halves that turn into each other
    column = tl.arange(0, BLOCK)
    real = column < half
    angle = token * DIM + column
    cos_1, cos_2 = tl.load(cos + angle, mask=real), tl.load(cos + angle + half, mask=real)
    sin_1, sin_2 = tl.load(sin + angle, mask=real), tl.load(sin + angle + half, mask=real)
    if head < HEADS:
        at = q + token * q_stride + head * DIM + column
        first, second = tl.load(at, mask=real), tl.load(at + half, mask=real)
        tl.store(at, _turned(first, second, cos_1, sin_1), mask=real)
        tl.store(at + half, _turned(second, first, cos_2, sin_2), mask=real)
    else:
        kv_head = head - HEADS
        at = k + token * k_stride + kv_head * DIM + column
        first, second = tl.load(at, mask=real), tl.load(at + half, mask=real)
        new_first, new_second = _turned(first, second, cos_1, sin_1), _turned(second, first, cos_2, sin_2)
        tl.store(at, new_first, mask=real)
        tl.store(at + half, new_second, mask=real)
        # Every real token has a place of its own. Padding all goes to page 0, in any order, and nobody reads it.
        place = tl.load(page + token) * page_stride + tl.load(offset + token) * token_stride + kv_head * head_stride
        tl.store(keys + place + column, new_first, mask=real)
        tl.store(keys + place + half + column, new_second, mask=real)
        source = v + token * v_stride + kv_head * DIM + column
        tl.store(values + place + column, tl.load(source, mask=real), mask=real)
        tl.store(values + place + half + column, tl.load(source + half, mask=real), mask=real)


def rms_norm(x, weight, eps: float) -> torch.Tensor:
    """See `decode_ops.rms_norm`."""
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    out = torch.empty(flat.shape, dtype=weight.dtype, device=x.device)
    _norm(flat, flat, weight, out, eps, add=False)  # delta is not read
    return out.view(x.shape)


def add_rms_norm(x, delta, weight, eps: float) -> torch.Tensor:
    """See `decode_ops.add_rms_norm`."""
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    _norm(x, delta, weight, out, eps, add=True)
    return out


def _norm(x, delta, weight, out, eps: float, add: bool) -> None:
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    # A warp for 256 columns: more would wait for each other in the sum over the row.
    warps, strides = max(1, min(8, block // 256)), (x.stride(0), delta.stride(0))
    _norm_kernel[(rows,)](x, delta, weight, out, *strides, size, eps, ADD=add, BLOCK=block, num_warps=warps)


def silu_mul(gate, up) -> torch.Tensor:
    """See `decode_ops.silu_mul`."""
    rows, size = gate.shape
    out = torch.empty(rows, size, dtype=gate.dtype, device=gate.device)
    _silu_mul_kernel[(rows, triton.cdiv(size, COLUMNS))](
        gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=COLUMNS, num_warps=4
    )
    return out


def rotate_store(q, k, v, cos, sin, cache, page, offset) -> tuple[torch.Tensor, torch.Tensor]:
    """See `decode_ops.rotate_store`; q and k are rotated in place."""
    (tokens, heads, dim), (keys, values) = q.shape, cache
    strides = (q.stride(0), k.stride(0), v.stride(0), *keys.stride()[:3])
    sizes = {"HEADS": heads, "DIM": dim, "BLOCK": triton.next_power_of_2(dim // 2)}
    _rotate_store_kernel[(tokens, heads + k.shape[1])](
        q, k, v, cos, sin, keys, values, page, offset, *strides, **sizes, num_warps=1
    )
    return q, k

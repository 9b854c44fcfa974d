"""Attention of one new token a sequence over a paged KV cache: flash-attn, an own Triton kernel, or gather + SDPA.

    backend, page_size, why = choose_attention("auto", device, dtype, heads, kv_heads, head_dim)
    out = paged_decode(backend, q, k_pages, v_pages, block_table, lengths, head_dim**-0.5)

A page holds the keys (or values) of `page_size` consecutive tokens of one sequence; the block table lists a sequence's
pages in order. Several sequences may list the same page (a shared prompt). Which backend runs is decided once, by
importing it and comparing a small call with SDPA: a package that is installed but does not work is no use.

Left out: prefill (plain causal SDPA does it), several new tokens a sequence, sliding windows, attention sinks. Can be
copied out with triton_attention.py, the only file of the project that it imports.
"""

import importlib
import os

import torch
import torch.nn.functional as F

# In the order in which auto tries them. Triton before flash-attn: its splits keep a card busy when few long sequences
# are left, where flash-attn, held to one split (see `_flash`), puts a whole context on one multiprocessor.
BACKENDS = ("triton", "flash", "sdpa")
# Tokens of a page. Small pages waste less behind each sequence's last token, and less is copied where a shared prompt
# ends; flash-attn 2 takes only multiples of 256.
PAGE_SIZE = {"flash": 256, "triton": 64, "sdpa": 32}
# Largest difference from SDPA at which a backend counts as right: several roundings of a value near 1.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class AttentionError(ValueError):
    """The attention that was asked for cannot run here; one line that says why."""


def paged_decode(backend: str, q, k_pages, v_pages, block_table, lengths, scale: float) -> torch.Tensor:
    """softmax(scale q K^T) V for one query token a sequence: (batch, heads, dim) in q's dtype.

    q (batch, heads, dim); k_pages, v_pages (pages, page_size, kv_heads, dim), the last stride 1; block_table
    (batch, max_pages) int32, anything within range or -1 beyond a sequence's pages; lengths (batch,) int32: keys to
    attend to, at least 1, the new token (already written) included. Query head h uses KV head h // (heads / kv_heads).
    What lies beyond a sequence's length is never used, NaN or not. No backend waits for a GPU, so all can be captured
    in a CUDA graph; the work of sdpa on a GPU grows with max_pages, that of the others with the lengths.
    """
    if backend == "triton":
        from . import triton_attention  # here, since Triton is optional

        return triton_attention.decode(q, k_pages, v_pages, block_table, lengths, scale)
    if backend == "flash":
        return _flash(q, k_pages, v_pages, block_table, lengths, scale)
    return _sdpa(q, k_pages, v_pages, block_table, lengths, scale)


def _flash(q, k_pages, v_pages, block_table, lengths, scale):
    flash = importlib.import_module("flash_attn")
    # num_splits=1: the automatic choice has returned wrong values and NaN with paged caches (pytorch issue 194167)
    return flash.flash_attn_with_kvcache(
        q[:, None],
        k_pages,
        v_pages,
        cache_seqlens=lengths,
        block_table=block_table.clamp(min=0),
        softmax_scale=scale,
        causal=True,
        num_splits=1,
    )[:, 0]


def _sdpa(q, k_pages, v_pages, block_table, lengths, scale):
    """Gathers the whole table, then attends with a mask: what the others are compared with, and the way of a GPU
    without them. It moves every key three times instead of once."""
    batch, heads, dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    if q.device.type == "cpu":  # to ask a GPU would make it wait
        block_table = block_table[:, : -(-int(lengths.max()) // page_size)]
    # -1 stands for no page; any page will do in its place, since the mask hides it.
    pages = block_table.clamp(min=0).flatten()
    keys, values = (t.index_select(0, pages).view(batch, -1, kv_heads, dim) for t in (k_pages, v_pages))
    visible = torch.arange(keys.shape[1], device=q.device) < lengths[:, None]
    # A mask alone is not enough: unused memory may hold NaN, and a probability of 0 times NaN is NaN.
    if q.device.type == "cpu":  # few positions: cheaper than a pass over all, but it would make a GPU wait
        masked = (~visible).flatten().nonzero().squeeze(1)
        for t in (keys, values):
            t.view(-1, kv_heads * dim).index_fill_(0, masked, 0)
    else:
        keys, values = (t.masked_fill_(~visible[:, :, None, None], 0) for t in (keys, values))
    # the query heads of a group see the same keys: as query positions of one head they need no copy of them
    out = F.scaled_dot_product_attention(
        q.reshape(batch, kv_heads, heads // kv_heads, dim),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None, None],
        scale=scale,
    )
    return out.reshape(batch, heads, dim)


# ------------------------------------------------------------------------------------------------------- the choice


def choose_attention(attn: str, device, dtype, heads: int, kv_heads: int, head_dim: int) -> tuple[str, int, str]:
    """(backend, page_size, why) for attn = auto | flash | triton | sdpa; `why` is one line to print.

    auto: the first of triton, flash, sdpa that runs here and agrees with SDPA. AttentionError: the one that was asked
    for does not, or there is no such one.
    """
    if attn not in ("auto", *BACKENDS):
        raise AttentionError(f"unknown attention {attn}: take auto, {', '.join(BACKENDS)}")
    device = torch.device(device)
    refused = []  # why the backends before this one do not work here: a fallback is never silent
    for backend in BACKENDS if attn == "auto" else (attn,):
        reason = unusable(backend, device, dtype, heads, kv_heads, head_dim)
        if reason is None:
            why = "; ".join([f"attention {backend}" + (", as asked" if attn != "auto" else ""), *refused])
            return backend, PAGE_SIZE[backend], why
        refused.append(f"{backend} cannot be used: {reason}")
    raise AttentionError(f"--attn {refused[0]}; take --attn auto")


def unusable(backend: str, device, dtype, heads: int, kv_heads: int, head_dim: int) -> str | None:
    """Why this backend does not work for these sizes here, in a few words; None if it does."""
    if backend == "sdpa":
        return None
    if device.type != "cuda" and not (backend == "triton" and _interpreted()):
        return "no CUDA device"
    if backend == "flash" and dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn does not compute in {str(dtype).removeprefix('torch.')}"
    case = _probe_case(device, dtype, heads, kv_heads, head_dim, PAGE_SIZE[backend])
    try:
        out = paged_decode(backend, *case)
    except Exception as error:  # import, compilation and launch errors are of many types: any means "not usable"
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"
    gap = (out.float() - _sdpa(*case).float()).abs().max().item()
    # "not <=" and not ">", so that NaN is refused.
    if not gap <= TOLERANCE[dtype]:
        return f"it differs from SDPA by {gap:.1e}"
    return None


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, as tests on a CPU make it do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _probe_case(device, dtype, heads, kv_heads, head_dim, page_size):
    """Three sequences of one token, a page and a bit, and two pages, in pages out of order; the rest is NaN.

    Each is a case that broken kernels get wrong: a split without keys, a last page in part, a page that is just full,
    memory that must not be read.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, page_size + 5, 2 * page_size], dtype=torch.int32)
    block_table = torch.tensor([[5, -1], [1, 4], [6, 2]], dtype=torch.int32)
    pages = torch.full((2, 7, page_size, kv_heads, head_dim), float("nan"))
    for row, length in zip(block_table.tolist(), lengths.tolist()):
        for page in row[: -(-length // page_size)]:
            pages[:, page] = torch.randn(2, page_size, kv_heads, head_dim, generator=generator)
    q = torch.randn(3, heads, head_dim, generator=generator)
    tensors = (t.to(device, dtype) for t in (q, pages[0], pages[1]))
    return *tensors, block_table.to(device), lengths.to(device), head_dim**-0.5

"""The Triton kernels behind `paged_decode("triton", ...)`; imported only when they are used, since Triton is optional.

Flash-decoding (Dao, Haziza, Massa, Sizov 2023): the keys of a sequence are cut into splits of SPLIT tokens, each split
is attended to by its own program, and a second kernel combines the splits by their log-sum-exp. All query heads that
share a KV head form one tile, so every key is read once. The split is a number of tokens, not a share of the length:
what a sequence gets does not depend, to the last bit, on what else is in the batch or on how wide the table is. The
grid depends on the table's width alone and nothing waits for the device, so a CUDA graph can capture the launch.

    out = decode(q, k_pages, v_pages, block_table, lengths, head_dim**-0.5)         # (batch, heads, head_dim)

Imports nothing of the project and can be copied out alone.
"""

import torch
import triton
import triton.language as tl

# Keys of a split. Shorter ones would keep more of a card busy when few sequences are left, but each writes a partial
# result in fp32: with 256 that is 2-3 % of the bytes of its keys and values.
SPLIT = 256
BLOCK = 64  # keys of a tile; a tile of keys takes 16 KiB of shared memory with heads of 128 in bf16, one of values too
TOGETHER = 16  # splits that are combined at a time: 4,096 keys in one pass


@triton.jit
def _split_kernel(
    q,
    k_pages,
    v_pages,
    block_table,
    lengths,
    partial,
    log_sum,
    scale,
    q_stride,
    table_stride,
    page_stride,
    token_stride,
    head_stride,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence, one KV head, SPLIT keys: partial (batch, heads, splits, DIM), log_sum (batch, heads, splits)."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    # The grid covers the table's width, and most sequences are shorter. What such a program would have written is never
    # read: `_combine_kernel` counts the splits from the length too.
    if split * SPLIT >= length:
        return
    heads = kv_head * GROUP + tl.arange(0, ROWS)
    real_head = tl.arange(0, ROWS) < GROUP
    dims = tl.arange(0, COLUMNS)
    real_dim = dims < DIM
    queries = tl.load(q + row * q_stride + heads[:, None] * DIM + dims, mask=real_head[:, None] & real_dim, other=0.0)
    # Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867): largest score so far, sum of exp(score - best),
    # and the values weighted by it; rescaled whenever a tile has a larger score.
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SPLIT, BLOCK):
        position = split * SPLIT + start + tl.arange(0, BLOCK)
        visible = position < length
        # 64 bits: offsets pass 2^31 where one layer's keys take more than 4 GiB, as with few layers and a large card.
        page = tl.load(block_table + row * table_stride + position // PAGE, mask=visible, other=0).to(tl.int64)
        token = page * page_stride + (position % PAGE) * token_stride + kv_head * head_stride
        where = token[:, None] + dims
        # What is not loaded is 0, so whatever lies in unused memory, NaN included, has no effect.
        real = visible[:, None] & real_dim
        keys = tl.load(k_pages + where, mask=real, other=0.0)
        # "ieee": for fp32 the default is TF32, whose 10 bits miss the tolerance of attention.py by far.
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        # The split's first key exists, so `new_best` is finite from the first tile on and no -inf - -inf occurs.
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - new_best[:, None])
        shrink = tl.exp(best - new_best)
        values = tl.load(v_pages + where, mask=real, other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        best = new_best
    slot = (row * HEADS + heads) * splits + split
    tl.store(partial + slot[:, None] * DIM + dims, out / total[:, None], mask=real_head[:, None] & real_dim)
    tl.store(log_sum + slot, best + tl.log(total), mask=real_head)


@triton.jit
def _combine_kernel(
    partial,
    log_sum,
    lengths,
    out,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """One sequence, one head: the mean of its splits' results, weighted by exp(log_sum)."""
    row, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, COLUMNS)
    real_dim = dims < DIM
    used = tl.cdiv(tl.load(lengths + row), SPLIT)
    best = float("-inf")
    total = 0.0
    mean = tl.zeros((COLUMNS,), tl.float32)
    start = 0
    # `while`, not `range(0, used, ...)`: Triton's interpreter, which tests use, has failed on a range over a tensor.
    while start < used:
        split = start + tl.arange(0, TOGETHER)
        slot = (row * HEADS + head) * splits + split
        log_weight = tl.load(log_sum + slot, mask=split < used, other=float("-inf"))
        new_best = tl.maximum(best, tl.max(log_weight, 0))
        shrink, weight = tl.exp(best - new_best), tl.exp(log_weight - new_best)
        where = slot[:, None] * DIM + dims
        parts = tl.load(partial + where, mask=(split < used)[:, None] & real_dim, other=0.0)
        mean = mean * shrink + tl.sum(weight[:, None] * parts, 0)
        total = total * shrink + tl.sum(weight, 0)
        best = new_best
        start += TOGETHER
    tl.store(out + (row * HEADS + head) * DIM + dims, (mean / total).to(out.dtype.element_ty), mask=real_dim)


def decode(q, k_pages, v_pages, block_table, lengths, scale: float) -> torch.Tensor:
    """See `attention.paged_decode`. k_pages and v_pages: any strides, equal ones, the last of them 1."""
    batch, heads, dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    splits = triton.cdiv(block_table.shape[1] * page_size, SPLIT)
    q = q if q.stride()[1:] == (dim, 1) else q.contiguous()  # rows may lie apart, as slices of one product
    # 100 MB for 384 rows of up to 8,192 tokens with 16 heads of 128; every layer gets the same memory again.
    partial = q.new_empty(batch, heads, splits, dim, dtype=torch.float32)
    log_sum = q.new_empty(batch, heads, splits, dtype=torch.float32)
    out = q.new_empty(q.shape)
    group, columns = heads // kv_heads, triton.next_power_of_2(dim)
    strides = (q.stride(0), block_table.stride(0), *k_pages.stride()[:3])
    # tl.dot takes tiles of 16 or more in each direction: fewer heads than that are filled up with rows of zeros.
    tile = {"ROWS": max(16, triton.next_power_of_2(group)), "COLUMNS": max(16, columns), "SPLIT": SPLIT, "BLOCK": BLOCK}
    options = {"HEADS": heads, "GROUP": group, "DIM": dim, "PAGE": page_size, "num_warps": 4, "num_stages": 2, **tile}
    _split_kernel[(batch, kv_heads, splits)](
        q, k_pages, v_pages, block_table, lengths, partial, log_sum, scale, *strides, splits, **options
    )
    sizes = {"HEADS": heads, "DIM": dim, "COLUMNS": columns, "SPLIT": SPLIT, "TOGETHER": TOGETHER}
    _combine_kernel[(batch, heads)](partial, log_sum, lengths, out, splits, **sizes, num_warps=2)
    return out

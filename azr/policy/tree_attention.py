"""Attention over the packed sequences of packing.py, on a CPU: each pair of tokens that see each other, once.

    pack_attention(model)                                       # without `tree` it is SDPA's as before
    model(input_ids=ids[None], position_ids=place[None], attention_mask=NO_MASK, tree=Tree(segments, groups, dtype))

A segment's tokens see those of it that came before, and all that lies below it sees it whole, without a mask. Both are
parts of one softmax, put together by their log-sum-exp; the gradient of a part is that of FlashAttention (Dao 2023,
arXiv 2307.08691, section 2.3.2), which takes the output and the log-sum-exp of the whole.

Heads that share a key are further rows of one product, so that keys are not repeated. Left out: dropout, GPUs.
"""

import torch

from .packing import Segment

NAME = "packed"
NO_MASK = torch.zeros(1, 1, 1, 1)  # transformers leaves a mask of four dimensions as it is; `attend` does not read it
WASTE = 1.25  # segments are padded to the longest of their batch while no more than this is computed
FREE = 64  # tokens of padding that cost less than another call
PIECE = 96  # tokens: of a longer segment half of the pairs, those that do not see each other, would be too many

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Tree:
    """What every layer needs to know of a packing: which products to make.

    within: (segments, length, mask (length x groups, length)) of segments that are padded to one length. at (places,):
    the token in each place of these, batch by batch, for padding any one; padding: which places are; back (tokens,):
    each token's place. below: segments that others see, as they are. groups: query heads to a key head.
    """

    def __init__(self, segments: list[Segment], groups: int, dtype: torch.dtype):
        segments = [piece for segment in segments for piece in pieces(segment)]
        self.groups, self.within = groups, []
        self.below = [segment for segment in segments if segment.end < segment.last]
        at, padding = [], []
        back = [0] * max(segment.last for segment in segments)
        for batch in batches_of(segments):
            longest = batch[0].end - batch[0].first
            mask = torch.full((longest, longest), -torch.inf, dtype=dtype).triu_(1)
            self.within.append((len(batch), longest, mask.repeat_interleave(groups, 0)))
            for first, end, _ in batch:
                back[first:end] = range(len(at), len(at) + end - first)
                padding += range(len(at) + end - first, len(at) + longest)
                at += [*range(first, end), *[first] * (longest - end + first)]
        self.at, self.back, self.padding = (torch.tensor(x, dtype=torch.int64) for x in (at, back, padding))


def batches_of(segments: list[Segment]) -> list[list[Segment]]:
    """Segments of similar length, longest first."""
    batches: list[list[Segment]] = []
    longest = real = 0
    for segment in sorted(segments, key=lambda s: (s.first - s.end, s.first)):
        length = segment.end - segment.first
        if not batches or (len(batches[-1]) + 1) * longest > WASTE * (real + length) + FREE:
            batches.append([])
            longest, real = length, 0
        batches[-1].append(segment)
        real += length
    return batches


def pieces(segment: Segment) -> list[Segment]:
    """The segment as a chain of at most PIECE tokens each, which see those before."""
    count = -(-(segment.end - segment.first) // PIECE)
    cuts = [segment.first + (segment.end - segment.first) * i // count for i in range(count + 1)]
    return [Segment(first, end, segment.last) for first, end in zip(cuts, cuts[1:])]


class TreeAttention(torch.autograd.Function):
    """apply(q (kv_heads, tokens x groups, dim), k, v (kv_heads, tokens, dim), tree, scale) -> like q."""

    @staticmethod
    def forward(ctx, q, k, v, tree, scale):
        """softmax(scale q K^T) V over what each token sees."""
        batches = zip(tree.within, *(_padded(t, tree) for t in (q, k, v)))
        parts = [flash(*qkv, attn_mask=mask, scale=scale) for (*_, mask), *qkv in batches]
        out, log_sum = (_flat(t, tree, like) for t, like in zip(zip(*parts), (q, q[..., :1])))
        log_sum = log_sum[..., 0]
        for segment in tree.below:
            above, under = slice(segment.first, segment.end), _rows(segment, tree.groups)
            o, s = flash(q[None, :, under], k[None, :, above], v[None, :, above], scale=scale)
            before = log_sum[:, under]
            out[:, under].lerp_(o[0], torch.sigmoid(s[0] - before).to(o.dtype)[..., None])
            torch.logaddexp(before, s[0], out=before)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The gradients for q, k and v."""
        (q, k, v, out, log_sum), tree, scale = ctx.saved_tensors, ctx.tree, ctx.scale
        sums = _padded(log_sum[..., None], tree, torch.inf)  # e to the -inf: what stands in for padding counts nowhere
        batches = zip(tree.within, sums, *(_padded(t, tree) for t in (grad, q, k, v, out)))
        parts = [
            flash_backward(*tensors, s[..., 0], 0.0, False, attn_mask=mask, scale=scale)
            for (*_, mask), s, *tensors in batches
        ]
        grads = [_flat(t, tree, like) for t, like in zip(zip(*parts), (q, k, v))]
        for segment in tree.below:
            above, under = slice(segment.first, segment.end), _rows(segment, tree.groups)
            asks = [t[None, :, under] for t in (grad, q, out, log_sum)]
            seen = [t[None, :, above] for t in (k, v)]
            of = flash_backward(*asks[:2], *seen, *asks[2:], 0.0, False, scale=scale)
            for total, part, where in zip(grads, of, (under, above, above)):
                total[:, where] += part[0]
        return *grads, None, None


def _rows(segment: Segment, groups: int) -> slice:
    """Rows of q that lie below a segment."""
    return slice(segment.end * groups, segment.last * groups)


def _padded(t: torch.Tensor, tree: Tree, fill: float | None = None) -> list[torch.Tensor]:
    """(heads, tokens x n, d) as a tensor (heads, segments, length x n, d) for every batch of segments, with `fill` or
    any token's values where padding is."""
    heads, dim = len(t), t.shape[-1]
    padded = t.reshape(heads, len(tree.back), -1).index_select(1, tree.at)
    if fill is not None:
        padded[:, tree.padding] = fill
    parts = padded.split([count * length for count, length, _ in tree.within], 1)
    return [part.view(heads, count, -1, dim) for part, (count, _, _) in zip(parts, tree.within)]


def _flat(parts: tuple[torch.Tensor, ...], tree: Tree, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_padded`, a tensor of the shape of `like`."""
    together = [part.reshape(len(like), count * length, -1) for part, (count, length, _) in zip(parts, tree.within)]
    return torch.cat(together, 1).index_select(1, tree.back).view(like.shape)


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree: Tree | None = None, **options):
    """An attention function of transformers: query (1, heads, tokens, dim), key and value (1, kv_heads, tokens, dim)
    -> ((1, tokens, heads, dim), None). Without a tree it is transformers' SDPA."""
    if tree is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    _, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    # (kv_heads, tokens x groups, dim): the heads of a group side by side
    q = query.view(kv_heads, -1, tokens, dim).transpose(1, 2).reshape(kv_heads, -1, dim)
    out = TreeAttention.apply(q, key[0].contiguous(), value[0].contiguous(), tree, scaling)
    return out.view(kv_heads, tokens, -1, dim).transpose(0, 1).reshape(1, tokens, heads, dim), None


def pack_attention(model) -> None:
    """Lets a model of transformers compute its attention with `attend`; what has no tree is SDPA's as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)

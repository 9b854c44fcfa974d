"""Attention of one new token a sequence over a paged KV cache, page by page: the CPU's way.

    if attend is None or not attend.advance(block_table, lengths):                      # once a step
        attend = ByPage(block_table, lengths, page_size, heads, kv_heads, head_dim)
    out = attend(q, keys, values, head_dim**-0.5)                                       # once a layer

On a CPU the traffic of the cache decides. So the loop is turned round: not "for each sequence its pages" but "for each
page the sequences that attend to it". No page is copied, a page that n samples of a prompt share is read once for all
of them, in one matrix product with all their queries, and no sequence pays for the length of another. The parts are
added up with the row's own maximum, so the result is the exact softmax. In half precision the products give fp32, as
those of SDPA do: what is rounded is the probabilities before their product with the values, and the result.

Imports nothing of the project and can be copied out alone. Left out: anything that a GPU could run well.
"""

import numpy as np
import torch

# Rows that are multiplied with a shared page at a time. One batched product needs the same number for every page, so
# with more, a page with few rows would be multiplied with many rows of padding.
SHARED_ROWS = 16
SPARSE = 1.5  # a range of pages is read as it lies while so much of it, for each page that is needed, is read


class ByPage:
    """Which rows attend to which page, and to how many of its keys.

    block_table (rows, max_pages) int64: the pages of each row in order; lengths (rows,) int64: keys to attend to, at
    least 1. Only the last page of a row may be incomplete, and a page that several rows use must be complete.
    """

    def __init__(self, block_table, lengths, page_size: int, heads: int, kv_heads: int, head_dim: int):
        # With numpy, whose calls on so little data cost a third of torch's.
        self.table, self.lengths = table, lengths = block_table.numpy(), lengths.numpy()
        # One entry for each (row, page) that holds keys the row attends to.
        row, column = np.nonzero(np.arange(table.shape[1]) * page_size < lengths[:, None])
        page, used = table[row, column], lengths[row] - column * page_size
        self.rows, self.page_size, self.heads, self.kv_heads = len(lengths), page_size, heads, kv_heads
        # Apart, as the two kinds are different products: one row's queries with a page, and those of many rows at once.
        alone = np.bincount(page)[page] == 1
        parts, self.scattered = [], False  # scattered: pages are gathered that could be read as they lie, if closer
        if alone.any():
            parts.append(self._alone(page[alone], row[alone], used[alone]))
        if not alone.all():
            parts.append(self._shared(page[~alone], row[~alone]))
        # Which of the (rows + 1) x heads queries each unit multiplies, for each KV head: (units, kv_heads, m, group).
        head = np.arange(heads).reshape(kv_heads, 1, -1)
        index = [(rows[:, None, :, None] * heads + head).ravel() for _, rows, _ in parts]
        self.index = torch.from_numpy(np.concatenate(index))
        self._buffers(parts, kv_heads, head_dim)

    def advance(self, block_table: torch.Tensor, lengths: torch.Tensor) -> bool:
        """Take the next step, if it differs from the last one by one more key of each row, in the page it writes to.
        False: a page or a row came or went."""
        table, lengths = block_table.numpy(), lengths.numpy()
        full = (self.lengths % self.page_size == 0).any()  # the next key of such a row is the first of another page
        if full or not (np.array_equal(table, self.table) and np.array_equal(lengths, self.lengths + 1)):
            return False
        self.lengths = lengths
        self.bias.put(self.next, 0)
        self.next += 1
        return True

    def _alone(self, page, row, used):
        """Pages of one row each. Where most pages are, the whole range is taken as it lies, nothing is copied."""
        # A slice of the cache is a view, an index copies. Worth computing up to as many unused pages again.
        low, high = page.min(), page.max() + 1
        whole = SPARSE * len(page) >= high - low
        self.scattered |= not whole
        at, size = (page - low, high - low) if whole else (slice(None), len(page))
        rows = np.full((size, 1), self.rows)  # pages that nobody attends to count for a row too many
        rows[at, 0] = row
        bias = np.zeros((size, self.kv_heads, self.page_size), np.float32)
        bias[at] = np.where(np.arange(self.page_size) < used[:, None, None], np.float32(0), np.float32(-np.inf))
        self.bias = bias.reshape(-1, self.page_size)
        # Where the next key of each row counts: in its last page, the one that may be incomplete.
        last = used <= self.page_size
        unit = np.arange(size)[at][last, None] * self.kv_heads + np.arange(self.kv_heads)
        self.next = unit * self.page_size + used[last, None]
        return slice(low, high) if whole else page, rows, self.bias

    def _shared(self, page, row):
        """Pages of several rows, at most SHARED_ROWS at a time."""
        # Users of one page side by side, numbered from 0: every sixteenth begins a new unit of work.
        order = page.argsort(kind="stable")
        page, row = page[order], row[order]
        _, start, count = np.unique(page, return_index=True, return_counts=True)
        rank = np.arange(len(page)) - np.repeat(start, count)
        first = rank % SHARED_ROWS == 0
        unit, size, pages = first.cumsum() - 1, first.sum(), page[first]
        low, high = page[0], page[-1] + 1
        whole = SPARSE * size >= high - low
        self.scattered |= not whole
        if whole and count.max() <= SHARED_ROWS:  # as they lie, as above
            unit, size, pages = page - low, high - low, slice(low, high)
        rows = np.full((size, min(SHARED_ROWS, count.max())), self.rows)
        rows[unit, rank % SHARED_ROWS] = row
        return pages, rows, None

    def _buffers(self, parts, kv_heads: int, dim: int) -> None:
        """What every layer writes anew, and the views of it that are read and written."""
        rows, heads, scored = self.rows, self.heads, len(self.index)
        # One row too many, of zeros: padding and unused pages count for it, and it is dropped at the end.
        self.query = torch.zeros((rows + 1) * heads, dim)
        self.picked, self.highest = torch.empty(scored, dim), torch.empty(scored, 1)
        self.scores, self.top = torch.empty(scored, self.page_size), torch.empty(len(self.query))
        self.weighted, self.out = torch.empty(scored, dim), torch.empty_like(self.query)
        self.total = torch.empty(len(self.query))
        self.real = [t.view(rows + 1, heads, -1)[:rows] for t in (self.query, self.out, self.total)]
        self.parts, start = [], 0
        for pages, unit_rows, bias in parts:
            units, many = len(unit_rows) * kv_heads, unit_rows.shape[1] * heads // kv_heads
            # The cache's pages of one head are the units of a product, so each page stands for kv_heads of them.
            if isinstance(pages, slice):
                pages = slice(int(pages.start) * kv_heads, int(pages.stop) * kv_heads)
            else:
                pages = torch.from_numpy((pages[:, None] * kv_heads + np.arange(kv_heads)).ravel())
            mine = (t[start : start + units * many] for t in (self.picked, self.scores, self.weighted))
            q, s, w = (t.view(units, many, -1) for t in mine)
            # added to the scores; where there is none, the scores stand for it, times 0
            added = (s, 0) if bias is None else (torch.from_numpy(bias)[:, None], 1)
            self.parts.append((pages, q, s, w, *added))
            start += units * many

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """softmax(scale q K^T) V: q (rows, heads, dim); keys, values (pages x kv_heads, page_size, dim), so that those
        of one page and head lie together."""
        dtype, highest, index = q.dtype, self.highest, self.index
        if dtype != torch.float32:
            q = q.float()
        query, out, total = self.real
        query.copy_(q)
        torch.index_select(self.query, 0, index, out=self.picked)
        for pages, picked, scores, _, bias, beta in self.parts:
            k = keys[pages].float().transpose(1, 2)
            torch.baddbmm(bias, picked, k, beta=beta, alpha=scale, out=scores)
        # The largest score of each row over all of its pages, before anything is exponentiated: the sums of the pages
        # then have one scale and are simply added.
        torch.amax(self.scores, 1, True, out=highest)
        self.top.fill_(float("-inf")).scatter_reduce_(0, index, highest.view(-1), "amax")
        torch.index_select(self.top, 0, index, out=highest.view(-1))
        self.scores.sub_(highest).exp_()
        self.total.zero_().index_add_(0, index, self.scores.sum(-1))
        if dtype != torch.float32:
            self.scores.copy_(self.scores.to(dtype))
        for pages, _, p, weighted, *_ in self.parts:
            torch.bmm(p, values[pages].float(), out=weighted)
        self.out.zero_().index_add_(0, index, self.weighted)
        return (out / total).to(dtype)

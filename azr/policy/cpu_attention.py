"""Attention of one new token a sequence over a paged KV cache, page by page: the CPU's way.

    attend = ByPage(block_table, lengths, page_size)          # once a step
    out = attend(q, k_pages, v_pages, head_dim**-0.5)         # once a layer; (rows, heads, dim)

On a CPU the traffic of the cache decides. So the loop is turned round: not "for each sequence its pages" but "for each
page the sequences that attend to it". No page is copied, a page that n samples of a prompt share is read once for all
of them, in one matrix product with all their queries, and no sequence pays for the length of another. The parts are
added up with the row's own maximum, so the result is the exact softmax. In half precision the products give fp32, as
those of SDPA do: what is rounded is the probabilities before their product with the values, and the result.

Imports nothing of the project and can be copied out alone. Left out: anything that a GPU could run well.
"""

import torch

# Rows that are multiplied with a shared page at a time. One batched product needs the same number for every page, so
# with more, a page with few rows would be multiplied with many rows of padding.
SHARED_ROWS = 16


class ByPage:
    """Which rows attend to which page, and to how many of its keys.

    block_table (rows, max_pages) int: the pages of each row in order; lengths (rows,): keys to attend to, at least 1.
    Only the last page of a row may be incomplete, and a page that several rows use must be complete.
    """

    def __init__(self, block_table: torch.Tensor, lengths: torch.Tensor, page_size: int):
        # One entry for each (row, page) that holds keys the row attends to.
        start = torch.arange(block_table.shape[1]) * page_size
        row, column = (start < lengths[:, None]).nonzero().unbind(1)
        page = block_table[row, column].long()
        used = (lengths[row] - start[column]).clamp_(max=page_size)
        self.rows, self.page_size = len(lengths), page_size
        # Apart, as the two kinds are different products: one row's queries with a page, and those of many rows at once.
        users = torch.bincount(page)
        alone = users[page] == 1
        self.parts = []
        if alone.any():
            self.parts.append(self._alone(page[alone], row[alone], used[alone], len(users)))
        if not alone.all():
            self.parts.append(self._shared(page[~alone], row[~alone]))

    def _alone(self, page, row, used, count):
        """Pages of one row each. Where most pages are, the whole range is taken as it lies, nothing is copied."""
        # A slice of the cache is a view, an index copies. Worth computing up to as many unused pages again.
        whole = 2 * len(page) >= count
        index = page if whole else torch.arange(len(page))
        size = count if whole else len(page)
        rows = torch.full((size, 1), self.rows)  # pages that nobody attends to count for a row too many
        rows[index, 0] = row
        bias = torch.zeros(size, 1, self.page_size)
        bias[index, 0] = torch.where(torch.arange(self.page_size) < used[:, None], 0.0, float("-inf"))
        return slice(0, count) if whole else page, rows, bias

    def _shared(self, page, row):
        """Pages of several rows, at most SHARED_ROWS at a time."""
        # Users of one page side by side, numbered from 0: every sixteenth begins a new unit of work.
        order = page.argsort(stable=True)
        page, row = page[order], row[order]
        _, count = page.unique_consecutive(return_counts=True)
        rank = torch.arange(len(page)) - (count.cumsum(0) - count).repeat_interleave(count)
        first = rank % SHARED_ROWS == 0
        rows = torch.full((int(first.sum()), min(SHARED_ROWS, int(count.max()))), self.rows)
        rows[first.cumsum(0) - 1, rank % SHARED_ROWS] = row
        return page[first], rows, None

    def __call__(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, scale: float) -> torch.Tensor:
        """softmax(scale q K^T) V: q (rows, heads, dim), k_pages and v_pages (pages, page_size, kv_heads, dim)."""
        rows, heads, dim = q.shape
        kv_heads = k_pages.shape[2]
        group = heads // kv_heads
        # One row too many, of zeros: padding and unused pages count for it, and it is dropped at the end.
        query = torch.cat((q.float() * scale, torch.zeros(1, heads, dim))).view(rows + 1, kv_heads, group, dim)
        scores = [self._scores(query, k_pages, *part) for part in self.parts]
        # The largest score of each row over all of its pages, before anything is exponentiated: the sums of the pages
        # then have one scale and are simply added.
        top = torch.full((rows + 1, kv_heads * group), float("-inf"))
        for (_, index, _), s in zip(self.parts, scores):
            highest = s.amax(-1).flatten(0, 1)
            top.scatter_reduce_(0, index.flatten()[:, None].expand_as(highest), highest, "amax")
        out = torch.zeros(rows + 1, kv_heads * group, dim)
        total = torch.zeros(rows + 1, kv_heads * group)
        for (pages, index, _), s in zip(self.parts, scores):
            p = s.sub_(top[index].unsqueeze(-1)).exp_()
            total.index_add_(0, index.flatten(), p.sum(-1).flatten(0, 1))
            out.index_add_(0, index.flatten(), self._weighted(p, v_pages[pages], kv_heads).flatten(0, 1))
        return (out[:rows] / total[:rows, :, None]).to(q.dtype)

    def _scores(self, query, k_pages, pages, rows, bias) -> torch.Tensor:
        """fp32 (units, m, heads, page_size): the m rows of each unit against the keys of its page."""
        units, m = rows.shape
        kv_heads, group, dim = query.shape[1:]
        q = query[rows].transpose(1, 2).reshape(units * kv_heads, m * group, dim)
        keys = k_pages[pages].transpose(1, 2).reshape(units * kv_heads, self.page_size, dim).float()
        s = torch.bmm(q, keys.transpose(1, 2)).view(units, kv_heads, m * group, self.page_size)
        if bias is not None:
            s += bias[:, None]
        return s.view(units, kv_heads, m, group, -1).transpose(1, 2).reshape(units, m, kv_heads * group, -1)

    def _weighted(self, p, values, kv_heads) -> torch.Tensor:
        """fp32 (units, m, heads, dim): probabilities times the values of each unit's page."""
        units, m, heads, size = p.shape
        p = p.view(units, m, kv_heads, -1, size).transpose(1, 2).reshape(units * kv_heads, -1, size).to(values.dtype)
        values = values.transpose(1, 2).reshape(units * kv_heads, size, -1).float()
        out = torch.bmm(p.float(), values).view(units, kv_heads, m, heads // kv_heads, -1)
        return out.transpose(1, 2).reshape(units, m, heads, -1)

"""Log-probs and entropies of given tokens without ever holding all the logits, and micro-batches for them.

    log_prob, entropy = ChunkedLogProb.apply(hidden, head_weight, target, temperature)     # each (N,), fp32

Logits exist one block at a time, at most ROWS rows by BLOCK words of the vocabulary, whatever the length: softmax and
gradient are summed up over the blocks as they pass, so that each block is computed once, as often as without chunks; a
head that is trained itself (--train full) computes them a second time in the backward pass.
"""

from typing import NamedTuple

import torch

ROWS = 1024  # with a block of BLOCK columns; a small vocabulary takes more rows for the same memory
BLOCK = {"cpu": 4096, "cuda": 16384}  # columns: 16 MiB of logits stay near a CPU's caches, 64 MiB fill a GPU


class Scored(NamedTuple):
    """One micro-batch of `Policy.score`."""

    indices: list[int]  # (batch,): which of the call's samples the rows are
    log_prob: torch.Tensor  # (batch, time) fp32, 0 where there is no token
    entropy: torch.Tensor  # (batch, time) fp32, nats, of the full distribution at the given temperature
    mask: torch.Tensor  # (batch, time) bool


def head_logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 logits (rows, vocabulary) = hidden (rows, H) times weight (vocabulary, H), accumulated and kept in fp32."""
    if hidden.dtype == torch.float32 and weight.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=out) if out is not None else hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
    return head_logits(hidden.float(), weight.float(), out)


class ChunkedLogProb(torch.autograd.Function):
    """log p(target) and entropy of softmax(hidden W^T / T) without ever holding all the logits.

    apply(hidden (N, H), weight (V, H), target (N,), temperature, chunk) -> log_prob (N,), entropy (N,), both fp32.

    chunk: most rows at once, None: as many as ROWS x BLOCK logits allow. With z = hidden W^T / T:
        d log p(y) / d hidden = ((1 - p_y) W_y - sum over j != y of p_j W_j) / T
        d H / dz_j = -p_j (log p_j + H)
    A row's loss enters the first by a factor only, so it is computed with the log-prob and scaled in the backward pass.
    The second, needed with an entropy bonus alone, computes the logits again, and so does a W that is trained:
        d loss / d W = (d loss / d z)^T hidden / T, from d log p(y) / dz_j = [j = y] - p_j and the line above.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature=1.0, chunk=None):
        """(log-probs, entropies); where a gradient will be asked for, d log p(y) / d hidden is computed on the way."""
        count, (needed, trained) = hidden.shape[0], ctx.needs_input_grad[:2]
        log_prob, entropy, log_z = (torch.empty(count, device=hidden.device) for _ in range(3))
        # d log p(y) / d hidden, fp32; a trained head needs the logits again anyway, and takes both gradients then
        slope = torch.empty(hidden.shape, device=hidden.device) if needed and not trained else None
        for rows in _row_chunks(count, weight, chunk):
            into = slope[rows] if slope is not None else None
            log_prob[rows], entropy[rows], log_z[rows] = _one_pass(
                hidden[rows], weight, target[rows], temperature, into
            )
        if needed:
            ctx.save_for_backward(hidden, weight, target, log_z, entropy, slope)
            ctx.temperature, ctx.chunk = temperature, chunk
            ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, grad_entropy):
        """The gradient for `hidden` (N, H) in its dtype; None for everything else."""
        hidden, weight, target, log_z, entropy, slope = ctx.saved_tensors
        if grad_log_prob is None and grad_entropy is None:
            return None, None, None, None, None
        if ctx.needs_input_grad[1]:
            of_hidden, of_weight = _with_head(ctx, grad_log_prob, grad_entropy)
            return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), None, None, None
        # in place: a second backward pass over it would be wrong, and autograd refuses one
        grad_hidden = slope.mul_(grad_log_prob[:, None]) if grad_log_prob is not None else slope.zero_()
        if grad_entropy is not None:
            for rows in _row_chunks(hidden.shape[0], weight, ctx.chunk):
                sums = torch.zeros_like(slope[rows])
                for w, _, _, z in _blocks(hidden[rows], weight, target[rows], ctx.temperature):
                    log_p = z.sub_(log_z[rows, None])
                    p = log_p.exp()
                    dz = log_p.add_(entropy[rows, None]).mul_(p).mul_(-grad_entropy[rows, None])
                    _add_product(sums, dz, w)
                grad_hidden[rows] += sums.div_(ctx.temperature)
        return grad_hidden.to(hidden.dtype), None, None, None, None


def _with_head(ctx, grad_log_prob, grad_entropy) -> tuple[torch.Tensor, torch.Tensor]:
    """(d loss / d hidden (N, H), d loss / d W (V, H)), both fp32, where the head is trained: block by block."""
    hidden, weight, target, log_z, entropy, _ = ctx.saved_tensors
    of_hidden, of_weight = (torch.zeros(t.shape, device=t.device) for t in (hidden, weight))
    for rows in _row_chunks(hidden.shape[0], weight, ctx.chunk):
        inputs, start = hidden[rows] if hidden.is_cuda else hidden[rows].float(), 0
        for w, at, inside, z in _blocks(hidden[rows], weight, target[rows], ctx.temperature):
            log_p = z.sub_(log_z[rows, None])
            p, log_p_y = log_p.exp(), log_p.gather(1, at)
            dz = torch.zeros_like(p)
            if grad_log_prob is not None:
                g = grad_log_prob[rows, None]
                dz.addcmul_(p, g, value=-1)
                # 1 - p_y as -expm1(log p_y): a difference of nearly equal numbers for confident words otherwise
                dz.scatter_(1, at, torch.where(inside, -g * log_p_y.expm1(), dz.gather(1, at)))
            if grad_entropy is not None:
                dz.sub_(log_p.add_(entropy[rows, None]).mul_(p).mul_(grad_entropy[rows, None]))
            _add_product(of_hidden[rows], dz.clone(), w)  # a copy: it may be overwritten
            _add_product(of_weight[start : start + len(w)], dz.t(), inputs)
            start += len(w)
    return of_hidden.div_(ctx.temperature), of_weight.div_(ctx.temperature)


def _row_chunks(count: int, weight: torch.Tensor, chunk: int | None) -> list[slice]:
    """`count` rows in slices of at most `chunk`, or of as many as ROWS x BLOCK logits allow."""
    columns = min(weight.shape[0], BLOCK[weight.device.type])
    chunk = chunk or ROWS * BLOCK[weight.device.type] // columns
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def _blocks(hidden, weight, target, temperature):
    """Yields (weights (columns, H), the target's column (rows, 1), whether it is in this block (rows, 1), fp32 logits
    (rows, columns)) block by block; the logits share one buffer."""
    width = min(weight.shape[0], BLOCK[weight.device.type])
    if not hidden.is_cuda:  # no half-precision product with an fp32 result there
        hidden = hidden.float()
    buffer = hidden.new_empty(hidden.shape[0] * width) if not hidden.is_cuda else None
    for start in range(0, weight.shape[0], width):
        w = weight[start : start + width]
        w = w if w.is_cuda else w.float()
        out = buffer[: hidden.shape[0] * len(w)].view(-1, len(w)) if buffer is not None else None
        z = head_logits(hidden, w, out)
        column = target[:, None] - start
        yield (
            w,
            column.clamp(0, len(w) - 1),
            (column >= 0) & (column < len(w)),
            z if temperature == 1 else z.div_(temperature),
        )


def _one_pass(hidden, weight, target, temperature, slope=None):
    """(log p(y), entropy, log sum e^z), each (rows,), in one pass over the vocabulary; fills slope (rows, H) if given.

    With m the largest z so far and u = z - m, three sums over the words j != y: s = sum e^u, us = sum u e^u, and
    sum e^u W. They are rescaled when a block holds a larger z (online softmax: Milakov and Gimelshein 2018,
    arXiv 1805.02867, algorithm 3). The target stays out of them so that 1 - p_y is exact for confident words too.
    """
    m, z_y = (hidden.new_full((hidden.shape[0], 1), fill, dtype=torch.float32) for fill in (-torch.inf, 0.0))
    s, us = torch.zeros_like(m), torch.zeros_like(m)
    sums = slope.zero_() if slope is not None else None
    for w, at, inside, z in _blocks(hidden, weight, target, temperature):
        z_y = torch.where(inside, z.gather(1, at), z_y)
        m_new = torch.maximum(m, z.amax(1, keepdim=True))
        u = z.sub_(m_new)
        e = u.exp()
        e.scatter_(1, at, torch.where(inside, 0.0, e.gather(1, at)))
        shift = torch.where(s > 0, m - m_new, 0.0)  # the first block has nothing to rescale: -inf times 0
        scale = shift.exp()
        us = (us + shift * s).mul_(scale).add_(torch.linalg.vecdot(e, u)[:, None])
        s, m = s.mul_(scale).add_(e.sum(1, keepdim=True)), m_new
        if sums is not None:
            _add_product(sums.mul_(scale), e, w)
    u_y = z_y - m
    total = s + u_y.exp()
    log_total = total.log()
    if sums is not None:
        sums.neg_().addcmul_(weight.index_select(0, target).float(), s).div_(total * temperature)
    entropy = log_total - (us + u_y * u_y.exp()) / total
    return tuple(x.squeeze(1) for x in (u_y - log_total, entropy, m + log_total))


def _add_product(sums: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor) -> None:
    """sums (rows, H) += factor (rows, columns) fp32 times weight (columns, H); may overwrite factor.

    Against half-precision weights the factor goes in as the sum of two numbers of that precision: rounded to one, the
    gradient would be off by 1e-3.
    """
    if weight.dtype == torch.float32:
        sums.addmm_(factor, weight)
        return
    high = factor.to(weight.dtype)
    low = factor.sub_(high).to(weight.dtype)
    for part in (high, low):
        sums.add_(torch.mm(part, weight, out_dtype=torch.float32))


def micro_batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: rows x longest row <= token_budget, save for one row."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def right_padded(
    pairs: list[tuple[list[int], list[int]]], pad_id: int, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (samples, time) of (prompt, response) pairs, and the flat indices (tokens,) of the states that predict
    the first `most` tokens of each response (None: all). The state at a token is about the next one."""
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids, position = torch.full((len(pairs), length), pad_id), []
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        start = row * length + len(prompt) - 1
        position += range(start, start + len(response[:most]))
    return ids, torch.tensor(position, dtype=torch.int64)


def share_prompts(prompts: list[list[int]], responses: list[list[int]], longest: int) -> list[list[int]]:
    """Indices of samples that go into one row: those of one prompt, as long as prompt and responses have at most
    `longest` tokens together; longest 0: every sample alone."""
    rows: list[list[int]] = []
    open_row: dict[tuple, tuple[list[int], int]] = {}  # of each prompt: its last row and the tokens in it
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        key = tuple(prompt)
        row, tokens = open_row.get(key, ([], longest))
        if tokens + len(response) > longest:
            row, tokens = [], len(prompt)
            rows.append(row)
        row.append(i)
        open_row[key] = row, tokens + len(response)
    return rows


def shared_mask(
    rows: int, length: int, spans: list[tuple[int, int, int, int]], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(attention mask (rows, 1, length, length) bool, positions (rows, length)) of rows that hold several responses.

    spans: (row, first, end, prompt length) of every response; it sees its prompt and itself and is placed as if it
    followed the prompt at once. The mask is made on the device: a GPU would wait for a CPU to fill 130 MB.
    """
    owner = torch.zeros(rows, length, dtype=torch.int64)  # 0 is the prompt's, which all see; padding sees what is there
    place = torch.arange(length).repeat(rows, 1)
    for number, (row, first, end, prompt) in enumerate(spans, 1):
        owner[row, first:end] = number
        place[row, first:end] = torch.arange(prompt, prompt + end - first)
    owner, place = owner.to(device), place.to(device)
    seen = owner[:, None, :] == owner[:, :, None]
    seen |= (owner == 0)[:, None, :]
    seen &= torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return seen[:, None], place

"""One step of each kind on fake CUDA tensors, counted: decode with its sampling, prefill, scoring, the update.

    count = decode_step(QWEN25["3B"], "NF4", rows=128)
    count.kernels_on("h100").total(), count.bytes_on("h100").total()

The project's own code runs, by way of its engine and its policy. A model of one layer and one of two are counted; the
others add what the second one does. The Triton kernels cannot be launched: each launch is counted, with the bytes that
it reads and writes, those of the attention with CONTEXT tokens a row.
"""

import contextlib
import functools
import types
from unittest.mock import patch

import torch

from azr.machine.plan import Shape
from azr.policy import decode_triton, lora, triton_attention
from azr.policy.cache import Group, Sequence, pages_for
from azr.policy.decoding import Decoding, Results
from azr.policy.sampling import Sampling, sample_tokens
from azr.policy.scoring import ChunkedLogProb
from fake_policy import fake_cuda, fake_policy
from kernel_count import KernelCount, scaled

CONTEXT = 600  # tokens of a row in the cache: a prompt of 350 and half of an answer of 500
PROMPT, PROMPTS = 350, 23  # tokens, and what fits into a prefill of 8,192
UPDATE = (4, 2048)  # samples, tokens of each: a micro-batch of 8,192
SCORED = 2048  # tokens of log-probs and of scoring: two chunks, all others are alike
RANK = 32
SAMPLING = Sampling(stop=())  # temperature 1, top-p 1
WEIGHTS = {"bf16": ("none", "stored"), "NF4, unpacked for sampling": ("nf4", "bf16"), "NF4": ("nf4", "stored")}


class Launches:
    """Stands in for a Triton kernel: `kernel[grid](arguments)` adds a launch and the bytes of `size(arguments)`."""

    def __init__(self, count: KernelCount, name: str, size):
        self.count, self.name, self.size = count, name, size

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.count.add(self.name, self.size(*args))


@contextlib.contextmanager
def triton_counted(count: KernelCount):
    """The project's Triton kernels are counted instead of launched."""
    with contextlib.ExitStack() as stack:
        for module, kernel, name, size in KERNELS:
            stack.enter_context(patch.object(module, kernel, Launches(count, name, size)))
        yield


def _bytes(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _of_splits(q, k_pages, v_pages, table, *rest) -> int:
    keys = q.shape[0] * CONTEXT * k_pages.shape[2] * q.shape[2] * k_pages.element_size()
    return 2 * keys + _partial(q) + _bytes(q, table)


def _of_combined(partial, log_sum, lengths, out, *rest) -> int:
    return _partial(out) + _bytes(out)


def _partial(q) -> int:
    """fp32 results of the splits of CONTEXT tokens, with a weight each."""
    rows, heads, dim = q.shape
    return rows * heads * -(-CONTEXT // triton_attention.SPLIT) * (dim + 1) * 4


def _of_norm(x, delta, weight, out, *rest) -> int:
    """Where it adds, x is written too; where not, delta is x."""
    return _bytes(x, weight, out) + (_bytes(x, delta) if delta is not x else 0)


def _of_silu(gate, up, out, *rest) -> int:
    return _bytes(gate, up, out)


def _of_rotate(q, k, v, cos, sin, keys, values, page, offset, *rest) -> int:
    """q and k are rotated in place; k and v are written to the cache."""
    return _bytes(q, q, k, k, k, v, v, cos, sin, page, offset)


KERNELS = (
    (triton_attention, "_split_kernel", "attention, splits", _of_splits),
    (triton_attention, "_combine_kernel", "attention, combined", _of_combined),
    (decode_triton, "_norm_kernel", "norm", _of_norm),
    (decode_triton, "_silu_mul_kernel", "silu and product", _of_silu),
    (decode_triton, "_rotate_store_kernel", "rotary and store", _of_rotate),
)


def decoding(policy, rows: int, weights: str):
    """A call of `generate` in its middle: `rows` sequences run, with CONTEXT tokens each."""
    e = policy.engine
    e.attention, e.page_size = "triton", 64  # not chosen by trying it out, as there is nothing to run it
    e.decoder.prepare(weights, 1024)
    sequences = [Sequence(i, tuple(range(PROMPT)), 512) for i in range(rows)]
    return Decoding(e, sequences, PROMPT + 512, SAMPLING, Results(None))


def each_layer(run, shape: Shape, layers: int | None = None) -> KernelCount:
    """run(layers, count) for one layer and for two, scaled to the shape's; `layers`: for so many, not scaled."""
    counts = []
    for number in (layers,) if layers else (1, 2):
        counts.append(KernelCount())
        with fake_cuda():
            run(number, counts[-1])
    return counts[0] if layers else scaled(*counts, shape.layers)


@functools.cache
def decode_step(
    shape: Shape,
    weights: str,
    rows: int,
    lora_rank: int | None = RANK,
    sampling: Sampling = SAMPLING,
    layers: int | None = None,
) -> KernelCount:
    """Hidden states, logits and a token of `rows` sequences. weights: a key of WEIGHTS."""
    quantization, rollout = WEIGHTS[weights]

    @torch.no_grad()
    def run(number: int, count: KernelCount) -> None:
        policy = fake_policy(shape, quantization, lora_rank, number, max_batch=rows)
        d = decoding(policy, rows, rollout)
        token, position = torch.zeros(2, rows, dtype=torch.int64, device="cuda")
        table = torch.zeros(rows, d.width, dtype=torch.int64, device="cuda")
        with triton_counted(count), count:
            hidden = d.hidden(token, position, table)
            logits = policy.engine.head(hidden)
            token, log_prob, entropy, _ = sample_tokens(logits, sampling, position, position, exact=False)
        assert hidden.dtype == torch.bfloat16 and logits.dtype == log_prob.dtype == entropy.dtype == torch.float32
        assert token.dtype == torch.int64 and token.shape == log_prob.shape == entropy.shape == (rows,)

    return each_layer(run, shape, layers)


@functools.cache
def prefill_step(shape: Shape, weights: str, lora_rank: int | None = RANK) -> KernelCount:
    """PROMPTS different prompts of PROMPT tokens."""
    quantization, rollout = WEIGHTS[weights]

    @torch.no_grad()
    def run(number: int, count: KernelCount) -> None:
        policy = fake_policy(shape, quantization, lora_rank, number, max_batch=PROMPTS)
        d = decoding(policy, PROMPTS, rollout)
        pages = pages_for(PROMPT, policy.engine.page_size)
        fresh = [(Group(tuple(range(PROMPT))), list(range(1, pages + 1))) for _ in range(PROMPTS)]
        with triton_counted(count), count:
            d.prefill(fresh)
        assert all(group.logits.dtype == torch.float32 for group, _ in fresh)

    return each_layer(run, shape)


@functools.cache
def scoring(shape: Shape, quantization: str, lora_rank: int | None = RANK) -> KernelCount:
    """`Policy.score` without a gradient, of one sample of SCORED tokens."""

    def run(number: int, count: KernelCount) -> None:
        policy = fake_policy(shape, quantization, lora_rank, number)
        with count:
            scored = next(policy.score([[1] * PROMPT], [[2] * (SCORED - PROMPT)]))
        assert scored.log_prob.dtype == scored.entropy.dtype == torch.float32

    return each_layer(run, shape)


@functools.cache
def log_probs(shape: Shape, backward: bool = True, entropy: bool = False) -> KernelCount:
    """`ChunkedLogProb` of SCORED tokens, its gradient of the hidden states included; no layer."""
    count, tokens = KernelCount(), SCORED
    with fake_cuda():
        hidden = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device="cuda")
        target = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        # autograd's engine has no thread for a pretended device: its two halves are called by hand
        ctx = types.SimpleNamespace(needs_input_grad=(backward, False), set_materialize_grads=lambda value: None)
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        with count, torch.no_grad():
            out = ChunkedLogProb.forward(ctx, hidden, weight, target)
            if backward:
                slope = torch.empty(tokens, device="cuda")
                gradient = ChunkedLogProb.backward(ctx, slope, slope if entropy else None)[0]
                assert gradient.shape == hidden.shape and gradient.dtype == hidden.dtype
        assert all(t.dtype == torch.float32 and t.device.type == "cuda" for t in out)
    return count


def _product_of_a_gpu(a, b):
    return torch.mm(a, b, out_dtype=torch.float32)


@functools.cache
def update(shape: Shape, quantization: str, lora_rank: int = RANK) -> KernelCount:
    """The layers of an update: forward, recomputed, backward. On fake bf16 tensors that say "cpu", since autograd
    refuses a pretended CUDA device: the same modules and operations. The 4-bit product, of more than 1,536 rows, is
    unpacked on every card."""
    counts = []
    for number in (1, 2):
        counts.append(KernelCount(device="cpu"))
        with fake_cuda():
            policy = fake_policy(shape, quantization, lora_rank, number, device="cpu")
            policy.checkpoint_activations()
            policy.model.train()
            ids, mask = torch.zeros(UPDATE, dtype=torch.int64), {"full_attention": None}  # as Policy.score gives it
            with patch.object(lora, "product", _product_of_a_gpu), counts[-1]:
                hidden = policy.backbone(ids, attention_mask=mask, use_cache=False).last_hidden_state
                hidden.backward(torch.empty_like(hidden))
            parameters = policy.trainable_parameters()
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
    return scaled(*counts, shape.layers)

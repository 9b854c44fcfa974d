"""Paged attention of one new token: every backend against a plain softmax in float64.

The Triton kernels run in Triton's interpreter, in a child process: whether it does is fixed when it is imported.
They are also compiled for GPUs, which needs none. Their speed and the flash-attn path need a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the child

from azr.policy import attention as paged_attention
from azr.policy.attention import AttentionError, choose_attention, paged_decode, unusable

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 256, 257, 300]
SHAPES = {
    "qwen-3b": (16, 2, 128),
    "qwen-7b": (28, 4, 128),
    "qwen-0.5b": (14, 2, 64),
    "tiny": (4, 2, 32),
    "no groups": (3, 3, 16),
}


def make_case(lengths, heads, kv_heads, dim, page_size, dtype=torch.float32, shared=0, seed=0):
    """(q, k_pages, v_pages, block_table, lengths) with pages in random order, everything unused NaN.

    The first `shared` pages of every sequence that has them are the same pages.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // page_size) for length in lengths]
    free = torch.randperm(sum(needed) + 5, generator=generator).tolist()
    common = [free.pop() for _ in range(shared)]
    pages = torch.full((2, len(free) + shared, page_size, kv_heads, dim), float("nan"))
    table = torch.full((len(lengths), max(needed) + 2), -1, dtype=torch.int32)
    for row, (length, count) in enumerate(zip(lengths, needed)):
        for j in range(count):
            page = common[j] if j < shared else free.pop()
            table[row, j] = page
            filled = min(page_size, length - j * page_size)
            if pages[:, page, :filled].isnan().any():
                pages[:, page, :filled] = torch.randn(2, filled, kv_heads, dim, generator=generator)
    q = torch.randn(len(lengths), heads, dim, generator=generator)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return q.to(dtype), pages[0].to(dtype), pages[1].to(dtype), table, lengths


def reference(q, k_pages, v_pages, table, lengths, scale):
    """Sequence by sequence and head by head, in float64."""
    out = torch.empty_like(q, dtype=torch.float64)
    group = q.shape[1] // k_pages.shape[2]
    for row, length in enumerate(lengths.tolist()):
        pages = table[row, : -(-length // k_pages.shape[1])].long()
        keys, values = (t[pages].flatten(0, 1)[:length].double() for t in (k_pages, v_pages))
        for head in range(q.shape[1]):
            scores = keys[:, head // group] @ q[row, head].double() * scale
            out[row, head] = scores.softmax(0) @ values[:, head // group]
    return out


def gap(backend, case):
    scale = case[0].shape[-1] ** -0.5
    out = paged_decode(backend, *case, scale)
    assert out.dtype == case[0].dtype and out.shape == case[0].shape
    return (out.double() - reference(*case, scale)).abs().max().item()


# -------------------------------------------------------------------------------------------------------------- sdpa


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("page_size", [1, 32, 256])
def test_sdpa(shape, page_size):
    assert gap("sdpa", make_case(LENGTHS, *shape, page_size)) < 2e-6


def test_sdpa_of_a_single_sequence_and_half_precision():
    assert gap("sdpa", make_case([1], 4, 2, 40, 32)) < 2e-6
    assert gap("sdpa", make_case([77], 4, 2, 40, 32)) < 2e-6
    assert gap("sdpa", make_case(LENGTHS, 16, 2, 128, 32, torch.bfloat16)) < 2e-2


def test_sequences_that_share_pages():
    case = make_case([70, 64, 71, 100, 65], 4, 2, 40, 32, shared=2)
    assert (case[3][:, 0] == case[3][0, 0]).all()
    assert gap("sdpa", case) < 2e-6


def test_pages_stored_head_by_head():
    q, k_pages, v_pages, table, lengths = make_case(LENGTHS, 4, 2, 40, 16)
    k_pages, v_pages = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k_pages, v_pages))
    assert gap("sdpa", (q, k_pages, v_pages, table, lengths)) < 2e-6


# ------------------------------------------------------------------------------------------------------------ choice


def test_auto_without_a_gpu_is_sdpa_and_says_why():
    backend, page_size, why = choose_attention("auto", "cpu", torch.float32, 16, 2, 128)
    assert (backend, page_size) == ("sdpa", paged_attention.PAGE_SIZE["sdpa"])
    assert "flash cannot be used: no CUDA device" in why and "triton cannot be used: no CUDA device" in why


@pytest.mark.parametrize("wanted", ["flash", "triton"])
def test_a_backend_that_was_asked_for_and_cannot_run(wanted):
    with pytest.raises(AttentionError, match=f"--attn {wanted} cannot be used: no CUDA device; take --attn auto"):
        choose_attention(wanted, "cpu", torch.float32, 16, 2, 128)


def test_an_unknown_backend():
    with pytest.raises(AttentionError, match="unknown attention fast: take auto, triton, flash, sdpa"):
        choose_attention("fast", "cpu", torch.float32, 16, 2, 128)


class NoisyDevice:
    """Says it is a GPU; tensors moved `to` it stay where they are (see `probe_on_cpu`)."""

    type = "cuda"


@pytest.fixture
def probe_on_cpu(monkeypatch):
    original = paged_attention._probe_case
    monkeypatch.setattr(paged_attention, "_probe_case", lambda device, *rest: original("cpu", *rest))


def test_flash_attn_that_cannot_be_imported(probe_on_cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    reason = unusable("flash", NoisyDevice, torch.bfloat16, 16, 2, 128)
    assert reason.startswith("ModuleNotFoundError: import of flash_attn halted")
    assert unusable("flash", NoisyDevice, torch.float32, 16, 2, 128) == "flash-attn does not compute in float32"


def test_flash_attn_is_called_as_it_must_be_and_wrong_values_are_noticed(probe_on_cpu, monkeypatch):
    """A stand-in with flash-attn's signature that computes with SDPA; the real one needs a GPU."""
    calls = []

    class Flash:
        wrong = 0.0

        @classmethod
        def flash_attn_with_kvcache(
            cls, q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal, num_splits
        ):
            calls.append((q.shape, k_cache.shape[1] % 256, num_splits, int(block_table.min()), causal))
            out = paged_decode("sdpa", q[:, 0], k_cache, v_cache, block_table, cache_seqlens, softmax_scale)
            return out[:, None] + cls.wrong

    monkeypatch.setitem(sys.modules, "flash_attn", Flash)
    assert unusable("flash", NoisyDevice, torch.bfloat16, 16, 2, 128) is None
    assert calls == [((3, 1, 16, 128), 0, 1, 0, True)]
    Flash.wrong = float("nan")  # what the automatic number of splits has been seen to return
    assert unusable("flash", NoisyDevice, torch.bfloat16, 16, 2, 128) == "it differs from SDPA by nan"


# ------------------------------------------------------------------------------------------------------------ triton

TRITON_CASES = {
    "qwen-3b": dict(shape=(16, 2, 128), lengths=[1, 64, 65, 257]),
    "qwen-7b": dict(shape=(28, 4, 128), lengths=[33, 260]),
    "dim 64, seven heads a group": dict(shape=(28, 4, 64), lengths=[5, 513]),
    "dim 40, page 16": dict(shape=(4, 2, 40), lengths=[1, 16, 47, 300], page_size=16),
    "page 128, fp16": dict(shape=(14, 2, 64), lengths=[130, 256], page_size=128, dtype=torch.float16),
    "more splits than are combined at a time": dict(shape=(2, 1, 16), lengths=[4097, 700]),
    "no groups, page 32": dict(shape=(3, 3, 16), lengths=[31, 32, 33, 290], page_size=32),
}


def triton_report() -> dict:
    """What the child prints: the gap of each case, whether neighbours change a result, the choices it makes."""
    report = {"gap": {}}
    for name, case in TRITON_CASES.items():
        case = dict(page_size=64, dtype=torch.float32) | case
        shape, dtype = case["shape"], case["dtype"]
        report["gap"][name] = gap("triton", make_case(case["lengths"], *shape, case["page_size"], dtype))
    q, k_pages, v_pages, table, lengths = make_case([300, 40, 257], 4, 2, 40, 64)
    together = paged_decode("triton", q, k_pages, v_pages, table, lengths, 0.3)
    wider = torch.cat([table, torch.full((3, 9), -1, dtype=torch.int32)], 1)
    alone = paged_decode("triton", q[:1], k_pages, v_pages, wider[:1], lengths[:1], 0.3)
    report["same bits alone"] = torch.equal(alone[0], together[0])
    report["fp32"] = choose_attention("auto", "cpu", torch.float32, 16, 2, 64)
    report["bf16"] = choose_attention("auto", "cpu", torch.bfloat16, 4, 2, 64)
    return report


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton_kernel_in_the_interpreter(interpreted, name):
    half = TRITON_CASES[name].get("dtype") == torch.float16
    assert interpreted["gap"][name] < (2e-3 if half else 2e-6)


def test_what_a_sequence_gets_does_not_depend_on_its_neighbours(interpreted):
    assert interpreted["same bits alone"]


def test_a_backend_with_wrong_values_is_refused(interpreted):
    """The interpreter multiplies the bits of bfloat16 as integers, so it is a real wrong backend."""
    assert interpreted["fp32"][:2] == ["triton", 64]
    assert (
        interpreted["bf16"][0] == "sdpa" and "triton cannot be used: it differs from SDPA by" in interpreted["bf16"][2]
    )


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_triton_kernel_compiles_for_gpus(capability, tmp_path, monkeypatch):
    """Down to machine code, without a GPU: tensor cores used, no registers spilled, shared memory that GPUs have."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from azr.policy import triton_attention as kernels

    sizes = dict(
        HEADS=16,
        GROUP=8,
        ROWS=16,
        DIM=128,
        COLUMNS=128,
        PAGE=64,
        SPLIT=kernels.SPLIT,
        BLOCK=kernels.BLOCK,
        TOGETHER=kernels.TOGETHER,
    )
    types = dict(
        q="*bf16",
        k_pages="*bf16",
        v_pages="*bf16",
        out="*bf16",
        partial="*fp32",
        log_sum="*fp32",
        block_table="*i32",
        lengths="*i32",
        scale="fp32",
    )
    for kernel in (kernels._split_kernel, kernels._combine_kernel):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in sizes else types.get(n, "i32") for n in names}
        constants = {(i,): sizes[n] for i, n in enumerate(names) if n in sizes}
        multiples = [i for i, n in enumerate(names) if n.endswith("stride") or "*" in signature[n]]
        aligned = {(i,): [["tt.divisibility", 16]] for i in multiples}
        source = ASTSource(kernel, signature, constants, aligned)
        options = dict(num_warps=4, num_stages=2)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]
        assert compiled.metadata.shared < 99 * 1024
        assert ("mma.sync" in compiled.asm["ptx"]) == (kernel is kernels._split_kernel)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["flash", "triton", "sdpa"])
def test_on_a_gpu_and_in_a_cuda_graph(backend, dtype):
    if reason := unusable(backend, torch.device("cuda"), dtype, 16, 2, 128):
        pytest.skip(reason)
    page_size = paged_attention.PAGE_SIZE[backend]
    case = [t.cuda() for t in make_case([1, 63, 64, 257, 900, 2500], 16, 2, 128, page_size, dtype)]
    expected = reference(*case, 128**-0.5)
    paged_decode(backend, *case, 128**-0.5)  # compiles, loads and warms up outside the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode(backend, *case, 128**-0.5)
    graph.replay()
    assert (out.double() - expected).abs().max() < paged_attention.TOLERANCE[dtype]
    case[4].fill_(1)  # the same graph, other lengths
    graph.replay()
    assert (out.double() - reference(*case, 128**-0.5)).abs().max() < paged_attention.TOLERANCE[dtype]


if __name__ == "__main__":
    print(json.dumps(triton_report()))

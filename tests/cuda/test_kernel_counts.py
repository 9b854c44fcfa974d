"""Decode, prefill, scoring and update on fake CUDA tensors of the 3B and 7B shapes: devices, dtypes, waits of the host,
and how many kernels and bytes. docs/performance.md shows the counts and must agree with them."""

import pytest
import torch

from guard import why_no_guard

pytest.importorskip("triton", reason="the attention of a decode step is a Triton kernel (pip install triton)")
pytestmark = [
    pytest.mark.skipif(bool(why_no_guard()), reason=str(why_no_guard())),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

import performance_page
from azr.machine.plan import QWEN25
from azr.policy.sampling import Sampling
from counted_steps import RANK, WEIGHTS, decode_step, log_probs, prefill_step, scoring, update
from fake_policy import attention_of_a_gpu, fake_cuda
from four_bit_rule import CARDS, RuleNotFound, launches
from kernel_count import KernelCount

MODELS = {name: QWEN25[name] for name in performance_page.MODELS}
# Kernels that a step may take, on the card where it takes most. Lower them when a step gets shorter.
DECODE_BARS = {("3B", "bf16"): 704, ("3B", "NF4"): 1676, ("7B", "bf16"): 560, ("7B", "NF4"): 1316}
UPDATE_BARS = {"3B": 11_049, "7B": 8601}
GREEDY, TOP_P, TOP_K = Sampling(temperature=0, stop=()), Sampling(top_p=0.95, stop=()), Sampling(top_k=20, stop=())


def check_rule() -> None:
    try:
        launches("h100", torch.bfloat16, 1, 64, 64)
    except RuleNotFound as error:
        pytest.skip(str(error))


# ----------------------------------------------------------------------------------------------------- a decode step


@pytest.mark.parametrize("rows", performance_page.ROWS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_decode_step_never_waits_and_stays_on_the_card(model, weights, rows):
    count = decode_step(MODELS[model], weights, rows)
    assert not count.waits and not count.strays
    assert not [name for name in count.kernels if "host" in name]


@pytest.mark.parametrize("sampling", [GREEDY, TOP_P, TOP_K], ids=["greedy", "top-p 0.95", "top-k 20"])
@pytest.mark.parametrize("model", MODELS)
def test_no_kind_of_sampling_waits(model, sampling):
    count = decode_step(MODELS[model], "NF4", 16, sampling=sampling)
    assert not count.waits and not count.strays


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("model", MODELS)
def test_without_lora(model, weights):
    count = decode_step(MODELS[model], weights, 16, lora_rank=None)
    assert not count.waits and not count.strays and not count.kernels["addmm_ bf16"]


@pytest.mark.parametrize("model", MODELS)
def test_weights_that_are_unpacked_for_sampling_are_bf16(model):
    one, other = (decode_step(MODELS[model], weights, 128) for weights in ("bf16", "NF4, unpacked for sampling"))
    assert (one.kernels, one.bytes) == (other.kernels, other.bytes) and not other.products


def test_two_layers_tell_of_all_others():
    shape = MODELS["3B"]
    whole, from_two = decode_step(shape, "NF4", 128, layers=shape.layers), decode_step(shape, "NF4", 128)
    assert whole.kernels == from_two.kernels and whole.products == from_two.products
    assert all(abs(whole.bytes[k] - from_two.bytes[k]) <= 1e-9 * whole.bytes[k] for k in whole.bytes | from_two.bytes)


@pytest.mark.parametrize("model, weights", DECODE_BARS)
def test_a_decode_step_has_no_more_kernels_than_before(model, weights):
    check_rule()
    count = decode_step(MODELS[model], weights, 128)
    assert max(count.kernels_on(card).total() for card in CARDS) <= DECODE_BARS[model, weights]


def test_every_weight_is_read_once():
    """A step of one row moves little else: bytes are those of the parameters, to a few per cent."""
    check_rule()
    for model, shape in MODELS.items():
        head = shape.vocabulary * shape.hidden
        lora = 2 * shape.lora_parameters(RANK)
        for weights, a_weight in (("bf16", 2.0), ("NF4", 0.516)):
            read = a_weight * shape.linear_parameters + 2 * head + lora
            moved = decode_step(shape, weights, 1).bytes_on("h100").total()
            assert 1 < moved / read < 1.06, (model, weights, moved, read)


# -------------------------------------------------------------------------------------------- prefill, scoring, update


@pytest.mark.parametrize("weights", ["bf16", "NF4"])
@pytest.mark.parametrize("model", MODELS)
def test_prefill_never_waits(model, weights):
    count = prefill_step(MODELS[model], weights)
    assert not count.waits and not count.strays
    assert count.kernels["_scaled_dot_product_flash_attention"] == MODELS[model].layers


@pytest.mark.parametrize("model", MODELS)
def test_scoring_never_waits(model):
    count = scoring(MODELS[model], "nf4")
    assert not count.waits and not count.strays
    assert count.kernels["_scaled_dot_product_flash_attention"] == MODELS[model].layers


@pytest.mark.parametrize("model, entropy", [("3B", False), ("3B", True), ("7B", False)])
def test_log_probs_never_wait(model, entropy):
    count = log_probs(MODELS[model], entropy=True) if entropy else log_probs(MODELS[model])
    assert not count.waits and not count.strays


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("model", MODELS)
def test_an_update_has_no_more_kernels_than_before(model, quantization):
    check_rule()
    count = update(MODELS[model], quantization)
    assert not count.waits and not count.strays
    assert count.kernels_on("h100").total() <= UPDATE_BARS[model]


# -------------------------------------------------------------------------------------------------------------- page


@pytest.mark.parametrize("name", ["decode", "kinds", "passes"])
def test_the_page_shows_what_is_counted(name):
    check_rule()
    shown = performance_page.section(performance_page.PAGE.read_text(encoding="utf-8"), name)
    assert shown == performance_page.counted(name), (
        "docs/performance.md is old: python tests/cuda/performance_page.py --write"
    )


# ------------------------------------------------------------------------------------------------ the instrument itself


def test_what_is_counted():
    with fake_cuda():
        x, table = torch.empty(8, 4, device="cuda"), torch.empty(1000, 4, device="cuda")
        with KernelCount() as count:
            y = (x.view(4, 8).t() + 1).unsqueeze(0)  # views are free
            table[torch.zeros(3, dtype=torch.int64, device="cuda")]
            y.cpu()
            bool((y > 0).all())
            x.expand(5, 8, 4).sum()
    assert count.waits == ["aten._to_copy.default", "is it true?"] and not count.strays
    assert count.bytes["add"] == 2 * 8 * 4 * 4 and count.bytes["index"] == 2 * 3 * 4 * 4 + 3 * 8
    assert count.kernels["add"] == 1 and count.bytes["sum"] == 8 * 4 * 4 + 4


def test_devices_do_not_mix():
    with fake_cuda(), pytest.raises(RuntimeError, match="at least two devices|two different devices"):
        torch.empty(3, device="cuda") + torch.empty(3)


def test_a_mask_or_fp32_would_cost_attention_its_fast_kernel():
    with fake_cuda():
        q = torch.empty(1, 4, 8, 64, device="cuda", dtype=torch.bfloat16)
        assert attention_of_a_gpu(q, q, q, is_causal=True).shape == q.shape
        for arguments in ((q, q, q, torch.empty(8, 8, device="cuda") > 0), (q.float(), q.float(), q.float())):
            with pytest.raises(RuntimeError, match="would not take its flash kernel"):
                attention_of_a_gpu(*arguments)


def test_bitsandbytes_unpacks_by_rows_and_card():
    check_rule()
    for card in CARDS:
        assert launches(card, torch.bfloat16, 1, 2048, 2048) == 1
        assert launches(card, torch.bfloat16, 8192, 2048, 2048) == 4

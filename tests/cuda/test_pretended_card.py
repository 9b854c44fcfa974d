"""The engine's CUDA branches, run: graphs, memory, back-off, on a card that is pretended on the CPU with real numbers.

The pretended card computes what the CPU computes, so tokens must equal those of the plain CPU path, and it counts what
a GPU would make expensive or impossible: waits of the host, memory that outlives a call.
"""

import contextlib
import gc
import weakref

import pytest
import torch

from azr.policy import attention
from azr.policy import sampling as sampling_module
from azr.policy.backoff import DoesNotFit
from azr.policy.decoding import Decoding
from azr.policy.policy import LoraSettings, Policy
from azr.policy.sampling import Sampling
from guard import why_no_guard
from pretended_card import CARD, HostWait, PretendedCard, on_card
from small_models import made_up_tokenizer, make_model, stirred

pytestmark = pytest.mark.skipif(bool(why_no_guard()), reason=str(why_no_guard()))

PAGE = 32


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Policy:
    """A random model of two layers with an adapter that does something; plain CPU path, one step a block."""
    directory = make_model(tmp_path_factory.mktemp("small"), made_up_tokenizer(), vocab=320)
    return stirred(Policy.load(directory, "none", lora=LoraSettings(rank=4, alpha=8), device="cpu", attn="sdpa"))


def request(prompts: int, n: int, call: int = 0) -> dict:
    """Prompts of different lengths, other ones in each call."""
    ids = [[1 + (31 * i + 7 * j + call) % 250 for j in range(5 + 9 * i)] for i in range(prompts)]
    return dict(prompt_ids=ids, n=n, seeds=[[1000 * call + 10 * i + j for j in range(n)] for i in range(prompts)])


@contextlib.contextmanager
def no_collection():
    """What dies here dies because nothing refers to it, not because Python looked for circles."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def watched(monkeypatch) -> list[weakref.ref]:
    """Weak references to every decoding and its KV cache."""
    references = []
    original = Decoding.run

    def run(self):
        references.extend([weakref.ref(self), weakref.ref(self.cache)])
        return original(self)

    monkeypatch.setattr(Decoding, "run", run)
    return references


def alive(references) -> list[str]:
    return [type(r()).__name__ for r in references if r() is not None]


# ------------------------------------------------------------------------------------------------------- same tokens

CASES = {
    "temperature 1": (Sampling(max_new_tokens=21), {}),
    "greedy": (Sampling(temperature=0, max_new_tokens=9), {}),
    "top-p 0.95": (Sampling(top_p=0.95, max_new_tokens=9), {}),
    "few pages: preempted and prefilled again": (Sampling(max_new_tokens=21, stop=()), {"pages": 9}),
    # who goes on takes the pages of who has ended, whose rows are now padding
    "ends at different times": (Sampling(max_new_tokens=40, stop=()), {"page_size": 4, "limits": [3, 9, 22, 40]}),
}


@pytest.mark.parametrize("name", CASES)
def test_graphs_sample_what_plain_steps_sample(name, watched, monkeypatch, on_cpu):
    """Blocks of 8 steps that no limit is a multiple of, batches of 1 to 12 rows in graphs of 1 to 16."""
    sampling, options = CASES[name]
    options = {"page_size": PAGE, "attn": "sdpa", "max_batch": 12} | options
    limits = options.pop("limits", None)
    monkeypatch.setattr(sampling_module, "CUT", 16)  # so that some rows need the exact truncation
    asked = request(4, 3)
    expected = on_cpu.generate(**asked, sampling=sampling, max_new_tokens=limits)
    with PretendedCard() as card:
        policy = on_card(on_cpu, **options)
        before = card.live
        with no_collection():
            found = policy.generate(**asked, sampling=sampling, max_new_tokens=limits)
            assert not alive(watched) and card.live == before
        assert (
            policy.engine.block == 8
            and card.captures
            and set(card.waits) == {"_to_copy"} | ({"_local_scalar_dense"} if sampling.top_p < 1 else set())
        )
        assert sum(card.waits.values()) <= 3 * (sampling.max_new_tokens // 8 + 1 + 2) * (1 + ("pages" in options))
    pairs = [(a, b) for one, two in zip(expected, found) for a, b in zip(one, two)]
    assert [a.ids for a, _ in pairs] == [b.ids for _, b in pairs]
    assert max(abs(x - y) for a, b in pairs for x, y in zip(a.log_probs, b.log_probs)) < 1e-5


def test_weights_that_are_trained_are_sampled_from_without_a_gradient(on_cpu):
    """As with --train full: logits would be kept for a backward pass, and slices are not added to in place."""
    asked = request(3, 2) | {"sampling": Sampling(max_new_tokens=12, stop=())}
    with PretendedCard():
        policy = on_card(on_cpu, attn="sdpa", page_size=PAGE, max_batch=8)
        policy.model.requires_grad_(True)
        found = policy.generate(**asked)
    assert [[c.ids for c in row] for row in found] == [[c.ids for c in row] for row in on_cpu.generate(**asked)]


def test_attention_auto_without_a_kernel_is_sdpa(capsys, on_cpu):
    with PretendedCard():
        policy = on_card(on_cpu)
    assert policy.engine.attention == "sdpa" and "triton cannot be used" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- nothing outlives its call


class Stopped(Exception):
    pass


def stop_at_the_second(*_, seen=[]):  # noqa: B006
    seen.append(1)
    if len(seen) % 2 == 0:
        raise Stopped


def test_nothing_is_alive_after_a_call_that_raised(watched, on_cpu):
    with PretendedCard() as card:
        policy = on_card(on_cpu, attn="sdpa", page_size=PAGE, max_batch=8)
        before = card.live
        with no_collection():
            with contextlib.suppress(Stopped):
                policy.generate(**request(4, 3), sampling=Sampling(max_new_tokens=12), on_finish=stop_at_the_second)
            assert len(watched) == 2 and not alive(watched) and card.live == before


def test_a_wait_in_a_captured_step_is_refused_and_leaves_nothing(watched, monkeypatch, on_cpu):
    original = attention._sdpa

    def asks(q, keys, values, table, lengths, scale):
        assert lengths.max().item() > 0
        return original(q, keys, values, table, lengths, scale)

    monkeypatch.setattr(attention, "_sdpa", asks)
    with PretendedCard() as card:
        policy = on_card(on_cpu, attn="sdpa", page_size=PAGE, max_batch=8)
        before = card.live
        with no_collection():
            try:
                policy.generate(**request(2, 2), sampling=Sampling(max_new_tokens=12))
                refused = ""
            except HostWait as error:
                refused = str(error)
            assert "_local_scalar_dense while a graph is captured" in refused
            assert not alive(watched) and card.live == before


# -------------------------------------------------------------------------------------- prompts that come in between


@pytest.mark.parametrize(
    "options", [{"page_size": PAGE}, {"page_size": 4, "max_batch": 5}, {"page_size": 8, "pages": 20}]
)
def test_prompts_that_come_into_a_running_batch(options, watched, on_cpu):
    """Into graphs that are captured already, other rows of them, other pages; no more waits, nothing left behind."""
    sampling, first, later = Sampling(max_new_tokens=40, stop=()), request(4, 1), request(4, 3, 1)
    prompts = list(zip(later["prompt_ids"], later["seeds"], [40, 9, 22, 3]))
    expected = on_cpu.generate(**first, sampling=sampling)
    expected += on_cpu.generate(**later, sampling=sampling, max_new_tokens=[40, 9, 22, 3])
    brought = iter([prompts[:1], [], prompts[1:3], prompts[3:]])
    with PretendedCard() as card:
        policy = on_card(on_cpu, **({"attn": "sdpa", "max_batch": 12} | options))
        before, steps = card.live, []
        with no_collection(), pytest.MonkeyPatch.context() as patch:
            honest = Decoding._read  # once a block of steps, and once when samples start
            patch.setattr(Decoding, "_read", lambda self, work: steps.append(1) or honest(self, work))
            found = policy.generate(**first, sampling=sampling, more=lambda: next(brought, None), most=12)
            assert not alive(watched) and card.live == before
        assert card.waits == {"_to_copy": 2 * len(steps)}
    pairs = [(a, b) for one, two in zip(expected, found, strict=True) for a, b in zip(one, two, strict=True)]
    assert [a.ids for a, _ in pairs] == [b.ids for _, b in pairs]
    for a, b in pairs:
        assert a.log_probs + a.entropy == pytest.approx(b.log_probs + b.entropy, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ scoring


def test_answers_that_share_their_prompt_are_scored_without_a_mask_from_the_host(on_cpu):
    """A mask is length x length: 130 MB a micro-batch at full size, which a GPU would wait for."""
    prompts = [[1 + (7 * i) % 250 for i in range(40)]] * 6
    responses = [[2 + (11 * i + j) % 250 for i in range(25 + j)] for j in range(6)]
    expected = on_cpu.score_lists(prompts, responses)
    with PretendedCard() as card:
        policy = on_card(on_cpu, attn="sdpa", page_size=PAGE)
        before = card.sent
        found = policy.score_lists(prompts, responses)
        tokens = len(prompts[0]) + sum(map(len, responses))
        assert card.sent - before < 100 * tokens < tokens**2
    for mine, theirs in zip(found, expected):
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(mine, theirs))


# ----------------------------------------------------------------------------------------------------------- back-off


def propose_and_solve(policy: Policy, calls: range) -> list[tuple[int, int]]:
    """Slots and pages after each call: one answer to each of 6 prompts, then three, and so on."""
    sizes = []
    for call in calls:
        policy.generate(**request(6, 1 + 2 * (call % 2), call), sampling=Sampling(max_new_tokens=8, stop=()))
        sizes.append((policy.engine.max_batch, policy.engine.pages))
    return sizes


def test_twenty_calls_of_propose_and_solve_keep_slots_and_pages(capsys, on_cpu):
    """The card has what the two kinds of call needed at most when memory was plenty, and 5 % more: a cache that
    outlived its call would take the place of the next one's."""
    with PretendedCard() as card:
        policy = on_card(on_cpu, attn="sdpa", page_size=PAGE, max_batch=16, cache_bytes=786_432)
        propose_and_solve(policy, range(2))
        before, card.memory = card.live, card.live + int(1.05 * (card.peak - card.live))
        with no_collection():
            sizes = propose_and_solve(policy, range(20))
            assert card.live == before
    assert sizes == [(16, 48)] * 20
    assert "out of memory" not in capsys.readouterr().err


def test_a_card_that_is_too_small_frees_once_then_halves_and_settles(capsys, on_cpu):
    with PretendedCard() as card:
        policy = on_card(on_cpu, attn="sdpa", page_size=PAGE, max_batch=16, pages=64)
        one = policy.engine.page_bytes()
        card.memory = card.live + 24 * one  # cache_bytes is not looked at: the pages were given
        policy.engine.cache_bytes = 64 * one
        sizes = []
        for call in range(4):
            policy.generate(**request(5, 3, call), sampling=Sampling(max_new_tokens=9, stop=()))
            sizes.append((policy.engine.max_batch, policy.engine.pages))
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert "freed what was cached, and once more" in lines[0] and "max_batch 16 -> " in lines[1]
    assert sum("freed" in line for line in lines) == 1, lines
    assert len(set(sizes)) == 1 and sizes[0][0] < 16


def test_memory_that_suffices_without_prompts_that_come_later_runs_out_twice_and_not_in_every_step(capsys, on_cpu):
    """The repetition is without them, and would fit in each step anew."""
    sampling = Sampling(max_new_tokens=9, stop=())

    def step(policy: Policy, call: int, late: bool = True) -> None:
        brought = iter([[(prompt, [7, 8, 9], 9) for prompt in request(5, 1, call + 50)["prompt_ids"]]])
        more = {"more": lambda: next(brought, None), "most": 15} if late else {}
        policy.generate(**request(5, 1, call), sampling=sampling, **more)

    with PretendedCard() as card:
        policy, peaks = on_card(on_cpu, attn="sdpa", page_size=PAGE, max_batch=20, cache_bytes=1 << 24), []
        before = card.live
        for late in (False, True):
            card.peak = before
            step(policy, 0, late)
            peaks.append(card.peak)
        card.memory = sum(peaks) // 2
        for call in range(4):
            step(policy, call)
    lines = [line.split(": ")[2] for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert lines[0].startswith("freed") and lines[1].startswith("max_batch 20 -> 10") and len(lines) == 2, lines


def test_a_card_on_which_nothing_fits_says_so(on_cpu):
    with PretendedCard() as card:
        policy = on_card(on_cpu, attn="sdpa", page_size=PAGE, max_batch=4, pages=16)
        policy.engine.cache_bytes, card.memory = 16 * policy.engine.page_bytes(), card.live + 1000
        with pytest.raises(DoesNotFit, match="lower --max-new-tokens or --prompt-tokens"):
            policy.generate(**request(2, 2), sampling=Sampling(max_new_tokens=8, stop=()))


# ------------------------------------------------------------------------------------------------ the instrument itself


def test_what_waits_is_counted_and_refused_under_capture():
    waits = {
        "item": lambda x: x.sum().item(),
        "bool": lambda x: bool(x.any()),
        "nonzero": lambda x: x.nonzero(),
        "mask": lambda x: x[x > 1],
        "equal": lambda x: torch.equal(x, x),
        "cpu": lambda x: x.cpu(),
        "tolist": lambda x: x.tolist(),
        "to host": lambda x: torch.zeros(3).copy_(x),
        "from host": lambda x: x.copy_(torch.zeros(3)),
    }
    with PretendedCard() as card:
        x = torch.arange(3.0, device="cuda")
        for name, wait in waits.items():
            before = sum(card.waits.values())
            wait(x)
            assert sum(card.waits.values()) == before + (name != "from host"), name
            with pytest.raises(HostWait), torch.cuda.graph(torch.cuda.CUDAGraph()):
                wait(x)


def test_devices_do_not_mix():
    with PretendedCard():
        x = torch.ones(3, device="cuda")
        assert (x + torch.tensor(1.0)).device == CARD  # a number of the host is taken
        with pytest.raises(RuntimeError, match="tensors on cuda:0 and a CPU tensor of shape"):
            x + torch.ones(3)


def test_a_graph_replays_into_the_same_memory_and_keeps_numbers_of_the_host():
    with PretendedCard():
        graph, x, factor = torch.cuda.CUDAGraph(), torch.ones(3, device="cuda"), 2
        with torch.cuda.graph(graph):
            y = x[:2] * factor
            y[0] = 7
        x.fill_(5)
        factor = 3  # what Python computed at the capture stays as it was
        graph.replay()
        assert y.tolist() == [7, 10]


def test_memory_is_counted_by_storage_and_freed_memory_stays_reserved():
    with PretendedCard(memory=1000) as card:
        x = torch.zeros(100, device="cuda")
        y = x.view(10, 10)[3:]
        del x
        assert card.live == 400 and torch.cuda.mem_get_info() == (600, 1000)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(200, device="cuda")
        del y
        assert card.live == 0 and torch.cuda.mem_get_info() == (600, 1000)
        torch.cuda.empty_cache()
        assert torch.cuda.mem_get_info() == (1000, 1000)

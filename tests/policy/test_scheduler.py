"""Who runs and on which pages: the scheduler alone, with a made-up device that samples nothing."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from azr.policy.cache import Pages, Sequence, pages_for
from azr.policy.scheduler import Scheduler

PAGE = 4


def made(sequences: list[Sequence], slots: int = 8, pages: int = 40, prefill_tokens: int = 64) -> Scheduler:
    return Scheduler(sequences, slots, Pages(pages), PAGE, prefill_tokens)


def samples(*prompts: tuple[int, ...], n: int = 1, limit: int = 6) -> list[Sequence]:
    return [Sequence(i * n + j, prompt, limit) for i, prompt in enumerate(prompts) for j in range(n)]


def pages_in_use(scheduler: Scheduler) -> Counter:
    lists = [s.pages for s in scheduler.running] + [group.pages or [] for group in scheduler.waiting]
    return Counter(page for pages in lists for page in pages)


def test_samples_of_a_prompt_share_its_full_pages_and_get_a_copy_of_the_last():
    scheduler = made(samples(tuple(range(10)), n=3))
    new = scheduler.admit()
    [(group, pages)] = new.fresh
    assert len(pages) == 3 and len(new.starts) == 3 and group.pages is None
    first, second, third = (s.pages for s in scheduler.running)
    assert first[:2] == second[:2] == third[:2] == pages[:2]
    assert third[2] == pages[2] and new.copies == [(pages[2], first[2]), (pages[2], second[2])]


def test_few_free_slots_are_not_worth_a_prefill():
    scheduler = made(samples(*[(i,) for i in range(40)]), slots=16, pages=200)
    assert scheduler.may_admit()
    scheduler.admit()
    assert len(scheduler.running) == 16 and not scheduler.may_admit()
    scheduler.retire({scheduler.running[3]})
    assert not scheduler.may_admit()  # one of sixteen is free; an eighth is two
    scheduler.retire({scheduler.running[0]})
    assert scheduler.may_admit()


def test_the_newest_is_preempted_waits_in_front_and_nobody_is_admitted_until_one_ends():
    scheduler = made(samples((1, 2, 3), (4, 5, 6), (7, 8, 9), limit=20), slots=3, pages=4)
    scheduler.admit()
    oldest, newest = scheduler.running  # the third found no page to grow into
    for sequence in scheduler.running:
        sequence.ids += [0] * 6
    scheduler.reserve(2)
    assert scheduler.running == [oldest] and len(oldest.pages) == 3 and newest.pages == []
    assert scheduler.waiting[0].tokens == newest.prompt + (0,) * 6
    assert not scheduler.may_admit()
    scheduler.retire({oldest})
    assert scheduler.may_admit()


@pytest.mark.parametrize("seed", range(20))
def test_every_page_is_used_as_often_as_it_is_listed_and_every_sample_ends(seed):
    """Random prompts, limits and sizes; each step every running sample gets tokens, and ends at its limit."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(50) for _ in range(rng.randint(1, 14))) for _ in range(8)]
    sequences = samples(*prompts, n=rng.randint(1, 5), limit=rng.randint(1, 12))
    longest = max(pages_for(len(s.prompt) + s.limit, PAGE) for s in sequences)
    pages = rng.randint(longest, 4 * longest)
    scheduler = made(sequences, rng.randint(1, 12), pages, rng.randint(8, 64))
    ended = 0
    for _ in range(10_000):
        if not (scheduler.waiting or scheduler.running):
            break
        new = scheduler.admit() if scheduler.may_admit() else None
        stepped = [s for _, s in new.starts] if new and new.starts else scheduler.running
        if not new or not new.starts:
            if not scheduler.running:
                scheduler.drop_held()
                continue
            scheduler.reserve(1)
            stepped = scheduler.running
        for sequence in stepped:
            sequence.ids.append(0)
            assert len(sequence.pages) * PAGE >= sequence.cached
        finished = {s for s in stepped if len(s.ids) >= s.limit}
        scheduler.retire(finished)
        ended += len(finished)
        if rng.random() < 0.2:
            before = [list(s.pages) for s in scheduler.running]
            new = dict(scheduler.compact())
            assert [s.pages for s in scheduler.running] == [[new.get(page, page) for page in row] for row in before]
        in_use = pages_in_use(scheduler)
        assert [in_use[page] for page in range(1, pages + 1)] == scheduler.pages.users[1:]
        assert len(scheduler.pages.free) == pages - len(in_use)
    assert ended == len(sequences) and len(scheduler.pages.free) == pages


def test_compacted_pages_of_one_sample_lie_below_and_shared_ones_above():
    scheduler = made(samples(tuple(range(9)), tuple(range(20, 28)), n=3), pages=30)
    scheduler.admit()
    longest = scheduler.running[0]
    scheduler.retire({longest, scheduler.running[4]})
    before = [list(s.pages) for s in scheduler.running]
    new = dict(scheduler.compact())
    assert [s.pages for s in scheduler.running] == [[new.get(page, page) for page in row] for row in before]
    alone, shared = ({p for p, n in pages_in_use(scheduler).items() if (n > 1) == many} for many in (False, True))
    assert alone == {1, 2} and shared == {27, 28, 29, 30}
    assert scheduler.pages.take() == 3


def test_scheduling_needs_no_torch():
    code = "import sys, azr.policy.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0

"""What is worked out before its phase: nothing of a step depends on it, nor on how fast the sandbox is."""

import contextlib
import dataclasses
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from arms_world import World

import train_azr
from azr.policy.sampling import Completion
from azr.runs import Run
from azr.stop import StopRequest
from azr.tasks import MODES, Parsed, solve_prompt
from azr.train import ahead
from azr.train.ahead import RememberingSandbox
from sandbox import Job

SETTINGS = {"prompts_per_mode": 4, "max_new_tokens": 64}
ALIKE = {"temperature": 0.1, "references": 1, "prompts_per_mode": 10}  # many proposals of a step are the same


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world, threads = World(tmp_path_factory.mktemp("ahead"), RememberingSandbox), torch.get_num_threads()
    torch.set_num_threads(1)
    yield world
    torch.set_num_threads(threads)
    world.close()


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(ahead, "pays", lambda s: True)


def steps(world, tmp_path, count: int = 1, **settings) -> SimpleNamespace:
    """Some steps: (samples of each, losses of each), what was sampled in phase 3, what was sampled ahead."""
    result = SimpleNamespace(samples=[], losses=[], later=0, ahead=0)
    with StopRequest() as stop, Run.open(tmp_path, {"steps": 0}, "none") as run:
        s = world.state(run, stop, **(SETTINGS | settings))
        s.run, honest = run, s.policy.generate

        def generate(prompts, n, *rest, **more):
            rows = honest(prompts, n, *rest, **more)
            result.later += len(prompts) * (n > 1)
            result.ahead += len(rows) - len(prompts)
            return rows

        s.policy.generate = generate
        try:
            for step in range(1, count + 1):
                metrics, proposals, answers = train_azr.train_step(s, step)
                result.samples.append([dataclasses.replace(sample, entropy=[]) for sample in proposals + answers])
                result.losses.append({k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/"))})
        finally:
            del s.policy.generate
        assert s.ahead is None and s.sandbox.memory is None
    return result


def told(result) -> list:
    """All that a sample says but for log-probs, which other batches round otherwise."""
    return [
        [
            (x.prompt, x.response, x.task, x.reason, x.detail, x.correct, x.reward, x.solve_rate, x.group)
            for x in samples
        ]
        for samples in result.samples
    ]


@pytest.mark.parametrize("settings", [{}, ALIKE, {"recipe": "azr"}, {"max_batch": 5}], ids=str)
def test_a_step_is_what_it_is_phase_by_phase(world, tmp_path, monkeypatch, settings):
    count = 1 if settings else 2
    stream = steps(world, tmp_path / "stream", count, **settings)
    monkeypatch.setattr(ahead, "pays", lambda s: False)
    phases = steps(world, tmp_path / "phases", count, **settings)
    assert told(stream) == told(phases)
    for one, other in zip(stream.losses, phases.losses):
        assert one.keys() == other.keys()
        assert [x or 0 for x in one.values()] == pytest.approx(
            [x or 0 for x in other.values()], rel=1e-3, abs=1e-4, nan_ok=True
        )
    assert phases.ahead == 0 < stream.ahead and stream.later < phases.later
    if settings == ALIKE:  # where the order of proposals decides: some are repeated within the step
        assert sum("in this batch" in x.detail for samples in stream.samples for x in samples)


def test_how_fast_the_sandbox_is_decides_nothing(world, tmp_path, monkeypatch):
    """Bit for bit, log-probs among it: who runs beside whom follows from steps of decoding, not from the clock."""
    quick, dice = steps(world, tmp_path / "quick"), random.Random(0)
    honest = RememberingSandbox._remembered

    def slow(self, *asked):
        time.sleep(dice.choice((0, 0.1, 0.3)))
        return honest(self, *asked)

    monkeypatch.setattr(RememberingSandbox, "_remembered", slow)
    slow = steps(world, tmp_path / "slow")
    assert quick.samples == slow.samples and quick.ahead == slow.ahead > 0
    assert str(quick.losses) == str(slow.losses)


def test_a_cpu_does_not_share_its_cores(world, tmp_path, monkeypatch):
    monkeypatch.undo()
    assert steps(world, tmp_path).ahead == 0


@pytest.mark.parametrize("proposer", ["frozen-base", "separate"])
def test_proposals_of_other_weights_are_sampled_alone(world, tmp_path, proposer):
    assert steps(world, tmp_path, proposer=proposer).ahead == 0


def test_a_job_that_ran_is_not_run_again():
    with RememberingSandbox(1) as sandbox:
        job = Job("def f(x):\n    return x + 1", ("1", "2"))
        first, before = sandbox.run([job, job]), sandbox.state["children"]
        assert sandbox.run([job]) == first[:1] and sandbox.state["children"] == before + 1  # it has no memory yet
        sandbox.memory = {}
        for _ in range(3):
            assert sandbox.run([job, Job("def f(x):\n    return x", ("1",))])[0] == first[0]
        assert sandbox.state["children"] <= before + 3
        assert sandbox.validate([job]) == [first[0]]  # asked more strictly: not the same question


def test_after_a_stop_nothing_is_remembered(world, tmp_path):
    with StopRequest() as stop, Run.open(tmp_path, {"steps": 0}, "none") as run:
        s = world.state(run, stop, **SETTINGS)
        with contextlib.suppress(KeyboardInterrupt), ahead.working(s, 1):
            s.ahead.worker.submit(time.sleep, 0.1)
            raise KeyboardInterrupt
        assert s.ahead is None and s.sandbox.memory is None


def test_a_stop_does_not_wait_for_programs_that_run(world, tmp_path):
    """64 answers that loop take two cores a minute and more; a spot machine is gone after half of one."""
    with StopRequest() as stop, Run.open(tmp_path, {"steps": 0}, "none") as run:
        s, over = world.state(run, stop, **SETTINGS), threading.Event()
        with contextlib.suppress(KeyboardInterrupt), ahead.working(s, 1):
            looping = s.ahead.worker.submit(over.wait, 60)
            raise KeyboardInterrupt
        assert not looping.done()
        over.set()


def test_no_prompt_is_brought_that_the_engine_has_no_room_for(world, tmp_path):
    """It makes room for the longest prompt that it can sample, not for one that it refuses."""
    refused, ended = Completion([], [], "too_long"), Completion([5], [0.0], "stop")
    with StopRequest() as stop, Run.open(tmp_path, {"steps": 0}, "none") as run:
        s = world.state(run, stop, **SETTINGS)
        tasks = [task for mode in MODES for task in s.buffers.sample(mode, 4, random.Random(0))]
        lengths = sorted(len(s.policy.encode(solve_prompt(task, s.template))) for task in tasks)
        with ahead.working(s, 1):
            s.ahead.expect([[1] * lengths[0], [1] * lengths[-1]], lambda *_, **__: None)
            assert len(list(s.ahead._requests(tasks))) == len(tasks)
            s.ahead.proposed(1, refused, Parsed(False, None, "too_long", ""))
            s.ahead.proposed(0, ended, Parsed(False, None, "no_format", ""))
            assert {len(prompt) for prompt, *_ in s.ahead._requests(tasks)} == {lengths[0]} < set(lengths)


def test_without_memory_the_phases_wait_for_each_other(world, tmp_path, monkeypatch, capsys):
    """When memory runs out the call is made again, of the proposals alone; the answers come in their own phase."""
    whole, failures = steps(world, tmp_path / "whole"), iter([torch.OutOfMemoryError("CUDA out of memory.")])
    engine = type(world.policy.engine)
    honest = engine.generate

    def generate(self, *rest, **more):
        rows = honest(self, *rest, **more)
        if more.get("more") and (error := next(failures, None)):
            raise error
        return rows

    monkeypatch.setattr(engine, "generate", generate)
    other = steps(world, tmp_path / "other")
    assert told(other) == told(whole) and other.ahead == 0
    assert "out of memory in sampling" in capsys.readouterr().err

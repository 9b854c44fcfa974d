"""No idle tail: while the last proposals of a step are sampled, the first are validated and already answered.

    with ahead.working(s, step):                # in train_azr.py, around phases 1 to 3
        proposals = propose(s, step)            # rollouts.generate lets the engine take in the prompts of valid tasks
        validate_all(s, proposals)              # the sandbox has run these jobs
        answers = solve(s, step, tasks, n)      # rollouts.generate has these completions

The phases do what they always do, in their order, and decide everything: who is a duplicate, which tasks are solved, in
which order. What is new is that most of what they ask for is there. A response follows from its prompt and its seed,
an outcome from its job, so working ahead changes no sample but by the rounding of sums in another batch, and what was
worked out in vain (a task that turns out to be a duplicate) costs time alone.

Nor does it make a run depend on the clock: the engine looks for prompts every so many steps of decoding
(decoding.LOOK). The proposals that have ended by then are validated together in a thread, and the prompts that come of
them enter the batch LAG looks later, whether or not they could have been there sooner; if they are late, sampling waits
for them.

Left out: proposals and answers of different weights (an adapter each, a frozen proposer), several processes, engines
without a batch that others can enter, CPUs: there the phases wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

from azr.tasks import judge, parse_answer, solve_prompt, validate
from azr.tasks.duplicates import duplicate_key, instance_key
from azr.train import data
from azr.train.arms import Arm
from azr.train.rollouts import seeds_of
from sandbox import Sandbox

if TYPE_CHECKING:
    from azr.tasks import Parsed, Task
    from azr.tasks.task import Proposal

# Looks of the engine in which a batch of proposals is validated: the prompts of its tasks come in after so many, or
# when nothing else runs. Few, and sampling waits for a slow sandbox; many, and they come late: 8 instead of 1 costs a
# card 0.8 % of sampling (tests/bench_ahead.py), and is more than a second of decoding.
LAG = 8
VALIDATED, JUDGED = 8, 64  # proposals, answers at a time: the sandbox has a process for each of a few, not of many


class RememberingSandbox(Sandbox):
    """A Sandbox with a memory, while it has one: a job that ran is not run again, and has the same outcomes."""

    memory: dict | None = None

    def run(self, jobs):
        """As Sandbox.run."""
        return self._remembered("run", super().run, list(jobs))

    def validate(self, jobs):
        """As Sandbox.validate."""
        return self._remembered("validate", super().validate, list(jobs))

    def _remembered(self, kind: str, work, jobs: list) -> list:
        memory = self.memory
        if memory is None:
            return work(jobs)
        missing = [job for job in dict.fromkeys(jobs) if (kind, job) not in memory]
        fresh = dict(zip(missing, work(missing) if missing else []))
        # what the machine failed in is asked again
        whole = {job: row for job, row in fresh.items() if all(outcome.status != "infra" for outcome in row)}
        memory.update({(kind, job): row for job, row in whole.items()})
        return [fresh[job] if job in fresh else memory[kind, job] for job in jobs]


def pays(s) -> bool:
    """On a GPU, which waits for nothing that runs beside it. A CPU samples on the cores that the sandbox needs: a step
    of the embedded model took 3.82 s instead of 3.50 with two threads on two cores, 3.69 instead of 3.57 with one."""
    return s.policy.device.type != "cpu"


def possible(s) -> bool:
    """Whether one engine call can sample proposals and answers."""
    own = [
        arm for arm in s.arms.arms if type(arm).adapter is not Arm.adapter or type(arm).proposing is not Arm.proposing
    ]
    return s.arms.proposes and not own and isinstance(s.sandbox, RememberingSandbox)


@contextmanager
def working(s, step: int) -> Iterator[None]:
    """Inside, the phases of a step work ahead where that is possible and pays."""
    if not (pays(s) and possible(s)):
        yield
        return
    worker, whole = ThreadPoolExecutor(1, "ahead"), False
    s.ahead, s.sandbox.memory = Ahead(s, step, worker), {}
    try:
        yield
        whole = True
    finally:
        s.ahead = s.sandbox.memory = None
        # A stop does not wait for what nobody will ask for: programs that loop can take minutes. The thread ends when
        # the sandbox is closed.
        worker.shutdown(wait=whole, cancel_futures=True)


class Ahead:
    """What is worked out ahead of its phase in one step."""

    def __init__(self, s, step: int, worker: ThreadPoolExecutor) -> None:
        self.s, self.key, self.worker = s, f"{step}/solve", worker
        self.completions: dict[tuple, object] = {}  # by (prompt ids, seed)
        self.known, self.held_out = s.buffers.keys(), s.evaluation.refused
        self.proposals: list[Proposal] = []  # that have ended since the last look
        self.in_work: deque[Future | None] = deque()  # of the last LAG looks: their valid tasks
        self.sampling = self.proposing = 0  # samples that have not ended, and the proposals among them
        self.asked: list[tuple[Task, tuple, list[int]]] = []  # by the place of a prompt among those brought: its seeds
        self.answers: list[tuple[Task, str]] = []  # that have ended since the last look
        self.judged: list[Future] = []
        self.lengths: list[int] = []  # of the prompts of the proposals: the engine has room for no longer one

    # -- before, during (called by the engine, in its thread) and after the sampling of the proposals

    def expect(self, prompts: list[list[int]], advance) -> dict:
        """A proposal to each of these is sampled now; what Policy.generate needs to know. advance: a console.pulse."""
        self.advance = advance
        self.sampling = self.proposing = len(prompts)
        self.lengths = [len(prompt) for prompt in prompts]
        return {"more": self.more, "most": len(prompts) * self.s.config.answers}

    def proposed(self, place: int, completion, parsed: Parsed) -> None:
        """The proposal to the prompt at this place has ended."""
        if completion.finish_reason == "too_long":  # refused, before any other has ended: no room was made for it
            self.lengths[place] = 0
        self.sampling -= 1
        self.proposing -= 1
        if parsed.value is not None:
            self.proposals.append(parsed.value)

    def answered(self, place: int, j: int, completion) -> None:
        """An answer to a prompt that `more` brought has ended."""
        task, prompt, seeds = self.asked[place]
        self.completions[prompt, seeds[j]] = completion
        self.sampling -= 1
        self.answers.append((task, self.s.policy.decode(completion.ids)))

    def more(self) -> list[tuple] | None:
        """Prompts of tasks that are valid by now, each with seeds and limit; None once nothing can come any more."""
        last, due = not self.proposing, []
        if len(self.answers) >= JUDGED:
            self.judged.append(self.worker.submit(self._judge, self.answers))
            self.answers = []
        if len(self.proposals) >= VALIDATED or (last and self.proposals):
            self.in_work.append(self.worker.submit(self._validate, self.proposals))
            self.proposals = []
        else:
            self.in_work.append(None)
        while len(self.in_work) > (LAG if self.sampling else 0):
            due.append(self.in_work.popleft())
        requests = [request for future in due if future for request in self._requests(future.result())]
        new = sum(len(seeds) for _, seeds, _ in requests)
        self.sampling += new
        self.advance(0, more=new)
        return requests if self.sampling else None

    def settle(self) -> None:
        """Waits for what is being judged: the phase that asks for it would run it a second time."""
        wait(self.judged)

    def _requests(self, tasks: list[Task]) -> Iterator[tuple]:
        config = self.s.config
        for task in tasks:
            prompt = tuple(self.s.policy.encode(solve_prompt(task, self.s.template)))
            if len(prompt) <= max(self.lengths) and data.fits(self.s, task):
                seeds = seeds_of(self.s, self.key, task.hash, config.answers)
                self.asked.append((task, prompt, seeds))
                yield prompt, seeds, config.max_new_tokens

    # -- in the worker's thread

    def _validate(self, proposals: list[Proposal]) -> list[Task]:
        """The new valid tasks. Which of two alike is the duplicate the phase decides; here the later one is."""
        verdicts = validate(proposals, self.s.sandbox, self.known, held_out=self.held_out)
        tasks = [verdict.task for verdict in verdicts if verdict.ok]
        self.known |= {key for task in tasks for key in (duplicate_key(task), instance_key(task))}
        return tasks

    def _judge(self, answers: list[tuple[Task, str]]) -> None:
        pairs = [(task, parse_answer(task.mode, response).value) for task, response in answers]
        judge(pairs, self.s.sandbox)

"""Steps of a run by N processes whose GPUs are pretended: what a card would compute is slept, what processes send to
each other is sent, at its real size, by the code of azr/train/distributed.py over gloo.

    result = simulated((1, 2, 4, 8), "h100", "80gb", steps=3, seed=0)      # {processes: a dict of figures}

How long a card takes is the planner's guess (azr/machine/cost.py, its middle pace): sampling is followed sequence by
sequence through the engine's slots, one decode step of so many rows after the other; an update micro-batch by
micro-batch. Lengths of responses are log-normal: the planner's mean, the spread of an embedded run, answers to one task
more alike than others. Real are the processes, the dealing of prompts and micro-batches, all that goes through
`Ranks.exchange` (token ids, log-probs, outcomes, scores) and the gradients: as many fp32 numbers as the adapter has.

Left out: parsing and metrics (each process does all of that), evaluations, checkpoints, a sandbox that must wait.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import resource
import time
from collections import Counter
from copy import copy
from heapq import heappop, heappush
from pathlib import Path
from types import SimpleNamespace

import torch

from azr.machine import cost
from azr.machine.plan import Plan, capacity, choose_preset, plan_memory, shape_of
from azr.policy.policy import Completion, Policy, Scored
from azr.policy.scoring import micro_batches, share_prompts
from azr.train.distributed import Ranks, SharedPolicy, together
from sandbox import Outcome

# Standard deviations of the logarithm of a length in 80 steps of the embedded model (train_azr.py, seed 0: 1,920
# proposals, 12,440 answers): of proposals; of answers between tasks, and between the answers to one task.
PROPOSALS, TASKS, ANSWERS = 0.61, 0.41, 0.70
REST = 0.11  # s of AdamW, clipping and copies to go back to, an H200 with a 3B (docs/gpu.md); each process does it
VOCABULARY = 151_936
OUTPUT = "x" * 40  # characters of what a program returned, as a process tells it to the others
RATE = 1e10  # bytes that a card sends per second in the figures without processes: PCIe 4, a low guess; NVLink has more


class Step:
    """The work of one step, the same in every process: lengths of responses, rows and micro-batches of the update.
    times: as many prompts as the preset has."""

    def __init__(self, plan: Plan, seed: str, times: int = 1) -> None:
        rng, preset, pace = random.Random(seed), plan.preset, cost.PACES[0]
        count = 3 * preset.prompts_per_mode * times
        self.prompt = int(cost.PROPOSE_PROMPT * preset.prompt_tokens)

        def drawn(mean: int, tasks: int, n: int, between: float, within: float) -> list[list[int]]:
            scale = mean / math.exp((between**2 + within**2) / 2)  # so that the mean of all is `mean`
            centres = [scale * math.exp(between * rng.gauss(0, 1)) for _ in range(tasks)]
            most = preset.max_new_tokens
            return [[min(most, 1 + int(c * math.exp(within * rng.gauss(0, 1)))) for _ in range(n)] for c in centres]

        self.proposals = drawn(pace.proposal, count, 1, 0.0, PROPOSALS)
        self.answers = drawn(pace.answer, round(count * pace.valid), preset.answers, TASKS, ANSWERS)
        prompts = [[i] * self.prompt for i in range(count)]
        prompts += [[-1 - i] * cost.SOLVE_PROMPT for i, row in enumerate(self.answers) for _ in row]
        responses = [range(n) for row in self.proposals + self.answers for n in row]
        rows = share_prompts(prompts, responses, cost.SHARED_ROW)
        lengths = [len(prompts[row[0]]) + sum(len(responses[i]) for i in row) for row in rows]
        self.batches = [[i for n in batch for i in rows[n]] for batch in micro_batches(lengths, preset.token_budget)]
        self.tokens = [len(response) for response in responses]
        # what a GPU computes is padded: as many rows as there are, of the longest
        padded = [len(b) * max(lengths[n] for n in b) for b in micro_batches(lengths, preset.token_budget)]
        self.padded = dict(zip(map(tuple, self.batches), padded))


def sampling_seconds(plan: Plan, card: cost.Card, prompt: int, lengths: list[list[int]]) -> float:
    """Seconds to sample responses of these lengths, those of a prompt in a row: whenever one ends, the next in the
    queue takes its slot. Between two ends each decode step has the same rows."""
    requests = [n for row in lengths for n in row]
    slots = max(cost.LEAST_SLOTS, min(plan.preset.max_batch, len(requests)))
    queue, active, now, begun, seconds = iter(requests), [], 0, 0, 0.0  # begun: sum of the steps in which active began
    while True:
        while len(active) < slots and (length := next(queue, None)) is not None:
            heappush(active, (now + length, now))
            begun += now
        if not active:
            break
        end, rows = active[0][0], len(active)
        context = prompt + (now + end) / 2 - begun / rows
        seconds += (end - now) * cost.decode_time(plan, card, rows, context)
        now = end
        while active and active[0][0] == now:
            begun -= heappop(active)[1]
    return seconds + len(lengths) * prompt * 2 * plan.shape.parameters / (card.tflops * 1e12)


def update_seconds(plan: Plan, card: cost.Card, step: Step, batch: list[int]) -> float:
    """Seconds of a micro-batch, forward and backward."""
    alone = dataclasses.replace(plan.preset, token_budget=10**12)  # of its own it is one pass over the weights
    return cost.update_time(plan.shape, alone, card, sum(step.tokens[i] for i in batch), step.padded[tuple(batch)])


class Sleeping(Policy):
    """A Policy of one process that takes its time and gives tokens and gradients of the right size."""

    def __init__(self, plan: Plan, card: cost.Card, ranks: Ranks, gradient: torch.Tensor) -> None:
        self.plan, self.card, self.ranks, self.device = plan, card, ranks, torch.device("cpu")
        self.engine = SimpleNamespace(max_batch=plan.preset.max_batch, pages=None)
        # one number in place of all weights, and the gradient of all micro-batches: nothing depends on what they are
        self.parameters, self.gradient, self.step = [torch.zeros(1).expand_as(gradient)], gradient, None
        self.spent, self.phase = Counter(), ""  # seconds slept, by phase

    def trainable_parameters(self):
        return self.parameters

    def sleep(self, seconds: float, since: float | None = None) -> None:
        """Until so many seconds have passed since then: what this process does meanwhile is not counted twice."""
        self.spent[self.phase] += seconds
        time.sleep(max(0.0, (since or time.monotonic()) + seconds - time.monotonic()))

    def generate(self, prompt_ids, n, sampling, seeds, max_new_tokens=None, on_finish=None):
        """Completions of the lengths that stand in the place of the seeds."""
        start, rng = time.monotonic(), random.Random(0)
        rows = [
            [Completion(rng.choices(range(VOCABULARY), k=k), [rng.random() for _ in range(k)], "stop") for k in row]
            for row in seeds
        ]
        self.sleep(sampling_seconds(self.plan, self.card, len(prompt_ids[0]), seeds), start)
        return rows

    def run(self, jobs: list[int]) -> list[Outcome]:
        """Programs in the sandbox, on two cores per card as the planner has it."""
        self.sleep(len(jobs) / cost.RUNS_A_SECOND)
        return [Outcome("ok", OUTPUT, "") for _ in jobs]

    def forward(self, indices: list[int]) -> Scored:
        """Scores of a micro-batch, with a graph as far as the others look at it; a third of its time."""
        self.sleep(update_seconds(self.plan, self.card, self.step, indices) / 3)
        shape = len(indices), max(self.step.tokens[i] for i in indices)
        numbers = [torch.rand(shape) for _ in range(2)]
        return Scored(indices, numbers[0].requires_grad_(), numbers[1], torch.ones(shape, dtype=torch.bool))

    def update(self, step: Step) -> None:
        """All micro-batches of a step: this process' own go backward."""
        self.step = step
        for scored in self.each(self.forward, step.batches, True):
            if scored.log_prob.requires_grad:
                self.sleep(update_seconds(self.plan, self.card, step, scored.indices) * 2 / 3)
                self.parameters[0].grad = self.gradient
        self.parameters[0].grad = None
        self.sleep(REST)


class Pretended(SharedPolicy, Sleeping):
    """The same as one of several processes. Seconds that gradients took, all together and under way: the rest is copies
    and sums, for which a GPU needs milliseconds."""

    whole, sent = 0.0, 0.0

    def _add(self, parameters, total, touched):
        return self.timed(super()._add, parameters, total, touched)

    def _spread(self, parameters, total):
        return self.timed(super()._spread, parameters, total)

    def timed(self, work, *arguments):
        self.ranks.exchange(None)  # the slowest has come: what it takes from here on is not waiting
        start, self.ranks.wait = time.monotonic(), self.under_way
        result = work(*arguments)
        del self.ranks.wait
        self.whole += time.monotonic() - start
        return result

    def under_way(self, work) -> None:
        start = time.monotonic()
        Ranks.wait(self.ranks, work)
        self.sent += time.monotonic() - start


PHASES = ("propose", "validate", "solve", "judge", "update")


def pretend(ranks: Ranks, plan: Plan, card: cost.Card, steps: list[Step], gradient: torch.Tensor, out: Path) -> int:
    """A process of the simulation; rank 0 writes what came out: seconds of a step by phase, as they passed, as the
    processes slept, and of those that were lost why."""
    policy, wall = (Sleeping if ranks.world == 1 else Pretended)(plan, card, ranks, gradient), Counter()
    for step in steps:
        programs = list(range(len(step.proposals))), list(range(sum(map(len, step.answers))))
        work = {
            "propose": lambda step=step: sample(policy, step.prompt, step.proposals),
            "validate": lambda jobs=programs[0]: ranks.shared(policy.run, jobs),
            "solve": lambda step=step: sample(policy, cost.SOLVE_PROMPT, step.answers),
            "judge": lambda jobs=programs[1]: ranks.shared(policy.run, jobs),
            "update": lambda step=step: policy.update(step),
        }
        ranks.exchange(None)
        for policy.phase in PHASES:
            start = time.monotonic()
            work[policy.phase]()
            ranks.ends_step([torch.zeros(2)], False)
            wall[policy.phase] += time.monotonic() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    said = ranks.exchange((dict(policy.spent), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6))
    if ranks.leads:
        n = len(steps)
        slept, cpu, memory = zip(*said)
        result = {
            "wall": {phase: wall[phase] / n for phase in PHASES},
            "slept": {phase: [part[phase] / n for part in slept] for phase in PHASES},
            "gradients": getattr(policy, "whole", 0.0) / n,
            "gradients_sent": getattr(policy, "sent", 0.0) / n,
            "micro_batches": sum(len(step.batches) for step in steps) / n,
            "cpu_seconds": sum(cpu) / n,
            "memory_gb": max(memory),
        }
        out.write_text(json.dumps(result))
    return 0


def sample(policy: Sleeping, prompt: int, lengths: list[list[int]]) -> list:
    limits = [policy.plan.preset.max_new_tokens] * len(lengths)
    return policy.generate([[0] * prompt] * len(lengths), len(lengths[0]), None, lengths, limits)


def shares(plan: Plan, card: cost.Card, step: Step, world: int) -> dict[str, list[float]]:
    """Seconds that each process would be at sampling and in the sandbox, as `Ranks.shared` deals the work, and those of
    the longest micro-batch of each round of the update."""
    result = {}
    for name, lengths, prompt in (("propose", step.proposals, step.prompt), ("solve", step.answers, cost.SOLVE_PROMPT)):
        parts = [lengths[rank::world] for rank in range(world)]
        result[name] = [sampling_seconds(plan, card, prompt, part) if part else 0.0 for part in parts]
    for name, rows in (("validate", step.proposals), ("judge", step.answers)):
        result[name] = [len(range(rank, sum(map(len, rows)), world)) / cost.RUNS_A_SECOND for rank in range(world)]
    times = [update_seconds(plan, card, step, batch) for batch in step.batches]
    return result | {"update": [max(times[i : i + world]) for i in range(0, len(times), world)]}


def computed(plan: Plan, card: cost.Card, steps: list[Step], world: int) -> dict:
    """Seconds of a step by phase without any process: the slowest in each phase, and gradients at RATE."""
    rows = [shares(plan, card, step, world) for step in steps]
    result = {name: sum(max(row[name]) for row in rows) / len(rows) for name in PHASES[:-1]}
    sent = bytes_sent(plan, steps, world) / RATE
    return result | {"update": sum(sum(row["update"]) for row in rows) / len(rows) + REST, "gradients": sent}


def bytes_sent(plan: Plan, steps: list[Step], world: int) -> float:
    """By each card in a step: of every round its gradient, but its own part, and then its part of the sum."""
    rounds = sum(math.ceil(len(step.batches) / world) for step in steps) / len(steps)
    numbers = plan.shape.lora_parameters(plan.preset.lora_rank, plan.preset.lora_targets)
    return (rounds + 1) * 4 * numbers * (world - 1) / world


def explained(plan: Plan, card: cost.Card, steps: list[Step], world: int, one: dict, row: dict) -> dict:
    """Where the seconds of a step go that N processes take beyond 1/N of what one sleeps. They add up to all of it."""
    lost = Counter()
    for step in steps:
        even = copy(step)  # if all were equally long there would be no tail: what is left is fewer rows per decode step
        for name in ("proposals", "answers"):
            lengths = getattr(step, name)
            mean = round(sum(map(sum, lengths)) / sum(map(len, lengths)))
            setattr(even, name, [[mean] * len(row) for row in lengths])
        (many, alone), (many_even, alone_even) = (
            (shares(plan, card, x, world), shares(plan, card, x, 1)) for x in (step, even)
        )
        for name in ("propose", "solve"):
            rows = (sum(many_even[name]) - sum(alone_even[name])) / world
            whole = (sum(many[name]) - sum(alone[name])) / world
            lost["fewer rows per decode step"] += rows / len(steps)
            lost["tail: long answers alone in a batch"] += (whole - rows) / len(steps)
            lost["sampling: the slowest process"] += (max(many[name]) - sum(many[name]) / world) / len(steps)
        for name in ("validate", "judge"):
            lost["sandbox"] += (max(many[name]) - sum(alone[name]) / world) / len(steps)
        rounds = sum(many["update"]) - sum(alone["update"]) / world
        lost["update: the last and the largest micro-batch of a round"] += rounds / len(steps)
    lost["Adam"] = REST * (1 - 1 / world)
    lost["gradients: sent over gloo"] = row["gradients_sent"]
    lost["gradients: copied and added by a CPU"] = row["gradients"] - row["gradients_sent"]
    total = sum(row["wall"].values()) - sum(times[0] for times in one["slept"].values()) / world
    lost["objects over gloo, and waiting for a core"] = total - sum(lost.values())
    return dict(lost)


def simulated(counts, card: str, preset: str, steps: int, seed: int, processes, log: Path) -> dict:
    """Figures of runs of so many processes, 1 first. `processes`: of bench_ranks.py, which forks them; None: only what
    can be computed."""
    settings, _ = choose_preset(preset, "qwen-3b", None)
    plan = plan_memory(shape_of("qwen-3b"), settings, capacity(settings))
    pace, real = cost.PACES[0], cost.CARDS[card]
    real = dataclasses.replace(real, bandwidth=real.bandwidth * pace.bandwidth, tflops=real.tflops * pace.products)
    work, result, out = [Step(plan, f"{seed}/{i}") for i in range(steps)], {}, log.with_suffix(".json")
    # before the forks: they share it
    gradient = torch.zeros(plan.shape.lora_parameters(plan.preset.lora_rank, plan.preset.lora_targets))
    alone = sum(computed(plan, real, work, 1).values())
    for world in counts:
        row = result[world] = {"computed": {}}
        grown = [Step(plan, f"{seed}/{i}", world) for i in range(steps)]
        for name, mine, whole in (("same run", work, alone), ("prompts times N", grown, world * alone)):
            parts = computed(plan, real, mine, world)
            seconds = sum(parts.values())
            row["computed"][name] = {"seconds": seconds, "efficiency": whole / (world * seconds)} | parts
        if processes is None:
            continue
        code, _ = processes(
            world,
            [],
            log,
            lambda _: together(lambda ranks: pretend(ranks, plan, real, work, gradient, out), "simulation"),
        )
        if any(code):
            raise RuntimeError(f"{world} processes ended with {code}: {log.read_text()}")
        row |= json.loads(out.read_text())
        row["seconds"] = sum(row["wall"].values())
        row["efficiency"] = result[1]["seconds"] / (world * row["seconds"])
        row["lost"] = explained(plan, real, work, world, result[1], row)
        row["sent_gb"] = bytes_sent(plan, work, world) / 1e9
    return result

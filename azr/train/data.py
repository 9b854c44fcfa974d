"""The fixed tasks and solutions that arms train on: draws that follow from the step, steps of N tokens.

    tasks = draw(load_tasks("tasks.jsonl"), step=3, count=48, seed=0)    # the same for the same step, whatever happened

Every draw follows from (seed, step), so a resume needs no position in the data. No torch.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from azr.console import warn
from azr.tasks import MODES, SEED_TASKS, Task, judge
from azr.tasks.prompts import propose_prompt, solve_prompt

if TYPE_CHECKING:
    from azr.tasks import Buffers, Sample

GROUPS = 6  # (proposer, solver) x (deduction, abduction, induction)
FILL_WAVES = 20  # rounds of sampling that fill a step up to a number of tokens
FILL = "fill-"  # in the group of what was sampled for that
FIRST_GUESS = 32  # tokens of an answer, before there is one


def group_share(samples: list[Sample]) -> float:
    """w_g, the weight of a (role, mode) group in the loss: 1 / 6. With mathematics from a file, a seventh: 1 / 7.

    The equal weight that AZR's groups have by the order of its micro-batches, each of which holds one role and mode.
    """
    return 1 / (GROUPS + any(sample.mode == "math" for sample in samples))


def draw(data: list[Task], step: int, count: int, seed: int, wave: int | None = None) -> list[Task]:
    """`count` tasks for a step, the same number of every mode (the first modes one more where it does not divide);
    proposals of a mode count as one more mode.

    Epoch by epoch each task of a mode once, in an order of that epoch. With a wave (what fills a step up to a number of
    tokens asks for a varying count) uniformly at random, in an order that mixes the modes.
    """
    kinds, drawn = list(dict.fromkeys(kind(task) for task in data)), []
    rng = random.Random(f"{seed}/data/{step}/{wave}")
    for i, name in enumerate(kinds):
        mine = [task for task in data if kind(task) == name]
        share = count // len(kinds) + (i < count % len(kinds))
        if wave is not None:
            drawn += rng.choices(mine, k=share)
            continue
        orders: dict[int, list[int]] = {}
        for position in range((step - 1) * share, step * share):
            epoch, place = divmod(position, len(mine))
            if epoch not in orders:
                orders[epoch] = list(range(len(mine)))
                random.Random(f"{seed}/data/{name}/{epoch}").shuffle(orders[epoch])
            drawn.append(mine[orders[epoch][place]])
    if wave is not None:
        rng.shuffle(drawn)  # cut off at the end, no mode loses more than the others
    return drawn


def kind(task: Task) -> str:
    """The mode of a task, and of a proposal "propose" and its mode."""
    return f"propose {task.mode}" if task.references else task.mode


def prompt_of(task: Task, template: str) -> str:
    """What the response of a task is to: the solver's prompt, or the proposer's with the references that it has."""
    if task.references:
        return propose_prompt(task.mode, list(task.references), template)
    return solve_prompt(task, template)


def from_buffers(buffers: Buffers, seed: int, step: int, wave: int, count: int) -> list[Task]:
    """About `count` tasks of the buffers, as many of each mode, in mixed order."""
    rng = random.Random(f"{seed}/{step}/matched/{wave}")
    drawn = [task for mode in MODES for task in buffers.sample(mode, math.ceil(count / len(MODES)), rng)]
    return rng.sample(drawn, len(drawn))


def names(tasks: list[Task]) -> list[str]:
    """Of the tasks of one call, for their seeds: the hash, with a number where a task comes again."""
    seen, names = Counter(), []
    for task in tasks:
        names.append(task.hash + f"-{seen[task.hash]}" * bool(seen[task.hash]))
        seen[task.hash] += 1
    return names


def context_of(s) -> float:
    """The longest prompt with its response that the model of a State `s` was made for, in tokens."""
    return getattr(s.policy.base.config, "max_position_embeddings", None) or math.inf


def check_context(s) -> None:
    """ValueError unless the longest response fits the model's context beside the shortest prompts there are: those
    about the identity program, without references."""
    prompts = [propose_prompt(mode, [task][mode != "induction" :], s.template) for mode, task in SEED_TASKS.items()]
    room = context_of(s) - max(len(s.policy.encode(prompt)) for prompt in prompts)
    if s.config.max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens {s.config.max_new_tokens}: the model's context of {context_of(s)} tokens leaves {room} "
            "beside the shortest prompts; give less"
        )


def fits(s, task: Task) -> bool:
    """Whether the prompt of a task and its longest (or given) response fit the context of the model of a State `s`."""
    longest = max(s.config.max_new_tokens, len(s.policy.encode(task.response or "")))
    return len(s.policy.encode(prompt_of(task, s.template))) + longest <= context_of(s)


def fitting(s, data: list[Task]) -> list[Task]:
    """The tasks that are true and fit the model's context. Warns of those that do not; ValueError if none is left."""
    data = true_tasks(s, data)
    short_enough = [task for task in data if fits(s, task)]
    if len(short_enough) < len(data):
        if not short_enough:
            raise ValueError("no task of the file fits the model's context with this --max-new-tokens; lower it")
        warn(f"{len(data) - len(short_enough)} of {len(data)} tasks of a file do not fit the model's context: left out")
    return short_enough


def true_tasks(s, data: list[Task]) -> list[Task]:
    """The tasks whose program gives what the file says: each runs once in the sandbox, as an answer to itself. Warns of
    the others, which would teach what is wrong; ValueError if none is true, or where an output is no literal.

    Mathematics has no program to ask, and a task that no verdict could be had for (infra) counts as true.
    """
    code = [task for task in data if task.mode != "math"]
    # deduction and abduction are one question here: what the program gives for the input
    pairs = [(x, x.program) if x.mode == "induction" else (replace(x, mode="abduction"), x.input) for x in code]
    reasons = {x.hash: v.reason for x, v in zip(code, judge(pairs, s.sandbox)) if not v.ok and v.reason != "infra"}
    if reasons:
        count = sum(task.hash in reasons for task in data)
        what = ", ".join(f"{name} {n}" for name, n in Counter(reasons.values()).most_common())
        text = f"{count} of {len(data)} tasks of a file are not what their programs give ({what})"
        if count == len(data):
            raise ValueError(f"{text}; python -m azr.tasks make writes right ones")
        warn(f"{text}: left out")
    return [task for task in data if task.hash not in reasons]


def tokens(samples: list[Sample]) -> int:
    """How many tokens the responses of the samples have together; prompts are not counted."""
    return sum(len(sample.completion.ids) for sample in samples)


def fill(target: int, n: int, draw: Callable, answer: Callable) -> list[Sample]:
    """answer(draw(wave, tasks), key), n samples a task, again until they have `target` tokens, to within a sample.

    A warning where FILL_WAVES rounds do not get there.
    """
    samples: list[Sample] = []
    for wave in range(FILL_WAVES):
        missing = target - tokens(samples)
        if missing <= 0:
            break
        length = tokens(samples) / len(samples) if samples else FIRST_GUESS
        samples += answer(draw(wave, math.ceil(missing / (n * max(1, length)))), f"{FILL}{wave}")
    else:
        warn(f"{tokens(samples)} of {target} tokens in {FILL_WAVES} rounds; going on with these")
    return trimmed(samples, target)


def trimmed(samples: list[Sample], target: int) -> list[Sample]:
    """The first samples, as many as come nearest to `target` tokens."""
    total, result = 0, []
    for sample in samples:
        length = len(sample.completion.ids)
        if total + length - target > target - total:
            break
        result.append(sample)
        total += length
    return result

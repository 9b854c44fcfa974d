"""The arms of the comparison: which settings go together, and the fixed tasks and solutions of rlvr and sft. No torch.

    refuse(config)                                       # ValueError for what contradicts itself or does nothing
    data = read_data("tasks.jsonl", solutions=False)     # a list of Task, read-only
    tasks = draw(data, step=3, count=48, seed=0)         # the same for the same step, whatever happened before

Every draw follows from (seed, step), so a resume needs no position in the data. `python -m azr.tasks make` writes such
files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from azr.tasks import MODES, Task

if TYPE_CHECKING:
    from azr.train.config import Config
    from azr.tasks import Buffers, Sample

FILL_WAVES = 20  # rounds of sampling that fill a step up to a number of tokens
FILL = "fill-"  # in the group of what was sampled for that
FIRST_GUESS = 32  # tokens of an answer, before there is one
ARM_FLAGS = ("proposer", "proposer_reward", "ends_penalty", "entropy_control", "control_fraction", "entropy_target",
             "entropy_coefficient", "kl_coefficient", "solver_tasks", "minibatches", "temperature")  # fmt: skip
CONTROLS = ("none", "bonus", "adaptive", "clip-higher", "clip-cov", "kl-cov", "top-entropy", "high-advantage-clip")
NEED_RATIO = ("clip-higher", "kl-cov")  # controls that do nothing while the ratio of PPO is 1
DEFAULTS = {  # control -> its settings, as published; on the tiny model 1e-3 of the tokens would be one or none
    "bonus": {"entropy_coefficient": 1e-3},
    "adaptive": {"entropy_coefficient": 5e-3, "entropy_target": 0.8},
    "clip-cov": {"control_fraction": 2e-4},
    "kl-cov": {"control_fraction": 2e-3, "kl_coefficient": 1.0},
    "top-entropy": {"control_fraction": 0.2},
    "high-advantage-clip": {"control_fraction": 0.2},
}
TINY_FRACTION = 2e-2


def control_defaults(control: str, tiny: bool) -> dict[str, float]:
    """The settings of an entropy control where none is given."""
    values = dict(DEFAULTS.get(control, {}))
    if tiny and control in ("clip-cov", "kl-cov"):
        values["control_fraction"] = TINY_FRACTION
    return values


# ---------------------------------------------------------------- what goes together


def refuse(config: Config) -> None:
    """ValueError, in one line with the reason, for a combination that contradicts itself or does nothing."""
    for wrong, reason in (*_data_rules(config), *_control_rules(config), *_off_policy_rules(config)):
        if wrong:
            raise ValueError(reason)


def _data_rules(c: Config) -> list[tuple[bool, str]]:
    fixed, name = c.algorithm != "selfplay", f"--algorithm {c.algorithm}"
    no_proposer = f"does nothing with {name}: its tasks come from --data, nothing is proposed"
    sft = c.algorithm == "sft"
    return [
        (fixed and not c.data, f"{name} needs --data FILE; python -m azr.tasks make writes such files"),
        (not fixed and bool(c.data), "--data is for --algorithm rlvr or sft: selfplay makes its own tasks"),
        (not fixed and c.step_tokens is not None,
         "--step-tokens is for --algorithm rlvr or sft: the tokens of a step of selfplay follow from what it samples"),
        (fixed and c.proposer != "joint", f"--proposer {c.proposer} {no_proposer}"),
        (fixed and c.proposer_reward != "learnability", f"--proposer-reward {c.proposer_reward} {no_proposer}"),
        (fixed and c.ends_penalty != 0, f"--ends-penalty {no_proposer}"),
        (fixed and c.solver_tasks == "fresh", f"--solver-tasks fresh {no_proposer}"),
        (c.recipe == "azr" and c.solver_tasks == "fresh",
         "--solver-tasks fresh contradicts --recipe azr, whose solver prompts come from the buffer"),
        (fixed and c.recipe == "azr", f"--recipe azr is a recipe of self-play; {name} has its answers' groups"),
        (sft and c.solver_reward != "graded", "--solver-reward does nothing with --algorithm sft: nothing is rewarded"),
        (sft and c.temperature != 1,
         "--temperature does nothing to --algorithm sft but rescale its loss: nothing is sampled; leave it at 1"),
        (c.proposer != "joint" and (c.proposer_reward != "learnability" or c.ends_penalty != 0),
         f"--proposer-reward, --ends-penalty do nothing with --proposer {c.proposer}: its proposals are not trained"),
    ]  # fmt: skip


def _control_rules(c: Config) -> list[tuple[bool, str]]:
    control, rules = c.entropy_control, []
    for flag, users in (
        ("control_fraction", ("clip-cov", "kl-cov", "top-entropy", "high-advantage-clip")),
        ("entropy_coefficient", ("bonus", "adaptive")),
        ("entropy_target", ("adaptive",)),
        ("kl_coefficient", ("kl-cov",)),
    ):
        name = f"--{flag.replace('_', '-')}"
        unused = getattr(c, flag) is not None and control not in users
        rules.append((unused, f"{name} does nothing with --entropy-control {control}: it is for {', '.join(users)}"))
    fraction = c.control_fraction
    return rules + [
        (control != "none" and c.algorithm == "sft",
         f"--entropy-control {control} acts on answers that were sampled; --algorithm sft samples none"),
        (control in NEED_RATIO and c.minibatches == 1,
         f"--entropy-control {control} does nothing with one update a step, where every ratio is 1: give "
         "--minibatches 4, and compare with --entropy-control none --minibatches 4"),
        (fraction is not None and not 0 < fraction < 1, f"--control-fraction must be between 0 and 1, not {fraction}"),
        ((c.entropy_coefficient or 1) < 0 or c.entropy_coefficient == 0,
         "--entropy-coefficient must be above 0; without a bonus: --entropy-control none"),
        (c.entropy_target is not None and c.entropy_target <= 0, "--entropy-target must be above 0"),
        (c.kl_coefficient is not None and c.kl_coefficient <= 0, "--kl-coefficient must be above 0"),
    ]  # fmt: skip


def _off_policy_rules(c: Config) -> list[tuple[bool, str]]:
    gamma, source = c.off_policy_gamma, c.off_policy_source
    others = (c.off_policy_schedule, c.off_policy_weight, c.off_policy_control, c.off_policy_baseline)
    extra = c.off_policy_control == "on-policy"
    return [
        (not 0 <= gamma < 1, f"--off-policy-gamma must be at least 0 and below 1, not {gamma}"),
        (gamma > 0 and not source,
         "--off-policy-gamma needs --off-policy-source: base (its solutions, adapter off) or a FILE of solutions"),
        (gamma == 0 and (bool(source) or c.off_policy_samples is not None
                         or others != ("constant", "truncated", "none", "union")),
         "--off-policy-... flags do nothing without --off-policy-gamma above 0"),
        (gamma > 0 and c.algorithm == "sft",
         "--off-policy-gamma mixes solutions into sampled groups; --algorithm sft trains on nothing but solutions"),
        (gamma > 0 and c.recipe == "azr",
         "--off-policy-gamma mixes solutions into the groups of --recipe lean; --recipe azr has single answers"),
        (extra and source not in (None, "base"),
         "--off-policy-control on-policy is the control at equal cost of sampling from the base; a file costs none"),
        (extra and (c.off_policy_weight != "truncated" or c.off_policy_baseline != "union"),
         "--off-policy-control on-policy has no foreign solutions: --off-policy-weight and -baseline do nothing"),
        (gamma > 0 and source not in (None, "base") and c.off_policy_samples is not None,
         "--off-policy-samples is how many answers of the base are drawn; a file's solutions are all there"),
        (c.off_policy_samples is not None and c.off_policy_samples < 1, "--off-policy-samples must be at least 1"),
    ]  # fmt: skip


def describe(config: Config) -> str:
    """The flags by which a run differs from plain self-play; "" if by none."""
    names = [f for f in dataclasses.fields(config) if f.name in ARM_FLAGS or f.name.startswith("off_policy_")]
    given = [(f.name, getattr(config, f.name)) for f in names if getattr(config, f.name) not in (f.default, None)]
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given)


# ---------------------------------------------------------------- files of tasks and solutions


def read_data(path: str, solutions: bool) -> list[Task]:
    """The tasks of a JSON-lines file, each once; with `solutions` each (task, response) once.

    ValueError with file and line: a bad line, a task without a response where responses are wanted, an empty file.
    """
    found: dict[tuple, Task] = {}
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    task = _task(line, f"{path}, line {number}", solutions)
                    found.setdefault((task.hash, task.response if solutions else None), task)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); expected one task as JSON a line") from error
    if not found:
        raise ValueError(f"{path}: holds no tasks; expected one task as JSON a line")
    return list(found.values())


def read_files(config: Config) -> tuple[list[Task], list[Task], bool]:
    """The tasks (or solutions) of --data, the solutions of --off-policy-source, and whether math is to be graded."""
    data = read_data(config.data, config.algorithm == "sft") if config.data else []
    foreign = config.off_policy_gamma > 0 and config.off_policy_source != "base"
    given = read_data(config.off_policy_source, True) if foreign else []
    graded = given + (data if config.algorithm == "rlvr" else [])
    return data, given, any(task.mode == "math" for task in graded)


def _task(line: str, where: str, solutions: bool) -> Task:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, found {type(row).__name__}")
        task = Task.from_json(row)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    if solutions and not task.response:
        raise ValueError(f'{where}: has no "response"; python -m azr.tasks make ... --solutions writes them')
    return task


def by_mode(tasks: list[Task]) -> str:
    return ", ".join(f"{mode} {count}" for mode, count in Counter(task.mode for task in tasks).items())


def digest(path: str) -> str:
    """16 hex digits of a file's bytes."""
    import hashlib

    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------- draws


def draw(data: list[Task], step: int, count: int, seed: int, wave: int | None = None) -> list[Task]:
    """`count` tasks for a step, the same number of every mode (the first modes one more where it does not divide).

    Epoch by epoch each task of a mode once, in an order of that epoch. With a wave (what fills a step up to a number of
    tokens asks for a varying count) uniformly at random, in an order that mixes the modes.
    """
    modes, drawn = list(dict.fromkeys(task.mode for task in data)), []
    rng = random.Random(f"{seed}/data/{step}/{wave}")
    for i, mode in enumerate(modes):
        mine = [task for task in data if task.mode == mode]
        share = count // len(modes) + (i < count % len(modes))
        if wave is not None:
            drawn += rng.choices(mine, k=share)
            continue
        orders: dict[int, list[int]] = {}
        for position in range((step - 1) * share, step * share):
            epoch, place = divmod(position, len(mine))
            if epoch not in orders:
                orders[epoch] = list(range(len(mine)))
                random.Random(f"{seed}/data/{mode}/{epoch}").shuffle(orders[epoch])
            drawn.append(mine[orders[epoch][place]])
    if wave is not None:
        rng.shuffle(drawn)  # cut off at the end, no mode loses more than the others
    return drawn


def from_buffers(buffers: Buffers, seed: int, step: int, wave: int, count: int) -> list[Task]:
    """About `count` tasks of the buffers, as many of each mode, in mixed order."""
    rng = random.Random(f"{seed}/{step}/matched/{wave}")
    drawn = [task for mode in MODES for task in buffers.sample(mode, math.ceil(count / len(MODES)), rng)]
    return rng.sample(drawn, len(drawn))


def fitting(data: list[Task], fits: Callable[[Task], bool]) -> list[Task]:
    """The tasks that fit the model's context; how many do not is said, and it is an error if none does."""
    kept = [task for task in data if fits(task)]
    if len(kept) < len(data):
        if not kept:
            raise ValueError("no task of the file fits the model's context with this --max-new-tokens; lower it")
        said = f"{len(data) - len(kept)} of {len(data)} tasks of a file do not fit the model's context: left out"
        print(f"warning: {said}", file=sys.stderr, flush=True)
    return kept


def tokens(samples: list[Sample]) -> int:
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
        print(f"warning: {tokens(samples)} of {target} tokens in {FILL_WAVES} rounds; going on with these",
              file=sys.stderr, flush=True)  # fmt: skip
    return trimmed(samples, target)


def trimmed(samples: list[Sample], target: int) -> list[Sample]:
    """The first samples, as many as come nearest to `target` tokens."""
    total, kept = 0, []
    for sample in samples:
        length = len(sample.completion.ids)
        if total + length - target > target - total:
            break
        kept.append(sample)
        total += length
    return kept

"""The synthetic text the embedded model is trained on: (prompt, response) pairs in the `tiny` wording of prompts.py.

Six kinds (propose and solve in three modes) plus one skill that self-play never touches, sorting digits in prose, by
which forgetting can be measured. The skill worth learning is latent: a thought that works the answer out is in few of
the documents, so that reinforcement learning can find it. Thoughts form a ladder of styles, drawn independently of
anything the prompt shows:

    none     </think>
    junk     p;q;                                       names without values
    coarse   p=8;q=9;                                   the value of each statement
    full     p=5+3=8;q=max(8, 9)=9;                     every step executed
    check    p=5+3=8;q=max(8, 9)=9;again q=max(8, 9)=9; the last step twice

For abduction the full thought is a search, up to three inputs tried with the trace of each and its result set beside
the wanted one; for induction a program tried on visible pairs, and now and then a wrong one before it. A search may end
in "no" (the answer is right all the same), so that the verdict on a try has to be read off the comparison. Noise is a
step left out of a trace, never a corrupted answer. The number of statements of a proposal follows its references',
give or take, and operations are shared with them. Held-out programs (split.py) occur nowhere.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from typing import NamedTuple

from azr.tasks import SEED_TASKS, Task
from azr.tasks.prompts import INDUCTION_INPUTS, fence, propose_prompt, solve_prompt
from azr.tiny.programs import (
    LAST,
    MAX_STATEMENTS,
    MAX_TRACE,
    STAGES,
    Program,
    Stage,
    arguments_text,
    random_arguments,
    random_program,
    random_value,
)
from azr.tiny.split import behaviour, held_out, skeleton, twin

KINDS = {  # relative frequency of the documents: at first, while all values are ints, and then; traces come first
    ("solver", "deduction"): (64, 28),
    ("solver", "abduction"): (10, 20),
    ("solver", "induction"): (8, 18),
    ("proposer", "deduction"): (5, 10),
    ("proposer", "abduction"): (5, 10),
    ("proposer", "induction"): (4, 8),
    ("skill", "math"): (4, 6),
}
STYLES = ("none", "junk", "coarse", "full", "check")
LADDER = (0.54, 0.12, 0.20, 0.11, 0.03)  # of the thoughts of a solver in the end
TAUGHT = (0.30, 0.04, 0.14, 0.46, 0.06)  # at first, so that traces are learned at all
TAUGHT_UNTIL, LADDER_FROM = 0.35, 0.65  # share of the training; in between the weights move on a line
PLAN = (0.70, 0.10, 0.20)  # of a proposer: no thought, names only, the operations in words
SKIPPED_STEP, BROKEN_PROPOSAL, SEED_REFERENCE = 0.04, 0.05, 0.03
STATEMENTS = (24, 22, 19, 15, 11, 9)  # weights of 1 to 6 statements
INDUCTION_STATEMENTS = (38, 34, 20, 8)  # a program of five statements cannot be seen in five pairs
FOLLOW = ((-1, 0, 1, 2), (25, 40, 20, 15))  # statements of a proposal less the mean of its references', weights
WRONG_TRIES = (35, 38, 27)  # weights of none, one and two of them in a full search
GIVEN_UP = 0.15  # of the searches with a wrong try: none is right, the answer is one that was not tried
REVISED = 0.35  # of the full hypotheses: a wrong one first
MAX_SEARCH = 180  # characters of a search
MAX_HYPOTHESIS = 250  # characters of a hypothesis with its checks and the answer's program
MAX_INPUTS = 210  # characters of the inputs that a proposal of an induction task lists
SKELETON_TASKS = 8  # held-out tasks of a mode and difficulty that may share a skeleton
COMMON = {0: 0.28, 1: 0.45, 2: 0.45, 3: 0.5, 4: 0.55, 6: 0.75, 8: 0.75, 5: 0.85, 9: 0.85}  # outputs thinned out


class Example(NamedTuple):
    """A program with arguments on which it runs, its values there and the steps of its trace."""

    program: Program
    arguments: tuple
    values: dict
    steps: list[str]

    @property
    def output(self):
        """What the program returns: the value of its last statement."""
        return self.values[self.program.statements[-1].name]


def draw(
    rng: random.Random,
    stage: Stage = STAGES[LAST],
    count: int | None = None,
    hold: bool = False,
    like: frozenset[str] = frozenset(),
) -> Example:
    """A program and arguments: of `count` statements (drawn if None), from the held-out skeletons if `hold`. Its result
    depends on more than half of its statements there."""
    count = count or rng.choices(range(1, len(STATEMENTS) + 1), STATEMENTS)[0]
    while True:
        program = random_program(rng, stage, count, like)
        if program is None or held_out(program.text) != hold:
            continue
        example = example_of(program, rng, stage)
        if example is None or not hold and twin(program):
            continue
        if rng.random() < COMMON.get(example.output, 1.0) if isinstance(example.output, int) else True:
            return example


def example_of(program: Program, rng: random.Random, stage: Stage) -> Example | None:
    """The program with arguments on which it runs; None if a few draws do not find any."""
    for _ in range(3):
        steps: list[str] = []
        arguments = random_arguments(program, stage, rng)
        values = program.run(arguments, stage.top, steps)
        if values is not None and sum(map(len, steps)) <= MAX_TRACE * (1 + (len(program.statements) > 6)):
            if 2 * program.influential(values) > len(program.statements):
                return Example(program, arguments, values, steps)
    return None


# --- thoughts --------------------------------------------------------------------------------------------------------


def style_weights(progress: float) -> tuple[float, ...]:
    """Weights of STYLES when this share of the training is over."""
    share = min(1.0, max(0.0, (progress - TAUGHT_UNTIL) / (LADDER_FROM - TAUGHT_UNTIL)))
    return tuple(a + (b - a) * share for a, b in zip(TAUGHT, LADDER))


def trace(steps: list[str], rng: random.Random) -> str:
    """The steps, now and then without one of them."""
    if len(steps) > 1 and rng.random() < SKIPPED_STEP:
        skipped = rng.randrange(len(steps) - 1)
        steps = steps[:skipped] + steps[skipped + 1 :]
    return "".join(steps)


def deduction_thought(style: str, example: Example, rng: random.Random) -> str:
    """The trace of the execution in one of the five styles; in full, now and then with a step left out."""
    names = [s.name for s in example.program.statements]
    if style == "junk":
        return "".join(f"{name};" for name in names)
    if style == "coarse":
        return "".join(f"{name}={example.values[name]!r};" for name in names)
    return trace(example.steps, rng) + (f"again {example.steps[-1]}" if style == "check" else "")


def abduction_thought(style: str, example: Example, rng: random.Random, stage: Stage) -> str:
    """The search for the input: up to three tries, each with what it gives."""
    if style == "junk":
        return "".join(f"{name};" for name in example.program.parameters)
    wrong = wrong_tries(example, rng, stage, at_least=style == "check")
    tries = [*wrong, example]
    if style == "coarse":
        parts = [f"{arguments_text(e.arguments)} gives {e.output!r} {verdict(e, example)};" for e in tries[-2:]]
        return "".join(parts)
    if wrong and rng.random() < GIVEN_UP:
        tries = wrong
    texts = [
        f"{arguments_text(e.arguments)};{trace(e.steps, rng)}{e.output!r}=={example.output!r} {verdict(e, example)};"
        for e in tries
    ]
    while len(texts) > 1 and sum(map(len, texts)) > MAX_SEARCH:
        texts.pop(0)
    return "".join(texts)


def wrong_tries(example: Example, rng: random.Random, stage: Stage, at_least: bool) -> list[Example]:
    """None to two near misses with different arguments; `at_least`: one if there is any."""
    count = max(rng.choices((0, 1, 2), WRONG_TRIES)[0], at_least)
    misses = {}
    for _ in range(count):
        miss = near_miss(example, rng, stage)
        if miss is not None:
            misses[arguments_text(miss.arguments)] = miss
    return list(misses.values())


def verdict(tried: Example, example: Example) -> str:
    """Whether a try gives the wanted output."""
    return "yes" if tried.output == example.output else "no"


def near_miss(example: Example, rng: random.Random, stage: Stage) -> Example | None:
    """The same program on other arguments, one of them changed, with another result."""
    kinds = list(example.program.parameters.values())
    for _ in range(4):
        arguments, i = list(example.arguments), rng.randrange(len(kinds))
        if kinds[i] == "i" and rng.random() < 0.7:
            arguments[i] = max(0, arguments[i] + rng.choice((-3, -2, -1, 1, 2, 3)))
        else:
            arguments[i] = random_value(kinds[i], stage, rng)
        steps: list[str] = []
        values = example.program.run(tuple(arguments), stage.top, steps)
        if values is not None and values[example.program.statements[-1].name] != example.output:
            return Example(example.program, tuple(arguments), values, steps)
    return None


def induction_thought(style: str, program: Program, pairs: list[tuple], rng: random.Random, stage: Stage) -> str:
    """A hypothesis, in the full style checked on one or two of the visible pairs, perhaps after a wrong one; in words
    where that would be too long."""
    if style == "junk":
        return "".join(f"{s.name};" for s in program.statements)
    if style == "coarse":
        return f"{program.words};"
    checks = [check(program, pair, stage, rng) for pair in pairs[: 2 if style == "check" else 1]]
    room = MAX_HYPOTHESIS - len(program.text)
    while checks and len(hypothesis(program) + "".join(checks)) > room:
        checks.pop()
    if not checks:
        return f"{program.words};"
    right = hypothesis(program) + "".join(checks)
    if rng.random() < REVISED:
        other = wrong_hypothesis(program, pairs[0], rng, stage)
        both = hypothesis(other) + check(other, pairs[0], stage, rng) + right if other else right
        return both if len(both) <= room else right
    return right


def hypothesis(program: Program) -> str:
    """A program as a thought names it: its statements."""
    return "try " + "\n    ".join(s.lines for s in program.statements) + "\n    "


def check(program: Program, pair: tuple, stage: Stage, rng: random.Random) -> str:
    """The trace of a program on the arguments of a pair, its result beside the pair's, and whether they are equal."""
    steps: list[str] = []
    result = program.run(pair[0], stage.top, steps)[program.statements[-1].name]
    equal = "yes" if result == pair[1] else "no"
    return f"{arguments_text(pair[0])};{trace(steps, rng)}{result!r}=={pair[1]!r} {equal};"


def wrong_hypothesis(program: Program, pair: tuple, rng: random.Random, stage: Stage) -> Program | None:
    """A program of the same parameters and length that runs on the pair's arguments with another result."""
    like = frozenset(s.kind for s in program.statements)
    for _ in range(30):
        other = random_program(rng, stage, len(program.statements), like)
        if other is None or list(other.parameters.values()) != list(program.parameters.values()):
            continue
        result = other.output(pair[0], stage.top)
        if result is None or result == pair[1] or type(result) is not type(pair[1]):
            continue
        if not held_out(other.text) and not twin(other):
            return other
    return None


def wrap(thought: str, answer: str) -> str:
    """The response of the given content."""
    return f"{thought}</think><answer>{answer}</answer>"


# --- tasks -----------------------------------------------------------------------------------------------------------


def induction_pairs(program: Program, rng: random.Random, stage: Stage) -> list[tuple] | None:
    """INDUCTION_INPUTS distinct arguments with their results, at least four distinct; None if the draws do not give
    that."""
    found: dict[str, tuple] = {}
    for _ in range(3 * INDUCTION_INPUTS):
        arguments = random_arguments(program, stage, rng)
        result = program.output(arguments, stage.top)
        if result is not None:
            found[arguments_text(arguments)] = (arguments, result)
        if len(found) == INDUCTION_INPUTS:
            pairs = list(found.values())
            return pairs if len({repr(result) for _, result in pairs}) >= 4 else None
    return None


def message_for(program: Program, rng: random.Random) -> str:
    """A hint: everything, one operation of several, or only the types."""
    kind = rng.choices(("full", "part", "type"), (35, 35, 30))[0]
    if kind == "full":
        return program.words
    if kind == "part":
        return "uses " + rng.choice(program.statements).words
    names = {"i": "number", "l": "list", "s": "text", "t": "tuple", "d": "dict"}
    takes = " and ".join(names[kind] for kind in program.parameters.values())
    return f"{takes} to {names[program.statements[-1].gives]}"


class Drawn(NamedTuple):
    """A task with what a thought about it needs."""

    task: Task
    example: Example
    pairs: list[tuple]  # visible ones of an induction task


def draw_task(
    mode: str, rng: random.Random, stage: Stage = STAGES[LAST], count: int | None = None, hold: bool = False
) -> Drawn:
    """A right and solvable task of one of the three modes."""
    while True:
        if mode == "induction" and count is None:
            size = rng.choices(range(1, len(INDUCTION_STATEMENTS) + 1), INDUCTION_STATEMENTS)[0]
        else:
            size = count
        example = draw(rng, stage, size, hold)
        text, given = example.program.text, arguments_text(example.arguments)
        if mode != "induction":
            return Drawn(Task(mode=mode, program=text, input=given, output=repr(example.output)), example, [])
        pairs = induction_pairs(example.program, rng, stage)
        if pairs is None:
            continue
        texts = tuple((arguments_text(arguments), repr(result)) for arguments, result in pairs)
        half = INDUCTION_INPUTS // 2
        message = message_for(example.program, rng)
        task = Task(mode=mode, program=text, message=message, visible=texts[:half], hidden=texts[half:])
        return Drawn(task, example, pairs[:half])


def think(drawn: Drawn, style: str, rng: random.Random, stage: Stage = STAGES[LAST]) -> str:
    """The thought of a style about a task; "" for "none"."""
    if style == "none":
        return ""
    if drawn.task.mode == "deduction":
        return deduction_thought(style, drawn.example, rng)
    if drawn.task.mode == "abduction":
        return abduction_thought(style, drawn.example, rng, stage)
    return induction_thought(style, drawn.example.program, drawn.pairs, rng, stage)


def answer(task: Task) -> str:
    """What stands between the answer tags of a right answer."""
    if task.mode == "math":
        return task.answer
    tag, text = {
        "deduction": ("output", task.output),
        "abduction": ("input", task.input),
        "induction": ("python", task.program),
    }[task.mode]
    return fence(tag, text)


def skill_task(rng: random.Random, hold: bool = False) -> Task:
    """Digits to be sorted, asked in prose; the answer reads as one number."""
    while True:
        digits = [rng.randint(1, 9) for _ in range(rng.randint(3, 7))]
        down = rng.random() < 0.3
        question = f"Write the digits {', '.join(map(str, digits))} in {'falling' if down else 'rising'} order."
        if (sum((i + 1) * d for i, d in enumerate(digits)) % HELD_OUT_SKILL == 0) == hold:
            return Task(mode="math", question=question, answer="".join(map(str, sorted(digits, reverse=down))))


HELD_OUT_SKILL = 50  # one question in so many


# --- documents -------------------------------------------------------------------------------------------------------


def solve_document(
    mode: str, rng: random.Random, stage: Stage = STAGES[LAST], progress: float = 1.0
) -> tuple[str, str]:
    """A solver's prompt and a right answer to it, with a thought in a style of the ladder."""
    if mode == "math":
        task = skill_task(rng)
        return solve_prompt(task, "tiny"), wrap("", answer(task))
    drawn = draw_task(mode, rng, stage)
    style = rng.choices(STYLES, style_weights(progress))[0]
    return solve_prompt(drawn.task, "tiny"), wrap(think(drawn, style, rng, stage), answer(drawn.task))


def broken(example: Example, rng: random.Random) -> tuple[str, str]:
    """A proposal that validation refuses: bad syntax, an unknown name, a wrong type, a random value, a triviality."""
    text, given = example.program.text, arguments_text(example.arguments)
    head = text.split("\n", 1)[0]
    fault = rng.randrange(4)
    if fault == 0:
        return text.replace("=", "", 1), given
    if fault == 1:
        return text.replace("x", "w", 1), given
    if fault == 2:
        return f"import random\n{head}\n    return random.randint(0, 9)", given
    return f"{head}\n    return x", given


def plan(program: Program, rng: random.Random) -> str:
    """What a proposer thinks: nothing, names, or the operations in words."""
    style = rng.choices(("none", "junk", "words"), PLAN)[0]
    return {"none": "", "junk": "".join(f"{s.name};" for s in program.statements), "words": f"{program.words};"}[style]


class DrawnProposal(NamedTuple):
    """A proposal: the tasks that its proposer is shown, what it writes, and the task that is proposed; None where
    validation refuses it."""

    references: list[Task]
    response: str
    task: Task | None


def propose_document(mode: str, rng: random.Random, stage: Stage = STAGES[LAST]) -> tuple[str, str]:
    """A proposer's prompt and a proposal that follows its references."""
    drawn = draw_proposal(mode, rng, stage)
    return propose_prompt(mode, drawn.references, "tiny"), drawn.response


def task_of(mode: str, example: Example) -> Task:
    """The deduction or abduction task of an example."""
    return Task(mode, example.program.text, arguments_text(example.arguments), repr(example.output))


def draw_proposal(mode: str, rng: random.Random, stage: Stage = STAGES[LAST], most: int | None = None) -> DrawnProposal:
    """A proposal that follows one to three references (induction: about the program of its reference).

    most: statements of any of these programs, at most; None: as in the training of the embedded model.
    """
    if mode == "induction":
        return _draw_induction_proposal(rng, stage, most)
    size = rng.choices(range(1, len(STATEMENTS) + 1), STATEMENTS)[0]
    references = []
    for _ in range(rng.choices((1, 2, 3), (25, 50, 25))[0]):
        near = min(most or len(STATEMENTS), max(1, size + rng.choice((-1, 0, 0, 1))))
        references.append(draw(rng, stage, near))
    mean = sum(len(e.program.statements) for e in references) / len(references)
    tasks = [task_of(mode, e) for e in references]
    like = frozenset(s.kind for s in rng.choice(references).program.statements)
    if rng.random() < SEED_REFERENCE:
        tasks, mean, like = [SEED_TASKS["deduction"]], 1.0, frozenset()
    count = min(most or MAX_STATEMENTS, max(1, round(mean + rng.random() - 0.5) + rng.choices(*FOLLOW)[0]))
    example = draw(rng, stage, count, like=like)
    task = task_of(mode, example)
    text, given = task.program, task.input
    if rng.random() < BROKEN_PROPOSAL:
        task, (text, given) = None, broken(example, rng)
    response = wrap(plan(example.program, rng), fence("python", text) + fence("input", given))
    return DrawnProposal(tasks, response, task)


def _draw_induction_proposal(rng: random.Random, stage: Stage, most: int | None) -> DrawnProposal:
    while True:
        task = draw_task("induction", rng, stage, most and rng.randint(1, most)).task
        inputs = [given for given, _ in task.visible + task.hidden]
        if sum(map(len, inputs)) <= MAX_INPUTS:
            break
    reference = Task("deduction", task.program, *task.visible[0])
    message = fence("message", task.message)
    if rng.random() < BROKEN_PROPOSAL:
        task, inputs[rng.randrange(len(inputs))] = None, rng.choice(inputs)
    text = "".join(fence("input", given) for given in inputs) + message
    return DrawnProposal([reference], wrap("", text), task)


def document(rng: random.Random, stage: Stage = STAGES[LAST], progress: float = 1.0) -> tuple[str, str]:
    """One training document: (prompt, response); `progress`: the share of the training that is over."""
    role, mode = rng.choices(list(KINDS), [weights[stage.types != "i"] for weights in KINDS.values()])[0]
    if role == "proposer":
        return propose_document(mode, rng, stage)
    return solve_document(mode, rng, stage, progress)


def documents(seed: int | str, count: int, stage: int = LAST, progress: float = 1.0) -> list[tuple[str, str]]:
    """`count` documents of one seed, with values up to STAGES[stage]."""
    rng = random.Random(seed)
    return [document(rng, STAGES[stage], progress) for _ in range(count)]


# --- held out --------------------------------------------------------------------------------------------------------

MODES = ("deduction", "abduction", "induction")
TASKS = 100  # of a mode and number of statements
DIFFICULTIES = (1, 2, 3, 4, 5, 6, 7)  # statements; 7 stands for 7 or 8


@functools.cache
def held_out_draws(seed: int = 2024) -> tuple[Drawn, ...]:
    """TASKS tasks for each mode and difficulty, ordered by mode, then difficulty. No two programs have the same text or
    behave alike, and no skeleton stands in more than SKELETON_TASKS tasks of a mode and difficulty."""
    draws, seen = [], set()
    for difficulty in DIFFICULTIES:
        for mode in MODES:
            rng, rows = random.Random(f"{seed}/{mode}/{difficulty}"), Counter()
            while rows.total() < TASKS:
                count = rng.choice((7, 8)) if difficulty == 7 else difficulty
                drawn = draw_task(mode, rng, count=count, hold=True)
                program = drawn.example.program
                keys = {program.text, behaviour(program)}
                if not keys & seen and rows[skeleton(program.text)] < SKELETON_TASKS:
                    seen |= keys
                    draws.append(drawn)
                    rows[skeleton(program.text)] += 1
    order = {mode: i for i, mode in enumerate(MODES)}
    return tuple(sorted(draws, key=lambda drawn: order[drawn.task.mode]))


def held_out_skill(count: int, seed: int = 2024) -> list[Task]:
    """`count` distinct questions that no training document shows."""
    rng, found = random.Random(f"{seed}/math"), {}
    while len(found) < count:
        task = skill_task(rng, hold=True)
        found[task.question] = task
    return list(found.values())

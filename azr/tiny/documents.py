"""The synthetic text the embedded model is trained on: (prompt, response) pairs in the `tiny` wording of prompts.py.

Six kinds (propose and solve in three modes) plus one skill that self-play never touches, sorting digits in prose, by
which forgetting can be measured. Base models are under-sharpened: they can do more than they usually do. So the text
is noisy on purpose: about one answer in ten is a plausible wrong value, one response in seventeen breaks the format,
some proposals are broken, trivial or non-deterministic. Programs whose hash falls in a fiftieth part are held out.
"""

from __future__ import annotations

import hashlib
import random

from azr.prompts import INDUCTION_INPUTS, fence, propose_prompt, solve_prompt
from azr.tasks import SEED_TASKS, Task
from azr.tiny.programs import (
    LETTERS,
    Program,
    arguments_text,
    induction_pairs,
    random_arguments,
    random_program,
    random_value,
    run_program,
)

WRONG_VALUE, FORMAT_FAULT, BROKEN_PROPOSAL, THINK = 0.10, 0.06, 0.08, 0.40
KINDS = {  # relative frequency of the documents: while the format is learned, and in the last third, mostly solving
    ("solver", "deduction"): (24, 44),
    ("solver", "abduction"): (19, 24),
    ("solver", "induction"): (20, 20),
    ("proposer", "deduction"): (10, 6),
    ("proposer", "abduction"): (10, 6),
    ("proposer", "induction"): (10, 6),
    ("skill", "math"): (7, 6),
}


def held_out(text: str) -> bool:
    """Whether a program belongs to the fiftieth part that no training document shows."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 50 == 0


def draw(rng: random.Random, hold: bool = False) -> tuple[Program, tuple, list]:
    """A program, arguments on which it runs, and its values there; from the held-out part if `hold`."""
    while True:
        program = random_program(rng)
        if held_out(program.text) != hold:
            continue
        arguments = random_arguments(program, rng)
        values = run_program(program, arguments)
        if values is not None:
            return program, arguments, values


def make_task(mode: str, rng: random.Random, hold: bool = False) -> tuple[Task, str]:
    """A right and solvable task of the mode, with a chain of thought that leads to its answer (may be empty)."""
    while mode == "math":
        task = skill_task(rng)
        if held_out(task.question) == hold:
            return task, ""
    while True:
        program, arguments, values = draw(rng, hold)
        given, output = arguments_text(arguments), repr(values[-1])
        steps = [repr(v) for v in values[:-1]]
        if mode == "deduction":
            return Task(mode=mode, program=program.text, input=given, output=output), " ".join(steps)
        if mode == "abduction":
            return Task(mode=mode, program=program.text, input=given, output=output), " ".join(steps[::-1])
        pairs = induction_pairs(program, rng, INDUCTION_INPUTS)
        if pairs is None:
            continue
        texts = [(arguments_text(a), repr(v)) for a, v in pairs]
        rng.shuffle(texts)
        half = INDUCTION_INPUTS // 2
        return Task(
            mode=mode,
            program=program.text,
            message=message_for(program, rng),
            visible=tuple(texts[:half]),
            hidden=tuple(texts[half:]),
        ), program.words


def message_for(program: Program, rng: random.Random) -> str:
    """A hint: everything, one operation of several, or only the type."""
    kind = rng.choices(["full", "part", "type"], [30, 35, 35])[0]
    if kind == "full":
        return program.words
    if kind == "part":
        return "uses " + rng.choice(program.words.split(" then "))
    return {"i": "a number function", "l": "a list function", "s": "a text function"}[program.takes]


def skill_task(rng: random.Random) -> Task:
    """Digits to be sorted, asked in prose; the answer reads as one number."""
    digits = [rng.randint(1, 9) for _ in range(rng.randint(3, 7))]
    down = rng.random() < 0.3
    question = f"Write the digits {', '.join(map(str, digits))} in {'falling' if down else 'rising'} order."
    return Task(mode="math", question=question, answer="".join(map(str, sorted(digits, reverse=down))))


def wrap(thought: str, answer: str, rng: random.Random) -> str:
    """The response of the given content; now and then in a form that breaks the contract."""
    if rng.random() >= FORMAT_FAULT:
        return f"{thought}</think><answer>{answer}</answer>"
    fault = rng.randrange(4)
    if fault == 0:
        return f"{thought}<answer>{answer}</answer>"  # thinking never closed
    if fault == 1:
        return f"{thought}</think>{answer}</answer>"  # no opening tag
    if fault == 2:
        return f"{thought}</think><answer>{answer.replace('```', '')}</answer>"  # no fences
    return f"{thought}</think><answer></answer>"


def wrong_value(text: str, rng: random.Random) -> str:
    """A value of the same look: a digit or letter changed, dropped or doubled."""
    places = [i for i, ch in enumerate(text) if ch.isdigit() or ch in LETTERS or ch in LETTERS.upper()]
    if not places:
        return rng.choice(["0", "1", "[]", "''"])
    i = rng.choice(places)
    new = str(rng.randint(0, 9)) if text[i].isdigit() else rng.choice(LETTERS)
    return text[:i] + rng.choice([new, new, "", text[i] * 2]) + text[i + 1 :]


def solve_document(mode: str, rng: random.Random) -> tuple[str, str]:
    """A solver's prompt and an answer, right nine times in ten."""
    task, thought = make_task(mode, rng)
    wrong = rng.random() < WRONG_VALUE
    if mode == "math":
        answer = task.answer
        answer = "".join(rng.sample(answer, len(answer))) if wrong else answer
    elif mode == "deduction":
        answer = fence("output", wrong_value(task.output, rng) if wrong else task.output)
    elif mode == "abduction":
        answer = fence("input", wrong_value(task.input, rng) if wrong else task.input)
    else:
        answer = fence("python", draw(rng)[0].text if wrong else task.program)
    thought = thought if rng.random() < THINK and not wrong else ""
    return solve_prompt(task, "tiny"), wrap(thought, answer, rng)


def broken(program: Program, given: str, rng: random.Random) -> tuple[str, str]:
    """A proposal that validation refuses: bad syntax, an unknown name, a wrong type, a random value, a triviality."""
    head, body = program.text.split("\n", 1)
    fault = rng.randrange(5)
    if fault == 0:
        return program.text.replace(")", "", 1), given
    if fault == 1:
        return program.text.replace("x", "z", 1), given
    if fault == 2:
        return program.text, repr(random_value(rng.choice([t for t in "ils" if t != program.takes]), rng))
    if fault == 3:
        return f"import random\n{head}\n    return random.randint(0, 9)", given
    return f"{head}\n    return x", given


def propose_document(mode: str, rng: random.Random) -> tuple[str, str]:
    """A proposer's prompt with one to three references (induction: the program) and a proposal."""
    if mode == "induction":
        return _propose_induction(rng)
    references = []
    for _ in range(rng.choices([1, 2, 3], [30, 50, 20])[0]):
        program, arguments, _ = draw(rng)
        references.append(Task(mode=mode, program=program.text, input=arguments_text(arguments), output=""))
    if rng.random() < 0.03:
        references[rng.randrange(len(references))] = SEED_TASKS["deduction"]
    program, arguments, _ = draw(rng)
    text, given = program.text, arguments_text(arguments)
    if rng.random() < BROKEN_PROPOSAL:
        text, given = broken(program, given, rng)
    thought = program.words if rng.random() < THINK / 2 else ""
    return propose_prompt(mode, references, "tiny"), wrap(thought, fence("python", text) + fence("input", given), rng)


def _propose_induction(rng: random.Random) -> tuple[str, str]:
    while True:
        program, _, _ = draw(rng)
        pairs = induction_pairs(program, rng, INDUCTION_INPUTS)
        if pairs is not None:
            break
    inputs = [arguments_text(arguments) for arguments, _ in pairs]
    if rng.random() < BROKEN_PROPOSAL:
        inputs[rng.randrange(len(inputs))] = rng.choice(inputs + [repr(random_value(rng.choice("ils"), rng))])
    answer = "".join(fence("input", given) for given in inputs) + fence("message", message_for(program, rng))
    reference = Task(mode="deduction", program=program.text, input="", output="")
    return propose_prompt("induction", [reference], "tiny"), wrap("", answer, rng)


def document(rng: random.Random, late: bool = False) -> tuple[str, str]:
    """One training document: (prompt, response); `late`: of the mixture for the last third of the training."""
    role, mode = rng.choices(list(KINDS), [weights[late] for weights in KINDS.values()])[0]
    return propose_document(mode, rng) if role == "proposer" else solve_document(mode, rng)


def documents(seed: int, count: int, late: bool = False) -> list[tuple[str, str]]:
    """`count` documents of one seed."""
    rng = random.Random(seed)
    return [document(rng, late) for _ in range(count)]


def held_out_tasks(mode: str, count: int, seed: int = 2024) -> list[Task]:
    """`count` distinct tasks of programs (or questions) that no training document shows."""
    rng, found = random.Random(f"{seed}/{mode}"), {}
    while len(found) < count:
        task, _ = make_task(mode, rng, hold=True)
        found[repr(task.to_json())] = task
    return list(found.values())

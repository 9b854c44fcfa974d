"""The prompts of the three modes and two roles, in two wordings.

    propose_prompt("deduction", references, "azr")      # what a proposer is asked
    solve_prompt(task, "azr")                           # what a solver is asked; ends with an opened <think>

`azr`: full instructions for models that read English. `tiny`: the same fields in the same fences, a word each for the
embedded model. Both end with an opened `<think>`, so a response is always "thoughts</think> <answer>...</answer>" and
one parser (parse.py) reads both. The contract of every answer is the fence it is in: ```python, ```input,
```output, ```message.

A base model is trained on, or measured under, one exact wording: `template_hash` is stored with every run and with the
embedded model, and a change of wording is a change of the experiment. Imports task.py alone.
"""

from __future__ import annotations

import hashlib
import re

from azr.tasks.task import INDUCTION_INPUTS, Task

STOP = "</answer>"  # where a response ends; its tokens are trained, so the model learns to stop

WRAPPER = (
    "The following is a dialogue between a User and an Assistant. The Assistant works the problem out step by step "
    "inside <think> </think> tags and then states its final answer inside <answer> </answer> tags, that is: "
    "<think> reasoning </think> <answer> answer </answer>.\nUser: {task}\nAssistant: <think>"
)

PROGRAM_RULES = """Rules for the program:
- the entry point is a function named `f` with at least one parameter, and it returns a value; helper functions and
  classes are allowed, imports go to the top
- the value it returns is a plain Python literal (numbers, strings, booleans, lists, tuples, dicts, sets), not None,
  and short enough to be shown in full
- it is deterministic: no randomness, date, time, files, network, environment or printing, no dependence on the order
  of a set or on object addresses; it ends within a second of CPU time
- allowed modules: math, re, itertools, functools, collections, heapq, bisect, string, operator, copy, dataclasses,
  enum, fractions, decimal, json, textwrap, typing and their like"""

INPUT_RULES = """Rules for an input:
- it is the text between the parentheses of the call `f(...)`: literal arguments separated by commas, strings in quotes,
  no expressions"""

PROPOSE_GOAL = {
    "deduction": "Another solver will see your program and your input and must work out the output by reasoning alone.",
    "abduction": "Another solver will see your program and its output and must find an input that gives this output.",
}


def fence(tag: str, text: str) -> str:
    """A fenced block, closed and followed by a newline."""
    return f"```{tag}\n{text}\n```\n"


# --- azr: for models that read English -----------------------------------------------------------------------------

EXAMPLE_PROGRAM = """```python
def f(name, info):
    return ...
```
```input
'John', {'age': 20}
```
"""

PROPOSE = """Write one new Python program together with one input for it.
{goal}
Make it clearly different from the references below, and demanding: several dependent steps, state that changes,
recursion, dynamic programming, data structures, string or number manipulation. It should be hard but not impossible:
a good solver should succeed on some attempts and fail on others.

{program_rules}

{input_rules}

Give exactly two fenced blocks inside the answer tags, first the program, then the input, like this:
{example}
Think about an idea and check it against the rules before you write it down.
{references}"""

PROPOSE_INDUCTION = """Below is a Python function `f`. Write {count} different inputs for it and a short message.
Another solver will see some of your inputs with their outputs and your message, but not the program, and must write a
program that also gives the right outputs for the inputs it was not shown. Choose inputs that together reveal what the
function does, in its special cases too, and that give varied outputs. The message may describe the task or give a
hint; it must not contain code of the program. The task should be hard but not impossible.

{input_rules}

Give {count} fenced input blocks and one fenced message block inside the answer tags, like this:
```input
'John', 20
```
```input
'Sammy', 37
```
...
```message
Find out how a name and an age are combined.
```

The function:
{program}"""

SOLVE_DEDUCTION = """Work out what the function `f` below returns for the given input.
Answer with the value as a Python literal (strings in quotes) in one fenced block tagged output inside the answer tags,
like this:
```output
{'age': 20}
```

The program:
{program}
The input:
{input}"""

SOLVE_ABDUCTION = """Find an input for which the function `f` below returns the given output. Any input that gives this
output is right. Answer with the text between the parentheses of `f(...)`, literal arguments separated by commas, in
one fenced block tagged input inside the answer tags, like this:
```input
'John', 20
```

The program:
{program}
The output:
{output}"""

SOLVE_INDUCTION = """Write a Python function `f` that turns each input below into its output. It is judged on further
inputs that are not shown, so find the general rule instead of listing cases.
{program_rules}

Answer with the whole program in one fenced block tagged python inside the answer tags, like this:
```python
def f(a):
    return a
```

{pairs}
The message:
{message}"""

SOLVE_MATH = "Solve this problem. Put the final answer, inside the answer tags, in \\boxed{}.\n{question}\n"


def _fill(text: str, **fields: str) -> str:
    """Puts each field in its place. Not str.format: programs and values are full of braces, which stay as they are, and
    a field's own text is never searched for other fields."""
    names = re.compile("|".join(f"{{{name}}}" for name in fields))
    return names.sub(lambda match: fields[match[0][1:-1]], text)


def _azr_propose(mode: str, references: list[Task]) -> str:
    if mode == "induction":
        program = fence("python", references[0].program)
        return _fill(PROPOSE_INDUCTION, count=str(INDUCTION_INPUTS), input_rules=INPUT_RULES, program=program)
    shown = "".join(
        f"\nReference {i}:\n{fence('python', task.program)}{fence('input', task.input)}"
        for i, task in enumerate(references, 1)
    )
    return _fill(
        PROPOSE,
        goal=PROPOSE_GOAL[mode],
        program_rules=PROGRAM_RULES,
        input_rules=INPUT_RULES,
        example=EXAMPLE_PROGRAM,
        references=shown,
    )


def _azr_solve(task: Task) -> str:
    if task.mode == "deduction":
        return _fill(SOLVE_DEDUCTION, program=fence("python", task.program), input=fence("input", task.input))
    if task.mode == "abduction":
        return _fill(SOLVE_ABDUCTION, program=fence("python", task.program), output=fence("output", task.output))
    if task.mode == "induction":
        pairs = "".join(
            f"Input {i}:\n{fence('input', arguments)}Output {i}:\n{fence('output', output)}"
            for i, (arguments, output) in enumerate(task.visible, 1)
        )
        return _fill(SOLVE_INDUCTION, program_rules=PROGRAM_RULES, pairs=pairs, message=fence("message", task.message))
    return _fill(SOLVE_MATH, question=task.question)


# --- tiny: a word each ----------------------------------------------------------------------------------------------


def _tiny_propose(mode: str, references: list[Task]) -> str:
    if mode == "induction":
        return "propose induction\n" + fence("python", references[0].program)
    shown = "".join(fence("python", task.program) + fence("input", task.input) for task in references)
    return f"propose {mode}\n{shown}"


def _tiny_solve(task: Task) -> str:
    if task.mode == "deduction":
        return "solve deduction\n" + fence("python", task.program) + fence("input", task.input)
    if task.mode == "abduction":
        return "solve abduction\n" + fence("python", task.program) + fence("output", task.output)
    if task.mode == "induction":
        pairs = "".join(fence("input", arguments) + fence("output", output) for arguments, output in task.visible)
        return "solve induction\n" + pairs + fence("message", task.message)
    return f"{task.question}\n"


TEMPLATES = {
    "azr": (WRAPPER, _azr_propose, _azr_solve),
    "tiny": ("User: {task}Assistant: <think>", _tiny_propose, _tiny_solve),
}


def propose_prompt(mode: str, references: list[Task], template: str) -> str:
    """The proposer's prompt of a mode. Induction takes exactly one reference: the task whose program is asked about.

    template: "azr" or "tiny"; ValueError for another one.
    """
    wrapper, propose, _ = _template(template)
    return wrapper.replace("{task}", propose(mode, references))


def solve_prompt(task: Task, template: str) -> str:
    """The solver's prompt for a task; it shows nothing of the expected answer. ValueError: an unknown template."""
    wrapper, _, solve = _template(template)
    return wrapper.replace("{task}", solve(task))


def template_hash(template: str) -> str:
    """16 hex digits that change when any prompt of the template changes by a character."""
    # Of one prompt of each kind, with made-up tasks: whatever words a run can show are in them.
    program, pairs = "def f(a, b):\n    return a * b", (("1, 2", "2"), ("'x', 3", "'xxx'"))
    deduction = Task(mode="deduction", program=program, input="2, 3", output="6")
    tasks = [
        deduction,
        Task(mode="abduction", program=program, input="2, 3", output="6"),
        Task(mode="induction", program=program, message="combine them", visible=pairs, hidden=pairs),
        Task(mode="math", question="What is 1 + 1?", answer="2"),
    ]
    prompts = [propose_prompt(mode, [deduction, deduction], template) for mode in ("deduction", "abduction")]
    prompts += [propose_prompt("induction", [deduction], template)] + [solve_prompt(t, template) for t in tasks]
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]


def _template(name: str):
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}: choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[name]

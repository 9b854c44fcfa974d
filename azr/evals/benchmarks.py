r"""Public benchmarks: where they come from, their files, and how their problems are put to a model.

    benchmark = load("math500")                                   # through huggingface_hub
    benchmark = load("humaneval+=HumanEvalPlus.jsonl.gz")         # a local copy of the public file, .jsonl or .jsonl.gz
    prompt(benchmark.items[0], "plain")

Grading is in azr/evals/grade.py; held-out accuracy of a training run in azr/evals/held_out.py. Untested,
for want of the files: `livecodebench-execution`, and the hub. Left out: few-shot prompts, splits other than the test
one, the images of OlympiadBench. No torch is imported here.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from azr.evals import code_answers
from azr.evals.math_answers import last_boxed
from azr.jsonl import strict_lines
from azr.models import model_path
from azr.tasks import prompts
from azr.tasks.prompts import STOP, TEMPLATES, WRAPPER, fence, solve_prompt
from azr.tasks.task import Task, text_field


@dataclass(frozen=True)
class Item:
    """A problem: a task (of mode "math" with question and answer, too), or a program to write."""

    task_id: str
    task: Task | None = None
    code: code_answers.Problem | None = None


@dataclass(frozen=True)
class Benchmark:
    """kind: "task", "math" or "code". strict: a code answer must be right on the extra inputs of evalplus too."""

    name: str
    kind: str
    items: tuple[Item, ...]
    path: str
    file_hash: str  # of the file's bytes, 16 hex digits
    strict: bool = False
    part: str | None = None  # what `evenly_spread` took; None: all problems

    def by_id(self) -> dict[str, Item]:
        """Returns the problems under their task_ids, in the order of the file."""
        return {item.task_id: item for item in self.items}


@dataclass(frozen=True)
class Source:
    """`hub`: dataset and the pattern of its file; `page`: where to get the file when the hub does not have it."""

    kind: str
    read: Callable[[dict, int], Item] | None
    hub: tuple[str, str] | None = None
    page: str = ""
    strict: bool = False


# ---------------------------------------------------------------- rows of the public files


def _id(row: dict, number: int) -> str:
    value = next((row[name] for name in ("task_id", "unique_id", "id", "question_id", "idx") if name in row), number)
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError(f"the id {str(value)[:60]!r} is neither text nor a whole number")
    return str(value)


def _one_of(row: dict, *names: str) -> str:
    """The text of the first of these fields that the row has."""
    return text_field(row, next((name for name in names if name in row), names[0]))


def _cruxeval(mode: str, row: dict, number: int) -> Item:
    program, given, output = (text_field(row, column) for column in ("code", "input", "output"))
    task = {"mode": mode, "program": program, "input": given, "output": output}
    return Item(_id(row, number), Task.from_json(task))


def _livecodebench(row: dict, number: int) -> Item:
    """livecodebench/execution-v2: `input` is a call of `function_name`, or its arguments."""
    name, call = text_field(row, "function_name"), text_field(row, "input").strip()
    task = {
        "mode": "deduction",
        "program": f"{text_field(row, 'code').rstrip()}\n\nf = {name}",
        "input": call[len(name) + 1 : -1] if call.startswith(f"{name}(") and call.endswith(")") else call,
        "output": text_field(row, "output"),
    }
    # Several calls may be about one question.
    if {"id", "question_id"} <= row.keys():
        row = {"id": f"{row['question_id']}/{_id({'id': row['id']}, 0)}"}
    return Item(_id(row, number), Task.from_json(task))


def _task(row: dict, number: int) -> Item:
    task = Task.from_json(row)
    return Item(f"{task.mode}/{task.hash[:16]}", task)


def _math(row: dict, number: int) -> Item:
    """Questions and answers under the names that the files have for them; the reference in the solution's last box
    (Minerva) or after #### (GSM8K) where there is no answer of its own."""
    question = _one_of(row, "problem", "question")
    if isinstance(row.get("context"), str) and row["context"].strip():
        question = f"{row['context'].strip()}\n{question}"
    answer = row.get("answer", row.get("final_answer"))
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    answer = last_boxed(_one_of(row, "answer", "solution")) if answer is None else str(answer)
    answer = (answer or "").rpartition("####")[2].strip().strip("$").strip()
    if not answer:
        raise ValueError("there is no reference answer: neither 'answer', 'final_answer' nor a \\boxed{} in 'solution'")
    return Item(_id(row, number), Task.from_json({"mode": "math", "question": question, "answer": answer}))


_EVALPLUS = "https://github.com/evalplus/{}/releases"
BENCHMARKS = {
    "humaneval": Source("code", None, ("openai/openai_humaneval", "test")),
    "humaneval+": Source("code", None, None, _EVALPLUS.format("humanevalplus_release"), strict=True),
    "mbpp+": Source("code", None, None, _EVALPLUS.format("mbppplus_release"), strict=True),
    "cruxeval-o": Source("task", partial(_cruxeval, "deduction"), ("cruxeval-org/cruxeval", "test")),
    "cruxeval-i": Source("task", partial(_cruxeval, "abduction"), ("cruxeval-org/cruxeval", "test")),
    "livecodebench-execution": Source("task", _livecodebench, ("livecodebench/execution-v2", "test")),
    "math500": Source("math", _math, ("HuggingFaceH4/MATH-500", "test")),
    "aime24": Source("math", _math, ("HuggingFaceH4/aime_2024", "train")),
    "aime25": Source("math", _math, ("math-ai/aime25", "test")),
    "amc23": Source("math", _math, ("math-ai/amc23", "test")),
    "minerva": Source("math", _math, ("math-ai/minervamath", "test")),
    "olympiadbench": Source("math", _math, ("math-ai/olympiadbench", "test")),
    "gsm8k": Source("math", _math, ("openai/gsm8k", "main/test")),
    "tiny": Source("task", _task),
}


# ---------------------------------------------------------------- loading


def load(name: str) -> Benchmark:
    """The benchmark of NAME or NAME=FILE. ValueError, in one line, for an unknown name or a file that is not its."""
    name, equals, file = name.partition("=")
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, 3, 0.4)
        raise ValueError(
            f"unknown benchmark {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(BENCHMARKS)}")
        )
    if equals and not file:
        raise ValueError(f"--benchmark {name}=: the name of a file is missing")
    source = BENCHMARKS[name]
    path = Path(file).expanduser() if file else _fetch(name, source)
    if not path.is_file():
        fault = "a directory" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {fault}; expected the public file of {name}")
    items = _code_items(path, name) if source.kind == "code" else _items(path, source)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Benchmark(name, source.kind, tuple(items), str(path), digest, source.strict)


def evenly_spread(benchmark: Benchmark, count: int | None) -> Benchmark:
    """The benchmark with `count` of its problems, evenly spread over its file, which may be sorted by kind or by
    difficulty; all of them for None or where there are no more."""
    items, total = benchmark.items, len(benchmark.items)
    if count is None or count >= total:
        return benchmark
    part = f"{count} problems, evenly spread over the {total}"
    return replace(benchmark, items=tuple(items[i * total // count] for i in range(count)), part=part)


def _fetch(name: str, source: Source) -> Path:
    """The file of a benchmark: part of the project, or through the hub."""
    if name == "tiny":
        return Path(model_path("tiny")) / "held_out.jsonl"
    if source.hub is None:
        raise ValueError(
            f"{name} is not on the model hub: download its file from {source.page} and give --benchmark {name}=FILE"
        )
    from huggingface_hub import snapshot_download

    from azr.models import only_cached

    repository, part = source.hub
    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset",
            local_files_only=only_cached(repository),
            allow_patterns=[f"*{part}*.jsonl", f"*{part}*.jsonl.gz", f"*{part}*.parquet"],
        )
        return next(
            path for ending in ("*.jsonl", "*.jsonl.gz", "*.parquet") for path in sorted(Path(folder).rglob(ending))
        )
    except Exception as error:  # the hub's client raises a dozen kinds, of three libraries
        raise ValueError(
            f"{name} cannot be had from the hub ({repository}: {type(error).__name__}); give a local copy "
            f"of its file: --benchmark {name}=FILE"
        ) from error


def rows_of(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ("FILE, line N", row) of a .jsonl, .jsonl.gz or (with pyarrow) .parquet file. ValueError: a bad line."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(
                f"{path} is a parquet file: pip install pyarrow, or give a .jsonl copy as NAME=FILE"
            ) from error
        for number, row in enumerate(parquet.read_table(path).to_pylist(), 1):
            yield f"{path}, row {number}", row
        return
    yield from strict_lines(path)


def _items(path: Path, source: Source) -> list[Item]:
    items: dict[str, Item] = {}
    for number, (where, row) in enumerate(rows_of(path)):
        try:
            item = source.read(row, number)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if item.task_id in items:
            raise ValueError(f"{where}: the problem {item.task_id} is there twice")
        items[item.task_id] = item
    if not items:
        raise ValueError(f"{path}: holds no problems")
    return list(items.values())


def _code_items(path: Path, name: str) -> list[Item]:
    """evalplus's file, or for `humaneval` also OpenAI's, whose tests are run once to see which inputs they use."""
    first = next(rows_of(path), ("", {}))[1]
    if name == "humaneval" and "test" in first and "base_input" not in first:
        problems = code_answers.official_problems(rows_of(path))
    elif path.suffix == ".parquet":
        raise ValueError(f"{path}: expected evalplus's .jsonl.gz file")
    else:
        problems = code_answers.load_problems(path)
    other = "HumanEval/" if name == "mbpp+" else "Mbpp/"
    if problems and problems[0].task_id.startswith(other):
        raise ValueError(
            f"{path}: {problems[0].task_id} is no problem of {name}; name the benchmark that the file holds"
        )
    return [Item(problem.task_id, code=problem) for problem in problems]


def cruxeval_tasks(count: int, name: str = "cruxeval-o") -> list[Task]:
    """`count` problems of CRUXEval (arXiv 2401.03065) as deduction and as abduction tasks, always the same ones.

    name: cruxeval-o=FILE for a local copy. ValueError, in one line, if it cannot be had or read.
    """
    items = load(name).items
    chosen = random.Random(0).sample(items, min(count, len(items)))
    return [replace(item.task, mode=mode) for mode in ("deduction", "abduction") for item in chosen]


# ---------------------------------------------------------------- prompts

_INSTRUCTIONS = {
    "deduction": "What does the function `f` below return for the given input? Work it out step by step, then give the "
    "value as a Python literal in one fenced block tagged output.\n\n{program}{input}",
    "abduction": "Find an input for which the function `f` below returns the given output. Work it out step by step, "
    "then give the text between the parentheses of `f(...)` in one fenced block tagged input.\n\n"
    "{program}{output}",
    "induction": "Write a Python function `f` that turns each input below into its output, and that will do so for "
    "further inputs. Give the program in one fenced block tagged python.\n\n{pairs}{message}",
    "math": "{question}\n\nReason step by step, and put the final answer in \\boxed{}.",
    "code": "Complete this Python function. Give the whole function, with its imports, in one fenced block tagged "
    "python.\n\n{code}",
}
PLAIN = {**_INSTRUCTIONS, "code": "{code}"}  # a function to go on with, as HumanEval's authors ask for it
_AZR_CODE = (
    "Complete the Python function below. Answer with the whole function, with its imports, in one fenced block "
    "tagged python inside the answer tags.\n\n{code}"
)
NAMES = (*TEMPLATES, "plain", "chat")
_AFTER_CODE = ("\nif __name__", "\nprint(", "\nassert ", "\n```")


def prompt(item: Item, template: str, tokenizer: Any = None) -> str:
    """The text a model is asked with. chat needs the tokenizer. ValueError: a template that does not know this kind."""
    mode = item.task.mode if item.task else "code"
    if template in TEMPLATES:
        if item.task:
            return solve_prompt(item.task, template)
        if template == "azr":
            return WRAPPER.replace("{task}", _fill(_AZR_CODE, item))
    elif template == "plain":
        return _fill(PLAIN[mode], item) + ("" if mode == "code" else "\n")
    elif template == "chat":
        return _chat(_fill(_INSTRUCTIONS[mode], item), tokenizer)
    elif template not in NAMES:
        raise ValueError(f"unknown template {template!r}: choose from {', '.join(NAMES)}")
    raise ValueError(f"the template {template} has no prompt for {mode} problems")


def _fill(text: str, item: Item) -> str:
    if item.code:
        return text.replace("{code}", item.code.prompt if text == "{code}" else fence("python", item.code.prompt))
    task = item.task
    fields = {
        "question": task.question,
        "program": fence("python", task.program),
        "input": fence("input", task.input),
        "output": fence("output", task.output),
        "message": fence("message", task.message),
        "pairs": "".join(fence("input", value) + fence("output", result) for value, result in task.visible),
    }
    names = re.compile("|".join("{" + name + "}" for name in fields))
    return names.sub(lambda match: fields[match[0][1:-1]], text)


def _chat(text: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("--template chat: this model's tokenizer has no chat template; take azr or plain")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


def stop_strings(benchmark: Benchmark, template: str) -> tuple[str, ...]:
    """What ends an answer besides the end-of-text token."""
    if template in TEMPLATES:
        return (STOP,)
    if template == "chat":
        return ()
    if benchmark.kind != "code":
        return ("\nQuestion:",)
    # A body is over where the next top-level statement begins; MBPP's prompts leave the whole function to write.
    return _AFTER_CODE + (() if benchmark.name == "mbpp+" else ("\ndef ", "\nclass ", "\n@"))


def template_hash(benchmark: Benchmark, template: str, tokenizer: Any = None) -> str:
    """16 hex digits that change with any character of the template. For tasks and maths under azr or tiny it is the
    one that a training run records."""
    if template in TEMPLATES and benchmark.kind != "code":
        return prompts.template_hash(template)
    parts = [template, *stop_strings(benchmark, template)]
    if template in TEMPLATES:
        parts += [prompts.template_hash(template), _AZR_CODE]
    elif template == "chat":
        parts += [_chat(text, tokenizer) for text in _INSTRUCTIONS.values()]
    else:
        parts += PLAIN.values()
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

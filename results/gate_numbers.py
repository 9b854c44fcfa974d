"""What the gates of the embedded base are computed with: styles of thoughts, statements, counts a task. No torch.

    style_of("deduction", "p=5+3=8;")                       # "full"
    Counts.from_json(part, tasks).of(mode="deduction", levels=(4, 5, 6)).interval()
    split_gain(base, trained)                               # elicitation and execution, with intervals

The unit is a task: an interval is over tasks like these, not over training runs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from azr.passk import Interval, difference_interval, pass_at_k, share_interval
from azr.tasks import MODES, Task
from sandbox import literal

STYLES = ("none", "junk", "coarse", "full", "check", "other")
TRACED = ("full", "check")  # thoughts in which something was worked out
BEYOND = 7  # the level of programs with more statements than training shows in a solver's task
LEVELS = (1, 2, 3, 4, 5, 6, BEYOND)  # statements
DRAWS = 2000  # bootstrap resamples

# ---------------------------------------------------------------- reading thoughts and programs

_NAMES = re.compile(r"(?:[a-z];)+")
_VALUE = re.compile(r"[a-z]=[^=]*")
_STEP = re.compile(r"[a-z]=.*[^=]=[^=]+|.+ (?:yes|no)", re.DOTALL)  # an expression and its value; a test


def thought_of(response: str) -> str:
    """What stands before </think>; all of it if that is missing (a response that was cut off)."""
    return response.partition("</think>")[0]


def style_of(mode: str, thought: str) -> str:
    """The style of a solver's thought, as azr/tiny/documents.py writes them; "other" for what it never writes.

    check: a second look, which is `again` in a deduction, another try in an abduction and a second pair for the same
    hypothesis in an induction. (Half of the full searches of the documents have two tries, and cannot be told apart.)
    A trace of nothing but a loop that never turned (`p=8;`) reads like a coarse thought and counts as one.
    """
    if not thought:
        return "none"
    if _NAMES.fullmatch(thought):
        return "junk"
    return {"deduction": _deduction, "abduction": _abduction, "induction": _induction}[mode](thought)


def _parts(thought: str) -> list[str]:
    return [part for part in thought.split(";") if part]


def _is_step(part: str) -> bool:
    return " gives " not in part and _STEP.fullmatch(part.replace("==", "")) is not None


def _deduction(thought: str) -> str:
    parts = _parts(thought)
    if any(part.startswith("again ") for part in parts):
        return "check"
    if any(map(_is_step, parts)):
        return "full"
    return "coarse" if all(map(_VALUE.fullmatch, parts)) else "other"


def _abduction(thought: str) -> str:
    parts = _parts(thought)
    if any(" gives " in part for part in parts):
        return "coarse"
    tries = sum(part in ("yes", "no") for part in parts)
    if tries > 1:
        return "check"
    return "full" if tries or any(map(_is_step, parts)) else "other"


def _induction(thought: str) -> str:
    if thought.startswith("try "):
        checks = [sum(part in ("yes", "no") for part in _parts(tried)) for tried in thought.split("try ")]
        return "check" if max(checks) > 1 else "full"
    return "coarse" if re.fullmatch(r"(?:[a-z][^=;]*;)+", thought) else "other"


@cache  # of held-out programs, over and over
def statements(program: str) -> int | None:
    """Statements of f as the generator counts them: names that f gives a value, whatever the loops; None: no f."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "f"]
    if not functions:
        return None
    targets = [t for node in ast.walk(functions[-1]) if isinstance(node, ast.Assign) for t in node.targets]
    return len({name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)})


def level(task: Task) -> int:
    """A held-out task's difficulty: statements, BEYOND for that many or more."""
    return min(BEYOND, statements(task.program) or 1)


def stratified(tasks: Sequence[Task], a_cell: int | None) -> list[int]:
    """Indices of the first `a_cell` tasks of each mode and level, in order; None: of all."""
    count: dict[tuple, int] = {}
    indices = []
    for i, task in enumerate(tasks):
        cell = task.mode, level(task)
        count[cell] = count.get(cell, 0) + 1
        if a_cell is None or count[cell] <= a_cell:
            indices.append(i)
    return indices


def full_prefix(program: str, given: str) -> str:
    """How a full trace of f(given) begins: up to its first value that has to be computed, with the expression, without
    the value. The program is one of the generator's.

    Starts of loops before it are copies and stay. It ends before the equals sign, which is one token with the bracket
    of a list that follows: "=" alone would say that no list comes, in a way that no text of the training has.
    """
    function = ast.parse(program).body[0]
    values = dict(zip((a.arg for a in function.args.args), literal.parse_args(given)[0]))
    text = ""
    for node, after in zip(function.body, function.body[1:]):
        if isinstance(node, ast.If) or isinstance(getattr(node, "value", None), ast.IfExp):
            return text + _filled(program, (node if isinstance(node, ast.If) else node.value).test, values)
        if isinstance(node, ast.While) and not _turns(node, values):
            continue
        if isinstance(node, (ast.For, ast.While)):
            if isinstance(node, ast.For):
                over = node.iter
                values[node.target.id] = values[over.id][0] if isinstance(over, ast.Name) else 0  # range(...)
            node = node.body[0]
        name, expression = node.targets[0].id, _filled(program, node.value, values)
        if not isinstance(after, (ast.For, ast.While)):
            return f"{text}{name}={expression}"
        values[name] = ast.literal_eval(expression)
        text += f"{name}={expression};"
    return text  # nothing is computed: loops that never turn


def _filled(program: str, node: ast.expr, values: dict) -> str:
    """The text of an expression with values in the place of names."""
    line, start = program.split("\n")[node.lineno - 1], node.col_offset
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in values]
    text, end = "", start
    for name in sorted(names, key=lambda n: n.col_offset):
        text, end = text + line[end : name.col_offset] + repr(values[name.id]), name.end_col_offset
    return text + line[end : node.end_col_offset]


def _turns(loop: ast.While, values: dict) -> bool:
    """Whether `while p>3` or `while p<3` turns at all."""
    left, right = values[loop.test.left.id], loop.test.comparators[0].value
    return left > right if isinstance(loop.test.ops[0], ast.Gt) else left < right


# ---------------------------------------------------------------- counts a task


@dataclass
class Counts:
    """Answers to held-out tasks, counted by style of their thoughts.

    index: (tasks,) places in held_out.jsonl; modes, levels: (tasks,); table: (tasks, STYLES, 3) answers, right ones,
    response tokens; formed, cut: (tasks,) answers in the think/answer format, and ended by the length limit.
    """

    index: np.ndarray
    modes: np.ndarray
    levels: np.ndarray
    table: np.ndarray
    formed: np.ndarray
    cut: np.ndarray

    @staticmethod
    def from_json(rows: list, tasks: Sequence[Task]) -> Counts:
        """rows: [index, {style: [answers, right, tokens]}, formed, cut] a task."""
        table = np.zeros((len(rows), len(STYLES), 3), dtype=np.int64)
        for i, (_, cells, _, _) in enumerate(rows):
            for style, cell in cells.items():
                table[i, STYLES.index(style)] = cell
        index = np.array([row[0] for row in rows], dtype=np.int64)
        modes, levels = np.array([tasks[i].mode for i in index]), np.array([level(tasks[i]) for i in index])
        return Counts(index, modes, levels, table, np.array([r[2] for r in rows]), np.array([r[3] for r in rows]))

    def __len__(self) -> int:
        return len(self.index)

    def where(self, mask: np.ndarray) -> Counts:
        """The tasks at which `mask`, (tasks,) bool, is True."""
        return Counts(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    def of(self, mode: str | None = None, levels: Iterable[int] | None = None) -> Counts:
        """The tasks of a mode and of some levels; None: of all."""
        mask = np.ones(len(self), dtype=bool) if mode is None else self.modes == mode
        return self.where(mask if levels is None else mask & np.isin(self.levels, list(levels)))

    def among(self, index: Iterable[int]) -> Counts:
        """The tasks at these places, for a comparison with a result that has fewer."""
        return self.where(np.isin(self.index, list(index)))

    @property
    def n(self) -> np.ndarray:
        """(tasks,) answers to each task, over all styles."""
        return self.table[:, :, 0].sum(axis=1)

    @property
    def right(self) -> np.ndarray:
        """(tasks,) right answers to each task, over all styles."""
        return self.table[:, :, 1].sum(axis=1)

    @property
    def accuracy(self) -> np.ndarray:
        """(tasks,) share of right answers."""
        return self.right / self.n

    def interval(self) -> Interval:
        """Mean accuracy with its interval over tasks."""
        return share_interval(self.accuracy)

    def pass_at(self, k: int) -> Interval:
        """pass@k with its interval over tasks."""
        return share_interval(pass_at_k(self.n, self.right, k))

    def shares(self) -> dict[str, float]:
        """Of the answers, by style."""
        answers = self.table[:, :, 0].sum(axis=0)
        return dict(zip(STYLES, answers / answers.sum()))

    def tokens(self) -> float:
        """Mean length of a response."""
        return float(self.table[:, :, 2].sum() / self.table[:, :, 0].sum())

    def given(self, styles: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(answers, right ones) of each task with a thought in one of the styles, (tasks,) each."""
        cells = self.table[:, [STYLES.index(style) for style in styles]].sum(axis=1)
        return cells[:, 0], cells[:, 1]


def paired(a: Counts, b: Counts) -> Interval:
    """Accuracy of b minus a, over the tasks that both have. ValueError if there are none."""
    both = np.intersect1d(a.index, b.index)
    a, b = a.among(both), b.among(both)
    if not len(a) or list(a.index) != list(b.index):
        raise ValueError("the two results have no tasks in common, or in another order")
    return difference_interval(b.accuracy - a.accuracy)


def given_style(counts: Counts, styles: Sequence[str]) -> tuple[Interval | None, int]:
    """Accuracy given the style, the mean over tasks with such an answer; and how many tasks have none."""
    n, right = counts.given(styles)
    some = n > 0
    return (share_interval(right[some] / n[some]) if some.any() else None), int((~some).sum())


def style_difference(a: Counts, less: Sequence[str], b: Counts, more: Sequence[str]) -> tuple[Interval | None, int]:
    """Accuracy of b given `more` minus that of a given `less`, paired over the tasks that have both; how many have not.

    a and b: the same tasks in the same order, and often one and the same result.
    """
    (n_a, right_a), (n_b, right_b) = a.given(less), b.given(more)
    both = (n_a > 0) & (n_b > 0)
    values = right_b[both] / n_b[both] - right_a[both] / n_a[both]
    return (difference_interval(values) if both.sum() > 1 else None), int((~both).sum())


# ---------------------------------------------------------------- statistics


def ranks(values: Sequence[float]) -> np.ndarray:
    """(n,) ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; NaN if one of them is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm > 0 else float("nan")


def spearman_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Interval:
    """The same with its 95 % bootstrap interval over pairs."""
    a, b, rng = np.asarray(a), np.asarray(b), np.random.default_rng(seed)
    picks = rng.integers(len(a), size=(DRAWS, len(a)))
    low, high = np.nanquantile([spearman(a[row], b[row]) for row in picks], [0.025, 0.975])
    return Interval(spearman(a, b), float(low), float(high))


def split_gain(base: Counts, trained: Counts, seed: int = 0) -> dict[str, Interval]:
    """The gain in accuracy as elicitation (other shares of styles) plus execution (other accuracy given a style).

    In each cell of mode and level, with shares s and accuracies a of a style, the gain is the sum over styles of
    (s' - s) (a + a') / 2 and of (s + s') / 2 (a' - a) (Kitagawa 1955); both are averaged over tasks. A style that only
    one of the two models has in a cell has that one's accuracy, so that its coming and going is elicitation. Intervals:
    bootstrap over tasks within the cells. ValueError unless both have the same tasks.
    """
    if list(base.index) != list(trained.index):
        raise ValueError("the gain is split over the same tasks in the same order")
    cells = [np.flatnonzero((base.modes == mode) & (base.levels == at)) for mode in MODES for at in LEVELS]
    cells = [cell for cell in cells if len(cell)]
    rng = np.random.default_rng(seed)
    names = ("gain", "elicitation", "execution")
    resampled = ([rng.choice(cell, len(cell)) for cell in cells] for _ in range(DRAWS // 2))
    drawn = np.array([_split(base, trained, picks) for picks in resampled])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {
        name: Interval(float(m), float(a), float(b))
        for name, m, a, b in zip(names, _split(base, trained, cells), low, high)
    }


def _split(base: Counts, trained: Counts, cells: list[np.ndarray]) -> np.ndarray:
    """(gain, elicitation, execution), the mean over the tasks of the cells."""
    sums = [np.stack([c.table[cell, :, :2].sum(axis=0) for cell in cells]) for c in (base, trained)]  # cells, styles, 2
    weights = np.array([len(cell) for cell in cells]) / sum(map(len, cells))
    share = [s[:, :, 0] / s[:, :, 0].sum(axis=1, keepdims=True) for s in sums]
    with np.errstate(invalid="ignore"):
        right = [s[:, :, 1] / s[:, :, 0] for s in sums]
    right = [np.nan_to_num(np.where(np.isnan(x), other, x)) for x, other in zip(right, right[::-1])]
    elicited = ((share[1] - share[0]) * (right[0] + right[1]) / 2).sum(axis=1)
    executed = ((share[0] + share[1]) / 2 * (right[1] - right[0])).sum(axis=1)
    return np.array([weights @ (elicited + executed), weights @ elicited, weights @ executed])

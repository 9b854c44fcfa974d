"""azr/tasks/parse.py: what is read from answers and proposals, and in which time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr.tasks import MODES, STOP, Proposal, parse_answer, parse_proposal
from azr.tasks.parse import fences
from tests.timing import cpu_seconds

DOUBLE = "def f(x):\n    return x * 2"


@pytest.mark.parametrize(
    "mode, response, well_formed, value",
    [
        ("deduction", "so 4</think> <answer>```output\n4\n```\n</answer>", True, "4"),
        ("deduction", "</think><answer>4</answer> and so on", True, "4"),
        ("deduction", "</think>\n\n<answer>```\n[1,\n 2]\n```</answer>", True, "[1,\n 2]"),
        ("deduction", "</think><answer>```output\n1\n``` or ```output\n2\n```</answer>", True, "2"),
        ("deduction", "</think><answer>```output\n'a```b'\n```</answer>", True, "'a```b'"),
        ("deduction", "</think><answer>```output 7```</answer>", True, "7"),
        ("deduction", "</think><answer>```OUTPUT\n7```</answer>", True, "7"),
        ("deduction", "</think>so<answer>4</answer>", False, "4"),
        ("deduction", "<answer>3</answer> no, <answer>4</answer>", False, "4"),
        ("deduction", "</think><answer>```output\n4\n```", False, "4"),
        ("deduction", "</think><answer>4", False, None),
        ("deduction", "</think><answer></answer>", True, None),
        ("deduction", "</think><answer>```output\n4</answer>", True, None),
        ("deduction", "4", False, None),
        ("abduction", "</think><answer>```input\n'a', k=2\n```</answer>", True, "'a', k=2"),
        (
            "induction",
            "</think><answer>```python\ndef f(a):\n    return a\n```</answer>",
            True,
            "def f(a):\n    return a",
        ),
        (
            "induction",
            "</think><answer>```python\n1\n```\n```py\ndef f(a):\n    return 2\n```</answer>",
            True,
            "def f(a):\n    return 2",
        ),
        ("induction", "</think><answer>def f(a): return a</answer>", True, None),
        ("math", "</think><answer> \\boxed{4} </answer>", True, "\\boxed{4}"),
    ],
)
def test_answers(mode, response, well_formed, value):
    parsed = parse_answer(mode, response)
    assert (parsed.well_formed, parsed.value) == (well_formed, value)
    assert (parsed.reason == "ok") == (well_formed and value is not None)
    assert parsed.reason in ("ok", "no_format", "no_answer")


def test_a_fence_inside_a_string_does_not_end_the_program():
    program = 'def f(x):\n    """Shown as\n```\n    code\n```\n    """\n    return x + "```"  # don\'t\n'
    parsed = parse_proposal("deduction", f"</think><answer>```python\n{program}```\n```input\n'a'\n```</answer>")
    assert parsed.value == Proposal("deduction", program.strip(), ("'a'",))
    broken = 'def f(x):\n    """never closed\n    return x'  # the quotes stay open: the fence still ends it
    parsed = parse_proposal("deduction", f"</think><answer>```python\n{broken}\n```\n```input\n'a'\n```</answer>")
    assert parsed.value == Proposal("deduction", broken, ("'a'",))


def test_proposals():
    answer = f"```input\n5\n```\nfor example\n```python\nprint(1)\n```\n```python\n{DOUBLE}\n```\n```input\n6\n```"
    assert parse_proposal("abduction", f"</think><answer>{answer}</answer>").value == Proposal(
        "abduction", DOUBLE, ("5",)
    )
    assert (
        parse_proposal("deduction", f"</think><answer>```\n{DOUBLE}\n```\n```input\n1\n```</answer>").value.program
        == DOUBLE
    )
    ten = "".join(f"```input\n{i}\n```\n" for i in range(10)) + "```message\ndon't think\n```"
    parsed = parse_proposal("induction", f"</think><answer>{ten}</answer>", DOUBLE)
    assert parsed.reason == "ok" and parsed.value == Proposal("induction", DOUBLE, tuple("0123456789"), "don't think")
    parsed = parse_proposal("induction", f"</think><answer>```input\n99\n```\n{ten}</answer>", DOUBLE)
    assert parsed.reason == "ok" and parsed.value.inputs == tuple("0123456789")  # eleven: the last ten
    for text, reason in [
        (f"```python\n{DOUBLE}\n```", "no_input"),
        ("```input\n1\n```", "no_program"),
        ("", "no_program"),
    ]:
        parsed = parse_proposal("deduction", f"</think><answer>{text}</answer>")
        assert (parsed.value, parsed.reason, parsed.well_formed) == (None, reason, True)
    assert parse_proposal("induction", "</think><answer>```input\n1\n```</answer>", DOUBLE).reason == "no_message"
    assert parse_proposal("induction", f"</think>{ten}", DOUBLE).reason == "no_format"
    with pytest.raises(ValueError):
        parse_proposal("induction", "</think><answer></answer>")


PIECES = [
    "</think>",
    "<answer>",
    "</answer>",
    "```",
    "```python\n",
    "```input\n",
    "```output",
    "\n",
    " ",
    '"""',
    "'",
    "'''",
    "\\",
    "#",
    "def f(x):\n    return x",
    "1",
    "[",
    "`",
    "message",
    "\ud800",
    "\0",
    "\r\n",
    "é",
    "{",
    "f'{",
    "lambda x:",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join))
def test_any_text_is_read_and_gets_a_reason(text):
    for mode in MODES:
        parsed = parse_answer(mode, text)
        assert parsed.reason and (parsed.value is not None or parsed.reason != "ok")
        assert parse_proposal(mode, text, "def f(x):\n    return x" if mode == "induction" else None).reason


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=60), st.text(max_size=60).filter(lambda t: "`" not in t and STOP not in t and t.strip()))
def test_a_fenced_literal_survives_any_thought(thought, value):
    thought = thought.replace("<", "(")
    shown = repr(value)
    for mode, tag in (("deduction", "output"), ("abduction", "input")):
        parsed = parse_answer(mode, f"{thought}</think> <answer>\n```{tag}\n{shown}\n```\n</answer>")
        assert parsed.well_formed and parsed.value == shown


@pytest.mark.parametrize(
    "piece",
    [
        "```python\n",
        "``` x ",
        '```\n"""\n',
        "</think><answer>",
        "<answer>",
        "'",
        "`",
        "#",
        "\\",
        "```input\n1\n```\n",
        " ",
        "```python\n'''",
        "</think> ",
        '"\\"',
    ],
)
def test_reading_is_linear(piece):
    text = "</think><answer>" + (piece * 200_000)[:200_000] + "</answer>"

    def read():
        for mode in MODES:
            known = "" if mode == "induction" else None
            assert parse_answer(mode, text).reason and parse_proposal(mode, text, known).reason

    assert cpu_seconds(read, 3) < 3


def test_fences_keep_their_order_and_tags():
    text = "a ```python\nx\n```\n````text\n```\ninner\n```\n````\n  ```\n  y\n  ```\nb ```Input\n\n1\n```"
    assert [(block.tag, block.text) for block in fences(text)] == [
        ("python", "x"),
        ("text", "```\ninner\n```"),
        ("", "  y"),
        ("input", "\n1"),
    ]
    assert fences("```input\n1\n```input\n2\n```") == fences("```input\n2\n```"), "the first was never closed"

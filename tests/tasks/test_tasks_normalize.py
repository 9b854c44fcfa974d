"""azr/tasks/program.py: the normal form against Python's own parser (on trusted programs), and on text that is none."""

import ast
import builtins
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr.tasks.program import read_program
from azr.tasks.validation import MAX_PROGRAM
from tests.timing import cpu_seconds

DATA = Path(__file__).parents[2].parent / "shared" / "data"

LEFT = '''
from typing import List
import math as m
def helper(q: int, *rest, k=3) -> "a: b":
    """doc"""
    return q * k  # c
class Point:
    x: int = 0
    def move(self, d):
        self.x += d
        return self
def f(x: List[int], y: str = "a", *args, **kw) -> dict[str, int]:
    'doc'
    total: int = 0
    for i, (a, b) in enumerate(x): total += a; total -= b
    z = [i for i in x if i]
    g = lambda p, q=2*total: p + q + total
    with open(y) as fh:
        pass
    d = {"k": f"{total:>{i}} {{x}} {y!r}", 'b': m.pi}
    (u, v), d[total] = 1, 2
    try:
        v = helper(u)
    except ValueError as e:
        raise e
    match u:
        case [first, *_]: u = first
        case Point(x=0): u = 0
    if (n := len(x)) > 1: return n
    def inner(t):
        nonlocal u
        u = t
    return helper(total, k=z,) + max([i for i in z], key=g, default=0,) + Point(x=3).move(d=u).x
'''
RIGHT = '''
import math as mm


def hh(q1, *r, kk=3):
    return q1 * kk

class PP:
    x: "float" = 0
    def move(me, d2):
        me.x += d2
        return me

def f(xx, yy='a', *a1, **kw1):
  """another docstring"""
  tt = 0
  for ii, (aa, bb) in enumerate(
        xx
  ):
      tt += aa
      tt -= bb
  zz = [
     j
     for j in xx if j]
  gg = lambda pp, qq=2*tt: pp + qq + tt
  with open(yy) as f1:
     ...
  dd = {'k': f"{tt:>{ii}} {{x}} {yy!r}", "b": mm.pi}
  (uu, vv), dd[tt] = 1, 2
  try: vv = hh(uu)
  except ValueError as err: raise err
  match uu:
      case [ff, *_]:
          uu = ff
      case PP(x=0):
          uu = 0
  if (nn := len(xx)) > 1:
    return nn
  def within(t1):
    nonlocal uu
    uu = t1

  return hh(tt, kk=zz) + max([k for k in zz], key=gg, default=0) \\
     + PP(x=3).move(d=uu).x
'''


def form(source):
    """The normal form of a program."""
    return read_program(source).form


def test_names_comments_docstrings_annotations_and_layout_do_not_count():
    assert form(LEFT) == form(RIGHT.replace("     ...\n", "     pass\n"))


@pytest.mark.parametrize(
    "a, b",
    [
        ("def f(x):\n    return x + 1", "def f(x):\n    return x + 2"),
        ("def f(x):\n    return x + 1", "def f(x):\n    return 1 + x"),
        ("def f(x, y):\n    return x - y", "def f(x, y):\n    return y - x"),
        ("def f(x):\n    return 'a b' + x", "def f(x):\n    return 'ab' + x"),
        ("def f(x):\n    return x.a", "def f(x):\n    return x.b"),
        ("def f(x):\n    return len(x)", "def f(x):\n    return sum(x)"),
        ("def f(x):\n    return sorted(x, key=str)", "def f(x):\n    return sorted(x, reverse=str)"),
        (
            "def f(x):\n    if x:\n        x += 1\n    return x",
            "def f(x):\n    if x:\n        x += 1\n        return x",
        ),
        ("def f(x):\n    y = 1\n    return [x for y in x]", "def f(x):\n    y = 1\n    return [y for y in x]"),
        ("def f(x):\n    return f'{x:d}'", "def f(x):\n    return f'{x:x}'"),
        ("def f(x):\n    return (x,)", "def f(x):\n    return (x)"),
        ("def f(a, b=1):\n    return a", "def f(a, b=2):\n    return a"),
        ("x = 1\ndef f(a):\n    return x", "x = 1\ndef f(a):\n    x = 2\n    return x"),
        ("def f(a):\n    return lambda b: a", "def f(a):\n    return lambda b: b"),
        (
            "from math import sin as g\ndef f(a):\n    return g(a)",
            "from math import cos as g\ndef f(a):\n    return g(a)",
        ),
    ],
)
def test_what_counts(a, b):
    assert form(a) != form(b)


@pytest.mark.parametrize(
    "a, b",
    [
        (
            "def f(s):\n    return sum([s.istitle() for s in s.split()])",
            "def f(s):\n    return sum([w.istitle() for w in s.split()])",
        ),
        (
            "def f(x):\n    a = [i for i in x]\n    return [i for i in a]",
            "def f(x):\n    a = [i for i in x]\n    return [j for j in a]",
        ),
        ("def g(x):\n    return x\ndef f(x):\n    return g(x)", "def g(n):\n    return n\ndef f(x):\n    return g(x)"),
        ("def f(x):\n    return {k: v for k, v in x}", "def f(x):\n    return {v: k for v, k in x}"),
        (
            "def f(x):\n    return [[a for a in b if a] for b in x]",
            "def f(x):\n    return [[b for b in a if b] for a in x]",
        ),
        ("def f(x): return sorted(x, key=lambda x: x[0])", "def f(x): return sorted(x, key=lambda y: y[0])"),
        ("def f(x):\n\n\treturn x+1;", "def f(y):\r\n  return (y\r\n  ) + 1".replace("(y\r\n  )", "y")),
    ],
)
def test_scopes_are_told_apart(a, b):
    assert form(a) == form(b)


@pytest.mark.parametrize(
    "source, trivial",
    [
        ("def f(x): return x", "identity"),
        ("def f(a, b):\n    c = b\n    d = c\n    return (d)", "identity"),
        ("def f(x):\n    return 5", "no parameter is read"),
        ("def f():\n    return [1]", "no parameter is read"),
        ("def f(x):\n    'x'\n    # x\n    return 'x'", "no parameter is read"),
        ("def f(x):\n    x = 3\n    return x", "no parameter is read"),
        ("def f(x):\n    return [x for x in 'ab']", "no parameter is read"),
        ("def f(x):\n    return a.x", "no parameter is read"),
        ("def f(x): return 1\ndef f(x): return x", "identity"),
        ("def f(*x): return x", "identity"),
        ("def f(x):\n    if x:\n        x = 3\n    return x", ""),
        ("def f(x):\n    x = x + 1\n    return x", ""),
        ("def f(x):\n    return f'{x}'", ""),
        ("def f(x):\n    return -x", ""),
        ("def f(x):\n    return x, x", ""),
        ("def f(x):\n    while 1:\n        x = 3\n    return x", ""),
        ("def f(x):\n    def g():\n        return x\n    return g()", ""),
        ("def f(x):\n    return 1\ndef f(x):\n    return x + 1", ""),
        ("def f(x): return [x for x in x]", ""),
        ("def g(x): return x", ""),
        ("", ""),
    ],
)
def test_triviality(source, trivial):
    assert read_program(source).trivial == trivial


def test_entry():
    for source in [
        "def f(x): return x",
        "@g\ndef f(x):\n    return x",
        "def \\\n f(x): return x",
        "if 1: pass\ndef f(x): 1",
        "def f (x): 1",
    ]:
        assert read_program(source).has_entry, source
    for source in [
        "",
        "def g(x): return x",
        "  def f(x): return x",
        "class A:\n    def f(x): return x",
        "f = 3",
        "async def f(x): 1",
        "'''\ndef f(x): return x\n'''",
        "# def f(x): return x",
        "def f_(x): return x",
    ]:
        assert not read_program(source).has_entry, source


# --- against Python's parser -----------------------------------------------------------------------------------------


class Rename(ast.NodeTransformer):
    """Gives every name that a program binds, parameters and functions but f included, a new one."""

    def __init__(self, tree, rng):
        bound = {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
        bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        bound |= {
            node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node.name
        }
        names = sorted(bound - {"f"} - set(dir(builtins)))
        self.map = {name: f"v{i}" for i, name in enumerate(rng.sample(names, len(names)))}

    def visit_Name(self, node):
        """Gives a variable its new name."""
        node.id = self.map.get(node.id, node.id)
        return node

    def visit_arg(self, node):
        """Gives a parameter its new name."""
        node.arg = self.map.get(node.arg, node.arg)
        return node

    def visit_FunctionDef(self, node):
        """A new name, other annotations, one more docstring."""
        node.name = self.map.get(node.name, node.name)
        node.returns = None if node.returns else ast.Name("list", ast.Load())
        for argument in node.args.args:
            argument.annotation = None if argument.annotation else ast.Name("int", ast.Load())
        node.body.insert(0, ast.Expr(ast.Constant("a docstring")))
        return self.generic_visit(node)

    def visit_Global(self, node):
        """Names after global and nonlocal."""
        node.names = [self.map.get(name, name) for name in node.names]
        return node

    visit_Nonlocal = visit_Global

    def visit_ExceptHandler(self, node):
        """The name after `as`."""
        node.name = self.map.get(node.name, node.name)
        return self.generic_visit(node)


def real_programs():
    """The programs of CRUXEval."""
    path = DATA / "benchmarks" / "cruxeval.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [json.loads(line)["code"] for line in path.open()]


def test_real_programs_renamed_by_pythons_parser_keep_their_form():
    rng = random.Random(0)
    for source in real_programs():
        tree = ast.parse(source)
        plain = ast.unparse(tree)
        renamed = ast.unparse(ast.fix_missing_locations(Rename(tree, rng).visit(tree)))
        assert form(plain) == form(renamed), source
        assert read_program(plain).trivial == read_program(renamed).trivial
        if not any(quote in renamed for quote in ("'''", '"""')):  # every line ends outside of a string
            rows = [(len(row) - len(row.lstrip(" ")), row.lstrip(" ")) for row in renamed.split("\n")]
            relaid = "\n\n".join(" " * (width // 4 * 3) + row + "  # a note" for width, row in rows)
            assert form(relaid) == form(plain), source


def test_a_changed_constant_or_operator_in_a_real_program_changes_its_form():
    swaps = {
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Lt: ast.GtE,
        ast.Gt: ast.LtE,
        ast.Eq: ast.NotEq,
        ast.And: ast.Or,
        ast.Mod: ast.Mult,
    }
    changed = 0
    for source in real_programs()[::3]:
        plain = form(ast.unparse(ast.parse(source)))
        for place in range(40):
            tree = ast.parse(source)
            nodes = [
                n
                for n in ast.walk(tree)
                if isinstance(n, ast.Constant)
                and type(n.value) in (int, str)
                or type(n) in swaps
                or isinstance(n, (ast.BinOp, ast.BoolOp))
                and type(n.op) in swaps
            ]
            nodes = [n for n in nodes if type(n) not in swaps]
            if place >= len(nodes):
                break
            node = nodes[place]
            if isinstance(node, ast.Constant):
                node.value = node.value + (1 if isinstance(node.value, int) else "z")
            else:
                node.op = swaps[type(node.op)]()
            text = ast.unparse(ast.fix_missing_locations(tree))
            docstring = isinstance(node, ast.Constant) and any(
                isinstance(n, ast.Expr) and n.value is node for n in ast.walk(tree)
            )
            assert docstring or form(text) != plain, (source, text)
            changed += 1
    assert changed > 500


# --- text that is no program -----------------------------------------------------------------------------------------

PIECES = [
    "def f(x):",
    "\n",
    "\n    ",
    "\n\t",
    " ",
    "lambda",
    "for",
    "in",
    "x",
    "f",
    "=",
    ":",
    ":=",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    "'",
    '"""',
    "f'{",
    "}'",
    "\\",
    "#",
    "class A:",
    "import",
    "from",
    "as",
    "async",
    "def",
    "case",
    "match",
    "*",
    "**",
    ".",
    "->",
    "return",
    "global",
    "1",
    "é",
    "\0",
    "\ud800",
    "\x0c",
    ";",
    "@",
    "if",
    "else",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=40).map("".join))
def test_any_text_is_read(text):
    reading = read_program(text)
    assert reading == read_program.__wrapped__(text)
    assert isinstance(reading.form, str)


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "[x for x in ",
        "lambda x: ",
        "(a,",
        "\n" + " " * 100 + "if x:",
        "'",
        "f'{x}'",
        "f'{",
        "\\\n",
        "x=1;",
        "if x: ",
        "#",
        "a.",
        "def f(x): ",
        '"""',
        "1e",
        "x = [",
        "for x in y: ",
        "f(a=",
        "\t\n",
        "case x: ",
        "import a as b, ",
        "[[x for y in z] for z in ",
        "d\n",
        "٣\n",
        "-\n",
        "if\n",
    ],
)
def test_reading_a_program_is_linear_enough(piece):
    text = (piece * MAX_PROGRAM)[:MAX_PROGRAM]
    assert cpu_seconds(lambda: read_program(text), 0.75) < 0.75
    longer = text + "\n"  # than any that is judged: as it stands
    assert read_program(longer).form == longer

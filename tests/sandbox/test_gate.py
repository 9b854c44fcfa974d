"""What the gate promises of a proposal: no way out by a hidden text, no address, no hash order."""

import pytest

from sandbox import Job, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    """One for all tests of this file."""
    with Sandbox(workers=2) as opened:
        yield opened


WAYS = {  # name: (status, program)
    "formatter": (
        "error",
        "import string, json\n"
        "def f(x):\n"
        "    return str(string.Formatter().get_field('0.__globals__', (json.dumps,), {})[0])[:9]",
    ),
    "attrgetter": (
        "error",
        "import operator, json\ndef f(x):\n    return len(operator.attrgetter('__globals__')(json.dumps)) > 0",
    ),
    "attrgetter dotted": (
        "error",
        "import operator, json\ndef f(x):\n    return str(operator.attrgetter('dumps.__globals__')(json))[:5]",
    ),
    "methodcaller": (
        "error",
        "import operator, json\n"
        "def f(x):\n"
        "    return len(operator.methodcaller('__getattribute__', '__globals__')(json.dumps)) > 0",
    ),
    "pattern": (
        "forbidden",
        "import json\n"
        "def f(x):\n"
        "    match json.dumps:\n"
        "        case object(__globals__=g):\n"
        "            return len(g) > 0",
    ),
    "traceback by a pattern": (
        "forbidden",
        "def f(x):\n"
        "    try:\n"
        "        1/0\n"
        "    except Exception as e:\n"
        "        match e:\n"
        "            case Exception(__traceback__=t):\n"
        "                match t:\n"
        "                    case object(tb_frame=fr):\n"
        "                        return 1\n"
        "    return 0",
    ),
    "text annotations": (
        "error",
        "import typing\n"
        "def g(a: '__import__(\"time\").time()'): pass\n"
        "def f(x):\n"
        "    return str(typing.get_type_hints(g, {}, {}))",
    ),
    "forward reference": (
        "forbidden",
        "import typing\ndef f(x):\n    return str(typing.ForwardRef('1+1')._evaluate({}, {}, frozenset()))",
    ),
    "pattern with positions": (
        "forbidden",
        "import json\n"
        "class M(type):\n"
        "    def __instancecheck__(c, o): return True\n"
        "class A(metaclass=M):\n"
        "    __match_args__ = ('__globals__',)\n"
        "def f(x):\n"
        "    match json.dumps:\n"
        "        case A(g):\n"
        "            return len(g) > 0",
    ),
    "getattr": (
        "error",
        "import json\ndef f(x):\n    return len(getattr(json.dumps, '__glo' + 'bals__')) > 0",
    ),
    "the pool's process by a format string": (
        "error",
        "import copy\ndef f(x):\n    return int('{0.__self__.config[pool]}'.format(copy.deepcopy)) % 97",
    ),
    "the pool's process by a function's builtins": (
        "error",
        "def f(x):\n    return '{0.__globals__[__builtins__][__import__].__self__.config[pool]}'.format(f)",
    ),
    "update_wrapper": (
        "error",
        "import functools, json\n"
        "def f(x):\n"
        "    class A: pass\n"
        "    a = A()\n"
        "    functools.update_wrapper(a, json.dumps, ('__globals__',), ())\n"
        "    return len(a.__dict__) > 0",
    ),
    "hash of an object": (
        "forbidden",
        "def f(x):\n    return hash(object()) % 1000",
    ),
    "hash of a NaN": (
        "forbidden",
        "def f(x):\n    return hash(float('nan')) % 2",
    ),
    "views met in a helper": (
        "nondeterministic",
        "def common(a, b):\n"
        "    return a & b\n"
        "def f(x):\n"
        "    return list(common({'a': 1, 'b': 2, 'c': 3}.keys(), {'b': 1, 'a': 0, 'c': 1}.keys()))",
    ),
    "views met by operator": (
        "nondeterministic",
        "import operator\n"
        "def f(x):\n"
        "    return list(operator.and_({'a': 1, 'b': 2, 'c': 3}.keys(), {'b': 1, 'a': 0, 'c': 1}.keys()))",
    ),
    "views subtracted in a helper": (
        "nondeterministic",
        "def g(d): return d.items() - {}\ndef f(x):\n    return list(g({'a': 1, 'b': 2, 'd': 3}))",
    ),
    "__hash__ by a text": (
        "nondeterministic",
        "def f(x):\n    return getattr('abc', '__ha' + 'sh__')() % 2",
    ),
    "__hash__ by methodcaller": (
        "error",
        "import operator\ndef f(x):\n    return operator.methodcaller('__hash__')('abc') % 2",
    ),
    "abstract methods": (
        "nondeterministic",
        "import abc\n"
        "class A(abc.ABC):\n"
        "    @abc.abstractmethod\n"
        "    def a(self): pass\n"
        "    @abc.abstractmethod\n"
        "    def b(self): pass\n"
        "    @abc.abstractmethod\n"
        "    def c(self): pass\n"
        "def f(x):\n"
        "    return list(A.__abstractmethods__)",
    ),
}


def test_ways_out_of_a_program_and_luck_that_passes_for_determinism(sandbox):
    rows = sandbox.validate([Job(program, ("1",)) for _, program in WAYS.values()])
    assert {name: row[0].status for name, row in zip(WAYS, rows)} == {
        name: wanted for name, (wanted, _) in WAYS.items()
    }


HONEST = [
    (
        "import operator\ndef f(x):\n    return sorted([(2, 'a'), (1, 'b')], key=operator.itemgetter(0))",
        "[(1, 'b'), (2, 'a')]",
    ),
    (
        "import operator\ndef f(x):\n"
        "    return operator.attrgetter('real')(x) + operator.methodcaller('bit_length')(x)",
        "8",
    ),
    (
        "import functools\ndef d(g):\n    @functools.wraps(g)\n    def h(x):\n"
        "        return g(x) + 1\n    return h\n@d\ndef f(x):\n    return x",
        "6",
    ),
    (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int = 2\n"
        "def f(x):\n    match P(x):\n        case P(x=a, y=b):\n            return a + b",
        "7",
    ),
    ("def f(x):\n    match [x, 'a']:\n        case [int(n), str(s)]:\n            return s * n", "'aaaaa'"),
    ("import string\ndef f(x):\n    return string.ascii_lowercase[x] + string.Template('$a').substitute(a=x)", "'f5'"),
    ("def f(x):\n    return sorted({'b': 1, 'a': 2}.keys() & {'a': 0, 'b': 1}.keys())", "['a', 'b']"),
    ("from typing import List, Optional\ndef f(x: Optional[int]) -> List[int]:\n    return [x]", "[5]"),
    ("kinds = {int: 'int', str: 'str'}\ndef f(x):\n    return kinds[type(x)]", "'int'"),
]


def test_honest_programs_pass(sandbox):
    rows = sandbox.validate([Job(program, ("5",)) for program, _ in HONEST])
    assert [(row[0].status, row[0].output) for row in rows] == [("ok", output) for _, output in HONEST]

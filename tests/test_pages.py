"""README.md and docs/, the notebook too: their links, paths, command lines and examples are those of the code beside
them."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from azr.train.arms import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "colab.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md")), NOTEBOOK]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES[:-1]}
TEXT[NOTEBOOK] = "\n\n".join("".join(cell["source"]) for cell in CELLS)
CODE = re.compile(r"^```.*?^```$|^    \S.*?$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python3? ((?:-m )?(?:[\w/]+\.py|azr[\w.]*|sandbox)\b)([^\n`|]*)")
FILE = re.compile(r"`((?:azr|sandbox|tests|results|docs)/[\w./-]*\w\.(?:py|md|json|jsonl|txt|png))`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# of pytest, docker, pip, torchrun, accelerate and vLLM
OTHERS = {"--dist", "--gpus", "--index-url", "--no-deps", "--no-build-isolation", "--nproc-per-node", "--nnodes"}
OTHERS |= {"--env", "--flavor", "--mem", "--secrets", "--signal", "--timeout"}  # of job queues
OTHERS |= {"--num-processes", "--config-file", "--tensor-parallel-size", "--parallel"}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^````?.*?^````?$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def flags_of(script: str, *subcommand: str) -> frozenset[str]:
    """The flags in the --help of a script or of `-m MODULE`; none where it has no such subcommand."""
    printed, argv, path = io.StringIO(), sys.argv, list(sys.path)
    name = script.removeprefix("-m ")
    sys.argv, registry = [name, *subcommand, "--help"], list(REGISTRY)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            if script.startswith("-m "):
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str((ROOT / name).parent))
                runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stopped:
        if stopped.code:
            return frozenset()
    finally:
        sys.argv, sys.path[:], REGISTRY[:] = argv, path, registry  # a script may add an arm of its own
    return frozenset(FLAG.findall(printed.getvalue()))


def known_flags(script: str, words: list[str]) -> frozenset[str]:
    """The flags of a command line's script and of the subcommands that its first words name."""
    words = [word for word in words[:2] if re.fullmatch(r"[a-z][a-z-]*", word)]
    return frozenset().union(*(flags_of(script, *words[:count]) for count in range(len(words) + 1)))


def commands(page: Path) -> list[tuple[str, str]]:
    """(script, the rest of the line without a comment) of every command line."""
    return [(m[1], m[2].split(" #")[0]) for m in COMMAND.finditer(TEXT[page]) if m[1] != "-m pytest"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXT[page]):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    for path in FILE.findall(TEXT[page]):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_have_flags_that_exist(page):
    for script, rest in commands(page):
        assert not script.endswith(".py") or (ROOT / script).is_file(), f"{page.name}: {script}"
        unknown = set(FLAG.findall(rest)) - known_flags(script, rest.split())
        assert not unknown, f"{page.name}: {script}{rest} has no {', '.join(sorted(unknown))}"


def test_flags_in_the_text_are_those_of_some_script():
    lines = {(script, *rest.split()[:2]) for page in PAGES for script, rest in commands(page)}
    known = OTHERS.union(*(known_flags(script, list(words)) for script, *words in lines))
    for page in PAGES:
        unknown = set(FLAG.findall(TEXT[page])) - known
        assert not unknown, f"{page.name}: {', '.join(sorted(unknown))}"


# Runs example.py of each folder as if in a new process; the one process spares importing torch for each.
RUN_EACH = """
import os, runpy, sys
for folder in sys.argv[1:]:
    before = set(sys.modules)
    os.chdir(folder)
    sys.path[0] = folder
    runpy.run_path("example.py")
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]
    assert "azr" not in sys.modules
    print("DONE", folder)
"""


def test_files_work_alone(tmp_path):
    """Each example of docs/copy.md runs in a folder that holds nothing but the file, or the directory, it is about."""
    text, folders = TEXT[ROOT / "docs" / "copy.md"], {}
    examples = re.findall(r"^## (\S+)\n(?:(?!^##).)*?```python\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in examples} == set(re.findall(r"^\| \[`(\S+)`\]", text, re.MULTILINE))
    for number, (name, code) in enumerate(examples):
        folder = tmp_path / str(number)
        if name.endswith("/"):
            # inside another package too, under another name
            for copy in (name, "yours/judge"):
                shutil.copytree(ROOT / name, folder / copy, ignore=shutil.ignore_patterns("__pycache__"))
            code += code.replace(f"from {name.strip('/')} ", "from yours.judge ")
        else:
            folder.mkdir()
            shutil.copy(ROOT / name, folder)
        (folder / "example.py").write_text(code)
        folders[str(folder)] = name
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", RUN_EACH, *folders]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    ran = [folders[line.removeprefix("DONE ")] for line in done.stdout.splitlines() if line.startswith("DONE ")]
    assert ran == list(folders.values()), f"after {ran}: {done.stderr}"


def test_readme_is_short_and_has_the_test_command_of_ci():
    readme = TEXT[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 220
    assert "-m pytest -q -n 2 --dist loadfile tests" in (ROOT / ".ci" / "run").read_text()
    assert "-m pytest -q -n 2 --dist loadfile tests" in readme


def test_the_notebook_has_the_output_of_every_cell_that_needs_no_gpu():
    assert len(commands(NOTEBOOK)) >= 10
    for cell in CELLS:
        if cell["cell_type"] == "code":
            text = "".join(line for output in cell["outputs"] for line in output["text"])
            assert bool(text) != ("was not executed" in cell["source"][0]), cell["source"]
            assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|mnt|Users)/|Traceback", text), cell["source"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_path_of_the_machine_that_wrote_a_page(page):
    assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|mnt|Users)/", TEXT[page])

"""The rooms of azr/: imports go one way, without circles, and nobody takes another module's private names. What an
instrument loads is little, and what can be copied out alone is copied out and used."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"ground"},
    {"tasks"},
    {"policy", "tiny"},
    {"machine"},
    {"evals"},
    {"train", "weights"},
    {"analysis"},
    {"scripts"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in (ROOT / "azr").rglob("*.py")}


def room(module: str) -> str:
    """The folder of azr/ a module lies in; "ground" for files directly in azr/."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "scripts"
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else "ground"


def imports(module: str, annotations: bool = True) -> list[tuple[str, str | None]]:
    """(module of azr, name taken from it) of every import in a file, also inside functions; without `annotations`,
    those under TYPE_CHECKING are left out."""
    found, tree = [], ast.parse(MODULES[module].read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if not annotations and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom) and (source := absolute(module, node)) in MODULES:
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.append((inner, None) if inner in MODULES else (source, alias.name))
    return found


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that an import takes names from, one with dots too."""
    package = module.split(".")[: None if MODULES[module].name == "__init__.py" else -1]
    parts = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*parts, *filter(None, [node.module])])


def test_rooms_import_downwards_only():
    for module in MODULES:
        for other, _ in imports(module):
            here, there = room(module), room(other)
            assert here == there or FLOOR[there] < FLOOR[here], f"{module} imports {other}: that is upwards"


def test_no_circle():
    graph = {module: {other for other, _ in imports(module, annotations=False)} - {module} for module in MODULES}
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"these modules import each other in a circle: {sorted(graph)}"


def test_no_private_names_of_another_module():
    for module in MODULES:
        taken = [f"{other}.{name}" for other, name in imports(module) if name and name.startswith("_")]
        assert not taken, f"{module} takes {', '.join(taken)}"


def files_loaded(module: str) -> list[str]:
    """The files of azr/ that an import of `module` loads; a folder's own __init__ is not counted."""
    code = f"import sys, {module}; print(*(name for name in sys.modules if name.split('.')[0] == 'azr'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(name for name in done.stdout.split() if MODULES[name].name != "__init__.py")


def test_an_instrument_does_not_load_the_whole_house():
    assert len(files := files_loaded("azr.weights.sparsity")) <= 11, files
    assert len(files := files_loaded("azr.analysis.health")) <= 4, files
    assert files_loaded("azr.policy.opening") == ["azr.jsonl", "azr.models", "azr.policy.opening"]


# A file -> lines that use it, alone in an empty folder, by its own name (docs/copy.md has more, which test_pages runs).
ALONE = {
    "azr/jsonl.py": """
from jsonl import strict_lines, tolerant_lines, write_jsonl_atomic
write_jsonl_atomic("rows.jsonl", [{"a": 1}, {"a": float("nan")}])
assert [row for _, row in strict_lines("rows.jsonl")] == [{"a": 1}, {"a": None}]
notes = []
assert len(list(tolerant_lines("rows.jsonl", notes))) == 2 and not notes
""",
    "azr/console.py": """
from console import bar, say, warn
warn("no GPU here")
with bar("work") as advance:
    advance(1, 2)
say("done")
""",
    "azr/command.py": """
from command import Parser
parser = Parser(prog="tool")
parser.add_argument("--steps", type=int)
assert parser.parse_args(["--steps", "3"]).steps == 3
""",
    "azr/isolated.py": """
from isolated import apart
values, why = apart(lambda: iter([6 * 7]), seconds=30)
assert values == [42] and why is None
""",
    "azr/palette.py": """
from palette import STYLES, series, style
assert style("base").color == "#0072B2" and series(0) in STYLES.values()
""",
    "azr/models.py": """
from models import model_path
assert model_path("qwen-3b") == "Qwen/Qwen2.5-Coder-3B" and model_path("OWNER/NAME") == "OWNER/NAME"
""",
    "azr/train/ppo.py": """
import torch
from ppo import gap_statistics
trainer, mask = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[True, True, False]])
assert abs(gap_statistics(trainer, trainer + 0.2, mask)["mean"] - 0.2) < 1e-6
""",
}
# A file that takes another one along: both keep their places in azr/.
TOGETHER = {
    ("azr/runs.py", "azr/jsonl.py"): """
from pathlib import Path
from azr.runs import Run, read_metrics
with Run.open(Path("run"), {"seed": 0}) as run:
    run.log({"step": 1, "train/loss": 0.5})
assert read_metrics(Path("run")) == [{"step": 1, "train/loss": 0.5}]
""",
    ("azr/fits.py", "azr/passk.py"): """
from azr.fits import linear_fit
fit = linear_fit([0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7, 9, 11, 13, 15])
assert abs(fit.coefficients[1].mean - 2) < 1e-9 and fit.r2.mean > 0.999
""",
}


ENGINE = """
from yours.engine.policy import Policy, Sampling
policy = Policy.load(MODEL, "none", device="cpu")
prompt = policy.encode("User: propose deduction")
[[a, b]] = policy.generate([prompt], 2, Sampling(max_new_tokens=4), [[1, 1]])
assert a == b and len(a.ids) == 4 and not {name for name in __import__("sys").modules if name.startswith("azr")}
"""


def test_the_engine_works_inside_another_package(tmp_path):
    """The first of the larger pieces of docs/copy.md: its imports are relative."""
    place = tmp_path / "yours" / "engine"
    shutil.copytree(ROOT / "azr" / "policy", place / "policy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("models", "isolated", "jsonl", "console"):
        shutil.copy(ROOT / "azr" / f"{name}.py", place)
    shutil.copytree(ROOT / "azr" / "tiny", tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", "import sys; sys.path[0] = ''\n" + ENGINE.replace("MODEL", "'model'")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("files", [*((name,) for name in ALONE), *TOGETHER], ids=lambda files: files[0])
def test_a_file_can_be_copied_out(tmp_path, files):
    for name in files:
        place = tmp_path / (Path(name).name if len(files) == 1 else name)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, place)
    lines = ALONE[files[0]] if len(files) == 1 else TOGETHER[files]
    command = [sys.executable, "-c", "import sys; sys.path[0] = ''\n" + lines]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr

"""The rooms of azr/: imports go one way, without circles, and nobody takes another module's private names."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ({"ground"}, {"tasks"}, {"policy", "tiny"}, {"machine"}, {"evals"}, {"train", "weights"}, {"analysis"}, {"scripts"})
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
    """(module of azr, name taken from it) of every import in a file, also inside functions; without `annotations`, those
    under TYPE_CHECKING are left out."""
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
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, None) if inner in MODULES else (node.module, alias.name))
    return found


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

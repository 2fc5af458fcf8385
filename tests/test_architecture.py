"""The house holds: imports point one way, and every `__all__` is sorted and true."""

from __future__ import annotations

import ast
import graphlib
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "semid"

# A module may import its own group and groups on lines above it; on one line, only to the left.
FLOORS = [
    ["errors", "lazy"],
    ["filesystems", "hub", "documents", "options", "registry", "results"],
    ["runs", "output", "artefact", "seeds", "progress"],
    ["data", "codes", "health", "quantization", "training"],
    ["diagnostics"],
    ["tokenizers"],
    ["loading"],
    ["catalogue", "recommenders"],
    ["exports"],
    ["report", "reproduce", "serve", "distributed"],
    ["cli"],
    ["__main__"],
]
RANK = {
    name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def group_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "semid" else None


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            if node.module == "semid":
                found += [f"semid.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in RANK, f"{own} has no floor: give it one in FLOORS"
    for module in imports(path):
        group = group_of(module)
        if group is None or group == own:
            continue
        assert group in RANK, f"{relative} imports {module}, which has no floor"
        assert RANK[group] < RANK[own], f"{relative} imports {module}, which lies above it"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, names: set[str]) -> set[str]:
    """Modules of semid that a file imports, inside functions too, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    for_types = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for statement in guard.body
        for node in ast.walk(statement)
    }
    modules: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            modules.update(name if name in names else str(node.module) for name in whole)
    return modules & names - {module_name(path)}


def test_no_import_cycles() -> None:
    names = {module_name(path) for path in MODULES}
    graph = {module_name(path): imported_modules(path, names) for path in MODULES}
    assert graph["semid.data.embeddings"] >= {"semid.data.source", "semid.errors"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these files import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_all_is_sorted_and_exists(path: Path) -> None:
    name = module_name(path)
    if name == "semid.quantization.engine.fused":
        pytest.importorskip("triton")  # CPU builds of torch come without it
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    if exported is None:
        return
    # The linter's order (RUF022): constants, then classes, then the rest.
    order = sorted(exported, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert list(exported) == order, f"{name}.__all__ is not sorted"
    for item in exported:
        assert hasattr(module, item), f"{name}.__all__ names '{item}', which does not exist"


def test_files_stay_readable() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}: {lines}"
        for path in MODULES
        if (lines := path.read_text(encoding="utf8").count("\n")) > 450
    ]
    assert not long, f"split these: {long}"

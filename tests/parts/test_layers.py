"""Who imports whom among models, tasks, metrics and data: counted in the source, type checking included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import benchmark.subject

ROOT = Path(benchmark.subject.__file__).parents[2]
SUBJECT = "benchmark.subject"


def imports_of(path: Path) -> set[str]:
    """Modules of this repository that a file imports anywhere: at its top, in a function, for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if exists(name)}
            found |= modules or {node.module}
    return {name for name in found if exists(name)}


def exists(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def graph() -> dict[str, set[str]]:
    files = sorted((ROOT / "benchmark" / "subject").rglob("*.py"))
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): imports_of(path) for path, name in names.items()}


def test_no_module_of_the_subjects_is_in_a_circle() -> None:
    found = graph()
    assert len(found) > 30
    assert f"{SUBJECT}.tasks.task" in found[f"{SUBJECT}.models.entry"]  # the reader of imports can see
    TopologicalSorter(found).prepare()


def test_a_circle_would_be_seen() -> None:
    circle = graph()
    circle[f"{SUBJECT}.tasks.task"].add(f"{SUBJECT}.models.entry")
    with pytest.raises(CycleError):
        TopologicalSorter(circle).prepare()


@pytest.mark.parametrize(
    ("room", "above"),
    [
        ("obstacles", ("data", "metrics", "tasks", "models", "lookup")),
        ("metrics", ("data", "tasks", "models", "lookup")),
        ("data", ("tasks", "models", "lookup")),
        ("tasks", ("models", "lookup")),
        ("models", ("lookup",)),
        ("", ("grid", "keep", "engine", "report", "tracking", "commands")),
    ],
)
def test_imports_point_down(room: str, above: tuple[str, ...]) -> None:
    here = f"{SUBJECT}.{room}".removesuffix(".")
    start = SUBJECT if room else "benchmark"
    upward = {
        (name, imported)
        for name, those in graph().items()
        if name == here or name.startswith(f"{here}.")
        for imported in those
        if any(imported == f"{start}.{top}" or imported.startswith(f"{start}.{top}.") for top in above)
    }
    assert not upward

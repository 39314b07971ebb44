"""The house: imports point down, from room to room and from file to file."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = (
    ("quanttune",),
    ("baselines",),
    ("benchmark.components", "benchmark.subject"),
    ("benchmark.grid",),
    ("benchmark.keep",),
    ("benchmark.engine",),
    ("benchmark.report",),
    ("benchmark.tracking",),
    ("benchmark.api", "benchmark.views"),
    ("benchmark",),
    (
        "benchmark.cli",
        "benchmark.options",
        "benchmark.deployment",
        "benchmark.performance",
        "benchmark.studies",
    ),
    ("benchmark.commands",),
    ("benchmark.__main__",),
)
"""From the bottom up. Rooms of one level do not know each other."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package in ("benchmark", "baselines", "quanttune"):
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """What a module imports from the project, wherever the statement stands, for types as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def room_of(module: str) -> str:
    rooms = [room for level in LEVELS for room in level]
    fitting = [room for room in rooms if module == room or module.startswith(f"{room}.")]
    return max(fitting, key=len)


def level_of(module: str) -> int:
    return next(index for index, level in enumerate(LEVELS) if room_of(module) in level)


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports that point up, or aside into another room of the same level."""
    return [
        f"{module} -> {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if level_of(other) > level_of(module)
        or (level_of(other) == level_of(module) and room_of(other) != room_of(module))
    ]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    found = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    assert sum(map(len, found.values())) > 500
    return found


def test_imports_point_down(graph: dict[str, set[str]]) -> None:
    assert upward(graph) == []


def test_no_file_imports_itself_by_a_detour(graph: dict[str, set[str]]) -> None:
    """A package's ``__init__`` hands on names of its own files, which is no detour."""
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    files = {name: others - packages for name, others in graph.items() if name not in packages}
    TopologicalSorter(files).prepare()


def test_the_library_knows_nothing_of_the_suite(graph: dict[str, set[str]]) -> None:
    for module, others in graph.items():
        if module.startswith("quanttune"):
            assert all(other.startswith("quanttune") for other in others), module


def test_files_are_read_in_one_sitting() -> None:
    long = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: lines for name, lines in long.items() if lines > 370} == {}


def test_the_rules_can_be_broken(tmp_path: Path) -> None:
    for package in ("benchmark", "baselines", "quanttune"):
        (tmp_path / package).mkdir()
    (tmp_path / "quanttune" / "a.py").write_text("def f():\n    from baselines.b import c\n")
    (tmp_path / "baselines" / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import quanttune.a\n"
    )
    known = modules(tmp_path)
    broken = {name: set(imported(path, known)) for name, path in known.items()}
    assert upward(broken) == ["quanttune.a -> baselines.b"]
    with pytest.raises(CycleError):
        TopologicalSorter(broken).prepare()

"""Components from outside this repository: a user's file, an entry point of another package."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import benchmark
from baselines import METHODS
from benchmark import components
from benchmark.cli import cli
from benchmark.engine.executors import EXECUTORS
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import load_suite
from benchmark.keep.store import Store
from benchmark.subject.models.entry import MODELS
from quanttune import registry as registries
from quanttune.errors import ConfigError
from quanttune.quantization import RANGE_RULES
from quanttune.registry import ComponentWarning, Registry

METHOD = '''
"""A method of somebody else."""

from dataclasses import dataclass
from typing import ClassVar

from baselines.method import METHODS
from baselines.minmax import MinMax


@METHODS.register("mine")
@dataclass(frozen=True)
class Mine(MinMax):
    """Min-max by another name."""

    name: ClassVar[str] = "mine"
'''
TINY = """
models = ["tiny_vit"]
precisions = ["W8A8"]
calibration_items = 8
limit = 20
methods = [{name = "minmax"}]
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return make


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    components.forget(components.included())


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_a_method_of_a_file_joins_any_suite(write: Any, suite_file: str, tmp_path: Path) -> None:
    path, results = str(write(METHOD)), str(tmp_path / "results")
    arguments = ["--include", path, "--suite", suite_file, "--results", results]
    done = call("run", "--method", "mine", "--method", "minmax", "--no-tracking", *arguments)
    assert done.exit_code == 0, done.output
    assert "4 cells: 4 done" in done.stdout
    records = {
        (record.cell.method, record.cell.precision): record for record in Store(Path(results)).records()
    }
    assert len(records) == 4
    for (method, precision), record in records.items():
        assert record.result == records["minmax", precision].result
        (about,) = record.provenance["includes"]
        assert about == {"name": "mine.py", "sha256": components.Include(path, Path(path).read_text()).sha256}
        assert method in ("mine", "minmax")
    assert "mine" not in METHODS  # the command's file took part in the command alone
    refused = call("run", "--method", "mine", "--suite", suite_file, "--results", results)
    assert refused.exit_code == 2
    assert "unknown method 'mine'" in refused.stderr


def test_kept_cells_of_another_text_are_told(write: Any, suite_file: str, tmp_path: Path) -> None:
    path, results = write(METHOD), str(tmp_path / "results")
    arguments = ["run", "--method", "mine", "--no-tracking", "--suite", suite_file, "--results", results]
    assert "another text" not in call(*arguments, "--include", str(path)).stderr
    assert "another text" not in call(*arguments, "--include", str(path)).stderr
    path.write_text(path.read_text() + "\n# changed\n")
    told = call(*arguments, "--include", str(path))
    assert told.exit_code == 0
    assert "kept from another text of mine.py: 2 cells; if it computes something else now" in told.stderr


def test_show_says_how_a_cell_of_a_file_is_opened(
    write: Any, suite_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, results = write(METHOD), tmp_path / "results"
    arguments = ["--include", str(path), "--results", str(results)]
    call("run", "--method", "mine", "--no-tracking", "--suite", suite_file, *arguments)
    record = next(record for record in Store(results).records() if record.cell.method == "mine")
    told = call("show", record.cell.cell_id[:12], *arguments)
    lines = told.stderr[told.stderr.index("# the quantized model:") :]
    assert 'benchmark.include("mine.py")' in lines
    components.forget(components.included())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines, names)  # noqa: S102 - what a reader would paste
    assert names["quantized"].quantizers


def test_worker_processes_import_it_as_well(write: Any, tmp_path: Path) -> None:
    suite = write(TINY, "tiny.toml")
    path = write(METHOD)
    found = [
        list(
            benchmark.run(
                suite,
                methods=["mine", "minmax"],
                include=path,
                executor=executor,
                jobs=jobs,
                results=tmp_path / executor,
                track=False,
            )
        )
        for executor, jobs in (("local", 2), ("serial", 1))
    ]
    values = [{(outcome.cell.method, outcome.status, outcome.value) for outcome in each} for each in found]
    assert values[0] == values[1]
    assert {method for method, *_ in values[0]} == {"mine", "minmax"}
    assert {status for _, status, _ in values[0]} == {"done"}
    assert len({value for *_, value in values[0]}) == 1


def test_a_worker_needs_the_text_alone(write: Any, tmp_path: Path) -> None:
    """On another machine there is no such file."""
    (file,) = components.include(write(METHOD))
    Path(file.path).unlink()
    code = (
        "import json, sys; from benchmark import components\n"
        "components.use([components.Include(**json.loads(sys.argv[1]))])\n"
        "from baselines import METHODS; print(METHODS.get('mine').__name__)"
    )
    given = json.dumps({"path": file.path, "text": file.text})
    done = subprocess.run(
        [sys.executable, "-c", code, given], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "Mine"


def test_child_processes_find_the_class_of_an_object_they_are_given(write: Any) -> None:
    """As the processes that share a fine-tuning are given the method."""
    components.include(write(METHOD))
    module = METHODS.get("mine").__module__
    code = f"import importlib; print(importlib.import_module({module!r}).Mine().label)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "mine", done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("class (", "not valid Python, line 1"),
        ("x = 1\nraise KeyError('k')", "in line 2: KeyError: 'k'"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (METHOD.replace('"mine"', '"minmax"'), "claim the method name 'minmax'"),
        (b"\xff\xfe\x00", "not a Python file"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_2(
    text: str | bytes | None, words: str, tmp_path: Path, suite_file: str
) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = METHODS.get("minmax")
    for arguments in (["list", "methods"], ["run", "--all"], ["table"], ["fetch"]):
        done = call(
            *arguments, "--include", str(path), *(["--suite", suite_file] if "run" in arguments else [])
        )
        assert done.exit_code == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith(f"error: --include {path}: ")
    assert METHODS.get("minmax") is before
    assert "mine" not in METHODS


def test_a_file_that_fails_half_way_leaves_nothing(write: Any) -> None:
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        components.include(write(METHOD + "\n1 / 0\n"))
    assert "mine" not in METHODS
    assert components.included() == ()


def test_a_changed_file_takes_its_own_place(write: Any) -> None:
    components.include(write(METHOD))
    components.include(write(METHOD))  # the same again is nothing new
    components.include(write(METHOD.replace("by another name", "of today")))
    assert METHODS.get("mine").__doc__ == "Min-max of today."
    assert len(components.included()) == 1


def test_two_files_of_one_name_do_not_meet(write: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write(METHOD.replace('"mine"', '"theirs"'), "other/mine.py")
    components.include(write(METHOD), other)
    assert {"mine", "theirs"} <= set(METHODS.names())


def test_a_name_of_an_installed_module_is_no_danger(write: Any) -> None:
    components.include(write("VALUE = 1\n", "json.py"))
    assert json.loads("[1]") == [1]


OTHERS = '''
from benchmark.engine.executors import EXECUTORS
from benchmark.subject.models.entry import MODELS
from benchmark.subject.tasks.task import TASKS
from quanttune.quantization import RANGE_RULES

entry = type(MODELS.get("tiny_vit"))


@EXECUTORS.register("backwards")
def backwards(cells, settings, jobs, events):
    """The last cell first."""
    yield from EXECUTORS.get("serial")(cells[::-1], settings, jobs, events)


@RANGE_RULES.register("whole")
def whole(statistics, bits, symmetric):
    return statistics.low, statistics.high
'''


def test_executors_and_range_rules_come_from_files_too(write: Any, suite_file: str, tmp_path: Path) -> None:
    path = write(OTHERS)
    outcomes = benchmark.run(
        suite_file, include=[path], executor="backwards", results=tmp_path / "results", track=False
    )
    order = [outcome.cell for outcome in outcomes]
    assert order == expand(load_suite(suite_file))[::-1]
    assert "whole" in RANGE_RULES
    assert call("list", "executors", "--include", str(path)).stdout.count("backwards") == 1
    components.forget(components.included())
    assert "whole" not in RANGE_RULES
    assert "backwards" not in EXECUTORS


@pytest.mark.parametrize("command", ["run", "list", "table", "figure", "report", "fetch", "show", "sync"])
def test_every_command_that_reads_names_takes_files(command: str) -> None:
    assert "--include FILE" in call(command, "--help").stdout


def test_registered_names_join_any_suite(suite_file: str) -> None:
    suite = load_suite(suite_file)
    cells = expand(suite, Selection(models=("toy", "tiny_vit"), methods=("omse", "minmax")))
    assert {cell.model for cell in cells} == {"toy", "tiny_vit"}
    assert {cell.method for cell in cells} == {"omse", "minmax"}
    default = METHODS.get("omse")().parameters()
    assert all(cell.parameters == default for cell in cells if cell.method == "omse")
    of_suite = {cell.cell_id for cell in expand(suite)}
    assert {cell.cell_id for cell in cells if cell.method == "minmax" and cell.model == "toy"} < of_suite


def test_a_glob_stays_within_the_suite(suite_file: str) -> None:
    cells = expand(load_suite(suite_file), Selection(methods=("*mse",)))
    assert {cell.method for cell in cells} == {"mse"}


class Point:
    """An entry point of a package that is not there."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.value, self.module, self.dist = name, module, module, None


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Install modules behind entry points, for the next look-up."""

    def install(**modules: str) -> None:
        monkeypatch.syspath_prepend(str(tmp_path))
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        points = [Point(f"point-{name}", name) for name in modules]
        monkeypatch.setattr(
            metadata, "entry_points", lambda group: points if group == "quanttune_bench" else []
        )
        monkeypatch.setattr(registries._EntryPoints, "loaded", False)

    yield install  # type: ignore[misc]
    for module in ("plugin_good", "plugin_bad", "plugin_thief"):
        registries.forget_components(module)
        sys.modules.pop(module, None)


def test_a_broken_entry_point_is_a_warning_that_names_it(entry_points: Any) -> None:
    METHODS.names()
    entry_points(
        plugin_bad="from nowhere import nothing",
        plugin_good=METHOD,
        plugin_thief=METHOD.replace('"mine"', '"minmax"'),
    )
    before = METHODS.get
    with pytest.warns(ComponentWarning) as warned:
        assert METHODS.get("mine").__module__ == "plugin_good"
    lines = [str(each.message) for each in warned]
    assert len(lines) == 2
    assert "point-plugin_bad = 'plugin_bad'" in lines[0]
    assert "No module named 'nowhere'" in lines[0]
    assert "point-plugin_thief" in lines[1]
    assert METHODS.get("minmax").__module__ == "baselines.minmax"
    assert METHODS.get == before
    assert "tiny_vit" in MODELS  # asked for once, not by every registry


def test_the_command_line_says_it_in_one_line(entry_points: Any) -> None:
    entry_points(plugin_bad="raise ValueError('two\\nlines')")
    done = call("list", "models")
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        "warning: entry point point-plugin_bad = 'plugin_bad' of package ? cannot be used "
        "(ValueError: two lines); repair it or uninstall that package"
    ]


def test_names_of_ours_come_first_whatever_is_looked_up_first(tmp_path: Path) -> None:
    """A registration from outside loads the registry's own packages before it claims a name."""
    registry: Registry[Any] = Registry("executor", packages=("benchmark.engine.executors",))
    assert registry._items == {}
    registry.register("anything")(object())
    assert registry._loaded

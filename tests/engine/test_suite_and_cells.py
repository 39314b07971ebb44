"""Suites expand to cells whose ids follow everything that decides a number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from baselines import METHODS
from benchmark.grid.cells import Cell
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import Suite, load_suite, parse_suite, suite_names
from benchmark.subject.models.entry import MODELS
from quanttune.digests import canonical_json
from quanttune.errors import ConfigError, QuantTuneError, UnknownNameError


def test_fp32_is_one_cell_a_model_whatever_the_axes(suite: Suite) -> None:
    wide = dataclasses.replace(
        suite, profiles=("full", "matmul"), seeds=(0, 1), weight_granularity=("per_channel", "per_tensor")
    )
    cells = expand(wide)
    assert [cell.method for cell in cells].count("fp32") == 1
    assert len(cells) == 1 + 2 * 2 * 2 * 2 * 2
    assert len({cell.cell_id for cell in cells}) == len(cells)


def test_ids_do_not_depend_on_the_suite_or_on_order(suite: Suite) -> None:
    other = dataclasses.replace(suite, name="renamed", precisions=suite.precisions[::-1])
    assert {cell.cell_id for cell in expand(suite)} == {cell.cell_id for cell in expand(other)}


CHANGES = {
    "model": "other",
    "model_identity": "0" * 64,
    "task": "other",
    "task_fingerprint": "0" * 64,
    "method": "mse",
    "variant": "paper",
    "method_version": "9",
    "parameters_json": '{"p":1}',
    "profile": "matmul",
    "precision": "W7A7",
    "weight_granularity": "per_tensor",
    "symmetric": False,
    "seed": 1,
    "calibration_items": 9,
    "limit": 3,
    "split": "validation",
    "autocast": "bf16",
    "noise": "all",
    "recipe_json": '{"steps":1}',
}


def test_the_changes_cover_every_field() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Cell)}


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_every_field_is_part_of_the_id(field: str, cells: list[Cell]) -> None:
    cell = next(cell for cell in cells if cell.method == "minmax")
    assert dataclasses.replace(cell, **{field: CHANGES[field]}).cell_id != cell.cell_id


def test_a_changed_recipe_makes_new_cells_of_what_is_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = "".join(f'[[methods]]\nname = "{name}"\n' for name in ("fp32", "minmax", "toy_trained"))
    suite = parse_suite("s", f'models = ["toy"]\nprecisions = ["W8A8"]\n{methods}', "s")
    before = {cell.method: cell.cell_id for cell in expand(suite)}
    entry = MODELS.get("toy")
    monkeypatch.setattr(type(entry), "recipe", {**entry.recipe, "learning_rate": 0.5})
    after = {cell.method: cell.cell_id for cell in expand(suite)}
    assert [name for name in before if before[name] != after[name]] == ["toy_trained"]


def test_identity_survives_json(cells: list[Cell]) -> None:
    for cell in cells:
        again = Cell.from_identity(json.loads(canonical_json(cell.identity())))
        assert again == cell
        assert again.cell_id == cell.cell_id


def test_a_limit_beyond_the_split_is_no_limit(suite: Suite) -> None:
    assert {cell.cell_id for cell in expand(suite, limit=40)} == {cell.cell_id for cell in expand(suite)}
    assert not {cell.cell_id for cell in expand(suite, limit=39)} & {cell.cell_id for cell in expand(suite)}


def test_list_valued_parameters_expand() -> None:
    text = 'models = ["toy"]\nprecisions = ["W8A8"]\n[[methods]]\nname = "percentile"\np = [99.9, 99.99]'
    cells = expand(parse_suite("s", text, "s"))
    assert [cell.parameters for cell in cells] == [{"p": 99.9}, {"p": 99.99}]
    assert len({cell.label for cell in cells}) == 2


def test_selection_chooses_and_replaces(suite: Suite) -> None:
    cells = expand(suite, Selection(methods=("m*",), precisions=("w5a5",), seeds=(3, 4)))
    assert {(cell.method, cell.precision, cell.seed) for cell in cells} == {
        (method, "W5A5", seed) for method in ("minmax", "mse") for seed in (3, 4)
    }


@pytest.mark.parametrize(
    ("selection", "limit", "words"),
    [
        (Selection(models=("toyy",)), None, "did you mean toy"),
        (Selection(methods=("minmx",)), None, "did you mean minmax"),
        (Selection(methods=("zz*",)), None, "zz*"),
        (Selection(precisions=("W0A8",)), None, "0 bits"),
        (Selection(precisions=("W-4A8",)), None, "W-4A8"),
        (Selection(profiles=("fulll",)), None, "did you mean full"),
        (Selection(seeds=(-1,)), None, "--seed -1"),
        (None, 0, "--limit 0"),
    ],
)
def test_bad_selections_say_what_is_wrong(
    suite: Suite, selection: Selection | None, limit: int | None, words: str
) -> None:
    with pytest.raises(QuantTuneError) as caught:
        expand(suite, selection, limit)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models = [", "not valid TOML"),
        ('model = ["toy"]', "did you mean models"),
        ('models = ["toy"]\nprecisions = ["W8A8"]', "no methods"),
        ('models = "toy"\nprecisions = ["W8A8"]\nmethods = [{name = "mse"}]', "expected a list of str"),
        ('models = ["toy"]\nprecisions = ["W8A8"]\nmethods = [{p = 1}]', "needs a name"),
        ('models = ["toy"]\nprecisions = ["eight"]\nmethods = [{name = "mse"}]', "'eight'"),
        ('models = ["toy"]\nprecisions = ["W8A8"]\nseeds = [true]\nmethods = [{name = "mse"}]', "seeds"),
        ('models = ["toy"]\nprecisions = ["W8A8"]\nlimit = 0\nmethods = [{name = "mse"}]', "at least 1"),
        ('models = ["toy"]\nprecisions = ["W8A8"]\nsplit = "tests"\nmethods = [{name = "mse"}]', "'tests'"),
        ('models = ["toy"]\nprecisions = ["W8A8"]\nautocast = "fp8"\nmethods = [{name = "mse"}]', "'fp8'"),
        ('models = ["toy"]\nprecisions = ["W8A8"]\nprofiles = ["all"]\nmethods = [{name = "mse"}]', "'all'"),
    ],
)
def test_bad_suite_files_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(QuantTuneError) as caught:
        parse_suite("bad", text, "bad.toml")
    assert words in str(caught.value)


def test_an_unknown_parameter_is_refused() -> None:
    text = 'models = ["toy"]\nprecisions = ["W8A8"]\n[[methods]]\nname = "percentile"\npp = 99'
    with pytest.raises(UnknownNameError, match="did you mean p"):
        expand(parse_suite("s", text, "s"))


def test_an_unknown_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean laptop"):
        load_suite("labtop")
    with pytest.raises(ConfigError, match="cannot read"):
        load_suite(str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_suite(str(tmp_path / "binary.toml"))


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_names_registered_parts(name: str) -> None:
    suite = load_suite(name)
    assert suite.description
    for model in suite.models:
        assert model in MODELS
    for spec in suite.methods:
        METHODS.get(spec.name)(**spec.parameters)
    cells = expand(suite)
    assert len({cell.cell_id for cell in cells}) == len(cells)


def test_a_folder_model_joins_any_suite(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.grid.expand.get_model", lambda name: MODELS.get("toy"))
    cells = expand(suite, Selection(models=("folder:/somewhere@toy_task",)))
    assert {cell.model for cell in cells} == {"folder:/somewhere@toy_task"}


PROFILED = """
models = ["toy"]
precisions = ["W8A8"]
profiles = ["full", "matmul"]
[[methods]]
name = "minmax"
profiles = ["matmul"]
[[methods]]
name = "mse"
"""


def test_a_method_can_be_measured_in_some_of_the_profiles_only() -> None:
    suite = parse_suite("s", PROFILED, "s")
    found = [(cell.method, cell.profile) for cell in expand(suite)]
    assert found == [("mse", "full"), ("minmax", "matmul"), ("mse", "matmul")]
    assert [cell.method for cell in expand(suite, Selection(profiles=("full",)))] == ["mse"]


@pytest.mark.parametrize(
    ("profiles", "told"), [('["ful"]', "asks for profile 'ful'"), ('"matmul"', "expected a list")]
)
def test_a_methods_profiles_are_those_of_the_suite(profiles: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_suite("s", PROFILED.replace('["matmul"]', profiles), "s")


ON_SOME_MODELS = """
models = ["toy", "tiny_vit"]
precisions = ["W8A8"]
calibration_items = 8
[[methods]]
name = "minmax"
[[methods]]
name = "mse"
models = ["tiny_vit"]
"""


def test_a_method_can_be_measured_on_some_of_the_models_only() -> None:
    suite = parse_suite("s", ON_SOME_MODELS, "s")
    found = [(cell.model, cell.method) for cell in expand(suite)]
    assert found == [("toy", "minmax"), ("tiny_vit", "minmax"), ("tiny_vit", "mse")]
    # a model that is not the suite's takes every method
    other = expand(suite, Selection(models=("tiny_deit",)))
    assert [cell.method for cell in other] == ["minmax", "mse"]


def test_a_methods_models_are_those_of_the_suite() -> None:
    text = ON_SOME_MODELS.replace('models = ["tiny_vit"]', 'models = ["tiny_bert"]')
    told = "mse asks for model 'tiny_bert', the suite has toy, tiny_vit; add it"
    with pytest.raises(ConfigError, match=told):
        parse_suite("s", text, "s")

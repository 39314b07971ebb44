"""A suite file is right or refused, in one line and before any work."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite, parse_suite
from quanttune.errors import ConfigError, QuantTuneError
from tests.faults import tally
from tests.faults.mutations import TOML_ODD, damaged, mutated, toml_text

HEAD = 'models = ["toy"]\nprecisions = ["W8A8"]\ncalibration_items = 8\n'
WHOLE: dict[str, Any] = {
    "description": "all keys",
    "models": ["toy"],
    "precisions": ["W8A8", "W4"],
    "profiles": ["full", "matmul"],
    "seeds": [0, 1],
    "weight_granularity": ["per_channel"],
    "symmetric": [True],
    "calibration_items": 8,
    "limit": 20,
    "split": "test",
    "autocast": "none",
    "methods": [
        {"name": "fp32"},
        {"name": "minmax", "profiles": ["full"]},
        {"name": "percentile", "p": [99.0, 99.9]},
        {"name": "fq_vit", "factor": True, "attention": "integer", "attention_bits": 4},
        {"name": "ptq4vit", "images": 4, "rounds": 1, "factor_low": 0.5, "candidates": 10},
        {"name": "quanttune", "steps": 3, "learning_rate": 1e-3, "weight": 0.1, "kinds": "all"},
    ],
}


def one(method: str, **parameters: Any) -> str:
    lines = [f"{name} = {toml_text(value)}" for name, value in {"name": method, **parameters}.items()]
    return HEAD + "[[methods]]\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("2020-01-01", "p = 2020-01-01: give a finite number"),
        ("nan", "p = nan: give a finite number"),
        ("-inf", "p = -inf: give a finite number"),
        ('"99"', 'p = "99": give a valid number'),
        ("{a = 1}", "p = {'a': 1}: give a valid number"),
        ("true", "p = true: give a valid number"),
        ("[[99]]", r"p = \[99\]: give a valid number"),
        ("[]", r"p = \[\] of method percentile; give at least one value"),
        ("200", "percentile 200.0 is not above 50 and at most 100"),
    ],
)
def test_a_value_that_a_parameter_cannot_take_is_named(value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        expand(parse_suite("s", f"{one('percentile')}\np = {value}", "s"))


@pytest.mark.parametrize(
    ("method", "parameters", "told"),
    [
        ("ptq4vit", {"images": 1.5}, "images = 1.5: give a valid integer"),
        ("ptq4vit", {"twin_gelu": 1}, "twin_gelu = 1: give a valid boolean"),
        ("fq_vit", {"attention_bits": 99}, "attention_bits 99 is outside 2 to 16"),
        ("finetune", {"steps": 0}, "steps is 0; it must be positive"),
        ("finetune", {"learning_rate": -1}, "learning_rate is -1.0; it must be positive"),
        ("finetune", {"calibrator": "minmix"}, "unknown method 'minmix'; did you mean minmax"),
        ("quanttune", {"threshold": 0.5}, "outlier threshold 0.5 does not exceed"),
        ("quanttune", {"kinds": "residual"}, "unknown kind of site 'residual'"),
    ],
)
def test_every_methods_settings_are_checked_before_any_work(
    method: str, parameters: dict[str, Any], told: str
) -> None:
    """Found: refused in the middle of a run, or after a fine-tuning."""
    with pytest.raises(QuantTuneError, match=told):
        expand(parse_suite("s", one(method, **parameters), "s"))


def test_the_command_line_says_it_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(one("percentile", p="99"))
    result = CliRunner().invoke(
        cli, ["run", "--all", "--suite", str(path), "--results", str(tmp_path / "results")]
    )
    assert result.exit_code == 2
    assert result.stderr == 'error: method percentile: p = "99": give a valid number\n'
    assert not (tmp_path / "results").exists()


def test_what_is_said_twice_is_one_cell() -> None:
    """Found: the mean over two seeds of one and the same setting, once as 99 and once as 99.0."""
    cells = expand(parse_suite("s", one("percentile", p=[99, 99.0]), "s"))
    assert len(cells) == 1
    assert cells[0].parameters == {"p": 99.0}
    twice = HEAD.replace('["W8A8"]', '["W8A8", "W8A8"]')
    suite = parse_suite("s", f'{twice}profiles = ["full", "full"]\n[[methods]]\nname = "minmax"', "s")
    assert (suite.precisions, suite.profiles) == (("W8A8",), ("full",))


def test_a_byte_order_mark_is_no_part_of_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(b"\xef\xbb\xbf" + one("minmax").encode())
    assert len(expand(load_suite(str(path)))) == 1


def attempt(text: str) -> str:
    """What becomes of a suite's text."""
    cells = expand(parse_suite("s", text, "s.toml"))
    assert len({cell.cell_id for cell in cells}) == len(cells) > 0
    return "right"


@pytest.mark.parametrize("tries", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_any_suite_is_right_or_refused(tries: int) -> None:
    rng = random.Random(0)
    ends, said = Counter[str](), []
    for _ in range(tries):
        document = mutated(WHOLE, rng, TOML_ODD)
        if not isinstance(document, dict):
            document = {"methods": document}
        text = "\n".join(f"{toml_text(str(key))} = {toml_text(value)}" for key, value in document.items())
        if rng.random() < 0.2:
            text = damaged(text.encode(), rng).decode("utf-8", "replace")
        end, trace = tally.end_of(partial(attempt, text))
        ends[end] += 1
        said += [trace] if trace else []
    tally.count("fuzzed inputs", ends)
    assert not said, said[:3]
    assert min(ends["right"], ends["refused"]) > tries / 20

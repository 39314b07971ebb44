"""Suites: TOML files that say which models, methods, precisions, profiles and seeds belong together."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from benchmark.grid.autocast import AUTOCAST, FULL_PRECISION
from benchmark.grid.noise import NOISE, SUBSET
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization.scheme import Scheme
from quanttune.quantization.sites import PROFILES

DEFAULT_SUITE = "laptop"
GRANULARITIES = ("per_channel", "per_tensor")


@dataclass(frozen=True)
class MethodSpec:
    """A method of a suite with the parameters the suite sets; the rest are the method's defaults.

    Attributes:
        profiles: Those of the suite's profiles the method is measured in; empty for all of them.
        models: Those of the suite's models the method is measured on; empty for all of them.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    profiles: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """What a suite file says.

    Attributes:
        name: The file's name without its ending.
        models: Names of registered models.
        methods: Methods with parameters; list-valued parameters are already expanded.
        precisions: Bit widths such as ``W8A8``.
        calibration_items: Training items each method may calibrate on.
        limit: Number of test items, ``None`` for the whole split.
        split: What is measured: ``test``, or ``validation`` for a search of hyperparameters.
        autocast: Mixed precision of references and fine-tuning: ``none`` or ``bf16``.
        noise: Items on which the noise of rounding is measured: ``subset`` (a tenth), ``all`` or ``none``.
        origin: What to give to ``--suite``.
    """

    name: str
    description: str
    models: tuple[str, ...]
    methods: tuple[MethodSpec, ...]
    precisions: tuple[str, ...]
    profiles: tuple[str, ...] = ("full",)
    seeds: tuple[int, ...] = (0,)
    weight_granularity: tuple[str, ...] = ("per_channel",)
    symmetric: tuple[bool, ...] = (True,)
    calibration_items: int = 128
    limit: int | None = None
    split: str = "test"
    autocast: str = FULL_PRECISION
    noise: str = SUBSET
    origin: str = ""


def suite_names() -> list[str]:
    """Names of the suites that come with the package, sorted."""
    folder = resources.files("benchmark.suites")
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_suite(name: str) -> Suite:
    """Read a suite by its name, or from a path that ends in ``.toml``.

    Raises:
        UnknownNameError: If no suite has the name.
        ConfigError: If the file cannot be read or holds something that is not a suite.
    """
    if name.endswith(".toml"):
        path = Path(name)
        try:
            # editors of Windows begin a file with a byte-order mark, which is no TOML
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read suite file {name}: {error}") from error
        return parse_suite(path.stem, text, origin=name)
    if name not in suite_names():
        raise UnknownNameError("suite", name, suite_names())
    text = (resources.files("benchmark.suites") / f"{name}.toml").read_text(encoding="utf-8")
    return parse_suite(name, text, origin=name)


def parse_suite(name: str, text: str, origin: str) -> Suite:
    """Turn the text of a suite file into a :class:`Suite`; ``origin`` is what to give to ``--suite``.

    Raises:
        ConfigError: If a key is unknown, missing or of the wrong type.
    """
    what = origin if origin.endswith(".toml") else f"suite {origin}"
    try:
        raw = tomllib.loads(text)
    # not only its own error: numbers of thousands of digits, brackets in brackets in brackets
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid TOML: {error}") from error
    for key in raw:
        if key not in _FIELDS:
            raise UnknownNameError(f"key in {what}:", key, _FIELDS)
    for key in ("models", "methods", "precisions"):
        if not raw.get(key):
            raise ConfigError(f"{what} has no {key}; give at least one")
    values = {key: _check(what, key, value) for key, value in raw.items() if key != "methods"}
    if not isinstance(raw["methods"], list):
        raise ConfigError(f"{what}: methods = {raw['methods']!r}; give [[methods]] tables")
    methods = tuple(itertools.chain.from_iterable(_methods(what, item) for item in raw["methods"]))
    for key, allowed in (("weight_granularity", GRANULARITIES), ("profiles", PROFILES)):
        for value in values.get(key, ()):
            if value not in allowed:
                raise ConfigError(f"{what}: {key} holds {value!r}; known: {', '.join(allowed)}")
    for key in _PART_OF:
        of_suite = values.get(key, getattr(Suite, key, ()))
        for spec in methods:
            for asked in getattr(spec, key):
                if asked not in of_suite:
                    raise ConfigError(
                        f"{what}: method {spec.name} asks for {key.removesuffix('s')} {asked!r}, the suite "
                        f"has {', '.join(of_suite)}; add it to the suite's {key}"
                    )
    if values.get("split", "test") not in SPLITS:
        raise ConfigError(f"{what}: split = {values['split']!r}; known: {', '.join(SPLITS)}")
    if values.get("autocast", FULL_PRECISION) not in AUTOCAST:
        raise ConfigError(f"{what}: autocast = {values['autocast']!r}; known: {', '.join(AUTOCAST)}")
    if values.get("noise", SUBSET) not in NOISE:
        raise ConfigError(f"{what}: noise = {values['noise']!r}; known: {', '.join(NOISE)}")
    values["precisions"] = tuple(dict.fromkeys(str(Scheme.parse(text)) for text in values["precisions"]))
    return Suite(name=name, methods=methods, origin=origin, **{"description": "", **values})


_FIELDS: dict[str, type] = {
    "description": str,
    "models": str,
    "methods": dict,
    "precisions": str,
    "profiles": str,
    "seeds": int,
    "weight_granularity": str,
    "symmetric": bool,
    "calibration_items": int,
    "limit": int,
    "split": str,
    "autocast": str,
    "noise": str,
}
_SCALARS = ("description", "calibration_items", "limit", "split", "autocast", "noise")
SPLITS = ("test", "validation")
_PART_OF = ("profiles", "models")
"""Axes of which a method may take a part of what the suite has."""


def _check(origin: str, key: str, value: Any) -> Any:
    kind = _FIELDS[key]
    items = [value] if key in _SCALARS else value
    if not isinstance(items, list) or not items or any(type(item) is not kind for item in items):
        wanted = kind.__name__ if key in _SCALARS else f"a list of {kind.__name__}"
        raise ConfigError(f"{origin}: {key} = {value!r}; expected {wanted}")
    if key in ("calibration_items", "limit") and value < 1:
        raise ConfigError(f"{origin}: {key} = {value}; it must be at least 1")
    # what is named twice is meant once: a table says of an axis of two that it varies
    return value if key in _SCALARS else tuple(dict.fromkeys(value))


def _methods(origin: str, item: Any) -> Iterator[MethodSpec]:
    """One spec per combination of the list-valued parameters of a ``[[methods]]`` table."""
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ConfigError(
            f'{origin}: every [[methods]] table needs a name, e.g. name = "minmax"; got {item!r}'
        )
    parts = {key: item.get(key, []) for key in _PART_OF}
    for key, part in parts.items():
        if not isinstance(part, list):
            raise ConfigError(f"{origin}: {key} = {part!r} of method {item['name']}; expected a list")
    parameters = {key: value for key, value in item.items() if key not in ("name", *_PART_OF)}
    for key, value in parameters.items():
        if value == []:
            raise ConfigError(f"{origin}: {key} = [] of method {item['name']}; give at least one value")
    axes = [[(key, choice) for choice in _choices(value)] for key, value in parameters.items()]
    for combination in itertools.product(*axes):
        yield MethodSpec(item["name"], dict(combination), **{key: tuple(part) for key, part in parts.items()})


def _choices(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

"""The one generator of a suite's grid: every executor consumes what it yields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from benchmark.grid.autocast import AUTOCAST
from benchmark.grid.cells import NO_RECIPE, REFERENCE_METHOD, REFERENCE_PRECISION, Cell
from benchmark.grid.noise import SUBSET
from benchmark.grid.schemes import axes_of, scheme_of
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.subject.lookup import get_model, is_special
from benchmark.subject.models.entry import MODELS
from benchmark.subject.tasks.task import get_task
from quanttune.digests import canonical_json, json_digest
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.fields import FieldError, fitting
from quanttune.quantization.scheme import Scheme
from quanttune.quantization.sites import PROFILES

if TYPE_CHECKING:
    from baselines.method import Method
    from quanttune.registry import Registry


@dataclass(frozen=True)
class Selection:
    """What a user asked for out of a suite.

    Model and method globs choose among the suite's; a plain name that is registered joins the suite, a method
    with its default parameters, and so do the special forms of models such as ``folder:PATH@TASK``. The label
    of a method, as tables show it, chooses it with these parameters alone. Precisions, profiles and seeds
    replace the suite's. Empty means "as the suite says".
    """

    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


def expand(
    suite: Suite,
    selection: Selection | None = None,
    limit: int | None = None,
    autocast: str | None = None,
) -> list[Cell]:
    """The grid of a suite: every cell once, in an order that lets neighbours share expensive stages.

    Args:
        suite: What to expand.
        selection: A part of the suite; all of it by default.
        limit: Test items, in place of the suite's own.
        autocast: Mixed precision, in place of the suite's own.

    Raises:
        UnknownNameError: If a model or method is neither of the suite nor registered.
        ConfigError: If a value is out of range or nothing is left.
    """
    from baselines import METHODS

    selection = selection or Selection()
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: it must be at least 1 test item")
    models = _choose(MODELS, suite.models, selection.models, suite.name, is_special)
    of_suite = [spec.name for spec in suite.methods]
    labelled, patterns = _by_label(suite, selection.methods)
    names = [] if labelled and not patterns else _choose(METHODS, of_suite, patterns, suite.name)
    specs = [*suite.methods, *(MethodSpec(name) for name in names if name not in of_suite)]
    methods = [(spec, _instance(spec)) for spec in specs if spec.name in names or spec in labelled]
    precisions = [str(Scheme.parse(text)) for text in selection.precisions or suite.precisions]
    profiles = selection.profiles or suite.profiles
    for profile in profiles:
        if profile not in PROFILES:
            raise UnknownNameError("profile", profile, PROFILES)
    if autocast is not None and autocast not in AUTOCAST:
        raise UnknownNameError("autocast type", autocast, AUTOCAST)
    seeds = selection.seeds or suite.seeds
    if any(seed < 0 for seed in seeds):
        raise ConfigError(f"--seed {min(seeds)}: seeds are 0 or more")

    cells: dict[str, Cell] = {}
    for model in dict.fromkeys(models):
        base = _model_fields(model)
        common = {
            "calibration_items": suite.calibration_items,
            "limit": _effective_limit(base["task"], suite.split, suite.limit if limit is None else limit),
            "split": suite.split,
            "autocast": autocast or suite.autocast,
            "noise": suite.noise,
        }
        # of a model that is not the suite's own nothing is left out
        chosen = [
            (spec, method)
            for spec, method in methods
            if not spec.models or model in spec.models or model not in suite.models
        ]
        for cell in _model_cells(base | common, chosen, suite, precisions, profiles, seeds):
            cells.setdefault(cell.cell_id, cell)
    if not cells:
        raise ConfigError(
            f"nothing of suite {suite.name} is selected; see `list cells --suite {suite.origin}`"
        )
    return list(cells.values())


def _model_cells(
    base: dict[str, Any],
    methods: list[tuple[MethodSpec, Method]],
    suite: Suite,
    precisions: Iterable[str],
    profiles: Iterable[str],
    seeds: Iterable[int],
) -> Iterator[Cell]:
    precisions, profiles, seeds = list(precisions), list(profiles), list(seeds)
    for spec, method in methods:
        if spec.name == REFERENCE_METHOD:
            yield _cell(base, spec.name, method, "none", REFERENCE_PRECISION, "none", True, 0)
    for seed in seeds:
        for profile in profiles:
            for spec, method in methods:
                if spec.name == REFERENCE_METHOD or (spec.profiles and profile not in spec.profiles):
                    continue
                for granularity in suite.weight_granularity:
                    for symmetric in suite.symmetric:
                        for precision in precisions:
                            axes = axes_of(scheme_of(precision, granularity, symmetric, profile))
                            yield _cell(base, spec.name, method, profile, *axes, seed)


def _cell(
    base: dict[str, Any],
    name: str,
    method: Method,
    profile: str,
    precision: str,
    granularity: str,
    symmetric: bool,
    seed: int,
) -> Cell:
    if name == REFERENCE_METHOD:
        base = base | {"calibration_items": 0, "noise": SUBSET}
    if not method.trains:
        base = base | {"recipe_json": NO_RECIPE}
    return Cell(
        **base,
        method=name,
        variant=method.variant,
        method_version=method.versions,
        parameters_json=canonical_json(method.parameters()),
        profile=profile,
        precision=precision,
        weight_granularity=granularity,
        symmetric=symmetric,
        seed=seed,
    )


def _effective_limit(task: str, split: str, limit: int | None) -> int | None:
    """A limit that the split does not reach is none: the same number must have one id."""
    return None if limit is None or limit >= len(get_task(task).split_ids(split)) else limit


def _model_fields(name: str) -> dict[str, Any]:
    entry = get_model(name)
    return {
        "model": name,
        "model_identity": json_digest(entry.identity()),
        "task": entry.task,
        "task_fingerprint": get_task(entry.task).fingerprint(),
        "recipe_json": canonical_json(dict(entry.recipe)),
    }


def _instance(spec: MethodSpec) -> Method:
    """The method, with errors that name a parameter it does not have or a value it cannot take."""
    from baselines import METHODS

    kind = METHODS.get(spec.name)
    known = kind().parameters()
    for key in spec.parameters:
        if key not in known:
            raise UnknownNameError(f"parameter of method {spec.name}:", key, known)
    try:
        return kind(**fitting(kind, spec.parameters))
    except FieldError as error:
        raise ConfigError(f"method {spec.name}: {error}") from None
    except (TypeError, ValueError) as error:
        # how a class that somebody else wrote refuses a value
        raise ConfigError(f"method {spec.name} does not take {dict(spec.parameters)}: {error}") from error


def _by_label(suite: Suite, patterns: tuple[str, ...]) -> tuple[list[MethodSpec], tuple[str, ...]]:
    """The suite's methods whose labels were given, or match, and the patterns that are none of these."""
    named = [spec.name for spec in suite.methods]
    chosen, others = list[MethodSpec](), list[str]()
    for pattern in patterns:
        if any(name == pattern or fnmatchcase(name, pattern) for name in named):
            others.append(pattern)
            continue
        labels = [(spec, _instance(spec).label) for spec in suite.methods]
        matches = [spec for spec, label in labels if label == pattern]
        matches = matches or [spec for spec, label in labels if fnmatchcase(label, pattern)]
        chosen += matches
        others += [] if matches else [pattern]
    return chosen, tuple(others)


def _choose(
    registry: Registry[Any],
    of_suite: Iterable[str],
    patterns: tuple[str, ...],
    suite: str,
    joins: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """The names that patterns choose: a glob among the suite's, a plain name also among all registered ones.

    Args:
        registry: Where the components are.
        of_suite: The suite's names.
        patterns: What the user gave; nothing for all of the suite.
        suite: The suite's name, for messages.
        joins: Whether a name that is not registered names a component all the same.
    """
    names = list(dict.fromkeys(of_suite))
    if not patterns:
        return names
    chosen: list[str] = []
    for pattern in patterns:
        matches = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matches and (joins(pattern) or pattern in registry):
            names.append(pattern)
            matches = [pattern]
        if not matches and not set(pattern) & set("*?["):
            raise UnknownNameError(registry.kind, pattern, {*names, *registry.names()})
        if not matches:
            raise ConfigError(
                f"no {registry.kind} of suite {suite} matches {pattern!r}; it has {', '.join(names)}"
            )
        chosen += matches
    return [name for name in names if name in chosen]

"""Whether the keys of a method's stages hold everything that decides them, for whatever method.

A method quantizes under one change after the other and all of them share a store. What is taken from an
earlier change is made again under the present one: the key changes, or what it names does not.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import timm
import torch
from torch import Tensor, nn

from baselines.method import METHODS, Batch, Context, Method
from quanttune.digests import canonical_json, tensor_digest
from quanttune.errors import QuantTuneError
from quanttune.quantization import Scheme, discover_sites
from quanttune.registry import Registry
from quanttune.seeds import torch_generator
from tests.method_contexts import RECIPE, HeldOut, Training

WITH_WORDS = ("precision W8A8-asym", "seed", "targets")
SCHEMES = ("W6A8", "W8A6", "W8A5", "W8tA8", "W8A8-asym", "W8tA8-asym", "W8A8-token", "W4g4A8", "W8")
CLASSES = 20
"""More than a curvature looks at one by one, so that it draws some."""
IDENTITY, VERSION = "identity", "version of the method"
"""Changes that no stage may ignore, whatever it computes."""

Key = Mapping[str, Any]
Make = Callable[[], dict[str, Tensor]]


class SharedStages:
    """Remembers under which change each stage was made, and makes again what another change takes.

    Args:
        without: An entry that is left out of every key, to see whether somebody notices.
        known: What was made under whole keys before; not made again where an entry is left out.
    """

    def __init__(self, without: str | None, known: dict[str, dict[str, Tensor]]) -> None:
        self.without, self.known = without, known
        self.change = ""
        self.entries: dict[str, set[str]] = {}
        self.taken: list[str] = []
        self.wrong: list[str] = []
        self._kept: dict[str, tuple[str, dict[str, Tensor]]] = {}

    def tensors(self, stage: str, key: Key, make: Make) -> dict[str, Tensor]:
        """See ``baselines.method.StageCache``."""
        self.entries.setdefault(stage, set()).update(key)
        whole = f"{stage} {canonical_json(dict(key))}"
        name = f"{stage} {canonical_json({name: key[name] for name in key if name != self.without})}"
        if name not in self._kept:
            self._kept[name] = self.change, self._made(whole, make)
        origin, tensors = self._kept[name]
        if origin != self.change and stage not in self.taken:
            self.taken.append(stage)
            if tensor_digest(self._made(whole, make)) != tensor_digest(tensors):
                self.wrong.append(f"{self.change}: takes {stage} of {origin!r}")
        return tensors

    def _made(self, whole: str, make: Make) -> dict[str, Tensor]:
        if self.without is None or whole not in self.known:
            self.known[whole] = make()
        return self.known[whole]

    def reference(self, stage: str, key: Key) -> None:
        """Nothing outlives the test."""

    def checkpoint(self, stage: str, key: Key) -> None:
        """Nothing outlives the test."""

    def keep_course(self, stage: str, key: Key, course: Any) -> None:
        """Nothing outlives the test."""


@dataclass
class Trial:
    """Methods under changes.

    Args:
        changes: By name: the method and its context. The first is that of the plain cell.
        entries: By stage, what its keys hold; known once it was tried.
    """

    changes: dict[str, tuple[Method, Context]]
    entries: dict[str, set[str]] = field(default_factory=dict)
    _known: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def wrong(self, without: str | None = None) -> Iterator[str]:
        """Which change takes a stage that is not what it would make itself.

        Args:
            without: An entry that is left out of every key.
        """
        shared = SharedStages(without, self._known)
        self.entries = shared.entries
        for change, (method, context) in self.changes.items():
            shared.change, shared.taken, shared.wrong = change, [], []
            # What some value of a parameter is refused with; or a stage that does not even fit.
            with suppress(QuantTuneError, *(() if without is None else (LookupError, RuntimeError))):
                method.quantize(dataclasses.replace(context, stages=shared))
            yield from shared.wrong
            # Statistics are no method's own, nor is what given quantizers do to a model.
            common = ("statistics", "validation", "sensitivity")
            ignored = [stage for stage in shared.taken if change == IDENTITY or stage not in common]
            if change in (IDENTITY, VERSION):
                yield from (f"{change}: takes {stage}" for stage in ignored)


def trial_of(kind: type[Method]) -> Trial:
    """A method under every change of a cell that it applies to, and of every parameter it has."""
    plain, context = kind(), _context()
    changes = {"nothing": (plain, context)}
    contexts = _changed_contexts(context)
    changes |= {name: (plain, changed) for name, changed in contexts.items()}
    for parameter, others in alternatives(kind).items():
        for place, method in enumerate(others):
            name = f"{parameter}={getattr(method, parameter)}"
            changes[name] = method, context
            # What a context decides may depend on the way that a word chooses among several.
            if isinstance(getattr(method, parameter), str) and place < 2 <= len(others):
                changes |= {f"{name}, {each}": (method, contexts[each]) for each in WITH_WORDS}
    later = type(kind.__name__, (kind,), {"version": kind.version + 1, "__doc__": kind.__doc__})
    changes[VERSION] = later(), context
    return Trial(
        {
            name: (method, context)
            for name, (method, context) in changes.items()
            if method.skip(context.sites, context.scheme) is None
        },
    )


def trial_of_all(kinds: Iterable[type[Method]]) -> Trial:
    """Every method as it is, one after the other in one store."""
    context = _context()
    return Trial({kind.name: (kind(), context) for kind in kinds})


def alternatives(kind: type[Method]) -> dict[str, list[Method]]:
    """By parameter: the method with another value of it, every word that fits or two values.

    Raises:
        AssertionError: If a parameter cannot be changed in any of them.
    """
    hints, found = get_type_hints(kind), {}
    for parameter in dataclasses.fields(kind):
        value = getattr(kind(), parameter.name)
        methods: list[Method] = []
        for other in _others(kind, value, hints[parameter.name]):
            # A value that this parameter may not have says so.
            with suppress(QuantTuneError):
                methods.append(kind(**{parameter.name: other}))
        assert methods, f"{kind.name}: no other value of parameter {parameter.name} is known"
        every = isinstance(value, str) and _first_with(kind, parameter.name)
        found[parameter.name] = methods if every else methods[:2]
    return found


def _first_with(kind: type[Method], parameter: str) -> bool:
    """Whether no method before it has the parameter of the same class: what is inherited is tried once."""
    owner = next(base for base in kind.__mro__ if parameter in vars(base).get("__annotations__", {}))
    heirs = [other for _, other in METHODS.items() if issubclass(other, owner)]
    return heirs[:1] in ([], [kind])


def _others(kind: type[Method], value: Any, hint: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    types = (type(value),) if value is not None else get_args(hint)
    if str in types:
        return [word for word in _words(kind) if word != value]
    if int in types:
        numbers: list[Any] = [1, (value or 0) + 1, 2, 3]
    else:
        numbers = [0.5 * (value or 0.02), 1.5 * (value or 0.3), 2.5, 60.0]
    return [number for number in numbers if number != value]


def _words(kind: type[Method]) -> list[str]:
    """Every word that the modules of a method know: names in registries, constants and enumerations."""
    own = [vars(sys.modules[base.__module__]) for base in kind.__mro__ if base.__module__ != "builtins"]
    imported = {
        value.__module__ for names in own for value in names.values() if isinstance(value, type | Callable)
    }
    rooms = ("baselines.", "quanttune.")
    modules = [vars(sys.modules[name]) for name in sorted(filter(None, imported)) if name.startswith(rooms)]
    words: dict[str, None] = {}
    for value in (value for names in (*own, *modules) for value in names.values()):
        if isinstance(value, Registry):
            words |= dict.fromkeys(value.names())
        elif isinstance(value, tuple) and all(isinstance(word, str) for word in value):
            words |= dict.fromkeys(map(str, value))
        elif isinstance(value, enum.EnumMeta):
            words |= dict.fromkeys(str(member.value) for member in value)
    return list(words)


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16,
            patch_size=8,
            embed_dim=8,
            depth=1,
            num_heads=2,
            num_classes=CLASSES,
        ).eval()
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def _batch(items: int, seed: int) -> Batch:
    generator = torch_generator(seed, "items")
    images = torch.randn(items, 3, 16, 16, generator=generator)
    return Batch(images, torch.randint(CLASSES, (items,), generator=generator))


class _Images(Training):
    """Random pictures."""

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield _batch(batch_size, int(torch.randint(0, 8, (), generator=generator)))


def _context() -> Context:
    model = _model()
    return Context(
        model,
        discover_sites(model, _batch(2, 0).inputs),
        Scheme.parse("W8A8", "full"),
        [_batch(2, 1), _batch(2, 2)],
        _Images("vit"),
        RECIPE,
        identity={"task": "pictures"},
        validation=HeldOut([_batch(2, seed).inputs for seed in (7, 8, 9)]),
    )


def _changed_contexts(context: Context) -> dict[str, Context]:
    """The context of a cell that is another one in a single respect."""

    def changed(**changes: Any) -> Context:
        return dataclasses.replace(context, **changes)

    first, second = context.calibration
    other = copy.deepcopy(context.model)
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.3)
    inputs, targets = torch.cat([first.inputs, second.inputs]), torch.cat([first.targets, second.targets])
    found = {f"precision {text}": changed(scheme=Scheme.parse(text, "full")) for text in SCHEMES}
    found |= {
        "profile": changed(scheme=context.scheme.with_profile("matmul")),
        "seed": changed(seed=1),
        "validation": changed(validation=HeldOut([_batch(2, 5).inputs])),
        "draw": changed(calibration=[first, _batch(2, 3)]),
        "number of items": changed(calibration=[first]),
        "order of items": changed(calibration=[second, first]),
        "batches": changed(calibration=[Batch(inputs, targets)]),
        "targets": changed(calibration=[Batch(first.inputs, (first.targets + 1) % CLASSES), second]),
        "weights": changed(model=other),
        "autocast": changed(autocast=torch.bfloat16),
        "processes": changed(processes=2),
        IDENTITY: changed(identity={"task": "other pictures"}),
    }
    recipes = {"steps": 3, "learning_rate": 3e-3, "batch_size": 3, "norm_rate": 0.5, "weight_decay": 0.5}
    for name, value in recipes.items():
        found[f"recipe {name}"] = changed(recipe={**context.recipe, name: value})
    return found

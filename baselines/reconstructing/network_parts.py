"""The layers and blocks of any network, found by how its modules are arranged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Part:
    """A module with the weights that are read in it.

    Args:
        path: Of the module.
        parameters: Names of the weights, in execution order.
        parts: Smaller parts to go through one after the other, in place of the whole.
    """

    path: str
    parameters: tuple[str, ...]
    parts: tuple[Part, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether a module or parameter is this module, or lies in it."""
        return name == self.path or name.startswith(f"{self.path}.") or not self.path

    def relative(self, name: str) -> str:
        """A name within the module."""
        return name if not self.path else name[len(self.path) + 1 :]


def layers_of(weights: dict[str, str]) -> list[Part]:
    """One part for each module that reads weights.

    Args:
        weights: Name of each weight to the path of the module that reads it, in execution order.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name, path in weights.items():
        found[path].append(name)
    return [Part(path, tuple(names)) for path, names in found.items()]


def block_paths(model: nn.Module, weights: Collection[str]) -> list[str]:
    """Paths of the repeated blocks: the innermost modules of several weights that have a like beside them.

    Blocks are what stands in a ``ModuleList`` or ``Sequential`` next to another module of its class. A stage
    of blocks is repeated as well, so the innermost count; a list of single layers is none.
    """
    candidates = []
    for path, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        kinds = [type(child) for child in container.children()]
        for name, child in container.named_children():
            inside = f"{path}.{name}" if path else name
            held = sum(weight.startswith(f"{inside}.") for weight in weights)
            if kinds.count(type(child)) > 1 and held > 1:
                candidates.append(inside)
    return [path for path in candidates if not any(other.startswith(f"{path}.") for other in candidates)]


def blocks_of(model: nn.Module, weights: dict[str, str], inner: bool) -> list[Part]:
    """The blocks of a network, and layers where there are none, in execution order.

    Args:
        model: The network.
        weights: Name of each weight to the path of the module that reads it, in execution order.
        inner: Whether each block consists of its layers, to be gone through one after the other.
    """
    blocks = block_paths(model, weights)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, path in weights.items():
        block = next((block for block in blocks if name.startswith(f"{block}.")), path)
        found[block][name] = path
    parts = []
    for path, held in found.items():
        is_block = path in blocks
        parts.append(Part(path, tuple(held), tuple(layers_of(held)) if inner and is_block else ()))
    return parts

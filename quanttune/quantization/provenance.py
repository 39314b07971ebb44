"""What a tensor tells of where it came from: the site whose numbers it holds, and what it was made of.

Both are attributes of the tensor, written during discovery and read there alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_MARK = "_quanttune_site"
_CHAIN = "_quanttune_chain"


def mark_of(value: Any) -> str | None:
    """The site whose numbers ``value`` holds, if it is a tensor that says so."""
    found = getattr(value, _MARK, None) if isinstance(value, Tensor) else None
    # Whatever was written to it since, or to a view of it, made it another tensor.
    return None if found is None or found[1] != _version_of(value) else found[0]


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def marks_in(value: Any) -> Iterator[str]:
    """The marks of a tensor, or of each of a list."""
    for item in value if isinstance(value, tuple | list) else (value,):
        mark = mark_of(item)
        if mark is not None:
            yield mark


def is_tensors(result: Any) -> bool:
    """Whether a result is a tensor, or holds one."""
    items = result if isinstance(result, tuple | list) else (result,)
    return any(isinstance(item, Tensor) for item in items)


def mark_all(result: Any, mark: str | None) -> None:
    """Say of a result, or of each of a list, whose numbers it holds; ``None`` for numbers of its own."""
    tensors = result if isinstance(result, tuple | list) else (result,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):
            continue
        if mark is not None or hasattr(tensor, _MARK):
            setattr(tensor, _MARK, (mark, _version_of(tensor)))


def chain_of(value: Any) -> frozenset[str]:
    """Sums, activations and scores that a tensor was made of, element by element."""
    tensors = value if isinstance(value, tuple | list) else (value,)
    found = (getattr(tensor, _CHAIN, ()) for tensor in tensors if isinstance(tensor, Tensor))
    return frozenset(site_id for chain in found for site_id in chain)


def chain_all(result: Any, chain: Iterable[str]) -> None:
    """Say of a result, or of each of a list, what it was made of."""
    found = frozenset(chain)
    for tensor in result if isinstance(result, tuple | list) else (result,):
        if found and isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            setattr(tensor, _CHAIN, found)

"""One typed registry for every kind of component: methods, models, tasks, range rules.

A component is one file: it imports the registry of its kind and decorates its class. Files are imported on
the first look-up only, so importing a package stays cheap and a new file needs no edit elsewhere.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from quanttune.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to components of one kind.

    Args:
        kind: The singular noun used in messages, e.g. ``"method"``.
        packages: Import paths of packages whose modules register components; imported on first look-up.
    """

    def __init__(self, kind: str, packages: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self._packages = packages
        self._lock = threading.RLock()
        self._loading = self._loaded = False
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files a component under ``name``.

        Raises:
            ValueError: If another component already has the name.
        """

        def add(item: T) -> T:
            present = self._items.get(name)
            if present is not None and _origin(present) != _origin(item):
                raise ValueError(
                    f"two components claim the {self.kind} name {name!r}: "
                    f"{_origin(present)} and {_origin(item)}; rename one of them"
                )
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """Return the component called ``name``.

        Raises:
            UnknownNameError: If there is none; the message suggests close names.
        """
        self._load()
        if name not in self._items:
            raise UnknownNameError(self.kind, name, self._items)
        return self._items[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        """Pairs of name and component, sorted by name."""
        for name in self.names():
            yield name, self._items[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def _load(self) -> None:
        if self._loaded:
            return
        with self._lock:  # another thread waits here until every component is known
            if self._loaded or self._loading:
                return
            self._loading = True  # a component that looks up its own registry while loading must not recurse
            try:
                for package_name in self._packages:
                    package = importlib.import_module(package_name)
                    for module in sorted(
                        pkgutil.iter_modules(package.__path__), key=lambda found: found.name
                    ):
                        importlib.import_module(f"{package_name}.{module.name}")
                self._loaded = True
            finally:
                self._loading = False  # after a failed import the next look-up fails the same way


def _origin(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', repr(item))}"

"""One typed registry for every kind of component: methods, models, tasks, range rules.

A component is one file: it imports the registry of its kind and decorates its class. Files are imported on
the first look-up only, so importing a package stays cheap and a new file needs no edit elsewhere.

Components also come from outside. Another installed package names its modules as entry points::

    [project.entry-points.quanttune_bench]
    mine = "my_package.my_method"

They are imported on the first look-up in any registry. One that cannot be imported costs a warning with its
name, never the components of others.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, Generic, TypeVar

from quanttune.errors import NameTakenError, UnknownNameError

T = TypeVar("T")

ENTRY_POINTS = "quanttune_bench"
"""The group of entry points whose modules register components."""

_LOCK = threading.RLock()  # one for all registries: a component may look up another registry as it loads
_REGISTRIES: weakref.WeakSet[Registry[Any]] = weakref.WeakSet()


class ComponentWarning(UserWarning):
    """A component from outside that cannot be used."""


class Registry(Generic[T]):
    """Names to components of one kind.

    Args:
        kind: The singular noun used in messages, e.g. ``"method"``.
        packages: Import paths of packages whose modules register components; imported on first look-up.
    """

    def __init__(self, kind: str, packages: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self._packages = packages
        self._loading = self._loaded = False
        self._items: dict[str, T] = {}
        self._sources: dict[str, str] = {}
        _REGISTRIES.add(self)

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files a component under ``name``.

        Raises:
            NameTakenError: If another component already has the name, or the component calls itself
                something else.
        """
        source = sys._getframe(1).f_globals.get("__name__", "?")

        def add(item: T) -> T:
            if not self._is_home(source):  # from outside: the names of our own components come first
                self._load_packages()
            present = self._items.get(name)
            if present is not None and _origin(present) != _origin(item):
                raise NameTakenError(
                    f"two components claim the {self.kind} name {name!r}: "
                    f"{_origin(present)} and {_origin(item)}; rename one of them"
                )
            declared = getattr(item, "name", name)
            if isinstance(declared, str) and declared != name:
                raise NameTakenError(
                    f"{_origin(item)} is registered as {self.kind} {name!r} and calls itself {declared!r}; "
                    "give it one name"
                )
            self._items[name] = item
            self._sources[name] = source
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

    def _is_home(self, module: str) -> bool:
        return any(module == package or module.startswith(f"{package}.") for package in self._packages)

    def _load(self) -> None:
        self._load_packages()
        _load_entry_points()

    def _load_packages(self) -> None:
        if self._loaded:
            return
        with _LOCK:  # another thread waits here until every component is known
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


def forget_components(module: str) -> None:
    """Take back whatever a module registered, in every registry.

    Args:
        module: The ``__name__`` of the module that called :meth:`Registry.register`.
    """
    for registry in list(_REGISTRIES):
        for name in [name for name, source in registry._sources.items() if source == module]:
            registry._items.pop(name, None)
            del registry._sources[name]


class _EntryPoints:
    loading = loaded = False


def _load_entry_points() -> None:
    """Import the modules that other installed packages name, once a process."""
    if _EntryPoints.loaded:
        return
    with _LOCK:
        if _EntryPoints.loaded or _EntryPoints.loading:
            return
        _EntryPoints.loading = True  # the modules themselves look names up
        for point in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda found: found.name):
            try:
                importlib.import_module(point.module)
            except (Exception, SystemExit) as error:
                forget_components(point.module)
                package = point.dist.name if point.dist is not None else "?"
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(
                    f"entry point {point.name} = {point.value!r} of package {package} cannot be used "
                    f"({reason}); repair it or uninstall that package",
                    ComponentWarning,
                    stacklevel=2,
                )
        _EntryPoints.loaded, _EntryPoints.loading = True, False


def _origin(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', repr(item))}"

"""The toys of the engine's tests, for faults of what is kept of their cells."""

from tests.engine.conftest import cells, store, suite, suite_file, toy

__all__ = ["cells", "store", "suite", "suite_file", "toy"]

"""Settings of the tests of quantization."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from tests.quantization.models import one_thread

# The same examples every time: a check of a clean checkout must not depend on luck.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield

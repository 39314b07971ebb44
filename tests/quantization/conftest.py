"""Settings of the tests of quantization."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# The same examples every time: a check of a clean checkout must not depend on luck.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and the tests may share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""Settings of every test."""

from __future__ import annotations

import os

# Tiny tensors gain nothing from a second thread, and on a busy machine threads that wait for each other make
# a test of seconds take minutes. Set before torch is imported, so that child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

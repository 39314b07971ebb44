"""A lock for what threads must do one at a time, which a copied or pickled model has anew."""

from __future__ import annotations

import threading


class Turn:
    """A context that one thread at a time is in; the same thread may enter it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()

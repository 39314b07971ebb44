"""Batch sizes found by trial: what does not fit into memory is done in halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from quanttune.errors import QuantTuneError

_SIGNS = ("DefaultCPUAllocator", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How PyTorch says that memory is out where it has no error of its own for it."""


class OutOfMemoryError(QuantTuneError):
    """Even a single item does not fit into the memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is out, on a GPU or on a CPU."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def in_fitting_batches(
    run: Callable[[Sequence[int], int], Iterator[int]], items: Sequence[int], batch_size: int, what: str
) -> Iterator[tuple[int, int]]:
    """Run over items in batches that fit, from the given size downwards; nothing is done twice.

    Args:
        run: Takes items and a batch size, works through them in their order and yields the number of items
            of each finished batch.
        items: What to work through.
        batch_size: Size to begin with; it is halved whenever a batch does not fit.
        what: Whose memory it is, for the error.

    Yields:
        Items done by a batch, and the size in force.

    Raises:
        OutOfMemoryError: If a single item does not fit.
    """
    import torch

    done = 0
    while done < len(items):
        try:
            for count in run(items[done:], batch_size):
                done += count
                yield count, batch_size
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise OutOfMemoryError(
                    f"{what}: a single item does not fit into memory; free some, or use another --device"
                ) from error
        # Outside of the handler: the error's traceback holds the tensors of the batch that failed.
        batch_size = max(batch_size // 2, 1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

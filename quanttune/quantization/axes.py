"""Which dimension of a site's tensor holds the channels, and which ones a product sums over."""

from __future__ import annotations

from torch import Tensor

from quanttune.quantization.sites import SiteId

_FEATURES_LAST = frozenset({"linear", "layer_norm", "rms_norm", "gelu", "silu", "relu", "tanh", "add"})


def produced_axis(site: SiteId, tensor: Tensor, is_weight: bool = False) -> int | None:
    """The channel dimension, by the operation alone.

    Args:
        site: Where the tensor is.
        tensor: With the batch first; a weight with its outputs first.
        is_weight: Whether it is a parameter.

    Returns:
        0 for a weight of a layer; for a parameter in a matrix product the dimension that is not summed over,
        the same channels for every expert of a batch of them. 1 for what a convolution reads and makes, else
        the last one. ``None`` for a softmax, for scores, and for a tensor that has a batch dimension only.
    """
    if site.operand == "weight" or (is_weight and tensor.dim() < 2):
        return 0
    if is_weight:
        return tensor.dim() - (1 if site.operand == "b" else 2)
    if tensor.dim() < 2:
        return None
    if site.operation == "conv":
        return 1
    product = site.operation == "matmul" and site.operand in ("b", "output")
    return tensor.dim() - 1 if product or site.operation in _FEATURES_LAST else None


def channel_axis(source: Tensor, normalised: Tensor) -> int | None:
    """Which dimension of ``source`` a normalisation sees as its channels.

    Args:
        source: A tensor with the batch first.
        normalised: A rearrangement of it, as the normalisation reads it.

    Returns:
        The dimension, or ``None`` if no dimension of ``source`` holds the channels. Where a patch merging
        puts several positions side by side, every channel it makes belongs to one channel of ``source``,
        whose dimension counts.
    """
    channels = normalised.shape[-1]
    fitting = [axis for axis in range(1, source.dim()) if source.shape[axis] == channels]
    if len(fitting) > 1 and source.untyped_storage().data_ptr() == normalised.untyped_storage().data_ptr():
        fitting = [axis for axis in fitting if source.stride(axis) == normalised.stride(-1)] or fitting
    if fitting:
        return fitting[-1]
    return source.dim() - 1 if channels % source.shape[-1] == 0 else None


def summed_axes(site: SiteId, dimensions: int) -> tuple[int, ...]:
    """The dimensions over which a product that reads a tensor sums: within them one scale must hold.

    Args:
        site: Where the tensor is.
        dimensions: Of the tensor, batch included.

    Returns:
        Negative dimensions. A linear layer and a first operand are summed over the last one, a second
        operand over the one before, a convolution's input over all but the items. Tensors that no product
        reads count like the first.
    """
    if site.operation == "conv":
        return tuple(range(1 - dimensions, 0))
    return (-2,) if site.operation == "matmul" and site.operand == "b" else (-1,)

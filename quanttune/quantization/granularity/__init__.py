"""Granularities: how many ranges a tensor has. One file each; a new file is a new one, in schemes too."""

from quanttune.quantization.granularity.granularity import GRANULARITIES, Granularity
from quanttune.quantization.granularity.per_channel import PerChannel
from quanttune.quantization.granularity.per_group import PerGroup
from quanttune.quantization.granularity.per_tensor import PerTensor
from quanttune.quantization.granularity.per_token import PerToken

__all__ = ["GRANULARITIES", "Granularity", "PerChannel", "PerGroup", "PerTensor", "PerToken"]

"""Quantization methods, one file each; a new file with a registered class is a new method."""

from baselines.method import METHODS, Method

__all__ = ["METHODS", "Method"]

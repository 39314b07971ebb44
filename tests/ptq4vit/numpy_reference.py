"""PTQ4ViT's quantizers in NumPy, written from their definitions."""

from __future__ import annotations

import numpy as np


def numpy_symmetric(x: np.ndarray, limit: np.ndarray | float, bits: int) -> np.ndarray:
    top = 2 ** (bits - 1) - 1
    return np.clip(np.round(x * (top / limit)), -top, top) * limit / top


def numpy_twin_softmax(p: np.ndarray, split: float, bits: int) -> np.ndarray:
    top = 2 ** (bits - 1) - 1
    low = np.round(p / (split / top)) * (split / top)
    high = np.round(p * top) / top
    return np.where(p < split, low, high)


def numpy_twin_gelu(x: np.ndarray, limit: float, bits: int) -> np.ndarray:
    top = 2 ** (bits - 1) - 1
    negative = np.clip(np.round(x / (0.17 / top)), -top, 0) * (0.17 / top)
    positive = np.clip(np.round(x / (limit / top)), 0, top) * (limit / top)
    return np.where(x < 0, negative, positive)

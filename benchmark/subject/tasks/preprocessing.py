"""What a task asks of a model: its preprocessing, and nothing of its weights.

Tasks know models by this protocol alone; models may know tasks. So a task can be used, and tested, with
anything that turns items into inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Text = str | tuple[str, str]
"""What a text model reads as one item: a text, or a pair of texts such as question and answer."""


class Preprocessing(Protocol):
    """How a model wants its items; a model refuses with ``ConfigError`` what it cannot read."""

    @property
    def name(self) -> str:
        """The model's name: what a task keeps for a model, such as tokens, is kept under it."""
        ...

    def image_inputs(self, images: Tensor) -> Tensor:
        """What the model is called with, from uint8 images of one size, ``(N, 1 or 3, height, width)``."""
        ...

    def image_batch(self, images: Sequence[Image]) -> Tensor:
        """What the model is called with, from pictures of any size in RGB."""
        ...

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids of every text or pair of texts, with the special tokens, cut to the model's length."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a whole text, without special tokens and uncut."""
        ...

    def text_inputs(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What the model is called with, from the token ids of a batch."""
        ...

"""The contract of a model entry: architecture, preprocessing, and how its FP32 reference weights are made.

A new model is one file in this package, or one more instance in its family's file, registered with
:data:`MODELS`. Nothing heavy is imported when it is registered, so listing models stays quick.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.subject.assets.fetch import fetch
from benchmark.subject.tasks.task import TASKS, Task, get_task
from quanttune.errors import ConfigError
from quanttune.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from baselines.method import StageCache
    from benchmark.subject.obstacles import Obstacle
    from benchmark.subject.tasks.preprocessing import Text

Progress = Callable[[str, int, int], None]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of the red, green and blue values of ImageNet's training images, as most models are trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)


class ModelEntry(ABC):
    """A model of the suite.

    Attributes:
        name: The registered name.
        title: What it is, for a person.
        family: Architecture family: ``vit``, ``swin``, ``bert``, ``opt`` or ``llama``.
        task: Name of its task.
        source: Name of the pretrained asset, or where else the weights come from.
        recipe: Fields of ``quanttune.tuner.Schedule`` for the methods that fine-tune the reference.
        expected: The reference's metric on the whole test split, or None if any value will do.
        tolerance: How far from ``expected`` the measured metric may be, in the metric's unit.
        version: Raised when the entry's code changes the reference; part of every cell's identity.
        checkpoint: Canonical name of the released weights (timm's tag, or the name on the Hub) that published
            values belong to; None if the reference is not a released checkpoint as it is.
    """

    name: str
    title: str
    family: str
    task: str
    source: str
    recipe: Mapping[str, Any]
    expected: float | None = None
    tolerance: float = 1.0
    version: int = 1
    checkpoint: str | None = None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain JSON values that decide the reference weights: digests, seeds, recipe. No heavy work."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The architecture with its task head, in evaluation mode; weights are yet to be loaded."""

    @abstractmethod
    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        """Make the reference's state dict, computing on ``device``; deterministic on one kind of device."""

    def make_reference(
        self, stages: StageCache, progress: Progress, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The reference's state dict, made once and kept as a stage.

        Args:
            stages: Where it is kept, under :meth:`identity`.
            progress: Told of the work.
            device: Where to compute if it is not kept yet; the CPU by default.

        Raises:
            AssetError: If the pretrained weights cannot be had.
        """
        import torch

        chosen = device or torch.device("cpu")
        return stages.tensors("reference", self.identity(), lambda: self._reference(progress, chosen))

    @property
    def key(self) -> str:
        """What tells the model apart in identities and seeds.

        The name, but for a data set of the user's own: its content counts, not the place where it lies.
        """
        return self.name if self.task in TASKS else self.name.replace(self.task, self._task().fingerprint())

    def needs(self) -> tuple[str, ...]:
        """Names of the assets that must be fetched before the reference can be made."""
        return ()

    def fetch(self, say: Callable[[str], None]) -> list[tuple[Path, bool]]:
        """Bring what the reference is made of to this machine.

        Args:
            say: Called with one line for each thing that happens.

        Returns:
            For each thing its folder, and whether this call brought it.

        Raises:
            AssetError: If something cannot be had; the message says what to do.
        """
        fetched = [fetch(asset, say) for asset in self.needs()]
        return [(item.folder, item.fresh) for item in fetched]

    def obstacle(self) -> Obstacle | None:
        """Why the reference cannot be made on this machine, None if nothing known is in the way; quick."""
        return None

    def pins(self) -> dict[str, Any]:
        """What the lock file pins about pretrained weights that :meth:`identity` cannot know; may read them.

        Empty for a model whose identity holds the digests of all it is made of.
        """
        return {}

    def image_inputs(self, images: Tensor) -> Tensor:
        """What the model is called with, from uint8 images ``(N, 1 or 3, height, width)``.

        Raises:
            ConfigError: If this is not an image model.
        """
        raise ConfigError(f"model {self.name} takes no images; task {self.task} needs an image model")

    def image_batch(self, images: Sequence[Image]) -> Tensor:
        """What the model is called with, from pictures of any size in RGB, as its checkpoint was evaluated.

        Raises:
            ConfigError: If this is not a model of such pictures.
        """
        raise ConfigError(f"model {self.name} takes no pictures; task {self.task} needs a model that does")

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids of every text or pair of texts, with the special tokens, cut to the model's length.

        Raises:
            ConfigError: If this is not a text model.
        """
        raise ConfigError(f"model {self.name} takes no text; task {self.task} needs a text model")

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a whole text, without special tokens and uncut, for a language model.

        Raises:
            ConfigError: If this is not a causal language model.
        """
        raise ConfigError(f"model {self.name} is no language model; task {self.task} needs a causal one")

    def text_inputs(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What the model is called with, from the token ids of a batch.

        Raises:
            ConfigError: If this is not a text model.
        """
        raise ConfigError(f"model {self.name} takes no text; task {self.task} needs a text model")

    def _task(self) -> Task:
        return get_task(self.task)

    def _classes(self) -> int:
        classes = self._task().n_classes
        if classes is None:
            raise ConfigError(f"model {self.name} needs a task with classes; task {self.task} has none")
        return classes


class ImageEntry(ModelEntry):
    """Preprocessing of image models: square, bicubic, normalised; a grey image fills all three channels.

    Attributes:
        image_size: Height and width in pixels.
        mean: Of the red, green and blue values in [0, 1] that the model was trained with.
        std: Their standard deviations.
        interpolation: How pictures of any size are resized, in timm's word.
        crop_pct: Side of the centre crop over the shorter side of the resized picture.
    """

    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def image_inputs(self, images: Tensor) -> Tensor:
        """Float32 ``(N, 3, size, size)`` from uint8 ``(N, 1 or 3, height, width)``.

        The resizing kernel is Pillow's (bicubic, antialiased, a = -0.5), its overshoot clipped likewise. It
        sums in float64, rounded once at the end, so that every machine shows the model the same pixels.
        """
        import torch
        from torch.nn.functional import interpolate

        size = (self.image_size, self.image_size)
        pixels = images.double() / 255
        if tuple(images.shape[-2:]) != size:
            pixels = interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (self.mean, self.std)
        )
        return ((pixels - mean) / std).float().contiguous()  # one grey channel broadcasts to three

    @cached_property
    def _transform(self) -> Any:
        """The evaluation transform of timm for this preprocessing: resize, centre crop, normalise."""
        from timm.data import create_transform

        return create_transform(
            (3, self.image_size, self.image_size),
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode="center",
            mean=self.mean,
            std=self.std,
        )

    def image_batch(self, images: Sequence[Image]) -> Tensor:
        """Float32 ``(N, 3, size, size)`` from pictures in RGB.

        The shorter side is resized to ``floor(size / crop_pct)``, the centre cut out and normalised: timm's
        own evaluation.
        """
        import torch

        return torch.stack([self._transform(image) for image in images])


class TextEntry(ModelEntry):
    """Preprocessing of text models: batches padded on the right to their longest item.

    Attributes:
        max_length: Longest input in tokens, special tokens included.
        pad_id: Token id of padding.
    """

    max_length: int
    pad_id: int

    def text_inputs(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both int64 of shape ``(N, longest)``."""
        import torch

        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(tokens), longest), dtype=torch.int64)
        for row, item in enumerate(tokens):
            ids[row, : len(item)] = torch.tensor(item, dtype=torch.int64)
            mask[row, : len(item)] = 1
        return {"input_ids": ids, "attention_mask": mask}


class CausalTextEntry(TextEntry):
    """Preprocessing of causal language models, whose logits have the shape ``(N, tokens, vocabulary)``.

    Attributes:
        begin: Special tokens that the model's own tokenizer puts before a text.
    """

    begin: tuple[int, ...] = ()

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of a whole text, without special tokens and uncut."""

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Begin tokens, then the text; of one that is too long the end is kept, where the prediction is."""
        room = self.max_length - len(self.begin)
        return [[*self.begin, *self.tokenize(as_one(text))[-room:]] for text in texts]

    def text_inputs(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both int64 of shape ``(N, longest)``, padded on the right.

        Raises:
            ConfigError: If an item has more tokens than the model has positions.
        """
        longest = max(map(len, tokens))
        if longest > self.max_length:
            raise ConfigError(
                f"task {self.task} gives items of {longest} tokens, model {self.name} takes {self.max_length}"
            )
        return super().text_inputs(tokens)


def as_one(text: Text) -> str:
    """A pair joined by a space, for a model that has no way of its own to tell the two apart."""
    return text if isinstance(text, str) else " ".join(text)


@contextlib.contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Let what draws from torch's global generator draw from ``seed``; restore its state afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


MODELS: Registry[ModelEntry] = Registry("model", packages=("benchmark.subject.models",))
"""Every model, by name."""

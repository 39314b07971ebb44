"""Image classifiers of timm as released for ImageNet-1k, by architecture and tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.subject.models.checkpoint import read_config
from benchmark.subject.models.entry import IMAGENET_MEAN, IMAGENET_STD, MODELS, ImageEntry, Progress
from benchmark.subject.models.folder import TimmFolder
from benchmark.subject.models.hub import TIMM_FILES, HubEntry
from quanttune.errors import AssetError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RECIPE = {"steps": 2000, "learning_rate": 1e-5, "batch_size": 64}
"""A starting point that nobody has searched: a tenth of an epoch, at a rate usual for fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class ImageNetClassifier(HubEntry, ImageEntry):
    """A timm model with the head it was released with, and the preprocessing it was released for.

    FQ-ViT's published DeiT values were measured with a crop of 0.875, timm's are at 0.9.

    Args:
        name: Registered name.
        title: For a person.
        family: ``vit`` or ``swin``.
        architecture: timm's ``architecture.tag``; the tag tells apart weights of one architecture.
        mean: Of the red, green and blue values in [0, 1].
        std: Their standard deviations.
        interpolation: How pictures are resized, in timm's word.
        crop_pct: Side of the centre crop over the shorter side of the resized picture.
        image_size: Height and width of the crop in pixels.
        recipe: For the methods that fine-tune.
        expected: Top-1 accuracy on the validation images of ImageNet-1k.
        tolerance: In points.
        revision: Of the Hub repository ``timm/architecture.tag``.
    """

    name: str
    title: str
    family: str
    architecture: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    image_size: int = 224
    task: str = "imagenet"
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))
    expected: float | None = None
    tolerance: float = 0.3
    revision: str = "main"
    files: tuple[str, ...] = TIMM_FILES
    version: int = 1

    @property
    def repo(self) -> str:  # type: ignore[override]
        """The repository that timm keeps these weights in."""
        return f"timm/{self.architecture}"

    @property
    def source(self) -> str:  # type: ignore[override]
        """The repository."""
        return self.repo

    @property
    def checkpoint(self) -> str:  # type: ignore[override]
        """Architecture and tag, by which published values name the weights."""
        return self.architecture

    def data_config(self) -> dict[str, Any]:
        """The preprocessing, in timm's words."""
        return {
            "input_size": [3, self.image_size, self.image_size],
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def identity(self) -> dict[str, Any]:
        """Architecture and tag, repository, preprocessing and the data."""
        return {
            "model": self.key,
            "version": self.version,
            "architecture": self.architecture,
            **self.origin(),
            "data_config": self.data_config(),
            "task": self._task().fingerprint(),
        }

    def pins(self) -> dict[str, Any]:
        """The weights, and the preprocessing they were released with."""
        self._check_config()
        return {**super().pins(), "data_config": self.data_config()}

    @cached_property
    def _released(self) -> TimmFolder:
        return TimmFolder(
            name=self.name,
            title=self.title,
            task=self.task,
            source=self.source,
            folder=self.folder,
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
        )

    def _check_config(self) -> None:
        """Refuse a checkpoint of another architecture or tag, or with another preprocessing.

        Raises:
            AssetError: Naming both.
        """
        from timm.data import resolve_data_config

        config = read_config(self.folder)
        released = config.get("pretrained_cfg", {})
        architecture, _, tag = self.architecture.partition(".")
        found = (config.get("architecture"), released.get("tag", tag))
        if found != (architecture, tag):
            raise AssetError(
                f"{self.folder} holds {found[0]} with tag {found[1]}, model {self.name} is {architecture} "
                f"with tag {tag}; other tags are other weights. Put the files of {self.repo} there"
            )
        resolved = resolve_data_config(pretrained_cfg=released)
        for key, declared in self.data_config().items():
            value = resolved[key]
            plain = list(value) if isinstance(value, tuple) else value
            if plain != declared:
                raise AssetError(
                    f"{self.folder} was trained with {key} {plain}, model {self.name} declares {declared}; "
                    f"put the files of {self.repo} at revision {self.revision} there"
                )

    def build(self) -> nn.Module:
        """The architecture as the checkpoint's configuration gives it."""
        self._check_config()
        return self._released.build()

    def make_reference(
        self, stages: object, progress: Progress, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The released tensors in float32; they are already on disk, so no stage keeps a second copy."""
        return self._released.make_reference(stages, progress, device)

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        return self._released.make_reference(None, progress, device)


# Expected values: the FP32 rows of benchmark/report/published/imagenet_fqvit.csv. Its DeiT rows belong to a
# crop of 0.875, timm's to 0.9; PTQ4ViT's differ by 0.05, which the tolerance covers.
for _entry in (
    ImageNetClassifier(
        name="vit_base_patch16_224",
        title="ViT-B/16 (AugReg, ImageNet-21k, fine-tuned)",
        family="vit",
        architecture="vit_base_patch16_224.augreg_in21k_ft_in1k",
        expected=84.53,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    ImageNetClassifier(
        name="deit_small_patch16_224",
        title="DeiT-S/16",
        family="vit",
        architecture="deit_small_patch16_224.fb_in1k",
        expected=79.85,
    ),
    ImageNetClassifier(
        name="deit_base_patch16_224",
        title="DeiT-B/16",
        family="vit",
        architecture="deit_base_patch16_224.fb_in1k",
        expected=81.85,
    ),
    ImageNetClassifier(
        name="swin_small_patch4_window7_224",
        title="Swin-S",
        family="swin",
        architecture="swin_small_patch4_window7_224.ms_in1k",
        expected=83.20,
    ),
    ImageNetClassifier(
        name="swin_base_patch4_window7_224",
        title="Swin-B",
        family="swin",
        architecture="swin_base_patch4_window7_224.ms_in1k",
        expected=83.60,
    ),
):
    MODELS.register(_entry.name)(_entry)

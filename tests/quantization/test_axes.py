"""Which dimension holds the channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quanttune.errors import ConfigError
from quanttune.quantization import SiteId, SiteKind, discover_sites
from quanttune.quantization.axes import channel_axis, summed_axes
from tests.quantization.models import sites


def test_without_channels_there_is_none() -> None:
    assert channel_axis(torch.zeros(2, 5, 7), torch.zeros(2, 5, 11)) is None


def test_a_square_of_channels_is_told_by_its_strides() -> None:
    source = torch.zeros(2, 6, 6, 6)
    for axis in (1, 2, 3):
        assert channel_axis(source, source.movedim(axis, -1)) == axis


class Square(nn.Module):
    """Normalises the channels of an image as wide as it has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        image = self.conv(x)
        image = image + image
        return self.head(self.norm(image.movedim(1, -1)).mean(dim=(1, 2)))


def test_a_normalisation_says_where_the_channels_of_its_source_are() -> None:
    table = discover_sites(Square().eval(), torch.randn(2, 3, 6, 6))
    assert table["/add.output"].channel_axis == 1
    assert table["norm/layer_norm.input"].kind is SiteKind.NORM_INPUT
    assert table["norm/layer_norm.input"].source == "/add.output"


@pytest.mark.parametrize("name", ["vit", "swin", "bert", "opt", "llama"])
def test_every_kind_has_the_axis_of_its_features(name: str) -> None:
    for site in sites(name).values():
        if site.kind is SiteKind.WEIGHT:
            assert site.channel_axis == 0
        elif site.operation == "conv":
            assert site.channel_axis == 1
        elif site.operation == "softmax":
            assert site.channel_axis is None
        elif site.kind in (SiteKind.RESIDUAL_SUM, SiteKind.NORM, SiteKind.LINEAR_OUTPUT):
            assert site.channel_axis == len(site.shape)


def test_ids_are_read_back() -> None:
    for name in ("vit", "swin", "llama"):
        for site_id, site in sites(name).items():
            assert SiteId.parse(site_id) == site.at
            assert str(site.at) == site_id
            assert site_id in (site.sibling(site.operand), str(site.call.site(site.operand)))


@pytest.mark.parametrize("text", ["", "blocks.0", "/", "a/b", "a/b#x.c", "a/.input", "a/linear."])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no site id; they read like"):
        SiteId.parse(text)


def test_a_product_sums_over_its_inner_dimension() -> None:
    def axes(operation: str, operand: str, dimensions: int) -> tuple[int, ...]:
        return summed_axes(SiteId("m", operation, 1, operand), dimensions)

    assert axes("linear", "input", 3) == axes("matmul", "a", 4) == (-1,)
    assert axes("matmul", "b", 4) == (-2,)
    assert axes("conv", "input", 4) == (-3, -2, -1)

"""Every matrix product that ATen computes has a site, on many architectures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quanttune.errors import QuantTuneError
from quanttune.quantization import SiteTable, discover_sites, quantize, simulate

PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "addbmm", "convolution", "mv", "addmv", "dot", "linear"}
)
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"

MODELS = {
    "vit_tiny_patch16_224": 32,
    "swin_tiny_patch4_window7_224": 224,
    "deit_tiny_distilled_patch16_224": 32,
    "levit_128s": 224,
}
MORE_MODELS = {
    "eva02_tiny_patch14_224": 56,
    "beit_base_patch16_224": 32,
    "swinv2_tiny_window8_256": 64,
    "mobilevit_xxs": 64,
    "maxvit_rmlp_pico_rw_256": 64,
    "xcit_nano_12_p16_224": 32,
    "cait_xxs24_224": 32,
    "coatnet_nano_rw_224": 64,
}


class Products(TorchDispatchMode):
    """Counts what is really multiplied, below every function that could hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """A fused attention is two products."""
        return sum(self.calls[name] for name in PRODUCTS) + 2 * self.calls[ATTENTION]


def build(name: str, size: int) -> nn.Module:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return timm.create_model(name, img_size=size, num_classes=10).eval()
        except TypeError:  # a convolution in front takes any size
            return timm.create_model(name, num_classes=10).eval()


def products(sites: SiteTable) -> int:
    return len({site.call for site in sites.values() if site.operation in ("linear", "conv", "matmul")})


def check(name: str, size: int) -> None:
    model = build(name, size)
    batch = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Products() as counted:
        plain = model(batch)
    sites = discover_sites(model, batch)
    assert products(sites) == counted.total
    one = discover_sites(model, batch[:1])
    assert [(s.id, s.kind, s.source) for s in one.values()] == [
        (s.id, s.kind, s.source) for s in sites.values()
    ]
    with torch.no_grad():
        with simulate(model, {}):
            assert torch.equal(model(batch), plain)
        found = quantize(model, [batch], "W16A16-int").apply(model)(batch)
    assert float((found - plain).norm() / plain.norm()) < 0.005


@pytest.mark.parametrize(("name", "size"), MODELS.items())
def test_no_product_hides(name: str, size: int) -> None:
    check(name, size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), MORE_MODELS.items())
def test_no_product_hides_in_more_architectures(name: str, size: int) -> None:
    check(name, size)


def test_what_the_count_sees_and_no_site_holds_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.inner(self.layer(x), self.layer.weight)

    model, batch = Hidden().eval(), torch.randn(2, 4)
    with torch.no_grad(), Products() as counted:
        model(batch)
    assert counted.total == 2
    with pytest.raises(QuantTuneError, match="module '' calls inner"):
        discover_sites(model, batch)

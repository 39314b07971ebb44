"""``g``: the weight of each output element in PTQ4ViT's distance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.method import Batch
from baselines.ptq4vit import Ptq4Vit
from baselines.searching.curvature import DRAWS, GRADIENTS, output_curvature
from quanttune.inputs import call_model, logits_of
from quanttune.quantization import UniformQuantizer, simulate
from quanttune.seeds import torch_generator
from tests.rival_models import (
    model_and_batches,
    pretrained_context,
    rank_correlations,
    trained_vit,
)


class Head(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def curvature_of_logits(
    gradient: str, classes: int = 4, n: int = 20, **changes
) -> tuple[Tensor, Tensor, Batch, Head]:
    model = Head(classes).eval()
    with torch.no_grad():
        model.linear.weight.normal_(generator=torch_generator(0, "head"))
    batch = Batch(
        torch.randn(n, 6, generator=torch_generator(0, "x")),
        torch.randint(0, classes, (n,), generator=torch_generator(0, "y")),
    )
    found = output_curvature(
        model, batch, ["linear/linear.output"], gradient, torch_generator(0, "draws"), **changes
    )
    return found["linear/linear.output"], torch.softmax(model(batch.inputs), dim=-1).detach(), batch, model


def test_fisher_of_the_logits_is_p_times_one_minus_p():
    squared, p, _, _ = curvature_of_logits("fisher")
    assert torch.allclose(squared, p * (1 - p), atol=1e-6)


def test_sampled_fisher_has_the_same_expectation():
    squared, p, _, _ = curvature_of_logits("fisher", classes=20, n=3000)
    assert DRAWS < 20
    assert torch.allclose(squared.mean(0), (p * (1 - p)).mean(0), rtol=0.15, atol=1e-3)


def test_fisher_is_the_hessian_of_the_divergence():
    """Move an inner output a little: the divergence grows by half the curvature times the square."""
    model, batches = model_and_batches("vit", n_batches=1)
    model, batch = model.double(), Batch(batches[0].inputs.double(), batches[0].targets)
    site = "blocks.1.mlp.fc2/linear.output"
    curvature = output_curvature(model, batch, [site], "fisher", torch_generator(0, "x"))[site]
    with torch.no_grad():
        exact = torch.log_softmax(logits_of(call_model(model, batch.inputs)), -1)
    ratios = []
    places = (curvature > 0.05 * curvature.max()).nonzero()
    for place in places[:: max(len(places) // 8, 1)].tolist():
        move = torch.zeros_like(curvature)
        move[tuple(place)] = 1e-3
        with torch.no_grad(), simulate(model, {site: lambda x, move=move: x + move}):
            moved = torch.log_softmax(logits_of(call_model(model, batch.inputs)), -1)
        divergence = F.kl_div(moved, exact, reduction="sum", log_target=True)
        ratios.append(float(divergence / (0.5 * curvature[tuple(place)] * 1e-6)))
    assert len(ratios) >= 5
    assert ratios == pytest.approx([1.0] * len(ratios), rel=0.02)


def test_cross_entropy_and_divergence_of_the_logits():
    squared, p, batch, _ = curvature_of_logits("cross_entropy")
    one_hot = F.one_hot(batch.targets, 4)
    assert torch.allclose(squared, (p - one_hot) ** 2, atol=1e-6)
    quantizer = UniformQuantizer.symmetric(1.0, 3)
    squared, p, batch, model = curvature_of_logits(
        "minmax_divergence", quantizers={"linear/linear.weight": quantizer}
    )
    q = torch.softmax(F.linear(batch.inputs, quantizer(model.linear.weight), model.linear.bias), -1)
    assert torch.allclose(squared, (q - p) ** 2, atol=1e-6)


def test_g_is_the_same_in_double_precision_and_the_published_one_is_not():
    """The published code compares the FP32 prediction with itself: rounding is all that is left."""
    model, batches = model_and_batches("vit", n_batches=1)
    double = model_and_batches("vit", n_batches=1)[0].double()
    site = "blocks.0.attn.proj/linear.output"
    batch = batches[0]
    in_double = Batch(batch.inputs.double(), batch.targets)

    quantizers = {"blocks.0/add.output": UniformQuantizer.symmetric(8.0, 6)}
    for gradient in GRADIENTS:
        options = {"gradient": gradient, "generator": torch_generator(0, "g"), "quantizers": quantizers}
        g = output_curvature(model, batch, [site], **options)[site]
        exact = output_curvature(double, in_double, [site], **options)[site]
        assert torch.corrcoef(torch.stack([g.flatten().double(), exact.flatten()]))[0, 1] > 0.999

    def published(network: nn.Module, inputs: Tensor) -> Tensor:
        captured = []
        with simulate(network, {site: lambda x: (captured.append(x), x)[1]}, exact=False):
            logits = network(inputs)
        prediction = F.softmax(logits, -1)
        divergence = F.kl_div(F.log_softmax(logits, -1), prediction.detach(), reduction="batchmean")
        return torch.autograd.grad(divergence, captured[0])[0]

    noise, exact = published(model, batch.inputs), published(double, in_double.inputs)
    signal = output_curvature(model, batch, [site], "fisher", torch_generator(0, "g"))[site].sqrt()
    assert noise.norm() < 1e-4 * signal.norm()
    assert torch.corrcoef(torch.stack([noise.flatten().double(), exact.flatten()]))[0, 1] < 0.5


def test_outputs_that_no_logit_depends_on_count_nothing():
    class Idle(Head):
        def forward(self, x: Tensor) -> Tensor:
            F.gelu(F.linear(x, self.linear.weight))
            return super().forward(x)

    model = Idle(3).eval()
    batch = Batch(torch.randn(4, 6, generator=torch_generator(0, "idle")), torch.zeros(4, dtype=torch.long))
    found = output_curvature(
        model, batch, ["/linear.output", "linear/linear.output"], "fisher", torch_generator(0, "g")
    )
    assert found["/linear.output"].abs().max() == 0
    assert found["linear/linear.output"].max() > 0


def test_weights_that_need_no_gradient_still_give_one():
    model, batches = model_and_batches("vit", n_batches=1)
    site = "blocks.0.mlp.fc1/linear.output"
    with_graph = output_curvature(model, batches[0], [site], "fisher", torch_generator(0, "g"))[site]
    model.requires_grad_(False)
    without = output_curvature(model, batches[0], [site], "fisher", torch_generator(0, "g"))[site]
    assert torch.allclose(with_graph, without)


def test_the_weighted_error_foretells_the_change_of_the_loss_and_the_plain_error_does_not():
    found = rank_correlations(trained_vit().context("matmul", "W6A6"), GRADIENTS)
    assert found[Ptq4Vit().gradient] > 0.9
    for gradient in GRADIENTS:
        assert found[gradient] > found["plain"] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["W8A8", "W7A7", "W6A6"])
def test_the_same_on_a_pretrained_vit(precision):
    context = pretrained_context("dinov2_vits14", precision)
    found = rank_correlations(context, GRADIENTS)
    assert min(found[gradient] for gradient in GRADIENTS) > found["plain"] + 0.2

"""Which rows of logits are judged, how far two models' answers are apart, and who learns from that."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baselines.method import METHODS, Batch, Context
from baselines.searching.curvature import GRADIENTS, output_curvature
from quanttune.answers import UNSCORED, answers_of, divergence, divergences_of
from quanttune.errors import QuantTuneError
from quanttune.quantization import Scheme, discover_sites
from tests.method_contexts import context_for


def test_the_sum_is_that_of_the_rows_and_has_their_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (wanted.numpy(), logits.detach().numpy()))
    rows = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(divergences_of(wanted, logits.detach()), rows)
    total = divergence(wanted, logits)
    assert float(total.detach()) == pytest.approx(rows.sum())
    total.backward()
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad, q - p, atol=1e-12)


def test_one_column_is_a_value() -> None:
    wanted, logits = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [0.0]])
    assert float(divergence(wanted, logits)) == pytest.approx(0.125 + 2.0)
    assert divergences_of(wanted, logits).tolist() == pytest.approx([0.125, 2.0])


class _Unjudged:
    """Training data whose loss is zero, so that what is left is the distillation."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return 0 * logits.sum()


def _distilling(model: str) -> Callable[[Tensor, Tensor, Tensor], float]:
    """The loss of ``finetune(distillation=1)`` by logits, targets and the teacher's logits."""
    method, context = METHODS.get("finetune")(distillation=1.0), context_for(model, training=_Unjudged())
    taught = []

    def loss(logits: Tensor, targets: Tensor, teacher: Tensor) -> float:
        batches, found = method._distilled(context, iter([(context.calibration[0].inputs, targets)]))
        if not taught:
            taught.append(type(next(batches)[1]))
        return float(found(logits, taught[0](targets, teacher)))

    return loss


def test_distillation_is_a_mean_over_the_tokens_that_are_scored() -> None:
    """However long a text is, and whatever stands in its padding."""
    loss = _distilling("opt")
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 6, 9, generator=generator)
    logits = teacher + torch.randn(2, 6, 9, generator=generator)
    targets = torch.randint(9, (2, 6), generator=generator)
    targets[0, 3:] = UNSCORED
    answers, wanted = answers_of(logits, targets)[0], answers_of(teacher, targets)[0]
    assert len(answers) == 2 + 5
    found = loss(logits, targets, teacher)
    assert found == pytest.approx(float(divergences_of(wanted, answers).mean()), rel=1e-5)
    other = logits.clone()
    other[0, 4:] += 100.0
    assert loss(other, targets, teacher) == found
    twice = [torch.cat([each, each]) for each in (logits, targets, teacher)]
    assert loss(*twice) == pytest.approx(found, rel=1e-6)


def test_distillation_of_classes_and_of_values() -> None:
    loss = _distilling("vit")
    logits, teacher = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    wanted = torch.nn.functional.kl_div(
        logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert loss(logits, torch.tensor([0, 1]), teacher) == float(wanted)


class _Regressor(nn.Module):
    """A network of one column."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        for layer in (self.first, self.last):
            layer.weight = nn.Parameter(weight * torch.randn(layer.weight.shape, generator=generator))

    def forward(self, values: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(values)))  # type: ignore[no-any-return]


def _regression(weight: float = 1.0) -> Context:
    model = _Regressor(weight).eval()
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    sites = discover_sites(model, values)
    return Context(model, sites, Scheme.parse("W4A4", "matmul"), [Batch(values, torch.zeros(6))])


@pytest.mark.parametrize("gradient", [name for name in GRADIENTS if name != "cross_entropy"])
def test_curvature_of_a_value(gradient: str) -> None:
    context = _regression()
    quantizers = METHODS.get("minmax")().quantize(context).quantizers
    (batch,) = context.calibration
    found = output_curvature(
        context.model, batch, ["first/linear.output"], gradient, torch.Generator(), None, quantizers
    )["first/linear.output"]
    hidden = context.model.first(batch.inputs)
    slope = (hidden > 0) * context.model.last.weight
    if gradient == "fisher":
        np.testing.assert_allclose(found, slope.detach() ** 2, rtol=1e-5)
    else:
        assert bool(found.any())
        # one factor an item, the error of its value, times the slope
        ratios = found[slope != 0] / slope.detach()[slope != 0] ** 2
        assert bool((ratios >= 0).all())


def test_ptq4vit_searches_a_regression_and_says_when_nothing_guides_it() -> None:
    context = _regression()
    plain = METHODS.get("minmax")().quantize(context).quantizers
    found = METHODS.get("ptq4vit")().quantize(context).quantizers
    shares = [float(found[name].scale.max() / plain[name].scale.max()) for name in plain]  # type: ignore[attr-defined]
    # without a gradient each is the first candidate, 1.2
    assert min(shares) < 1.1
    with pytest.raises(QuantTuneError, match=r"gradient 'minmax_divergence' is zero .* metric mse"):
        METHODS.get("ptq4vit")().quantize(_regression(0.0))

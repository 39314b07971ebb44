"""Tiny models of the real classes and calibration data for the tests of FQ-ViT and PTQ4ViT."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from baselines import METHODS
from baselines.method import Batch, Context, MemoryStages
from baselines.ptq4vit import first_items
from baselines.searching.curvature import output_curvature
from baselines.searching.products import capture, find_products
from benchmark.keep.stages import Stages
from benchmark.subject.lookup import get_model
from benchmark.subject.tasks.task import get_task
from quanttune.inputs import call_model, logits_of
from quanttune.quantization import Quantized, Scheme, UniformQuantizer, discover_sites, simulate
from quanttune.seeds import torch_generator


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose channels differ in range, as those of trained models do; fresh ones are all alike."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = torch.exp(0.8 * torch.randn(len(parameter)))
                if "norm" in name.lower():
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif parameter.dim() in (2, 4):
                    parameter.normal_(std=parameter[0].numel() ** -0.5).mul_(
                        spread.view(-1, *[1] * (parameter.dim() - 1))
                    )
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_vit() -> nn.Module:
    return seeded(
        lambda: timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=5,
        )
    )


def tiny_deit() -> nn.Module:
    return seeded(
        lambda: timm.create_model(
            "deit_tiny_distilled_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=1,
            num_heads=2,
            num_classes=5,
        )
    )


def tiny_swin() -> nn.Module:
    """Its patch embedding is 16 channels of 16 x 16 positions, so sizes alone do not tell the channels."""
    return seeded(
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=16,
            depths=(2, 1),
            num_heads=(2, 2),
            num_classes=5,
        )
    )


def tiny_bert() -> nn.Module:
    config = BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=3,
    )
    return seeded(lambda: BertForSequenceClassification(config))


IMAGE_MODELS = {"vit": (tiny_vit, 32), "deit": (tiny_deit, 32), "swin": (tiny_swin, 64)}
ALL_MODELS = [*IMAGE_MODELS, "bert"]


def images(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch_generator(seed, "images"))


def token_batch(n: int, seed: int = 0, length: int = 9) -> dict[str, Tensor]:
    """Every item but the first ends in padding."""
    generator = torch_generator(seed, "tokens")
    ids = torch.randint(1, 40, (n, length), generator=generator)
    lengths = torch.randint(2, length, (n, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def model_and_batches(name: str, n_batches: int = 2, size: int = 8) -> tuple[nn.Module, list[Batch]]:
    if name == "bert":
        model = tiny_bert()
        inputs = [token_batch(size, seed, length=9 - seed) for seed in range(n_batches)]
    else:
        build, pixels = IMAGE_MODELS[name]
        model = build()
        inputs = [images(size, pixels, seed) for seed in range(n_batches)]
    targets = [
        torch.randint(0, 3, (size,), generator=torch_generator(seed, "targets")) for seed in range(n_batches)
    ]
    return model, [Batch(*pair) for pair in zip(inputs, targets, strict=True)]


def context_for(name: str, profile: str = "full", precision: str = "W8A8", **changes) -> Context:
    model, batches = model_and_batches(name)
    sites = discover_sites(model, batches[0].inputs)
    return Context(model, sites, Scheme.parse(precision, profile), batches, **changes)


@dataclass(frozen=True)
class Measured:
    accuracy: float
    divergence: float


@dataclass(frozen=True)
class Trained:
    """A small network that has learnt something, so that gradients and accuracy mean something."""

    model: nn.Module
    calibration: list[Batch]
    test: Batch

    def context(self, profile: str, precision: str) -> Context:
        sites = discover_sites(self.model, self.calibration[0].inputs)
        return Context(self.model, sites, Scheme.parse(precision, profile), self.calibration)

    def measure(self, quantizers) -> Measured:
        with torch.no_grad():
            exact = torch.log_softmax(self.model(self.test.inputs), -1)
            with simulate(self.model, quantizers):
                own = torch.log_softmax(self.model(self.test.inputs), -1)
        divergence = torch.nn.functional.kl_div(own, exact, reduction="batchmean", log_target=True)
        accuracy = (own.argmax(-1) == self.test.targets).double().mean() * 100
        return Measured(float(accuracy), float(divergence))


@functools.cache
def trained_vit() -> Trained:
    """A tiny ViT trained for seconds to tell ten noisy patterns apart."""
    generator = torch_generator(0, "patterns")
    patterns = torch.randn(10, 3, 32, 32, generator=generator)

    def batch(n: int) -> Batch:
        labels = torch.randint(0, 10, (n,), generator=generator)
        noise = 4.5 * torch.randn(n, 3, 32, 32, generator=generator)
        return Batch(patterns[labels] + noise, labels)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=48,
            depth=3,
            num_heads=3,
            num_classes=10,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        step = batch(64)
        loss = torch.nn.functional.cross_entropy(model(step.inputs), step.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for block in model.blocks:
            widen_channels(block.norm1, block.attn.qkv)
            widen_channels(block.norm2, block.mlp.fc1)
    return Trained(model.eval(), [batch(32) for _ in range(4)], batch(3000))


def widen_channels(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """Give the layer two outlier channels at its input, as large networks have, and the same output."""
    for channel, factor in ((3, 12.0), (17, 6.0)):
        norm.weight[channel] *= factor
        norm.bias[channel] *= factor
        linear.weight[:, channel] /= factor


def pretrained_context(name: str, precision: str) -> Context:
    """A model of the laptop suite; its reference is made anew unless QUANTTUNE_TEST_RESULTS names a store."""
    model, batches = _pretrained_parts(name)
    sites = discover_sites(model, batches[0].inputs)
    return Context(model, sites, Scheme.parse(precision, "matmul"), batches)


def rank_correlations(context: Context, gradients: Sequence[str]) -> dict[str, float]:
    """How well an error at a product's output ranks the divergence that quantizing this product alone causes.

    Every product is quantized with plain quantizers at several fractions of its operands' ranges. Returned
    are Spearman's correlations with the measured divergence, for the error weighted by each definition of
    ``g`` and for the ``plain`` error.
    """
    batch = next(first_items(context.calibration, 32))
    products = find_products(context.model, context.sites)
    bits = context.scheme.activations.bits
    minmax = (
        METHODS.get("minmax")()
        .quantize(dataclasses.replace(context, scheme=context.scheme.with_profile("matmul")))
        .quantizers
    )
    with torch.no_grad():
        exact = torch.log_softmax(logits_of(call_model(context.model, batch.inputs)), -1)
    errors: dict[str, list[float]] = {"plain": [], "measured": []}
    for gradient in gradients:
        curvature = partial(
            output_curvature,
            context.model,
            gradient=gradient,
            generator=torch_generator(0, "g"),
            quantizers=minmax,
        )
        first = gradient == gradients[0]
        for product, data in capture(context.model, products, context.sites, [batch], curvature):
            for fraction in (0.25, 0.5, 0.75, 1.0):
                x, w = data.left[0], data.right[0]
                quantizers = {
                    product.left_quantized: UniformQuantizer.symmetric(fraction * x.abs().max(), bits),
                    product.right: UniformQuantizer.symmetric(fraction * w.abs().max(), bits),
                }
                other = w if product.weight is None else w.T
                quantized = quantizers[product.right](w)
                moved = quantizers[product.left_quantized](x) @ (
                    quantized if product.weight is None else quantized.T
                )
                squared = (moved - x @ other) ** 2
                errors.setdefault(gradient, []).append(float((data.curvature[0] * squared).sum()))
                if first:
                    errors["plain"].append(float(squared.sum()))
                    with torch.no_grad(), simulate(context.model, quantizers):
                        own = torch.log_softmax(logits_of(call_model(context.model, batch.inputs)), -1)
                    divergence = torch.nn.functional.kl_div(own, exact, reduction="sum", log_target=True)
                    errors["measured"].append(float(divergence))
    measured = errors.pop("measured")
    return {name: float(spearmanr(values, measured).statistic) for name, values in errors.items()}


@functools.cache
def _pretrained_parts(name: str) -> tuple[nn.Module, list[Batch]]:
    entry = get_model(name)
    results = os.environ.get("QUANTTUNE_TEST_RESULTS")
    stages = MemoryStages() if results is None else Stages(Path(results) / "stages")
    model = entry.build()
    model.load_state_dict(entry.make_reference(stages, lambda *_: None))
    task = get_task(entry.task)
    return model.eval(), list(task.batches("train", entry, ids=task.calibration_ids(128, 0), batch_size=32))


def logit_error(context: Context, quantized: Quantized) -> float:
    """Norm of what quantization changes in the logits of a calibration batch, over their norm."""
    inputs = context.calibration[0].inputs
    with torch.no_grad():
        exact = logits_of(call_model(context.model, inputs))
        with simulate(context.model, quantized.quantizers):
            changed = logits_of(call_model(context.model, inputs))
    return float((changed - exact).norm() / exact.norm())

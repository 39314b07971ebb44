"""Fits the head of a linear probe on this machine, and compares it with the one that comes with the code.

    python -m benchmark.studies.fit_head
    python -m benchmark.studies.fit_head --write

With ``--write`` the new fit takes the place of the old one, and the digest that the model's entry must name
is printed: the reference is then another, and so is every number of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import click
import torch

from benchmark.engine.environment import prepare_torch
from benchmark.engine.progress import Display
from benchmark.subject.lookup import get_model
from benchmark.subject.models.vit import LinearProbe
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError, QuantTuneError


def validation_logits(entry: LinearProbe, fit: dict[str, torch.Tensor], display: Display) -> torch.Tensor:
    """What the probe says of the validation items, float64 ``(N, classes)``."""
    model = entry.build()
    model.load_state_dict(entry.backbone() | fit)
    features, _ = entry.features(
        model, "validation", lambda *told: display.stage(0, *told), torch.device("cpu")
    )
    return torch.from_numpy(features) @ fit["head.weight"].double().T + fit["head.bias"].double()


@click.command()
@click.option("--model", default="dinov2_vits14", show_default=True, metavar="NAME")
@click.option("--threads", default=2, show_default=True, help="PyTorch threads.")
@click.option("--write", is_flag=True, help="Keep the new fit in place of the old one.")
def main(model: str, threads: int, write: bool) -> None:
    """Fit, compare, and perhaps keep."""
    try:
        entry = _probe(model)
        kept = entry.kept_fit()
    except QuantTuneError as error:
        raise click.ClickException(str(error)) from error
    device, display = prepare_torch(threads, "cpu"), Display((), 1, live=False)
    fit = entry.fit(lambda *told: display.stage(0, *told), device)
    for line in _compared(entry, fit, kept or {}, display):
        click.echo(line)
    if write and entry.fitted is not None:
        from safetensors.torch import save_file

        save_file(fit, entry.fitted, metadata={"format": "pt"})
        click.echo(f"kept in {entry.fitted}; its digest is {tensor_digest(fit)}")


def _probe(model: str) -> LinearProbe:
    entry = get_model(model)
    if not isinstance(entry, LinearProbe) or entry.fitted is None:
        raise ConfigError(f"model {model} has no head that comes with the code; dinov2_vits14 has one")
    return entry


def _compared(
    entry: LinearProbe, fit: dict[str, torch.Tensor], kept: dict[str, torch.Tensor], display: Display
) -> Iterator[str]:
    for name in sorted(fit):
        change = (fit[name] - kept[name]).abs().max() / kept[name].abs().max()
        yield f"{name}: largest difference {float(change):.1e} of the largest value"
    new, old = (validation_logits(entry, each, display) for each in (fit, kept))
    change, same = (new - old).abs().max() / old.abs().max(), int((new.argmax(1) == old.argmax(1)).sum())
    yield f"logits: largest difference {float(change):.1e} of the largest value"
    yield f"{same} of {len(old)} validation items have the same answer"


if __name__ == "__main__":
    main()

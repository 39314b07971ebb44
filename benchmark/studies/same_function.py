"""How far weights that were changed without training are from the function they had.

Run it as ``python -m benchmark.studies.same_function``; ``--help`` tells the rest. For each model and each
method that folds weights: the largest difference of logits over the largest logit, in float32, which is what
runs, and in float64, which tells the equations from rounding. The folded weights are float32 in both.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tabulate import tabulate

if TYPE_CHECKING:
    from quanttune.inputs import ModelInputs

MODELS = ("dinov2_vits14", "minilm_l6", "opt_mini")


@dataclass(frozen=True)
class Difference:
    """Of a method's folded weights on a model.

    Attributes:
        changed: Number of tensors of the state dict that are others.
        in_float32: Largest relative difference of logits.
        in_float64: Likewise, both models computed in float64; what is left is the rounding of weights.
    """

    model: str
    method: str
    changed: int
    in_float32: float
    in_float64: float


def differences(models: tuple[str, ...], items: int, results: Path) -> Iterator[Difference]:
    """Fold, then compare on calibration items.

    Args:
        models: Names of models.
        items: Calibration items.
        results: Folder of a store, whose references are used if it has them.
    """
    import torch

    from baselines.method import METHODS, FoldingMethod
    from benchmark.engine.session import Session
    from benchmark.grid.expand import expand
    from benchmark.grid.suite import parse_suite
    from benchmark.keep.stages import Stages
    from quanttune.quantization.equivalence import load_weights, relative_difference

    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            session = Session(model, Stages(results / "stages"), torch.device("cpu"), lambda *_: None)
            text = (
                f'models = ["{model}"]\nprecisions = ["W8A8"]\ncalibration_items = {items}\n'
                '[[methods]]\nname = "minmax"\n'
            )
            (cell,) = expand(parse_suite("same_function", text, "this study"))
            # what is folded here must not be taken for what a run folded of all its calibration items
            context = session.context(cell)
            context.stages = Stages(Path(folder))
            batches = [batch.inputs for batch in context.calibration]
            for name in METHODS.names():
                kind = METHODS.get(name)
                if not issubclass(kind, FoldingMethod):
                    continue
                state = kind().folded(context)
                own = context.model.state_dict()
                changed = copy.deepcopy(context.model)
                load_weights(changed, state)
                wide = copy.deepcopy(context.model).double(), copy.deepcopy(changed).double()
                inputs64 = [_wide(inputs) for inputs in batches]
                yield Difference(
                    model,
                    name,
                    sum(not torch.equal(state[each], own[each].cpu()) for each in own),
                    relative_difference(context.model, changed, batches),
                    relative_difference(*wide, inputs64),
                )


def _wide(inputs: ModelInputs) -> ModelInputs:
    """Pixels in float64; token ids as they are."""
    return inputs if isinstance(inputs, Mapping) else inputs.double()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model", "models", multiple=True, default=("dinov2_vits14", "minilm_l6", "opt_mini"), metavar="NAME"
)
@click.option("--items", type=click.IntRange(min=1), default=32, show_default=True, help="Calibration items.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder of the store with the references.",
)
def main(models: tuple[str, ...], items: int, results: Path) -> None:
    """Print by how much folded weights change the logits of models."""
    rows = [
        (each.model, each.method, each.changed, f"{each.in_float32:.1e}", f"{each.in_float64:.1e}")
        for each in differences(models, items, results)
    ]
    heads = ("model", "method", "tensors changed", "float32", "float64")
    click.echo(tabulate(rows, headers=heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()

"""The table of docs/methods.md, made from the registered methods.

Run it as ``python -m benchmark.studies.methods_table``.

Where a method fits is what its ``skip`` says of small models of every family; what integer inference has to
compute beside the network's own operations is read off a quantized ViT and a quantized BERT.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from tabulate import tabulate

FAMILIES = {
    "ViT": "tiny_vit",
    "Swin": "tiny_swin",
    "BERT": "tiny_bert",
    "OPT": "tiny_opt_lm",
    "Llama": "tiny_llama",
}
"""A small model of each family."""
_PROFILES = ("full", "matmul")
_PRECISION = "W8A8"
_ITEMS = 8
HEADS = ("method", "changes", "trains", "extra operations", "fits", "source", "authors' code")


def rows() -> Iterator[tuple[str, ...]]:
    """One row, under :data:`HEADS`, for every method but the reference, in the order of roles."""
    from baselines.method import METHODS, ROLES

    methods = [METHODS.get(name) for name in METHODS.names()]
    fits, extra = _looked_at()
    for kind in sorted(methods, key=lambda each: (list(ROLES).index(each.role), each.name)):
        if kind.role == "reference":
            continue
        trains = ("each width" if kind.per_width else "once") if kind.trains else "no"
        if kind.per_width and not kind.trains:
            trains = "no, learned at each width"
        yield (
            f"`{kind.name}`",
            kind.changes,
            trains,
            extra[kind.name],
            fits[kind.name],
            kind.source,
            kind.licence,
        )


def table() -> str:
    """The table in Markdown."""
    return tabulate(list(rows()), headers=HEADS, tablefmt="github", disable_numparse=True)


def _looked_at() -> tuple[dict[str, str], dict[str, str]]:
    """Where each method fits, and its extra operations."""
    import torch

    from baselines.method import METHODS
    from benchmark.engine.session import Session
    from benchmark.grid.expand import expand
    from benchmark.grid.suite import parse_suite
    from benchmark.keep.stages import Stages
    from quanttune.quantization import Scheme

    unfit: dict[str, list[str]] = {name: [] for name in METHODS.names()}
    extra: dict[str, dict[str, None]] = {name: {} for name in METHODS.names()}
    with tempfile.TemporaryDirectory() as folder:
        for family, model in FAMILIES.items():
            session = Session(model, Stages(Path(folder)), torch.device("cpu"), lambda *_: None)
            for name in METHODS.names():
                method = METHODS.get(name)()
                schemes = [Scheme.parse(_PRECISION, profile) for profile in _PROFILES]
                answers = [method.skip(session.sites, scheme) for scheme in schemes]
                left_out = [each for each, why in zip(_PROFILES, answers, strict=True) if why]
                if left_out:
                    whole = len(left_out) == len(_PROFILES)
                    unfit[name].append(family if whole else f"{family} in {left_out[0]}")
                elif family in ("ViT", "BERT") and not method.trains:
                    text = (
                        f'models = ["{model}"]\nprecisions = ["{_PRECISION}"]\ncalibration_items = {_ITEMS}\n'
                        f'[[methods]]\nname = "{name}"\n'
                    )
                    for cell in expand(parse_suite("methods", text, "the table of methods")):
                        if not cell.is_reference:
                            found = method.quantize(session.context(cell)).extra_operations.values()
                            extra[name] |= dict.fromkeys(f"{what} ({family})" for what in found)
    return (
        {name: f"all but {', '.join(where)}" if where else "all" for name, where in unfit.items()},
        {name: "; ".join(what) or "none" for name, what in extra.items()},
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Print the table of methods in Markdown."""
    click.echo(table())


if __name__ == "__main__":
    main()

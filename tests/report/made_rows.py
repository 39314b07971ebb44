"""A finished suite whose numbers are made up, for what is made of numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import Suite
from benchmark.keep.record import Record, Result
from benchmark.keep.store import Store
from benchmark.report.claims import Claim
from benchmark.report.figures.figure import FIGURES
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.site.pages import SuiteView
from quanttune.seeds import numpy_generator

SUITE = """
models = ["tiny_vit", "tiny_bert"]
precisions = ["W8A8", "W6A6"]
[[methods]]
name = "fp32"
[[methods]]
name = "minmax"
[[methods]]
name = "mse"
[[methods]]
name = "finetune"
calibrator = ["minmax", "mse"]
[[methods]]
name = "quanttune"
"""

SITE = {"id": "fc/linear.input", "kind": "linear input", "shape": [4], "parameter": None}
SITE |= {"low": -2.0, "high": 2.0, "quantizer": "<q>"}
N = 400
FP32 = 90.0
ACCURACY = {
    "minmax": {"W8A8": 60.0, "W6A6": 20.0},
    "mse": {"W8A8": 75.0, "W6A6": 15.0},
    "finetune": {"W8A8": 80.0, "W6A6": 40.0},
    "finetune+mse": {"W8A8": 85.0, "W6A6": 82.0},
    "quanttune": {"W8A8": 89.0, "W6A6": 84.0},
}
OWN = {"finetune": 91.0, "finetune+mse": 91.0, "quanttune": 89.5}
NO_FRAMES = {name: pd.DataFrame() for name in FIGURES.names()}


def scores_of(cell: Cell) -> np.ndarray:
    """Items that are right, drawn apart for each cell, as many as its accuracy says."""
    share = FP32 if cell.is_reference else ACCURACY[cell.label][cell.precision]
    right = np.zeros(N)
    right[: round(N * share / 100)] = 1
    return numpy_generator(cell.seed, "scores", cell.model, cell.label, cell.precision).permutation(right)


def fill(store: Store, suite: Suite, shift: int = 0) -> SuiteRows:
    for cell in expand(suite):
        scores = scores_of(cell)
        value = 100 * float(scores.mean())
        result = Result("accuracy", True, value, FP32, OWN.get(cell.label), FP32 - value, -1.0, 1.0, N)
        record = Record(
            cell,
            "done",
            "2026-01-01T00:00:00+00:00",
            2.0,
            result,
            reference_digest="a" * 64,
            weights_digest=cell.method * 3,
            sites=[] if cell.is_reference else [dict(SITE)],
            provenance={"python": "3.12", "cpu": "a <fast> one", "versions": {"torch": "2.9"}},
        )
        ids = np.arange(N) + (shift if cell.seed else 0)
        store.save(record, {"ids": ids, "scores": scores})
    return collect_rows(store, suite)


def by_statement(found: list[Claim], start: str) -> Claim:
    (claim,) = (claim for claim in found if claim.statement.startswith(start))
    return claim


def frames_of_figures() -> dict[str, pd.DataFrame]:
    shares = {"W8A8": 0.7, "W6A6": 0.5}
    decomposition = [
        {
            "model": model,
            "weights": weights,
            "precision": precision,
            "rule": rule,
            "amplification": share if rule == "minmax" else 0.0,
            "saturation": 0.0 if rule == "minmax" else 0.6,
            "amplification_4": share,
            "amplification_5": 0.6,
            "amplification_8": 0.1,
        }
        for model in ("one", "two")
        for weights in ("reference", "quanttune")
        for precision, share in shares.items()
        for rule in ("minmax", "mse")
    ]
    sweep = [
        {"model": "one", "precision": "W8A8", "saturation_percent": percent, "value": value}
        | {"metric": "accuracy"}
        for percent, value in ((0.0, 50.0), (10.0, 80.0), (20.0, 70.0))
    ]
    sweep += [  # perplexity takes no part in claims about accuracy
        {"model": "two", "precision": "W8A8", "saturation_percent": percent, "value": value}
        | {"metric": "perplexity"}
        for percent, value in ((0.0, 50.0), (10.0, 80.0), (20.0, 40.0))
    ]
    outliers = [
        {"model": model, "weights": "reference", "layer": f"blocks.{layer}", "site": f"s{layer}", "kind": "k"}
        | {"ratio": 9.0, "kurtosis": 3.0, "inf_norm": 1.0, "range": sign * layer + 10.0}
        for model, sign in (("one", 1), ("two", -1))
        for layer in range(5)
    ]
    made = {"decomposition": decomposition, "saturation": sweep, "outliers": outliers}
    return NO_FRAMES | {name: pd.DataFrame(lines) for name, lines in made.items()}


def view_of(rows: SuiteRows) -> SuiteView:
    return SuiteView(rows, [], NO_FRAMES, {"saturation": ["tiny_vit"]})

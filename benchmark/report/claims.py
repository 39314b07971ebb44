"""The paper's claims beside what this suite measured; the verdict is computed and printed as it comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmark.report.comparison import Comparison, Estimate, Scored
from benchmark.report.figures.outliers import by_layer
from benchmark.report.published.reader import load_published
from benchmark.report.roles import CALIBRATORS, CONTROLS, OURS, PLAIN, STATE_OF_THE_ART
from benchmark.report.rows import SuiteRows
from benchmark.report.site_tables import REACHES
from benchmark.subject.lookup import get_model
from benchmark.subject.metrics.display import in_points

if TYPE_CHECKING:
    import pandas as pd

ABSENT = "not measured in this suite"
KEPT = 1.0
"""Points of accuracy that may be lost where the paper says that accuracy is kept; our reading."""
CLOSE = 5.0
"""Points within which a measured share counts as the stated one; our reading."""
ROUNDING = "What lies within twice the standard deviation of rounding alone counts as no difference."
_STRONG = 0.5  # a rank correlation from which on something "grows"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        statement: What the paper says, in our words.
        stated: Its number, or ``-``.
        measured: Ours, with intervals.
        verdict: What follows; ``not measured in this suite`` if cells or figures are missing.
        how: How it was computed.
    """

    statement: str
    stated: str
    measured: str
    verdict: str
    how: str


def claims(rows: SuiteRows, comparison: Comparison, frames: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """Every claim that a suite can test.

    Args:
        rows: The suite's cells.
        comparison: The same cells with their scores.
        frames: Data of the figures ``decomposition``, ``saturation`` and ``outliers``, by name; a frame may
            be empty.
    """
    stated = _stated()
    return [
        _amplification(frames["decomposition"], stated["amplification"]),
        _rounding_dominates(frames["decomposition"]),
        _saturation(frames["saturation"]),
        _depth(frames["outliers"]),
        *_against_calibrators(comparison, stated),
        _against_state_of_the_art(rows, comparison, stated["state of the art"]),
        _kept(comparison),
        _no_overhead(rows),
        *_against_control(comparison),
    ]


def _stated() -> dict[str, float]:
    """The paper's numbers, from the published table."""
    found = {}
    for line in load_published("quanttune_headline").to_dict("records"):
        claim = str(line["claim"])
        if "amplification" in claim:
            found["amplification"] = float(line["value"])
        elif "best calibration" in claim:
            found[str(line["precision"])] = float(line["value"])
        elif "state-of-the-art" in claim:
            found["state of the art"] = float(line["value"])
    return found


def _amplification(frame: pd.DataFrame, stated: float) -> Claim:
    statement = "Share of the quantization error that is precision loss from the range outliers amplify"
    how = (
        "Min-max ranges of the reference: error that ordinary values suffer beyond what they would over "
        "their own range, over the whole error; mean over activation sites, then over models. Ordinary are "
        "values within 6 standard deviations of the mean."
    )
    if not len(frame):
        return Claim(statement, f"{stated:g} %", ABSENT, ABSENT, how)
    part = frame[(frame["weights"] == "reference") & (frame["rule"] == PLAIN)]
    by_precision = 100 * part.groupby("precision", sort=False)["amplification"].mean()
    overall = float(by_precision.mean())
    text = ", ".join(f"{precision} {share:.0f} %" for precision, share in by_precision.items())
    by_model = 100 * part.groupby("model", sort=False)["amplification"].mean()
    text += "; " + ", ".join(f"{model} {share:.0f} %" for model, share in by_model.items())
    others = [f"{100 * part[f'amplification_{reach:g}'].mean():.0f} % at {reach:g}" for reach in REACHES]
    text += f"; with another limit of the ordinary: {', '.join(others)} deviations"
    relation = "lower" if overall < stated else "higher"
    verdict = "agrees" if abs(overall - stated) <= CLOSE else f"{relation} than stated"
    return Claim(statement, f"{stated:g} %", f"{overall:.0f} % ({text})", verdict, how)


def _rounding_dominates(frame: pd.DataFrame) -> Claim:
    statement = "Precision loss dominates saturation"
    how = "Share of the error that is rounding inside the range; mean over sites, precisions and models."
    if not len(frame):
        return Claim(statement, "-", ABSENT, ABSENT, how)
    part = frame[frame["weights"] == "reference"]
    shares = 100 * (1 - part.groupby("rule", sort=False)["saturation"].mean())
    failing = [str(rule) for rule, share in shares.items() if share <= 50]
    text = ", ".join(f"{rule} {share:.0f} %" for rule, share in shares.items())
    verdict = f"does not hold with {', '.join(failing)}" if failing else "holds with every calibrator"
    return Claim(statement, "-", text, verdict, how)


def _saturation(frame: pd.DataFrame) -> Claim:
    statement = "How far ranges are clipped decides accuracy"
    how = "Accuracy at 0 % and at the best of 0 to 30 %. The best is picked on the items it is measured on."
    frame = frame[frame["metric"].map(in_points)] if len(frame) else frame
    if not len(frame):
        return Claim(statement, "-", ABSENT, ABSENT, how)
    lines, helped = [], 0
    groups = frame.groupby(["model", "precision"], sort=False)
    for (model, precision), part in groups:
        values, percentages = part["value"].tolist(), part["saturation_percent"].tolist()
        best = max(values)
        helped += best > values[0]
        at = percentages[values.index(best)]
        lines.append(f"{model} {precision} {values[0]:.1f} to {best:.1f} at {at:g} %")
    verdict = f"clipping helps in {helped} of {len(groups)} cases"
    return Claim(statement, "-", "; ".join(lines), verdict, how)


def _depth(frame: pd.DataFrame) -> Claim:
    statement = "The range grows in deeper layers"
    how = "Rank correlation (Spearman) of a layer's number with the largest range over its activation sites."
    if not len(frame):
        return Claim(statement, "-", ABSENT, ABSENT, how)
    from scipy.stats import spearmanr

    layers = by_layer(frame)
    layers = layers[(layers["weights"] == "reference") & layers["layer"].str.contains(r"\.\d+$")]
    found = {}
    for model, part in layers.groupby("model", sort=False):
        if len(part) > 2:
            found[str(model)] = float(spearmanr(range(len(part)), part["range"]).statistic)
    if not found:
        return Claim(statement, "-", "fewer than three layers", ABSENT, how)
    growing = [model for model, value in found.items() if value >= _STRONG]
    verdict = f"holds for {len(growing)} of {len(found)} models"
    return Claim(
        statement, "-", ", ".join(f"{model} {value:.2f}" for model, value in found.items()), verdict, how
    )


def _against_calibrators(comparison: Comparison, stated: dict[str, float]) -> Iterator[Claim]:
    """First the choice that one could have made, then the best after the fact, which no rival can beat."""
    for chosen in (True, False):
        how = (
            f"Drop of {_HOW_CHOSEN[chosen]} on the reference, less the drop of QuantTune with min-max, in "
            "points of accuracy. Mean over models, paired bootstrap. We read the paper's percent as points. "
            f"{ROUNDING}"
        )
        for precision in comparison.precisions:
            statement = f"The drop shrinks against {_STATED_CHOSEN[chosen].format(precision)}"
            number = stated.get(precision)
            said = "-" if number is None else f"{number:g}"
            pairs = comparison.pairs(precision, CALIBRATORS, chosen=chosen)
            if not pairs:
                yield Claim(statement, said, ABSENT, ABSENT, how)
                continue
            gain = comparison.gain(pairs)
            before = sum(rival.drop for _, rival in pairs.values()) / len(pairs)
            after = sum(ours.drop for ours, _ in pairs.values()) / len(pairs)
            text = f"{gain} points: the mean drop goes from {before:.1f} to {after:.1f}"
            if chosen:
                text += f"; {_names(pairs)}"
            yield Claim(statement, said, text, _verdict(gain, number, before), how)


_HOW_CHOSEN = {
    True: "the calibrator that validation items choose, per model and precision,",
    False: "the suite's best calibrator, chosen per model after the fact, on the test items themselves,",
}
_STATED_CHOSEN = {
    True: "the calibrator chosen on validation items at {}",
    False: "the best calibrator at {}, chosen after the fact",
}


def _names(pairs: Mapping[str, tuple[Scored, Scored]]) -> str:
    return ", ".join(f"{model} {rival.named}" for model, (_, rival) in pairs.items())


def _verdict(gain: Estimate, stated: float | None, before: float) -> str:
    """Whether a gain reaches the stated one, with regard to its interval and to what there was to gain."""
    low, high = gain.low or 0.0, gain.high or 0.0
    if stated is None:
        return "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    if low >= stated:
        return "reached"
    if before < stated:
        return f"not reached; the rival loses only {before:.1f} points, so there is no more to win back"
    return "not reached" if high < stated else "open: the interval holds the stated value"


def _against_state_of_the_art(rows: SuiteRows, comparison: Comparison, stated: float) -> Claim:
    statement = "More accurate than the state of the art on ViT models"
    how = "The same against the best published method of the suite, on ViT models and on the same profile."
    texts, verdicts = [], []
    for precision in comparison.precisions:
        pairs = {
            model: pair
            for model, pair in comparison.pairs(precision, STATE_OF_THE_ART).items()
            if get_model(model).family == "vit"
        }
        if pairs:
            gain = comparison.gain(pairs)
            before = sum(rival.drop for _, rival in pairs.values()) / len(pairs)
            names = ", ".join(sorted({rival.label for _, rival in pairs.values()}))
            texts.append(f"{precision} {gain} points over {names}")
            verdicts.append(f"{precision} {_verdict(gain, stated, before)}")
    said = f"more than {stated:g}"
    if not texts:
        return Claim(statement, said, ABSENT, ABSENT, how)
    return Claim(statement, said, "; ".join(texts), "; ".join(verdicts), how)


def _kept(comparison: Comparison) -> Claim:
    statement = "Accuracy is kept at 6 bits"
    how = (
        "Drop of QuantTune with min-max at W6A6 against the better of the reference and the plainly "
        f"fine-tuned model in FP32; at most {KEPT:g} point counts as kept, which is our reading. Open is "
        "what rounding alone may lead to the other side."
    )
    texts, kept, undecided = [], 0, 0
    for model in comparison.models:
        ours = comparison.get(model, "W6A6", OURS)
        if ours is None:
            continue
        control = comparison.best(model, "W6A6", CONTROLS)
        best = max(ours.fp32, control.fp32_own if control and control.fp32_own is not None else ours.fp32)
        texts.append(f"{model} {best - ours.value:.1f} points")
        beyond = ours.rounded.mean - (best - KEPT)
        undecided += abs(beyond) < ours.rounded.reach
        kept += beyond >= ours.rounded.reach
    if not texts:
        return Claim(statement, "-", ABSENT, ABSENT, how)
    verdict = f"kept on {kept} of {len(texts)} models" + (f", open on {undecided}" if undecided else "")
    return Claim(statement, "-", ", ".join(texts), verdict, how)


def _no_overhead(rows: SuiteRows) -> Claim:
    statement = "Inference needs no extra operation"
    how = "The quantized sites and weights of QuantTune's cells against those of plain min-max."
    layouts: dict[tuple[str, str, str], dict[str, list[Any]]] = {}
    for record in rows.records.values():
        cell = record.cell
        if cell.label in (OURS, PLAIN) and record.sites:
            layout = [(site["id"], tuple(site["shape"]), site["parameter"]) for site in record.sites]
            key = (cell.model, cell.profile, cell.precision)
            layouts.setdefault(key, {})[cell.label] = layout
    both = [found for found in layouts.values() if len(found) == 2]
    if not both:
        return Claim(statement, "-", ABSENT, ABSENT, how)
    same = sum(found[OURS] == found[PLAIN] for found in both)
    verdict = "holds" if same == len(both) else "does not hold"
    return Claim(statement, "-", f"the same graph in {same} of {len(both)} cases", verdict, how)


def _against_control(comparison: Comparison) -> Iterator[Claim]:
    """Not a claim of the paper, but what its claims rest on: the loss does it, not the training."""
    for chosen in (True, False):
        which = (
            "the calibrator that validation items choose"
            if chosen
            else "the best calibrator that the suite pairs it with on each model, chosen after the fact"
        )
        how = (
            f"The same fine-tuning without the outlier loss, with {which}, against QuantTune with min-max. "
            f"Mean over models, paired bootstrap. {ROUNDING}"
        )
        for precision in comparison.precisions:
            pairs = comparison.pairs(precision, CONTROLS, chosen=chosen)
            if chosen:
                statement = f"Control with a calibrator chosen on validation items, at {precision}"
            else:
                statement = f"Control: the outlier loss does it, not the fine-tuning, at {precision}"
            if not pairs:
                yield Claim(statement, "-", ABSENT, ABSENT, how)
                continue
            gain = comparison.gain(pairs)
            yield Claim(statement, "-", f"{gain} points over {_names(pairs)}", _verdict(gain, None, 0.0), how)

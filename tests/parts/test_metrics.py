"""Every metric against its formula, written again in NumPy or taken from scikit-learn and SciPy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, log_loss, matthews_corrcoef, top_k_accuracy_score

from benchmark.engine.measure import Items, metric_values
from benchmark.engine.runner import CellRunner, Settings
from benchmark.engine.session import Session
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.record import Record
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store
from benchmark.subject.metrics.display import in_points, number, with_unit
from benchmark.subject.metrics.metric import CLASS, METRICS, QUANTITIES, TEXT, VALUE, Metric
from benchmark.subject.tasks.task import TASKS, get_task
from quanttune.answers import UNSCORED
from quanttune.digests import json_digest

N = 400


def answers(kind: str, classes: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets, the logits a little better than chance."""
    generator = torch.Generator().manual_seed(seed)
    if kind == VALUE:
        targets = torch.randn(N, generator=generator)
        return (targets + torch.randn(N, generator=generator))[:, None], targets
    if kind == TEXT:
        logits = 3 * torch.randn(20, 12, classes, generator=generator)
        targets = torch.randint(classes, (20, 12), generator=generator)
        targets[:, :4] = UNSCORED
        return logits, targets
    targets = torch.randint(classes, (N,), generator=generator)
    targets[:100] = 0  # one class is frequent
    logits = 2 * torch.randn(N, classes, generator=generator)
    logits[torch.arange(N), targets] += 1
    return logits, targets


def value(name: str, logits: torch.Tensor, targets: torch.Tensor) -> float:
    metric = METRICS.get(name)
    return metric.value({need: QUANTITIES.get(need)(logits, targets).numpy() for need in metric.needs})


def calibration_error(logits: np.ndarray, targets: np.ndarray) -> float:
    """Guo et al., one bin after the other."""
    sure, right = softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == targets
    total = 0.0
    for at in range(15):
        inside = (sure > at / 15) & (sure <= (at + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    return 100 * total


def text_perplexity(logits: np.ndarray, targets: np.ndarray) -> float:
    losses = [
        -np.mean([log_softmax(row[at - 1])[wanted[at]] for at in range(1, len(wanted)) if wanted[at] >= 0])
        for row, wanted in zip(logits.astype(np.float64), targets, strict=True)
    ]
    return float(np.exp(np.mean(losses)))


Formula = Callable[[np.ndarray, np.ndarray], float]
FORMULAS: dict[str, Formula] = {
    "accuracy": lambda logits, targets: 100 * np.mean(logits.argmax(axis=1) == targets),
    "top-5 accuracy": lambda logits, targets: 100 * top_k_accuracy_score(targets, logits, k=5),
    "F1": lambda logits, targets: 100 * f1_score(targets, logits.argmax(axis=1)),
    "macro F1": lambda logits, targets: 100 * f1_score(targets, logits.argmax(axis=1), average="macro"),
    "Matthews correlation": lambda logits, targets: 100 * matthews_corrcoef(targets, logits.argmax(axis=1)),
    "negative log-likelihood": lambda logits, targets: log_loss(
        targets, softmax(logits.astype(np.float64), axis=1), labels=range(logits.shape[1])
    ),
    "expected calibration error": calibration_error,
    "perplexity": text_perplexity,
    "Pearson correlation": lambda outputs, values: 100 * pearsonr(outputs[:, 0], values).statistic,
    "Spearman correlation": lambda outputs, values: 100 * spearmanr(outputs[:, 0], values).statistic,
}
CLASSES = {"F1": 2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", METRICS.names())
def test_a_metric_is_its_formula(name: str, seed: int) -> None:
    logits, targets = answers(METRICS.get(name).answers[0], CLASSES.get(name, 8), seed)
    expected = FORMULAS[name](logits.numpy(), targets.numpy())
    assert value(name, logits, targets) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", METRICS.names())
def test_metrics_describe_themselves(name: str) -> None:
    metric = METRICS.get(name)
    assert isinstance(metric, Metric)
    assert metric.name == name
    assert metric.title
    assert type(metric).__doc__
    assert set(metric.answers) <= {CLASS, VALUE, TEXT}
    assert all(need in QUANTITIES for need in metric.needs)
    assert any(name in task.metrics for _, task in TASKS.items())
    shown = with_unit(name)
    assert shown.startswith(name)
    assert ("(" in shown) == bool(metric.unit)


@pytest.mark.parametrize("name", METRICS.names())
def test_what_is_kept_of_an_item_is_small_and_its_own(name: str) -> None:
    metric = METRICS.get(name)
    logits, targets = answers(metric.answers[0], CLASSES.get(name, 8))
    for need in metric.needs:
        quantity = QUANTITIES.get(need)
        rows = quantity(logits, targets)
        assert len(rows) == len(targets)
        assert rows[0].numel() * rows.element_size() <= 16
        torch.testing.assert_close(quantity(logits[5:9], targets[5:9]), rows[5:9])


@pytest.mark.parametrize("name", METRICS.names())
def test_a_better_model_has_a_better_value(name: str) -> None:
    metric = METRICS.get(name)
    logits, targets = answers(metric.answers[0], CLASSES.get(name, 8))
    if metric.answers == (CLASS,):
        better = logits.clone()
        better[torch.arange(N), targets] += 6
    elif metric.answers == (TEXT,):
        better = logits.clone()
        better[:, :-1].scatter_add_(2, targets[:, 1:].clamp(min=0)[..., None], torch.full((20, 11, 1), 6.0))
    else:
        better = 0.3 * logits + targets[:, None]
    gain = value(name, better, targets) - value(name, logits, targets)
    assert gain > 0 if metric.higher_is_better else gain < 0


def test_leading_metrics_agree_with_their_tasks() -> None:
    for name, task in TASKS.items():
        assert task.metrics[0] == task.metric
        assert len(set(task.metrics)) == len(task.metrics)
        assert METRICS.get(task.metric).higher_is_better == task.higher_is_better, name
        assert all(METRICS.get(metric).applies(task.answer, task.n_classes) for metric in task.metrics)


def test_a_task_offers_what_fits_its_answers() -> None:
    everywhere = ("Matthews correlation", "expected calibration error", "macro F1", "negative log-likelihood")
    two = set(get_task("movie_reviews").metrics)
    ten = set(get_task("fashion_mnist").metrics)
    assert two == {"accuracy", "F1", *everywhere}
    assert ten == {"accuracy", "top-5 accuracy", *everywhere}
    assert get_task("glue_stsb").metrics == ("Pearson correlation", "Spearman correlation")
    assert get_task("moby_dick").metrics == ("perplexity",)
    assert get_task("moby_dick").quantities == ()  # the scores are all it needs
    open_set = {"accuracy", "top-5 accuracy", "expected calibration error", "negative log-likelihood"}
    assert set(get_task("lambada").metrics) == open_set


def test_logits_that_are_not_finite_are_never_right() -> None:
    logits, targets = answers(CLASS, 2)
    broken = logits.clone()
    lucky = targets == 0  # the largest of logits with a NaN is the NaN's
    broken[lucky, 0] = float("nan")
    assert value("accuracy", broken, targets) == pytest.approx(
        100 * float(((logits.argmax(1) == targets) & ~lucky).float().mean())
    )
    none_of_class_0 = np.where(lucky, -1, logits.argmax(1))
    expected = f1_score(targets, none_of_class_0, labels=[0, 1], average="macro")
    assert value("macro F1", broken, targets) == pytest.approx(100 * expected)
    assert value("top-5 accuracy", torch.full((4, 8), float("nan")), torch.zeros(4).long()) == 0.0
    assert np.isnan(value("negative log-likelihood", broken, targets))
    assert np.isnan(value("expected calibration error", broken, targets))


def test_equal_logits_rank_as_they_are_predicted() -> None:
    logits = torch.zeros(8, 8)
    targets = torch.arange(8)
    ranks = QUANTITIES.get("rank")(logits, targets)
    assert ranks.tolist() == list(range(8))
    assert torch.equal(ranks == 0, QUANTITIES.get("hits")(logits, targets) == 1)


def test_where_there_is_no_correlation_it_is_0() -> None:
    same, values = torch.ones(10, 1), torch.arange(10.0)
    assert value("Pearson correlation", same, values) == value("Spearman correlation", same, values) == 0.0
    assert value("Matthews correlation", torch.eye(2)[[0] * 6], torch.tensor([0, 1] * 3)) == 0.0


def test_ranks_of_ties_are_shared() -> None:
    outputs, values = torch.tensor([1.0, 2, 2, 3, 1])[:, None], torch.tensor([0.0, 1, 1, 5, 2])
    expected = 100 * spearmanr(outputs[:, 0], values).statistic
    assert value("Spearman correlation", outputs, values) == pytest.approx(expected)


def test_points_and_digits_come_from_the_registry() -> None:
    assert in_points("macro F1")
    assert in_points("accuracy")
    assert not in_points("Pearson correlation")
    assert not in_points("of a metric nobody registered")
    assert number(12.345, "macro F1") == "12.3"
    assert number(12.345, "negative log-likelihood") == "12.35"
    assert with_unit("accuracy") == "accuracy (%)"
    assert with_unit("perplexity") == "perplexity"


@pytest.mark.parametrize("name", ["movie_reviews", "glue_stsb", "moby_dick"])
def test_old_items_give_what_can_be_made_of_them(name: str) -> None:
    task = get_task(name)
    logits, targets = answers(task.answer, task.n_classes or 8)
    items = Items(np.arange(len(targets)), task.item_scores(logits, targets).numpy(), None)
    found = metric_values(task, items)
    assert found[task.metric] == task.metric_value(items.scores)
    assert set(found) == {"accuracy"} if name == "movie_reviews" else set(found) == set(task.metrics)


def test_a_metric_of_the_users_own_is_offered_by_every_task_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubt(Metric):
        name, title, needs = "doubt", "one minus confidence", ("confidence",)
        higher_is_better = False

        def value(self, items: object) -> float:
            return float(1 - items["confidence"].mean())  # type: ignore[index]

    METRICS.names()
    monkeypatch.setattr(METRICS, "_items", dict(METRICS._items))
    assert METRICS.register("doubt")(Doubt) is Doubt
    METRICS.register("doubt")(Doubt)  # a file that is read twice claims its own name twice
    with pytest.raises(ValueError, match="two components claim the metric name 'accuracy'"):
        METRICS.register("accuracy")(Doubt)
    assert "doubt" in get_task("fashion_mnist").metrics
    assert "doubt" not in get_task("glue_stsb").metrics
    assert get_task("fashion_mnist").fingerprint() == FASHION_MNIST


FASHION_MNIST = "810a2f61cfedc742eac2eb2a3d3fb99862668c4303c738f492ae94ed2c1d0ecf"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Record]]:
    """Three cells of the smoke suite, measured."""
    store = Store(tmp_path_factory.mktemp("smoke"))
    suite = dataclasses.replace(load_suite("smoke"), models=("tiny_bert",), limit=60)
    runner = CellRunner(Settings(store.root), lambda *_: None)
    records = []
    for cell in expand(suite):
        if cell.method in ("fp32", "minmax", "finetune") and cell.precision in ("FP32", "W8A8"):
            outcome = runner.run(cell)
            assert outcome.status == "done", outcome.message
            record = store.load(cell)
            assert record is not None
            records.append(record)
    assert len({record.cell.method for record in records}) == 3
    return store, records


def test_a_cell_keeps_all_metrics_of_its_task(smoke: tuple[Store, list[Record]]) -> None:
    store, records = smoke
    task = get_task("movie_reviews")
    for record in records:
        result = record.result
        assert result is not None
        assert set(record.metrics) == set(task.metrics)
        leading = record.metrics["accuracy"]
        expected = {"value": result.value, "fp32": result.fp32, "fp32_own": result.fp32_own}
        assert {name: number for name, number in leading.items() if "noise" not in name} == expected
        for numbers in record.metrics.values():
            assert (numbers["fp32_own"] is not None) == (record.cell.method == "finetune")
            if record.cell.is_reference:
                assert numbers["value"] == numbers["fp32"]
        kept = store.items(record.cell.cell_id)
        assert {"ids", "scores", "predictions", *task.quantities} == set(kept)
        for name in task.metrics[1:]:  # what is kept gives the metric again
            again = METRICS.get(name).value({**kept, "hits": kept["scores"]})
            assert record.metrics[name]["value"] == pytest.approx(again, rel=1e-12)


def test_quantities_tell_of_the_same_logits(smoke: tuple[Store, list[Record]]) -> None:
    store, records = smoke
    for record in records:
        kept = store.items(record.cell.cell_id)
        assert np.array_equal(kept["scores"] == 1, kept["predictions"] == kept["targets"])
        right = kept["scores"] == 1  # of two classes the likelihood of the true one tells the confidence
        likelihood = np.exp(-kept["nll"].astype(np.float64))
        sure = np.where(right, likelihood, 1 - likelihood)
        np.testing.assert_allclose(kept["confidence"], sure, rtol=1e-5)


def test_a_record_of_version_1_is_read_and_sealed(smoke: tuple[Store, list[Record]], tmp_path: Path) -> None:
    _, records = smoke
    body = {key: value for key, value in records[0].to_json().items() if key not in ("digest", "metrics")}
    old = {**body, "schema": 1}
    sealed = {**old, "digest": json_digest(old)}
    record = Record.from_json(json.loads(json.dumps(sealed)), "here")
    assert record is not None
    assert record.metrics == {}
    assert record.result == records[0].result
    assert Record.from_json({**sealed, "duration_s": 0.0}, "here") is None
    assert Record.from_json({**sealed, "metrics": {}}, "here") is None  # nothing may be added under the seal
    again = Record.from_json(records[0].to_json(), "here")
    assert again == records[0]
    assert Record.from_json({**records[0].to_json(), "metrics": {}}, "here") is None


def test_a_store_of_before_is_measured_again_and_not_broken(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "stages")
    session = Session("tiny_bert", stages, torch.device("cpu"), lambda *_: None)
    items = session.fp32_items(session.model, session.reference_digest, 8)
    old = {name: torch.tensor(items.arrays()[name]) for name in ("ids", "scores", "predictions")}
    key = {"weights": session.reference_digest, "limit": 6}
    session.stages.tensors("fp32_items", key, lambda: old)  # as it was kept before there were quantities
    for sidecar in (tmp_path / "stages" / "fp32_items").glob("*.json"):
        sidecar.write_text(sidecar.read_text().replace('"schema": 2', '"schema": 1'))
    assert session.stages.tensors("fp32_items", key, dict).keys() == old.keys()  # version 1 is still read
    again = session.fp32_items(session.model, session.reference_digest, 6)
    assert set(metric_values(session.task, again)) == set(session.task.metrics)

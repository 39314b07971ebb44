"""Every registered task keeps the contract that methods and the runner rely on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.subject.lookup import get_model
from benchmark.subject.models.entry import MODELS
from benchmark.subject.tasks.task import SPLITS, TASKS, get_task
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.inputs import ModelInputs, batch_size_of

NAMES = ["fashion_mnist", "movie_reviews"]
TINY = {"fashion_mnist": "tiny_vit", "movie_reviews": "tiny_bert"}


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """No test here touches the user's cache."""


def same(left: ModelInputs, right: ModelInputs) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    assert not isinstance(left, torch.Tensor)
    assert not isinstance(right, torch.Tensor)
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_both_tasks_of_the_laptop_suite_are_registered() -> None:
    assert set(NAMES) <= set(TASKS.names())
    with pytest.raises(UnknownNameError, match="did you mean fashion_mnist"):
        get_task("fashionmnist")


@pytest.mark.parametrize("name", NAMES)
def test_splits_limits_and_their_errors(name: str) -> None:
    task = get_task(name)
    sizes = {split: len(task.split_ids(split)) for split in SPLITS}
    assert sizes["test"] == 2000
    some = task.split_ids("test", 100)
    positions = [task.split_ids("test").index(item) for item in some]
    assert positions == [20 * index for index in range(100)]  # evenly spaced, in order
    assert task.split_ids("test", 10_000) == task.split_ids("test")
    with pytest.raises(ConfigError, match="limit is 0"):
        task.split_ids("test", 0)
    with pytest.raises(UnknownNameError, match="validation"):
        task.split_ids("valid")


@pytest.mark.parametrize("name", NAMES)
def test_calibration_draws_are_nested_seeded_training_items(name: str) -> None:
    task = get_task(name)
    draw = task.calibration_ids(128, 0)
    assert len(set(draw)) == 128
    assert set(draw) <= set(task.split_ids("train"))
    assert draw == task.calibration_ids(128, 0)
    assert draw != task.calibration_ids(128, 1)
    assert set(task.calibration_ids(32, 0)) < set(draw)
    for n in (0, -1, 10**6):
        with pytest.raises(ConfigError, match="calibration items"):
            task.calibration_ids(n, 0)


@pytest.mark.parametrize("name", NAMES)
def test_batches_follow_the_ids_and_repeat_to_the_bit(name: str) -> None:
    task, entry = get_task(name), get_model(TINY[name])
    ids = task.split_ids("test", 10)
    batches = list(task.batches("test", entry, limit=10, batch_size=4))
    assert [len(batch.targets) for batch in batches] == [4, 4, 2]
    assert [batch_size_of(batch.inputs) for batch in batches] == [4, 4, 2]
    for left, right in zip(batches, task.batches("test", entry, ids=ids, batch_size=4), strict=True):
        assert same(left.inputs, right.inputs)
        assert torch.equal(left.targets, right.targets)
    targets = torch.cat([batch.targets for batch in batches])
    assert targets.dtype == torch.int64
    backwards = torch.cat([b.targets for b in task.batches("test", entry, ids=ids[::-1], batch_size=3)])
    assert torch.equal(backwards, targets.flip(0))


@pytest.mark.parametrize("name", NAMES)
def test_items_of_another_split_are_refused(name: str) -> None:
    task, entry = get_task(name), get_model(TINY[name])
    stranger = task.split_ids("test")[0]
    with pytest.raises(ConfigError, match=f"{stranger}"):
        task.batches("train", entry, ids=[stranger], batch_size=4)
    with pytest.raises(ConfigError, match="batch size is 0"):
        task.batches("test", entry, batch_size=0)


@pytest.mark.parametrize("name", NAMES)
def test_training_batches_cover_an_epoch_and_follow_their_generator(name: str) -> None:
    task, entry = get_task(name), get_model(TINY[name])
    ids = task.split_ids("train", 64)
    data = task.training_data(entry, ids)
    assert data.size == 64

    def first(seed: int, n: int) -> list[torch.Tensor]:
        stream = data.batches(16, torch.Generator().manual_seed(seed))
        return [batch.targets for batch in itertools.islice(stream, n)]

    every = torch.cat([batch.targets for batch in task.batches("train", entry, ids=ids, batch_size=64)])
    epoch, second = torch.cat(first(0, 4)), torch.cat(first(0, 8)[4:])
    assert torch.equal(epoch.sort().values, every.sort().values)
    assert torch.equal(second.sort().values, every.sort().values)
    assert not torch.equal(epoch, second)
    assert all(map(torch.equal, first(0, 6), first(0, 6)))
    assert not all(map(torch.equal, first(0, 6), first(1, 6)))


def test_an_epoch_of_sentences_takes_each_once_in_batches_of_like_length() -> None:
    task, entry = get_task("movie_reviews"), get_model("tiny_bert")
    ids = task.split_ids("train", 320)
    order = list(task.training_order(entry, ids, 32, torch.Generator().manual_seed(0)))
    assert sorted(itertools.chain(*order)) == sorted(ids)
    spread = [
        max(lengths) - min(lengths) for lengths in ([len(t) for t in task.tokens(entry, b)] for b in order)
    ]
    lengths = [len(tokens) for tokens in task.tokens(entry, ids)]
    assert np.mean(spread) < (max(lengths) - min(lengths)) / 3


@pytest.mark.parametrize("name", NAMES)
def test_a_training_set_smaller_than_a_batch_still_trains(name: str) -> None:
    task, entry = get_task(name), get_model(TINY[name])
    stream = task.training_data(entry, task.split_ids("train", 5)).batches(
        16, torch.Generator().manual_seed(0)
    )
    assert [len(next(stream).targets) for _ in range(3)] == [5, 5, 5]
    with pytest.raises(ConfigError, match="no training items"):
        task.training_data(entry, [])


@pytest.mark.parametrize("name", NAMES)
def test_scores_metric_and_loss(name: str) -> None:
    task = get_task(name)
    assert task.metric == "accuracy"
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [float("nan"), 0.0]])
    scores = task.item_scores(logits, torch.tensor([0, 1, 1, 0]))
    assert scores.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert scores.dtype == torch.float64
    assert task.metric_value(scores.numpy()) == 50.0
    uniform = torch.zeros(3, task.n_classes)
    assert task.loss(uniform, torch.tensor([0, 1, 1])).item() == pytest.approx(np.log(task.n_classes))


def test_fingerprints_differ_and_are_stable() -> None:
    prints = {name: get_task(name).fingerprint() for name in NAMES}
    assert len(set(prints.values())) == len(NAMES)
    assert prints == {name: get_task(name).fingerprint() for name in NAMES}


def test_a_model_of_the_wrong_kind_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="takes no images"):
        list(get_task("fashion_mnist").batches("test", get_model("tiny_bert"), limit=1, batch_size=1))
    with pytest.raises(ConfigError, match="takes no text"):
        list(get_task("movie_reviews").batches("test", get_model("tiny_vit"), limit=1, batch_size=1))


def test_every_model_names_a_registered_task() -> None:
    assert all(entry.task in TASKS for _, entry in MODELS.items())


def test_polarity_is_the_sign_of_the_rating() -> None:
    from benchmark.subject.data.loader import load_bundled

    task, entry = get_task("movie_reviews"), get_model("tiny_bert")
    data = load_bundled("movie_reviews")
    rating = dict(zip(data["id"], data["rating"], strict=True))
    ids = task.split_ids("validation", 50)
    targets = torch.cat(
        [batch.targets for batch in task.batches("validation", entry, ids=ids, batch_size=10)]
    )
    assert targets.tolist() == [int(rating[item] > 0) for item in ids]

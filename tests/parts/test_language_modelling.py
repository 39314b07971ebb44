"""Windows, scores and metrics of language modelling against what their definitions give by hand."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmark.engine.measure import evaluate
from benchmark.subject.lookup import get_model
from benchmark.subject.models.entry import CausalTextEntry
from benchmark.subject.tasks.language_modelling import LastToken, SlidingWindowPerplexity
from benchmark.subject.tasks.task import SPLITS, get_task
from quanttune.answers import UNSCORED
from quanttune.errors import ConfigError, QuantTuneError, UnknownNameError

TEXTS = {"train": "abcdefghijklmnopqrst", "validation": "abcdefgh", "test": "tsrqponmlk"}
VOCABULARY = 26


@dataclass(frozen=True, kw_only=True)
class Letters(SlidingWindowPerplexity):
    """The tokens of a text are its letters."""

    name: str = "letters"
    title: str = "letters"

    def text(self, split: str) -> str:
        return TEXTS[split]

    def _data_fingerprint(self) -> str:
        return "d" * 64


class Passages(LastToken):
    name, title, n_classes = "passages", "passages", None

    def texts(self, ids: Sequence[int]) -> list[str]:
        return ["abcd", "xy", "cab"][ids[0] : ids[-1] + 1]


class Reader(CausalTextEntry):
    name, title, family, task, source = "reader", "reader", "opt", "letters", "none"
    max_length, pad_id = 6, 0

    def identity(self) -> dict[str, Any]:
        return {}

    def build(self) -> nn.Module:
        raise NotImplementedError

    def _reference(self, progress: object) -> dict[str, Tensor]:
        raise NotImplementedError

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


class Begun(Reader):
    begin = (25,)


def letters(length: int, stride: int, **windows: int) -> Letters:
    return Letters(length=length, stride=stride, windows={"train": 2, "validation": 1, "test": 1} | windows)


def words(tensor: Tensor) -> list[str]:
    return ["".join("-" if t == UNSCORED else chr(ord("a") + t) for t in row) for row in tensor.tolist()]


def logits_for(batch: Any, seed: int = 0) -> Tensor:
    shape = (*batch.targets.shape, VOCABULARY)
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nats(logits: Tensor, ids: Tensor, row: int, place: int) -> float:
    """Of the token at a place, predicted from the one before it; float64 from the definition."""
    values = logits[row, place - 1].double().numpy()
    return float(np.log(np.exp(values).sum()) - values[int(ids[row, place])])


class TestWindows:
    def test_without_overlap_all_but_the_first_token_are_scored(self) -> None:
        task = letters(5, 5, train=4)
        batch = task.collate(Reader(), task.split_ids("train"))
        assert words(batch.inputs["input_ids"]) == ["abcde", "fghij", "klmno", "pqrst"]
        assert words(batch.targets) == ["-bcde", "-ghij", "-lmno", "-qrst"]
        assert bool(batch.inputs["attention_mask"].all())

    def test_with_overlap_the_last_stride_tokens_are_scored_and_each_once(self) -> None:
        task = letters(6, 2, train=4)
        batch = task.collate(Reader(), task.split_ids("train"))
        assert words(batch.inputs["input_ids"]) == ["abcdef", "cdefgh", "efghij", "ghijkl"]
        assert words(batch.targets) == ["----ef", "----gh", "----ij", "----kl"]

    def test_no_window_crosses_from_one_split_into_another(self) -> None:
        task = letters(4, 4, train=5, validation=2, test=2)
        found = {split: task.collate(Reader(), task.split_ids(split)) for split in TEXTS}
        assert words(found["validation"].inputs["input_ids"]) == ["abcd", "efgh"]
        assert words(found["test"].inputs["input_ids"]) == ["tsrq", "ponm"]  # what is left over is left out
        every = [item for split in ("train", "validation", "test") for item in task.split_ids(split)]
        assert every == list(range(9))

    def test_as_many_windows_as_a_text_gives_and_not_one_more(self) -> None:
        for length, stride, most in ((5, 5, 4), (6, 2, 8), (6, 1, 15)):
            task = letters(length, stride, train=most)
            assert task.collate(Reader(), task.split_ids("train")).targets.shape == (most, length)
            greedy = letters(length, stride, train=most + 1)
            with pytest.raises(ConfigError, match=rf"{most + 1} windows.*gives {most} with the 20 tokens"):
                greedy.collate(Reader(), greedy.split_ids("train")[:1])
        short = replace(letters(6, 6), windows={"train": 1, "validation": 1, "test": 1}, length=12, stride=12)
        with pytest.raises(ConfigError, match="gives 0 with the 8 tokens"):
            short.collate(Reader(), short.split_ids("validation"))

    def test_a_window_longer_than_the_model_is_refused(self) -> None:
        task = letters(7, 7)
        with pytest.raises(ConfigError, match="items of 7 tokens, model reader takes 6"):
            task.collate(Reader(), task.split_ids("train"))

    @pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 0), (4, 5)])
    def test_impossible_windows_are_refused(self, length: int, stride: int) -> None:
        with pytest.raises(ConfigError, match=f"{length} tokens with stride {stride}"):
            letters(length, stride)
        with pytest.raises(ConfigError, match="at least one for each"):
            letters(4, 4, test=0)

    def test_a_text_is_tokenized_once_for_a_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        plain = Reader.tokenize
        monkeypatch.setattr(Reader, "tokenize", lambda self, text: calls.append(text) or plain(self, text))
        task = letters(5, 5, train=4)
        for _ in range(2):
            list(task.batches("train", Reader(), batch_size=1))
        assert calls == [TEXTS["train"]]

    def test_limits_draws_and_fingerprint(self) -> None:
        task = letters(4, 2, train=8)
        assert task.split_ids("train", 4) == [0, 2, 4, 6]
        assert task.split_ids("test") == [9]
        assert set(task.calibration_ids(3, 0)) < set(task.calibration_ids(5, 0)) < set(range(8))
        with pytest.raises(UnknownNameError):
            task.split_ids("dev")
        prints = [letters(4, 2), letters(4, 4), letters(5, 4), letters(4, 2, test=2)]
        assert len({other.fingerprint() for other in prints}) == 4
        assert letters(4, 2).fingerprint() == letters(4, 2).fingerprint()

    def test_an_epoch_of_training_takes_each_window_of_the_training_split_once(self) -> None:
        task = letters(5, 5, train=4)
        stream = task.training_data(Reader()).batches(2, torch.Generator().manual_seed(0))
        epoch = [word for batch in itertools.islice(stream, 2) for word in words(batch.inputs["input_ids"])]
        assert sorted(epoch) == ["abcde", "fghij", "klmno", "pqrst"]


class TestPerplexity:
    @pytest.mark.parametrize(("length", "stride"), [(5, 5), (6, 2)])
    def test_is_exp_of_the_mean_negative_log_likelihood_of_the_scored_tokens(
        self, length: int, stride: int
    ) -> None:
        task = letters(length, stride, train=4)
        batch = task.collate(Reader(), task.split_ids("train"))
        logits, ids = logits_for(batch), batch.inputs["input_ids"]
        first = max(1, length - stride)
        expected = [[nats(logits, ids, row, place) for place in range(first, length)] for row in range(4)]
        scores = task.item_scores(logits, batch.targets)
        assert scores.dtype == torch.float64
        np.testing.assert_allclose(scores.numpy(), np.mean(expected, axis=1), rtol=1e-5)
        assert task.metric_value(scores.numpy()) == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
        assert task.loss(logits, batch.targets).item() == pytest.approx(np.mean(expected), rel=1e-5)

    def test_a_uniform_guess_costs_the_vocabulary_and_certainty_nothing(self) -> None:
        task = letters(5, 5)
        batch = task.collate(Reader(), task.split_ids("train"))
        shape = (*batch.targets.shape, VOCABULARY)
        assert task.metric_value(task.item_scores(torch.zeros(shape), batch.targets).numpy()) == (
            pytest.approx(VOCABULARY)
        )
        sure = torch.full(shape, -1e4)
        sure[:, :-1].scatter_(2, batch.inputs["input_ids"][:, 1:, None], 0.0)
        assert task.metric_value(task.item_scores(sure, batch.targets).numpy()) == 1.0
        assert not task.higher_is_better

    def test_context_and_the_last_logits_play_no_part(self) -> None:
        task = letters(6, 2)
        batch = task.collate(Reader(), task.split_ids("train"))
        logits = logits_for(batch)
        changed = logits.clone()
        changed[:, :3] = 7.0  # they predict places 1 to 3, which are context
        changed[:, -1] = -7.0  # predicts what lies beyond the window
        assert torch.equal(task.item_scores(changed, batch.targets), task.item_scores(logits, batch.targets))
        changed[:, 3] += torch.arange(VOCABULARY)
        assert not torch.equal(
            task.item_scores(changed, batch.targets), task.item_scores(logits, batch.targets)
        )

    def test_logits_that_are_not_finite_are_an_error(self) -> None:
        task = letters(5, 5)
        batch = task.collate(Reader(), task.split_ids("train"))
        logits = logits_for(batch)
        logits[1, 2, 3] = math.nan
        with pytest.raises(QuantTuneError, match="not finite"):
            task.item_scores(logits, batch.targets)

    def test_evaluation_takes_the_tasks_own_batches_and_keeps_one_score_a_window(self) -> None:
        class Counter(nn.Module):
            sizes: list[int] = []  # noqa: RUF012

            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                self.sizes.append(len(input_ids))
                return torch.zeros(*input_ids.shape, VOCABULARY)

        task = replace(letters(5, 5, test=2), batch_size=1)
        items = evaluate(
            Counter().eval(), task, Reader(), device=torch.device("cpu"), progress=lambda *_: None
        )
        assert Counter.sizes == [1, 1]
        assert items.predictions is None
        np.testing.assert_allclose(items.scores, math.log(VOCABULARY))


class TestLastToken:
    def test_is_right_where_the_logits_before_the_last_token_are_largest_at_it(self) -> None:
        task = Passages()
        batch = task.collate(Reader(), [0, 1, 2])
        assert words(batch.targets) == ["---d", "-y--", "--b-"]
        assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
        logits = torch.zeros(3, 4, VOCABULARY)
        logits[0, 2, 3] = 1.0  # right: predicts d from c
        logits[1, 1, 24] = 1.0  # y, but one place too late
        logits[2, 1, 1] = 1.0  # right
        scores = task.item_scores(logits, batch.targets)
        assert scores.tolist() == [1.0, 0.0, 1.0]
        assert task.metric_value(scores.numpy()) == pytest.approx(200 / 3)
        logits[0, 2, 5] = math.nan
        assert task.item_scores(logits, batch.targets).tolist() == [0.0, 0.0, 1.0]

    def test_its_loss_is_the_cross_entropy_of_the_last_tokens(self) -> None:
        task = Passages()
        batch = task.collate(Reader(), [0, 1, 2])
        logits, ids = logits_for(batch), batch.inputs["input_ids"]
        expected = np.mean([nats(logits, ids, 0, 3), nats(logits, ids, 1, 1), nats(logits, ids, 2, 2)])
        assert task.loss(logits, batch.targets).item() == pytest.approx(expected, rel=1e-5)

    def test_begin_tokens_stand_first_and_the_end_of_a_long_passage_is_kept(self) -> None:
        assert Begun().encode(["abc"]) == [[25, 0, 1, 2]]
        assert Begun().encode(["abcdefghij"]) == [[25, 5, 6, 7, 8, 9]]
        assert Reader().encode(["abcdefghij"]) == [[4, 5, 6, 7, 8, 9]]

    def test_a_passage_of_one_token_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Passages, "texts", lambda self, ids: ["a"])
        with pytest.raises(ConfigError, match="item 0 of task passages has 1 tokens"):
            Passages().collate(Reader(), [0])


def test_a_model_that_is_no_language_model_is_refused_in_words() -> None:
    task = letters(5, 5)
    with pytest.raises(ConfigError, match="tiny_bert is no language model"):
        task.collate(get_model("tiny_bert"), task.split_ids("train"))


@pytest.mark.parametrize("name", ["moby_dick", "moby_dick_excerpt"])
def test_bundled_texts_are_the_chapters_of_their_split_in_order(name: str, cache: Path) -> None:
    task: Any = get_task(name)
    texts = {split: task.text(split) for split in SPLITS}
    assert texts["train"].startswith("ETYMOLOGY.")
    for earlier, later in (("train", "validation"), ("validation", "test")):
        number = int(re.findall(r"^CHAPTER (\d+)\.", texts[earlier], flags=re.MULTILINE)[-1])
        assert texts[later].startswith(f"CHAPTER {number + 1}. ")
    assert texts["test"].endswith("only found another orphan.\n")
    assert "\n\nCHAPTER 2. The Carpet-Bag.\n\n" in texts["train"]
    entry = get_model("tiny_opt_lm")
    for split in SPLITS:
        ids = task.split_ids(split)
        assert len(ids) == task.windows[split]
        first = task.collate(entry, ids[:1]).inputs["input_ids"][0]
        assert bytes(first.tolist()) == texts[split].encode()[: task.length]
    assert len(task.calibration_ids(128, 0)) == 128


def test_other_data_or_windows_are_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = get_task("moby_dick")
    before = {task.fingerprint(), get_task("moby_dick_excerpt").fingerprint()}
    assert len(before) == 2
    assert replace(task, stride=128).fingerprint() not in before
    monkeypatch.setattr("benchmark.subject.tasks.task.data_fingerprint", lambda dataset: "other")
    assert task.fingerprint() not in before

"""Options of a ``transformers.Trainer``: the weights of a plain loop with the outlier loss, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import _len_torch_function_stack
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from quanttune import OutlierLoss, OutlierLossConfig
from quanttune.errors import ConfigError
from quanttune.quantization import tracing
from quanttune.trainer_callback import OutlierLossCallback
from tests.test_trainer_callback import example, items, weights

CONFIG = OutlierLossConfig(weight=0.5, threshold=2.0)
BATCH, RATE = 4, 1e-2
BATCHES = 24 // BATCH


class Scaling(BertForSequenceClassification):
    """Divides its loss by the items of all accumulated batches, as language models do."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        num_items_in_batch: Any = None,
        **rest: Any,
    ) -> Any:
        output = super().forward(input_ids, attention_mask, labels=labels)
        if labels is not None and num_items_in_batch is not None:
            output.loss = output.loss * len(labels) / num_items_in_batch
        return output


def model(kind: type[BertForSequenceClassification] = Scaling) -> Any:
    """Without dropout."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config)


class InOrder(Trainer):
    """Goes through the items as they come."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer_of(
    folder: Path, callbacks: list[Any], network: Any = None, kind: type[Trainer] = InOrder, **options: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **(settings | options))
    data: Any = items()
    return kind(network or model(), arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def trained(folder: Path, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Weights after a Trainer, and what the loss keeps."""
    callback = OutlierLossCallback(example(), CONFIG)
    trainer = trainer_of(folder, [callback], **options)
    trainer.train()
    assert callback.outliers is not None
    return weights(trainer), callback.outliers.state_dict()


def plain(
    accumulation: int = 1, epochs: int = 2, summed: bool = False, **autocast: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same by hand: each step goes down the mean loss of its batches."""
    network = model().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    rows = items()
    batches = [
        {name: torch.stack([torch.as_tensor(row[name]) for row in rows[at : at + BATCH]]) for name in rows[0]}
        for at in range(0, len(rows), BATCH)
    ]
    groups = [batches[at : at + accumulation] for at in range(0, BATCHES, accumulation)]
    network.eval()
    outliers = OutlierLoss(network, example(), epochs * len(groups), CONFIG)
    network.train()
    penalties = []
    with outliers:
        for group in groups * epochs:
            optimizer.zero_grad()
            for batch in group:
                with torch.autocast("cpu", **({"enabled": False} | autocast)):
                    loss = network(**batch).loss
                penalty = outliers.penalty()
                penalties.append(float(penalty.detach()))
                ((loss + penalty) / (1 if summed else len(group))).backward()
            optimizer.step()
            outliers.step()
    assert max(penalties) > 0
    found = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    return found, outliers.state_dict()


def assert_like(found: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], **({"rtol": 1e-4, "atol": 1e-6} | tolerance))
    assert found[1]["step"] == expected[1]["step"]
    for site_id, running in expected[1]["sites"].items():
        assert found[1]["sites"][site_id]["updates"] == running["updates"]
        assert found[1]["sites"][site_id]["std"] == pytest.approx(running["std"], rel=1e-2)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("way", ["model", "trainer", "nobody"])
def test_accumulation_divides_the_penalty_as_the_loss(accumulation: int, way: str, tmp_path: Path) -> None:
    """Found: a model that scales its loss by the items of all batches had the sum of their penalties.

    Four batches and then the two that an epoch has left: each step takes the mean of its own. A model that is
    offered the items and leaves them, as BERT does, has the Trainer add up its losses; so do the penalties.
    """
    network = model(Scaling if way == "model" else BertForSequenceClassification)
    if way == "trainer":
        network.accepts_loss_kwargs = False
    found = trained(tmp_path, network=network, gradient_accumulation_steps=accumulation)
    assert_like(found, plain(accumulation, summed=way == "nobody"))
    assert found[1]["step"] == 2 * math.ceil(BATCHES / accumulation)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
        {"max_steps": 2 * BATCHES, "num_train_epochs": 1},
        {"average_tokens_across_devices": True},
        {"average_tokens_across_devices": False},
        {"dataloader_drop_last": True, "torch_empty_cache_steps": 1},
        {"neftune_noise_alpha": 0.0},
        {"auto_find_batch_size": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_option_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    assert_like(trained(tmp_path, **options), plain())


def test_mixed_precision_is_that_of_the_plain_loop(tmp_path: Path) -> None:
    expected = plain(dtype=torch.bfloat16, enabled=True)
    assert_like(trained(tmp_path, bf16=True), expected, rtol=1e-2, atol=1e-4)


def test_grouping_by_length_trains_to_the_end(tmp_path: Path) -> None:
    sampling = {"kind": Trainer, "train_sampling_strategy": "group_by_length"}
    _, state = trained(tmp_path, **sampling)
    assert state["step"] == 2 * BATCHES


class Stops(OutlierLossCallback):
    """Fails after three steps, as a full disk or a key press would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("same", [True, False])
def test_a_training_that_failed_leaves_nothing_to_the_next(same: bool, tmp_path: Path) -> None:
    """Found: its penalties went on being added, and every later simulation in the process was another."""
    callback: OutlierLossCallback = Stops(example(), CONFIG)
    network = model()
    initial = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, [callback], network).train()
    assert not tracing._active()
    assert _len_torch_function_stack() == 0
    network.load_state_dict(initial)
    if same:
        callback.__class__ = OutlierLossCallback
    else:
        failed, callback = callback, OutlierLossCallback(example(), CONFIG)
        assert failed._hooks
    again = trainer_of(tmp_path, [callback], network)
    again.train()
    assert callback.outliers is not None
    assert_like((weights(again), callback.outliers.state_dict()), plain())
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_resumed_training_takes_the_rest_of_the_epoch(accumulation: int, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 1}
    whole = trained(tmp_path / "whole", **options)
    callback = OutlierLossCallback(example(), CONFIG)
    resumed = trainer_of(tmp_path / "resumed", [callback], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert callback.outliers is not None
    assert_like((weights(resumed), callback.outliers.state_dict()), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"torch_compile": True, "torch_compile_backend": "eager"}, "torch_compile.*leave it out"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor.*loop of your own"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant.*False",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_is_refused_in_a_line(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [OutlierLossCallback(example(), CONFIG)], **options)
    with pytest.raises(ConfigError, match=words) as refused:
        trainer.train()
    assert "\n" not in str(refused.value)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_gpu": 2}, r"2 GPUs by nn\.DataParallel.*CUDA_VISIBLE_DEVICES"),
        ({"fsdp": "full_shard"}, r"fsdp.*accelerator"),
        ({"deepspeed": "zero2.json"}, r"deepspeed.*accelerator"),
    ],
)
def test_what_needs_several_gpus_is_refused_by_its_arguments(settings: dict[str, Any], words: str) -> None:
    class Arguments:
        gradient_accumulation_steps = 1

    class State:
        max_steps, global_step, stateful_callbacks = 3, 0, None

    for name, value in settings.items():
        setattr(Arguments, name, value)
    begin: Callable[..., None] = OutlierLossCallback(example(), CONFIG).on_train_begin
    with pytest.raises(ConfigError, match=words):
        begin(Arguments(), State(), None, model=model())


def test_a_loss_of_the_users_own_is_refused(tmp_path: Path) -> None:
    """It is made of the logits, and the loss that the model returns is none."""
    trainer = trainer_of(tmp_path, [OutlierLossCallback(example(), CONFIG)])
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    with pytest.raises(ConfigError, match="returned no loss"):
        trainer.train()

"""The outlier-driven loss inside a real ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from quanttune import OutlierLossConfig
from quanttune.errors import ConfigError
from quanttune.seeds import torch_generator
from quanttune.trainer_callback import OutlierLossCallback

CONFIG = OutlierLossConfig(weight=0.5, threshold=2.0)


def model() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config)


def items(labels: bool = True) -> list[dict[str, Any]]:
    generator = torch_generator(0, "items")
    rows = torch.randint(50, (24, 7), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones(7, dtype=torch.long)}
        | ({"labels": index % 2} if labels else {})
        for index, row in enumerate(rows)
    ]


def example() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(2, 7, dtype=torch.long)}


def trained(
    folder: Path, callbacks: list[Any], steps: int = 6, resume: str | None = None, **more: Any
) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        lr_scheduler_type="constant",
        **more,
    )
    trainer = Trainer(model(), arguments, train_dataset=items(), callbacks=callbacks)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_the_loss_takes_part_and_leaves_no_hooks(tmp_path: Path) -> None:
    callback = OutlierLossCallback(example(), CONFIG)
    with_loss = trained(tmp_path / "a", [callback])
    without = trained(tmp_path / "b", [])
    silent = trained(tmp_path / "c", [OutlierLossCallback(example(), OutlierLossConfig(weight=0.0))])
    assert not torch.equal(weights(with_loss), weights(without))
    assert torch.equal(weights(silent), weights(without))
    assert callback.outliers is not None
    assert callback.outliers._step == 6
    assert not with_loss.model._forward_hooks


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", [OutlierLossCallback(example(), CONFIG)])
    callback = OutlierLossCallback(example(), CONFIG)
    resumed = trained(tmp_path / "again", [callback], resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert callback.outliers is not None
    assert callback.outliers._step == 6
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_gradient_accumulation_runs_and_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = OutlierLossCallback(example(), CONFIG)
    trained(tmp_path, [callback], steps=3, gradient_accumulation_steps=2)
    assert callback.outliers is not None
    assert callback.outliers._step == 3


def test_a_model_without_a_loss_is_refused(tmp_path: Path) -> None:
    callback = OutlierLossCallback(example(), CONFIG)
    network = model().train()

    class State:
        max_steps, global_step, stateful_callbacks = 3, 0, None

    class Arguments:
        gradient_accumulation_steps = 1

    callback.on_train_begin(Arguments(), State(), None, model=network)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no loss"):
        network(**example())
    callback.on_train_end(Arguments(), State(), None)  # type: ignore[arg-type]

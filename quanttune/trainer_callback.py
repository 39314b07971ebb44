"""The outlier-driven loss inside a ``transformers.Trainer``, without a subclass."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import ModelOutput

from quanttune.errors import ConfigError
from quanttune.inputs import ModelInputs
from quanttune.outlier_loss import OutlierLoss, OutlierLossConfig
from quanttune.quantization import SiteTable

_REFUSED = {
    "torch_compile": "leave it out, quantization works on eager modules",
    "label_smoothing_factor": "that loss is made outside the model; use OutlierLoss in a loop of your own",
    "fsdp": "use tune(accelerator=...), where every process has the whole model",
    "deepspeed": "use tune(accelerator=...), where every process has the whole model",
}
"""Settings of the Trainer, and what to do without them."""

_BEGUN: weakref.WeakSet[OutlierLossCallback] = weakref.WeakSet()
"""Callbacks whose training has begun and not ended."""


class _Items(Tensor):
    """The number of items of all accumulated batches, which knows whether a model has made use of it."""

    used = False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in args:
            if isinstance(value, cls):
                value.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _notice_items(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    items = kwargs.get("num_items_in_batch")
    if isinstance(items, Tensor):
        kwargs = {**kwargs, "num_items_in_batch": items.as_subclass(_Items)}
    return args, kwargs


class OutlierLossCallback(TrainerCallback, ExportableState):
    """Adds the outlier-driven loss to the loss that the model returns while it trains.

    The model must return its own loss, as the models of transformers do when they are given labels. Gradient
    accumulation divides the penalty as it divides the loss, also where the model itself scales its loss by
    the items of all accumulated batches; resuming from a Trainer checkpoint restores the schedule. What the
    loss cannot take part in is refused when the training begins: see ``docs/fine-tuning.md``.

    Args:
        sites: The model's sites, or one batch of model inputs to discover them from.
        config: Settings.
        profile: Profile whose sites are penalised.

    Example:
        >>> callback = OutlierLossCallback(inputs)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(
        self, sites: SiteTable | ModelInputs, config: OutlierLossConfig | None = None, profile: str = "full"
    ) -> None:
        self._sites, self._config, self._profile = sites, config, profile
        self._hooks: list[RemovableHandle] = []
        self._model: nn.Module | None = None
        self._batches = 1
        self.outliers: OutlierLoss | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to watch the model for the run's number of optimizer steps."""
        model: nn.Module = kwargs["model"]
        # A training that failed has no end: another callback's, or this one's for a batch that did not fit.
        for callback in list(_BEGUN):
            if callback is self or callback._model is model:
                callback._leave()
        for setting, remedy in _REFUSED.items():
            if getattr(args, setting, None):
                raise ConfigError(
                    f"TrainingArguments({setting}={getattr(args, setting)!r}): the outlier loss cannot take "
                    f"part in it; {remedy}"
                )
        if getattr(args, "n_gpu", 1) > 1:
            raise ConfigError(
                f"the Trainer would spread batches over {args.n_gpu} GPUs by nn.DataParallel, whose copies "
                "cannot be watched; set CUDA_VISIBLE_DEVICES=0"
            )
        steps = max(state.max_steps, 1)
        outliers = OutlierLoss(
            model, self._sites, steps, self._config, self._profile, only_while_running=True
        )
        # A resumed run arrives with the states that its checkpoint holds; a new one with none.
        states: Any = state.stateful_callbacks or {}
        saved = states.get(type(self).__name__, {}).get("outliers")
        if state.global_step and saved:
            outliers.load_state_dict(saved)
        outliers.__enter__()
        self.outliers, self._model = outliers, model
        _BEGUN.add(self)
        self._hooks = [
            model.register_forward_pre_hook(_notice_items, with_kwargs=True),
            model.register_forward_hook(self._add_penalty, with_kwargs=True),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how many batches make the coming step: at the end of an epoch fewer may be left."""
        self._batches = args.gradient_accumulation_steps
        try:
            batches = len(kwargs["train_dataloader"])
        except (KeyError, TypeError):
            # Of a stream nobody knows the end.
            return
        steps = math.ceil(batches / self._batches)
        if (state.global_step + 1) % steps == 0:
            self._batches = batches - (steps - 1) * self._batches

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the schedule after each optimizer step."""
        if self.outliers is not None:
            self.outliers.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was, without hooks."""
        self._leave()

    def _leave(self) -> None:
        if self._hooks and self.outliers is not None:
            self.outliers.__exit__(None, None, None)
        while self._hooks:
            self._hooks.pop().remove()
        self._model = None
        _BEGUN.discard(self)

    def state(self) -> dict[str, Any]:
        """What the Trainer saves beside its own state."""
        return {"outliers": None if self.outliers is None else self.outliers.state_dict()}

    def _add_penalty(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled() or self.outliers is None:
            return output
        if not isinstance(output, ModelOutput) or not isinstance(output.get("loss"), Tensor):
            raise ConfigError(
                f"{type(model).__name__} returned no loss; give the Trainer data with labels, "
                "or use OutlierLoss in a loop of your own"
            )
        # A loss that is scaled over all accumulated batches the Trainer does not divide. Nor does it where
        # the model was offered their items and left them; the penalty then adds up as that loss does.
        items = kwargs.get("num_items_in_batch")
        scaled = items is not None and getattr(items, "used", True)
        penalty = self.outliers.penalty().to(output["loss"].device)
        output["loss"] = output["loss"] + penalty / (self._batches if scaled else 1)
        return output

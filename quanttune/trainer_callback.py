"""The outlier-driven loss inside a ``transformers.Trainer``, without a subclass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import ModelOutput

from quanttune.errors import ConfigError
from quanttune.inputs import ModelInputs
from quanttune.outlier_loss import OutlierLoss, OutlierLossConfig
from quanttune.quantization import SiteTable


class OutlierLossCallback(TrainerCallback, ExportableState):
    """Adds the outlier-driven loss to the loss that the model returns while it trains.

    The model must return its own loss, as the models of transformers do when they are given labels. Gradient
    accumulation divides the penalty as it divides the loss; resuming from a Trainer checkpoint restores the
    schedule.

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
        self._hook: RemovableHandle | None = None
        self._divisor = 1
        self.outliers: OutlierLoss | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to watch the model for the run's number of optimizer steps."""
        model: nn.Module = kwargs["model"]
        self.outliers = OutlierLoss(model, self._sites, max(state.max_steps, 1), self._config, self._profile)
        # A resumed run arrives with the states that its checkpoint holds; a new one with none.
        states: Any = state.stateful_callbacks or {}
        saved = states.get(type(self).__name__, {}).get("outliers")
        if state.global_step and saved:
            self.outliers.load_state_dict(saved)
        # The Trainer does not divide a loss that the model has scaled over accumulated batches itself.
        scaled = getattr(model, "accepts_loss_kwargs", False)
        self._divisor = args.gradient_accumulation_steps if scaled else 1
        self.outliers.__enter__()
        self._hook = model.register_forward_hook(self._add_penalty)

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
        if self._hook is not None:
            self._hook.remove()
        if self.outliers is not None:
            self.outliers.__exit__(None, None, None)

    def state(self) -> dict[str, Any]:
        """What the Trainer saves beside its own state."""
        return {"outliers": None if self.outliers is None else self.outliers.state_dict()}

    def _add_penalty(self, model: nn.Module, args: Any, output: Any) -> Any:
        if not model.training or self.outliers is None:
            return output
        if not isinstance(output, ModelOutput) or not isinstance(output.get("loss"), Tensor):
            raise ConfigError(
                f"{type(model).__name__} returned no loss; give the Trainer data with labels, "
                "or use OutlierLoss in a loop of your own"
            )
        output["loss"] = output["loss"] + self.outliers.penalty().to(output["loss"].device) / self._divisor
        return output

"""What every method that trains shares: the same fine-tuning, and by default a calibration after it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from baselines.method import METHODS, Context, FoldingMethod, Method, Origin
from quanttune.activation_penalty import ActivationPenalty
from quanttune.answers import answers_of, divergence
from quanttune.errors import ConfigError
from quanttune.inputs import ModelInputs, call_model, logits_of, to_device
from quanttune.quantization import Quantized, Scheme, SiteKind, SiteTable
from quanttune.quantization.equivalence import changed_apart
from quanttune.replicas import run_replicated
from quanttune.seeds import derive_seed, torch_generator
from quanttune.tuner import Schedule, tune

if TYPE_CHECKING:
    from accelerate import Accelerator

_RECIPE = ("steps", "learning_rate", "batch_size", "norm_rate")


@dataclass(frozen=True)
class FineTuning(Method):
    """Fine-tune the reference on its task, then quantize it with a calibrator.

    Learning rate, steps and batch size come from the model's entry unless they are given here. The order of
    the training items and the dropout depend on the seed alone, so methods that differ in their loss see the
    same data.

    Args:
        calibrator: Registered name of the method that quantizes the tuned weights.
        before: Registered name of a method that changes the weights, without changing the function, before
            they are tuned; empty for none.
        steps: Optimizer steps; ``None`` for the entry's.
        learning_rate: Peak learning rate; ``None`` for the entry's.
        norm_rate: Factor on the learning rate of normalisation parameters and biases; ``None`` for the
            entry's.
        distillation: Share of the loss, 0 to 1, that compares with the reference's logits and not with the
            labels.

    Raises:
        ConfigError: If a setting is out of its range, or the calibrator would fine-tune once more.
        UnknownNameError: If there is no such calibrator or no such method before.
    """

    role: ClassVar[str] = "trained"
    trains: ClassVar[bool] = True
    changes: ClassVar[str] = "weights by training"
    version: ClassVar[int] = 2
    calibrator: str = "minmax"
    before: str = ""
    steps: int | None = None
    learning_rate: float | None = None
    norm_rate: float | None = None
    distillation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1:
            raise ConfigError(f"distillation {self.distillation} is not a share between 0 and 1")
        # What would be refused when the weights are tuned is refused now, before any work.
        if METHODS.get(self.calibrator).trains:
            raise ConfigError(
                f"calibrator {self.calibrator!r} fine-tunes as well, and one of two trainings would be lost; "
                "choose a method that does not train"
            )
        if self.before and not issubclass(METHODS.get(self.before), FoldingMethod):
            raise ConfigError(
                f"{self.before!r} cannot go before a fine-tuning: it does not give other weights that "
                "compute the same function"
            )
        given = {name: value for name in _RECIPE if (value := getattr(self, name, None)) is not None}
        Schedule(**{"steps": 1, "learning_rate": 1.0} | given)

    @property
    def label(self) -> str:
        """The name, then what differs from the defaults; ``+`` joins the calibrator."""
        plain = dataclasses.replace(self, calibrator=type(self).calibrator)
        rest = super(FineTuning, plain).label
        return rest if self.calibrator == type(self).calibrator else f"{rest}+{self.calibrator}"

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """What its calibrator cannot quantize."""
        return METHODS.get(self.calibrator)().skip(sites, scheme)

    def activation_penalty(self, model: nn.Module, sites: SiteTable, steps: int) -> ActivationPenalty | None:
        """What is added to the task loss; ``None`` for nothing.

        Args:
            model: What is tuned.
            sites: Its sites.
            steps: Optimizer steps in all.
        """
        return None

    def quantize(self, context: Context) -> Quantized:
        """Tune once for all widths, profiles and calibrators; then calibrate the tuned weights."""
        reference = context.model
        schedule, context = self._schedule(context), self._folded(context)
        key = self._key(context, schedule)
        del key["parameters"]["calibrator"]
        weights = context.stages.tensors("tuning", key, lambda: self._tune(context, schedule, key))
        tuned = context.changed(weights)
        quantized = METHODS.get(self.calibrator)().quantize(tuned)
        details = {"schedule": dataclasses.asdict(schedule), **outermost(tuned)}
        # Training makes another function of the reference, whatever a calibrator says of its own weights.
        final = weights if quantized.weights is None else quantized.weights
        quantized = dataclasses.replace(
            quantized,
            details={**quantized.details, **details},
            same_function=False,
            untied=changed_apart(reference, final) if self.before or quantized.untied else (),
        )
        if quantized.weights is not None:
            return quantized
        origin = context.stages.reference("tuning", key)
        return dataclasses.replace(quantized, weights=weights, weights_origin=origin)

    def used(self) -> tuple[str, ...]:
        """What calibrates the tuned weights, and what folds before."""
        return tuple(filter(None, (self.calibrator, self.before)))

    def _folded(self, context: Context) -> Context:
        """The context of what is tuned."""
        if not self.before:
            return context
        before: FoldingMethod = METHODS.get(self.before)()  # type: ignore[assignment]
        return context.changed(before.folded(context))

    def _key(self, context: Context, schedule: Schedule) -> dict[str, Any]:
        """What decides a training on the context's weights."""
        # The schedule tells steps and rate, whoever set them: a search then finds the weights of the recipe.
        key = {
            **context.identity,
            "weights": context.weights_key,
            "method": self.name,
            "version": self.version,
            "parameters": {
                name: None if name in _RECIPE else value for name, value in self.parameters().items()
            },
            "schedule": dataclasses.asdict(schedule),
            "seed": context.seed,
        }
        if context.autocast is not None:
            key["autocast"] = str(context.autocast)
        if self.distillation:
            # What is matched are the answers that the loss judges; an earlier version matched every position.
            key["matched"] = "answers"
        if context.processes > 1:
            # They round otherwise than one, and each draws dropout of its own.
            key["processes"] = context.processes
        return key

    def _schedule(self, context: Context) -> Schedule:
        given = {name: getattr(self, name, None) for name in _RECIPE}
        settings = {**context.recipe, **{name: value for name, value in given.items() if value is not None}}
        try:
            return Schedule(**settings)
        except TypeError as error:
            raise ConfigError(
                f"{self.name} needs steps and learning_rate from the model's recipe: {error}"
            ) from None

    def _tune(self, context: Context, schedule: Schedule, key: dict[str, Any]) -> dict[str, Tensor]:
        if context.processes == 1:
            return self.tuned(context, schedule, key)
        if context.origin is None:
            raise ConfigError(
                f"{self.name}: several processes can share a fine-tuning only if the context has an origin"
            )
        return run_replicated(
            _replica,
            {
                "method": self.name,
                "parameters": self.parameters(),
                "origin": dataclasses.asdict(context.origin),
                "schedule": dataclasses.asdict(schedule),
                "key": key,
            },
            context.processes,
            context.device,
            lambda done: context.progress(f"{self.name} fine-tuning", done, schedule.steps),
            context.model.state_dict(),
        )

    def tuned(
        self,
        context: Context,
        schedule: Schedule,
        key: dict[str, Any],
        accelerator: Accelerator | None = None,
    ) -> dict[str, Tensor]:
        """What :meth:`train` keeps: the state dict of a tuned copy of the reference.

        Args:
            context: What :meth:`quantize` is given.
            schedule: Steps and rates.
            key: What decides the weights; names the checkpoint of an interrupted run.
            accelerator: That of this process, if several share the work.
        """
        if context.training is None:
            raise ConfigError(f"{self.name} fine-tunes, but the task has no training split")
        model = copy.deepcopy(context.model)
        order = torch_generator(context.seed, "tuning batches")
        batches = (
            (batch.inputs, batch.targets) for batch in context.training.batches(schedule.batch_size, order)
        )
        loss = context.training.loss
        if self.distillation:
            batches, loss = self._distilled(context, batches)
        course: list[dict[str, float]] = []
        trained = self.train(
            context,
            model,
            batches=batches,
            loss=loss,
            schedule=schedule,
            outliers=self.activation_penalty(model, context.sites, schedule.steps),
            seed=derive_seed(context.seed, "tuning"),
            device=context.device,
            autocast=context.autocast,
            checkpoint=context.stages.checkpoint("tuning", key),
            progress=lambda done, total, _: context.progress(f"{self.name} fine-tuning", done, total),
            course=course,
            accelerator=accelerator,
        )
        if accelerator is None or accelerator.is_main_process:
            context.stages.keep_course("tuning", key, course)
        return trained

    def train(self, context: Context, model: nn.Module, **settings: Any) -> dict[str, Tensor]:
        """What is kept of a training.

        Args:
            context: What :meth:`tuned` is given.
            model: A copy of the reference, which is trained in place.
            settings: The arguments of :func:`quanttune.tuner.tune`.
        """
        tune(model, **settings)
        return state_of(model)

    def _distilled(self, context: Context, batches: Iterator[tuple[ModelInputs, Tensor]]) -> tuple[Any, Any]:
        """Batches that carry the reference's logits with the targets, and the loss that reads both."""
        training, share = context.training, self.distillation
        assert training is not None  # noqa: S101 - checked by the caller; tells the type checker

        def with_teacher() -> Iterator[tuple[ModelInputs, Any]]:
            for inputs, targets in batches:
                with torch.no_grad():
                    teacher = logits_of(call_model(context.model, to_device(inputs, context.device)))
                yield inputs, _Taught(targets, teacher)

        def loss(logits: Tensor, taught: _Taught) -> Tensor:
            answers, _ = answers_of(logits, taught.targets)
            wanted, _ = answers_of(taught.teacher, taught.targets)
            matched = divergence(wanted, answers) / max(len(answers), 1)
            return (1 - share) * training.loss(logits, taught.targets) + share * matched

        return with_teacher(), loss


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A state dict of its own on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def outermost(context: Context) -> dict[str, Any]:
    """The largest outlier's distance from its mean in deviations, and its site; softmax outputs aside."""
    sites = context.profile_sites
    found = [
        (statistics.ratio, site_id)
        for site_id, statistics in context.statistics().items()
        if sites[site_id].kind is not SiteKind.SOFTMAX and statistics.std > 0
    ]
    ratio, site_id = max(found, default=(None, None))
    return {"largest_ratio": ratio, "largest_ratio_site": site_id}


@dataclass(frozen=True)
class _Taught:
    """Targets with the reference's logits; moves between devices as one."""

    targets: Tensor
    teacher: Tensor

    def to(self, device: torch.device) -> _Taught:
        return _Taught(self.targets.to(device), self.teacher.to(device))

    def __getitem__(self, items: slice) -> _Taught:
        return _Taught(self.targets[items], self.teacher[items])


def _replica(
    accelerator: Accelerator,
    report: Callable[[int], None],
    weights: dict[str, Tensor],
    method: str,
    parameters: dict[str, Any],
    origin: dict[str, Any],
    schedule: dict[str, Any],
    key: dict[str, Any],
) -> dict[str, Tensor]:
    """What each of several processes does."""
    context = Origin(**origin).make(accelerator.device, lambda _, done, __: report(done))
    # Of what is tuned, which may have been changed before: sites and stages are those of these weights.
    context = context.changed(weights)
    tuning: FineTuning = METHODS.get(method)(**parameters)  # type: ignore[assignment]
    return tuning.tuned(context, Schedule(**schedule), key, accelerator)

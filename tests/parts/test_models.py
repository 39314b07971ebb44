"""Every registered model keeps the contract; the tiny ones are built and trained for real."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from baselines.method import MemoryStages
from benchmark.subject.assets.catalogue import ASSETS
from benchmark.subject.lookup import get_model
from benchmark.subject.models.entry import MODELS, ImageEntry, ModelEntry, own_random_state
from benchmark.subject.models.vit import fit_head
from benchmark.subject.tasks.task import TASKS, get_task
from quanttune.digests import json_digest, tensor_digest
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.inputs import call_model, logits_of
from quanttune.tuner import Schedule, tune

TINY = ["tiny_bert", "tiny_deit", "tiny_llama", "tiny_opt", "tiny_opt_lm", "tiny_swin", "tiny_vit"]
SHIPPED = ["dinov2_vits14", "minilm_l6", "opt_mini", "smollm2_135m", *TINY]


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """No test here touches the user's cache or the network."""


def reference(entry: ModelEntry) -> dict[str, torch.Tensor]:
    return entry.make_reference(MemoryStages(), lambda *_: None)


def test_the_models_of_the_suites_are_registered() -> None:
    assert set(SHIPPED) <= set(MODELS.names())
    with pytest.raises(UnknownNameError, match="did you mean dinov2_vits14"):
        get_model("dinov2_vits15")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_contract_of_an_entry(name: str) -> None:
    entry = get_model(name)
    assert entry.name == name
    assert entry.title
    assert entry.family in ("vit", "swin", "bert", "opt", "llama")
    assert entry.task in TASKS
    assert set(entry.needs()) <= set(ASSETS)
    Schedule(**entry.recipe)
    assert entry.tolerance > 0
    if entry.expected is not None:
        assert entry.expected > 0
        assert entry.expected <= 100 or get_task(entry.task).metric == "perplexity"
    assert json.loads(json.dumps(entry.identity())) == json.loads(json.dumps(get_model(name).identity()))


def test_identities_differ() -> None:
    digests = [json_digest(get_model(name).identity()) for name in SHIPPED]
    assert len(set(digests)) == len(SHIPPED)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dinov2_vits14", {"inverse_l2": 1.0}),
        ("dinov2_vits14", {"image_size": 70}),
        ("minilm_l6", {"max_length": 32}),
        ("minilm_l6", {"training": {"steps": 1, "learning_rate": 1e-5, "batch_size": 8}}),
        ("tiny_vit", {"seed": 1}),
        ("tiny_bert", {"version": 2}),
        ("tiny_opt_lm", {"task": "moby_dick"}),
        ("opt_mini", {"settings": {}}),
        ("smollm2_135m", {"max_length": 512}),
    ],
)
def test_what_decides_the_reference_is_in_the_identity(name: str, change: dict[str, object]) -> None:
    entry = get_model(name)
    assert dataclasses.replace(entry, **change).identity() != entry.identity()  # type: ignore[type-var]


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_built_alike_and_leave_global_random_state_alone(name: str) -> None:
    entry = get_model(name)
    before = torch.random.get_rng_state()
    weights = reference(entry)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tensor_digest(weights) == tensor_digest(reference(entry))
    assert sum(tensor.numel() for tensor in weights.values()) < 100_000
    model = entry.build()
    assert not model.training
    model.load_state_dict(weights)
    task = get_task(entry.task)
    batch = next(task.batches("test", entry, limit=6, batch_size=6))
    with torch.no_grad():
        logits = logits_of(call_model(model, batch.inputs))
    assert logits.shape == ((6, task.n_classes) if task.n_classes else (*batch.targets.shape, 257))
    assert torch.isfinite(logits).all()
    assert logits.std(dim=0).max() > 0  # different items, different answers


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_learn_with_their_recipe(name: str) -> None:
    entry = get_model(name)
    task = get_task(entry.task)
    model = entry.build()
    model.load_state_dict(reference(entry))
    before = tensor_digest(model.state_dict())
    data = task.training_data(entry, task.split_ids("train", 64))
    schedule = Schedule(**{**entry.recipe, "steps": 40, "learning_rate": 1e-2})
    batches = data.batches(schedule.batch_size, torch.Generator().manual_seed(0))
    everything = next(task.batches("train", entry, ids=task.split_ids("train", 64), batch_size=64))

    def loss() -> float:
        with torch.no_grad():
            return float(data.loss(logits_of(call_model(model, everything.inputs)), everything.targets))

    first = loss()
    tune(model, ((batch.inputs, batch.targets) for batch in batches), data.loss, schedule)
    assert tensor_digest(model.state_dict()) != before
    assert loss() < 0.99 * first


def test_tiny_text_keeps_its_length_and_padding_changes_nothing() -> None:
    entry = get_model("tiny_bert")
    tokens = entry.encode(["A short one.", "word " * 500])
    assert [len(item) for item in tokens] == [6, 32]
    assert max(itertools.chain(*tokens)) < 512
    assert tokens == entry.encode(["A short one.", "word " * 500])
    inputs = entry.text_inputs(tokens)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 32)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [6, 32]
    model = entry.build()
    with torch.no_grad():
        padded = logits_of(call_model(model, inputs))[0]
        alone = logits_of(call_model(model, entry.text_inputs(tokens[:1])))[0]
    torch.testing.assert_close(padded, alone)


class _Images(ImageEntry):
    name, task, image_size = "images", "fashion_mnist", 56

    def identity(self) -> dict[str, object]:
        return {}

    def build(self) -> torch.nn.Module:
        raise NotImplementedError

    def _reference(self, progress: object, device: torch.device) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def test_images_are_resized_like_pillow_and_grey_fills_three_channels() -> None:
    entry = _Images()
    generator = torch.Generator().manual_seed(0)
    # of low contrast: Pillow clips after each of its two passes, this once at the end
    grey = torch.randint(80, 160, (2, 1, 28, 28), generator=generator, dtype=torch.uint8)
    found = entry.image_inputs(grey)
    assert found.shape == (2, 3, 56, 56)
    assert found.dtype == torch.float32
    pillow = np.asarray(Image.fromarray(grey[0, 0].numpy()).resize((56, 56), Image.Resampling.BICUBIC))
    for channel, (mean, std) in enumerate(zip(entry.mean, entry.std, strict=True)):
        pixels = (found[0, channel] * std + mean) * 255
        assert (pixels - torch.from_numpy(pillow.copy()).float()).abs().max() < 1.5  # two roundings
    colour = grey.expand(-1, 3, -1, -1)
    torch.testing.assert_close(entry.image_inputs(colour), found)
    right_size = torch.zeros(1, 1, 56, 56, dtype=torch.uint8)
    black = torch.tensor([-mean / std for mean, std in zip(entry.mean, entry.std, strict=True)])
    torch.testing.assert_close(entry.image_inputs(right_size)[0, :, 0, 0], black)


def test_an_image_does_not_depend_on_its_batch() -> None:
    entry = _Images()
    images = torch.randint(
        0, 256, (5, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(entry.image_inputs(images)[3:4], entry.image_inputs(images[3:4]))


def test_the_fitted_head_is_the_regression_of_the_raw_features() -> None:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(3, 5)) * 4
    labels = generator.integers(0, 3, 300)
    features = centers[labels] * 10 + 100 + generator.normal(size=(300, 5)) * 10
    weight, bias = fit_head(features, labels, 1.0)
    assert weight.dtype == bias.dtype == np.float32
    assert weight.shape == (3, 5)
    assert (np.argmax(features @ weight.T + bias, axis=1) == labels).mean() > 0.9
    again = fit_head(features, labels, 1.0)
    assert np.array_equal(weight, again[0])
    assert np.array_equal(bias, again[1])


def test_own_random_state_restores_the_callers_even_after_an_error() -> None:
    before = torch.random.get_rng_state()
    with own_random_state(3):
        first = torch.rand(4)
    with own_random_state(3):
        assert torch.equal(torch.rand(4), first)

    def fail() -> None:
        with own_random_state(4):
            torch.rand(1)
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_listing_models_and_tasks_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from benchmark.subject.models.entry import MODELS\n"
        "from benchmark.subject.tasks.task import TASKS\n"
        "entries = [entry.identity() for _, entry in MODELS.items()]\n"
        "TASKS.names()\n"
        "heavy = {'torch', 'transformers', 'timm', 'datasets', 'sklearn', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_task_without_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = get_model("tiny_vit")
    monkeypatch.setattr(
        "benchmark.subject.models.tiny.TinyImageModel._task", lambda _: type("T", (), {"n_classes": None})
    )
    with pytest.raises(ConfigError, match="needs a task with classes"):
        entry.build()

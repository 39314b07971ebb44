"""Stages are computed once, checked before use, and kept apart by everything that decides them."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from benchmark.keep.stages import Stages
from quanttune.errors import ConfigError, TuningDivergedError


def count_calls(folder: Path, counter: Path) -> None:
    """Ask for a stage and leave a mark each time it is really computed."""
    import time

    def make() -> dict[str, torch.Tensor]:
        with counter.open("a") as stream:
            stream.write("x")
        time.sleep(0.3)
        return {"w": torch.arange(4.0)}

    tensors = Stages(folder).tensors("slow", {"a": 1}, make)
    if not torch.equal(tensors["w"], torch.arange(4.0)):
        raise AssertionError("wrong tensors")


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    return Stages(tmp_path / "stages")


def test_a_stage_is_computed_once(stages: Stages) -> None:
    calls = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        shared = torch.randn(3, 4)
        return {"a": shared, "tied": shared, "view": shared.T, "scalar": torch.tensor(2.0)}

    first = stages.tensors("tuned", {"seed": 0}, make)
    again = Stages(stages.folder).tensors("tuned", {"seed": 0}, make)
    assert len(calls) == 1
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_tuned_weights_stay_in_memory_until_others_are_asked_for(stages: Stages) -> None:
    """One object for all cells of a training, so that it is read, checked and hashed once."""

    def ask(holder: Stages, stage: str, seed: int) -> dict[str, torch.Tensor]:
        return holder.tensors(stage, {"seed": seed}, lambda: {"w": torch.full((3,), float(seed))})

    scoped = stages.scoped(reference="r")
    first = ask(scoped, "tuning", 0)
    assert ask(stages.scoped(reference="r"), "tuning", 0) is first
    assert ask(stages.scoped(reference="s"), "tuning", 0) is not first
    other = ask(scoped, "tuning", 1)
    assert other["w"].tolist() == [1.0] * 3
    assert ask(scoped, "tuning", 0) is not first  # one at a time: memory stays bounded
    assert ask(scoped, "statistics", 0) is not ask(scoped, "statistics", 0)


def test_a_refused_training_is_not_repeated_by_the_cells_that_share_it(stages: Stages) -> None:
    calls = []

    def diverge() -> dict[str, torch.Tensor]:
        calls.append(1)
        raise TuningDivergedError("the smoothed task loss rose")

    for _ in ("W8A8", "W7A7"):
        with pytest.raises(TuningDivergedError, match="rose"):
            stages.scoped(reference="r").tensors("tuning", {"seed": 0}, diverge)
    assert len(calls) == 1
    assert list(stages.scoped(reference="r").tensors("tuning", {"seed": 1}, lambda: {"w": torch.ones(1)}))
    with pytest.raises(TuningDivergedError):  # another process tries again
        Stages(stages.folder).scoped(reference="r").tensors("tuning", {"seed": 0}, diverge)
    assert len(calls) == 2


def test_keys_names_and_scopes_are_kept_apart(stages: Stages) -> None:
    made = [
        holder.tensors(name, key, lambda value=value: {"v": torch.tensor(value)})["v"].item()
        for value, (holder, name, key) in enumerate(
            [
                (stages, "a", {"k": 1}),
                (stages, "b", {"k": 1}),
                (stages, "a", {"k": 2}),
                (stages.scoped(reference="r"), "a", {"k": 1}),
                (stages.scoped(reference="s"), "a", {"k": 1}),
            ]
        )
    ]
    assert made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("harm", ["truncate", "edit", "no sidecar", "edited sidecar", "newer"])
def test_a_damaged_stage_is_computed_again(stages: Stages, harm: str) -> None:
    stages.tensors("tuned", {}, lambda: {"w": torch.zeros(64)})
    (path,) = (stages.folder / "tuned").glob("*.safetensors")
    sidecar = path.with_suffix(".json")
    if harm == "truncate":
        path.write_bytes(path.read_bytes()[:-8])
    elif harm == "edit":
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif harm == "no sidecar":
        sidecar.unlink()
    elif harm == "edited sidecar":
        sidecar.write_text("[]")
    else:
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"schema": 99}))
    again = stages.tensors("tuned", {}, lambda: {"w": torch.ones(64)})
    assert torch.equal(again["w"], torch.ones(64))
    assert torch.equal(stages.tensors("tuned", {}, dict)["w"], torch.ones(64))


def test_a_stage_copied_over_anothers_is_noticed(stages: Stages) -> None:
    """Found: an accuracy of 515.8 from the pair of files of another model's evaluation."""
    holders = {name: stages.scoped(reference=name) for name in ("r", "s")}
    for value, holder in enumerate(holders.values()):
        holder.tensors("items", {"k": 1}, lambda value=value: {"v": torch.tensor(value)})
    stages.tensors("other", {"k": 1}, lambda: {"v": torch.tensor(7)})
    names = {name: holder.reference("items", {"k": 1}) for name, holder in holders.items()}
    for source in (names["r"], stages.reference("other", {"k": 1})):
        for ending in (".safetensors", ".json"):
            content = (stages.folder / f"{source}{ending}").read_bytes()
            (stages.folder / f"{names['s']}{ending}").write_bytes(content)
        assert holders["s"].open(names["s"]) is None
        assert list(holders["s"].kept("items")) == []
        again = holders["s"].tensors("items", {"k": 1}, lambda: {"v": torch.tensor(1)})
        assert again["v"].item() == 1
        assert holders["r"].tensors("items", {"k": 1}, dict)["v"].item() == 0


def test_a_stage_that_fails_leaves_nothing(stages: Stages) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        stages.tensors("tuned", {}, fail)
    assert not list(stages.folder.rglob("*.safetensors"))
    assert stages.tensors("tuned", {}, lambda: {"w": torch.ones(1)})["w"].item() == 1.0


def test_how_the_work_went_is_kept_and_nothing_depends_on_it(stages: Stages, tmp_path: Path) -> None:
    key = {"a": 1}
    stages.tensors("tuning", key, lambda: {"w": torch.ones(2)})
    name = stages.reference("tuning", key)
    assert stages.course(name) == {}
    stages.keep_course("tuning", key, [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": 1.5}])
    assert stages.course(name) == {"step": [1.0, 2.0], "loss": [2.0, 1.5]}
    other = Stages(tmp_path / "other")
    stages.hand_over(name, other)
    assert other.course(name) == stages.course(name)
    assert torch.equal((other.open(name) or {})["w"], torch.ones(2))
    (path,) = (tmp_path / "stages" / "courses").iterdir()
    for harm in ('{"columns": {"step": [1, NaN]}}', '{"columns": 3}', "[1]", "{", ""):
        path.write_text(harm)
        assert stages.course(name) == {}
    stages.hand_over(stages.reference("tuning", {"a": 2}), other)  # there is none
    assert stages.course("../../x") == {}


def test_names_cannot_be_paths(stages: Stages) -> None:
    with pytest.raises(ConfigError, match="lower-case"):
        stages.tensors("../out", {}, dict)


def test_two_processes_compute_a_stage_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "stages", tmp_path / "count")
    processes = [context.Process(target=count_calls, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "count").read_text() == "x"

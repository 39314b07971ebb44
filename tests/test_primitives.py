"""The primitives every room shares: errors, registry, seeds, digests, model calls."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quanttune.digests import canonical_json, json_digest, sha256_file, tensor_digest
from quanttune.errors import AssetError, ConfigError, QuantTuneError, StoreError, UnknownNameError
from quanttune.inputs import batch_size_of, call_model, logits_of, to_device
from quanttune.registry import Registry
from quanttune.seeds import derive_seed, numpy_generator, torch_generator


class TestErrors:
    def test_share_one_base_for_the_command_line(self) -> None:
        for kind in (AssetError, ConfigError, StoreError, UnknownNameError):
            assert issubclass(kind, QuantTuneError)

    def test_unknown_name_suggests_close_ones(self) -> None:
        error = UnknownNameError("method", "minmx", ["minmax", "mse", "percentile"])
        assert str(error) == "unknown method 'minmx'; did you mean minmax?"
        assert "\n" not in str(error)

    def test_unknown_name_lists_all_where_none_is_close(self) -> None:
        assert str(UnknownNameError("task", "zzz", {"b": 1, "a": 2})) == "unknown task 'zzz'; known: a, b"
        assert str(UnknownNameError("task", "zzz", [])) == "unknown task 'zzz'; known: none"

    def test_travel_between_processes(self) -> None:
        """A pool rebuilds what a worker raises, as a copy is made: an error that cannot be breaks it."""
        error = copy.copy(UnknownNameError("model", "vit", ["vit_b", "swin"]))
        assert (error.kind, error.name, error.known) == ("model", "vit", ["swin", "vit_b"])
        assert str(error) == "unknown model 'vit'; did you mean vit_b?"
        for kind in (QuantTuneError, AssetError, ConfigError, StoreError):
            assert str(copy.copy(kind("one line"))) == "one line"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Makes an importable package of component files and forgets it afterwards."""
    made: list[str] = []

    def make(name: str, **modules: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(
            "from quanttune.registry import Registry\nREGISTRY = Registry('part', (__name__,))\n"
        )
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(f"from {name} import REGISTRY\n" + textwrap.dedent(text))
        made.append(name)
        return name

    monkeypatch.syspath_prepend(str(tmp_path))
    yield make
    for name in list(sys.modules):
        if name.partition(".")[0] in made:
            del sys.modules[name]


class TestRegistry:
    def test_files_components_by_name(self) -> None:
        registry: Registry[Any] = Registry("part")

        @registry.register("b")
        class B:
            pass

        registry.register("a")(len)
        assert registry.get("b") is B
        assert registry.names() == ["a", "b"]
        assert list(registry.items()) == [("a", len), ("b", B)]
        assert "a" in registry
        assert "c" not in registry

    def test_names_what_is_unknown(self) -> None:
        registry: Registry[Any] = Registry("part")
        registry.register("wheel")(1)
        with pytest.raises(UnknownNameError, match=r"unknown part 'weel'; did you mean wheel\?"):
            registry.get("weel")

    def test_refuses_two_components_of_one_name(self) -> None:
        registry: Registry[Any] = Registry("part")

        class First:
            pass

        class Second:
            pass

        registry.register("x")(First)
        with pytest.raises(
            ValueError, match=r"two components claim the part name 'x': .*First and .*Second; rename"
        ):
            registry.register("x")(Second)
        assert registry.get("x") is First

    def test_imports_components_on_the_first_look_up_only(self, package: Any) -> None:
        name = package("parts_lazy", one="REGISTRY.register('one')(1)", two="REGISTRY.register('two')(2)")
        module = __import__(name)
        assert f"{name}.one" not in sys.modules
        assert module.REGISTRY.names() == ["one", "two"]
        assert f"{name}.one" in sys.modules
        assert module.REGISTRY.get("two") == 2

    def test_a_component_may_look_up_others_while_it_loads(self, package: Any) -> None:
        name = package(
            "parts_nested",
            a="REGISTRY.register('a')(1)",
            b="REGISTRY.register('b')(REGISTRY.get('a') + 1)",
        )
        assert __import__(name).REGISTRY.get("b") == 2

    def test_a_file_that_fails_to_import_fails_every_look_up(self, package: Any) -> None:
        """Were it only the first, later ones would call every component behind the broken file unknown."""
        name = package("parts_broken", a="import a_module_that_is_not_there", b="REGISTRY.register('b')(2)")
        registry = __import__(name).REGISTRY
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
                registry.get("b")

    def test_threads_wait_for_the_import(self, package: Any) -> None:
        name = package("parts_slow", a="import time\ntime.sleep(0.2)\nREGISTRY.register('a')(1)")
        registry = __import__(name).REGISTRY
        found: list[list[str]] = []
        threads = [threading.Thread(target=lambda: found.append(registry.names())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [["a"]] * 3


class TestSeeds:
    def test_follow_their_definition(self) -> None:
        expected = int.from_bytes(hashlib.sha256(b"7\x1fcalibration\x1f3").digest()[:8], "big") >> 1
        assert derive_seed(7, "calibration", 3) == expected

    def test_differ_by_base_purpose_order_and_number_of_names(self) -> None:
        seeds = [
            derive_seed(0),
            derive_seed(1),
            derive_seed(0, "a"),
            derive_seed(0, "b"),
            derive_seed(0, "a", "b"),
            derive_seed(0, "b", "a"),
            derive_seed(0, "ab"),
            derive_seed(0, "a", 1),
            derive_seed(-1),
        ]
        assert len(set(seeds)) == len(seeds)
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_generators_repeat_and_leave_the_global_state_alone(self) -> None:
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        draws = [torch.randn(4, generator=torch_generator(3, "x")) for _ in range(2)]
        assert torch.equal(*draws)
        assert not torch.equal(draws[0], torch.randn(4, generator=torch_generator(4, "x")))
        assert numpy_generator(3, "x").random() == numpy_generator(3, "x").random()
        assert numpy_generator(3, "x").random() != numpy_generator(3, "y").random()
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)


class TestDigests:
    def test_of_a_file_is_its_sha256(self, tmp_path: Path) -> None:
        path = tmp_path / "data"
        for content in (b"", b"abc", bytes(range(256)) * 5000):
            path.write_bytes(content)
            assert sha256_file(path) == hashlib.sha256(content).hexdigest()

    def test_of_tensors_follows_its_definition(self) -> None:
        tensors = {"b": torch.tensor([[1.0, -2.5]]), "a": torch.tensor([3, 4], dtype=torch.int16)}
        expected = hashlib.sha256(
            b"a|int16|(2,)\n"
            + struct.pack("<2h", 3, 4)
            + b"b|float32|(1, 2)\n"
            + struct.pack("<2f", 1.0, -2.5)
        ).hexdigest()
        assert tensor_digest(tensors) == expected

    def test_of_tensors_ignores_order_and_memory_layout(self) -> None:
        x, y = torch.randn(3, 4), torch.randn(2)
        expected = tensor_digest({"x": x, "y": y})
        assert tensor_digest({"y": y.clone(), "x": x.t().contiguous().t()}) == expected
        assert tensor_digest({"x": nn.Parameter(x), "y": y[::1]}) == expected

    @pytest.mark.parametrize(
        "other",
        [
            {"x": torch.zeros(4)},
            {"z": torch.zeros(2, 2)},
            {"x": torch.zeros(2, 2, dtype=torch.int32)},
            {"x": torch.full((2, 2), -0.0)},
            {"x": torch.zeros(2, 2), "y": torch.zeros(0)},
            {},
        ],
    )
    def test_of_tensors_tells_names_shapes_types_and_bits_apart(self, other: dict[str, Tensor]) -> None:
        assert tensor_digest(other) != tensor_digest({"x": torch.zeros(2, 2)})

    def test_of_tensors_of_every_kind(self) -> None:
        kinds = {
            "scalar": torch.tensor(1.0),
            "empty": torch.zeros(0, 3),
            "bool": torch.tensor([True, False]),
            "half": torch.ones(3, dtype=torch.float16),
            "brain": torch.ones(3, dtype=torch.bfloat16),
            "long": torch.arange(3),
        }
        assert len({tensor_digest({"x": tensor}) for tensor in kinds.values()}) == len(kinds)
        assert tensor_digest(kinds) == tensor_digest(dict(reversed(kinds.items())))

    def test_of_json_ignores_order_and_spacing(self) -> None:
        left, right = (
            {"b": [1, 2.5, None], "a": {"d": "ü", "c": True}},
            {"a": {"c": True, "d": "ü"}, "b": [1, 2.5, None]},
        )
        assert canonical_json(left) == '{"a":{"c":true,"d":"ü"},"b":[1,2.5,null]}'
        assert (
            json_digest(left)
            == json_digest(right)
            == hashlib.sha256(canonical_json(left).encode()).hexdigest()
        )
        assert json.loads(canonical_json(left)) == left
        assert json_digest([1, 2]) != json_digest([2, 1])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, float("-inf")]])
    def test_of_json_refuse_what_json_has_not(self, value: Any) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json(value)


class TestInputs:
    def test_a_tensor_is_given_by_position_and_names_by_keyword(self) -> None:
        class Model(nn.Module):
            def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
                return x if scale is None else x * scale

        x = torch.ones(2, 3)
        assert torch.equal(call_model(Model(), x), x)
        assert torch.equal(call_model(Model(), {"x": x, "scale": torch.tensor(2.0)}), 2 * x)

    def test_logits_are_the_output_or_its_attribute(self) -> None:
        logits = torch.ones(2, 3)
        assert logits_of(logits) is logits
        assert logits_of(SimpleNamespace(logits=logits)) is logits
        for output in ((logits,), {"x": logits}, SimpleNamespace(logits=None), None):
            with pytest.raises(
                TypeError, match=r"has no logits; return a tensor, set \.logits, or say where"
            ):
                logits_of(output)

    def test_batches_tell_their_size_and_move(self) -> None:
        named = {"ids": torch.zeros(5, 3), "mask": torch.ones(5, 3)}
        assert batch_size_of(named) == 5
        assert batch_size_of(torch.zeros(4, 3, 8, 8)) == 4
        moved = to_device(named, torch.device("meta"))
        assert isinstance(moved, dict)
        assert {key: tensor.device.type for key, tensor in moved.items()} == {"ids": "meta", "mask": "meta"}
        assert to_device(torch.zeros(1), torch.device("cpu")).device.type == "cpu"  # type: ignore[union-attr]

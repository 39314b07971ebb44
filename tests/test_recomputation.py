"""The outlier loss where activations are computed again in the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quanttune.errors import ConfigError
from quanttune.quantization import SiteKind, discover_sites
from tests.quantization.models import build, one_thread
from tests.training_loops import STEPS, Residual, assert_same, called, data, quiet_bert, residual, trained


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class TestRecomputation:
    """Counted once, and its gradient arrives."""

    @pytest.mark.parametrize("penalty", ["outlier", "range", "kurtosis"])
    def test_of_a_function(self, penalty: str) -> None:
        expected = trained(residual(), config={"penalty": penalty})
        recomputed = residual("not reentrant")
        assert_same(trained(recomputed, config={"penalty": penalty}), expected)
        # Each branch twice, but for the discovery of the sites.
        assert recomputed.calls >= 2 * 2 * STEPS

    def test_of_the_whole_model(self) -> None:
        def whole(model: nn.Module) -> Callable[[Any], Tensor]:
            return lambda given: checkpoint(model, given, use_reentrant=False)

        assert_same(trained(residual(), whole), trained(residual()))

    def test_of_recomputed_parts(self) -> None:
        def whole(model: nn.Module) -> Callable[[Any], Tensor]:
            return lambda given: checkpoint(model, given, use_reentrant=False)

        assert_same(trained(residual("not reentrant"), whole), trained(residual()))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("backward", [Tensor.backward, torch.autograd.backward])
    def test_of_blocks_of_timm(self, attention: str, backward: Callable[[Tensor], None]) -> None:
        """Fused attention is taken apart for what is looked at in it, and so it must be once more.

        A tensor's own ``backward`` runs outside of every walk, and the function inside of it.
        """
        plain, recomputed = (copy.deepcopy(build("vit", attention)).train() for _ in range(2))
        recomputed.set_grad_checkpointing(True)
        assert_same(trained(recomputed, backward=backward), trained(plain))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("backward", [Tensor.backward, torch.autograd.backward])
    def test_of_layers_of_transformers(self, attention: str, backward: Callable[[Tensor], None]) -> None:
        plain, recomputed = (quiet_bert(attention) for _ in range(2))
        recomputed.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same(trained(recomputed, backward=backward), trained(plain))

    def test_of_fused_attention_in_a_function_is_refused_in_a_line(self) -> None:
        class Attention(Residual):
            def branch(self, values: Tensor) -> Tensor:
                return values + nn.functional.scaled_dot_product_attention(values, values, values)

        plain, hidden = Attention(), Attention("not reentrant")
        trained(plain)
        with pytest.raises(ConfigError, match="around a module, or choose eager attention") as refused:
            trained(hidden)
        assert "\n" not in str(refused.value)
        # Nothing in it is looked at, and nothing taken apart.
        stream = {"kinds": (SiteKind.RESIDUAL_SUM,)}
        hidden.load_state_dict(plain.state_dict())
        assert_same(trained(hidden, config=stream), trained(plain, config=stream))

    def test_of_layers_of_transformers_has_the_same_sites(self) -> None:
        """Found: its hook on the embeddings made their sum a residual one."""
        plain, recomputed = (quiet_bert() for _ in range(2))
        recomputed.gradient_checkpointing_enable({"use_reentrant": False})
        kinds = [
            [(site.id, site.kind) for site in discover_sites(model, data(model, 0)).values()]
            for model in (plain, recomputed)
        ]
        assert kinds[0] == kinds[1]

    @pytest.mark.parametrize("name", ["function", "transformers", "model"])
    def test_without_a_graph_is_refused_in_the_first_forward_pass(self, name: str) -> None:
        model: Any = quiet_bert() if name == "transformers" else residual()
        calls = called
        if name == "function":
            model.way = "reentrant"
        elif name == "transformers":
            model.gradient_checkpointing_enable({"use_reentrant": True})
        else:

            def calls(model: nn.Module) -> Callable[[Any], Tensor]:
                return lambda given: checkpoint(model, given, use_reentrant=True)

        with pytest.raises(ConfigError, match="use_reentrant=False") as refused:
            trained(model, calls)
        assert "\n" not in str(refused.value)

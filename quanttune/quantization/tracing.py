"""Reach every site of any eager model without a line per architecture.

Module hooks keep the path of the module that is running; one ``TorchFunctionMode`` recognises a short table
of operations below it and offers each operand and result to ``visit`` under its site id. Statistics, the
outlier loss and simulated quantization are different visitors of the same walk.

Fused attention hides the softmax, so ``scaled_dot_product_attention`` is decomposed, but only when a visitor
wants one of the tensors inside; otherwise the model runs its own kernel and its logits stay bit-identical.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from quanttune.errors import QuantTuneError
from quanttune.quantization.hidden import (
    HiddenProducts,
    copy_refusal,
    is_of_a_compiler,
    refusal,
    refuse_opaque,
    thread_refusal,
)
from quanttune.quantization.sites import Call, SiteId
from quanttune.quantization.walkers import Product, walker_of

Handler = Callable[[Tensor], Tensor]
"""Takes the tensor at a site and returns what the network goes on with."""

_INSIDE_ATTENTION = frozenset({"matmul", "softmax"})


class _Walks(threading.local):
    """The walks of a thread, the outermost first, and how many walkers are at work."""

    def __init__(self) -> None:
        self.active: list[SiteVisitor] = []
        self.depth = 0


_walks = _Walks()


def _active() -> list[SiteVisitor]:
    return _walks.active


class SiteVisitor(TorchFunctionMode):
    """Walks the sites of ``model`` while it runs inside ``with``.

    Subclasses override :meth:`visit`. Calls outside ``model`` are left alone. Not re-entrant and bound to one
    thread.

    Args:
        model: The module whose forward pass is walked.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._path: list[str] = []
        self._calls: Counter[tuple[str, str]] = Counter()
        self._hooks: list[RemovableHandle] = []
        # Whether nothing is in force between two runs of the model.
        self.only_while_running = False
        # Ends what holds for the present run alone.
        self._sleeps: Callable[..., None] | None = None
        self._modes = ExitStack()  # what holds for the present run
        self._thread = 0  # in which the model runs
        self.ran = False  # whether the whole model was called
        self._parts: set[str] = set()  # paths of modules that were called with none around them running
        self.outermost = True  # whether no other walk stands around this one
        self.unchecked = False  # whether the next run is searched for products that have no site
        self._search: HiddenProducts | None = None
        self._refusal: QuantTuneError | None = None
        self._function = ""  # what is running and is no walker's
        self._failed = ""  # path of the innermost module that an exception left

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        """Return what the network uses in place of ``tensor``; the default changes nothing."""
        return tensor

    def multiply(self, product: Product) -> Tensor:
        """Visit both operands of a product and compute it."""
        left, right = product.sites
        return product.of(self.visit(left, product.left), self.visit(right, product.right))

    def apply(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: SiteId | None = None
    ) -> Any:
        """Compute an operation that is no product; the model's own kernel by default."""
        return func(*args, **kwargs)

    def opens_attention(self, path: str) -> bool:
        """Whether a site inside the fused attention of the module at ``path`` is wanted."""
        return True

    def rearranged(self, result: Tensor, source: Tensor) -> Tensor:
        """Note that a walker made ``result`` from ``source`` by moving numbers only; ignored by default."""
        return result

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer of the model itself."""
        return isinstance(tensor, nn.Parameter) or id(tensor) in self._buffers

    @property
    def running(self) -> bool:
        """Whether the model, or a module of it, is running."""
        return bool(self._path)

    @property
    def path(self) -> str:
        """Path of the module that is running; empty for the model itself and outside of it."""
        return self._path[-1] if self._path else ""

    def __enter__(self) -> Self:
        refuse_opaque(self._model)
        try:
            for name, module in self._model.named_modules():
                self._hooks.append(module.register_forward_pre_hook(self._entered(name), prepend=True))
                self._hooks.append(module.register_forward_hook(self._left, always_call=True))
        except BaseException:
            self._remove_hooks()
            raise
        self._refusal = None
        if not self.only_while_running:
            self._start()
        return self

    def _start(self) -> None:
        active = _active()
        self.outermost = not active
        active.append(self)
        super().__enter__()

    def _stop(self, *_: Any) -> None:
        super().__exit__(None, None, None)
        _active().remove(self)

    def _wake(self) -> None:
        """Come into force for one run, where this walk is not: between runs, or in a backward pass.

        Every walk steps aside for a backward pass. What that computes again must be what it was before.
        """
        if self in _get_current_function_mode_stack():
            return
        if self in _active():
            super().__enter__()
            self._sleeps = super().__exit__
        else:
            self._start()
            self._sleeps = self._stop

    def _leave_inference_mode(self) -> None:
        """Compute without gradients, as inference mode does: its tensors do not tell when they change."""
        if torch.is_inference_mode_enabled():
            self._modes.enter_context(torch.inference_mode(False))
            self._modes.enter_context(torch.no_grad())

    def _sleep(self) -> None:
        sleep, self._sleeps = self._sleeps, None
        if sleep is not None:
            sleep(None, None, None)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_search(False)
        self._sleep()
        self._modes.close()
        if not self.only_while_running:
            self._stop()
        self._remove_hooks()
        self._path.clear()
        if self._refusal is not None and (not isinstance(exc, QuantTuneError) or _is_told_again(exc)):
            # Whatever became of it in a scripted function, a thread or a model that went on.
            raise self._refusal from exc
        if exc is not None and not isinstance(exc, QuantTuneError) and is_of_a_compiler(traceback):
            raise QuantTuneError(
                f"module {self._failed!r} calls a compiled function, and no walk can reach what it computes "
                f"({type(exc).__name__}); quantization works on eager PyTorch modules: leave torch.compile "
                "and flex attention out (of transformers, attn_implementation='eager')"
            ) from exc

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _entered(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if "_is_replica" in vars(module):
                self._refusal = copy_refusal(name)
                raise self._refusal
            if self._path and threading.get_ident() != self._thread:
                self._refusal = thread_refusal(name)
                raise self._refusal
            self._thread = threading.get_ident()
            if not self._path:
                self._parts.add(name)
                self._leave_inference_mode()
                self._wake()
                self._calls.clear()
                if self.unchecked:
                    self._search = HiddenProducts(self._met)
                    self._search.__enter__()
            self.ran = self.ran or name == ""
            self._path.append(name)

        return hook

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            # It was refused on entering.
            return
        path = self._path.pop() if self._path else ""
        # A module that failed has no output.
        self._failed = (self._failed or path) if output is None else ""
        if not self._path:
            self._end_search(output is not None)
            self._sleep()
            self._modes.close()

    def _end_search(self, done: bool) -> None:
        search, self._search = self._search, None
        if search is not None:
            search.__exit__(None, None, None)
            self.unchecked = not done

    def _met(self, operator: str) -> None:
        """Refuse a product that no walk is computing."""
        if self.running and not _walks.depth:
            self._refusal = refusal(self.path, self._function or operator)
            raise self._refusal

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send a recognised operation to its walker, and run anything else unchanged."""
        if not self._path:
            return func(*args, **(kwargs or {}))
        walker = walker_of(func)
        if walker is None:
            self._function = getattr(func, "__name__", str(func))
            if isinstance(func, HigherOrderOperator):
                raise refusal(self.path, self._function)
            result = self.apply(func, args, kwargs or {})
            self._function = ""
            return result
        _walks.depth += 1
        search = self._search
        # Thousands of small operations of a walker would each be looked at for nothing.
        paused = search is not None and search.pause()
        try:
            return walker(self, func, args, kwargs or {})
        finally:
            _walks.depth -= 1
            if search is not None and paused:
                search.__enter__()

    def next_call(self, operation: str) -> Call:
        """The running module's next call of ``operation``."""
        key = (self.path, operation)
        self._calls[key] += 1
        return Call(*key, self._calls[key])


def _is_told_again(error: BaseException) -> bool:
    """Whether a thread handed an error on, with its traceback for a message."""
    return "Original Traceback" in str(error)


class SiteHandlers(SiteVisitor):
    """Applies one handler per site.

    Args:
        model: The module whose forward pass is walked.
        handlers: Site id to handler; sites without one pass through untouched.
        known: Ids of all sites of the model, where they are known.

    Raises:
        QuantTuneError: Inside, if a site is reached that is not among the ``known``.
    """

    def __init__(
        self, model: nn.Module, handlers: Mapping[str, Handler], known: Iterable[str] | None = None
    ) -> None:
        super().__init__(model)
        self._known = None if known is None else frozenset(map(SiteId.parse, known))
        self.handlers = dict(handlers)
        self._by_site = {SiteId.parse(site_id): handler for site_id, handler in handlers.items()}
        self._reached: set[SiteId] = set()
        self._attention_paths = {site.module for site in self._by_site if site.operation in _INSIDE_ATTENTION}

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        """Apply the site's handler, if it has one."""
        handler = self.handler_of(site)
        return tensor if handler is None else handler(tensor)

    def handler_of(self, site: SiteId) -> Handler | None:
        """The handler of a site that is being visited."""
        if self._known is not None and site not in self._known:
            raise QuantTuneError(
                f"site {site} was not there when the sites were discovered, so it would stay in float; "
                "discover them on this same model, with a batch that takes every path through it"
            )
        handler = self._by_site.get(site)
        if handler is not None:
            self._reached.add(site)
        return handler

    @property
    def unreached(self) -> list[str]:
        """Sites whose handler never ran, in the order of the handlers."""
        return [str(site) for site in self._by_site if site not in self._reached]

    @property
    def missed(self) -> list[str]:
        """Of :attr:`unreached`, those that the calls made should have reached.

        All of them once the whole model was called. Else those of a module that was run without being called,
        as by ``model.forward``: two of its parts were, or all that has a handler in it but what is its own.
        What such a module computes between its parts is walked in its own call alone. One part may run alone.
        """
        unreached = self.unreached
        if self.ran:
            return unreached
        parts: dict[str, set[str]] = {}
        for called in self._parts:
            names = called.split(".")
            for count, name in enumerate(names):
                parts.setdefault(".".join(names[:count]), set()).add(name)
        own = {path: [site for site in unreached if SiteId.parse(site).module == path] for path in parts}
        run = {path for path in parts if len(parts[path]) > 1 or len(own[path]) == len(unreached)}
        return [site for site in unreached if SiteId.parse(site).module in run]

    @property
    def remedy(self) -> str:
        """What to do about :attr:`missed` sites."""
        if self.ran:
            return "discover the sites on this same model, with the attention implementation it runs with"
        return (
            "parts of a module were called and not the module itself: call model(...) and not "
            "model.forward(...), or leave out the sites between the parts"
        )

    def opens_attention(self, path: str) -> bool:
        """Decompose only where a handler stands inside the fused operation."""
        return path in self._attention_paths

"""LARS: layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888), around any optimizer."""

from __future__ import annotations

import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from autowu.kin import chain, scale_free
from autowu.optim import checks
from autowu.optim.batches import Batch, LayerNorms, batches
from autowu.optim.engines import Engine, eager, gpu, pick
from autowu.optim.layerwise import Layerwise, check_dense, check_dtypes, no_arithmetic, pick_foreach
from autowu.optim.rules import LARS_RULE, LarsNumbers

__all__ = ["LARS"]

_logger = logging.getLogger("autowu")

SGD_RANGES: Final = {
    "lr": checks.LR,
    "momentum": checks.AT_LEAST_0,
    "dampening": checks.FINITE,
    "nesterov": checks.FLAG,
    "maximize": checks.FLAG,
    "foreach": checks.FLAG_OR_NONE,
    "fused": checks.FLAG_OR_NONE,
    "differentiable": checks.FLAG,
}
"""Of what torch's SGD has, whose step is made here."""


class LARS(Layerwise):
    r"""Scales every parameter's gradient by its trust ratio, then lets another optimizer take the step.

    For a parameter w with gradient g and the weight decay :math:`\lambda` of its group, the wrapped optimizer is given

    .. math::
        \frac{\text{trust\_coef} \cdot \|w\|}{\|g\| + \lambda \|w\| + \text{eps}} \; (g + \lambda w)

    in place of g (You et al. 2017, equation 6), with the ratio 1 where :math:`\|w\|` or :math:`\|g\|` is 0. The decay is applied
    here, once: the wrapped optimizer sees a decay of 0 during the step. The norms are computed in float32 or better, those of
    sharded parameters (DTensor, FSDP2; torch 2.5 or later) over all shards, and nothing waits for the device but the first step on
    a GPU with parameters of a dtype, which tries the kernels. What ``.grad`` holds after a step is not defined.

    Parameter groups, state and defaults are those of the wrapped optimizer, so schedulers, state dicts and groups added later work
    as with it. A group may set its own ``"trust_coef"``, and with ``"adapt": False`` it leaves its gradients as they are but for
    the decay, as is usual for norms and biases (:func:`~autowu.optim.param_groups`).

    Adam and its kin, Muon and Lion undo any scale of the gradient. Around one of them LARS logs a warning when made: it names
    the optimizer to take instead.

    ``torch.compile(optimizer.step)``, of torch 2.6 or later, traces one graph with any of torch's own optimizers inside but the
    fused; around SGD on the CPU it is one operator for each group. Let the LR be a tensor, or every new LR compiles anew. Step
    hooks of the wrapped optimizer do not run in it, those of this one do.

    Args:
        optimizer: the optimizer that takes the step, e.g. ``torch.optim.SGD`` with momentum; it stays at hand as ``.optim``. Not
            one that evaluates a closure several times in a step (LBFGS).
        eps: added to the denominator, 0 or more.
        trust_coef: the trust coefficient :math:`\eta`, above 0.
        foreach: scale all parameters of a device at a time (True) or one after the other (False). By default the former, on the
            CPU the latter. Around torch's SGD the step is part of it, on the CPU by SGD's fused kernel, on a GPU by one of
            Triton, unless SGD was asked for another implementation or given step hooks.

    Raises:
        TypeError, ValueError: for a value of another kind or out of its range, here, in a group or in a state that is loaded; for
            parameters of a dtype that it does not take.
        RuntimeError: in `step`, for a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LARS(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4))
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [layer.name for layer in optimizer.layer_stats()]
        ['0.0', '0.1']
    """

    ranges: ClassVar[dict[str, checks.Range]] = {
        "adapt": checks.FLAG,
        "trust_coef": checks.ABOVE_0,
        "weight_decay": checks.AT_LEAST_0,
    }
    """Of what a group has; its other keys are the wrapped optimizer's."""

    def __init__(self, optimizer: Optimizer, eps: float = 1e-8, trust_coef: float = 0.001, *, foreach: bool | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer={optimizer!r}: must be a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer: LBFGS evaluates the closure several times a step, which LARS cannot wrap")
        own = {"eps": eps, "trust_coef": trust_coef, "foreach": foreach}
        checks.check({"eps": checks.AT_LEAST_0, "foreach": checks.FLAG_OR_NONE} | self.ranges, own)
        self.__setstate__({"optim": optimizer, **own})
        self._check(optimizer.param_groups)
        check_dtypes("LARS", optimizer.param_groups, no_arithmetic)
        for group in optimizer.param_groups:
            self._complete(group)
        _warn_of_scale_free(optimizer)

    # Groups, state and defaults have one home, the wrapped optimizer, which replaces them when it loads a state. Hosts set them.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the wrapped optimizer; groups that are set are checked and completed."""
        return self.optim.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._check(groups)
        self.optim.param_groups = groups
        for group in groups:
            self._complete(group)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """That of the wrapped optimizer, by parameter."""
        return self.optim.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optim.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the wrapped optimizer, for groups that are added."""
        return self.optim.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optim.defaults = defaults

    def _update(self) -> list[LayerNorms]:
        taken: list[LayerNorms] = []
        if (engine := self._engine()) is not None:
            for group in self.param_groups:
                taken += self._sgd(engine, group)
        elif torch.compiler.is_compiling() and type(self.optim).__module__.startswith("torch.optim."):
            # The step of the class: its wrappers break the graph.
            self._inner_step(_Adapting(self, taken))
        else:
            self._adapt_then_step(taken)
        return taken

    def _trust_coef(self, group: dict[str, Any]) -> float | Tensor:
        """The trust coefficient in this step."""
        coef: float = group["trust_coef"]
        return coef

    def _numbers(self, group: dict[str, Any], decay: float, **sgd: Any) -> LarsNumbers:
        """What the rule takes of a group: its decay, which may be hidden, and what SGD takes where the step is SGD's."""
        return LarsNumbers(
            coef=self._trust_coef(group) if group["adapt"] else 1.0,
            eps=self.eps,
            max_norm=group.get("max_norm", math.inf),
            weight_decay=decay,
            maximize=group.get("maximize", False),
            adapt=group["adapt"],
            **sgd,
        )

    def _adapt(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], decay: float) -> list[LayerNorms]:
        """Replace gradients by the scaled, decayed ones, in place."""
        taken: list[LayerNorms] = []
        foreach, numbers = pick_foreach(self.foreach, params), self._numbers(group, decay)
        for batch in batches(params, grads):
            if numbers.adapt and foreach and not group.get("capturable") and gpu.takes(LARS_RULE, batch):
                taken += gpu.lars_scale(batch.columns, numbers)
                continue
            for piece in batch.pieces(foreach):
                taken += eager.adapt_gradients(LARS_RULE, piece, numbers)
        return taken

    def _adapt_then_step(self, taken: list[LayerNorms]) -> None:
        decays = [group.get("weight_decay", 0.0) for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                check_dense("LARS", param.grad)
                if 0 in param.grad.stride() and param.grad.numel() > 1:  # expanded: its elements share their memory
                    param.grad = param.grad.clone(memory_format=torch.contiguous_format)
            taken += self._adapt(group, params, [param.grad for param in params], decay)
        try:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if decay != 0:
                    group["weight_decay"] = 0.0
            self.optim.step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if decay != 0:
                    group["weight_decay"] = decay

    def _engine(self) -> Engine | None:
        """What has kernels that scale, decay and step a parameter at once: where the wrapped optimizer is torch's SGD."""
        optim = self.optim
        if type(optim) is not SGD or any(group["differentiable"] for group in optim.param_groups):
            return None
        if not torch.compiler.is_compiling() and _is_observed(optim):
            return None
        params = [param for group in optim.param_groups for param in group["params"] if param.grad is not None]
        if any(param.grad.layout != torch.strided for param in params if param.grad is not None):
            return None
        asked = [(group["fused"], group["foreach"]) for group in optim.param_groups]
        one_by_one = not self.foreach and all(fused or fused is foreach is None for fused, foreach in asked)
        at_once = self.foreach is not False and all(fused or foreach is not False for fused, foreach in asked)
        # None for what may be captured, so that the warm-up of a CUDA graph is what it captures.
        at_once = at_once and not any(group.get("capturable") for group in optim.param_groups)
        batch = Batch(params, [params, [param.grad for param in params]], None)  # a mixed one: no engine for SGD minds
        return pick(LARS_RULE, batch, one_by_one, at_once)

    def _sgd(self, engine: Engine, group: dict[str, Any]) -> list[LayerNorms]:
        """A step of torch.optim.SGD on the adapted gradients of a group."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        found: list[Tensor | None] = []
        self.optim._init_group(group, params, grads, found)  # type: ignore[attr-defined]
        if not params:
            return []
        fresh = [buffer is None for buffer in found]  # without momentum there are none
        buffers = [torch.zeros_like(param) if buffer is None else buffer for param, buffer in zip(params, found, strict=False)]
        if any(fresh) or not _go_together(params, buffers):
            # One that differs is from a checkpoint, say, loaded before the model was moved.
            laid = [
                buffer if _go_together([param], [buffer]) else torch.zeros_like(param).copy_(buffer)
                for param, buffer in zip(params, buffers, strict=False)
            ]
            for param, buffer in zip(params, laid, strict=False):
                self.state[param]["momentum_buffer"] = buffer
            buffers = laid
        sgd = {name: group[name] for name in ("lr", "momentum", "dampening", "nesterov")}
        numbers = self._numbers(group, group["weight_decay"], **sgd)
        return engine.step(LARS_RULE, Batch(params, [params, grads, buffers, fresh], None), numbers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self._check([param_group])
        self.optim.add_param_group(param_group)
        try:
            check_dtypes("LARS", self.param_groups[-1:], no_arithmetic)
        except TypeError:
            self.param_groups.pop()
            raise
        self._complete(self.param_groups[-1])

    def _check(self, groups: Iterable[Any]) -> None:
        """Raise for what a group must not have, before any is changed."""
        for group in groups:
            checks.check(self.ranges | (SGD_RANGES if isinstance(self.optim, SGD) else {}), group)
            if isinstance(group, Mapping) and group.get("lr") is not None:  # None is left to the wrapped optimizer
                checks.check({"lr": checks.LR}, group)

    def _complete(self, group: dict[str, Any]) -> None:
        group.setdefault("trust_coef", self.trust_coef)
        group.setdefault("adapt", True)

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped optimizer, each group with its ``"trust_coef"`` and ``"adapt"``."""
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of :meth:`state_dict`, or of the wrapped optimizer alone, which leaves what it does not have as it is."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        # The last of the hooks sees what is loaded.
        last = self.optim.register_load_state_dict_pre_hook(lambda optim, state: self._check(state["param_groups"]))
        try:
            self.optim.load_state_dict(state_dict)
        finally:
            last.remove()
        for group, before in zip(self.param_groups, own, strict=True):
            for key, value in before.items():
                group.setdefault(key, value)
            self._complete(group)

    # What is saved is the state of the wrapped optimizer, and so are the hooks on saving and loading.
    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.optim.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.optim.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.optim.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.optim.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        return {"optim": self.optim, "eps": self.eps, "trust_coef": self.trust_coef, "foreach": self.foreach}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optim: Optimizer = state["optim"]
        self.eps: float = state["eps"]
        self.trust_coef: float = state["trust_coef"]
        self.foreach: bool | None = state["foreach"]
        self._set_up()
        self._inner_step: Callable[[Any], Any] = inspect.unwrap(type(self.optim).step)
        # Brings to life what Optimizer.__init__ would (hooks, the profiled step), without groups of its own.
        super().__setstate__({})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optim!r}, eps={self.eps:g}, trust_coef={self.trust_coef:g})"


def _is_observed(optim: Optimizer) -> bool:
    """Whether somebody counts on the steps of a wrapped optimizer: its hooks, or a scheduler that wrapped its step."""
    return bool(optim._optimizer_step_pre_hooks or optim._optimizer_step_post_hooks or "step" in vars(optim))


def _go_together(params: list[Tensor], buffers: list[Tensor]) -> bool:
    """Whether the buffers, if there are any, are where and as their parameters are. Column by column, which is quick."""
    return not buffers or (
        [buffer.stride() for buffer in buffers] == [param.stride() for param in params]
        and [buffer.dtype for buffer in buffers] == [param.dtype for param in params]
        and [buffer.get_device() for buffer in buffers] == [param.get_device() for param in params]
    )


class _Adapting:
    """A wrapped optimizer of torch as its own step sees it while it is compiled: its gradients come scaled, and decayed already."""

    def __init__(self, lars: LARS, taken: list[LayerNorms]) -> None:
        self.lars = lars
        self.taken = taken
        self.param_groups = [{**group, "weight_decay": 0.0, "number": i} for i, group in enumerate(lars.optim.param_groups)]
        self.state = lars.optim.state

    def _init_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *rest: Any) -> Any:
        """Fill the lists as the optimizer itself does, then scale the gradients: clones, which the compiler never makes."""
        own = self.lars.optim.param_groups[group["number"]]
        found = self.lars.optim._init_group(own, params, grads, *rest)  # type: ignore[attr-defined]
        grads[:] = [grad.clone() for grad in grads]
        self.taken += self.lars._adapt(own, params, grads, own.get("weight_decay", 0.0))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lars.optim, name)


def _warn_of_scale_free(optimizer: Optimizer) -> None:
    """Say so where a scale of the gradient means nothing to an optimizer, or to what it wraps."""
    for inside in chain(optimizer):
        if (instead := scale_free(type(inside))) is not None:
            _logger.warning(
                "LARS around %s: a scale of the gradient means nothing to it, so trust ratios do next to nothing; "
                "autowu.optim.%s scales the update instead",
                type(inside).__name__,
                instead,
            )
            return

"""What the layer-wise optimizers share: the closure, groups and their states, the choice of an engine, stats of the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from autowu.optim import checks
from autowu.optim.batches import LayerNorms, batches
from autowu.optim.engines import cpu_loops, eager, pick
from autowu.optim.engines.gpu import is_capturing
from autowu.optim.rules import StepRule, step_device


class LayerStats(NamedTuple):
    """What an optimizer did to one parameter in its last step."""

    name: str
    """Its name if the optimizer was given names (:func:`~autowu.optim.param_groups` gives them), else ``"group.index"``."""
    weight_norm: float
    """Norm of the parameter before the step."""
    grad_norm: float
    """Norm of the gradient (LARS, TVLARS), or of the update with its decay, which takes the gradient's place (all others)."""
    trust_ratio: float
    """What the gradient, or the update, was multiplied by."""


class Layerwise(Optimizer):
    """An optimizer that scales what it does to a parameter by a trust ratio."""

    @overload
    def step(self, closure: None = ...) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, before the norms are taken.
        """
        self._begin_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._last["norms"] = self._update()
        self._end_step()
        return loss

    def layer_stats(self) -> list[LayerStats]:
        """Norms and trust ratio in the last step, for every adapted parameter that had a gradient.

        Waits for the device, once. Empty before the first step.
        """
        return _layer_stats(self.param_groups, self._last["norms"])

    def _begin_step(self) -> None:
        """Called first in a step."""

    def _update(self) -> list[LayerNorms]:
        """Step the parameters."""
        raise NotImplementedError

    def _end_step(self) -> None:
        """Called once the parameters are stepped."""

    def _set_up(self) -> None:
        """Called where an optimizer is made, copied or unpickled: what is not saved is made."""
        cpu_loops.register()
        self._last: dict[str, list[LayerNorms]] = {"norms": []}  # in a dict: a compiled step sets no attributes


class TrustScaled(Layerwise):
    """A layer-wise optimizer that is rules with a state of their own: an update, scaled by the norm of the weights over its own."""

    rules: ClassVar[tuple[StepRule[Any], ...]]
    """Each steps the parameters that it takes of those that the ones before it leave; the last all that are left."""
    ranges: ClassVar[dict[str, checks.Range]] = {
        "adapt": checks.FLAG,
        "lr": checks.LR,
        "betas": checks.BETAS,
        "eps": checks.ABOVE_0,
        "weight_decay": checks.AT_LEAST_0,
        "max_trust_ratio": checks.ABOVE_0_OR_INF,
        "momentum": checks.BELOW_1,
        "bias_correction": checks.FLAG,
        "capturable": checks.FLAG,
        "foreach": checks.FLAG_OR_NONE,
    }
    """Of what a group may have."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._set_up()
        checks.check(self.ranges, defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not set is as in the constructor."""
        self._check(param_group)
        super().add_param_group(param_group)
        try:
            check_dtypes(type(self).__name__, self.param_groups[-1:], self.refusal)
        except TypeError:
            self.param_groups.pop()
            raise

    def refusal(self, param: Tensor, group: dict[str, Any]) -> str | None:
        """Why a parameter of a group cannot be stepped, if so."""
        if param.dtype.is_complex:
            return "a complex parameter; Adam's second moment of one is not defined here"
        return no_arithmetic(param, group)

    def _check(self, group: Any) -> None:
        """Raise for what a group must not have; keys that are others' may mean anything."""
        checks.check({name: self.ranges[name] for name in self.defaults if name in self.ranges}, group)

    def _begin_step(self) -> None:
        check_capture(type(self).__name__, self.param_groups)

    def _update(self) -> list[LayerNorms]:
        taken: list[LayerNorms] = []
        for group in self.param_groups:
            for number, rule in enumerate(self.rules):
                columns: list[list[Any]] = [[] for _ in range(2 + len(rule.keys))]
                self._init_group(group, number, *columns)
                numbers = rule.numbers(group)
                foreach = pick_foreach(group["foreach"], columns[0])
                for batch in batches(*columns):
                    engine = pick(rule, batch, one_by_one=not foreach, at_once=foreach and not group["capturable"])
                    if engine is not None:
                        taken += engine.step(rule, batch, numbers)
                        continue
                    for piece in batch.pieces(foreach):
                        taken += eager.step(rule, piece, numbers)
        return taken

    def _init_group(self, group: dict[str, Any], number: int, *columns: list[Any]) -> None:
        """Fill the columns of a rule, given by its number: what has a gradient, and its state, made where it is not there yet.

        Torch's compiler knows it by its name and arguments, and calls it in place of tracing it.
        """
        name, rule = type(self).__name__, self.rules[number]
        params = [param for param in self._stepped_by(number, group) if param.grad is not None]
        states = []
        for param in params:
            check_dense(name, param.grad)  # type: ignore[arg-type]
            if param.is_complex():
                raise RuntimeError(f"{name}: a complex parameter; Adam's second moment of one is not defined here")
            state = self.state[param]
            if rule.keys[0] not in state:
                state.update(rule.init(param, group))
            states.append(state)
        columns[0].extend(params)
        columns[1].extend([param.grad for param in params])
        for key, column in zip(rule.keys, columns[2:], strict=True):
            column.extend([state[key] for state in states])

    def _stepped_by(self, number: int, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group that a rule steps."""
        params: list[Tensor] = group["params"]
        for other in self.rules[:number]:
            params = [param for param in params if not other.takes(param, group)]
        is_last = number == len(self.rules) - 1
        return params if is_last else [param for param in params if self.rules[number].takes(param, group)]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.defaults: dict[str, Any] = state.get("defaults") or self.defaults
        for group in state["param_groups"]:  # of a state that is loaded, before any of it is
            self._check(group)
        super().__setstate__(state)
        self._set_up()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            for param in group["params"]:  # a checkpoint may have been read to the host
                if "step" in (own := self.state.get(param, {})):
                    own["step"] = own["step"].to(step_device(group, param))


def _layer_stats(groups: Iterable[dict[str, Any]], taken: Sequence[LayerNorms]) -> list[LayerStats]:
    """Names and values of what a step has left behind, in the order of the groups."""
    values: dict[Tensor, list[float]] = {}
    by_device: dict[torch.device, list[LayerNorms]] = {}
    for norms in taken:
        if isinstance(norms.values, Tensor):
            by_device.setdefault(norms.values.device, []).append(norms)
        else:
            values[norms.params[0]] = list(norms.values)
    for several in by_device.values():  # one copy to the host a device
        columns = torch.cat([n.values for n in several if isinstance(n.values, Tensor)], dim=1).T.tolist()
        values.update(zip((param for n in several for param in n.params), columns, strict=True))
    return [
        LayerStats(group["param_names"][i] if "param_names" in group else f"{number}.{i}", *values[param])
        for number, group in enumerate(groups)
        for i, param in enumerate(group["params"])
        if param in values
    ]


def check_dtypes(name: str, groups: Iterable[dict[str, Any]], refusal: Callable[[Tensor, dict[str, Any]], str | None]) -> None:
    """Raise TypeError for a parameter of a dtype that an optimizer does not take."""
    for group in groups:
        for param in group["params"]:
            if (why := refusal(param, group)) is not None:
                raise TypeError(f"params: {name}: {why}")


def no_arithmetic(param: Tensor, group: dict[str, Any]) -> str | None:
    """Why a parameter cannot be stepped by any optimizer: torch does not calculate with floating-point numbers of 8 bits."""
    return f"a parameter of {param.dtype}; take bfloat16 or better" if param.dtype.itemsize == 1 else None


def check_dense(name: str, grad: Tensor) -> None:
    """Raise RuntimeError for a sparse gradient."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name}: a gradient of layout {grad.layout}; only dense gradients have a trust ratio")


def check_capture(name: str, groups: Iterable[dict[str, Any]]) -> None:
    """Raise RuntimeError where a CUDA graph would freeze what the host counts."""
    if is_capturing() and not all(group["capturable"] for group in groups):
        raise RuntimeError(f"{name}: a step in a CUDA graph needs capturable=True, and the LR as a tensor")


def pick_foreach(foreach: bool | None, params: Sequence[Tensor]) -> bool:
    """What is asked for; if nothing is, multi-tensor operations everywhere but on the CPU, where they only cost cache."""
    return foreach if foreach is not None else not all(param.device.type == "cpu" for param in params)

"""TVLARS: LARS whose trust coefficient falls along a sigmoid of time (Do et al. 2023, arXiv 2309.14053)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from autowu.optim import checks
from autowu.optim.lars import LARS, SGD_RANGES
from autowu.optim.layerwise import check_capture

__all__ = ["TVLARS"]


class TVLARS(LARS):
    r"""SGD with momentum on gradients scaled by a trust ratio that starts high and decays, in place of a warm-up.

    The step t (0 at the first) of a parameter w with gradient g and weight decay :math:`\lambda` takes

    .. math::
        \text{eta} \left( \frac{1}{\text{alpha} + e^{\text{lmbda} (t - \text{delay})}} + \text{gamma\_min} \right)
        \frac{\|w\|}{\|g\| + \lambda \|w\| + \text{eps}} \; (g + \lambda w)

    for its gradient: LARS with a trust coefficient that falls along a sigmoid of time. In units of eta, and gamma_min aside, it is
    1 / alpha as long as lmbda * (delay - t) is large, 1 / (alpha + 1) at step `delay`, and 0 in the end; with a delay of 0 or less
    it begins at 1 / (alpha + 1) or below.
    Norms of 0, groups with ``"adapt": False`` (whose gradients are taken as they are), sharding, compilation and
    :meth:`layer_stats` are as in :class:`~autowu.optim.LARS`. The step count is kept in every group as ``"step"`` and saved with
    it. A scheduler of the LR multiplies on top; ``lmbda=0`` is LARS with a trust coefficient that stays.

    :meth:`reference` has the values of the code that the authors published.

    Args:
        params: parameters or groups, named or not.
        lr: the learning rate, a float or a tensor, 0 or more.
        momentum: of SGD, 0 or more.
        eta: the trust coefficient, above 0.
        lmbda: how fast the sigmoid falls, per step, 0 or more.
        alpha: bounds the factor at 1 / alpha + gamma_min, above 0.
        delay: the step in whose neighbourhood it falls, in steps.
        gamma_min: what is left of the factor in the end, 0 or more.
        weight_decay: :math:`\lambda`, 0 or more.
        nesterov: whether SGD looks ahead; needs momentum.
        eps: added to the denominator, 0 or more.
        max_norm: the norms in the ratio count as this at most, above 0.
        capturable: keep the step count on the device, for CUDA graphs.
        foreach: see :class:`~autowu.optim.LARS`.

    Raises:
        TypeError, ValueError: for a value of another kind or out of its range, here, in a group or in a state that is loaded; for
            parameters of a dtype that it does not take.
        RuntimeError: in `step`, for a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = TVLARS(model.parameters(), lr=1.0, lmbda=0.01, delay=100)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> int(optimizer.param_groups[0]["step"])
        1
    """

    ranges: ClassVar[dict[str, checks.Range]] = LARS.ranges | {
        "lmbda": checks.AT_LEAST_0,
        "alpha": checks.ABOVE_0,
        "delay": checks.FINITE,
        "gamma_min": checks.AT_LEAST_0,
        "max_norm": checks.ABOVE_0_OR_INF,
        "capturable": checks.FLAG,
        "step": checks.STEP,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        eta: float = 0.001,
        lmbda: float = 1e-3,
        alpha: float = 1.0,
        delay: float = 0.0,
        gamma_min: float = 1e-3,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        max_norm: float = math.inf,
        capturable: bool = False,
        foreach: bool | None = None,
    ) -> None:
        own: dict[str, Any] = {"lmbda": lmbda, "alpha": alpha, "delay": delay, "gamma_min": gamma_min, "max_norm": max_norm}
        own["capturable"] = capturable
        sgds: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        checks.check(self.ranges | SGD_RANGES | {"eta": checks.ABOVE_0}, {**own, **sgds, "eta": eta})
        sgd = SGD(params, **sgds, foreach=foreach)
        sgd.defaults.update(own)
        super().__init__(sgd, eps, eta, foreach=foreach)

    @classmethod
    def reference(cls, params: ParamsT, lr: float | Tensor, **others: Any) -> TVLARS:
        """With the values of the code that the authors published, which are not those of their paper.

        There alpha is 0.1, so that the factor begins near 1 / 1.1 and may rise to 10 with a delay; the delay is -1, so that it
        falls from the first step; and both norms count as 10 at most, which the paper does not mention. There is no warm-up.

        Args:
            params, lr, others: as for the class; what is given replaces the value of the preset.
        """
        return cls(params, lr, **{"alpha": 0.1, "delay": -1.0, "max_norm": 10.0, **others})

    def _complete(self, group: dict[str, Any]) -> None:
        for name in ("lmbda", "alpha", "delay", "gamma_min", "max_norm", "capturable"):
            group.setdefault(name, self.defaults[name])
        if "step" not in group:  # a group added later joins in the time of the others
            group["step"] = next(
                (other["step"].clone() for other in self.param_groups if "step" in other), torch.zeros((), dtype=torch.float32)
            )
        group["step"] = group["step"].to(group["params"][0].device if group["capturable"] and group["params"] else "cpu")
        super()._complete(group)

    def _begin_step(self) -> None:
        check_capture("TVLARS", self.param_groups)

    def _end_step(self) -> None:
        for group in self.param_groups:
            lr = group["lr"]
            # A step at an LR of 0 is none: torch.distributed.checkpoint takes one to make the state that it then loads.
            if torch.compiler.is_compiling() or (isinstance(lr, Tensor) and not lr.is_cpu) or lr != 0:
                group["step"] += 1

    def _trust_coef(self, group: dict[str, Any]) -> float | Tensor:  # a tensor where the count may not be read
        step: Tensor = group["step"]
        if not group["capturable"] and not torch.compiler.is_compiling():
            exponent = group["lmbda"] * (step.item() - group["delay"])
            sigmoid = 1 / (group["alpha"] + math.exp(exponent)) if exponent < 700 else 0.0
        else:
            sigmoid = 1 / (group["alpha"] + torch.exp(group["lmbda"] * (step - group["delay"])))
        coef: float | Tensor = group["trust_coef"] * (sigmoid + group["gamma_min"])
        return coef

"""LANS: LAMB on normalised gradients, with Nesterov's look ahead (Zheng et al. 2020, arXiv 2006.13484, algorithm 2)."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from autowu.optim.batches import Batch, wide
from autowu.optim.engines.eager import scale_
from autowu.optim.layerwise import TrustScaled
from autowu.optim.rules import ADAMW_RULE, Direction, Lamb, LambNumbers, StepRule, adam_roots, correct_firsts_, decayed_

__all__ = ["LANS"]

_NO_FLOAT16: Final = "float16 weights; squares of normalised gradients underflow there, take float32 or bfloat16"


class Lans(Lamb):
    """The rule: two directions of one step, one of the momentum and one of the gradient, each scaled for itself."""

    name = "lans"

    def takes(self, param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["adapt"])

    def update(self, piece: Batch, numbers: LambNumbers) -> list[Direction]:
        weights, grads, firsts, seconds, steps = piece.columns
        if weights[0].dtype == torch.float16:
            raise RuntimeError(f"LANS: {_NO_FLOAT16}")
        norms, units = piece.norms(grads, wide(grads[0])), [grad.clone() for grad in grads]
        scales = torch.where(norms > torch.finfo(torch.float32).tiny, 1 / norms, 1.0)
        scale_(units, scales)
        torch._foreach_add_(steps, 1)
        counts = torch.stack(steps).to(norms.dtype) if numbers.bias_correction else None
        roots = adam_roots(units, firsts, seconds, counts, numbers)
        of_gradient = list(torch._foreach_neg(torch._foreach_div(units, roots)))
        correct_firsts_(roots, counts, numbers)
        of_momentum = list(torch._foreach_neg(torch._foreach_div(firsts, roots)))
        shares = ((of_momentum, numbers.beta1), (of_gradient, 1 - numbers.beta1))
        return [Direction(decayed_(updates, weights, numbers.weight_decay), share) for updates, share in shares]


class LANS(TrustScaled):
    r"""LAMB for batches larger still: the gradient of every parameter is normalised, and the step looks ahead.

    Adam's bias-corrected moments :math:`\hat m, \hat v` are those of :math:`\tilde g = g / \|g\|`, of each parameter's own norm. A
    parameter w with the weight decay :math:`\lambda` takes

    .. math::
        w \leftarrow w - \text{lr} \left( \beta_1 \, \rho(u) \, u + (1 - \beta_1) \, \rho(c) \, c \right), \qquad
        u = \frac{\hat m}{\sqrt{\hat v} + \text{eps}} + \lambda w, \qquad
        c = \frac{\tilde g}{\sqrt{\hat v} + \text{eps}} + \lambda w

    with :math:`\rho(u) = \min(\|w\| / \|u\|, \text{max\_trust\_ratio})`, 1 where a norm is 0. A gradient of norm 0 is taken as it
    is. Groups with ``"adapt": False`` are stepped by AdamW, on their gradients as they are. Everything else is as in
    :class:`~autowu.optim.LAMB`, whose states it takes. :meth:`layer_stats` are those of the momentum's part u.

    Args:
        params: parameters or groups, named or not.
        lr: the learning rate, a float or a tensor, 0 or more: the relative change of the adapted parameters in a step.
        betas: decay of the moments, in [0, 1); the first is the momentum's share of the step, too.
        eps: added to the denominator, above 0.
        weight_decay: :math:`\lambda`, 0 or more.
        max_trust_ratio: the ratios are at most this, above 0.
        capturable, foreach: see :class:`~autowu.optim.LAMB`.

    Raises:
        TypeError, ValueError: for a value of another kind or out of its range, here, in a group or in a state that is loaded; for
            parameters of a dtype that it does not take.
        RuntimeError: in `step`, for a sparse gradient, and for weights that became float16 later.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LANS(model.parameters(), lr=0.01, weight_decay=0.01)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rules: ClassVar[tuple[StepRule[Any], ...]] = (Lans(), ADAMW_RULE)

    def refusal(self, param: Tensor, group: dict[str, Any]) -> str | None:
        return _NO_FLOAT16 if param.dtype == torch.float16 and group["adapt"] else super().refusal(param, group)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_trust_ratio: float = 10.0,
        capturable: bool = False,
        foreach: bool | None = None,
    ) -> None:
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_trust_ratio": max_trust_ratio}
        super().__init__(params, {**values, "adapt": True, "capturable": capturable, "foreach": foreach})

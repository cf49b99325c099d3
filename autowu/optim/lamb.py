"""LAMB: layer-wise adaptive moments for large batches (You et al. 2020, arXiv 1904.00962, algorithm 2)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from autowu.optim.layerwise import TrustScaled
from autowu.optim.rules import LAMB_RULE, StepRule

__all__ = ["LAMB"]


class LAMB(TrustScaled):
    r"""AdamW whose update of every parameter is scaled to the norm of the parameter.

    With Adam's bias-corrected moments :math:`\hat m, \hat v` of a parameter w, and its weight decay :math:`\lambda`, the step is

    .. math::
        u = \frac{\hat m}{\sqrt{\hat v} + \text{eps}} + \lambda w, \qquad
        w \leftarrow w - \text{lr} \, \min\left(\frac{\|w\|}{\|u\|}, \text{max\_trust\_ratio}\right) u

    with the ratio 1 where :math:`\|w\|` or :math:`\|u\|` is 0, and in groups with ``"adapt": False``, as is usual for norms and
    biases (:func:`~autowu.optim.param_groups`): there LAMB is AdamW. The paper leaves the scaling function of the norm open; here
    the ratio itself is clamped, and ``math.inf`` takes the clamp away. Norms are computed in float32 or better, those of sharded
    parameters (DTensor, FSDP2; torch 2.5 or later) over all shards, and nothing waits for the device but the first step on a GPU
    with parameters of a dtype, which tries the kernels.

    ``torch.compile(optimizer.step)``, of torch 2.6 or later, traces one graph, on the CPU of one operator for each group; let the
    LR be a tensor, or every new LR compiles anew.

    Args:
        params: parameters or groups, named or not.
        lr: the learning rate, a float or a tensor, 0 or more: the relative change of the adapted parameters in a step.
        betas: decay of the moments, in [0, 1).
        eps: added to the denominator, above 0.
        weight_decay: :math:`\lambda`, 0 or more.
        max_trust_ratio: the ratio is at most this, above 0.
        bias_correction: correct the moments for starting from 0; False is the paper's variant for a warm-up.
        capturable: keep the step counts on the device, for CUDA graphs.
        foreach: update all parameters of a device at a time (True) or one after the other (False). By default the former, on the
            CPU the latter.

    Raises:
        TypeError, ValueError: for a value of another kind or out of its range, here, in a group or in a state that is loaded; for
            parameters of a dtype that it does not take.
        RuntimeError: in `step`, for a sparse gradient.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LAMB(model.parameters(), lr=0.01, weight_decay=0.01)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rules: ClassVar[tuple[StepRule[Any], ...]] = (LAMB_RULE,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_trust_ratio: float = 10.0,
        bias_correction: bool = True,
        capturable: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_trust_ratio": max_trust_ratio,
            "bias_correction": bias_correction,
            "adapt": True,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": False,
        }
        super().__init__(params, defaults)

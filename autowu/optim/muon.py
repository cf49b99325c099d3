"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), its update scaled as LAMB scales Adam's."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from autowu.optim.batches import Batch, wide
from autowu.optim.layerwise import TrustScaled
from autowu.optim.rules import ADAMW_RULE, Direction, StepRule, decayed_

__all__ = ["Muon"]


class MuonNumbers(NamedTuple):
    """What Muon takes beside tensors."""

    lr: float | Tensor
    momentum: float
    weight_decay: float
    max_trust_ratio: float
    adapt: bool


class MuonRule(StepRule[MuonNumbers]):
    """The rule: momentum, made orthogonal, and the decay."""

    name, kind, keys = "muon", MuonNumbers, ("momentum_buffer",)

    def takes(self, param: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["adapt"]) and param.ndim >= 2

    def update(self, piece: Batch, numbers: MuonNumbers) -> list[Direction]:
        weights, grads, buffers = piece.columns
        torch._foreach_lerp_(buffers, grads, 1 - numbers.momentum)
        made = piece.wholly(orthogonal, torch._foreach_lerp(grads, buffers, numbers.momentum))
        return [Direction(decayed_([-update.to(buffers[0].dtype) for update in made], weights, numbers.weight_decay))]


def orthogonal(tensor: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest matrix with singular values of 1, in bfloat16; kernels count as (out, rest)."""
    near, tall = (flat := tensor.flatten(1)).bfloat16(), flat.size(0) > flat.size(1)
    near = (near.T if tall else near) / torch.linalg.vector_norm(near, dtype=wide(near)).clamp(min=1e-7).to(near.dtype)
    for _ in range(5):  # of the odd polynomial with the coefficients 3.4445, -4.775, 2.0315
        gram = near @ near.T
        near = torch.addmm(near, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), near, beta=3.4445)
    return (near.T if tall else near).reshape(tensor.shape)


class Muon(TrustScaled):
    r"""Muon whose update of every matrix is scaled to the norm of the matrix; AdamW for all other parameters.

    The momentum :math:`b \leftarrow \mu b + (1 - \mu) g` of a matrix w is made orthogonal (NS), as by ``torch.optim.Muon``:

    .. math::
        u = \mathrm{NS}\left(\mu b + (1 - \mu) g\right) + \lambda w, \qquad
        w \leftarrow w - \text{lr} \, \min\left(\frac{\|w\|}{\|u\|}, \text{max\_trust\_ratio}\right) u

    The ratio is 1 where a norm is 0. Kernels of convolutions count as matrices (out, rest). AdamW steps biases, and groups with
    ``"adapt": False``: put embeddings and the output head there, which Muon's authors leave to AdamW. All else is as in LAMB.

    Args:
        params: parameters or groups, named or not.
        lr: the learning rate, a float or a tensor, 0 or more: the relative change of a matrix in a step, and AdamW's LR.
        momentum, weight_decay: :math:`\mu` in [0, 1), :math:`\lambda` of 0 or more.
        betas, eps (both for AdamW), max_trust_ratio (no cap by default), capturable, foreach: see :class:`~autowu.optim.LAMB`.

    Raises:
        TypeError, ValueError: for a value of another kind or out of its range, here, in a group or in a state that is loaded; for
            parameters of a dtype that it does not take.
        RuntimeError: in `step`, for a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Muon(model.parameters(), lr=0.01, weight_decay=0.01)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rules: ClassVar[tuple[StepRule[Any], ...]] = (MuonRule(), ADAMW_RULE)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_trust_ratio: float = math.inf,
        capturable: bool = False,
        foreach: bool | None = None,
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps, "adapt": True}
        super().__init__(params, {**own, "max_trust_ratio": max_trust_ratio, "capturable": capturable, "foreach": foreach})

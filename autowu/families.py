"""What AutoWU takes for an optimizer where it is not told: the LR range of its warm-up, and the peak LR."""

from __future__ import annotations

import math
from typing import Final

from torch.optim import Optimizer

from autowu.kin import chain, family_of, wrapped_optimizer

__all__ = ["LR_RANGES", "family", "lr_range", "peak_factor", "peak_lag", "wrapped_optimizer"]

LR_RANGES: Final[dict[str, tuple[float, float]]] = {
    "sgd": (1e-4, 10.0),
    "adam": (1e-5, 1.0),
    "lars": (1e-2, 100.0),
    "lamb": (1e-4, 1.0),
    "unknown": (1e-5, 10.0),
}
"""`min_lr` and `max_lr` of a warm-up where none are given. They bracket the LRs in use with some decades to spare on both sides, so
that the loss is flat at the one end and rises at the other; "lars" is for the usual `trust_coef` of 0.001."""

_PEAK_FACTORS: Final = {"lamb": 0.1}
_PEAK_FACTOR: Final = 0.4
_LONG: Final = 2000
"""Steps of a run from which on the peak factor of SGD grows in proportion to them."""
_MORE_AT_MOST: Final = 2.0
_LAYERWISE: Final = ("lars", "lamb")


def family(optimizer: Optimizer) -> str:
    """Key of :data:`LR_RANGES` for an optimizer, by the names of its class and of the classes that it derives from.

    A wrapper, such as SAM or timm's Lookahead, counts as what it wraps, which takes the steps. LARS counts as itself, but for one
    around an Adam-like optimizer: Adam undoes any factor on the gradient, so its updates keep Adam's size.

    Example:
        >>> import torch
        >>> family(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
        'adam'
    """
    found = "unknown"
    for each in reversed(chain(optimizer)):
        own = family_of(type(each))
        if own is not None and (found == "unknown" or (own in _LAYERWISE and found != "adam")):
            found = own
    return found


def lr_range(optimizer: Optimizer) -> tuple[float, float]:
    """`min_lr` and `max_lr` for an optimizer, see :data:`LR_RANGES`."""
    return LR_RANGES[family(optimizer)]


def peak_factor(optimizer: Optimizer, steps: float | None = None) -> float:
    """The peak LR for an optimizer, as a share of the LR at the far edge of the loss's valley: 0.1 for LAMB, 0.4 for all others.

    The loss of a warm-up is low until a little short of where training comes apart; the best peak lies below. In a long run it is
    the noise of SGD that ends the valley, which the cooldown takes away: there the share grows with the steps from 2,000 on, to 0.8
    from 4,000 on. Measured.

    Args:
        optimizer: for which.
        steps: of the run, None where they are not known.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        >>> peak_factor(sgd), peak_factor(sgd, 1000), peak_factor(sgd, 100_000)
        (0.4, 0.4, 0.8)
    """
    own = family(optimizer)
    more = min(max(steps / _LONG, 1.0), _MORE_AT_MOST) if own == "sgd" and steps is not None else 1.0
    return _PEAK_FACTORS.get(own, _PEAK_FACTOR) * more


def peak_lag(optimizer: Optimizer) -> float:
    r"""By how many steps the loss of a warm-up lags behind its LR: about the mean age of the gradients in an optimizer's step.

    That is :math:`\beta / (1 - \beta)` for the momentum :math:`\beta` of the first group. What the weights do at the minimum was
    set off that much earlier, at a lower LR; in a short warm-up at a much lower one. 0 for LARS and LAMB, where nothing was gained
    by it.

    Example:
        >>> import torch
        >>> peak_lag(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], momentum=0.75))
        3.0
    """
    if family(optimizer) in _LAYERWISE:
        return 0.0
    for each in chain(optimizer):
        for group in each.param_groups[:1]:
            if momentum := float(group["betas"][0] if group.get("betas") else group.get("momentum") or 0.0):
                return momentum / (1 - momentum) if momentum < 1 else math.inf
    return 0.0

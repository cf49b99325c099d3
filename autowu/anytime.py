"""An average of the weights that can be tested at any time, without a cooldown."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from autowu.checks import fraction
from autowu.scheduler import AutoWU

__all__ = ["AnytimeAverage"]

_GOES_BACK: Final = ("divergence", "overfitting")
"""Kinds of events at which a run goes back to a copy, after the switch."""


class AnytimeAverage(AveragedModel):
    r"""Average of a model's weights over the last part of the constant phase, however long that has become.

    After n steps of it the weights of the k-th count in proportion to :math:`(k / n)^p`: a moving average whose span grows with the
    run, so that no end need be known. It is torch's :class:`~torch.optim.swa_utils.AveragedModel`: call it, save it, load it as
    that. Statistics of batch norm are not those of the averaged weights; before a test compute them with
    ``torch.optim.swa_utils.update_bn(loader, average)``.

    Args:
        model: what is trained; it is copied.
        share: of the constant phase that is averaged over, in (0, 1): the mean age of what is averaged is half as much.
            p = 2 / share - 2.

    Raises:
        TypeError, ValueError: if `share` is no number in its range.

    Example:
        >>> from autowu import AutoWU
        >>> from autowu.anytime import AnytimeAverage
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scheduler, average = AutoWU(optimizer, model=model, max_warmup_steps=40), AnytimeAverage(model)
        >>> for x in torch.randn(100, 8, 4):
        ...     loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     scheduler.step(loss)
        ...     average.update(model, scheduler)
        >>> average(torch.randn(8, 4)).shape
        torch.Size([8, 1])
    """

    def __init__(self, model: nn.Module, share: float = 0.2) -> None:
        self.power: float = 2 / fraction("share", share) - 2

        def average(averaged: Any, new: Any, number: Any) -> None:
            weight = (self.power + 1) / (float(number) + self.power + 1)
            torch._foreach_lerp_(averaged, new, weight)

        super().__init__(model, multi_avg_fn=torch.no_grad()(average))
        self._gone_back: int | None = None

    def update(self, model: nn.Module, scheduler: AutoWU) -> None:
        """Take in the weights of a step, after ``scheduler.step``; in a warm-up begin anew, in the cooldown stay as it is.

        It begins anew, too, where the run has gone back, for what it averaged are weights that are no longer there.

        Args:
            model: what is trained.
            scheduler: of its run.
        """
        gone_back = sum(event.kind in _GOES_BACK for event in scheduler.events)
        if self._gone_back not in (None, gone_back):
            self.n_averaged.zero_()
        self._gone_back = gone_back
        if scheduler.phase in ("warmup", "stable") and not scheduler.in_ramp:
            self.update_parameters(model)
        if scheduler.phase == "warmup":
            self.n_averaged.zero_()  # the next one is the first

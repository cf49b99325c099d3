"""AutoWU behind the methods by which timm's training script drives its schedulers, and the optimizers under timm's names."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from autowu.optim import LAMB, LARS, TVLARS
from autowu.scheduler import AutoWU

__all__ = ["AutoWUScheduler", "register_optimizers"]

_logger = logging.getLogger("autowu")


class AutoWUScheduler:
    """Follows the protocol of timm's schedulers around an :class:`~autowu.scheduler.AutoWU`.

    timm's script calls :meth:`step_update` after every update with the number of updates since the start of the run and the mean
    loss since the start of the epoch, and :meth:`step` at the end of every epoch. The loss of an update is recovered from the
    successive means. The mean must be updated at every update, with equal weights: a last accumulation of an epoch that is shorter
    than the others pulls that one loss towards the mean. A loss that is not finite leaves none to recover until the epoch ends.

    It is no subclass of timm's ``Scheduler``, whose constructor writes LRs of its own and whose noise and LR by epoch have no
    meaning here; timm asks for the methods only.

    Args:
        scheduler: the AutoWU, over all updates of the run.
        metric: what :meth:`step_update` is passed, "running_mean" or "loss", the loss of the update itself.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> lr_scheduler = AutoWUScheduler(AutoWU(optimizer, steps_per_epoch=10, total_epochs=20))
        >>> num_updates = 0
        >>> for epoch in range(20):
        ...     losses = []
        ...     for x in torch.randn(10, 8, 4):
        ...         loss = model(x).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         losses.append(loss.item())
        ...         num_updates += 1
        ...         lr_scheduler.step_update(num_updates, metric=sum(losses) / len(losses))
        ...     lr_scheduler.step(epoch + 1)
        >>> lr_scheduler.scheduler.phase
        'done'

    Attributes:
        scheduler: the AutoWU.
        num_updates: updates since the start of the run. Those whose optimizer step a GradScaler skipped are among them; AutoWU does
            not count them.
    """

    def __init__(self, scheduler: AutoWU, metric: str = "running_mean") -> None:
        if not isinstance(scheduler, AutoWU):
            raise TypeError(f"scheduler={scheduler!r}: must be an AutoWU")
        if metric not in ("running_mean", "loss"):
            raise ValueError(f"metric={metric!r}: must be 'running_mean' or 'loss'")
        self.scheduler = scheduler
        self.metric = metric
        self.num_updates: int = 0
        self._count = 0  # updates since the epoch began
        self._known = 0  # as many of them are in the last mean that was passed,
        self._sum: float | Tensor = 0.0  # and this is the sum of their losses

    @property
    def optimizer(self) -> Optimizer:
        """The one whose LRs are set."""
        return self.scheduler.optimizer

    def step(self, epoch: int, metric: float | Tensor | None = None) -> None:
        """Begin a new mean at the end of an epoch. Takes timm's arguments, the next epoch and an eval metric, and needs neither."""
        self._begin_epoch()

    def step_update(self, num_updates: int, metric: float | Tensor | None = None) -> None:
        """Record the loss of the update just made and set the LR of the next one.

        Args:
            num_updates: updates made since the start of the run, this one included. The number of the call before does nothing:
                timm's script calls so when it resumes.
            metric: the mean loss since the start of the epoch, or the loss of the update; a float or a tensor of one element, which
                is not waited for. None is a missing loss; the next mean then gives the mean loss of the updates since the last one.

        Raises:
            ValueError: if `num_updates` is not the next number, or `metric` has several elements.
            TypeError: if `metric` is not a number.
        """
        if num_updates == self.num_updates:
            return
        if num_updates != self.num_updates + 1:
            raise ValueError(
                f"num_updates={num_updates}: must be {self.num_updates + 1}, one call for each update; "
                "to resume a run load the scheduler's state of that update first"
            )
        count = self._count + 1
        if self.metric == "loss" or metric is None:
            self.scheduler.step(metric)
        else:
            total = count * _double(metric)
            self.scheduler.step((total - self._sum) / (count - self._known))
            self._known, self._sum = count, total
        self._count = count
        self.num_updates = num_updates

    def get_last_lr(self) -> list[float | Tensor]:
        """LR of the coming update for each parameter group."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """AutoWU's state and the number of updates, loadable with ``torch.load(weights_only=True)``.

        The mean is no part of it: a resumed run begins an epoch, or at least a mean, anew.
        """
        return {"num_updates": self.num_updates, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the run stood that `state_dict` was taken of, and set the LRs."""
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.num_updates = state_dict["num_updates"]
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._count = self._known = 0
        self._sum = 0.0


def _double(metric: Any) -> float | Tensor:
    """`metric` in the best precision that its device has."""
    if isinstance(metric, Tensor):
        return metric.detach().to(torch.float32 if metric.device.type == "mps" else torch.float64)
    if isinstance(metric, numbers.Real):
        return float(metric)
    raise TypeError(f"metric={metric!r}: must be a float, a tensor of one element or None")


def register_optimizers() -> None:
    """Have timm build the optimizers of :mod:`autowu.optim` under the names "lars", "lamb" and "tvlars".

    It holds for all of the process from then on: for ``timm.optim.create_optimizer_v2``, for ``--opt`` of scripts that use it,
    and with timm's prefix "lookahead\\_". What was built before stays as it is. timm's own are built under "timmlars" and
    "timmlamb" instead; its other variants ("larc", "nlars", "lambc" and so on) are not touched. timm logs a warning for each of
    the two names that is taken over. Another call does nothing.

    A parameter group without ``"adapt"`` of its own is adapted where it has weight decay, which is timm's convention: in
    ``create_optimizer_v2(model, weight_decay=0)`` no group is, and a warning is logged. ``always_adapt=True`` adapts them all.

    The arguments are those of our classes. "lars" is :class:`~autowu.optim.LARS` around ``torch.optim.SGD``; it takes the
    arguments of both, and timm's name ``trust_coeff``.

    Example::

        register_optimizers()
        optimizer = timm.optim.create_optimizer_v2(model, opt="lars", lr=1.0, weight_decay=5e-5)
    """
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry

    ours = (
        OptimInfo(
            name="lars", opt_class=_lars, description="LARS of autowu, around SGD", has_eps=True, has_momentum=True, has_betas=False
        ),
        OptimInfo(name="lamb", opt_class=_lamb, description="LAMB of autowu", has_eps=True, has_momentum=False, has_betas=True),
        OptimInfo(
            name="tvlars", opt_class=_tvlars, description="TVLARS of autowu", has_eps=True, has_momentum=True, has_betas=False
        ),
    )
    known = default_registry.list_optimizers()
    for info in ours:
        if info.name in known:
            if default_registry.get_optimizer_info(info.name).opt_class is info.opt_class:
                continue
            default_registry.register_alias(f"timm{info.name}", info.name)
        default_registry.register(info)


def _lars(
    params: Iterable[Any],
    lr: float | Tensor = 1.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    always_adapt: bool = False,
    trust_coeff: float = 0.001,
    **options: Any,
) -> LARS:
    groups = _groups("lars", params, weight_decay, always_adapt)
    sgd = SGD(groups, lr, momentum, dampening, weight_decay, nesterov, foreach=options.get("foreach"))
    return LARS(sgd, **({"trust_coef": trust_coeff} | options))


def _lamb(params: Iterable[Any], *, weight_decay: float = 0.0, always_adapt: bool = False, **options: Any) -> LAMB:
    return LAMB(_groups("lamb", params, weight_decay, always_adapt), weight_decay=weight_decay, **options)


def _tvlars(
    params: Iterable[Any], lr: float | Tensor = 1.0, *, weight_decay: float = 0.0, always_adapt: bool = False, **options: Any
) -> TVLARS:
    return TVLARS(_groups("tvlars", params, weight_decay, always_adapt), lr, weight_decay=weight_decay, **options)


def _groups(name: str, params: Iterable[Any], weight_decay: float, always_adapt: bool) -> list[dict[str, Any]]:
    """Groups of their own with ``"adapt"``, by timm's convention where they do not say it."""
    items = list(params)
    given: list[dict[str, Any]] = items if items and isinstance(items[0], dict) else [{"params": items}]
    groups = [{"adapt": always_adapt or group.get("weight_decay", weight_decay) != 0} | group for group in given]
    if not any(group["adapt"] for group in groups):
        _logger.warning(
            "%s: no parameter group has weight decay, so none is adapted, as is timm's convention; always_adapt=True adapts them",
            name,
        )
    return groups

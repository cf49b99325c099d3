"""An LR range test that leaves no trace: the search of an AutoWU, for those who want the number alone."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from autowu import checks
from autowu.config import Config
from autowu.gp import CurvePosterior, FloatArray
from autowu.kept import as_it_was, own_copy
from autowu.kin import everyone
from autowu.multi_optimizer import MultiOptimizer
from autowu.phases import Switch, switched, warmup_lr_at
from autowu.plotting import draw_range
from autowu.scheduler import AutoWU
from autowu.switching import SwitchDecision, decide, minimum_interval

__all__ = ["FoundLR", "find_lr", "judged", "unheard"]

_logger = logging.getLogger("autowu")

_LEAST: Final = 26
"""Steps: twice as many as the earliest decision needs."""
_MOST_SKIPPED: Final = 100
"""Calls beyond the steps of a search, that a gradient scaler may skip."""


@dataclass(frozen=True)
class FoundLR:
    """What a range test found.

    Attributes:
        lr: the LR to give to an optimizer, of the parameter group with the largest: the peak of a cosine, or of another decay.
        interval: the LRs that it may be, within 95 %.
        sure: whether the minimum of the loss is clearly past. If not, `lr` is a guess.
        note: what is to be doubted of `lr`, and what to do about it; None for nothing.
        steps: optimizer steps that were taken.
        lrs, losses: (n,) each, the curve, of several ranks their mean; of a long one means over successive steps.
        fitted_lrs, mean, std: (G,) each, the curve without its noise; of length 0 where nothing could be fitted.

    Example:
        >>> found = FoundLR(0.1, (0.05, 0.2), True, None, 2, *[np.ones(2)] * 2, *[np.ones(0)] * 3)
        >>> float(found)
        0.1
    """

    lr: float
    interval: tuple[float, float]
    sure: bool
    note: str | None
    steps: int
    lrs: FloatArray
    losses: FloatArray
    fitted_lrs: FloatArray
    mean: FloatArray
    std: FloatArray

    def __float__(self) -> float:
        return self.lr

    def __repr__(self) -> str:
        low, high = self.interval
        return f"FoundLR(lr={self.lr:.4g}, interval=({low:.4g}, {high:.4g}), sure={self.sure}, steps={self.steps})"

    def plot(self, axes: Any = None) -> Any:
        """Draw losses over LRs, the fitted curve, and the LR with its interval.

        Args:
            axes: matplotlib Axes to draw into; None for a figure of its own.

        Returns:
            A matplotlib Figure, not shown and not registered with pyplot.

        Raises:
            ImportError: without matplotlib, the extra ``autowu[plot]``.
        """
        fitted = (self.fitted_lrs, self.mean, self.std) if len(self.mean) else None
        return draw_range((self.lrs, self.losses), fitted, self.lr, self.interval, axes)


def find_lr(
    model: nn.Module,
    optimizer: Optimizer | list[Optimizer] | tuple[Optimizer, ...],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    loader: Iterable[Any] | None = None,
    *,
    step_fn: Callable[[Any], Tensor | float] | None = None,
    steps: int = 200,
    min_lr: float | None = None,
    max_lr: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    scaler: Any = None,
    snapshot_device: torch.device | str | int | None = None,
    process_group: ProcessGroup | None = None,
) -> FoundLR:
    """Find an LR by the warm-up of an :class:`~autowu.AutoWU`, and put all back as it was.

    The LR grows until the loss is past its minimum, and the LR follows from that as in a run. Afterwards all is as it was, bit for
    bit: parameters, buffers, gradients and modes of the model, the optimizer with its LRs, the gradient scaler, the random
    generators of Python, numpy, torch and the devices, and the loader with its samplers and their generators. So it is where the
    search ends with an exception or an interrupt. In a process group all ranks call it, and all get the same.

    Args:
        model: is trained for a while. With `step_fn` it may be a ``ModuleList`` of all that this changes, such as an average of the
            weights.
        optimizer: any torch optimizer, or a list of them; the ratios between the LRs of its groups are kept. Of several the LR that
            is found is that of the first.
        loss_fn: ``loss_fn(model(inputs), targets)`` is the loss of a batch ``(inputs, targets)``, which is moved to the model's
            device.
        loader: of batches; a DataLoader, a list, or what else can be iterated. It is begun anew where it ends. An iterator is taken
            if it can be put back or copied.
        step_fn: in place of `loss_fn`: ``step_fn(batch)`` is the loss of a batch as the loader gives it. With a graph it is
            differentiated here; without one `step_fn` has taken the optimizer's step itself.
        steps: optimizer steps of a whole search, 26 or more; it ends as soon as the minimum is past, as a rule earlier.
        min_lr: LR of the first step, above 0; None: by the optimizer's family, see :data:`autowu.families.LR_RANGES`.
        max_lr: that of the last one, above `min_lr`; None: by the family.
        accumulate: batches of an optimizer step, 1 or more.
        autocast: dtype of ``torch.autocast`` for the loss, ``torch.bfloat16`` say; None for none.
        scaler: a ``GradScaler``, which is then used.
        snapshot_device: where the copies of model and optimizer are held: None for beside the original, or on the host where there
            is no room; "cpu".
        process_group: the ranks that train together; None for the default group, if there is one.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of its range; if the loader is empty; if no step was taken.
        MemoryError: if there is no room for the copies.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = [(x, x.sum(1, keepdim=True) + torch.randn(16, 1)) for x in torch.randn(8, 16, 4)]
        >>> found = find_lr(model, optimizer, torch.nn.functional.mse_loss, batches)
        >>> low, high = found.interval
        >>> low <= found.lr <= high, found.sure, optimizer.param_groups[0]["lr"]
        (True, True, 0.1)
    """
    _check(model, loss_fn, loader, step_fn, steps, autocast)
    options: dict[str, Any] = {"min_lr": min_lr, "max_lr": max_lr, "max_warmup_steps": steps, "process_group": process_group}
    if isinstance(optimizer, list | tuple):
        optimizer = MultiOptimizer(optimizer)
    place = checks.optional(checks.device)("snapshot_device", snapshot_device)
    loss_of = step_fn or _loss_of_pair(model, loss_fn)
    loader = own_copy(loader)
    with unheard(), as_it_was(model, optimizer, loader, scaler, (loss_fn, step_fn), place), torch.enable_grad():
        scheduler = AutoWU(optimizer, rollback=False, **options)
        found = _Search(model, optimizer, loss_of, checks.count("accumulate", accumulate), autocast, scaler).run(scheduler, loader)
        found = scheduler._rooms.ranks.of_first(found)
    if found.note and scheduler._rooms.ranks.is_first:
        _logger.warning("AutoWU, range test: %s", found.note)
    return found


def _check(model: Any, loss_fn: Any, loader: Any, step_fn: Any, steps: Any, autocast: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: must be a torch.nn.Module")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(f"model: its parameter {lazy[0]!r} has no values yet; pass a batch through the model first")
    if (loss_fn is None) == (step_fn is None):
        raise TypeError("loss_fn, step_fn: one of the two must be given, a function")
    for name, function in (("loss_fn", loss_fn), ("step_fn", step_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r}: must be a function")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(f"loader={loader!r}: must be something to iterate, of batches")
    if checks.count("steps", steps) < _LEAST:
        raise ValueError(f"steps={steps!r}: must be at least {_LEAST}, for the loss curve needs points to be fitted")
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise TypeError(f"autocast={autocast!r}: must be a torch.dtype or None")


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What the scheduler of a search or of a replay says is not said: it speaks of a run."""
    before, _logger.disabled = _logger.disabled, True
    try:
        yield
    finally:
        _logger.disabled = before


def judged(posterior: CurvePosterior, config: Config) -> tuple[SwitchDecision, tuple[float, float]]:
    """What a single test makes of a whole curve, and between which positions its minimum lies, within 95 %."""
    span = config.decades
    rule: dict[str, Any] = {name: getattr(config, name) for name in ("confidence", "min_contrast", "min_rise")}
    decision = decide(posterior, 0, patience=1, reach=1 / span if span else math.inf, **rule)
    low, high = minimum_interval(posterior, decision.minima[0])
    return decision, (low, max(high, decision.edges[0]))


def _loss_of_pair(model: nn.Module, loss_fn: Any) -> Callable[[Any], Tensor]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def loss_of(batch: Any) -> Tensor:
        try:
            inputs, targets = batch
        except (TypeError, ValueError):
            what = f"a batch of the loader is a {type(batch).__name__}, not a pair (inputs, targets)"
            raise TypeError(f"{what}: pass step_fn=, the loss of such a batch, in place of loss_fn") from None
        loss: Tensor = loss_fn(model(_moved(inputs, device)), _moved(targets, device))
        return loss

    return loss_of


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(inner, device) for key, inner in value.items()}
    return type(value)(_moved(inner, device) for inner in value) if type(value) in (list, tuple) else value


class _Batches:
    """Those of a loader, which is begun anew where it ends."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._current = loader, iter(loader)

    def take(self) -> Any:
        """The next one.

        Raises:
            StopIteration: of an iterator that has ended, or of a loader that has none.
        """
        try:
            return next(self._current)
        except StopIteration:
            if self._current is self._loader:
                raise
        self._current = iter(self._loader)
        return next(self._current)

    def close(self) -> None:
        """Have the loader end what it has begun, before it is put back."""
        if self._current is not self._loader and hasattr(self._current, "close"):
            self._current.close()
        self._current = iter(())


class _Search:
    """The training of a search."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_of: Any, accumulate: int, autocast: torch.dtype | None, scaler: Any
    ) -> None:
        self.model, self.optimizer, self.loss_of, self.accumulate, self.scaler = model, optimizer, loss_of, accumulate, scaler
        device = next((p.device.type for group in optimizer.param_groups for p in group["params"]), "cpu")
        self.autocast: Any = contextlib.nullcontext() if autocast is None else torch.autocast(device, autocast)
        self.calls, self.countable = 0, False  # of the optimizer
        self.own = False  # whether the loss function takes the step itself
        for each in everyone(optimizer):
            with contextlib.suppress(AttributeError):  # some optimizers skip the constructor that makes room for hooks
                each.register_step_post_hook(self._called)
                self.countable = True

    def _called(self, *_: Any) -> None:
        self.calls += 1

    @property
    def _idle(self) -> bool:
        """Whether a function that should take the optimizer's step has never done so."""
        return self.own and self.countable and not self.calls

    def run(self, scheduler: AutoWU, loader: Any) -> FoundLR:
        """Train until the search has an end."""
        if not self.model.training:
            self.model.train()
        for parameter in (*self.model.parameters(), *(p for g in self.optimizer.param_groups for p in g["params"])):
            parameter.grad = None
        batches, last = _Batches(loader), 2 * scheduler.config.warmup_steps + _MOST_SKIPPED
        try:
            for number in range(last):
                self._step(scheduler, batches)
                if scheduler.switch is not None or (number > _MOST_SKIPPED and self._idle):
                    break
        except StopIteration:
            if scheduler.last_epoch == 0 and not self.own:
                raise ValueError("loader: has no batch") from None
        finally:
            batches.close()
        if self._idle:
            cure = "return the loss with its graph, or take the optimizer's step in step_fn"
            raise ValueError(f"step_fn: the loss has no graph, and the optimizer was never called; {cure}")
        return _found(scheduler)

    def _step(self, scheduler: AutoWU, batches: _Batches) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.accumulate):
            batch = batches.take()
            with self.autocast:
                loss = self.loss_of(batch)
            scheduler.observe(loss)
            if not isinstance(loss, Tensor) or not loss.requires_grad:  # the step has been taken
                if self.accumulate > 1:
                    raise ValueError(f"accumulate={self.accumulate}: must be 1 where step_fn takes the optimizer's step itself")
                self.own = True
                if not self._idle:
                    scheduler.step()
                return
            loss = loss / self.accumulate
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        scheduler.step()


def _found(scheduler: AutoWU) -> FoundLR:
    """What a search has come to."""
    config, judge, state = scheduler.config, scheduler._rooms.judge, scheduler._state
    if state.switch is None:  # the batches have ended, or most steps were skipped
        state = switched(config, state, scheduler.last_epoch, judge.last, scheduler._groups.largest)
    switch = state.switch
    assert switch is not None
    exploded = any(event.kind == "explosion" for event in scheduler.events)
    low, high = config.min_lr, config.max_lr
    fitted: list[FloatArray] = [np.empty(0)] * 3
    if judge.posterior is not None and switch.minimum is not None:
        posterior = judge.posterior
        places = judged(posterior, config)[1]
        low, high = (config.peak_factor * _lr_at(config, place) for place in places)
        variance = np.maximum(posterior.variance.mean(0) + posterior.mean.var(0), 0)
        fitted = [np.array([_lr_at(config, x) for x in posterior.grid]), posterior.mean.mean(0), np.sqrt(variance)]
    positions, losses = (values.cpu().numpy() for values in judge.history.curve(1).finite())
    lrs = np.array([warmup_lr_at(config, float(step)) for step in positions])
    note = _doubt(config, switch, past=exploded or state.votes > 0)
    told = (switch.lr, (min(low, switch.lr), max(high, switch.lr)), note is None, note, scheduler.last_epoch)
    return FoundLR(*told, lrs, losses, *fitted)


def _lr_at(config: Config, place: float) -> float:
    return warmup_lr_at(config, min(place, 1.0) * config.warmup_steps)


def _doubt(config: Config, switch: Switch, *, past: bool) -> str | None:
    if switch.minimum is None:
        return f"no loss curve could be fitted; the LR {switch.lr:.4g} is the optimizer's own; see that the loss is finite"
    low, high = config.min_lr, config.max_lr
    if switch.lr <= low:
        return f"the loss was lowest at the start; the LR is min_lr={low:g}; see whether the loss falls, or pass a lower one"
    if not past:
        cure = "pass a higher max_lr, or more steps"
        return f"the loss is not clearly past a minimum from LR {low:g} to {high:g}; {cure}; {switch.lr:.4g} is a guess"
    return None

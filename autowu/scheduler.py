"""AutoWU, the scheduler: the one stateful shell around the pure parts."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, fields, replace
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autowu import arguments
from autowu.distributed import LateRead, average, exchange, rank_and_size, sum_over_ranks
from autowu.families import lr_range, peak_lag
from autowu.families import peak_factor as default_peak_factor
from autowu.gp import ClosedFormGP, CurvePosterior, LossCurveGP
from autowu.gpytorch_engine import GPyTorchGP
from autowu.history import MISSING, LossHistory
from autowu.phases import (
    MAX_SETBACKS,
    SETBACK_FACTOR,
    Config,
    Event,
    Phase,
    State,
    Switch,
    Verdict,
    after_test,
    base_lr,
    configure,
    cooldown_start,
    end_plateau_epoch,
    extended,
    falls,
    forked,
    is_test_due,
    phase_at,
    plateau_epoch_due,
    set_back,
    verdict,
    watch_is_over,
)
from autowu.snapshot import Snapshot
from autowu.switching import MIN_LOSSES, SwitchDecision, decide
from autowu.watch import LossWatch

__all__ = ["AutoWU"]

_T = TypeVar("_T")

_logger = logging.getLogger("autowu")

_STATE_VERSION: Final = 4

_BLOCK: Final = 10
"""Steps after which the watch reads losses that are on a device or spread over ranks."""

_SKIPPED: Final = 20
"""Calls without an optimizer step after which the loss is looked at."""

_COUNTED: Final = 1
"""Put for True into torch's flag that the optimizer was called: true as well, and known to have been seen."""


class AutoWU(LRScheduler):
    r"""Automated learning-rate warm-up: finds the peak LR and the length of the warm-up during the run (Kim et al. 2021).

    The LR grows exponentially from `min_lr`, such that it would reach `max_lr` after
    :math:`W = \lfloor \text{max\_warmup\_fraction} \cdot T \rfloor` steps, while the loss falls, stalls and begins to rise. A
    Gaussian process on all losses so far says how probable it is that the minimum of the noise-free curve is past. Once it has been
    so with `confidence` in `patience` tests in a row, the LR goes back to `peak_factor` times what it was at that minimum, the
    peak, stays there, and decays over the last `cooldown_fraction` of the T steps, or from the switch on. A warm-up that reaches
    its limit without such a verdict goes back there too.

    Call :meth:`step` with the training loss after every optimizer step, or :meth:`observe` with the loss of each micro-batch and
    then :meth:`step` without one. It does not wait for the device, except in a test, about 60 times and in the warm-up only, for
    one read of a few kilobytes (more with the GPyTorch engine), and, with ``decay_phase_stat="loss"``, once an epoch of the
    stable phase.

    In a process group each rank passes the loss of its own batch. A test then makes one collective (the watch makes one in 10
    steps): it averages the losses since the test before over the ranks, and the first rank's verdict, on all losses before those,
    is everyone's, so that all switch at the same step to the same LR, one test later than a run of one process would. (With
    ``decay_phase_stat="loss"`` an epoch of the stable phase makes one, too.) All ranks must call :meth:`step` equally often; one
    that stops is noticed by the group's timeout, not here.

    A call for which the optimizer was not called, because a ``GradScaler`` skipped it or because a wrapper calls several times,
    does not count. (A fused optimizer is called all the same and skips on the device; its step counts.)

    All along, until the cooldown has brought the LR to half the peak, a watch follows the loss. One that explodes in the warm-up
    (three in a row not finite, or above the start by more than twice the progress made) ends the warm-up at once. One that diverges
    after the switch (30 % of the progress lost, by more than 10 standard errors) sets the run back: the last good copy of the model
    is restored, where there is `model`, and the peak LR is halved; at most three times, then the run is left alone. Both are
    warned of through ``logging`` and kept in `events`. Losses on a GPU are read in blocks of 10 steps, and each block when the
    next is full, so that nothing waits; in a process group each block makes one more small collective.

    Args:
        optimizer: any torch optimizer. The ratios between the LRs of its parameter groups (and timm's ``lr_scale``) are kept;
            `min_lr` and `max_lr` are for the group with the largest.
        steps_per_epoch: optimizer steps per epoch, 1 or more.
        total_epochs: epochs in the run, 1 or more; T is their product.
        total_steps: T, in place of the two counts.
        immediate_cooldown: False holds the peak (the *stable* phase) and decays over the last `cooldown_fraction` of T; True decays
            from the switch to T.
        cooldown_type: "cosine", "half_cosine" (a quarter wave), "linear" or "sqrt"; see :func:`autowu.schedules.cooldown_factor`.
        cooldown_fraction: share of T, in (0, 1), for the cooldown where it is not immediate; without effect where it is.
        min_lr: LR of step 0, above 0. None: by the optimizer's family, see :data:`autowu.families.LR_RANGES`.
        max_lr: LR that the warm-up would reach after W steps, above `min_lr`. None: by the optimizer's family.
        max_warmup_fraction: W as a share of T, in (0, 1]; 1 only where a cooldown that is not immediate ends the warm-up before.
        warmup_type: "two_speed", "exp" or "linear"; see :func:`autowu.schedules.warmup_lr`.
        warmup_unit: "step", or "epoch" to hold the LR within an epoch.
        decay_phase_stat: with "loss", the stable phase multiplies the LR by `decay_phase_factor` when the mean loss of an epoch has
            not improved for more than 5 epochs.
        decay_phase_factor: in (0, 1]; without `decay_phase_stat` it multiplies the LR after every epoch of the stable phase.
        test_interval: steps between tests, "epoch", or None for about 60 tests in a full warm-up.
        patience: tests in a row that must find the minimum past, 1 or more.
        confidence: probability that a test must exceed, in (0.5, 1).
        min_contrast: standard deviations that the fall to the minimum and the rise from it must make up together, 0 or more, so
            that noise on the flat start of a run is not taken for a minimum.
        peak_factor: the peak LR as a share of the LR at the minimum, above 0, at most 1. None: 0.5 for LARS, 1/6 for LAMB. For all
            others 0.8, and in an exponential warm-up less by as much as the LR grows, at the pace of its end, in
            momentum / (1 - momentum) steps, about the mean age of the gradients in an optimizer's step; half a decade less at most.
            That counts in warm-ups of up to some hundred steps. What was taken is `config.peak_factor`.
        gp: "closed-form" (:class:`~autowu.gp.ClosedFormGP`), "gpytorch" (:class:`~autowu.gpytorch_engine.GPyTorchGP`), or an object
            with their ``posterior`` method and ``max_points`` (:class:`~autowu.gp.LossCurveGP`). The length-scale of the two named
            ones is half a decade of LR, at most a fifth of the warm-up.
        device: where the GP does its sums; None for the device of the losses.
        seed: of the draws that the GPyTorch engine makes; the closed form draws nothing.
        model: what is trained. As long as the loss falls, its parameters and buffers and the optimizer's state are copied each time
            that the LR has grown by as much as the peak will lie below the minimum; the last two copies are held. (Before the
            first fit, at 10 losses, one that is no higher than the mean so far counts as falling.) At the switch the run goes back
            to the newer one that was made at no more than the peak LR, else to the older, so that the steps at too high an LR
            leave no trace. After the switch one copy is held, renewed at as many steps as there are between tests, and put back if
            training diverges. None: they stay as they are.
        snapshot_device: where the copies are held: None for beside the original, or "cpu" (pinned memory, if the model is on a
            GPU).
        watch: whether to watch the loss for explosions and divergence.
        process_group: the ranks that train together; None for the default group, if there is one at the first test. A group of
            this rank alone makes the run independent of the others.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of its range, naming it, its value and the range.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scheduler = AutoWU(optimizer, steps_per_epoch=10, total_epochs=20)
        >>> x, y = torch.randn(64, 4), torch.randn(64, 1)
        >>> for _ in range(200):
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     scheduler.step(loss)
        >>> scheduler.phase
        'done'

    Attributes:
        switch: None during the warm-up, then a :class:`~autowu.phases.Switch`: step, LR, probability, position of the minimum.
        decision: outcome of the last test, a :class:`~autowu.switching.SwitchDecision`, or None; of the first rank only.
        posterior: the fitted curve of the last test, a :class:`~autowu.gp.CurvePosterior`, or None; of the first rank only.
        config: the arguments as resolved, a :class:`~autowu.phases.Config`.
        events: what befell the run so far, a list of :class:`~autowu.phases.Event`: switch, explosion, divergences, troubles.
        history: the losses of the warm-up, a :class:`~autowu.history.LossHistory`.
        gp: the engine.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps_per_epoch: int | None = None,
        total_epochs: int | None = None,
        *,
        total_steps: int | None = None,
        immediate_cooldown: bool = False,
        cooldown_type: str = "linear",
        cooldown_fraction: float = 0.6,
        min_lr: float | None = None,
        max_lr: float | None = None,
        max_warmup_fraction: float = 0.32,
        warmup_type: str = "two_speed",
        warmup_unit: str = "step",
        decay_phase_stat: str | None = None,
        decay_phase_factor: float = 1.0,
        test_interval: int | str | None = None,
        patience: int = 4,
        confidence: float = 0.95,
        min_contrast: float = 6.0,
        peak_factor: float | None = None,
        gp: str | LossCurveGP = "closed-form",
        device: torch.device | str | int | None = None,
        seed: int = 0,
        model: nn.Module | None = None,
        snapshot_device: torch.device | str | int | None = None,
        watch: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer={optimizer!r}: must be a torch.optim.Optimizer")
        default_min, default_max = lr_range(optimizer)
        self.config: Config = configure(
            steps_per_epoch=steps_per_epoch,
            total_epochs=total_epochs,
            total_steps=total_steps,
            immediate_cooldown=immediate_cooldown,
            cooldown_type=cooldown_type,
            cooldown_fraction=cooldown_fraction,
            min_lr=default_min if min_lr is None else min_lr,
            max_lr=default_max if max_lr is None else max_lr,
            max_warmup_fraction=max_warmup_fraction,
            warmup_type=warmup_type,
            warmup_unit=warmup_unit,
            decay_phase_stat=decay_phase_stat,
            decay_phase_factor=decay_phase_factor,
            test_interval=test_interval,
            patience=patience,
            confidence=confidence,
            min_contrast=min_contrast,
            peak_factor=default_peak_factor(optimizer) if peak_factor is None else peak_factor,
            peak_lag=peak_lag(optimizer) if peak_factor is None else 0.0,
            watch=watch,
        )
        self.gp: LossCurveGP = arguments.engine(gp, self.config, arguments.seed(seed))
        self.device = arguments.device("device", device)
        if not isinstance(model, (nn.Module, type(None))):
            raise TypeError(f"model={model!r}: must be a torch.nn.Module or None")
        place = arguments.device("snapshot_device", snapshot_device)
        self._snapshot = None if model is None else Snapshot(model, optimizer, place)
        self._copy_failed = False  # on this rank; the others are told
        self.process_group = arguments.process_group(process_group)
        # What is staged when a test comes must still be there, for the mean over the ranks.
        self.history = LossHistory(self.gp.max_points, self.config.test_interval + MIN_LOSSES)
        self.decision: SwitchDecision | None = None
        self.posterior: CurvePosterior | None = None
        self._state = State()
        self._verdict: Verdict | None = None  # of the last test that had a fit
        self._next_verdict: Verdict | None = None  # of the first rank of a group, to travel at the next test
        self._observed: float | Tensor = 0.0
        self._num_observed = 0
        self._sees_optimizer = False
        self._sees_past_wrapper = False
        self._skipped = 0
        self._epoch_losses: LossHistory | None = None
        self._watch = LossWatch()
        self._watched_losses = self.history  # after the switch, those since the last look
        self._looked_at = 0  # step of the watch's last look
        self._pending: LateRead | None = None
        self.events: list[Event] = []
        self._ratios: list[float] = []
        self._fallback_lr = 0.0
        super().__init__(optimizer)
        self._hook_optimizer()

    def _hook_optimizer(self) -> bool:
        """Have the optimizer note its calls; torch's wrapper of optimizer.step misses those of a method taken before."""
        with contextlib.suppress(AttributeError):  # some optimizers skip the constructor that makes room for hooks
            self.optimizer.register_step_post_hook(_note_call)
            return True
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The copy of an optimizer has neither wrapper nor hook.
        self._sees_past_wrapper = self._hook_optimizer()

    @classmethod
    def paper(
        cls,
        optimizer: Optimizer,
        steps_per_epoch: int | None = None,
        total_epochs: int | None = None,
        **overrides: Any,
    ) -> AutoWU:
        """AutoWU as published, for those who reproduce the paper (Kim et al. 2021 and its code).

        LR from 1e-5 to 1 over half of the run; a test at the end of every epoch, 3 in a row; five subsamples of at most 500 losses;
        a length-scale of a fifth of the time so far; hyperparameters from 100 Adam steps on at most 100 losses, kept between tests.
        Where the published code is plainly at fault this preset is not: the last step of the run has an LR above 0, the first step
        after the switch runs at the peak, a warm-up that times out goes back to the fitted minimum, a fit that fails ends no run,
        and fewer than 10 losses make no test. A cosine from the switch on, or over the last fifth of the run. Nothing watches the
        loss.

        Args:
            overrides: any keyword argument of :class:`AutoWU`.
        """
        published: dict[str, Any] = {
            "min_lr": 1e-5,
            "max_lr": 1.0,
            "max_warmup_fraction": 0.5,
            "warmup_type": "exp",
            "test_interval": "epoch",
            "patience": 3,
            "min_contrast": 0.0,
            "peak_factor": 1.0,
            "immediate_cooldown": True,
            "cooldown_type": "cosine",
            "cooldown_fraction": 0.2,
            "watch": False,
        }
        if "gp" not in overrides:
            seed = arguments.seed(overrides.get("seed", 0))
            published["gp"] = GPyTorchGP(lengthscale=0.2, published=True, seed=seed)
        return cls(optimizer, steps_per_epoch, total_epochs, **(published | overrides))

    @property
    def phase(self) -> Phase:
        """Phase of the coming optimizer step: "warmup", "stable", "cooldown" or "done"."""
        return phase_at(self.config, self._state, self.last_epoch)

    @property
    def switch(self) -> Switch | None:
        """The end of the warm-up; None before it."""
        return self._state.switch

    def lr_at(self, step: int) -> float:
        """LR of optimizer step `step` by all that is known now, of the parameter group with the largest LR.

        Past the present the warm-up is taken to go on to its limit, and the LR of a stable phase to stay.
        """
        return base_lr(self.config, self._state, step)

    def cooldown_start(self, cooldown_fraction: float) -> int:
        """Optimizer step, from 0, at which a cooldown over the last `cooldown_fraction`, in (0, 1), of the T steps begins.

        Raises:
            TypeError, ValueError: unless the fraction is a number in its range.
        """
        return cooldown_start(self.config, cooldown_fraction)

    def fork_cooldown(self, cooldown_fraction: float) -> dict[str, Any]:
        """The state, as of now, of a branch of this run with another `cooldown_fraction`, for :meth:`load_state_dict`.

        It is the state that a full run with that fraction would have here, so that several fractions share warm-up and stable
        phase. Train the trunk with the smallest fraction; where ``scheduler.cooldown_start(f)`` steps are done, save or deep-copy
        model, optimizer and ``fork_cooldown(f)``. Each branch then loads them into a model, an optimizer and an AutoWU of its own
        and trains the rest of the T steps. With ``decay_phase_stat="loss"`` the branch must leave one step earlier or before. In a
        process group each rank forks its own state. The returned state shares no memory with this run.

        Args:
            cooldown_fraction: share of T, in (0, 1).

        Raises:
            TypeError: if the fraction is no number.
            ValueError: if it is out of its range, if this run has ``immediate_cooldown=True``, if the run is past the step where
                that cooldown or its own begins, or if the warm-up of a run with that fraction would have another limit.

        Example:
            >>> def sgd():
            ...     return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            >>> trunk = AutoWU(sgd(), total_steps=100, immediate_cooldown=False, cooldown_fraction=0.1)
            >>> for step in range(100):
            ...     if step == trunk.cooldown_start(0.4):
            ...         state = trunk.fork_cooldown(0.4)  # and copies of model and optimizer
            ...     trunk.optimizer.step()
            ...     trunk.step(1.0)
            >>> branch = AutoWU(sgd(), total_steps=100)
            >>> branch.load_state_dict(state)
            >>> branch.phase, branch.last_epoch, branch.config.cooldown_fraction
            ('cooldown', 60, 0.4)
        """
        config = forked(self.config, self.last_epoch, cooldown_fraction)
        return copy.deepcopy(self.state_dict()) | {"config": asdict(config)}

    def get_lr(self) -> list[float | Tensor]:
        """LR of the coming optimizer step for each parameter group, as torch's schedulers compute it inside `step`."""
        lr = self.lr_at(self.last_epoch)
        if len(self._ratios) != len(self.optimizer.param_groups):
            self._join_groups()
        return [lr * ratio for ratio in self._ratios]

    def observe(self, loss: float | Tensor) -> None:
        """Record the loss of one micro-batch; the loss of an optimizer step is the mean of those observed since the last one.

        Args:
            loss: as in :meth:`step`; unscaled, not divided by the number of micro-batches.

        Raises:
            TypeError, ValueError: as :meth:`step`.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> scheduler = AutoWU(optimizer, total_steps=100)
            >>> for micro_batch in torch.randn(2, 8, 4):
            ...     loss = model(micro_batch).square().mean()
            ...     (loss / 2).backward()
            ...     scheduler.observe(loss)
            >>> optimizer.step()
            >>> scheduler.step()
        """
        if torch.compiler.is_compiling():
            _observe_untraced(self, loss)
        else:
            self._observe(loss)

    def _observe(self, loss: float | Tensor) -> None:
        loss = arguments.loss(loss)
        if not self._records:
            return
        if isinstance(loss, Tensor):
            loss = loss.detach()
            if loss.device.type == "cpu":
                loss = loss.item()
            else:
                place = self._observed.device if isinstance(self._observed, Tensor) else loss.device
                dtype = torch.float32 if place.type == "mps" else torch.float64
                loss = loss.to(place, dtype, non_blocking=True).reshape(())
        self._observed = self._observed + loss
        self._num_observed += 1

    def step(self, loss: float | Tensor | None = None) -> None:
        """Record the loss of the optimizer step just taken and set the LR of the next one.

        Args:
            loss: the training loss: a float, or a tensor of one element and any floating dtype, on any device, with or without its
                graph. Never kept alive, never waited for. A loss that is not finite is survived. It is averaged with what was
                observed since the last step, see :meth:`observe`; None where that is all. A step for which no loss came at all
                counts as one with a missing loss.

        Raises:
            TypeError: if `loss` is not a floating-point number.
            ValueError: if `loss` has several elements.
        """
        if torch.compiler.is_compiling():
            _step_untraced(self, loss)
        else:
            self._step(loss)

    def _step(self, loss: float | Tensor | None) -> None:
        if loss is not None and self._num_observed == 0:
            loss = arguments.loss(loss)
        else:
            if loss is not None:
                self._observe(loss)
            loss = self._observed / self._num_observed if self._num_observed else MISSING
            self._observed, self._num_observed = 0.0, 0
        step = self.last_epoch + 1
        if self._optimizer_was_skipped():
            self._skipped += 1
            if self._skipped % _SKIPPED == 0 and self._broken(loss):
                self._end_warmup(self.last_epoch)
                self._write_lrs()
            return
        self._skipped = 0
        if isinstance(loss, Tensor) and loss.is_cpu:
            loss = loss.item()
        self._record(loss)
        if self._state.watched and self.config.watch:
            self._look(step, loss)
        if is_test_due(self.config, self._state, step):
            self._test(step)
        elif plateau_epoch_due(self.config, self._state, step):
            self._end_plateau_epoch()
        LRScheduler.step(self)

    def _initial_step(self) -> None:
        # Torch's constructor calls this to set the first LR; no loss has been seen.
        self._part_lrs()
        initial = [float(lr) for lr in self.base_lrs]
        self._fallback_lr = max(initial, default=0.0)
        scaled = [lr * group.get("lr_scale", 1.0) for lr, group in zip(initial, self.optimizer.param_groups, strict=True)]
        largest = max(scaled, default=0.0)
        self._ratios = [lr / largest if largest > 0 else 1.0 for lr in scaled]
        self._step_count = 0
        LRScheduler.step(self)

    def _part_lrs(self) -> None:
        """Give every parameter group a tensor LR of its own: groups that took the optimizer's default share one."""
        seen: set[int] = set()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                if id(group["lr"]) in seen:
                    group["lr"] = group["lr"].clone()
                seen.add(id(group["lr"]))

    def _join_groups(self) -> None:
        """Give the parameter groups added since the last step their ratio: of their LR to the first group's at this moment."""
        self._part_lrs()
        groups = self.optimizer.param_groups
        first, default = float(groups[0]["lr"]), self.optimizer.defaults.get("lr")
        for group in groups[len(self._ratios) :]:
            lr = float(group["lr"])
            plain = default is not None and lr == float(default)
            ratio = 1.0 if plain or first <= 0 else lr / first
            self._ratios.append(ratio * self._ratios[0] * group.get("lr_scale", 1.0))
            group.setdefault("initial_lr", group["lr"])
            self.base_lrs.append(group["initial_lr"])

    def _optimizer_was_skipped(self) -> bool:
        """Whether the optimizer was not called since the last step.

        Torch's schedulers have the optimizer set a flag when it is called. Nothing follows from its absence before a step was
        seen that trained something: the optimizer may have been called past the flag, the two calls may stand in the order that
        torch warns about, or the losses are those of another run. What a GradScaler skips in the first steps shows in the
        gradients; only there they are read.
        """
        wrapped = hasattr(self.optimizer.step, "_wrapped_by_lr_sched")
        if getattr(self.optimizer, "_opt_called", False) is True:
            self.optimizer._opt_called = _COUNTED  # type: ignore[attr-defined]
            self._sees_optimizer = self._sees_optimizer or bool(self.optimizer.state) or bool(self._gradients())
            self._sees_past_wrapper |= not wrapped
            return False
        if not wrapped and not self._sees_past_wrapper:
            if self._sees_optimizer:
                self._report("optimizer", "optimizer.step was replaced; from here on every call counts, skipped steps too")
            return False
        if self._sees_optimizer:
            return True
        return any(not (g.coalesce().values() if g.is_sparse else g).isfinite().all() for g in self._gradients())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    @property
    def _records(self) -> bool:
        """Whether the loss of the coming step is of use."""
        return self._state.switch is None or self._is_watched or self._is_plateau_phase

    @property
    def _is_watched(self) -> bool:
        return self.config.watch and self._state.watched

    @property
    def _is_plateau_phase(self) -> bool:
        return self.config.decay_phase_stat is not None and self.phase == "stable"

    def _record(self, loss: float | Tensor) -> None:
        if self._state.switch is None:
            self.history.append(loss)
            return
        if self._is_watched and not self._host_follows(loss):
            self._watched_losses.append(loss)
        if self._is_plateau_phase:
            if self._epoch_losses is None:
                self._epoch_losses = LossHistory()
            self._epoch_losses.append(loss)

    def _look(self, step: int, loss: float | Tensor) -> None:
        """Have the watch follow the loss: at once where the host has it, else in blocks, each read when the next is full."""
        losses = self.history if self._state.switch is None else self._watched_losses
        at_once = self._host_follows(loss)
        size = 1 if at_once else rank_and_size(self.process_group)[1]
        if at_once:
            self._watch.push(float(loss))
        elif step - self._looked_at < _BLOCK and not is_test_due(self.config, self._state, step):
            return
        else:
            block = losses.staged[self._looked_at - step :]
            if size > 1:
                block = average(block, self._copy_failed, self.process_group)
            before, self._pending = self._pending, LateRead(block)
            self._follow(before, size)
        since, self._looked_at = self._looked_at, step
        copy_is_due = since // self.config.test_interval < step // self.config.test_interval
        if self._state.switch is None:
            if self._watch.exploded:
                self._end_warmup(step)
            return
        if not at_once:
            losses.fold()  # they have been read
        if copy_is_due and self._snapshot is not None:  # which waits for the device anyway
            before, self._pending = self._pending, None
            self._follow(before, size)
        if self._watch.diverged:
            self._set_back(step, size)
        elif since // _BLOCK < step // _BLOCK and watch_is_over(self.config, self._state, step):
            self._end_watch()
        elif copy_is_due and self._snapshot is not None and self._watch.near_best:
            self._renew_copy(step, size)

    def _host_follows(self, loss: float | Tensor) -> bool:
        """Whether the watch can follow the losses at once: those of one process, on the host."""
        if isinstance(loss, Tensor) or rank_and_size(self.process_group)[1] > 1:
            return False
        return (self.history if self._state.switch is None else self._watched_losses).device.type == "cpu"

    def _follow(self, block: LateRead | None, size: int) -> None:
        """Have the watch follow a block; behind the losses of several ranks stands how many could not copy their model."""
        values = [] if block is None else block.get()
        if size > 1 and values and values.pop():
            self._snapshot = None
        for value in values:
            self._watch.push(value)

    def _broken(self, loss: float | Tensor) -> bool:
        """Whether a run whose optimizer is skipped again and again has a loss that is not finite: nothing there will mend it."""
        if not self._is_watched or self._state.switch is not None or rank_and_size(self.process_group)[1] > 1:
            return False
        self._watch.push(loss.item() if isinstance(loss, Tensor) else loss)
        return self._watch.exploded

    def _end_warmup(self, step: int) -> None:
        self._event("explosion", step, "the loss has exploded, which ends the warm-up", of_all=True)
        self._test(step, exploded=True)

    def _set_back(self, step: int, size: int) -> None:
        """Go back to the last good copy, with a lower peak."""
        self._state = set_back(self._state)
        restored = self._put_back(size)
        self._watch.go_back(self._level_at(restored))
        self._pending = None
        switch = self._state.switch
        assert switch is not None
        self._event(
            "divergence",
            step,
            f"training has diverged ({self._state.setbacks} of {MAX_SETBACKS}); the peak LR is now "
            f"{switch.lr * SETBACK_FACTOR**self._state.setbacks:.4g}"
            + ("" if restored is None else f", model and optimizer are back at step {restored}")
            + ("" if self._state.watched else "; from here on the run is left alone"),
            of_all=True,
        )
        if not self._state.watched:
            self._end_watch()

    def _end_watch(self) -> None:
        self._state = replace(self._state, watched=False)
        self._pending = None
        self._watched_losses = self.history
        if self._snapshot is not None:
            self._snapshot.free()

    def _renew_copy(self, step: int, size: int) -> None:
        """Copy the run after the switch, if its weights are finite."""
        sound = self._copying(Snapshot.sound, size)
        if size > 1:
            sound = torch.zeros(1, dtype=torch.float64, device=self._watched_losses.device) if sound is None else sound
            all_sound = bool(sum_over_ranks(sound, self.process_group) == size)
        else:
            all_sound = sound is not None and bool(sound)
        if all_sound:
            self._copying(lambda snapshot: snapshot.take(step, self._watch.level), size)

    def _take_over_the_older(self, step: int, size: int) -> None:
        """In the warm-up: copy the run, if the LR has grown enough since the last copy."""

        def take(snapshot: Snapshot) -> None:
            if snapshot.step is None or self.lr_at(step) * self.config.peak_factor >= self.lr_at(snapshot.step):
                snapshot.swap()
                snapshot.take(step, self._watch.level)

        self._copying(take, size)

    def _has_not_risen(self) -> bool:
        """Before the first fit: whether the latest loss is no higher than the mean of all."""
        return bool(self.history.staged[-1] <= self.history.mean())

    def _level_at(self, restored: int | None) -> float | None:
        """What the loss was when the copy was made that has been restored, None if none was."""
        return None if restored is None or self._snapshot is None else self._snapshot.level

    def _test(self, step: int, *, exploded: bool = False) -> None:
        """Learn whether the minimum is past, and switch if so or if the warm-up ends: at its limit, or since the loss exploded."""
        ends = exploded or step == self.config.warmup_limit
        rank, size = rank_and_size(self.process_group)
        if step < MIN_LOSSES and not ends:
            # In a warm-up of a dozen steps the minimum may be past by the first fit. Ranks have nothing to agree by before it.
            sound = self._copying(Snapshot.sound, size) if size == 1 else None
            if sound is not None and bool(sound) and self._has_not_risen():
                self._take_over_the_older(step, size)
            return
        sound = self._copying(Snapshot.sound, size)
        if size == 1:
            found, all_sound = self._judge(step), sound is None or bool(sound)
        else:
            found, all_sound = self._exchange(rank, size, sound)
        if found is not None:
            self._verdict = found
        elif ends:
            found = self._verdict
        self._state = after_test(self.config, self._state, step, found, self._fallback_lr, ends=ends)
        switch = self._state.switch
        self._next_verdict = self._judge(step) if switch is None and size > 1 and rank == 0 else None
        if self._snapshot is not None and switch is None and all_sound and (self._verdict is None or falls(found)):
            self._take_over_the_older(step, size)
        if switch is None:
            return
        restored = self._roll_back(exploded, switch.lr, size)
        self._watch.go_back(self._level_at(restored), settling=0)
        self._pending, self._looked_at = None, step
        self._watched_losses = LossHistory(max_points=2)
        if not self.config.watch:
            self._end_watch()
        ended = f" (probability {switch.probability:.3f})" if switch.by_test else "" if exploded else " (warm-up at its limit)"
        message = (
            f"AutoWU switched at step {switch.step} of {self.config.total_steps}: LR {switch.lr:.4g}, "
            + (
                "no curve was fitted; LR from the optimizer's own"
                if switch.minimum is None
                else f"the loss was lowest at step {switch.minimum:.0f}{ended}"
            )
            + ("" if restored is None else f", model and optimizer are back at step {restored}")
        )
        self.events.append(Event("switch", step, message))
        if rank == 0:
            _logger.info(message)

    def _copying(self, act: Callable[[Snapshot], _T], size: int) -> _T | None:
        """`act` on the snapshot, if there is one. That it fails is survived, by all ranks together, and the run goes on without."""
        if self._snapshot is None or self._copy_failed:
            return None
        try:
            return act(self._snapshot)
        except Exception as error:
            self._report("snapshot", f"the model could not be copied ({error}); it will not go back")
            if size == 1:
                self._snapshot = None
            else:  # the others, which have a copy, learn it before they could use it
                self._copy_failed = True
                self._snapshot.free()
            return None

    def _roll_back(self, exploded: bool, peak: float, size: int) -> int | None:
        """Put one of the copies back if the minimum is past; the step that it was taken at."""
        snapshot = self._snapshot
        past = exploded or not (self._verdict is None or falls(self._verdict))
        if snapshot is not None:
            # The LRs of the warm-up are those of a state without a switch.
            if past and snapshot.step is not None and base_lr(self.config, State(), snapshot.step) > peak:
                snapshot.swap()
                if snapshot.step is None:  # there is one copy only
                    snapshot.swap()
            snapshot.free_other()
        return self._put_back(size) if past else None

    def _put_back(self, size: int) -> int | None:
        """Restore the snapshot, if all ranks have one; the step that it was taken at."""
        has = self._snapshot is not None and self._snapshot.step is not None
        if size > 1:
            able = torch.tensor([float(has)], dtype=torch.float64)
            has = float(sum_over_ranks(able, self.process_group)) == size
        if not has or self._snapshot is None:
            return None
        if size == 1:
            return self._copying(Snapshot.restore, size)
        return self._snapshot.restore()  # a rank on which this fails must not go on beside those that went back

    def _exchange(self, rank: int, size: int, sound: Tensor | None) -> tuple[Verdict | None, bool]:
        """Average the losses since the last test over the ranks; the first rank's verdict on those before."""
        if self._copy_failed:
            sound = torch.full((1,), math.nan, dtype=torch.float64)
        own = None if self._next_verdict is None else [float(v) for v in astuple(self._next_verdict)]
        width = len(fields(Verdict))
        missing, said, all_sound = exchange(self.history.staged, own, width, sound, self.process_group)
        if all_sound is None:
            self._snapshot = None
        self.history.fold()
        if missing and rank == 0:
            self._report("rank", f"{missing} losses of the {size} ranks were missing or not finite; the mean is over the others")
        if not said:
            return None, bool(all_sound)
        switch, votes, probability, lr, minimum = said
        return Verdict(bool(switch), int(votes), probability, lr, minimum), bool(all_sound)

    def _judge(self, step: int) -> Verdict | None:
        """Test whether the minimum is past; None where the curve could not be fitted."""
        decision = self._decide()
        return None if decision is None else verdict(self.config, step, decision)

    def _decide(self) -> SwitchDecision | None:
        curve = self.history.curve(self.config.warmup_steps)
        device = self.device or curve.sums.device
        try:
            # MPS has no float64.
            curve = curve.to("cpu" if device.type == "mps" else device)
            posterior = self.gp.posterior(curve)
            # An interval without a finite loss leaves the fitted curve that much behind.
            behind = (curve.end - posterior.end) * self.config.warmup_steps
            decision = decide(
                posterior,
                self._state.votes,
                confidence=self.config.confidence,
                patience=self.config.patience,
                min_contrast=self.config.min_contrast,
                silent=behind > self.config.test_interval - 0.5,
            )
        except Exception as error:  # a test must not end a run, whatever an engine raises
            self._report(
                "fit",
                f"the loss curve could not be fitted ({error}); such a test is no evidence to switch, and the run goes on",
            )
            return None
        if posterior.num_losses < self.history.steps:
            self._report(
                "loss",
                f"{self.history.steps - posterior.num_losses} of {self.history.steps} losses were missing or not finite; "
                "they are left out of the fit",
            )
        self.posterior, self.decision = posterior, decision
        return decision

    def _end_plateau_epoch(self) -> None:
        total = (self._epoch_losses or LossHistory()).total()
        if rank_and_size(self.process_group)[1] > 1:
            total = sum_over_ranks(total, self.process_group)
        loss_sum, count = total.tolist()
        self._state = end_plateau_epoch(self.config, self._state, loss_sum / count if count else math.nan)
        self._epoch_losses = None

    def _report(self, kind: str, message: str) -> None:
        """Warn once a run and kind of trouble."""
        if all(event.kind != kind for event in self.events):
            self._event(kind, self.last_epoch + 1, message)

    def _event(self, kind: str, step: int, message: str, *, of_all: bool = False) -> None:
        """Note and warn; what befell all ranks alike is told by the first."""
        self.events.append(Event(kind, step, message))
        if not of_all or rank_and_size(self.process_group)[0] == 0:
            _logger.warning("AutoWU, step %d: %s", step, message)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as plain types and tensors, loadable with ``torch.load(weights_only=True)``.

        In a process group the losses since the last test are this rank's own. Where only the first rank's state is saved, the
        others resume with its losses of that interval: they still agree, but equal the uncut run bit for bit only where each
        rank saves and loads its own state, or where the run was cut just after a test. The copies of the model that are held with
        ``model=`` are part of it ("snapshot", which may be set to None: a resumed run then has none until the next is taken).
        """
        state = asdict(self._state)
        engine_state: dict[str, Any] = getattr(self.gp, "state_dict", dict)()
        return {
            "version": _STATE_VERSION,
            "class": type(self).__name__,
            "config": asdict(self.config),
            "state": state,
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "ratios": list(self._ratios),
            "fallback_lr": self._fallback_lr,
            "verdict": None if self._verdict is None else asdict(self._verdict),
            "next_verdict": None if self._next_verdict is None else asdict(self._next_verdict),
            "observed": float(self._observed),
            "num_observed": self._num_observed,
            "events": [asdict(event) for event in self.events],
            "history": self.history.state_dict(),
            "watch": {
                "state": self._watch.state_dict(),
                "losses": None if self._watched_losses is self.history else self._watched_losses.state_dict(),
                "looked_at": self._looked_at,
                "pending": None if self._pending is None else self._pending.get(),
                "skipped": self._skipped,
            },
            "snapshot": None if self._snapshot is None else self._snapshot.state_dict(),
            "epoch_losses": None if self._epoch_losses is None else self._epoch_losses.state_dict(),
            "gp": {"class": type(self.gp).__name__, "state": engine_state},
            "decision": None if self.decision is None else asdict(self.decision),
            "posterior": None if self.posterior is None else {k: torch.as_tensor(v) for k, v in vars(self.posterior).items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the run that `state_dict` was taken of stood, whatever this object was built with, and set the LRs.

        Of this object's own arguments one matters: more `total_epochs` (or `total_steps`, where neither has epochs) than the
        state's extend the run. The warm-up stays as it is and the cooldown moves to the new end: an immediate one is stretched
        over all steps after the switch, another begins anew when the last `cooldown_fraction` of the longer run does. The LR may
        therefore rise at the point of extension.

        Raises:
            TypeError: if the state is no dictionary.
            ValueError: if the state is of another scheduler, of another version, incomplete, of more parameter groups than the
                optimizer has, or of an engine that this object was not given and that AutoWU cannot build.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict={state_dict!r}: must be a dictionary, as state_dict() gives it")
        if state_dict.get("class") != type(self).__name__:
            raise ValueError(f"class={state_dict.get('class')!r}: the state is not of {type(self).__name__}")
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(f"version={state_dict.get('version')!r}: this autowu reads version {_STATE_VERSION}")
        if missing := [key for key in self.state_dict() if key not in state_dict]:
            raise ValueError(f"state_dict without {', '.join(map(repr, missing))}: the state is incomplete")
        saved_groups, groups = len(state_dict["ratios"]), len(self.optimizer.param_groups)
        if saved_groups > groups:
            raise ValueError(
                f"state_dict of {saved_groups} parameter groups: the optimizer has {groups}; add the groups that were added "
                "during the run before the state is loaded"
            )
        self._load_engine(**state_dict["gp"])
        config = Config(**state_dict["config"])
        state = dict(state_dict["state"])
        if state["switch"] is not None:
            state["switch"] = Switch(**state["switch"])
        self._state = State(**state)
        self.last_epoch = state_dict["last_epoch"]
        # An epoch of the stable phase that the cooldown cut short is none of the longer run's.
        in_epoch = phase_at(config, self._state, self.last_epoch) == "stable"
        self.config = extended(config, self.config)
        self._step_count = state_dict["step_count"]
        # Groups that the state does not know keep their ratio to the first.
        scale = state_dict["ratios"][0] / (self._ratios[0] or 1.0)
        self._ratios = [*state_dict["ratios"], *(ratio * scale for ratio in self._ratios[saved_groups:])]
        self.base_lrs = [*state_dict["base_lrs"], *self.base_lrs[saved_groups:]]
        self._fallback_lr = state_dict["fallback_lr"]
        self._verdict, self._next_verdict = (
            None if state_dict[key] is None else Verdict(**state_dict[key]) for key in ("verdict", "next_verdict")
        )
        self._observed, self._num_observed = state_dict["observed"], state_dict["num_observed"]
        self.events = [Event(**event) for event in state_dict["events"]]
        self.history = LossHistory.from_state_dict(state_dict["history"])
        watch = state_dict["watch"]
        self._watch.load_state_dict(watch["state"])
        self._watched_losses = self.history if watch["losses"] is None else LossHistory.from_state_dict(watch["losses"])
        self._looked_at, self._skipped = watch["looked_at"], watch["skipped"]
        self._pending = None if watch["pending"] is None else LateRead(torch.tensor(watch["pending"], dtype=torch.float64))
        if self._snapshot is not None:
            self._snapshot.load_state_dict(state_dict["snapshot"])
        epoch = state_dict["epoch_losses"] if in_epoch or self.config == config else None
        self._epoch_losses = None if epoch is None else LossHistory.from_state_dict(epoch)
        decision, posterior = state_dict["decision"], state_dict["posterior"]
        self.decision = None if decision is None else SwitchDecision(**(decision | {"minima": tuple(decision["minima"])}))
        self.posterior = None
        if posterior is not None:
            arrays: dict[str, Any] = {k: np.asarray(v.cpu()) for k, v in posterior.items()}
            numbers = {"end": float(arrays["end"]), "num_losses": int(arrays["num_losses"])}
            self.posterior = CurvePosterior(**(arrays | numbers))
        self._write_lrs()

    def _load_engine(self, *, state: dict[str, Any], **saved: str) -> None:
        if type(self.gp).__name__ != saved["class"]:
            if saved["class"] == ClosedFormGP.__name__:
                self.gp = ClosedFormGP()
            elif saved["class"] == GPyTorchGP.__name__:
                self.gp = GPyTorchGP()
            else:
                raise ValueError(f"gp={self.gp!r}: the state is of an engine {saved['class']}; pass one like it as gp=")
        if hasattr(self.gp, "load_state_dict"):
            self.gp.load_state_dict(state)

    def _write_lrs(self) -> None:
        """Set the LRs of the coming step: a restored run must not depend on the order in which its parts were restored."""
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"] for g in self.optimizer.param_groups]

    def __repr__(self) -> str:
        config, switch = self.config, self.switch
        parts = [
            f"phase={self.phase!r}",
            f"step={self.last_epoch}/{config.total_steps}",
            f"lr={self.lr_at(self.last_epoch):.4g}",
        ]
        if switch is None:
            parts.append(f"lr_range=({config.min_lr:g}, {config.max_lr:g})")
        else:
            parts.append(f"switch=(step={switch.step}, lr={switch.lr:.4g})")
        parts += [f"cooldown_type={config.cooldown_type!r}", f"gp={self.gp!r}"]
        return f"{type(self).__name__}({', '.join(parts)})"


# A compiled training loop may hold the scheduler; what it does is not for the compiler.
_step_untraced = _disable_dynamo(AutoWU._step)
_observe_untraced = _disable_dynamo(AutoWU._observe)


def _note_call(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Step hook of the optimizer: set the flag of torch's schedulers."""
    optimizer._opt_called = True  # type: ignore[attr-defined]

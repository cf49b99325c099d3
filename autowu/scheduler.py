"""AutoWU, torch's face of the rooms: it passes a step's loss down, keeps the state that comes back, and sets the LRs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autowu import checks
from autowu.config import PUBLISHED, Config, checked, configure, extended
from autowu.gp import LossCurveGP
from autowu.gpytorch_engine import PublishedGP
from autowu.group_lrs import group_lrs_of
from autowu.horizon import Horizon
from autowu.kin import parts
from autowu.micro_batches import MicroBatches
from autowu.open_ended import OpenEnded
from autowu.optimizer_calls import OptimizerCalls
from autowu.phases import LRRule, LRs, State, all_lrs, phase_at, state_of
from autowu.plotting import Drawn
from autowu.rescale import rescaled
from autowu.shown import Shown
from autowu.stages import Stage, rooms_of
from autowu.states import VERSION, readable, whole_or_not
from autowu.warm_up import stage_of

__all__ = ["AutoWU"]


class AutoWU(Shown, OpenEnded, Drawn):
    r"""Finds the peak LR and the length of the warm-up during the run (automated warm-up, Kim et al. 2021, arXiv 2107.05855).

    The LR grows exponentially while the loss falls. Once a Gaussian process on the losses says that their minimum is past, the LR
    goes back to somewhat below what it was there, the peak, stays there for a while, and decays to the end of the T steps. Call
    :meth:`step` with the training loss after every optimizer step. In a process group each rank passes the loss of its own batch.
    docs/how-it-works.md tells what happens in a step, docs/arguments.md more of each argument.

    Args:
        optimizer: any torch optimizer; the ratios between the LRs of its parameter groups (and timm's ``lr_scale``) are kept. A
            list of them, each with parameters of its own, has one schedule in which each has a peak LR of its own.
        steps_per_epoch: optimizer steps per epoch, 1 or more.
        total_epochs: epochs in the run, 1 or more; T is their product.
        total_steps: T, in place of the two counts. With no length at all the LR is held until :meth:`start_cooldown`.
        total_samples: budget of samples over all ranks, 1 or more; then pass those of each step to :meth:`step`.
        total_tokens: likewise of tokens.
        total_seconds: budget of wall-clock time from step to step, above 0, without that spent within :meth:`paused`.
        immediate_cooldown: True decays from the switch on; False holds the peak and decays over the last `cooldown_fraction` of T.
        cooldown: "auto" begins the cooldown as soon as the loss has stopped improving, at the end of a length or before.
        cooldown_type: "cosine", "half_cosine", "linear" or "sqrt"; see :func:`autowu.schedules.cooldown_factor`.
        cooldown_fraction: share of T, in (0, 1), for a cooldown that is not immediate.
        min_lr: LR of step 0, above 0, and the lowest peak; None: by the optimizer's family, see
            :data:`autowu.families.LR_RANGES`. Of several optimizers, as `max_lr` and `peak_factor`, one for all or a list.
        max_lr: LR that a full warm-up would reach, above `min_lr`; None: by the optimizer's family.
        max_warmup_fraction: length W of a full warm-up as a share of T, in (0, 1]. None: 0.32, or 9.4 / sqrt(T) if that is less.
        max_warmup_steps: W itself, 1 or more; None: by the share, or 600 where the run has no length.
        warmup_type: "two_speed", "exp" or "linear"; see :func:`autowu.schedules.warmup_lr`.
        warmup_unit: "step", or "epoch" to hold the LR within an epoch.
        stable_type: "constant", or "inverse_sqrt" to fall in a long stable phase; see :func:`autowu.schedules.stable_factor`.
        decay_phase_stat: "loss" lowers the LR in the stable phase when an epoch's mean loss has not improved for over 5 epochs.
        decay_phase_factor: in (0, 1], by which it is lowered then; without `decay_phase_stat` after every stable epoch.
        test_interval: steps between tests, "epoch", or None for about 60 tests in a full warm-up.
        patience: tests in a row that must find the minimum past, 1 or more.
        confidence: probability that each must exceed, in (0.5, 1).
        min_contrast: standard deviations that the fall to the minimum and the rise from it must make up together, 0 or more.
        min_rise: share of the fall that the rise must make up, sure by four standard deviations: else it is a first dip, or noise
            on a plateau. 0: no matter how much, and the peak follows from the minimum in place of its valley's far edge.
        peak_factor: the peak LR as a share of the LR at that edge, in (0, 1]; None: by family, length and momentum.
        gp: "closed-form" (:class:`~autowu.gp.ClosedFormGP`), "gpytorch" (:class:`~autowu.gpytorch_engine.GPyTorchGP`, an extra),
            or any :class:`~autowu.gp.LossCurveGP`.
        device: where the GP does its sums; None for the device of the losses.
        seed: of the draws that the GPyTorch engine makes.
        rollback: whether to copy what trains and the optimizer's state, and to put it back where training overshoots or diverges.
        model: what is trained, to have its buffers copied as well.
        snapshot_device: where the copies are held: None for beside the original, or on the host where there is no room; "cpu".
        on_rollback: is called with the step of a copy that was put back, for what else must go back.
        watch: whether to watch the loss for explosions and divergence.
        process_group: the ranks that train together; None for the default group, if there is one.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of its range, naming it, its value and the range.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scheduler = AutoWU(optimizer, steps_per_epoch=10, total_epochs=20, model=model)
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
        config: the arguments as resolved, a :class:`~autowu.phases.Config`.
    """

    last_epoch: int
    base_lrs: list[float | Tensor]

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        steps_per_epoch: int | None = None,
        total_epochs: int | None = None,
        *,
        total_steps: int | None = None,
        total_samples: int | None = None,
        total_tokens: int | None = None,
        total_seconds: float | None = None,
        immediate_cooldown: bool = False,
        cooldown: str | None = None,
        cooldown_type: str = "linear",
        cooldown_fraction: float = 0.6,
        min_lr: float | Sequence[float | None] | None = None,
        max_lr: float | Sequence[float | None] | None = None,
        max_warmup_fraction: float | None = None,
        max_warmup_steps: int | None = None,
        warmup_type: str = "two_speed",
        warmup_unit: str = "step",
        stable_type: str = "constant",
        decay_phase_stat: str | None = None,
        decay_phase_factor: float = 1.0,
        test_interval: int | str | None = None,
        patience: int = 4,
        confidence: float = 0.95,
        min_contrast: float = 6.0,
        min_rise: float = 0.2,
        peak_factor: float | Sequence[float | None] | None = None,
        gp: str | LossCurveGP = "closed-form",
        device: torch.device | str | int | None = None,
        seed: int = 0,
        rollback: bool = True,
        model: nn.Module | None = None,
        snapshot_device: torch.device | str | int | None = None,
        on_rollback: Callable[[int], object] | None = None,
        watch: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        arguments = checked(locals())
        stepped: Optimizer = arguments["optimizer"]
        self.config: Config = configure(arguments)
        self._state = State()
        self._rule = LRRule(self.config, self._state)
        self._rooms = rooms_of(self.config, arguments)
        self._micro_batches = MicroBatches()
        self._calls = OptimizerCalls(stepped, self._rooms.log)
        self._horizon = Horizon(self.config, arguments, self._rooms.ranks, self._rooms.log)
        self._groups = group_lrs_of(parts(stepped))
        if resting := self._groups.resting:
            self._rooms.log.once("frozen", 0, f"parameter groups {resting} have an LR of 0, and keep it until it is set")
        self._stage: Stage = stage_of(self.config, self._state, self._rooms, self._groups.largest)
        super().__init__(stepped)

    @classmethod
    def paper(
        cls,
        optimizer: Optimizer | Sequence[Optimizer],
        steps_per_epoch: int | None = None,
        total_epochs: int | None = None,
        **overrides: Any,
    ) -> AutoWU:
        """AutoWU as published, for those who reproduce the paper (Kim et al. 2021 and its code); docs/paper.md compares.

        Args:
            overrides: any keyword argument of :class:`AutoWU`.

        Raises:
            ImportError: if GPyTorch is not installed and no other engine is given.
        """
        if overrides.get("model") is not None:
            overrides.setdefault("rollback", True)
        if "gp" not in overrides:
            overrides["gp"] = PublishedGP(seed=checks.integer("seed", overrides.get("seed", 0)))
        return cls(optimizer, steps_per_epoch, total_epochs, **(dict(PUBLISHED) | overrides))

    def get_lr(self) -> list[float | Tensor]:
        """LR of the coming optimizer step for each parameter group, as torch's schedulers compute it inside `step`."""
        self._meet_groups()
        lrs: list[float | Tensor] = self._groups.of(all_lrs(self.config, self._state, self.last_epoch))
        return lrs

    def _meet_groups(self) -> None:
        if told := self._groups.adopt(self.optimizer):
            self._rooms.log.once("lr", self.last_epoch, told)
        self._groups.join(self.optimizer, self.base_lrs)

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
        (_observe_untraced if torch.compiler.is_compiling() else AutoWU._observe)(self, loss)

    def _observe(self, loss: float | Tensor) -> None:
        self._micro_batches.observe(checks.loss(loss))

    def observe_validation(self, loss: float | Tensor) -> None:
        """Observe a loss on held-out data, wherever it was evaluated: an LR at which the run overfits is lowered.

        Of several before the next step the mean counts. In a process group all ranks call it between the same two steps. What is
        done stands in docs/how-it-works.md. `loss` may be, and what is raised is, as in :meth:`step`.
        """
        self._rooms.held_out.observe(checks.loss(loss))
        self._stage.busy_at = 0

    def step(self, loss: float | Tensor | None = None, *, samples: int | None = None, tokens: int | None = None) -> None:
        """Record the loss of the optimizer step just taken and set the LR of the next one.

        Waits for the device only in a test, for one read of a few kilobytes, and where a copy is due, some 200 times at most. A
        call for which the optimizer was not called, as a ``GradScaler`` skipped it or a wrapper calls several times, is no step.

        Args:
            loss: the training loss: a float, or a tensor of one element and any floating dtype, on any device, with or without its
                graph. It is not kept alive, and survived where it is not finite. It is averaged with what was observed since the
                last step, see :meth:`observe`; None where that is all. With neither the step counts as one with a missing loss.
            samples: how many this rank has taken for the step, 0 or more; needed with `total_samples`, else ignored.
            tokens: likewise; needed with `total_tokens`.

        Raises:
            TypeError: if `loss` is not a floating-point number, or `samples` or `tokens` no integer where they are needed.
            ValueError: if `loss` has several elements, or a count is below 0; at the first step of ranks whose arguments differ.
        """
        if torch.compiler.is_compiling():
            _step_untraced(self, loss, samples, tokens)
        else:
            self._step(loss, samples, tokens)

    def _step(self, loss: float | Tensor | None, samples: int | None, tokens: int | None) -> None:
        if not self._rooms.ranks.alone:
            self._rooms.compare(self.config, self.last_epoch)
            self._stage.busy_at = 0  # no loss waits on one rank and not on another
        counted = samples is not None or tokens is not None or self.config.budget is not None
        used = self._horizon.budget.of_step(self.config, samples, tokens) if counted else 0.0
        loss = self._micro_batches.loss_of_step(loss)
        if used:
            self._horizon.budget.own += used
        step, before = self.last_epoch + 1, self._state
        if self._calls.took_step(self.optimizer, step):
            if (config := self._horizon.after_step(self.config, before, step)) is not self.config:
                self._plan(config)
            if is_first := self._step_count == 1:
                self._plan(self._rooms.after_first_step(self.config))
            self._state, self._stage = self._stage.after_step(step, loss, before)
            if is_first:  # where torch may have to warn of the order of the two calls
                LRScheduler.step(self)
            else:  # the same, in half the time
                self._step_count, self.last_epoch = self._step_count + 1, step
                self._write_lrs()
        else:
            self._state, self._stage = self._stage.after_skip(self.last_epoch, loss, before, self._calls.skipped)
            if self._state is not before:
                self._write_lrs()

    def _initial_step(self) -> None:
        # Torch's constructor calls this to set the first LR; no loss has been seen.
        self._step_count = 0
        LRScheduler.step(self)

    def _write_lrs(self) -> None:
        """Set the LRs of the coming step: a restored run must not depend on the order in which its parts were restored."""
        if self._rule.state is not self._state or self._rule.config is not self.config:
            self._rule = LRRule(self.config, self._state)
        lr: LRs = all_lrs(self.config, self._state, self.last_epoch) if self.config.others else self._rule.at(self.last_epoch)
        if (written := self._groups.renew(self.optimizer, lr)) is None:
            self._meet_groups()
            written = self._groups.write(self.optimizer, lr)
        self._last_lr = written

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as plain types and tensors, loadable with ``torch.load(weights_only=True)``.

        In a process group the losses since the last test are this rank's own. Ranks that resume from the first one's state have its
        losses of that interval: they agree, but equal the uncut run bit for bit only where each saves and loads its own state, or
        where the cut was just after a test. Copies are part of it ("snapshot"; with None a resumed run has none until the next).
        """
        return {
            "version": VERSION,
            "class": type(self).__name__,
            "config": asdict(self.config),
            "state": asdict(self._state),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "stage": self._stage.state_dict(),
            **{name: room.state_dict() for name, room in self._named_rooms().items()},
            "groups": self._groups.as_edited(self.optimizer),
        }

    def _named_rooms(self) -> dict[str, Any]:
        """What saves and loads itself, by the name under which it is saved."""
        own = {"groups": self._groups, "micro_batches": self._micro_batches, "calls": self._calls, "horizon": self._horizon}
        return own | self._rooms.named()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the run that `state_dict` was taken of stood, whatever this object was built with, and set the LRs.

        Of this object's own arguments one matters: more `total_epochs` (or `total_steps`, where neither has epochs) than the
        state's extend the run, unless its cooldown was asked for. The warm-up stays as it is and the cooldown moves to the new end:
        an immediate one is stretched over all steps after the switch, another begins anew when the last `cooldown_fraction` of the
        longer run does. So the LR may rise. Where both have `steps_per_epoch`, and not the same, the run keeps its place in epochs.
        A run that is over, or not as long as this object's arguments say, is warned of.

        Raises:
            TypeError, ValueError: naming the entry by its path, if the state is incomplete or damaged; if it is of another
                scheduler, of a version that is not read, of more parameter groups than the optimizer has, or of an engine that was
                not given and that AutoWU cannot build. This object is then as it was.
        """
        state = readable(state_dict, type(self).__name__, *(len(part.param_groups) for part in parts(self.optimizer)))
        with whole_or_not([self, *self._named_rooms().values()], self.gp):
            self._take_over(rescaled(state, self.config), saved=state)
        self._rooms.ranks.compared = False

    def _take_over(self, state: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        for name, room in self._named_rooms().items():
            room.load_state_dict(state[name])
        config, self._state, self.last_epoch = Config(**state["config"]), state_of(state["state"]), state["last_epoch"]
        self._step_count, self.base_lrs = state["step_count"], self._groups.base_lrs(state["base_lrs"], self.base_lrs)
        planned = config if self._horizon.moved else self.config
        self.config = extended(config, planned)
        self._rooms.record.steer(self.last_epoch, config, self._state, self.config, self._state)
        self._rooms.go_on(self.last_epoch, self.config)
        self._stage = stage_of(self.config, self._state, self._rooms, self._groups.largest)
        # An epoch of the stable phase that the cooldown cut short is none of a longer run's.
        whole = self.config == config or phase_at(config, self._state, self.last_epoch) == "stable"
        self._stage.load_state_dict(state["stage"] if whole else {**state["stage"], "epoch": None, "plateau": None})
        self._state = self._state if self.config == config else self._stage.watch_again(self.last_epoch, self._state)
        self._write_lrs()
        self._rooms.log.resumed(self.config, self._state, self.last_epoch, planned, saved)


# A compiled training loop may hold the scheduler; what it does is not for the compiler.
_step_untraced = _disable_dynamo(AutoWU._step)
_observe_untraced = _disable_dynamo(AutoWU._observe)

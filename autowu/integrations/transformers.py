"""AutoWU in the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from autowu.integrations.trackers import values
from autowu.scheduler import AutoWU

__all__ = ["AutoWUMixin", "AutoWUTrainer", "StopWhenDone"]


class StopWhenDone(TrainerCallback):  # type: ignore[misc]
    """Has a Trainer stop where its AutoWU says that the run is over."""

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> Any:
        """After a step of the scheduler."""
        control.should_training_stop |= bool(getattr(parts.get("lr_scheduler"), "should_stop", False))
        return control


class AutoWUMixin:
    """Gives a Trainer an :class:`~autowu.scheduler.AutoWU` over all its steps, and the loss of every optimizer step.

    AutoWU is given the Trainer's model, so that a warm-up that went too far is undone whole, batch-norm statistics and all;
    ``lr_scheduler_kwargs={"model": None}`` leaves it out. Its other arguments are ``TrainingArguments(lr_scheduler_kwargs={...})``;
    ``total_seconds`` among them takes the place of the Trainer's steps, and so does ``total_steps=None``, an open end. The Trainer
    stops where AutoWU ends the run. Its phase, P(minimum past) and events are in the Trainer's log. Of the other
    arguments ``learning_rate`` gives no peak (AutoWU finds it), only the LR to go on with if no loss curve could be fitted;
    ``lr_scheduler_type`` and the warm-up arguments have no effect.

    A scheduler passed as ``optimizers=(optimizer, scheduler)`` is left as it is. If it is an AutoWU it is given the losses.

    Example::

        class MyTrainer(AutoWUMixin, Seq2SeqTrainer): ...
    """

    args: Any
    model: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    is_deepspeed_enabled: bool
    _created_lr_scheduler: bool
    state: Any
    _loss_of_step: Any = 0.0
    add_callback: Any
    remove_callback: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Build the AutoWU of a run of `num_training_steps` optimizer steps, unless the Trainer was given a scheduler.

        Raises:
            TypeError, ValueError: if AutoWU does not take ``args.lr_scheduler_kwargs``.
            NotImplementedError: under DeepSpeed.
        """
        if self.is_deepspeed_enabled and (self.lr_scheduler is None or isinstance(self.lr_scheduler, AutoWU)):
            raise NotImplementedError("AutoWU does not work under DeepSpeed, which steps schedulers before the loss is known")
        self._loss_of_step = 0.0
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            kwargs = {"model": self.model} | (self.args.lr_scheduler_kwargs or {})
            if "total_seconds" not in kwargs:
                kwargs = {"total_steps": num_training_steps} | kwargs
            self.lr_scheduler = AutoWU(optimizer, **kwargs)
            self._created_lr_scheduler = True
        if isinstance(self.lr_scheduler, AutoWU):
            self.remove_callback(StopWhenDone)
            self.add_callback(StopWhenDone)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's own; hands the loss of the optimizer step to AutoWU. Does not wait for the device."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if isinstance(self.lr_scheduler, AutoWU):
            # Divided by the Trainer, or by the number of items in all micro-batches: their sum is the loss that is logged.
            self._loss_of_step = self._loss_of_step + loss
            if self.accelerator.sync_gradients:
                self.lr_scheduler.observe(self._loss_of_step)
                self._loss_of_step = 0.0
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's own; with a loss go AutoWU's numbers, and the words of its events before it into ``state.log_history``."""
        if isinstance(self.lr_scheduler, AutoWU) and "loss" in logs:
            logs.update(values(self.lr_scheduler))
            history = self.state.log_history  # a resumed run has that of the run before
            for event in self.lr_scheduler.events[sum("autowu_event" in entry for entry in history) :]:
                history.append({"autowu_event": event.kind, "message": event.message, "step": event.step})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class AutoWUTrainer(AutoWUMixin, Trainer):  # type: ignore[misc]
    """The Trainer with :class:`AutoWUMixin`; takes what the Trainer takes."""

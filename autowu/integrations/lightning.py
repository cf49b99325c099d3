"""AutoWU in Lightning's Trainer, by a callback: the module has no line of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from autowu.integrations import trackers
from autowu.range_test import FoundLR
from autowu.range_test import find_lr as _find_lr
from autowu.scheduler import AutoWU

_logger = logging.getLogger("autowu")

__all__ = ["AutoWUCallback", "find_lr"]

_LENGTHS: Final = ("steps_per_epoch", "total_epochs", "total_steps", "total_samples", "total_tokens", "total_seconds")


class AutoWUCallback(L.Callback):
    """Gives the module's optimizer an :class:`~autowu.AutoWU`, and that the loss of every training step.

    The module's ``configure_optimizers`` returns the optimizer alone, or an AutoWU as its scheduler. Lightning steps it and saves
    it in its checkpoints. AutoWU is given the module as ``model=``. Its phase, P(minimum past) and LR go to the Trainer's loggers,
    and its figure at the end too, as ``autowu.png`` in ``trainer.log_dir``, or in ``default_root_dir``.

    Args:
        figure: whether to draw the figure.
        arguments: of :class:`~autowu.AutoWU`; with no length that of the Trainer, ``estimated_stepping_batches``.

    Raises:
        ValueError: in ``trainer.fit``, of a module with several optimizers, with a scheduler of another kind or with manual
            optimization.

    Attributes:
        scheduler: the AutoWU of the run, None before it.

    Example::

        trainer = L.Trainer(max_epochs=20, callbacks=[AutoWUCallback()])
        trainer.fit(module, train_loader)
    """

    def __init__(self, *, figure: bool = True, **arguments: Any) -> None:
        self.figure: bool = figure
        self.arguments: dict[str, Any] = arguments
        self.scheduler: AutoWU | None = None
        self._logged = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have the module's two methods pass by here until the end of the run."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError("AutoWUCallback: the module has manual optimization; call scheduler.step(loss) in its training_step")
        self.scheduler, self._logged = None, 0
        configure, training_step = pl_module.configure_optimizers, pl_module.training_step

        @functools.wraps(configure)
        def configure_optimizers() -> Any:
            return self._configured(configure(), trainer, pl_module)

        @functools.wraps(training_step)
        def observed(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is not None and self.scheduler is not None:
                self.scheduler.observe(loss)
            return output

        vars(pl_module).update(configure_optimizers=configure_optimizers, training_step=observed)

    def _configured(self, made: Any, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """What ``configure_optimizers`` is taken to have returned."""
        optimizer, scheduler = _parts(made)
        if isinstance(scheduler, AutoWU):
            self.scheduler = scheduler
            return made
        arguments = {"model": pl_module} | self.arguments
        if not any(name in arguments for name in _LENGTHS) and math.isfinite(steps := trainer.estimated_stepping_batches):
            arguments["total_steps"] = int(steps)
        self.scheduler = AutoWU(optimizer, **arguments)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Log, as often as the Trainer does."""
        step = trainer.global_step
        if self.scheduler is None or step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step
        for logger in trainer.loggers:
            logger.log_metrics(trackers.values(self.scheduler), step=step - 1)

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Draw the figure."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective
        if self.scheduler is None or not self.figure or not trainer.is_global_zero:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure = self.scheduler.plot()
            figure.savefig(folder / "autowu.png", dpi=150)
            for logger in trainer.loggers:
                if (run := getattr(logger, "run_id", None)) and hasattr(logger.experiment, "log_figure"):  # of MLflow a client
                    logger.experiment.log_figure(run, figure, "autowu.png")
                else:
                    trackers.log_figure(self.scheduler, logger.experiment)
        except ImportError:  # without matplotlib there is none
            pass
        except Exception as error:  # the run is over and well
            _logger.warning("AutoWU: the figure could not be kept: %s", error)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its methods back."""
        for name in ("configure_optimizers", "training_step"):
            vars(pl_module).pop(name, None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same."""
        self.teardown(trainer, pl_module, "fit")


def _parts(made: Any) -> tuple[Optimizer, Any]:
    """The optimizer, and the scheduler if any, of what ``configure_optimizers`` returned."""
    schedulers: Any = ()
    if isinstance(made, Sequence) and len(made) == 2 and isinstance(made[0], Sequence):
        made, schedulers = made
    if isinstance(made, Sequence) and len(made) == 1:
        (made,) = made
    if isinstance(made, Mapping):
        made, schedulers = made["optimizer"], [s] if (s := made.get("lr_scheduler")) else []
    if not isinstance(made, Optimizer):
        raise ValueError("AutoWUCallback: configure_optimizers must return one optimizer")
    found = [s["scheduler"] if isinstance(s, Mapping) else s for s in schedulers]
    if found and not isinstance(found[0], AutoWU):
        kind = type(found[0]).__name__
        raise ValueError(f"AutoWUCallback: configure_optimizers returns a scheduler of its own, {kind}; return the optimizer alone")
    return made, found[0] if found else None


def find_lr(
    trainer: L.Trainer, model: L.LightningModule, train_dataloaders: Any = None, datamodule: Any = None, **arguments: Any
) -> FoundLR:
    """:func:`autowu.find_lr` for a LightningModule, in the place of ``Tuner(trainer).lr_find(model)``.

    The Trainer sets up everything as for a run: strategy, precision, loaders, accumulation. It takes no step of its own, and
    neither its callbacks nor its loggers hear of it. Model and random generators are as before.

    Args:
        trainer, model, train_dataloaders, datamodule: as of ``trainer.fit``.
        arguments: of :func:`autowu.find_lr`: ``steps``, ``min_lr``, ``max_lr``.

    Raises:
        ValueError: of a module with several optimizers or with manual optimization; of a trainer that has nothing left to do.
    """
    if not model.automatic_optimization:
        raise ValueError("find_lr: the module has manual optimization; call autowu.find_lr with a step_fn")
    search = _Search(arguments)
    with isolate_rng(), _alone(trainer, search):
        trainer.fit(model, train_dataloaders, datamodule=datamodule)
    if search.found is None:
        raise ValueError("find_lr: the trainer has trained to its end already; give it a new one")
    return search.found


class _Search(L.Callback):
    """Makes the search where a run would begin, and ends that."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.found: FoundLR | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"find_lr: the module has {len(trainer.optimizers)} optimizers, must be one")
        numbers = iter(range(2**62))

        def step_fn(batch: Any) -> torch.Tensor:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            output: Any = trainer.strategy.training_step(batch, next(numbers))
            loss: torch.Tensor = output["loss"] if isinstance(output, Mapping) else output
            return loss

        scaler, loader = getattr(trainer.precision_plugin, "scaler", None), trainer.train_dataloader
        if isinstance(loader, (list, tuple, dict)):
            loader = _Together(loader, trainer.fit_loop._combined_loader)
        given: dict[str, Any] = {"accumulate": trainer.accumulate_grad_batches, "scaler": scaler} | self.arguments
        vars(pl_module).update(log=_unheard, log_dict=_unheard)
        try:
            self.found = _find_lr(pl_module, trainer.optimizers[0], loader=loader, step_fn=step_fn, **given)
        finally:
            for name in ("log", "log_dict"):
                del vars(pl_module)[name]
        trainer.should_stop = True


class _Together:
    """Several loaders, combined as the Trainer does."""

    def __init__(self, loaders: Any, combined: Any) -> None:
        self.loaders, self.mode = loaders, combined._mode

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _, _ in CombinedLoader(self.loaders, self.mode))


def _unheard(*args: Any, **kwargs: Any) -> None:
    """In the place of ``module.log``."""


@contextlib.contextmanager
def _alone(trainer: Any, callback: L.Callback) -> Iterator[None]:
    """Have the Trainer hear of one callback alone, with no logger, no validation, and no steps that it must take."""
    kept: dict[str, Any] = {name: getattr(trainer, name) for name in ("callbacks", "loggers", "num_sanity_val_steps")}
    limits: dict[str, Any] = {name: getattr(trainer.fit_loop, name) for name in ("min_epochs", "max_epochs")}
    least = trainer.fit_loop.epoch_loop.min_steps
    trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps = [callback], [], 0
    trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None  # else it would go on until then
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        for name, value in limits.items():
            setattr(trainer.fit_loop, name, value)
        trainer.fit_loop.epoch_loop.min_steps = least

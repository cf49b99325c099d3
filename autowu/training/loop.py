"""The training loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autowu.training.build import Parts
from autowu.training.checkpoints import Checkpoints
from autowu.training.config import TrainConfig
from autowu.training.console import NullConsole
from autowu.training.data import Loaders
from autowu.training.evaluation import average_batch_norm, evaluate
from autowu.training.generators import seed_epoch, set_random_state
from autowu.training.process import Process
from autowu.training.progress import EpochSteps, Progress
from autowu.training.records import NullRecorder, epoch_row
from autowu.training.signals import SAVE, Stopped, StopSignals

__all__ = ["Loop", "train_step"]


@dataclass(frozen=True)
class Loop:
    """Trains `parts`; every process of a run runs it, in step with the others."""

    config: TrainConfig
    process: Process
    parts: Parts
    loaders: Loaders
    checkpoints: Checkpoints
    recorder: NullRecorder
    console: NullConsole
    signals: StopSignals

    def train(self, progress: Progress) -> Progress:
        """Train from `progress` to the end; where the run stands then.

        Raises:
            Stopped: if a signal asks for it. A checkpoint of all steps is saved.
        """
        while not self.is_over(progress):
            started = time.perf_counter()
            steps = self.train_epoch(progress)
            images = steps.taken * self.config.step_size * self.process.world_size
            images_per_s = images / (time.perf_counter() - started)
            for model in dict.fromkeys((self.parts.model, self.parts.tested)):
                average_batch_norm(model, self.process)
            test = evaluate(self.parts, self.loaders.test, self.process)
            rows = steps.rows(self.parts.events)  # the one read of the epoch's losses
            seconds = time.perf_counter() - started
            row = epoch_row(rows, steps.phase, test, seconds, images_per_s)
            progress = progress.after_epoch(row, seconds)
            self.recorder.epoch(rows, row)
            self.checkpoints.save(progress)
            self.console.epoch(row)
            if not self.is_over(progress) and (number := self.asked()) > SAVE:
                raise Stopped(number)
        return progress

    def is_over(self, progress: Progress) -> bool:
        """Whether all epochs are done, or AutoWU has ended the run."""
        return self.has_ended() or (self.config.max_time is None and progress.epochs >= self.config.epochs)

    def has_ended(self) -> bool:
        """Whether AutoWU has ended the run, in whatever epoch."""
        return self.config.ends_early and self.parts.autowu is not None and self.parts.autowu.should_stop

    def asked(self, save: bool = False) -> int:
        """The signal that has come, as :meth:`StopSignals.asked` says it; a first Ctrl-C may ask for a cooldown."""
        number = self.signals.asked(save)
        if self.signals.cools() and self.parts.autowu is not None:
            self.parts.autowu.start_cooldown(self.config.cooldown_on_interrupt)
        return number

    def train_epoch(self, progress: Progress) -> EpochSteps:
        """Train the epoch that comes next, or the rest of it, or as much of it as the run has."""
        epoch, begun, parts = progress.epochs, progress.begun, self.parts
        started = time.perf_counter()
        seed_epoch(self.config.seed, epoch, self.process)
        self.loaders.sampler.set_epoch(epoch)
        parts.forward.train()
        steps = EpochSteps(self.process, epoch, len(self.loaders.train), begun)
        batches = iter(self.loaders.train)
        if begun is not None:
            for _ in begun.lrs:
                next(batches)
            if begun.random is not None:
                set_random_state(begun.random, self.process.device)
        self.checkpoints.save_branches(progress, steps)
        for images, labels in batches:
            lr, phase, probability = parts.lr, parts.phase, parts.probability
            loss = train_step(parts, images, labels)
            self.recorder.step(steps.step, parts.optimizer)  # before the scheduler changes the LR, or goes back
            parts.step_scheduler(loss)
            steps.add(lr, phase, loss, probability)
            self.console.step(epoch, lr, phase, probability)
            self.checkpoints.save_branches(progress, steps)
            if self.has_ended():
                break
            if not steps.is_complete:
                elapsed = progress.elapsed + time.perf_counter() - started
                self.between_steps(replace(progress, elapsed=elapsed), steps)
        return steps

    def between_steps(self, progress: Progress, steps: EpochSteps) -> None:
        """Save a checkpoint where one is due, or a signal asks for the end: then Stopped is raised."""
        asked = self.asked(save=self.checkpoints.is_time())
        if asked or self.checkpoints.is_step(steps.step):
            self.recorder.pause()
            self.checkpoints.save_within(progress, steps)
        if asked > SAVE:
            raise Stopped(asked)


def train_step(parts: Parts, images: Tensor, labels: Tensor) -> Tensor:
    """Take one optimizer step, of as many batches as are accumulated; this process's loss, without gradient, on the device."""
    parts.optimizer.zero_grad()
    losses = []
    batches = list(zip(images.chunk(parts.grad_accum), labels.chunk(parts.grad_accum), strict=True))
    for number, (inputs, targets) in enumerate(batches, 1):
        inputs, targets = inputs.to(parts.device, non_blocking=True), targets.to(parts.device, non_blocking=True)
        with parts.synced(number == len(batches)):
            with parts.autocast():
                loss: Tensor = parts.criterion(parts.forward(inputs), targets) / len(batches)
            parts.backward(loss)
        losses.append(loss.detach())
    parts.step_optimizer()
    return torch.stack(losses).sum()

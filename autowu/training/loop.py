"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autowu.scheduler import AutoWU
from autowu.training.build import Model, build_model, build_optimizer, build_scheduler
from autowu.training.config import TrainConfig, UsageError, parse_args
from autowu.training.cooldowns import report
from autowu.training.data import Data, Loaders, find_data, make_loaders
from autowu.training.layers import LayerLog, check_layer_log
from autowu.training.process import Process, join
from autowu.training.records import RunFolder

__all__ = ["main", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run train.py; the exit code: 0, 2 for what the user asked and cannot be, 130 after Ctrl-C."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = parse_args(argv)
        with join(config.device) as process:
            train(config, process)
    except UsageError as error:
        if is_main:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main and (config.run_dir / "checkpoint.pt").exists():
            print(f"interrupted; go on with the same options and --run-dir {config.run_dir} --resume", file=sys.stderr)
        return 130
    return 0


def train(config: TrainConfig, process: Process) -> dict[str, Any]:
    """Train as `config` says and write the run folder; the summary, on every rank.

    With several values of `cooldown_fraction` the trunk is the run of the smallest; its summary is returned.

    Raises:
        UsageError: if something in `config` cannot be, before anything was trained.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    if config.sync_bn and process.device.type != "cuda":
        raise UsageError("--sync-bn: works on GPUs only")
    data = find_data(config, process)
    folder = RunFolder(config, process.world_size) if process.is_main or config.resume else None
    built = build_model(config, data)
    loaders = make_loaders(config, process, data, built.size, built.data_config)
    if not isinstance(config.cooldown_fraction, list):
        return Run(config, process, built, loaders).train(folder, started)
    # On the main process, that the ranks do not differ on what is done.
    trunk, *others = config.cooldown_fraction
    branch_configs = [replace(config, cooldown_fraction=f, run_dir=config.run_dir / f"cooldown-{f}", resume=False) for f in others]
    done = process.gather([(c.run_dir / "summary.json").exists() for c in branch_configs])[0]
    run = Run(replace(config, cooldown_fraction=trunk), process, built, loaders)
    run.plan_branches(others)
    summary = run.train(folder, started)
    first_steps = [0, *run.branches.values()]
    del run, built  # of the device memory that the branches need
    folders = [folder or RunFolder(replace(config, resume=True), process.world_size)]
    for branch_config, is_done in zip(branch_configs, done, strict=True):
        folders.append(RunFolder(branch_config, process.world_size, folders[0]))
        if not is_done:
            _train_branch(branch_config, process, data, loaders, folders[-1])
    if process.is_main:
        report(config.cooldown_fraction, first_steps, folders)
    return summary


def _train_branch(config: TrainConfig, process: Process, data: Data, loaders: Loaders, folder: RunFolder) -> None:
    """Train a cooldown from its branch point, or from its own last checkpoint."""
    started = time.perf_counter()
    resume = process.gather(folder.checkpoint_path.is_file())[0]
    if process.is_main:
        print(f"\ncooldown_fraction {config.cooldown_fraction}", flush=True)
    Run(replace(config, resume=resume), process, build_model(config, data), loaders).train(folder, started)


class Run:
    """A model in training, its scheduler, and where its records go."""

    def __init__(self, config: TrainConfig, process: Process, built: Model, loaders: Loaders) -> None:
        self.config, self.process, self.loaders = config, process, loaders
        self.model: nn.Module = built.module.to(process.device)
        if config.sync_bn and process.world_size > 1:
            from timm.layers import convert_sync_batchnorm  # torch's own drops the activations of timm's layers

            self.model = convert_sync_batchnorm(self.model)
        if process.device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer: Optimizer = build_optimizer(config, self.model)
        if config.log_layers is not None:
            check_layer_log(config, self.optimizer)
        self.steps_per_epoch = len(loaders.train)
        self.scheduler: LRScheduler = build_scheduler(config, self.model, self.optimizer, self.steps_per_epoch)
        self.forward: nn.Module = self.model
        if process.world_size > 1:
            ids = [process.device.index] if process.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.first_epoch = 0
        self.elapsed = 0.0  # seconds of training behind the checkpoint that was resumed
        self.folder: RunFolder | None = None
        self.layers: LayerLog | None = None
        self.last: dict[str, Any] = {}
        self.bar: Any = None
        self.branches: dict[float, int] = {}
        self.begun: dict[str, Any] | None = None

    def train(self, folder: RunFolder | None, started: float) -> dict[str, Any]:
        """Train from the checkpoint, if there is one, to the end; the summary. `started` is as of `time.perf_counter`."""
        with self.records(folder):
            for epoch in range(self.first_epoch, self.config.epochs):
                self.epoch(epoch)
            return self.finish(time.perf_counter() - started)

    def plan_branches(self, fractions: Sequence[float]) -> None:
        """Save the state where the cooldowns of these shares of the run begin.

        Raises:
            UsageError: if one would begin in the warm-up.
        """
        assert isinstance(self.scheduler, AutoWU)
        for fraction in fractions:
            try:
                self.scheduler.fork_cooldown(fraction)
            except ValueError as error:
                raise UsageError(f"--cooldown-fraction {fraction}: {error}") from None
            self.branches[fraction] = self.scheduler.cooldown_start(fraction)

    @contextlib.contextmanager
    def records(self, folder: RunFolder | None) -> Iterator[None]:
        """Take up the checkpoint of a run to resume; on the main process, keep records and say what happens."""
        if folder is not None and self.config.resume:
            self._load(folder.load_checkpoint())
        elif folder is not None and folder.trunk is not None:
            assert isinstance(self.config.cooldown_fraction, float)
            self._load(folder.load_checkpoint(folder.trunk.branch_path(self.config.cooldown_fraction)))
        if folder is None or not self.process.is_main:
            yield
            return
        self.folder = folder
        branches_off = folder.trunk is not None and not folder.checkpoint_path.is_file()
        initial = self.first_epoch * self.steps_per_epoch + len(self.begun["lrs"] if self.begun else [])
        folder.start(self.first_epoch * self.steps_per_epoch)
        if self.config.log_layers is not None:
            self.layers = LayerLog(folder.path, initial, folder.trunk.path if folder.trunk and branches_off else None)
        parameters = sum(p.numel() for p in self.model.parameters())
        config, total = self.config, self.config.epochs * self.steps_per_epoch
        self.say(
            f"{config.model} ({parameters:,} parameters) on {config.data_dir or config.dataset}, {config.opt} with {config.sched}: "
            f"{config.epochs} epochs of {self.steps_per_epoch} steps of "
            f"{config.batch_size * self.process.world_size} images on {self.process.world_size} x {self.process.device.type}"
        )
        from tqdm import tqdm

        logger, lines = logging.getLogger("autowu"), _Lines(self)
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(lines)
        try:
            with tqdm(total=total, initial=initial, unit="step", disable=None, leave=False) as self.bar:
                yield
        finally:
            logger.removeHandler(lines)
            logger.setLevel(level)
            if self.layers is not None:
                self.layers.close()

    def epoch(self, epoch: int) -> None:
        """Train for one epoch, test, and record it."""
        started = time.perf_counter()
        # Seeded anew, so that a resumed run draws what the uncut one would have.
        seed = self.config.seed + (epoch + 1) * self.process.world_size + self.process.rank
        torch.manual_seed(seed)
        random.seed(seed)  # timm's transforms
        self.loaders.sampler.set_epoch(epoch)
        losses: list[Tensor] = []
        lrs: list[float] = []
        earlier: list[float] = []
        self.forward.train()
        batches = iter(self.loaders.train)
        if self.begun is not None:
            lrs, earlier = self.begun["lrs"], self.begun["losses"]
            for _ in lrs:
                next(batches)
            self._set_random_state(self.begun["random"][self.process.rank])
            self.begun = None
        self._save_branches(epoch, lrs, losses)
        for images, labels in batches:
            lrs.append(float(self.optimizer.param_groups[0]["lr"]))
            phase = self.scheduler.phase if isinstance(self.scheduler, AutoWU) else ""
            losses.append(self._step(images, labels, epoch * self.steps_per_epoch + len(lrs) - 1))
            if self.bar is not None:
                self.bar.set_postfix_str(f"epoch {epoch + 1}, LR {lrs[-1]:.3g} {phase}", refresh=False)
                self.bar.update()
            self._save_branches(epoch, lrs, losses)
        test_loss, test_accuracy = self._test()
        values = earlier + self.process.mean(torch.stack(losses)).tolist()  # the one read of the epoch's losses
        finite = [v for v in values if math.isfinite(v)]
        step = epoch * self.steps_per_epoch
        self.last = {
            "epoch": epoch + 1,
            "step": step + len(values) - 1,
            "phase": phase,
            "lr": lrs[-1],
            "train_loss": sum(finite) / len(finite) if finite else math.nan,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "seconds": round(time.perf_counter() - started, 3),
        }
        self.elapsed += time.perf_counter() - started
        state = self._state(epoch + 1)
        if self.folder is not None:
            self.folder.add_steps([(step + k, epoch + 1, lr, v) for k, (lr, v) in enumerate(zip(lrs, values, strict=True))])
            self.folder.add_epoch(self.last)
            if self.layers is not None:
                self.layers.save()
            self.folder.save_checkpoint(state)
            self.say(
                f"epoch {epoch + 1:3d}/{self.config.epochs}  LR {lrs[-1]:9.3g} {phase:8s}  "
                f"train loss {self.last['train_loss']:7.4f}  test loss {test_loss:7.4f}  test accuracy {test_accuracy:7.2%}"
            )

    def _save_branches(self, epoch: int, lrs: list[float], losses: list[Tensor]) -> None:
        """Save the state of each branch that leaves here, `lrs` and `losses` being those of the epoch so far."""
        for fraction, start in self.branches.items():
            if start != epoch * self.steps_per_epoch + len(lrs) or len(lrs) == self.steps_per_epoch:
                continue
            assert isinstance(self.scheduler, AutoWU)
            begun = {
                "lrs": list(lrs),
                "losses": self.process.mean(torch.stack(losses)).tolist() if losses else [],
                "random": self.process.gather(self._random_state()),
            }
            state = self._state(epoch) | {
                "scheduler": self._of_all(self.scheduler.fork_cooldown(fraction)),
                "step_in_epoch": len(lrs),
                "begun": begun,
            }
            if self.folder is not None:
                self.folder.save_checkpoint(state, self.folder.branch_path(fraction))

    def _random_state(self) -> dict[str, Any]:
        device = self.process.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {"torch": torch.get_rng_state(), "python": random.getstate(), "cuda": cuda}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if state["cuda"] is not None and self.process.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.process.device)

    def _step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        device = self.process.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.amp):
            loss: Tensor = self.criterion(self.forward(images), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.layers is not None and self.config.log_layers and step % self.config.log_layers == 0:
            self.layers.add(step, self.optimizer)  # the scheduler may change the LR, or go back
        if isinstance(self.scheduler, AutoWU):
            self.scheduler.step(loss)  # this process' own: AutoWU takes the mean
        else:
            self.scheduler.step()
        return loss.detach()

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Mean cross entropy and accuracy (0 to 1) over all test images."""
        if self.process.world_size > 1:
            from timm.utils import distribute_bn

            # Batch-norm statistics differ by what each process saw in its last step: the mean of them is tested and saved.
            distribute_bn(self.model, self.process.world_size, reduce=True)
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.process.device)
        for images, labels in self.loaders.test:
            images, labels = images.to(self.process.device), labels.to(self.process.device)
            with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.config.amp):
                logits = self.model(images)
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            totals += torch.stack(
                [loss.double(), (logits.argmax(1) == labels).sum().double(), loss.new_tensor(len(labels)).double()]
            )
        loss_sum, correct, count = self.process.sum(totals).tolist()
        return loss_sum / count, correct / count

    def say(self, line: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self.bar is not None and not self.bar.disable:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def _state(self, epochs_done: int) -> dict[str, Any]:
        return {
            "epoch": epochs_done,
            "elapsed": self.elapsed,
            "last": self.last,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._of_all(self.scheduler.state_dict()),
        }

    def _of_all(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """The schedulers' states of all processes. The copies of the model are alike: each keeps its own, none travels."""
        if "snapshot" not in state:
            return self.process.gather(state)
        states = self.process.gather(state | {"snapshot": None})
        states[self.process.rank] = state
        return states

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        states = state["scheduler"]
        own = states[self.process.rank]
        self.scheduler.load_state_dict(own | {"snapshot": states[0]["snapshot"]} if "snapshot" in own else own)
        self.first_epoch, self.elapsed, self.last = state["epoch"], state["elapsed"], state["last"]
        self.begun = state.get("begun")

    def finish(self, wall_s: float) -> dict[str, Any]:
        """Write summary and figure, and print the summary."""
        config = self.config
        switch = self.scheduler.switch if isinstance(self.scheduler, AutoWU) else None
        summary = {
            "test_accuracy": self.last["test_accuracy"],
            "test_loss": self.last["test_loss"],
            "train_loss": self.last["train_loss"],
            "switch_step": None if switch is None else switch.step,
            "minimum_step": None if switch is None else switch.minimum,
            "switch_by_test": None if switch is None else switch.by_test,
            "peak_lr": switch.lr if switch else max(float(lr) for lr in self.scheduler.base_lrs),
            "total_steps": config.epochs * self.steps_per_epoch,
            "wall_s": round(wall_s, 2),
            "train_s": round(self.elapsed, 2),
            "model": config.model,
            "opt": config.opt,
            "sched": config.sched,
            "batch_size": config.batch_size * self.process.world_size,
            "world_size": self.process.world_size,
        }
        if self.folder is None:
            return summary
        self.bar.close()
        if self.layers is not None:
            self.layers.finish()  # before the summary, by which a branch counts as done
        self.folder.write_summary(summary)
        self._draw(self.folder)
        how = "" if switch is None else f"  switch at step {switch.step}" + ("" if switch.by_test else " (limit of the warm-up)")
        self.say(
            f"\ntest accuracy {summary['test_accuracy']:.2%}  test loss {summary['test_loss']:.4f}{how}  "
            f"peak LR {summary['peak_lr']:.4g}  {summary['total_steps']} steps in {wall_s:.1f} s\nresults in {self.folder.path}"
        )
        return summary

    def _draw(self, folder: RunFolder) -> None:
        from autowu.plotting import draw_run

        rows = folder.rows("metrics.csv")
        scheduler = self.scheduler if isinstance(self.scheduler, AutoWU) else None
        figure = draw_run([float(r["loss"]) for r in rows], [float(r["lr"]) for r in rows], scheduler)
        figure.savefig(folder.path / "figure.png", dpi=150)


class _Lines(logging.Handler):
    """Prints AutoWU's log lines among the epochs'."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        self.run.say(record.getMessage())

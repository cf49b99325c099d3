"""Run by test_training.py in two processes: what they do together."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_training import configured, made
from torch import nn

from autowu.training.checkpoints import Checkpoints
from autowu.training.console import NullConsole
from autowu.training.evaluation import average_batch_norm, evaluate
from autowu.training.folder import RunFolder
from autowu.training.loop import Loop, train_step
from autowu.training.main import train
from autowu.training.process import join
from autowu.training.progress import EpochSteps, Progress
from autowu.training.records import NullRecorder
from autowu.training.signals import Stopped, StopSignals


def main(path):
    with join("cpu") as process:
        check(process, configured(path, "--batch-size", "64", "--epochs", "30"))


def check(process, config):
    parts, loaders = made(config, process)

    steps = EpochSteps(process, 0, 10)
    steps.add(0.5, "warmup", torch.tensor(1.0 + process.rank))
    steps.add(0.5, "warmup", torch.tensor(3.0 * process.rank))
    assert steps.losses() == [1.5, 1.5], steps.losses()

    # Each process has seen images of its own: their statistics differ until they are averaged.
    for _ in range(3):
        for images, labels in loaders.train:
            parts.step_scheduler(train_step(parts, images, labels))
    own = parts.model[1].running_mean.clone()
    both = process.gather(own)
    assert not torch.equal(*both)
    average_batch_norm(parts.model, process)
    torch.testing.assert_close(parts.model[1].running_mean, sum(both) / 2)

    # Each tests its share; the result is that of all images.
    loss, accuracy = evaluate(parts, loaders.test, process)
    images, labels = loaders.test.dataset.dataset.tensors
    with torch.no_grad():
        logits = parts.model(images)
    assert abs(loss - nn.functional.cross_entropy(logits, labels).item()) < 1e-5
    assert accuracy == (logits.argmax(1) == labels).sum().item() / 450

    # The main one alone saves; each goes on with its own state of the scheduler and the main one's copy of the model.
    folders = [RunFolder(replace(config, run_dir=config.run_dir / str(rank)), 2) for rank in range(2)]
    folder = folders[process.rank]
    folder.path.mkdir(parents=True)
    before = parts.autowu.state_dict() | {"snapshot": process.gather(parts.autowu.state_dict()["snapshot"])[0]}
    Checkpoints(parts, process, folder, config).save(Progress(3, 1.0, {"epoch": 3}))
    torch.distributed.barrier()
    assert folder.checkpoint_path.exists() == process.is_main
    saved = torch.load(folders[0].checkpoint_path, weights_only=True)["scheduler"]
    assert len(saved) == 2
    assert saved[0]["snapshot"] is not None
    assert saved[1]["snapshot"] is None
    again, _ = made(config, process)
    progress = Checkpoints(again, process, folder, config).load(folders[0].checkpoint_path)
    assert progress == Progress(3, 1.0, {"epoch": 3})
    after = again.autowu.state_dict()
    assert str(after) == str(before)
    for part in (parts, again):
        part.step_scheduler(train_step(part, *next(iter(loaders.test))))
    assert parts.lr == again.lr

    # The loop leaves the processes with one model, batch norm included.
    checkpoints = Checkpoints(again, process, folder, config)
    loop = Loop(
        replace(config, epochs=4), process, again, loaders, checkpoints, NullRecorder(), NullConsole(), StopSignals(process)
    )
    assert loop.train(progress).epochs == 4
    one, other = process.gather(again.model.state_dict())
    assert all(torch.equal(one[name], other[name]) for name in one)

    # A signal to one process stops all at the same step; they go on as the run that was not stopped.
    (alone, _), (stopped, _) = (made(config, process) for _ in range(2))
    checkpoints = Checkpoints(stopped, process, folders[0], config)
    for parts, signalled in ((alone, NullRecorder()), (stopped, Signalled(process))):
        loop = Loop(config, process, parts, loaders, checkpoints, signalled, NullConsole(), StopSignals(process))
        try:
            with loop.signals:
                loop.train_epoch(Progress())
        except Stopped as error:
            assert error.number == signal.SIGTERM  # noqa: PT017
            assert parts is stopped
    torch.distributed.barrier()
    again, _ = made(config, process)
    checkpoints = Checkpoints(again, process, folders[0], config)
    progress = checkpoints.load(folders[0].checkpoint_path)
    assert progress.steps(10) == 7
    Loop(config, process, again, loaders, checkpoints, NullRecorder(), NullConsole(), StopSignals(process)).train_epoch(progress)
    assert alone.lr == again.lr
    average_batch_norm(alone.model, process)
    average_batch_norm(again.model, process)
    one, other = alone.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)

    # Gradients that are accumulated travel once a step; the step is that of all its images at once.
    images, labels = next(iter(loaders.train))
    whole, _ = made(config, process)
    split, _ = made(replace(config, batch_size=16, grad_accum=4), process)
    for parts in (whole, split):
        parts.model[1].eval()  # batch norm would see batches of other images
    losses = [train_step(parts, images, labels) for parts in (whole, split)]
    torch.testing.assert_close(*losses)
    for one, other in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    one, other = process.gather(split.model.state_dict())
    assert all(torch.equal(one[name], other[name]) for name in one)

    # The folder is that which the main process has named.
    own = replace(config, run_dir=config.run_dir.parent / f"named-by-{process.rank}", batch_size=600, epochs=2)
    train(own, process)
    assert (config.run_dir.parent / "named-by-0" / "summary.json").exists() or not process.is_main
    assert not (config.run_dir.parent / "named-by-1").exists()


class Signalled(NullRecorder):
    """Sends the second process a signal at step 5."""

    def __init__(self, process):
        self.process = process

    def step(self, step, optimizer):
        if step == 5 and self.process.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[1], "run"))

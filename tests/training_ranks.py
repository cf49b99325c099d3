"""Run by test_training.py in two processes: what they do together."""

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
from autowu.training.process import join
from autowu.training.progress import EpochSteps, Progress
from autowu.training.records import NullRecorder
from autowu.training.signals import StopSignals


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
    Checkpoints(parts, process, folder).save(Progress(3, 1.0, {"epoch": 3}))
    torch.distributed.barrier()
    assert folder.checkpoint_path.exists() == process.is_main
    saved = torch.load(folders[0].checkpoint_path, weights_only=True)["scheduler"]
    assert len(saved) == 2
    assert saved[0]["snapshot"] is not None
    assert saved[1]["snapshot"] is None
    again, _ = made(config, process)
    progress = Checkpoints(again, process, folder).load(folders[0].checkpoint_path)
    assert progress == Progress(3, 1.0, {"epoch": 3})
    after = again.autowu.state_dict()
    assert str(after) == str(before)
    for part in (parts, again):
        part.step_scheduler(train_step(part, *next(iter(loaders.test))))
    assert parts.lr == again.lr

    # The loop leaves the processes with one model, batch norm included.
    checkpoints = Checkpoints(again, process, folder)
    loop = Loop(
        replace(config, epochs=4), process, again, loaders, checkpoints, NullRecorder(), NullConsole(), StopSignals(process)
    )
    assert loop.train(progress).epochs == 4
    one, other = process.gather(again.model.state_dict())
    assert all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    main(Path(sys.argv[1], "run"))

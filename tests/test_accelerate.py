"""AutoWU under Accelerate: it counts optimizer steps, however often the prepared scheduler calls it.

Run as a script, `python tests/test_accelerate.py FOLDER`, it is the two ranks of the tests with two processes.
"""

import functools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from forked import run_ranks
from processes import ROOT, launch, torchrun
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from autowu import AutoWU
from autowu.families import LR_RANGES
from autowu.optim import LARS

PAGE = (ROOT / "docs" / "accelerate.md").read_text()
EPOCHS = 10
BUILDS = ["before", "after", "unwrapped"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def data():
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    return TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order])


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    return torch.nn.Sequential(*layers)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Run:
    """A training under Accelerate, with AutoWU built on the optimizer `before` or `after` that is prepared, or on what it wraps."""

    def __init__(self, build="after", size=90, accumulate=1, scaler=None, overflows=(), shuffle=False, prepares=True, **arguments):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **arguments)
        if scaler is not None:
            self.accelerator.scaler = scaler
        model, loader = network(), DataLoader(data(), size, shuffle=shuffle)
        optimizer = sgd(model)
        if build == "before":
            batches = len(loader) if self.accelerator.split_batches else math.ceil(len(loader) / self.accelerator.num_processes)
            self.autowu = AutoWU(optimizer, math.ceil(batches / accumulate), EPOCHS)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        if build != "before":
            built_on = self.optimizer if build == "after" else optimizer
            self.autowu = AutoWU(built_on, math.ceil(len(self.loader) / accumulate), EPOCHS)
        self.scheduler = self.accelerator.prepare(self.autowu) if prepares else self.autowu
        self.lrs, self.losses, self.skipped, self.overflows = [], [], 0, overflows

    def epoch(self, loader, observes=False):
        for inputs, targets in loader:
            with self.accelerator.accumulate(self.model):
                loss = cross_entropy(self.model(inputs), targets)
                self.accelerator.backward(loss * 1e38 if len(self.losses) in self.overflows else loss)
                self.losses.append(loss.item())
                lr = self.optimizer.param_groups[0]["lr"]
                self.optimizer.step()
                if self.accelerator.sync_gradients and not self.optimizer.step_was_skipped:
                    self.lrs.append(lr)
                self.skipped += self.optimizer.step_was_skipped
                if observes:
                    self.autowu.observe(loss)
                self.scheduler.step(*[] if observes else [loss])
                self.optimizer.zero_grad()

    def train(self, observes=False, start=0, end=EPOCHS):
        for epoch in range(start, end):
            self.loader.set_epoch(epoch)
            self.epoch(self.loader, observes)
        return self


@functools.cache
def plain_run(size=90, accumulate=1):
    """A loop without a framework: its model, its scheduler and the LRs that its steps ran at."""
    model, loader = network(), DataLoader(data(), size)
    optimizer = sgd(model)
    scheduler = AutoWU(optimizer, math.ceil(len(loader) / accumulate), EPOCHS)
    lrs, losses = [], []
    for _ in range(EPOCHS):
        for index, (inputs, targets) in enumerate(loader, 1):
            loss = cross_entropy(model(inputs), targets)
            (loss / accumulate).backward()
            losses.append(loss.item())
            if index % accumulate and index < len(loader):
                continue
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(sum(losses) / len(losses))
            losses.clear()
    return model, scheduler, lrs


def assert_same_weights(one, other):
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def assert_same_run(run, plain):
    model, scheduler, lrs = plain
    assert run.lrs == lrs
    assert run.autowu.switch == scheduler.switch
    assert run.autowu.switch.by_test
    assert run.autowu.phase == "done"
    assert run.autowu.last_epoch == len(lrs)
    assert_same_weights(run.accelerator.unwrap_model(run.model), model)


@pytest.mark.parametrize(("build", "observes"), [("before", False), slow("after", False), ("after", True), slow("unwrapped", True)])
def test_the_run_is_that_of_a_plain_loop(build, observes):
    assert_same_run(Run(build).train(observes), plain_run())


@pytest.mark.parametrize("build", ["before", *map(slow, BUILDS[1:])])
def test_accumulation_advances_once_an_optimizer_step(build):
    # 53 micro-batches an epoch: 18 optimizer steps, the last of which has two.
    run = Run(build, size=34, accumulate=3).train(observes=True)
    assert run.autowu.last_epoch == 18 * EPOCHS
    assert len(run.losses) == 53 * EPOCHS
    assert_same_run(run, plain_run(34, 3))


@pytest.mark.parametrize("build", ["before", slow("after")])
def test_a_skipped_step_does_not_count(build):
    run = Run(build, scaler=torch.amp.GradScaler("cpu"), overflows=(0, 1, 50, 150)).train()
    assert run.skipped == 4
    assert len(run.lrs) == run.autowu.last_epoch == 20 * EPOCHS - 4
    warmup, switch = AutoWU(sgd(network()), 20, EPOCHS), run.autowu.switch.step
    assert run.lrs[:switch] == [warmup.lr_at(step) for step in range(switch)]
    assert run.lrs[switch:] == [run.autowu.lr_at(step) for step in range(switch, len(run.lrs))]


def test_what_was_observed_for_a_skipped_step_goes_to_the_next():
    run = Run(scaler=torch.amp.GradScaler("cpu"), overflows=(19,)).train(observes=True, end=1)
    assert run.skipped == 1
    assert run.autowu.last_epoch == 19
    assert run.autowu.state_dict()["micro_batches"]["count"] == 1


def test_accumulation_works_with_the_last_loss_alone():
    run = Run(size=34, accumulate=3).train()
    assert run.autowu.last_epoch == len(run.lrs) == 18 * EPOCHS
    assert run.autowu.switch.by_test


def test_every_micro_batch_counts_where_accelerate_does_not_look_after_the_scheduler():
    for arguments in ({"prepares": False}, {"step_scheduler_with_optimizer": False}):
        run = Run(accumulate=2, **arguments).train(end=1)
        assert len(run.lrs) == 10
        assert run.autowu.last_epoch == 20


OPTIMIZERS = {
    "sgd": sgd,
    "adam": lambda model: torch.optim.AdamW(model.parameters()),
    "lars": lambda model: LARS(sgd(model)),
    "unknown": lambda model: torch.optim.LBFGS(model.parameters()),
}


@pytest.mark.parametrize("family", OPTIMIZERS)
def test_the_lr_range_is_that_of_the_wrapped_optimizer(family):
    optimizer = Accelerator(cpu=True).prepare(OPTIMIZERS[family](network()))
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    config = AutoWU(optimizer, 10, 10).config
    assert (config.min_lr, config.max_lr) == LR_RANGES[family]


@pytest.mark.parametrize("build", ["before", *map(slow, BUILDS[1:])])
def test_a_run_that_goes_on_is_the_uncut_one(build, tmp_path):
    seeded = {"shuffle": True, "dataloader_config": DataLoaderConfiguration(use_seedable_sampler=True)}
    uncut = Run(build, **seeded).train()
    epochs = 1, uncut.autowu.switch.step // 20 + 2
    for epoch in epochs:
        first = Run(build, **seeded)
        for done in range(epoch):
            first.loader.set_epoch(done)
            first.epoch(first.loader)
        first.loader.set_epoch(epoch)
        first.epoch([batch for batch, _ in zip(first.loader, range(7), strict=False)])
        first.accelerator.save_state(tmp_path / str(epoch))

        again = Run(build, **seeded)
        again.accelerator.load_state(tmp_path / str(epoch))
        assert again.autowu.last_epoch == epoch * 20 + 7
        again.loader.set_epoch(epoch)
        again.epoch(again.accelerator.skip_first_batches(again.loader, 7))
        again.train(start=epoch + 1)
        assert first.lrs + again.lrs == uncut.lrs
        assert first.losses + again.losses == uncut.losses
        assert again.autowu.switch == uncut.autowu.switch
        assert_same_weights(again.model, uncut.model)


RANK_RUNS = {
    "after": {},
    "before": {"build": "before"},
    "split": {"split_batches": True},
    "own": {"prepares": False},
    "observed": {"size": 30, "accumulate": 2},
    "resumed": {},
    "scaled_after": {"scaler": True},
    "scaled_before": {"scaler": True, "build": "before"},
    "scaled_unwrapped": {"scaler": True, "build": "unwrapped"},
}


def run_rank(folder):
    for name, arguments in RANK_RUNS.items():
        if "scaler" in arguments:
            arguments = arguments | {"scaler": torch.amp.GradScaler("cpu")}
        run = Run(**({"size": 45} | arguments))
        if name == "resumed":
            run.train(end=2)
            state = run.accelerator.save_state(Path(folder) / "state")
            before, run = run, Run(size=45)
            run.accelerator.load_state(state)
            run.lrs, run.losses = before.lrs, before.losses
        run.train(observes=name == "observed", start=2 if name == "resumed" else 0)
        seen = {
            "ranks": run.accelerator.num_processes,
            "batches": len(run.loader),
            "last_epoch": run.autowu.last_epoch,
            "switch": run.autowu.switch and vars(run.autowu.switch),
            "lrs": run.lrs,
            "losses": run.losses,
        }
        (Path(folder) / f"{name}_{run.accelerator.process_index}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(__file__, folder)
    return {name: [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in (0, 1)] for name in RANK_RUNS}


@pytest.mark.slow  # ranks are held together without a host, too
@pytest.mark.parametrize("name", RANK_RUNS)
def test_two_processes_count_each_optimizer_step_once_and_switch_together(ranks, name):
    first, second = ranks[name]
    assert first["ranks"] == 2
    assert first["losses"] != second["losses"]
    assert first["lrs"] == second["lrs"]
    assert first["switch"] == second["switch"]
    assert first["switch"]["by_test"]
    steps = EPOCHS * (math.ceil(first["batches"] / 2) if name == "observed" else first["batches"])
    assert first["last_epoch"] == second["last_epoch"] == len(first["lrs"]) == steps


@pytest.mark.slow  # as the two processes above
def test_the_repeated_calls_change_nothing(ranks):
    for name in ("before", "scaled_after", "scaled_before", "scaled_unwrapped"):
        assert ranks[name][0]["lrs"] == ranks["after"][0]["lrs"]
    assert ranks["own"][0]["lrs"] == ranks["after"][0]["lrs"]
    assert ranks["own"][0]["losses"] == ranks["after"][0]["losses"]


@pytest.mark.slow  # the example is quick
def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    first, accumulation, resumption, timed = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"model": network(), "loader": DataLoader(data(), 90)}
    exec(first, names)
    assert names["autowu"].switch.by_test
    assert names["autowu"].phase == "done"
    AcceleratorState._reset_state()
    GradientState._reset_state()
    names |= {"model": network(), "loader": DataLoader(data(), 45)}
    exec(accumulation, names)
    assert names["autowu"].last_epoch == 4 * 20
    exec(resumption, names)
    assert names["autowu"].switch == names["uncut"] is not None
    assert names["autowu"].phase == "done"
    names |= {"accelerator": Accelerator(cpu=True), "new_model": network()}
    exec(timed.replace("3600", "4"), names)
    assert (names["autowu"].phase, names["autowu"].progress) == ("done", 1.0)
    assert names["optimizer"].param_groups[0]["lr"] < 0.1 * names["autowu"].switch.lr


def assert_learned(done):
    switch, total = map(int, re.search(r"peak LR \S+ from step (\d+) of (\d+)", done.stdout).groups())
    assert f"AutoWU switched at step {switch} of {total}" in done.stderr
    assert done.stdout.count("peak LR") == done.stderr.count("AutoWU switched") == 1
    assert float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1]) > 85


def test_the_example_learns():
    command = "examples/accelerate_digits.py"
    assert f"\npython {command}\n" in PAGE
    assert_learned(launch(command, "--epochs", 3))


@pytest.mark.slow  # what two processes do is held above, and that the example learns
def test_the_example_learns_in_two_processes():
    command = "examples/accelerate_digits.py --accumulate 2"
    assert f"\ntorchrun --nproc-per-node 2 {command}\n" in PAGE
    assert_learned(torchrun(2, *command.split(), "--epochs", 6))


if __name__ == "__main__":
    run_ranks(2, run_rank, sys.argv[1])

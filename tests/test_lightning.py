"""AutoWU in Lightning's Trainer: a plain loop's LRs, weights and switch, bit for bit.

Run as a script, `python tests/test_lightning.py FOLDER`, it is the two ranks of the test with two processes.
"""

import csv
import json
import math
import re
import runpy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from forked import run_ranks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from processes import ROOT, launch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from autowu import AutoWU
from autowu.events import back_at
from autowu.optim import LARS

pytestmark = [
    # Lightning itself uses what torch deprecates.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '\\w+_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need"),
]

PAGE = (ROOT / "docs" / "lightning.md").read_text()
EPOCHS = 6


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    return torch.nn.Sequential(*layers)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Batches:
    """Shuffled batches, in an order of each epoch's own; goes on within an epoch when its state is loaded."""

    def __init__(self, size=90):
        self.inputs, self.targets = digits()
        self.size, self.drawn = size, 0

    def __len__(self):
        return len(self.inputs) // self.size

    def __iter__(self):
        epoch, start = divmod(self.drawn, len(self))
        order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(self.size)[start : len(self)]:
            self.drawn += 1
            yield self.inputs[index], self.targets[index]

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


class Observing(L.LightningModule):
    def __init__(self, total_steps=None):
        super().__init__()
        self.model = network()
        self.total_steps = total_steps
        self.lrs, self.losses = [], []

    def loss(self, batch):
        inputs, targets = batch
        loss = cross_entropy(self.model(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.lr_schedulers().observe(loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = sgd(self)
        scheduler = AutoWU(optimizer, total_steps=self.total_steps or self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Monitoring(Observing):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["lr_scheduler"] |= {"monitor": "train_loss", "reduce_on_plateau": True}
        return configured


def validating(kind, **arguments):
    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val_loss", cross_entropy(self.model(inputs), targets))

    return type(f"Validating{kind.__name__}", (kind,), {"validation_step": validation_step})(**arguments)


def fit(module, loader=None, ckpt_path=None, validate=None, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    arguments = {"accelerator": "cpu", "max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False} | quiet | arguments
    trainer = L.Trainer(**arguments)
    trainer.fit(module, Batches() if loader is None else loader, validate, ckpt_path=ckpt_path)
    return module


def plain_run(size=90, accumulate=1, averages=True):
    """A loop without a framework: its model, its scheduler and the LRs that its steps ran at."""
    model, loader = network(), Batches(size)
    optimizer = sgd(model)
    scheduler = AutoWU(optimizer, total_steps=math.ceil(len(loader) / accumulate) * EPOCHS)
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
            scheduler.step(sum(losses) / len(losses) if averages else losses[-1])
            losses.clear()
    return model, scheduler, lrs


def assert_same_run(module, plain):
    model, scheduler, lrs = plain
    assert module.lrs == lrs
    assert module.lr_schedulers().switch == scheduler.switch
    assert_same_weights(module.model, model)


def assert_same_weights(one, other):
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def plain():
    return plain_run()


@pytest.mark.parametrize("kind", [Observing, Monitoring])
def test_the_run_is_that_of_a_plain_loop(kind, plain):
    module = fit(kind())
    assert_same_run(module, plain)
    scheduler = module.lr_schedulers()
    assert scheduler.switch.by_test
    assert scheduler.phase == "done"
    assert scheduler.last_epoch == len(module.lrs) == EPOCHS * 19


@pytest.mark.parametrize("kind", [Observing, Monitoring])
def test_validation_within_the_epoch_changes_nothing(kind, plain):
    validate = DataLoader(TensorDataset(*digits()), 900)
    assert_same_run(fit(validating(kind), validate=validate, val_check_interval=5), plain)


@pytest.mark.parametrize(("kind", "averages"), [(Observing, True), (Monitoring, False)])
def test_accumulation_advances_once_an_optimizer_step(kind, averages):
    # 28 micro-batches an epoch: 10 optimizer steps, the last of which has a single one.
    module = fit(kind(), Batches(64), accumulate_grad_batches=3)
    assert module.lr_schedulers().last_epoch == len(module.lrs) == EPOCHS * 10
    assert len(module.losses) == EPOCHS * 28
    assert module.lr_schedulers().switch is not None
    assert_same_run(module, plain_run(64, 3, averages))


def test_manual_optimization_is_the_same_run(plain):
    class Manual(Observing):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.lr_schedulers().step(loss)

    assert_same_run(fit(Manual()), plain)


def test_the_monitor_logs_the_lr_of_every_step(tmp_path, plain):
    monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path)
    module = fit(Monitoring(), callbacks=[monitor], logger=logger, log_every_n_steps=1)
    _, scheduler, lrs = plain
    assert module.lrs == lrs
    assert monitor.lrs["lr-SGD"] == lrs
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {int(row["step"]): float(row["lr-SGD"]) for row in rows if row["lr-SGD"]}
    assert [logged[step] for step in range(len(lrs))] == lrs
    assert lrs[scheduler.switch.step] == scheduler.switch.lr


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_resumed_within_an_epoch_is_the_uncut_one(tmp_path, accumulate):
    size = 90 if accumulate == 1 else 30
    epoch = math.ceil(len(Batches(size)) / accumulate)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    uncut = fit(
        Observing(epoch * EPOCHS), Batches(size), accumulate_grad_batches=accumulate, enable_checkpointing=True, callbacks=[saving]
    )
    switch, total = uncut.lr_schedulers().switch, len(uncut.lrs)
    before = (switch.step - 1) // 7 * 7
    assert 0 < before < total - 35
    for step in (before, before + 35):
        assert step % epoch != 0
        path = tmp_path / f"step={step}.ckpt"
        assert torch.load(path, weights_only=True)["lr_schedulers"][0]["last_epoch"] == step
        resumed = fit(Observing(epoch * EPOCHS), Batches(size), path, accumulate_grad_batches=accumulate)
        assert resumed.lrs == uncut.lrs[step:]
        assert resumed.losses == uncut.losses[-len(resumed.losses) :]
        assert resumed.lr_schedulers().switch == switch
        assert_same_weights(resumed, uncut)


@pytest.mark.slow  # within an epoch is harder
def test_a_monitored_run_resumed_at_the_end_of_an_epoch_is_the_uncut_one(tmp_path):
    # Not shuffled: Lightning takes up the order of a loader only where the run was cut within an epoch.
    loader, validate = (DataLoader(TensorDataset(*digits()), size) for size in (90, 900))
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)
    uncut = fit(validating(Monitoring), loader, validate=validate, enable_checkpointing=True, callbacks=[saving])
    step = len(loader)
    assert step < uncut.lr_schedulers().switch.step
    resumed = fit(validating(Monitoring), loader, tmp_path / f"step={step}.ckpt", validate)
    assert resumed.lrs == uncut.lrs[step:]
    assert resumed.lr_schedulers().switch == uncut.lr_schedulers().switch
    assert_same_weights(resumed, uncut)


def test_lightning_loads_the_state_of_a_loader_only_where_the_total_is_given(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=30, save_top_k=-1)
    uncut = fit(Observing(), enable_checkpointing=True, callbacks=[saving], max_epochs=3)
    path = tmp_path / "step=30.ckpt"
    given, asked = (fit(Observing(total), None, path, max_epochs=3).losses for total in (3 * 19, None))
    assert given == uncut.losses[30:]
    assert asked[0] != uncut.losses[30]


@pytest.mark.parametrize(("kind", "behind"), [(Observing, 0), (Monitoring, 1)])
@pytest.mark.parametrize("saving", [{"every_n_train_steps": 5}, {"monitor": "val_loss"}], ids=["steps", "validation"])
def test_only_a_monitored_run_is_saved_a_step_behind(tmp_path, kind, behind, saving):
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saving)
    validate = DataLoader(TensorDataset(*digits()), 900)
    callbacks = {"enable_checkpointing": True, "callbacks": [saving]}
    fit(validating(kind), validate=validate, val_check_interval=5, max_epochs=1, **callbacks)
    for step in (5, 10, 15):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert state["global_step"] == step
        assert state["lr_schedulers"][0]["last_epoch"] == step - behind


def test_a_run_can_be_extended_by_more_epochs(tmp_path, plain):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=19 * EPOCHS, save_top_k=-1)
    fit(Observing(), enable_checkpointing=True, callbacks=[saving])
    longer = fit(Observing(), None, tmp_path / f"step={19 * EPOCHS}.ckpt", max_epochs=EPOCHS + 5)
    assert len(longer.lrs) == 5 * 19
    assert longer.lr_schedulers().last_epoch == longer.lr_schedulers().config.total_steps == (EPOCHS + 5) * 19
    assert longer.lr_schedulers().switch == plain[1].switch


def test_two_dev_steps_are_enough_and_one_is_refused():
    assert fit(Observing(), fast_dev_run=2).lr_schedulers().last_epoch == 2
    with pytest.raises(ValueError, match="run of 1 steps"):
        fit(Observing(), fast_dev_run=True)


class Finetuning(Observing):
    """LARS of a head, to which Lightning's callback adds the backbone."""

    def __init__(self):
        super().__init__(2 * 19)
        self.backbone, self.head = self.model[:3], self.model[3]

    def configure_optimizers(self):
        optimizer = LARS(torch.optim.SGD(self.head.parameters(), lr=1.0, momentum=0.9))
        scheduler = AutoWU(optimizer, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_backbone_that_was_unfrozen_under_lars_is_resumed(tmp_path):
    def callbacks(**saving):
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1), ModelCheckpoint(tmp_path, filename="{step}", **saving)]

    saving = {"every_n_train_steps": 30, "save_top_k": -1}
    uncut = fit(Finetuning(), enable_checkpointing=True, callbacks=callbacks(**saving), max_epochs=2)
    resumed = fit(
        Finetuning(), None, tmp_path / "step=30.ckpt", enable_checkpointing=True, callbacks=callbacks(**saving), max_epochs=2
    )
    head, backbone = resumed.optimizers().param_groups
    assert head["params"] == list(resumed.head.parameters())
    assert set(backbone["params"]) == set(resumed.backbone.parameters())
    assert backbone["trust_coef"] == head["trust_coef"]
    assert resumed.lrs == uncut.lrs[30:]


class Keeping(Observing):
    """As the page has it: the AutoWU is kept on the module."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.autowu.observe(loss)
        return loss

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        self.autowu = configured["lr_scheduler"]["scheduler"]
        return configured


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_a_module_that_keeps_its_autowu_trains_on_where_averaging_replaces_the_scheduler():
    module = fit(Keeping(), max_epochs=4, callbacks=[StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)])
    assert len(module.losses) >= 4 * 19  # averaging runs through the data once more
    assert not isinstance(module.lr_schedulers(), AutoWU)
    assert module.autowu.last_epoch == 19
    with pytest.raises(AttributeError, match="observe"):
        fit(Observing(), max_epochs=4, callbacks=[StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)])


def test_a_module_that_keeps_its_autowu_begins_anew_after_the_search_for_an_lr(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = Keeping()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, **quiet)
    Tuner(trainer).lr_find(module, Batches(), num_training=10, update_attr=False)
    searching = module.autowu
    trainer.fit(module, Batches())
    assert module.autowu is not searching
    assert (searching.last_epoch, module.autowu.last_epoch) == (0, 2 * 19)


class Rank(Callback):
    """Writes what a rank saw to a file of its own."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_end(self, trainer, module):
        scheduler = module.lr_schedulers()
        seen = {
            "ranks": trainer.world_size,
            "last_epoch": scheduler.last_epoch,
            "switch": vars(scheduler.switch),
            "lrs": module.lrs,
            "losses": module.losses,
        }
        (self.folder / f"{type(module).__name__}_{trainer.global_rank}.json").write_text(json.dumps(seen))


@pytest.mark.slow  # with modules of another kind than the example's, below
def test_two_processes_switch_together(tmp_path):
    launch(__file__, tmp_path)
    for kind in ("Observing", "Monitoring"):
        first, second = (json.loads((tmp_path / f"{kind}_{rank}.json").read_text()) for rank in (0, 1))
        assert first["ranks"] == 2
        assert first["losses"] != second["losses"]
        assert first["lrs"] == second["lrs"]
        assert first["switch"] == second["switch"]
        assert first["switch"]["probability"] > 0.95  # of a test, at the limit of so short a warm-up
        assert first["last_epoch"] == second["last_epoch"] == len(first["lrs"]) == 20 * EPOCHS


def run_rank(folder):
    loader = DataLoader(TensorDataset(*digits()), 45, shuffle=True)
    for kind in (Observing, Monitoring):
        fit(kind(), loader, strategy="ddp", devices=2, callbacks=[Rank(folder)])


@pytest.mark.slow  # the example is quick
def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 6
    names = {"model": network(), "train_loader": DataLoader(TensorDataset(*digits()), 90)}
    for block in blocks:
        exec(block.replace("total_seconds=3600", "total_seconds=2"), names)
        names["model"] = network()
    first, resumed = names["classifier"], names["resumed"]
    assert first.lr_schedulers().switch.by_test
    assert resumed.lr_schedulers().switch == first.lr_schedulers().switch
    assert_same_weights(resumed, first)
    assert (names["timed"].autowu.phase, names["timed"].autowu.progress) == ("done", 1.0)
    for name in ("monitored", "manual"):
        assert names[name].lr_schedulers().switch == first.lr_schedulers().switch
    assert list(tmp_path.glob("logs/**/metrics.csv"))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_example_learns_in_one_process_and_in_two(processes):
    (command,) = re.findall(r"^python (examples/.*) --devices 2$", PAGE, re.MULTILINE)
    done = launch(*command.split(), "--devices", processes, "--epochs", 4)
    switch, total = map(int, re.search(r"peak LR \S+ from step (\d+) of (\d+)", done.stdout).groups())
    assert f"AutoWU switched at step {switch} of {total}" in done.stderr
    assert done.stdout.count("peak LR") == done.stderr.count("AutoWU switched") == 1
    assert (
        float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1]) > 75
    )  # chance is 10; the last digits differ between machines


def test_two_optimizers_under_one_schedule_learn_and_resume(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["muon_lightning.py", "--epochs", "6"])
    names = runpy.run_path(str(ROOT / "examples" / "muon_lightning.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"peak LRs \S+ and \S+ from step \d+ of 126", said)
    assert float(re.search(r"test accuracy ([\d.]+)%", said)[1]) > 75

    def trained(epochs, **more):
        L.seed_everything(0)
        module = names["Digits"]()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, **quiet)
        trainer.fit(module, DataLoader(TensorDataset(*digits()), 90), **more)
        return trainer, module

    trainer, first = trained(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    _, resumed = trained(2, ckpt_path=tmp_path / "first.ckpt")
    assert resumed.autowu.last_epoch == 40
    assert resumed.autowu.switch == first.autowu.switch
    state = [value for one in resumed.autowu.optimizer.optimizers for value in one.state.values()]
    assert len(state) == len(list(resumed.parameters()))
    (switch,) = (event for event in resumed.autowu.events if event.kind == "switch")
    undone = switch.step - back_at(switch)
    assert max(float(value["step"]) for value in state if "step" in value) == 40 - undone


if __name__ == "__main__":
    run_ranks(2, run_rank, sys.argv[1])

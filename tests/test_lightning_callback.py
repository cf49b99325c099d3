"""AutoWU in Lightning by a callback: the module without a line of it gets the run of one that has its two lines, bit for bit."""

import copy
import csv
import math
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_lightning import EPOCHS, PAGE, Batches, Observing, assert_same_weights, digits, fit, network, pytestmark, sgd  # noqa: F401
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from autowu import AutoWU
from autowu.integrations.lightning import AutoWUCallback, find_lr


class Plain(L.LightningModule):
    """What knows nothing of AutoWU."""

    def __init__(self):
        super().__init__()
        self.model, self.lrs = network(), []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = cross_entropy(self.model(inputs), targets)
        self.log("train_loss", loss)
        return {"loss": loss, "n": len(inputs)}

    def on_before_optimizer_step(self, optimizer):
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return sgd(self)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_is_that_of_a_module_that_observes(tmp_path, accumulate):
    callback = AutoWUCallback(figure=False, model=None)
    how = {"accumulate_grad_batches": accumulate, "default_root_dir": tmp_path}
    plain, observing = fit(Plain(), callbacks=[callback], **how), fit(Observing(), **how)
    assert plain.lrs == observing.lrs
    assert_same_weights(plain, observing)
    assert callback.scheduler.switch == observing.lr_schedulers().switch
    assert "training_step" not in vars(plain)
    assert "configure_optimizers" not in vars(plain)


def test_the_model_is_passed_and_the_run_goes_back_to_a_copy(tmp_path):
    callback = AutoWUCallback(figure=False)
    fit(Plain(), callbacks=[callback], default_root_dir=tmp_path)
    (switch,) = [event for event in callback.scheduler.events if event.kind == "switch"]
    assert "model and optimizer are back at step" in switch.message


def test_phase_and_probability_are_logged_and_the_figure_is_drawn_at_the_end(tmp_path):
    callback = AutoWUCallback()
    board = TensorBoardLogger(tmp_path, name="board")
    fit(Plain(), callbacks=[callback], logger=[CSVLogger(tmp_path), board], log_every_n_steps=5)
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["autowu/phase"]]
    assert [int(row["step"]) for row in rows] == list(range(4, EPOCHS * 19, 5))
    phases = [float(row["autowu/phase"]) for row in rows]
    assert phases == sorted(phases)
    assert {0.0, 1.0, 2.0} <= {*phases}
    assert max(float(row["autowu/probability"] or 0) for row in rows) > 0.95
    (figure,) = tmp_path.rglob("autowu.png")
    assert figure.stat().st_size > 10_000


def test_a_run_that_is_resumed_is_the_one_that_was_never_stopped(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=50, save_top_k=-1)
    how = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    whole = fit(Plain(), callbacks=[AutoWUCallback(figure=False), saving], **how)
    callback = AutoWUCallback(figure=False, total_steps=EPOCHS * 19)
    (path,) = tmp_path.glob("*step=50.ckpt")
    resumed = fit(Plain(), callbacks=[callback], ckpt_path=path, default_root_dir=tmp_path)
    assert resumed.lrs == whole.lrs[50:]
    assert_same_weights(resumed, whole)


class Scheduled(Plain):
    def configure_optimizers(self):
        optimizer = sgd(self)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Manual(Plain):
    automatic_optimization = False


class Two(Plain):
    def configure_optimizers(self):
        return [sgd(self.model[0]), sgd(self.model[3])]


@pytest.mark.parametrize(("kind", "told"), [(Scheduled, "StepLR"), (Manual, "manual"), (Two, "one optimizer")])
def test_what_it_cannot_schedule_is_refused_in_one_line(tmp_path, kind, told):
    with pytest.raises(ValueError, match=f"AutoWUCallback: .*{told}"):
        fit(kind(), callbacks=[AutoWUCallback()], default_root_dir=tmp_path)


class WithItsOwn(Plain):
    def configure_optimizers(self):
        optimizer = sgd(self)
        scheduler = AutoWU(optimizer, total_steps=120, cooldown_type="cosine")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_an_autowu_of_the_module_is_given_the_losses(tmp_path):
    callback = AutoWUCallback(figure=False)
    fit(WithItsOwn(), callbacks=[callback], default_root_dir=tmp_path)
    assert callback.scheduler.config.cooldown_type == "cosine"
    assert callback.scheduler.switch.by_test


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_find_lr_is_the_search_alone_and_leaves_module_and_trainer_as_they_were(tmp_path, precision):
    module, loader = Plain(), DataLoader(TensorDataset(*digits()), 90, shuffle=True)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, precision=precision, default_root_dir=tmp_path, **quiet)
    callbacks, before, random = trainer.callbacks, copy.deepcopy(module.state_dict()), torch.get_rng_state()
    found = find_lr(trainer, module, loader, steps=80)
    assert found.sure
    assert math.isfinite(found.lr)
    assert trainer.callbacks is callbacks
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.lrs == []
    trainer.fit(module, loader)
    assert len(module.lrs) == 3 * len(loader)


class Both(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)["loss"] + super().training_step(batch["b"], batch_idx)["loss"]


def test_find_lr_takes_several_loaders_together(tmp_path):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    loaders = {name: DataLoader(TensorDataset(*digits()), 90) for name in ("a", "b")}
    assert find_lr(L.Trainer(accelerator="cpu", max_epochs=3, **quiet), Both(), loaders, steps=60).sure


@pytest.mark.slow  # what they show is tested above
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_blocks_of_the_page_that_have_the_callback_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python3\n(.*?)```", PAGE, re.DOTALL)
    names = {"module": Plain(), "train_loader": Batches(), "L": L}
    exec(first, names)
    assert names["callback"].scheduler.switch.by_test
    names["module"] = Plain()
    with pytest.raises(ValueError, match="give it a new one"):
        exec(second, names)
    names["trainer"] = L.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False)
    exec(second, names)
    assert names["found"].sure

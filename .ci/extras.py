"""What an extra of the installed package is for, in small: python .ci/extras.py EXTRA, from the root of the repository."""

import logging
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

import autowu

ROOT, _KEPT = Path(__file__).parent.parent, tempfile.TemporaryDirectory()
FOLDER = Path(_KEPT.name)
STEPS = 100
TRAIN = ["--model", "test_vit", "--img-size", "16", "--batch-size", "256", "--epochs", "2", "--device", "cpu", "--log-tensorboard"]


def parts():
    """A model, its optimizer, and batches of a line to fit."""
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(4, 1), torch.randn(STEPS, 16, 4)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), [(x, x.sum(1, keepdim=True)) for x in inputs]


def trained(make, prepare=lambda *parts: parts, backward=torch.Tensor.backward):
    """The scheduler after a run, of what `make` makes of an optimizer and a model."""
    model, optimizer, loader = prepare(*parts())
    scheduler = make(optimizer, model)
    for inputs, targets in loader:
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        scheduler.step(loss)
    return scheduler


def command(*arguments):
    subprocess.run(arguments, cwd=ROOT, check=True)


def gpytorch():
    for scheduler in (
        trained(lambda optimizer, model: autowu.AutoWU(optimizer, total_steps=STEPS, gp="gpytorch", model=model)),
        trained(lambda optimizer, model: autowu.AutoWU.paper(optimizer, STEPS // 10, 10)),
    ):
        assert scheduler.phase == "done"


def plot():
    trained(lambda optimizer, model: autowu.AutoWU(optimizer, total_steps=STEPS)).plot().savefig(FOLDER / "run.png")
    (FOLDER / "curve.csv").write_text("step,loss\n" + "".join(f"{k},{1 + abs(k / 20 - 1.5)}\n" for k in range(1, STEPS + 1)))
    command(Path(sysconfig.get_path("scripts")) / "autowu", "replay", FOLDER / "curve.csv", "--save", FOLDER / "replay.png")
    assert all((FOLDER / name).stat().st_size > 10_000 for name in ("run.png", "replay.png"))


def lightning():
    import lightning as L

    from autowu.integrations.lightning import AutoWUCallback

    model, optimizer, loader = parts()

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer

    callback = AutoWUCallback(figure=False)  # that needs the extra "plot", too
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=FOLDER, logger=False, callbacks=[callback])
    trainer.fit(Module(), torch.utils.data.DataLoader(loader, batch_size=None))
    assert callback.scheduler.phase == "done"


def transformers():
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    from autowu.integrations.transformers import AutoWUTrainer

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(16, (STEPS, 8))]
    arguments = TrainingArguments(output_dir=str(FOLDER), max_steps=STEPS, report_to="none", use_cpu=True)
    trainer = AutoWUTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.lr_scheduler.phase == "done"


def accelerate():
    from accelerate import Accelerator

    host = Accelerator(cpu=True)
    scheduler = trained(
        lambda optimizer, model: host.prepare(autowu.AutoWU(optimizer, total_steps=STEPS, model=host.unwrap_model(model))),
        host.prepare,
        host.backward,
    )
    assert scheduler.scheduler.phase == "done"


def timm():
    from timm import create_model
    from timm.optim import create_optimizer_v2

    from autowu.integrations.timm import AutoWUScheduler, register_optimizers

    register_optimizers()
    model = create_model("test_vit", img_size=16, num_classes=4)
    optimizer = create_optimizer_v2(model, opt="lars")
    scheduler = AutoWUScheduler(autowu.AutoWU(optimizer, 5, 1, model=model))
    for step in range(1, 6):
        loss = model(torch.randn(2, 3, 16, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(num_updates=step, metric=loss)
    assert scheduler.scheduler.phase == "done"


def train():
    import pyarrow  # noqa: F401  # of data in parquet files

    from autowu.training.main import main

    assert main([*TRAIN, "--run-dir", str(FOLDER / "run")]) == 0
    assert any((FOLDER / "run" / "tensorboard").iterdir())


def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import find_lr
    import pytorch_optimizer
    import regret
    from peers import PEERS

    case = regret.Case.parse("mlp adamw 16 60")
    for method in PEERS:
        assert regret.train(case, method, None, 0, "cpu")["finite"], method
    for method in find_lr.METHODS:
        assert find_lr.suggest(method, case, 0)["lr"] > 0, method
    assert issubclass(pytorch_optimizer.LARS, torch.optim.Optimizer)


def test():
    command(sys.executable, "-m", "pytest", "-q", "tests/test_schedules.py", "tests/test_checkpoints.py")


def dev():
    command(sys.executable, "-m", "ruff", "check", ".")
    command(sys.executable, "-m", "mypy")


def docs():
    command(sys.executable, "-m", "sphinx", "-W", "--keep-going", "docs", FOLDER / "site")  # which runs the notebooks


USES = {use.__name__: use for use in (gpytorch, plot, lightning, transformers, accelerate, timm, train, bench, test, dev, docs)}

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"
    logging.getLogger("autowu").setLevel(logging.ERROR)
    assert Path(autowu.__file__).is_relative_to(sysconfig.get_path("purelib")), f"{autowu.__file__} is not the installed one"
    USES[sys.argv[1]]()
    print(f"autowu[{sys.argv[1]}] with torch {torch.__version__}: does what it is for")

"""AutoWU in experiment trackers: what TensorBoard, W&B, trackio and MLflow keep of a run, offline."""

import logging
import math
import re

import pytest
import torch
from processes import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from autowu import AutoWU
from autowu.integrations import trackers

NAMES = {"autowu/lr", "autowu/phase", "autowu/probability", "autowu/events"}


def run(tracker=None, figure=True):
    """A run of 60 steps on a curve, logged after each."""
    logging.getLogger("autowu").setLevel(logging.ERROR)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, rows = AutoWU(optimizer, total_steps=100, rollback=False), []
    for step in range(60):
        optimizer.step()
        scheduler.step(1 + abs(step / 10 - 1.5) + 0.01 * (step % 2))
        rows.append(trackers.values(scheduler))
        if tracker is not None:
            trackers.log(scheduler, tracker)
    if tracker is not None and figure:
        assert trackers.log_figure(scheduler, tracker)
    return scheduler, rows


def test_the_numbers_are_those_of_the_run():
    scheduler, rows = run()
    assert rows[-1].keys() == NAMES
    assert all(isinstance(value, float) and math.isfinite(value) for row in rows for value in row.values())
    switch = scheduler.switch.step
    assert [row["autowu/phase"] for row in rows[: switch + 1]] == [0.0] * (switch - 1) + [1.0, 1.0]
    assert rows[switch]["autowu/lr"] == scheduler.switch.lr
    assert rows[switch]["autowu/probability"] == scheduler.switch.probability
    assert "autowu/probability" not in rows[0]


def test_tensorboard(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        _, rows = run(writer)
    kept = EventAccumulator(str(tmp_path)).Reload()
    assert {*kept.Tags()["scalars"]} == NAMES
    assert kept.Tags()["images"] == ["autowu"]
    assert [(event.step, event.value) for event in kept.Scalars("autowu/lr")] == [
        (step, pytest.approx(row["autowu/lr"])) for step, row in enumerate(rows, 1)
    ]


def test_the_block_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trackers.md").read_text(), re.DOTALL)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "optimizer": optimizer, "criterion": torch.nn.functional.mse_loss}
    names |= {"scheduler": AutoWU(optimizer, total_steps=200), "train_loader": [(torch.randn(8, 4), torch.randn(8, 1))] * 20}
    exec(block, names)
    names["writer"].close()
    assert len(EventAccumulator("board").Reload().Scalars("autowu/lr")) == 20


def test_what_is_no_tracker_is_named():
    scheduler, _ = run()
    with pytest.raises(TypeError, match=r"tracker=3: must have"):
        trackers.log(scheduler, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for whole in (False, True):
        with wandb.init(mode="offline", dir=tmp_path, project="autowu") as started:
            _, rows = run(wandb if whole else started)
            started.log({"end": 1.0}, step=61)  # what is logged at a step is kept with the next
            summary = dict(started.summary)
        assert {name: summary[name] for name in NAMES} == rows[-1]
        assert "autowu/figure" in summary


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_mlflow_offline(tmp_path, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # beside a database the figures are in ./mlruns
    if store == "sqlite":
        pytest.importorskip("sqlalchemy")  # mlflow-skinny comes without
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}" if store == "sqlite" else (tmp_path / "mlruns").as_uri())
    mlflow.set_experiment("autowu")
    with mlflow.start_run() as started:
        _, rows = run(mlflow)
    client = mlflow.MlflowClient()
    assert client.get_run(started.info.run_id).data.metrics == pytest.approx(rows[-1])
    assert [metric.step for metric in client.get_metric_history(started.info.run_id, "autowu/lr")] == list(range(1, 61))
    assert list(tmp_path.rglob("autowu.png"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trackio_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    trackio.init(project="autowu", name="run")
    run(trackio)
    trackio.finish()
    from trackio.sqlite_storage import SQLiteStorage

    kept = SQLiteStorage.get_logs("autowu", "run")
    assert {"autowu/lr", "autowu/phase"} <= {name for row in kept for name in row}
    assert max(row["step"] for row in kept) == 60

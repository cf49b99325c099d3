"""What train.py shows of a run, while it trains and in the place of training."""

import csv
import re
import time

import pytest
import torch
from blank_figures import blank
from test_training import ALONE, EPOCH, StepRow, configured, looped, made, small_model

from autowu.training.checkpoints import load_model, read_checkpoint, write_checkpoint
from autowu.training.config import UsageError
from autowu.training.console import Console
from autowu.training.data import find_data
from autowu.training.files import read_rows
from autowu.training.folder import RunFolder
from autowu.training.main import main
from autowu.training.plan import plan
from autowu.training.progress import Begun, EpochSteps, Progress
from autowu.training.records import Recorder
from autowu.training.run import train_run

SMALL = ["--model", "test_vit", "--img-size", "16", "--device", "cpu"]


# In the place of training


def test_a_dry_run_prints_what_the_run_would_be_and_writes_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    options = [*SMALL, "--epochs", "30", "--run-dir", str(run)]
    assert main([*options, "--dry-run"]) == 0
    begin, *plan = capsys.readouterr().out.splitlines()
    assert begin.startswith("test_vit (")
    assert begin.endswith("on digits, lars with autowu: 30 epochs of 21 steps of 64 images on 1 x cpu")
    assert plan[0] == "  630 steps; 1344 of 1347 images an epoch"
    assert plan[1].startswith("  warm-up from LR 0.0")
    assert plan[1].endswith("; it ends at step 201 (32%) at the latest")
    assert plan[2].startswith("  tests every 3 steps, 67 at most; a switch at step ")
    assert plan[3] == "  peak LR up to step 252, then cooldown (linear) over 378 steps"
    assert plan[4].startswith("  copies to go back to: up to 2 of ")
    assert plan[5].endswith(f": the last 2 and the best, in {run}")
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sched", "cosine"], "  checkpoints of about "),
        (["--sched", "paper", "--epochs", "100"], "  cooldown (cosine) from the switch on"),
        (["--cooldown-fraction", "0.4", "0.2"], "  peak LR up to step 504, then cooldown (linear) over 126 steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_dry_run_is_of_any_schedule(capsys, options, said):
    assert main([*SMALL, "--dry-run", *options]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert ("warm-up" in out) == ("cosine" not in options)


def test_the_size_of_a_copy_is_that_of_model_and_optimizer(tmp_path):
    config = configured(tmp_path / "run", "--epochs", "30")
    parts, loaders = made(config)
    lines = list(plan(config, ALONE, parts, find_data(config, ALONE), 10))
    parts, loaders = made(config)
    looped(config, parts, loaders).train_epoch(Progress())
    looped(config, parts, loaders).train_epoch(Progress(1))
    assert parts.autowu.state_dict()["snapshot"] is not None
    tensors = []

    def collect(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            [collect(part) for part in value.values()]
        elif isinstance(value, (list, tuple)):
            [collect(part) for part in value]

    collect([parts.model.state_dict(), parts.optimizer.state_dict()])
    size = sum(tensor.nbytes for tensor in tensors)
    assert f"up to 2 of {size / 1000:.3g} KB" in "\n".join(lines)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run whose epochs went to TensorBoard too, its summary and its model."""
    path = tmp_path_factory.mktemp("trained") / "run"
    config = configured(path, "--epochs", "12", "--log-tensorboard")
    parts, loaders = made(config)
    with blank():
        summary = train_run(config, ALONE, parts, loaders, RunFolder(config, 1), 0.0)
    return path, summary, parts


@pytest.mark.usefixtures("blank_figures")
def test_a_model_is_tested_without_training(tmp_path, capsys):
    options = [*SMALL, "--batch-size", "600", "--epochs", "1", "--sched", "cosine", "--run-dir", str(tmp_path / "run")]
    assert main(options) == 0
    trained = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("best.pt", "checkpoint.pt"):
        path = tmp_path / "run" / name
        assert main([*SMALL, "--eval", str(path)]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{path}: test accuracy ")
        assert said.removeprefix(f"{path}: ").strip() in trained
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert main(["--model", "test_resnet", "--eval", str(path), "--device", "cpu"]) == 2
    assert f"{path}: no checkpoint of this model: " in capsys.readouterr().err
    assert main([*SMALL, "--eval", str(tmp_path / "nowhere.pt")]) == 2
    assert "nowhere.pt: damaged, or no checkpoint" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_figures")
def test_what_is_tested_is_the_average_of_the_weights_where_a_run_kept_one(tmp_path, capsys):
    options = [*SMALL, "--batch-size", "600", "--epochs", "1", "--sched", "cosine", "--run-dir", str(tmp_path / "run")]
    assert main([*options, "--model-ema", "--model-ema-decay", "0.5"]) == 0
    trained = capsys.readouterr().out
    best = tmp_path / "run" / "best.pt"
    state = read_checkpoint(best)
    assert any(not torch.equal(state["model"][name], state["ema"][name]) for name in state["model"])
    for given in ([], ["--model-ema"]):
        assert main([*SMALL, "--eval", str(best), *given]) == 0
        assert capsys.readouterr().out.removeprefix(f"{best}: ").strip() in trained
    write_checkpoint({"model": state["model"]}, best)
    assert main([*SMALL, "--eval", str(best), "--model-ema"]) == 0


def test_a_dry_run_is_of_accumulated_steps_in_half_precision_too(capsys):
    batch = ["--global-batch-size", "128", "--batch-size", "32", "--amp", "--amp-dtype", "float16", "--clip-grad", "1"]

    def size(*options):
        assert main([*SMALL, "--dry-run", *batch, *options]) == 0
        out = capsys.readouterr().out
        assert "30 epochs of 10 steps of 128 images on 1 x cpu" in out
        assert "300 steps; 1280 of 1347 images an epoch" in out
        return float(re.search(r"checkpoints of about ([\d.]+) MB", out)[1])

    one = size("--small-checkpoints")
    assert size("--small-checkpoints", "--model-ema") == pytest.approx(1.5 * one, rel=0.02)  # weights, momenta and an average
    assert size("--small-checkpoints", "--freeze", "backbone") == pytest.approx(0.5 * one, rel=0.02)


def test_a_pickle_that_would_run_code_is_refused_by_eval_too(tmp_path):
    from test_checkpoints import malicious

    malicious(tmp_path / "best.pt")
    with pytest.raises(UsageError, match=r"best.pt: no checkpoint of train.py: ") as error:
        load_model(tmp_path / "best.pt", small_model())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


# Records


def test_every_step_has_its_phase_probability_and_events(trained):
    path, summary, parts = trained
    with (path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "epoch", "lr", "loss", "phase", "probability", "event"]
    switch = summary["switch_step"]
    assert [row["phase"] for row in rows[:switch]] == ["warmup"] * switch
    assert {row["phase"] for row in rows[switch:]} <= {"stable", "cooldown"}
    assert rows[0]["probability"] == ""
    assert 0 <= float(rows[switch - 1]["probability"]) <= 1
    assert {float(row["probability"]) for row in rows[switch:]} == {parts.autowu.switch.probability}
    assert "switch" in rows[switch - 1]["event"].split()
    assert [row["event"] for row in rows if row["event"]] == list(parts.events.values())
    with (path / "epochs.csv").open(newline="") as file:
        assert all(float(row["images_per_s"]) > 100 for row in csv.DictReader(file))


def test_tensorboard_has_the_same(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, summary, _ = trained
    board = EventAccumulator(str(path / "tensorboard"), {"scalars": 0})
    board.Reload()
    rows = RunFolder(configured(path), 1).rows("metrics.csv")
    for name, column in (("loss", "loss"), ("lr", "lr"), ("probability", "probability")):
        expected = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        found = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    phases = [event.value for event in board.Scalars("train/phase")]
    assert phases[0] == 1
    assert phases[summary["switch_step"]] > 1
    assert [event.step for event in board.Scalars("epoch/images_per_s")] == list(range(9, 120, 10))
    assert "events/text_summary" in board.Tags()["tensors"]


def test_what_a_run_that_was_cut_off_has_logged_is_replaced(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def epoch(number, loss):
        steps = [StepRow(2 * number + k, number + 1, 0.5, loss, "stable") for k in range(2)]
        return steps, EPOCH | {"epoch": number + 1, "step": 2 * number + 1}

    folder = RunFolder(configured(tmp_path / "run"), 1)
    for done, loss in ((0, 1.0), (1, 2.0)):
        time.sleep(1.1 * done)  # event files are named after the second
        recorder = Recorder(folder, Progress(done), 2, None, log_tensorboard=True)
        with recorder:
            for number in range(done, 3):
                recorder.epoch(*epoch(number, loss))
    board = EventAccumulator(str(folder.path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(k, 1.0 if k < 2 else 2.0) for k in range(6)]


def test_records_and_checkpoints_of_before_have_blanks_for_what_they_lack(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,lr,loss\n0,1,0.5,2.0\n1,1,0.5")
    row = {"step": "0", "epoch": "1", "lr": "0.5", "loss": "2.0", "phase": "", "probability": "", "event": ""}
    assert read_rows(tmp_path / "metrics.csv", StepRow._fields) == [row]
    steps = EpochSteps(ALONE, 0, 3, Begun([0.5, 0.25], [2.0, 1.0], {}))
    steps.add(0.125, "stable", torch.tensor(0.5), 0.9)
    assert steps.taken == 1
    assert [row[4:] for row in steps.rows()] == [("", None, ""), ("", None, ""), ("stable", 0.9, "")]


# Console


def test_without_a_terminal_a_long_epoch_says_every_minute_where_it_is(tmp_path, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    console = Console(configured(tmp_path), ALONE, small_model(), 10, 5)  # of 30 steps of 128 images
    with console:
        for step in range(5, 17):
            clock[0] += 10
            console.step(step // 10, 0.5, "warmup", None if step < 8 else 0.3125)
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == [
        "step 11/30, epoch 2, LR 0.5 warmup, P(minimum past) 0.31, 13 images/s, 0:03:10 left",
        "step 17/30, epoch 2, LR 0.5 warmup, P(minimum past) 0.31, 13 images/s, 0:02:10 left",
    ]

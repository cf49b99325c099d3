"""The command line: the same decision from every kind of file, and one clear line for a wrong one."""

import csv
import importlib.util
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_open_ended import scheduler_of as open_run
from test_open_ended import train
from test_plotting import advanced, made, valley

from autowu import AutoWU, cli
from autowu.curves import CurveError, read_curve
from autowu.schedules import warmup_lr

STEPS = 100
LOSSES = valley(STEPS)[:85]  # to before it falls for good
LRS = [1e-4 * 1e4 ** (step / STEPS) for step in range(len(LOSSES))]


@pytest.fixture(autouse=True)
def _without_gpytorch(monkeypatch, request):
    """Its fits take seconds; one test has them."""
    if "with_gpytorch" not in request.fixturenames:
        known = importlib.util.find_spec
        monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name, *of: None if name == "gpytorch" else known(name, *of))


@pytest.fixture
def with_gpytorch():
    pytest.importorskip("gpytorch")


def write(path, columns, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def answer(capsys, *argv):
    assert cli.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def rules(told):
    return {rule.pop("rule"): rule for rule in told["rules"]}


def decided(**arguments):
    """What a scheduler that is fed the curve decides."""
    total = math.ceil(len(LOSSES) / 0.32)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    given = {"total_steps": total, "max_warmup_fraction": (len(LOSSES) + 0.5) / total, "warmup_type": "exp", "rollback": False}
    scheduler = AutoWU(optimizer, **(given | arguments))
    optimizer.step()
    for loss in LOSSES:
        if scheduler.switch is None:
            scheduler.step(loss)
    return scheduler


# ---------------------------------------------------------------- replay


def test_a_replay_decides_as_the_scheduler_does(tmp_path, capsys):
    told = answer(capsys, "replay", write(tmp_path / "a.csv", {"loss": LOSSES}))
    switch, default = decided().switch, rules(told)["default"]
    assert (default["switch_step"], default["minimum_step"], default["lr"], default["by_test"], default["probability"]) == (
        *(switch.step, switch.minimum, switch.lr, True, switch.probability),
    )
    assert "LRs: assumed, 0.0001 to 10, growing exponentially for 85 steps" in told["notes"]
    adam = rules(answer(capsys, "replay", tmp_path / "a.csv", "--optimizer", "adam"))["default"]
    assert adam["lr"] < default["lr"]


def test_the_lr_is_the_recorded_one_where_there_is_one(tmp_path, capsys):
    lrs = [*LRS, *[1e-4] * 20]  # what follows the growth is no part of the warm-up
    path = write(tmp_path / "a.csv", {"loss": [*LOSSES, *[0.1] * 20], "lr": lrs})
    told = answer(capsys, "replay", path)
    default = rules(told)["default"]
    assert told["steps"] == len(LOSSES)
    assert 55 < default["minimum_step"] < 65
    at_minimum = 1e-4 * 1e4 ** (default["minimum_step"] / STEPS)
    assert default["lr_at_minimum"] == pytest.approx(at_minimum, rel=1e-3)
    own = decided(min_lr=LRS[0], max_lr=LRS[-1])
    assert default["lr"] == pytest.approx(own.switch.lr, rel=0.1)
    assert any(note.startswith("LRs: as recorded") for note in told["notes"])


@pytest.mark.parametrize("warmup_type", ["exp", "two-speed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_is_replayed_to_its_own_lr_from_its_table_as_from_its_state(warmup_type, optimizer, tmp_path, capsys):
    weight = [torch.nn.Parameter(torch.zeros(1))]
    own = torch.optim.SGD(weight, lr=1.0, momentum=0.9) if optimizer == "sgd" else torch.optim.Adam(weight)
    given = {} if warmup_type == "two-speed" else {"warmup_type": warmup_type}
    scheduler, noise = AutoWU(own, total_steps=600, rollback=False, **given), np.random.default_rng(0).normal(size=600)
    lrs, losses = [], []
    while scheduler.switch is None:
        own.step()
        lrs.append(own.param_groups[0]["lr"])
        losses.append(1 + max(0.0, 1 - len(losses) / 60) + max(0.0, len(losses) - 120) / 20 + 0.1 * noise[len(losses)])
        scheduler.step(losses[-1])
    path = write(tmp_path / "a.csv", {"loss": losses, "lr": lrs})
    told = rules(answer(capsys, "replay", path, "--optimizer", optimizer))["default"]
    assert told["lr"] == pytest.approx(scheduler.switch.lr, rel=0.15)
    if warmup_type == "exp":  # the valley is flat: its far edge counts
        assert told["lr"] > 1.3 * scheduler.config.peak_factor * told["lr_at_minimum"]


def test_the_papers_rule_has_its_own_fit_where_gpytorch_is_installed(tmp_path, capsys, with_gpytorch):
    told = answer(capsys, "replay", write(tmp_path / "a.csv", {"loss": LOSSES, "lr": LRS}), "--steps-per-epoch", 40)
    paper = rules(told)["paper"]
    assert paper["switch_step"] in (*range(40, 85, 40), 85)  # a test an epoch, and one at the limit
    assert 50 < paper["minimum_step"] < 75
    assert not any("GPyTorch" in note for note in told["notes"])


def test_the_losses_that_were_not_recorded_are_no_losses(tmp_path, capsys):
    path = write(tmp_path / "a.csv", {"step": range(100, 100 + 3 * len(LOSSES), 3), "loss": LOSSES, "lr": LRS})
    curve = read_curve(path)
    assert [loss for loss in curve.losses if loss is not None] == LOSSES
    assert curve.losses[:4] == [LOSSES[0], None, None, LOSSES[1]]
    assert curve.lrs[:4] == [LRS[0], LRS[0], LRS[0], LRS[1]]
    assert 3 * 55 < rules(answer(capsys, "replay", path))["default"]["minimum_step"] < 3 * 65


def test_a_curve_that_only_falls_has_no_switch_by_test(tmp_path, capsys):
    path = write(tmp_path / "a.csv", {"loss": LOSSES[:50], "lr": LRS[:50]})
    told = rules(answer(capsys, "replay", path, "--warmup-steps", 200))
    assert told["default"]["switch_step"] is told["default"]["lr"] is None
    assert told["default"]["probability"] < 0.9
    assert cli.main(["replay", str(path), "--warmup-steps", "200"]) == 0
    assert "default rule: no switch within 50 steps" in " ".join(capsys.readouterr().out.split())


def of_json_lines(path):
    rows = [{"loss": loss, "lr": lr, "eval_loss": 3.0} for loss, lr in zip(LOSSES, LRS, strict=True)]
    (path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in [{"note": "begins"}, *rows]))
    return path / "a.jsonl"


def of_a_trainer(path):
    rows = [{"loss": loss, "learning_rate": lr, "step": k + 1} for k, (loss, lr) in enumerate(zip(LOSSES, LRS, strict=True))]
    (path / "trainer_state.json").write_text(json.dumps({"log_history": [*rows, {"eval_loss": 1.0, "step": 85}]}))
    return path / "trainer_state.json"


def of_tensorboard(path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(path) as writer:
        for step, (loss, lr) in enumerate(zip(LOSSES, LRS, strict=True)):
            writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("train/lr", lr, step)
            writer.add_scalar("val/loss", 7.0, step)
    return path


def of_a_run_folder(path):
    write(path / "metrics.csv", {"step": range(85), "epoch": [1] * 85, "lr": LRS, "loss": LOSSES})
    return path


@pytest.mark.parametrize(
    "file",
    [
        lambda path: write(path / "a.tsv", {"Step": range(85), "train_loss": LOSSES, "val_loss": LOSSES, "lr": LRS}, "\t"),
        of_json_lines,
        of_a_trainer,
        of_tensorboard,
        of_a_run_folder,
    ],
)
def test_every_kind_of_file_gives_the_same_curve(file, tmp_path):
    curve = read_curve(file(tmp_path))
    np.testing.assert_allclose(curve.losses, LOSSES, rtol=1e-6)
    np.testing.assert_allclose(curve.lrs, LRS, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 3, "lr_schedulers": [state]}])
def test_a_saved_state_is_replayed_on_its_own_warm_up(wrap, tmp_path, capsys):
    scheduler = made()
    advanced(scheduler, valley(200))
    torch.save(wrap(scheduler.state_dict()), tmp_path / "a.pt")
    told = answer(capsys, "replay", tmp_path / "a.pt", "--warmup-steps", scheduler.config.warmup_steps)
    default = rules(told)["default"]
    assert told["steps"] == scheduler.switch.step
    assert default["switch_step"] == pytest.approx(scheduler.switch.step, abs=4)
    assert default["lr"] == pytest.approx(scheduler.switch.lr, rel=0.1)


@pytest.mark.parametrize("command", ["replay", "range"])
def test_a_state_is_replayed_on_the_warm_up_that_was_begun_anew(command, tmp_path, capsys):
    scheduler = open_run(max_warmup_steps=60)
    train(scheduler, 200)
    scheduler.rewarm()
    train(scheduler, 400)
    torch.save(scheduler.state_dict(), tmp_path / "a.pt")
    told = answer(capsys, command, tmp_path / "a.pt")
    assert any("from step 200 on" in note for note in told["notes"])
    lr = told["lr"] if command == "range" else rules(told)["default"]["lr"]
    assert lr == pytest.approx(scheduler.switch.lr, rel=0.3)


# ---------------------------------------------------------------- range


def test_a_range_test_gives_an_lr_with_its_uncertainty(tmp_path, capsys):
    path = write(tmp_path / "a.csv", {"loss": LOSSES, "lr": LRS})
    told = answer(capsys, "range", path)
    low, high = told["lr_range"]
    assert told["sure"]
    assert low < told["lr"] < high < 2 * told["lr"]
    assert told["lr_at_minimum"] == pytest.approx(1e-4 * 1e4 ** (60 / STEPS), rel=0.4)
    noise = np.random.default_rng(1).normal(size=len(LOSSES))
    noisy = write(tmp_path / "b.csv", {"loss": np.asarray(LOSSES) + 0.2 * noise, "lr": LRS})
    wide = answer(capsys, "range", noisy)["lr_range"]
    assert wide[1] / wide[0] > high / low


def test_a_range_test_that_ends_too_early_says_so(tmp_path, capsys):
    told = answer(capsys, "range", write(tmp_path / "a.csv", {"loss": LOSSES[:50], "lr": LRS[:50]}))
    assert not told["sure"]
    assert any("go on to a higher LR" in note for note in told["notes"])


# ---------------------------------------------------------------- plot, figures


def test_runs_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scheduler = made()
    advanced(scheduler, valley(200))
    torch.save(scheduler.state_dict(), "a.pt")
    write(Path("b.csv"), {"loss": [1.0, math.nan, 2.0]})
    told = answer(capsys, "plot", "a.pt", "b.csv")
    assert [(run["run"], run["steps"], run["switch_step"]) for run in told["runs"]] == [
        ("a.pt", 200, scheduler.switch.step),
        ("b.csv", 3, None),
    ]
    assert told["runs"][1]["final_loss"] == 2.0
    assert Path(told["figure"]).stat().st_size > 10_000
    assert cli.main(["plot", "a.pt"]) == 2
    assert "autowu.png: exists; --force overwrites it" in capsys.readouterr().err
    assert cli.main(["plot", "a.pt", "--force"]) == 0


@pytest.mark.parametrize("command", ["replay", pytest.param("range", marks=pytest.mark.slow)])
def test_a_figure_is_written_once(command, tmp_path, capsys):
    path, figure = write(tmp_path / "a.csv", {"loss": LOSSES, "lr": LRS}), tmp_path / "a.svg"
    argv = [command, str(path), "--save", str(figure)]
    assert cli.main(argv) == 0
    assert figure.read_bytes()[:5] == b"<?xml"
    figure.write_text("mine")
    assert cli.main(argv) == 2
    assert figure.read_text() == "mine"
    assert cli.main([*argv, "--force"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", ["a.xyz", "none/a.png"])
def test_a_figure_that_cannot_be_written_is_one_line(name, tmp_path, capsys):
    path = write(tmp_path / "a.csv", {"loss": LOSSES})
    assert cli.main(["range", str(path), "--save", str(tmp_path / name)]) == 2
    assert re.fullmatch(r"autowu: error: [^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / name).exists()


# ---------------------------------------------------------------- wrong files


def tensor_file(path):
    torch.save({"weight": torch.zeros(3)}, path)


def damaged_state(path):
    state = made().state_dict()
    del state["record"]
    torch.save(state, path)


WRONG = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_text(""), "is empty"),
    "an empty folder": (lambda path: path.mkdir(), "no run of train.py"),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe"), "neither text"),
    "a torn zip": (lambda path: path.write_bytes(b"PK\x03\x04 torn"), "no file that torch.load"),
    "weights": (tensor_file, "no state of an AutoWU"),
    "a damaged state": (damaged_state, "without 'record'"),
    "torn JSON": (lambda path: path.write_text('{"loss": 1}\n{"lo'), "no JSON lines"),
    "other JSON": (lambda path: path.write_text("[1, 2]"), "not an object a line"),
    "no loss": (lambda path: write(path, {"a": [1], "b": [2]}), "name it with --column; there are 'a', 'b'"),
    "two losses": (lambda path: write(path, {"loss_a": [1], "loss_b": [2]}), "--column"),
    "words": (lambda path: write(path, {"loss": ["low"]}), "'low' is no number"),
    "nothing in it": (lambda path: write(path, {"loss": [""] * 20}), "no loss in 'loss'"),
    "head only": (lambda path: path.write_text("loss,lr\n"), "which is the loss"),
    "few": (lambda path: write(path, {"loss": LOSSES[:9]}), "9 finite losses"),
    "not finite": (lambda path: write(path, {"loss": ["nan"] * 50}), "0 finite losses"),
    "a falling LR": (lambda path: write(path, {"loss": LOSSES, "lr": LRS[::-1]}), "does not grow"),
    "a constant LR": (lambda path: write(path, {"loss": LOSSES, "lr": [0.1] * 85}), "does not grow"),
}


@pytest.mark.parametrize("command", ["replay", "range"])
@pytest.mark.parametrize(("make", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_line_and_code_2(command, make, said, tmp_path, capsys):
    make(tmp_path / "curve")
    assert cli.main([command, str(tmp_path / "curve")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"autowu: error: [^\n]*curve: [^\n]*\n", err)
    assert said in err


def test_a_torn_event_file_is_one_line(tmp_path):
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(b"\x00" * 7)
    with pytest.raises(CurveError, match=r"^[^\n]*$"):
        read_curve(file)


def test_a_column_that_is_not_there_is_named(tmp_path):
    path = write(tmp_path / "a.csv", {"loss": LOSSES})
    for names in ({"column": "los"}, {"lr_column": "los"}):
        with pytest.raises(CurveError, match="no 'los' among 'loss'"):
            read_curve(path, **names)


@pytest.mark.parametrize("argv", [[], ["replay"], ["replay", "a", "--js"], ["replay", "a", "--min-lr", "0"], ["paint", "a"]])
def test_what_is_no_command_has_code_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert "usage: autowu" in capsys.readouterr().err


def test_the_module_and_the_entry_point_are_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["autowu", "--help"])
    monkeypatch.delitem(sys.modules, "autowu.__main__", raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("autowu", run_name="__main__", alter_sys=True)
    said = capsys.readouterr()
    assert all(name in said.out for name in ("replay", "plot", "range"))
    assert said.err == ""
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.scripts]\nautowu = "autowu.cli:main"\n' in pyproject


@pytest.mark.slow
def test_the_module_is_the_command_line_in_a_process_of_its_own():
    ran = subprocess.run([sys.executable, "-m", "autowu", "--help"], check=True, capture_output=True, text=True)
    assert all(name in ran.stdout for name in ("replay", "plot", "range"))
    assert ran.stderr == ""


def test_the_page_shows_commands_that_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("curve.csv"), {"loss": LOSSES, "lr": LRS})
    write(Path("other.csv"), {"loss": LOSSES[::-1], "lr": LRS})
    shutil.copy("curve.csv", "warmup.csv")
    page = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()
    commands = re.findall(r"^autowu (.*)$", page, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        assert cli.main(command.split()) == 0
    assert "switch at step" in capsys.readouterr().out


def test_a_ramp_without_lrs_is_the_scheduler_s_own():
    assert decided().lr_at(10) == warmup_lr(10, len(LOSSES), 1e-4, 10.0, "exp")

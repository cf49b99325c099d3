"""train.py as users start it: real processes, real data, real files."""

import csv
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from blank_figures import blank
from PIL import Image
from processes import Forked, launch, ranks
from sklearn.datasets import load_digits

from autowu.training.config import parse_args
from autowu.training.folder import RunFolder
from autowu.training.main import main

# A small model without batch norm, so that two processes compute what one does; 4 epochs of 10 steps.
EPOCHS = 4
SMALL = ["--model", "test_vit", "--img-size", "16", "--epochs", f"{EPOCHS}", "--device", "cpu"]
HALF = ["--max-warmup-fraction", "0.5"]  # the warm-up is not over with the first epoch
SHORT = [*SMALL, "--batch-size", "128"]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """The digits 0 and 1 as images in ImageNet's layout."""
    root = tmp_path_factory.mktemp("images")
    digits = load_digits()
    for label in (0, 1):
        images = digits.images[digits.target == label]
        for part, chosen in (("train", images[:40]), ("val", images[40:60])):
            folder = root / part / f"digit-{label}"
            folder.mkdir(parents=True)
            for k, image in enumerate(chosen):
                Image.fromarray((image * 15).astype("uint8")).convert("RGB").save(folder / f"{k}.png")
    return root


@pytest.mark.parametrize("epochs", [8, pytest.param(30, marks=pytest.mark.slow)])
def test_by_its_defaults_it_learns_the_digits(tmp_path, epochs):
    length = [] if epochs == 30 else ["--epochs", epochs]
    result = launch("-W", "error", "train.py", "--device", "cpu", *length, "--run-dir", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.97
    assert summary["total_steps"] == epochs * (1347 // 64)
    assert summary["switch_by_test"]
    steps = rows(tmp_path / "run" / "metrics.csv")
    assert [int(row["step"]) for row in steps] == list(range(epochs * 21))
    # The first step after the switch runs at the LR that was found.
    assert float(steps[summary["switch_step"]]["lr"]) == summary["peak_lr"]
    assert float(steps[-1]["lr"]) > 0
    assert len(rows(tmp_path / "run" / "epochs.csv")) == epochs
    with Image.open(tmp_path / "run" / "figure.png") as image:
        assert image.width > 500
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["scheduler"][0]["last_epoch"] == epochs * 21
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["opt"] == "lars"
    for word in (f"epoch {epochs:3}/{epochs}", f"switch at step {summary['switch_step']}", "peak LR", "test accuracy"):
        assert word in result.stdout
    # Without arguments it is this run, of 30 epochs.
    defaults = RunFolder(parse_args(["--device", "cpu"]), 1).config
    assert {name for name, value in defaults.items() if value != config[name]} <= {"run_dir", "epochs"}
    assert defaults["epochs"] == 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image_folder):
    """The options and the folder of a run from beginning to end, by its data."""
    folder = [*SMALL, *HALF, "--data-dir", str(image_folder), "--batch-size", "8", "--workers", "1"]
    runs = {}
    for data, options in (("digits", [*SHORT, *HALF]), ("folder", folder)):
        path = tmp_path_factory.mktemp("whole") / data
        with blank():
            assert main([*options, "--run-dir", str(path)]) == 0
        runs[data] = options, path
    return runs


TWO = ["train.py", *SMALL, *HALF, "--batch-size", "64", "--run-dir"]
# The program `torchrun`, or torch's older launcher: it is forked, but the processes that it starts import all there is.
LAUNCHER = "import sys; from torch.distributed.{} import main; sys.exit(main())"


def launched(folder, launcher, run, *options):
    """The launcher, which runs two processes."""
    arguments = ["--standalone", "--nproc-per-node", 2, *TWO, run, *options]
    return Forked(folder, "-c", LAUNCHER.format(launcher), *arguments)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two processes from beginning to end."""
    path = tmp_path_factory.mktemp("two")
    ranks(path, 2, *TWO, path / "run")
    return path / "run"


def test_two_processes_train_as_one(two, whole):
    folders = whole["digits"][1], two
    one, two = (rows(folder / "metrics.csv") for folder in folders)
    assert len(one) == len(two) == EPOCHS * 10
    # Rounding grows along the run; a rank that saw other data or kept its own loss would differ from the start.
    for key in ("lr", "loss"):
        assert [float(r[key]) for r in two[:12]] == pytest.approx([float(r[key]) for r in one[:12]], rel=1e-3)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert summaries[1]["world_size"] == 2
    assert summaries[1]["switch_step"] == summaries[0]["switch_step"]


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("data", "number", "code", "epoch"),
    [
        ("digits", signal.SIGKILL, -signal.SIGKILL, 1),  # in the warm-up
        pytest.param("folder", signal.SIGKILL, -signal.SIGKILL, 1, marks=pytest.mark.slow),
        ("digits", signal.SIGINT, 130, 2),
        ("folder", signal.SIGUSR1, 0, 1),
    ],
)
def test_a_killed_run_goes_on_exactly(tmp_path, whole, data, number, code, epoch):
    options, uncut = whole[data]
    cut = Forked(tmp_path, "train.py", *options, "--run-dir", tmp_path / "cut")
    cut.wait_for_line(f"epoch   {epoch}/{EPOCHS}")
    if number == signal.SIGKILL:
        os.kill(cut.process.pid, number)
    else:
        os.killpg(cut.process.pid, number)  # as a terminal and launchers do it: the loader processes have it too
    assert cut.end() == code, cut.stderr
    if number != signal.SIGKILL:
        lines = [f"interrupted; go on with the same options and --run-dir {tmp_path / 'cut'} --resume"]
        assert [line for line in cut.stderr.splitlines() if "Warning" not in line and "too short" not in line] == lines
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert main([*options, "--run-dir", str(tmp_path / "cut"), "--resume"]) == 0
    assert rows(tmp_path / "cut" / "metrics.csv") == rows(uncut / "metrics.csv")
    uncut, resumed = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (uncut, tmp_path / "cut"))
    for name, weight in uncut["model"].items():
        assert torch.equal(weight, resumed["model"][name])


@pytest.mark.parametrize("launcher", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("run", "launch"))])
def test_two_processes_that_torchrun_has_stopped_go_on_exactly_under_any_launcher(tmp_path, two, launcher):
    # Cut early in the warm-up: a verdict is on its way from the first rank to the others.
    cut = launched(tmp_path / "out", "run", tmp_path / "cut")
    cut.wait_for_line(f"epoch   1/{EPOCHS}")
    cut.process.terminate()  # the launcher hands it on, and they save
    cut.end()
    assert len(rows(tmp_path / "cut" / "metrics.csv")) < EPOCHS * 10
    assert not (tmp_path / "cut" / "summary.json").exists()
    if launcher == "none":
        ranks(tmp_path / "on", 2, *TWO, tmp_path / "cut", "--resume")
    else:
        resumed = launched(tmp_path / "on", launcher, tmp_path / "cut", "--resume")
        assert resumed.end() == 0, resumed.stdout + resumed.stderr
    assert rows(tmp_path / "cut" / "metrics.csv") == rows(two / "metrics.csv")


def test_a_run_goes_on_under_its_own_options_only(whole, capsys):
    options, folder = whole["digits"]
    for option, value in (("--epochs", "3"), ("--opt", "lamb"), ("--sched", "paper")):
        assert main([*options, option, value, "--run-dir", str(folder), "--resume"]) == 2
        assert f"{option} is {value}, but the run was started with" in capsys.readouterr().err


ONE_EPOCH = [*SHORT, *HALF, "--epochs", "1", "--run-dir"]


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """The folder of a run of one epoch."""
    path = tmp_path_factory.mktemp("one-epoch") / "run"
    with blank():
        assert main([*ONE_EPOCH, str(path)]) == 0
    return path


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("left", [[], [".lock", "config.json.partial"], [".lock", "config.json", "metrics.csv", "epochs.csv"]])
def test_a_run_killed_before_its_first_checkpoint_is_started_by_resume(tmp_path, one_epoch, left):
    (tmp_path / "cut").mkdir()
    for name in left:
        if (one_epoch / name).exists():
            shutil.copy(one_epoch / name, tmp_path / "cut")
        else:
            (tmp_path / "cut" / name).write_text("{")
    assert main([*ONE_EPOCH, str(tmp_path / "cut"), "--resume"]) == 0
    assert rows(tmp_path / "cut" / "metrics.csv") == rows(one_epoch / "metrics.csv")
    assert main([*ONE_EPOCH, str(tmp_path / "nowhere"), "--resume"]) == 2


@pytest.mark.usefixtures("blank_figures")
def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_later(tmp_path, capsys):
    command = [*SHORT, "--epochs", "2", "--run-dir", str(tmp_path / "run")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert "cannot be written: File too large" in error.splitlines()[0]
    assert "Traceback" not in error
    assert main([*command, "--resume"]) == 0
    assert len(rows(tmp_path / "run" / "metrics.csv")) == 20


def test_a_damaged_run_is_said_in_one_line(tmp_path, one_epoch, capsys):
    shutil.copytree(one_epoch, tmp_path / "run")
    for name in ("checkpoint.pt", "config.json"):
        whole = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(whole[: len(whole) // 2])
        assert main([*ONE_EPOCH, str(tmp_path / "run"), "--resume"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert name in error


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_image_is_named_and_skipped_if_asked(tmp_path, image_folder, capfd, workers):
    shutil.copytree(image_folder, tmp_path / "images")
    corrupt = [tmp_path / "images" / part / "digit-1" / "3.png" for part in ("train", "val")]
    corrupt[0].write_bytes(corrupt[0].read_bytes()[:60])
    corrupt[1].write_text("no image")
    command = ["--data-dir", str(tmp_path / "images"), "--img-size", "32", "--batch-size", "16", "--epochs", "1", "--workers"]
    command += [workers, "--device", "cpu", "--max-warmup-fraction", "0.5", "--run-dir", str(tmp_path / "run")]
    assert main(command) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"train.py: error: {corrupt[0]}: cannot be read as an image: ")
    assert error.rstrip().endswith("; repair or remove it, or train with --skip-corrupt")
    assert error.count("\n") == 1
    assert main([*command, "--resume", "--skip-corrupt"]) == 0
    error = capfd.readouterr().err
    for path in corrupt:
        assert f"skipped: {path}: cannot be read as an image: " in error
    assert error.count("\n") == 2
    assert len(rows(tmp_path / "run" / "metrics.csv")) == 5


def test_help_names_each_default_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in text
    assert "default: False" not in text
    assert "--epochs EPOCHS epochs (default: 30)" in text
    for option in text.split(" --"):
        assert option.count("(default") <= 1


def test_image_folder(whole):
    assert len(rows(whole["folder"][1] / "metrics.csv")) == EPOCHS * (80 // 8)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--opt", "lamb"], marks=pytest.mark.slow),
        ["--opt", "lookahead_adamw", "--sched", "cosine"],
        ["--opt", "sgd", "--sched", "paper", "--amp"],
        ["--cooldown-fraction", "0.25", "--cooldown-type", "sqrt", "--label-smoothing", "0.1"],
    ],
    ids=" ".join,
)
def test_options(tmp_path, options):
    assert main([*SHORT, "--epochs", "2", *options, "--run-dir", str(tmp_path / "run")]) == 0
    lrs = [float(row["lr"]) for row in rows(tmp_path / "run" / "metrics.csv")]
    assert len(lrs) == 20
    assert 0 < lrs[-1] < max(lrs) / 5
    assert (tmp_path / "run" / "figure.png").exists()


@pytest.mark.usefixtures("blank_figures")
def test_a_model_of_fixed_input_size_gets_it(tmp_path):
    options = ["--model", "test_vit", "--batch-size", "600", "--epochs", "1", "--device", "cpu"]
    assert main([*options, "--run-dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data-dir", "nowhere"], "nowhere: no such folder"),
        (["--data-dir", "EMPTY"], "EMPTY"),
        (["--dataset", "digit"], "did you mean digits"),
        (["--dataset", "folder"], "needs --data-dir"),
        (["--model", "resnet5O"], "did you mean resnet50"),
        (["--opt", "lasr"], "did you mean lars"),
        (["--sched", "cosin"], "did you mean cosine"),
        (["--batch-size", "1348"], "more than the 1347 training images"),
        (["--data-dir", "FULL"], "FULL"),
        (["--label-smoothing", "2"], "at most 1"),
        (["--mode", "bt"], "unrecognized arguments: --mode bt"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--weight-decay", "inf"], "--weight-decay inf: must be finite"),
        (["--weight-decay", "1e300"], "--weight-decay 1e+300: must be finite in float32"),
        (["--lr", "1e39", "--sched", "cosine", "--opt", "adamw"], "--lr 1e+39: must be above 0 and finite in float32"),
        (["--max-lr", "1e300"], "max_lr=1e+300: must be above 0 and finite in float32"),
        (["--min-lr", "1e-320"], "must be above 0 and finite in float32"),
        (["--workers", "1000000"], "--workers 1000000: must be at most 1024"),
        (["--weight-decay", "nan"], "--weight-decay nan: must be at least 0"),
        (["--momentum", "inf"], "--momentum inf: must be below 1"),
        (["--lr", "inf", "--sched", "cosine"], "--lr inf: must be above 0 and finite"),
        (["--max-lr", "inf"], "max_lr=inf: must be above 0 and finite"),
        (["--seed", str(2**70)], f"--seed {2**70}: must be at least 0 and at most {2**63 - 1}"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--epochs", str(10**30)], "must be at most"),
        (["--opt", "adahessian"], "second derivatives"),
        (["--sched", "cosine", "--min-lr", "1e-4"], "--min-lr: goes with AutoWU"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--min-lr", "2", "--max-lr", "1"], "min_lr=2.0: must be below max_lr=1.0"),
        (["--resume"], "needs --run-dir"),
        (["--resume", "maybe", "--run-dir", "RUN"], "--resume maybe: must be 'auto', or stand alone"),
        (["--checkpoint-steps", "0"], "--checkpoint-steps 0: must be at least 1"),
        (["--checkpoint-hist", str(2**31)], f"--checkpoint-hist {2**31}: must be at most {2**31 - 1}"),
        (["--checkpoint-minutes", "0"], "--checkpoint-minutes 0.0: must be above 0 and finite"),
        (["--checkpoint-minutes", "nan"], "--checkpoint-minutes nan: must be above 0 and finite"),
        (["--run-dir", "FULL"], "not empty"),
        (["--run-dir", "FULL/file/run"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY", "train").mkdir(parents=True)
    Path("FULL").mkdir()
    Path("FULL", "file").touch()
    Path("FULL", "train").touch()
    before = set(tmp_path.rglob("*"))
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert set(tmp_path.rglob("*")) == before  # no folder of a run that never was


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: must be the number of processes"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four: must be the number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be the number of processes"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: environment variable RANK expected, but not set; start by torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2: environment variable MASTER_ADDR expected, but not set"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}, "WORLD_SIZE=2: invalid literal"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "WORLD_SIZE=2: invalid literal"),
    ],
)
def test_variables_that_no_launcher_has_set_are_said_in_one_line(tmp_path, monkeypatch, capsys, variables, said):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--device", "cpu", "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: {said}")
    assert error.count("\n") == 1


def test_processes_that_cannot_meet_say_where(tmp_path, monkeypatch, capsys):
    def unreachable(*_):
        raise torch.distributed.DistNetworkError("The client socket has timed out after 300000ms")

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("autowu.training.process.rendezvous", unreachable)
    assert main(["--device", "cpu", "--run-dir", str(tmp_path / "run")]) == 1
    said = "train.py: error: the processes cannot meet at node-0:29500: The client socket has timed out after 300000ms\n"
    assert capsys.readouterr().err == said

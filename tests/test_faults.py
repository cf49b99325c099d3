"""What train.py does where something fails: a process, a loader, the disk, the numbers, the user. Real processes."""

import csv
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from processes import Forked, ranks
from test_training import ALONE, EPOCH, configured, small_model

from autowu.training.config import UsageError
from autowu.training.console import Console
from autowu.training.folder import RunFolder

# torchrun's agent, whose processes are forked: rank 1 kills itself at a step of the first attempt, where one is given.
AGENT = """
import os, signal, sys
from blank_figures import blank
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from autowu.training.main import main
from autowu.training.records import NullRecorder
dies_at, *arguments = sys.argv[1:]
def step(self, step, optimizer):
    if dies_at == f"{step}":
        os.kill(os.getpid(), signal.SIGKILL)
def work():
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        NullRecorder.step = step
    with blank():
        sys.exit(main(arguments))
config = LaunchConfig(
    1, 1, 2, run_id="job", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
    max_restarts=3, monitor_interval=0.1, start_method="fork", local_addr="127.0.0.1",
)
elastic_launch(config, work)()
"""
TWO = ["--model", "test_vit", "--img-size", "16", "--epochs", "2", "--device", "cpu", "--batch-size", "128"]
TWO += ["--checkpoint-steps", "3", "--resume", "auto", "--max-warmup-fraction", "0.5", "--run-dir"]


def rows(path):
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def agent(out, run, dies_at="never"):
    return Forked(out, "-c", AGENT, dies_at, *TWO, run, GLOO_SOCKET_IFNAME="lo")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two processes from beginning to end."""
    path = tmp_path_factory.mktemp("two")
    whole = agent(path / "out", path / "run")
    assert whole.end() == 0, whole.stderr
    return path / "run"


def test_a_job_goes_on_by_itself_when_one_of_its_processes_is_killed(tmp_path, two):
    job = agent(tmp_path / "out", tmp_path / "run", dies_at=7)
    assert job.end() == 0, job.stderr
    said = [line for line in job.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1, job.stderr
    assert said[0].startswith("train.py: error: rank 0: another process is gone; go on from the last checkpoint with --resume")
    assert rows(tmp_path / "run") == rows(two)
    assert job.stdout.count("epochs of 5 steps") == 2  # it was started twice, and found itself together at once
    assert "failed to connect" not in job.stderr
    assert job.stdout.count("epoch   1/2") == 1  # and went on from step 6


LOADER = """
import os, signal, sys
from autowu.training import folders
from autowu.training.main import main
def load(path, load=folders._load):
    if torch.utils.data.get_worker_info() is not None and "1.png" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    return load(path)
import torch
folders._load = load
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def images(tmp_path):
    """Options of a run on sixteen images that two processes load."""
    from PIL import Image

    for part in ("train", "val"):
        for label in "ab":
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for k in range(8):
                Image.new("RGB", (16, 16), (30 * k, 0, 0)).save(folder / f"{k}.png")
    options = ["--data-dir", tmp_path / "images", "--model", "test_vit", "--img-size", "16", "--epochs", "1", "--batch-size", "4"]
    return [*options, "--workers", "2", "--device", "cpu", "--max-warmup-fraction", "0.5", "--run-dir", tmp_path / "run"]


def test_a_loader_process_that_dies_is_said_in_one_line(tmp_path, images):
    died = Forked(tmp_path / "out", "-c", LOADER, *images)
    assert died.end() == 1
    said = [line for line in died.stderr.splitlines() if "too short" not in line]
    assert len(said) == 1, died.stderr
    assert said[0].startswith("train.py: error: a loader process has died; go on with --resume")


def test_a_run_whose_images_are_loaded_by_other_processes_ends(tmp_path, images):
    run = Forked(tmp_path / "out", "train.py", *images)
    run.process.join(60)  # the loader processes do not follow the signal by which one that is left over would be ended
    alive = run.process.is_alive()
    if alive:
        os.killpg(run.process.pid, signal.SIGKILL)
    assert not alive
    assert run.end() == 0, run.stderr
    assert (tmp_path / "run" / "summary.json").exists()


# One process of two gets images that are not numbers for three steps; both go back, and end with the same weights.
NAN = """
import logging, sys
import torch
from test_training import Loop, NullRecorder, RunFolder, StopSignals, Checkpoints, NullConsole, Progress, configured, made
from autowu.training.process import join
class Poison(NullRecorder):
    def step(self, step, optimizer):
        images = loaders.train.dataset.tensors[0]
        if process.rank == 1 and step == 200:
            self.images = images.clone()
            images.fill_(torch.nan)
        if process.rank == 1 and step == 203:
            images.copy_(self.images)
logging.basicConfig(level=logging.INFO, format="%(message)s")
with join("cpu") as process:
    config = configured(sys.argv[1], "--batch-size", "64", "--epochs", "30", *sys.argv[2:])
    parts, loaders = made(config, process)
    folder = RunFolder(config, 2)
    if process.is_main:
        folder.path.mkdir(parents=True)
    checkpoints = Checkpoints(parts, process, folder, config)
    Loop(config, process, parts, loaders, checkpoints, Poison(), NullConsole(), StopSignals(process)).train(Progress())
    one, other = process.gather((parts.model.state_dict(), [(e.step, e.kind) for e in parts.autowu.events]))
    assert one[1] == other[1]
    print(*(kind for _, kind in one[1]), flush=True)
    assert all(torch.equal(one[0][name], other[0][name]) and one[0][name].isfinite().all() for name in one[0])
    del parts
"""


@pytest.mark.slow  # AutoWU itself in two processes, one of which has NaNs, is in test_distributed.py
def test_what_is_not_a_number_on_one_process_sets_all_back_together(tmp_path):
    ranks(tmp_path, 2, "-c", NAN, tmp_path / "run")
    outs = [(tmp_path / f"rank-{rank}" / "stdout").read_text() for rank in range(2)]
    assert "divergence" in outs[0]
    assert outs[0] == outs[1]
    assert "training has diverged (1 of 3)" in (tmp_path / "rank-0" / "stderr").read_text()


def test_weights_that_are_lost_without_autowu_are_said_once(tmp_path, capsys):
    console = Console(configured(tmp_path), ALONE, small_model(), 10, 0)
    for epoch in (1, 2, 3):
        console.epoch(EPOCH | {"epoch": epoch, "train_loss": float("nan") if epoch > 1 else 1.0})
    said = [line for line in capsys.readouterr().out.splitlines() if "finite" in line]
    assert said == ["no loss of epoch 2 was finite: the weights are lost; begin anew with a lower --lr or AutoWU"]


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(tmp_path, resume):
    code = """
import sys, time
from test_training import RunFolder, configured
folder = RunFolder(configured(sys.argv[1]), 1)
folder.claim()
folder.start(0)
print("claimed", flush=True)
time.sleep(600)
"""
    first = Forked(tmp_path / "out", "-c", code, tmp_path / "run")
    first.wait_for_line("claimed")
    second = RunFolder(replace(configured(tmp_path / "run"), resume=resume), 1)
    with pytest.raises(UsageError, match="in use by another process"):
        second.claim()
    second.release()
    os.kill(first.process.pid, signal.SIGKILL)
    first.end()
    if resume:
        second.claim()  # without a word: the lock has gone with its process
        second.release()


def test_all_that_is_loaded_is_loaded_as_data_only():
    root = Path(__file__).parent.parent
    folders = ("examples", "benchmarks", "experiments")
    for path in [*root.glob("autowu/**/*.py"), *(path for f in folders for path in root.glob(f"{f}/*.py")), root / "train.py"]:
        code = path.read_text()
        calls = [code[at : at + 120] for at in range(len(code)) if code.startswith("torch.load(", at)]
        assert all("weights_only=True" in call for call in calls), path

"""Checkpoints of train.py: runs that are killed at any moment go on as if nothing had happened, from files that may be broken."""

import csv
import json
import os
import pickle
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from processes import Forked
from test_training import ALONE, EPOCH, Watcher, assert_same_weights, configured, looped, made

from autowu.training.checkpoints import Checkpoints, read_checkpoint
from autowu.training.config import UsageError
from autowu.training.folder import RunFolder
from autowu.training.progress import Progress
from autowu.training.run import train_run
from autowu.training.signals import SAVE, StopSignals

OPTIONS = ("--resume", "auto", "--checkpoint-steps", "4")
# A run that is killed: before its Nth operation on a file, or on a checkpoint; at so many bytes of a file; or by somebody else.
RUN = """
import os, resource, signal, sys
from blank_figures import blank
from test_checkpoints import run
path, how, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
def count(event, arguments):
    global number
    if event in ("open", "os.rename", "os.link", "os.remove", "os.truncate") and str(arguments[0]).startswith((begin, best)):
        number -= 1
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
begin, best = path + "/" + how.removeprefix("file"), path + "/best"
if how in ("file", "checkpoint"):
    sys.addaudithook(count)
elif how == "bytes":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
with blank():
    print("begun", flush=True)
    run(path)
if how in ("file", "checkpoint"):
    print("left", number, flush=True)
"""
PLENTY = 1_000_000


def run(path, *options):
    config = configured(path, *OPTIONS, *options)
    parts, loaders = made(config)
    folder = RunFolder(config, 1)
    folder.claim()
    try:
        train_run(config, ALONE, parts, loaders, folder, 0.0)
    finally:
        folder.release()
    return parts


def rows(path):
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(path, other):
    """Also what a run that would go on from here needs."""
    assert rows(path) == rows(other)
    for name in ("checkpoint.pt", "checkpoint.1.pt", "best.pt"):
        one, two = (read_checkpoint(folder / name) for folder in (path, other))
        assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
        assert (one["epoch"], one.get("step_in_epoch")) == (two["epoch"], two.get("step_in_epoch"))
        assert str(one["scheduler"]) == str(two["scheduler"])
        assert str(one["optimizer"]) == str(two["optimizer"])
    assert not list(path.glob("*.partial"))
    assert not list(path.glob("*.broken"))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """A run from beginning to end, and how often it operates on checkpoints."""
    path = tmp_path_factory.mktemp("uncut")
    process = Forked(path / "out", "-c", RUN, path / "run", "checkpoint", PLENTY)
    assert process.end() == 0, process.stderr
    return path / "run", PLENTY - int(process.stdout.split()[-1])


def killed(out, path, how, number):
    """Start or go on with the run until it is killed."""
    process = Forked(out, "-c", RUN, path, how, number)
    if how == "moment":
        process.wait_for_line("begun")
        time.sleep(number / 1000)
        process.process.kill()
    code = process.end()
    assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), process.stderr
    return code


@pytest.mark.usefixtures("blank_figures")
def test_a_run_killed_again_and_again_goes_on_bit_for_bit(tmp_path, uncut):
    """Before any operation on a file, in the midst of one that is written, and at any moment; KILLS times each."""
    folder, operations = uncut
    assert operations > 30
    size = (folder / "checkpoint.pt").stat().st_size
    draw = random.Random(int(os.environ.get("KILLS_SEED", "0")))
    kills = []
    for _ in range(int(os.environ.get("KILLS", "1"))):
        kills += [("file", draw.randrange(operations)), ("checkpoint", draw.randrange(operations))]
        kills += [("bytes", draw.randrange(size)), ("moment", draw.randrange(500))]
    draw.shuffle(kills)
    for number, kill in enumerate(kills):
        killed(tmp_path / f"out-{number}", tmp_path / "run", *kill)
    run(str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", folder)


# Which are kept


def saved_epochs(folder):
    return [read_checkpoint(path)["epoch"] for path in folder.checkpoints()]


@pytest.fixture
def saver(tmp_path):
    """Saves checkpoints that keep `hist`, of an epoch of this number and accuracy."""
    config = configured(tmp_path / "run")
    parts, _ = made(config)
    folder = RunFolder(config, 1)
    folder.path.mkdir()

    def save(epoch, accuracy=0.5, loss=1.0, hist=2):
        checkpoints = Checkpoints(parts, ALONE, folder, replace(config, checkpoint_hist=hist))
        checkpoints.save(Progress(epoch, last=EPOCH | {"epoch": epoch, "test_accuracy": accuracy, "test_loss": loss}))

    return save, folder


def test_the_last_ones_are_kept_and_fewer_when_fewer_are_asked_for(saver):
    save, folder = saver
    seen = []
    for epoch in range(1, 6):
        save(epoch, hist=3)
        seen.append(saved_epochs(folder))
    assert seen == [[1], [2, 1], [3, 2, 1], [4, 3, 2], [5, 4, 3]]
    save(6, hist=1)
    assert saved_epochs(folder) == [6]
    save(7, hist=1)
    assert saved_epochs(folder) == [7]
    assert sorted(path.name for path in folder.path.iterdir()) == ["best.pt", "checkpoint.pt"]


@pytest.mark.parametrize("hist", [1, 2, 3])
def test_a_gap_that_a_kill_has_left_costs_no_checkpoint(saver, hist):
    save, folder = saver
    for epoch in (1, 2, 3):
        save(epoch, hist=3)
    folder.checkpoint_path.unlink()  # as between the two moves
    folder.shift_checkpoints(hist)
    assert saved_epochs(folder)[0] == 2
    save(4, hist=hist)
    assert saved_epochs(folder) == [4, 2, 1][: max(hist, 2)]


def test_the_best_epoch_is_kept_by_accuracy_then_loss_also_by_a_run_that_goes_on(saver):
    save, folder = saver
    best = []
    epochs = [(0.5, 1.0), (0.4, 0.1), (0.5, 0.9), (0.5, float("nan")), (0.7, float("inf")), (0.7, 2.0), (0.6, 0.0)]
    for number, (accuracy, loss) in enumerate(epochs, 1):
        save(number, accuracy, loss)  # each time by a saver that has seen nothing before
        best.append(read_checkpoint(folder.best_path)["epoch"])
    assert best == [1, 1, 3, 3, 5, 6, 6]
    folder.best_path.write_bytes(b"broken")
    save(8, 0.1)
    assert read_checkpoint(folder.best_path)["epoch"] == 8


def test_a_file_system_without_links_has_the_best_epoch_too(saver, monkeypatch):
    def refused(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    save, folder = saver
    save(1)
    assert folder.best_path.read_bytes() == folder.checkpoint_path.read_bytes()


# When they are saved


class Saved(Watcher):
    """The steps after which a checkpoint was made, within an epoch and at its end."""

    def __init__(self, folder):
        super().__init__(folder)
        self.at = []

    def pause(self):
        self.at.append(self.steps[-1][0] + 1)


def test_a_checkpoint_is_saved_every_so_many_steps_of_the_run(tmp_path):
    config = configured(tmp_path / "run", "--checkpoint-steps", "4")
    saved = Saved(RunFolder(config, 1))
    looped(config, *made(config), recorder=saved).train(Progress())
    assert saved.at == [4, 8, 12, 16, 24, 28]  # the epochs' own checkpoints are those of 10, 20 and 30
    assert saved_epochs(saved.folder) == [3, 2]


def test_a_checkpoint_is_saved_when_the_last_is_so_many_minutes_old(tmp_path, monkeypatch):
    config = configured(tmp_path / "run", "--checkpoint-minutes", "7.5")
    saved = Saved(RunFolder(config, 1))
    loop = looped(config, *made(config), recorder=saved)
    clock = [time.monotonic()]

    def later():
        clock[0] += 140  # asked for once a step, and where a checkpoint is written
        return clock[0]

    monkeypatch.setattr(time, "monotonic", later)
    loop.train_epoch(Progress())
    assert len(saved.at) == 2
    assert 3 < saved.at[1] - saved.at[0] < 6


def test_that_a_checkpoint_is_due_is_told_once_by_the_main_process_alone(tmp_path):
    config = configured(tmp_path / "run", "--checkpoint-minutes", "0.0001")
    parts, _ = made(config)
    for process, expected in ((ALONE, [True, False]), (replace(ALONE, rank=1, world_size=2), [False, False])):
        checkpoints = Checkpoints(parts, process, RunFolder(config, 1), config)
        time.sleep(0.01)
        assert [checkpoints.is_time(), checkpoints.is_time()] == expected


def test_a_signal_goes_before_a_checkpoint_that_is_due():
    with StopSignals(ALONE) as signals:
        assert [signals.asked(), signals.asked(save=True), signals.asked()] == [0, SAVE, 0]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked(save=True) == signal.SIGUSR1 > SAVE


# Broken ones


class Refused:
    """A pickle that runs a command where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def malicious(path):
    torch.save({"model": Refused(path.parent / "executed")}, path)


def bare_pickle(path):
    path.write_bytes(pickle.dumps(Refused(path.parent / "executed")))


def flipped(path):
    """One bit of a weight is another: torch itself would load it."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["model"]["4.weight"]
    content[content.index(weight.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "short of a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: path.write_bytes(b""),
    "blank": lambda path: path.write_bytes(bytes(path.stat().st_size)),  # as some file systems leave it after a power cut
    "a flipped bit": flipped,
    "of something else": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "malicious": malicious,
    "a malicious bare pickle": bare_pickle,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    config = configured(path, "--checkpoint-steps", "4")
    parts, loaders = made(config)
    progress = looped(config, parts, loaders).train(Progress())
    return path, parts, progress


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, finished, damage, capsys):
    uncut, parts, _ = finished
    config = configured(tmp_path / "run", "--checkpoint-steps", "4")
    again, loaders = made(config)
    loop = looped(config, again, loaders)
    for name in ("checkpoint.pt", "checkpoint.1.pt"):
        (tmp_path / "run" / name).write_bytes((uncut / name).read_bytes())
    DAMAGES[damage](tmp_path / "run" / "checkpoint.pt")
    progress = loop.checkpoints.load_newest()
    assert progress.steps(10) == 28
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(str(tmp_path / "run" / "checkpoint.pt: "))
    assert said.endswith("; set aside, going on from checkpoint.1.pt\n")
    assert not (tmp_path / "run" / "executed").exists()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.1.pt", "checkpoint.pt.broken"]
    loop.train(progress)
    assert_same_weights(again.model, parts.model)


def test_where_none_is_whole_that_is_said_and_nothing_is_touched(tmp_path, finished):
    uncut, _, _ = finished
    config = configured(tmp_path / "run")
    loop = looped(config, *made(config))
    assert loop.checkpoints.load_newest() == Progress()  # there is none
    for name in ("checkpoint.pt", "checkpoint.1.pt"):
        (tmp_path / "run" / name).write_bytes((uncut / name).read_bytes()[:-5])
    with pytest.raises(UsageError, match=r"checkpoint.pt: damaged, or no checkpoint: .*; no other can be used$"):
        loop.checkpoints.load_newest()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.1.pt", "checkpoint.pt"]


# The folder


def test_resume_auto_begins_where_there_is_no_run_and_goes_on_where_there_is_one(tmp_path):
    config = configured(tmp_path / "run", "--resume", "auto")
    folder = RunFolder(config, 1)
    folder.check()
    folder.claim()
    folder.start(0)
    folder.release()
    folder.check()
    (tmp_path / "run" / "config.json").write_text(json.dumps(folder.config | {"epochs": 9}))
    with pytest.raises(UsageError, match="--epochs is 3, but the run was started with 9"):
        folder.check()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        RunFolder(replace(config, run_dir=tmp_path / "other"), 1).check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), None),
        (("--mixup", "0.2"), "--mixup is 0.2, but the run was started with 0.0"),
        (("--grad-accum", "2"), "--grad-accum is 2"),
    ],
    ids=["defaults", "mixup", "grad-accum"],
)
def test_a_run_from_before_an_option_was_there_had_its_default(tmp_path, options, said):
    folder = RunFolder(configured(tmp_path / "run"), 1)
    folder.claim()
    newer = {"mixup", "grad_accum", "amp_dtype", "checkpoint_steps", "eval", "opt_kwargs", "train_split"}
    folder.write_json("config.json", {name: value for name, value in folder.config.items() if name not in newer})
    folder.release()
    later = RunFolder(configured(tmp_path / "run", "--resume", *options), 1)
    if said is None:
        later.check()
    else:
        with pytest.raises(UsageError, match=said):
            later.check()


@pytest.mark.parametrize("name", ["world_size", "batch_size", "grad_accum"])
def test_a_configuration_whose_step_makes_no_sense_is_said(tmp_path, name):
    folder = RunFolder(configured(tmp_path / "run"), 1)
    folder.claim()
    folder.release()
    for value in (0, -1, 1.5, float("inf"), float("nan"), "64", "many", None, [1], {}):
        folder.write_json("config.json", folder.config | {name: value})
        with pytest.raises(UsageError, match=rf"config\.json cannot be read: {name} is "):
            RunFolder(configured(tmp_path / "run", "--resume"), 1).check()


def test_a_step_of_any_size_is_split_at_once(tmp_path):
    folder = RunFolder(configured(tmp_path / "run"), 1)
    folder.claim()
    for processes, split in ((10**30, (64, 10**30)), (10**9 + 7, (64, 10**9 + 7))):
        folder.write_json("config.json", folder.config | {"world_size": processes, "batch_size": 64})
        config = configured(tmp_path / "run", "--batch-size", "64", "--resume")
        assert (config.batch_size, config.grad_accum) == split
    folder.release()


def test_only_a_run_that_follows_its_losses_is_extended(tmp_path):
    for sched, extended in (("autowu", True), ("paper", True), ("cosine", False), ("poly", False)):
        folder = RunFolder(configured(tmp_path / sched, "--sched", sched), 1)
        folder.claim()
        folder.write_json("config.json", folder.config | {"epochs": 2})
        folder.release()
        later = RunFolder(configured(tmp_path / sched, "--sched", sched, "--resume"), 1)
        if extended:
            later.check()
        else:
            with pytest.raises(UsageError, match="--epochs is 3, but the run was started with 2"):
                later.check()


def test_arguments_of_the_optimizer_are_those_of_before_when_a_run_goes_on(tmp_path):
    options = ("--opt", "adamw", "--opt-kwargs", "betas=(0.9,0.99)", "fused={1,2}")
    folder = RunFolder(configured(tmp_path / "run", *options), 1)
    folder.claim()
    folder.start(0)
    folder.release()
    RunFolder(configured(tmp_path / "run", *options, "--resume"), 1).check()
    with pytest.raises(UsageError, match=r"--opt-kwargs is \{'betas': "):
        RunFolder(configured(tmp_path / "run", "--opt", "adamw", "--opt-kwargs", "betas=(0.9,0.95)", "--resume"), 1).check()


def test_a_run_goes_on_with_other_processes_only_by_steps_of_as_many_images(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    RunFolder(config := configured(tmp_path / "run", "--batch-size", "12", "--grad-accum", "2"), 4).claim()
    RunFolder(config, 4).start(0)
    splits = []
    for processes, options in (
        (4, ["--grad-accum", "2"]),
        (2, []),
        (8, []),
        (3, ["--batch-size", "12"]),
        (1, ["--batch-size", "50"]),
    ):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        config = configured(tmp_path / "run", "--batch-size", "12", *options, "--resume", "auto")
        RunFolder(config, processes).check()
        splits.append((config.batch_size, config.grad_accum))
    assert splits == [(12, 2), (12, 4), (12, 1), (8, 4), (48, 2)]
    for processes, options, said in (
        (5, [], "a step of the run takes 96 images, which 5 processes cannot share evenly"),
        (4, ["--grad-accum", "1"], "--grad-accum is 1, but the run was started with 2"),
        (2, ["--global-batch-size", "48"], "a step of 2 processes takes 48 images, but the run was started with 96 on 4"),
    ):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(UsageError, match=said):
            RunFolder(configured(tmp_path / "run", "--batch-size", "12", *options, "--resume"), processes).check()
    monkeypatch.setenv("WORLD_SIZE", "2")
    later = RunFolder(configured(tmp_path / "run", "--global-batch-size", "96", "--batch-size", "48", "--resume"), 2)
    later.check()
    later.start(0)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [saved[name] for name in ("world_size", "batch_size", "grad_accum", "global_batch_size")] == [4, 12, 2, None]

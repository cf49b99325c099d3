"""The rooms of train.py, each alone: a small model on the digits, real files, real processes."""

import copy
import fcntl
import json
import logging
import math
import os
import random
import resource
import signal
import struct
import termios
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image
from processes import Forked, ranks, ranks_started
from test_imports import MODULES, modules_used
from torch import nn

from autowu.training.build import build_parts
from autowu.training.checkpoints import Checkpoints, read_checkpoint, write_checkpoint
from autowu.training.config import RunError, UsageError, parse_args
from autowu.training.console import Console, NullConsole
from autowu.training.cooldowns import first_steps
from autowu.training.data import find_data, make_loaders
from autowu.training.evaluation import evaluate
from autowu.training.folder import RunFolder
from autowu.training.generators import random_state, seed_epoch, set_random_state
from autowu.training.loop import Loop, train_step
from autowu.training.main import told_as_run_errors
from autowu.training.process import Process
from autowu.training.progress import Begun, EpochSteps, Progress, StepRow
from autowu.training.records import NullRecorder, Recorder, epoch_row, summarize
from autowu.training.run import train_run
from autowu.training.signals import Stopped, StopSignals

ALONE = Process(0, 1, torch.device("cpu"))
STEPS_PER_EPOCH = 10
EPOCH = {
    "epoch": 1,
    "step": 9,
    "phase": "warmup",
    "lr": 0.25,
    "train_loss": 2.0,
    "test_loss": 1.5,
    "test_accuracy": 0.5,
    "seconds": 1,
    "images_per_s": 1000.0,
}


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def configured(path, *options):
    return parse_args(["--batch-size", "128", "--epochs", "3", "--device", "cpu", "--run-dir", str(path), *options])


def made(config, process=ALONE):
    """Parts of a small model, and loaders of the digits in their own 8 by 8 pixels."""
    loaders = make_loaders(config, process, find_data(config, process), 8, {})
    assert len(loaders.train) == STEPS_PER_EPOCH
    return build_parts(config, process, small_model(), STEPS_PER_EPOCH), loaders


def looped(config, parts, loaders, *, recorder=None, console=None, branches=None):
    folder = RunFolder(config, 1)
    folder.path.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(parts, ALONE, folder, config, branches)
    return Loop(
        config, ALONE, parts, loaders, checkpoints, recorder or NullRecorder(), console or NullConsole(), StopSignals(ALONE)
    )


@pytest.fixture
def file_limit():
    """A disk that is full: files of more bytes than a limit cannot be written."""

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# Generators


def draws():
    return torch.rand(3).tolist(), random.random()


def test_every_epoch_and_process_draws_numbers_of_its_own_and_the_same_again():
    def draws_of_all():
        found = []
        for epoch in range(3):
            for rank in range(2):
                seed_epoch(7, epoch, Process(rank, 2, ALONE.device))
                found.append(draws())
        return found

    first = draws_of_all()
    assert len({torch_draws[0] for torch_draws, _ in first}) == len({python_draw for _, python_draw in first}) == 6
    assert draws_of_all() == first


def test_a_random_state_that_is_put_back_draws_the_same_from_torch_and_python():
    state = random_state(ALONE.device)
    expected = draws()
    assert draws() != expected
    set_random_state(state, ALONE.device)
    assert draws() == expected


# Progress


def test_the_steps_of_an_epoch_are_numbered_in_the_run_and_become_rows():
    steps = EpochSteps(ALONE, 2, 3)
    assert (steps.step, steps.losses(), steps.is_complete) == (6, [], False)
    for k in range(3):
        assert steps.step == 6 + k
        steps.add(0.1 * k, "warmup", torch.tensor(float(k)))
    assert steps.is_complete
    rows = [
        (6, 3, 0.0, 0.0, "warmup", None, ""),
        (7, 3, 0.1, 1.0, "warmup", None, "switch peak"),
        (8, 3, 0.2, 2.0, "warmup", None, ""),
    ]
    assert steps.rows({8: "switch peak", 7000: "lost"}) == rows


def test_an_epoch_that_was_begun_goes_on_behind_its_steps():
    begun = Begun([0.5, 0.25], [3.0, math.inf], random_state(ALONE.device))
    steps = EpochSteps(ALONE, 1, 4, begun)
    assert (steps.step, steps.losses()) == (6, [3.0, math.inf])
    steps.add(0.125, "cooldown", torch.tensor(2.0))
    assert [row[:4] for row in steps.rows()] == [(4, 2, 0.5, 3.0), (5, 2, 0.25, math.inf), (6, 2, 0.125, 2.0)]
    assert begun.lrs == [0.5, 0.25]
    assert Progress(1, begun=begun).steps(4) == 6


def test_progress_counts_epochs_and_seconds():
    progress = Progress().after_epoch({"epoch": 1}, 2.5).after_epoch({"epoch": 2}, 1.5)
    assert progress == Progress(2, 4.0, {"epoch": 2})
    assert progress.steps(10) == 20


# Build


def test_parts_tell_lr_and_phase_of_any_scheduler(tmp_path):
    parts, _ = made(configured(tmp_path))
    assert (parts.lr, parts.phase) == (parts.optimizer.param_groups[0]["lr"], "warmup")
    cosine, _ = made(configured(tmp_path, "--sched", "cosine", "--lr", "0.5"))
    assert (cosine.lr, cosine.phase, cosine.autowu) == (0.25, "", None)  # the first of two steps of warm-up
    cosine.optimizer.step()
    cosine.step_scheduler(torch.tensor(1.0))
    assert cosine.lr == 0.5


# Evaluation


def test_the_test_is_over_all_images_whatever_the_batches(tmp_path):
    parts, loaders = made(configured(tmp_path))
    images, labels = loaders.test.dataset.dataset.tensors
    parts.model.train()(images)  # statistics of batch norm that a test must use and not change
    before = copy.deepcopy(parts.model)
    loss, accuracy = evaluate(parts, loaders.test, ALONE)
    assert not parts.model.training
    assert_same_weights(parts.model, before)
    logits = before.eval()(images).double()
    assert len(labels) == 450
    assert loss == pytest.approx(-logits.log_softmax(1)[range(450), labels].mean().item(), rel=1e-6)
    assert accuracy == (logits.argmax(1) == labels).sum().item() / 450
    in_sevens = torch.utils.data.DataLoader(loaders.test.dataset, 7)
    assert evaluate(parts, in_sevens, ALONE) == pytest.approx((loss, accuracy), rel=1e-6)


def test_the_loss_of_the_test_is_not_smoothed(tmp_path):
    plain, loaders = made(configured(tmp_path))
    smoothed, _ = made(configured(tmp_path, "--label-smoothing", "0.5"))
    assert evaluate(smoothed, loaders.test, ALONE) == evaluate(plain, loaders.test, ALONE)


# Loop


def test_a_step_is_that_of_the_definition(tmp_path):
    parts, loaders = made(configured(tmp_path, "--opt", "momentum", "--lr", "0.1", "--momentum", "0", "--weight-decay", "0"))
    lr = parts.lr
    model = small_model()
    for images, labels in list(loaders.train)[:2]:
        expected = nn.functional.cross_entropy(model(images), labels)
        grads = torch.autograd.grad(expected, list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter -= lr * grad
        loss = train_step(parts, images, labels)
        assert loss.item() == expected.item()
        assert not loss.requires_grad
        for parameter, trained in zip(model.parameters(), parts.model.parameters(), strict=True):
            torch.testing.assert_close(trained, parameter)


class Watcher(NullRecorder):
    """What the loop tells of a run, beside what it has saved by then."""

    def __init__(self, folder):
        self.folder, self.steps, self.epochs, self.saved = folder, [], [], []

    def step(self, step, optimizer):
        self.steps.append((step, optimizer.param_groups[0]["lr"]))

    def epoch(self, steps, row):
        self.epochs.append((steps, row))
        path = self.folder.checkpoint_path
        self.saved.append(read_checkpoint(path)["epoch"] if path.exists() else 0)


def test_the_loop_records_each_step_at_its_lr_and_each_epoch_before_its_checkpoint(tmp_path):
    config = configured(tmp_path / "run")
    watcher = Watcher(RunFolder(config, 1))
    progress = looped(config, *made(config), recorder=watcher).train(Progress())
    rows = [row for steps, _ in watcher.epochs for row in steps]
    assert [(row.step, row.lr) for row in rows] == watcher.steps
    assert [step for step, _ in watcher.steps] == list(range(30))
    assert len({lr for _, lr in watcher.steps}) > 20
    assert watcher.saved == [0, 1, 2]
    assert read_checkpoint(watcher.folder.checkpoint_path)["epoch"] == 3
    assert (progress.epochs, progress.last) == (3, watcher.epochs[-1][1])
    assert progress.last["test_accuracy"] > 0.3


def test_every_epoch_has_an_order_of_the_images_of_its_own(tmp_path):
    config = configured(tmp_path / "run")
    loop = looped(config, *made(config))
    orders = []
    for epoch in (0, 1, 1):
        loop.train_epoch(Progress(epoch))
        orders.append(list(loop.loaders.sampler))
    assert orders[0] != orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1347))


@pytest.mark.usefixtures("blank_figures")
def test_a_run_begins_with_nothing_done_or_with_its_checkpoint(tmp_path):
    config = configured(tmp_path / "run")
    whole, loaders = made(config)
    summary = train_run(config, ALONE, whole, loaders, RunFolder(config, 1), 0.0)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    again, loaders = made(config)
    repeated = train_run(replace(config, resume=True), ALONE, again, loaders, RunFolder(config, 1), 0.0)
    assert_same_weights(again.model, whole.model)  # nothing was left to train
    assert repeated | {"wall_s": 0} == summary | {"wall_s": 0}


class Signalled(NullRecorder):
    """Sends this process a signal at one step."""

    def __init__(self, number, at):
        self.number, self.at, self.paused = number, at, False

    def step(self, step, optimizer):
        if step == self.at:
            os.kill(os.getpid(), self.number)

    def pause(self):
        self.paused = True


@pytest.mark.parametrize(("number", "at", "saved_at"), [(signal.SIGTERM, 13, 14), (signal.SIGUSR1, 0, 1), (signal.SIGINT, 19, 20)])
def test_a_signal_saves_all_steps_and_the_run_goes_on_exactly(tmp_path, number, at, saved_at):
    config = configured(tmp_path / "whole")
    whole, loaders = made(config)
    looped(config, whole, loaders).train(Progress())
    cut = replace(config, run_dir=tmp_path / "cut")
    recorder = Signalled(number, at)
    loop = looped(cut, *made(cut), recorder=recorder)
    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    with pytest.raises(Stopped) as stopped, loop.signals:
        loop.train(Progress())
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before
    assert stopped.value.number == number
    assert recorder.paused == (saved_at % STEPS_PER_EPOCH != 0)
    resumed, loaders = made(cut)
    loop = looped(cut, resumed, loaders)
    progress = loop.checkpoints.load(tmp_path / "cut" / "checkpoint.pt")
    assert progress.steps(STEPS_PER_EPOCH) == saved_at
    loop.train(progress)
    assert_same_weights(resumed.model, whole.model)
    assert resumed.lr == whole.lr


def test_a_second_interrupt_breaks_off_at_once_and_one_that_a_launcher_repeats_does_not():
    with StopSignals(ALONE) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked() == signal.SIGINT
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("blank_figures")
def test_more_epochs_extend_a_finished_run(tmp_path):
    from pyarrow.parquet import ParquetFile

    config = configured(tmp_path / "run", "--log-layers", "4")
    parts, loaders = made(config)
    train_run(config, ALONE, parts, loaders, RunFolder(config, 1), 0.0)
    assert parts.phase == "done"
    longer = replace(config, epochs=5, resume=True)
    folder = RunFolder(longer, 1)
    folder.check()
    again, loaders = made(longer)
    summary = train_run(longer, ALONE, again, loaders, folder, 0.0)
    assert summary["total_steps"] == 50
    assert again.autowu.last_epoch == again.autowu.config.total_steps == 50
    assert again.phase == "done"
    rows = folder.rows("metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(50))
    lrs = [float(row["lr"]) for row in rows]
    assert lrs[30] > 2 * lrs[29]  # the cooldown has moved to the new end
    assert lrs[49] < lrs[30] / 5
    assert sorted(set(ParquetFile(folder.path / "layers.parquet").read()["step"].to_pylist())) == list(range(0, 50, 4))
    with pytest.raises(UsageError, match="--epochs is 4, but the run was started with 5"):
        RunFolder(replace(longer, epochs=4), 1).check()


@pytest.mark.parametrize("options", [["--sched", "cosine"], ["--cooldown-fraction", "0.1", "0.3"]], ids=" ".join)
def test_a_run_laid_out_for_its_epochs_is_not_extended(tmp_path, options):
    config = configured(tmp_path / "run", *options)
    RunFolder(config, 1).start(0)
    with pytest.raises(UsageError, match="--epochs is 5, but the run was started with 3"):
        RunFolder(replace(config, epochs=5, resume=True), 1).check()


# Checkpoints


def test_a_loaded_run_goes_on_as_the_one_that_was_saved(tmp_path):
    config = configured(tmp_path / "run")
    parts, loaders = made(config)
    loop = looped(replace(config, epochs=1), parts, loaders)
    saved = loop.train(Progress())
    other, loaders = made(config)
    with torch.no_grad():
        other.model[0].weight.zero_()
    loaded = Checkpoints(other, ALONE, RunFolder(config, 1), config).load(tmp_path / "run" / "checkpoint.pt")
    assert loaded == saved
    states = [p.autowu.state_dict() for p in (parts, other)]
    assert states[0]["last_epoch"] == states[1]["last_epoch"] == 10
    for one, data in ((parts, loop.loaders), (other, loaders)):
        looped(config, one, data).train(saved)
    assert_same_weights(parts.model, other.model)
    assert parts.lr == other.lr


def test_the_file_holds_what_it_always_held(tmp_path):
    for sched in ("autowu", "cosine"):
        config = configured(tmp_path / sched, "--sched", sched, "--epochs", "1")
        looped(config, *made(config)).train(Progress())
        state = read_checkpoint(tmp_path / sched / "checkpoint.pt")
        assert list(state) == ["epoch", "elapsed", "last", "model", "optimizer", "scheduler"]
        assert [of_rank["last_epoch"] for of_rank in state["scheduler"]] == [10]


def test_a_branch_is_saved_before_its_first_step_and_goes_on_there(tmp_path):
    options = ["--cooldown-fraction", "0.3", "--epochs", "4", "--max-warmup-fraction", "0.3"]
    config = configured(tmp_path / "run", *options)
    parts, loaders = made(config)
    branches = {0.4: 24, 0.5: 20}  # within an epoch, and between two
    assert first_steps(parts.autowu, list(branches)) == branches
    looped(config, parts, loaders, branches=branches).train(Progress())
    for fraction, (epochs, within) in {0.4: (2, 4), 0.5: (2, 0)}.items():
        state = read_checkpoint(tmp_path / "run" / f"branch-{fraction}.pt")
        assert (state["epoch"], state["step_in_epoch"]) == (epochs, within)
        alone = configured(tmp_path / "alone", *options[2:], "--cooldown-fraction", str(fraction))
        whole, loaders = made(alone)
        looped(alone, whole, loaders).train(Progress())
        branch, loaders = made(alone)
        loop = looped(alone, branch, loaders)
        progress = loop.checkpoints.load(tmp_path / "run" / f"branch-{fraction}.pt")
        assert progress.steps(STEPS_PER_EPOCH) == branches[fraction]
        loop.train(progress)
        assert_same_weights(branch.model, whole.model)


def test_a_branch_that_leaves_between_two_epochs_waits_for_the_test(tmp_path):
    config = configured(tmp_path / "run", "--cooldown-fraction", "0.1", "--epochs", "4")
    loop = looped(config, *made(config), branches={0.5: 20})
    steps = loop.train_epoch(Progress(1))
    assert (steps.step, steps.is_complete) == (20, True)
    assert not list((tmp_path / "run").iterdir())
    loop.checkpoints.save_branches(Progress(2), EpochSteps(ALONE, 2, STEPS_PER_EPOCH))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["branch-0.5.pt"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint({"weights": torch.zeros(1000), "epoch": lambda: 2}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    write_checkpoint({"epoch": 3}, path)
    assert read_checkpoint(path) == {"epoch": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_a_changed_bit_is_noticed_or_changes_nothing(tmp_path):
    path, state = tmp_path / "checkpoint.pt", {"epoch": 3, "model": {"a": torch.randn(500), "b": torch.arange(7)}}
    write_checkpoint(state, path)
    whole, noticed = path.read_bytes(), 0
    draw = random.Random(0)
    expected = str(state)
    places = [draw.randrange(len(whole)) for _ in range(200)] + list(range(len(whole) - 300, len(whole)))
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            read = read_checkpoint(path)
        except UsageError as error:
            noticed += 1
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert str(read) == expected
            assert torch.equal(read["model"]["a"], state["model"]["a"])
    assert noticed > 200


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path, state: path.write_bytes(path.read_bytes()[:-1000]), "damaged, or no checkpoint: BadZipFile"),
        (lambda path, state: path.write_bytes(b""), "damaged, or no checkpoint"),
        (lambda path, state: path.write_text("no checkpoint"), "damaged, or no checkpoint"),
        (lambda path, state: path.unlink(), "No such file"),
        (lambda path, state: torch.save(state["model"], path), "no checkpoint of this run: KeyError: 'model'"),
        (lambda path, state: torch.save([1], path), "no checkpoint of train.py: it holds a list"),
        (lambda path, state: torch.save(nn.Linear(1, 1), path), "no checkpoint of train.py"),
        (lambda path, state: torch.save(state | {"model": nn.Linear(1, 1).state_dict()}, path), "no checkpoint of this run"),
        (lambda path, state: torch.save(state | {"scheduler": []}, path), "no checkpoint of this run"),
        (lambda path, state: torch.save(state | {"optimizer": {}}, path), "no checkpoint of this run"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, damage, said):
    config = configured(tmp_path / "run")
    parts, _ = made(config)
    path = tmp_path / "checkpoint.pt"
    checkpoints = Checkpoints(parts, ALONE, RunFolder(configured(tmp_path), 1), config)
    checkpoints.save(Progress(0))
    torch.save(read_checkpoint(path), path)  # as torch itself writes, and as earlier versions did
    assert checkpoints.load(path) == Progress(0)
    damage(path, read_checkpoint(path))
    with pytest.raises(UsageError) as error:
        checkpoints.load(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_small_checkpoints_are_without_the_copies_and_load(tmp_path):
    config = configured(tmp_path / "run", "--epochs", "30")
    parts, loaders = made(config)
    for images, labels in [batch for _ in range(2) for batch in loaders.train]:
        parts.step_scheduler(train_step(parts, images, labels))
    folder = RunFolder(config, 1)
    folder.path.mkdir()
    sizes = []
    for small in False, True:
        Checkpoints(parts, ALONE, folder, replace(config, small_checkpoints=small)).save(Progress(2))
        (state,) = read_checkpoint(folder.checkpoint_path)["scheduler"]
        assert (state["snapshot"] is None) == small
        sizes.append(folder.checkpoint_path.stat().st_size)
        again, _ = made(config)
        Checkpoints(again, ALONE, folder, config).load(folder.checkpoint_path)
        assert_same_weights(again.model, parts.model)
    assert sizes[1] < 0.7 * sizes[0]


def test_a_branch_in_the_warm_up_is_refused_by_its_option(tmp_path):
    parts, _ = made(configured(tmp_path, "--cooldown-fraction", "0.1"))
    with pytest.raises(UsageError, match=r"^--cooldown-fraction 0.9: cooldown_fraction=0.9: the warm-up would end by step"):
        first_steps(parts.autowu, [0.2, 0.9])


# Records


def test_the_row_of_an_epoch_averages_the_finite_losses():
    steps = [(20, 3, 0.5, 1.0), (21, 3, 0.25, math.inf), (22, 3, 0.125, 2.0), (23, 3, 0.1, math.nan)]
    steps = [StepRow(*step) for step in steps]
    row = epoch_row(steps, "stable", (1.25, 0.75), 1.23456, 345.678)
    assert row == {
        "epoch": 3,
        "step": 23,
        "phase": "stable",
        "lr": 0.1,
        "train_loss": 1.5,
        "test_loss": 1.25,
        "test_accuracy": 0.75,
        "seconds": 1.235,
        "images_per_s": 345.7,
    }
    assert math.isnan(epoch_row(steps[3:], "stable", (1.0, 0.5), 1, 1)["train_loss"])


def epoch_of(number):
    """The rows of an epoch of two steps."""
    steps = [StepRow(2 * number + k, number + 1, 0.5, float(number + k), "warmup", 0.25) for k in range(2)]
    return steps, EPOCH | {"epoch": number + 1, "step": 2 * number + 1}


def test_records_of_steps_after_the_checkpoint_are_dropped_and_those_of_a_trunk_taken_over(tmp_path):
    trunk = RunFolder(configured(tmp_path / "run"), 1)
    recorder = Recorder(trunk, Progress(), 2, None)
    for number in range(3):
        recorder.epoch(*epoch_of(number))
    resumed = Recorder(trunk, Progress(2, last=EPOCH), 2, None)
    assert [row["step"] for row in trunk.rows("metrics.csv")] == ["0", "1", "2", "3"]
    resumed.epoch(*epoch_of(2))
    assert [row["loss"] for row in trunk.rows("metrics.csv")] == ["0.0", "1.0", "1.0", "2.0", "2.0", "3.0"]
    branch = RunFolder(configured(tmp_path / "run" / "branch"), 1)
    Recorder(branch, Progress(1, begun=Begun([0.5], [1.0], {})), 2, None, trunk)
    assert branch.rows("metrics.csv") == trunk.rows("metrics.csv")[:2]
    assert branch.rows("epochs.csv") == trunk.rows("epochs.csv")[:1]
    assert len(trunk.rows("epochs.csv")) == 3


@pytest.mark.parametrize("options", [[], ["--sched", "cosine", "--lr", "0.5"]], ids=["autowu", "cosine"])
def test_a_finished_run_has_summary_and_figure(tmp_path, options):
    config = configured(tmp_path / "run", *options)
    parts, _ = made(config)
    recorder = Recorder(RunFolder(config, 1), Progress(), 2, None)
    recorder.epoch(*epoch_of(0))
    summary = summarize(config, ALONE, parts, 2, Progress(3, 1.239, EPOCH), 4.567)
    recorder.finish(summary, parts.autowu)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert (summary["total_steps"], summary["wall_s"], summary["train_s"]) == (6, 4.57, 1.24)
    assert (summary["switch_step"], summary["switch_by_test"]) == (None, None)
    assert summary["peak_lr"] == (0.5 if options else parts.scheduler.base_lrs[0])
    with Image.open(tmp_path / "run" / "figure.png") as image:
        assert image.width > 500


def test_layers_are_logged_every_so_many_steps(tmp_path):
    config = configured(tmp_path / "run", "--log-layers", "4")
    parts, loaders = made(config)
    train_step(parts, *next(iter(loaders.train)))
    recorder = Recorder(RunFolder(config, 1), Progress(), STEPS_PER_EPOCH, config.log_layers)
    with recorder:
        for step in range(10):
            recorder.step(step, parts.optimizer)
        recorder.epoch(*epoch_of(0))
    from pyarrow.parquet import ParquetFile

    (part,) = (tmp_path / "run" / "layers").iterdir()
    assert sorted(set(ParquetFile(part).read()["step"].to_pylist())) == [0, 4, 8]
    recorder.finish({}, parts.autowu)
    branch = configured(tmp_path / "run" / "branch", "--log-layers", "4")
    Recorder(RunFolder(branch, 1), Progress(0, begun=Begun([0.5] * 6, [1.0] * 6, {})), STEPS_PER_EPOCH, 4, RunFolder(config, 1))
    (part,) = (tmp_path / "run" / "branch" / "layers").iterdir()
    assert sorted(set(ParquetFile(part).read()["step"].to_pylist())) == [0, 4]


def test_layers_are_kept_up_to_the_step_of_a_signal(tmp_path):
    from pyarrow.parquet import ParquetFile

    config = configured(tmp_path / "run", "--log-layers", "4")
    parts, loaders = made(config)
    train_step(parts, *next(iter(loaders.train)))
    folder = RunFolder(config, 1)
    for progress, steps in ((Progress(), range(6)), (Progress(0, begun=Begun([0.5] * 6, [1.0] * 6, {})), range(6, 10))):
        recorder = Recorder(folder, progress, STEPS_PER_EPOCH, 4)
        with recorder:
            for step in steps:
                recorder.step(step, parts.optimizer)
            recorder.pause()
    recorder.epoch(*epoch_of(0))
    recorder.finish({}, parts.autowu)
    assert sorted(set(ParquetFile(folder.path / "layers.parquet").read()["step"].to_pylist())) == [0, 4, 8]


# Console

SUMMARY = {
    "test_accuracy": 0.9125,
    "test_loss": 0.25,
    "switch_step": 12,
    "switch_by_test": True,
    "peak_lr": 1.5,
    "total_steps": 30,
    "wall_s": 4.56,
}


def test_lines_are_said_in_the_order_of_the_run_with_autowus_log_among_them(tmp_path, capsys):
    logger = logging.getLogger("autowu")
    before = (logger.level, list(logger.handlers))
    console = Console(configured(tmp_path), Process(0, 2, torch.device("cpu")), small_model(), 10, 0)
    with console:
        console.step(0, 0.5, "warmup")
        logger.info("switched at %d", 12)
        console.epoch(EPOCH)
    console.finish(SUMMARY, tmp_path)
    logger.warning("no longer said")
    assert (logger.level, logger.handlers) == before
    assert capsys.readouterr().out.splitlines() == [
        "test_resnet (1,498 parameters) on digits, lars with autowu: 3 epochs of 10 steps of 256 images on 2 x cpu",
        "switched at 12",
        "epoch   1/3  LR      0.25 warmup    train loss  2.0000  test loss  1.5000  test accuracy  50.00%",
        "",
        "test accuracy 91.25%  test loss 0.2500  switch at step 12  peak LR 1.5  30 steps in 4.6 s",
        f"results in {tmp_path}",
    ]


@pytest.mark.parametrize(
    ("switch", "said"),
    [((12, False), "  switch at step 12 (limit of the warm-up)  "), ((None, None), "test loss 0.2500  peak LR")],
)
def test_the_result_says_how_the_switch_came(tmp_path, capsys, switch, said):
    summary = SUMMARY | dict(zip(("switch_step", "switch_by_test"), switch, strict=True))
    Console(configured(tmp_path), ALONE, small_model(), 10, 0).finish(summary, tmp_path)
    assert said in capsys.readouterr().out


def test_a_run_that_breaks_off_leaves_the_log_as_it_was(tmp_path):
    logger = logging.getLogger("autowu")
    before = (logger.level, list(logger.handlers))
    console = Console(configured(tmp_path), ALONE, small_model(), 10, 0)

    def break_off():
        with console:
            assert logger.level == logging.INFO
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert (logger.level, logger.handlers) == before


def test_what_other_processes_have_says_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with NullRecorder(), NullConsole():
        NullConsole().epoch(EPOCH)
        NullConsole().finish(SUMMARY, tmp_path)
        NullRecorder().epoch(*epoch_of(0))
        NullRecorder().finish(SUMMARY, None)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_terminal_has_a_progress_bar(tmp_path):
    code = """
import sys, time
from test_training import ALONE, EPOCH, Console, configured, small_model
sys.stderr = open(sys.argv[1], "w")
console = Console(configured("run"), ALONE, small_model(), 10, 5)
with console:
    for step in range(5):
        time.sleep(0.15)  # the bar is drawn ten times a second at most
        console.step(0, 0.5, "warmup")
    console.epoch(EPOCH)
"""
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 25, 120, 0, 0))
    shown = Forked(tmp_path, "-c", code, os.ttyname(end))
    code = shown.end()
    os.set_blocking(terminal, False)
    bar = os.read(terminal, 100_000).decode()
    os.close(end)
    os.close(terminal)
    assert code == 0, bar + shown.stderr
    assert "| 8/30 [" in bar
    assert "epoch 1, LR 0.5 warmup" in bar
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["test_resnet", "epoch"]


# Folder


def test_a_folder_is_begun_in_once_and_gone_on_with_under_its_options(tmp_path):
    config = configured(tmp_path / "run")
    folder = RunFolder(config, 1)
    folder.check_empty()
    assert not folder.path.exists()
    folder.start(0)
    with pytest.raises(UsageError, match="not empty"):
        folder.check_empty()
    with pytest.raises(UsageError, match="no run in"):
        RunFolder(configured(tmp_path), 1).check_resumable()
    with pytest.raises(UsageError, match="no run in"):
        RunFolder(configured(tmp_path / "nowhere"), 1).check_resumable()
    folder.check_resumable()
    RunFolder(replace(config, workers=1, resume=True), 1).check_resumable()
    with pytest.raises(UsageError, match="a step of 2 processes takes 256 images, but the run was started with 128 on 1"):
        RunFolder(config, 2).check_resumable()
    folder.write_json("config.json", folder.config | {"epochs": "two"})
    with pytest.raises(UsageError, match="--epochs is 3, but the run was started with two"):
        folder.check_resumable()


def test_a_folder_is_used_by_one_process_until_it_dies(tmp_path):
    code = """
import sys, time
from test_training import RunFolder, configured
RunFolder(configured(sys.argv[1]), 1).claim()
print("claimed", flush=True)
time.sleep(600)
"""
    folder = RunFolder(configured(tmp_path / "run"), 1)
    other = Forked(tmp_path / "other", "-c", code, tmp_path / "run")
    other.wait_for_line("claimed")
    with pytest.raises(UsageError, match="in use by another process"):
        folder.claim()
    other.process.kill()
    other.end()
    folder.claim()
    folder.start(0)
    folder.release()
    with pytest.raises(UsageError, match="not empty"):  # begun by another between check and claim
        folder.claim()
    folder.release()
    RunFolder(replace(configured(tmp_path / "run"), resume=True), 1).claim()


def test_two_runs_started_in_the_same_second_have_folders_of_their_own():
    assert len({parse_args([]).run_dir for _ in range(20)}) == 20


def test_metrics_are_whole_whenever_the_process_that_renews_them_is_killed(tmp_path):
    folder = RunFolder(configured(tmp_path / "run"), 1)
    recorder = Recorder(folder, Progress(), 2, None)
    for number in range(3):
        recorder.epoch(*epoch_of(number))
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    code = """
import csv, json, os, signal, sys
from test_training import RunFolder, configured
where = sys.argv[2]
def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "json":
    json.dumps = killed
else:
    csv.DictWriter.writerows = killed
RunFolder(configured(sys.argv[1]), 1).start(4)
"""
    for where in ("json", "csv"):
        assert Forked(tmp_path / where, "-c", code, folder.path, where).end() == -signal.SIGKILL
        assert {name: (folder.path / name).read_bytes() for name in before} == before
    folder.start(4)
    assert [row["step"] for row in folder.rows("metrics.csv")] == ["0", "1", "2", "3"]
    assert {path.name for path in folder.path.iterdir()} == before.keys()


@pytest.mark.parametrize("name", ["metrics.csv", "epochs.csv"])
def test_a_row_cut_anywhere_is_no_row(tmp_path, name):
    folder = RunFolder(configured(tmp_path / "run"), 1)
    recorder = Recorder(folder, Progress(), 2, None)
    for number in range(6):
        recorder.epoch(*epoch_of(number))  # steps up to 11: cut after a digit, 11 is another step, 1
    whole, rows = (folder.path / name).read_bytes(), folder.rows(name)
    last = len(whole.rstrip().rpartition(b"\n")[0]) + 1
    for length in range(last, len(whole)):
        (folder.path / name).write_bytes(whole[:length])
        assert folder.rows(name) == rows[:-1]
    (folder.path / name).write_bytes(whole + whole.splitlines(keepends=True)[0] + b"\0,x\n")
    assert folder.rows(name) == rows
    (folder.path / name).write_bytes(whole[:-3])
    folder.start(12)
    assert folder.rows(name) == rows[:-1]
    (folder.path / name).unlink()
    with pytest.raises(UsageError, match=f"{name}: cannot be read: No such file"):
        folder.start(12)


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, file_limit):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint({"epoch": 1}, path)
    with file_limit(20_000), pytest.raises(OSError, match="File too large"):
        write_checkpoint({"weights": torch.zeros(10_000)}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_is_one_line_and_what_is_elsewhere_is_not(tmp_path):
    config = configured(tmp_path / "run")
    with pytest.raises(RunError, match=r"metrics\.csv: cannot be written: No such file"), told_as_run_errors(config):
        RunFolder(config, 1).add_steps([])
    with pytest.raises(FileNotFoundError), told_as_run_errors(config):
        (tmp_path / "elsewhere").read_bytes()


# Several processes


def test_processes_share_losses_statistics_tests_and_checkpoints(tmp_path):
    ranks(tmp_path, 2, "tests/training_ranks.py", tmp_path)


@pytest.mark.parametrize("who", ["1", "01"])
def test_an_error_is_printed_once_with_the_rank_of_its_process(tmp_path, who):
    code = f"""
import sys
from autowu.training.config import RunError
from autowu.training.process import join
try:
    with join("cpu") as process:
        if str(process.rank) in {who!r}:
            raise RunError("cannot go on")
        process.gather(0)
except RunError:
    sys.exit(1)
"""
    with ranks_started(tmp_path, 2, "-c", code) as processes:
        assert [process.end() for process in processes] == [1, 1]
    said = [process.stderr for process in processes]
    lines = [line for text in said for line in text.splitlines() if line.startswith("train.py: error:")]
    assert lines in [[f"train.py: error: rank {rank}: cannot go on"] for rank in who]
    assert "Traceback" not in "".join(said)


# Imports

MAY_USE = {
    "errors": "",
    "options": "errors",
    "limits": "errors options",
    "recipes": "errors options",
    "batches": "errors options",
    "config": "batches errors limits options recipes",
    "process": "batches config",
    "files": "",
    "layers": "config files",
    "augment": "config",
    "draws": "process",
    "folders": "errors",
    "sources": "config",
    "data": "augment config draws folders process sources",
    "generators": "process",
    "progress": "process",
    "folder": "batches config files progress",
    "console": "config process",
    "signals": "process",
    "shards": "errors files process",
    "pretrained": "errors",
    "models": "config data pretrained",
    "optimizers": "config",
    "build": "config data layers models optimizers process shards",
    "evaluation": "build process",
    "board": "config progress",
    "trackers": "board config progress",
    "checkpoints": "build config files folder generators process progress shards",
    "plan": "build checkpoints config console data evaluation process",
    "records": "board build config files folder layers process progress trackers",
    "loop": "build checkpoints config console data evaluation generators process progress records signals",
    "run": "build checkpoints config console data folder loop process progress records signals",
    "cooldowns": "build config data files folder process run",
    "main": "board build config cooldowns data folder plan process run signals trackers",
}


def test_each_room_imports_rooms_below_it_only():
    rooms = [name.removeprefix("autowu.training.") for name in MODULES if name.startswith("autowu.training.")]
    assert sorted(rooms) == sorted(MAY_USE)
    order = list(MAY_USE)
    for room, names in MAY_USE.items():
        assert set(names.split()) < set(order[: order.index(room)]) | {room}
        used = {name for name in modules_used(f"autowu.training.{room}") if name.startswith("autowu.training.")}
        assert used == {f"autowu.training.{name}" for name in names.split()}


# Ends that are not known in epochs


def test_a_first_ctrl_c_may_ask_for_a_cooldown_and_the_next_stops():
    with StopSignals(ALONE, first_cools=True) as signals:
        assert (signals.asked(), signals.cools()) == (0, False)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # by a launcher, which hands it on
        assert (signals.asked(), signals.cools(), signals.cools()) == (0, True, False)
        signals._cools_since -= 2
        os.kill(os.getpid(), signal.SIGINT)
        assert (signals.asked(), signals.cools()) == (signal.SIGINT, False)
        signals._came_at -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignals(ALONE, first_cools=True) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.asked(), signals.cools()) == (signal.SIGTERM, False)


class CtrlC(NullConsole):
    """Has Ctrl-C pressed at these steps."""

    def __init__(self, *at):
        self.at, self.steps = at, 0

    def step(self, epoch, lr, phase, probability=None):
        self.steps += 1
        if self.steps in self.at:
            os.kill(os.getpid(), signal.SIGINT)


def interrupted(path, *options, at=(), cut=None):
    """A run with Ctrl-C at these steps: where it stands, its parts, the rows of its epochs."""
    config = configured(path, "--epochs", "12", *options)
    parts, loaders = made(config)
    rows = []

    class Kept(NullRecorder):
        def epoch(self, steps, row):
            rows.append((len(steps), row))

    loop = looped(config, parts, loaders, recorder=Kept(), console=CtrlC(*at))
    progress = loop.checkpoints.load_newest() if config.resume else Progress()
    with StopSignals(ALONE, config.cooldown_on_interrupt is not None) as signals:
        loop = replace(loop, signals=signals)
        return loop.train(progress), parts, rows


def test_ctrl_c_cools_down_and_the_run_ends_within_an_epoch_with_a_test_and_a_checkpoint(tmp_path):
    progress, parts, rows = interrupted(tmp_path, "--cooldown-on-interrupt", "17", at=(25,))
    assert parts.autowu.should_stop
    assert parts.autowu.last_epoch == 26 + 17
    assert [steps for steps, _ in rows] == [10, 10, 10, 10, 3]
    assert progress.epochs == 5
    assert math.isfinite(rows[-1][1]["test_loss"])
    again, resumed, more = interrupted(tmp_path, "--cooldown-on-interrupt", "17", "--resume")
    assert (again.epochs, more) == (5, [])
    assert_same_weights(resumed.model, parts.model)


def test_a_run_of_minutes_ends_at_its_smallest_lr_in_whatever_epoch(tmp_path):
    progress, parts, rows = interrupted(tmp_path, "--max-time", "0.03")
    assert parts.autowu.should_stop
    assert parts.autowu.progress == 1.0
    assert progress.epochs == len(rows)
    assert 0.5 < progress.elapsed < 6
    assert parts.lr < 0.5 * parts.autowu.switch.lr


def test_a_run_may_end_where_its_loss_rests(tmp_path):
    config = configured(tmp_path, "--stop-at-plateau", "--epochs", "9")
    parts, _ = made(config)
    assert parts.autowu.config.cooldown == "auto"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-time", "0"), "--max-time 0.0: must be above 0"),
        (("--max-time", "nan"), "--max-time nan: must be above 0"),
        (("--cooldown-on-interrupt", "0"), "--cooldown-on-interrupt 0: must be at least 1"),
        (("--max-time", "5", "--sched", "cosine"), "--max-time: does not go with --sched cosine"),
        (("--stop-at-plateau", "--sched", "poly"), "--stop-at-plateau: does not go with --sched poly"),
        (
            ("--cooldown-on-interrupt", "9", "--cooldown-fraction", "0.1", "0.2"),
            "--cooldown-on-interrupt: does not go with several values of --cooldown-fraction",
        ),
    ],
)
def test_ends_that_cannot_be_are_named(tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        configured(tmp_path, *options)

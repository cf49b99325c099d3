"""Several cooldowns that branch off one run: each is the full run with its cooldown_fraction, bit for bit."""

import copy
import csv
import json
import os
import signal

import pytest
import torch
from PIL import Image
from processes import ranks
from sklearn.datasets import load_digits
from torch import nn

from autowu import AutoWU
from autowu.training import build, cooldowns, loop, models
from autowu.training.main import main

FRACTIONS = [0.13, 0.25, 0.4, 0.5]
EPOCHS, STEPS_PER_EPOCH = 8, 14  # 112 steps: cooldowns from steps 97, 84 (the end of an epoch), 67 and 56 (as well)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Digits:
    """A small model on the digits that can be copied in the middle of an epoch."""

    def __init__(self, cooldown_fraction, **arguments):
        torch.manual_seed(0)
        digits = load_digits()
        self.images, self.labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        arguments = {"immediate_cooldown": False, "cooldown_fraction": cooldown_fraction} | arguments
        self.scheduler = AutoWU(self.optimizer, STEPS_PER_EPOCH, EPOCHS, **arguments)

    def train(self, first=0, last=EPOCHS * STEPS_PER_EPOCH):
        """Train steps `first` to `last`, each on a batch that follows from its number; their LRs."""
        lrs = []
        for step in range(first, last):
            batch = torch.randint(len(self.labels), (128,), generator=torch.Generator().manual_seed(step))
            lrs.append(self.optimizer.param_groups[0]["lr"])
            loss = nn.functional.cross_entropy(self.model(self.images[batch]), self.labels[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step(loss)
        return lrs

    def fork(self, cooldown_fraction):
        states = (self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.fork_cooldown(cooldown_fraction))
        return copy.deepcopy(states[:2]) + states[2:]

    def load(self, states):
        for part, state in zip((self.model, self.optimizer, self.scheduler), states, strict=True):
            part.load_state_dict(state)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def plain(state):
    """A scheduler state that == can compare."""
    if isinstance(state, torch.Tensor):
        return [repr(value) for value in state.flatten().tolist()]  # the anchor of no losses is NaN, which equals nothing
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items() if k != "epoch_losses"}  # what is left of them no cooldown reads
    return state


@pytest.mark.parametrize(
    "arguments",
    [pytest.param({}, marks=pytest.mark.slow), {"decay_phase_factor": 0.8, "decay_phase_stat": "loss"}],
    ids=["constant", "plateau"],
)
def test_a_branch_is_the_full_run_with_its_fraction(arguments):
    trunk, forks, lrs = Digits(FRACTIONS[0], **arguments), {}, []
    early = 1 if arguments else 0
    for fraction in reversed(FRACTIONS[1:]):
        point = trunk.scheduler.cooldown_start(fraction) - early
        lrs += trunk.train(len(lrs), point)
        forks[fraction] = (point, trunk.fork(fraction))
    lrs += trunk.train(len(lrs))
    alone = Digits(FRACTIONS[0], **arguments)
    assert alone.train() == lrs
    assert_same(alone.model.state_dict(), trunk.model.state_dict())
    assert {point for point, _ in forks.values()} == {84 - early, 67 - early, 56 - early}
    for fraction, (point, states) in forks.items():
        full, branch = Digits(fraction, **arguments), Digits(0.9)
        full_lrs = full.train(0, point)
        assert plain(states[2]) == plain(full.scheduler.state_dict())
        branch.load(states)
        full_lrs += full.train(point)
        assert lrs[:point] + branch.train(point) == full_lrs
        assert_same(full.model.state_dict(), branch.model.state_dict())
        assert plain(branch.scheduler.state_dict()) == plain(full.scheduler.state_dict())


def test_a_fork_shares_nothing_with_the_run():
    run = Digits(0.2)
    run.train(0, 60)
    fork = run.scheduler.fork_cooldown(0.25)
    before = plain(fork)
    run.train(60)
    assert plain(fork) == before


@pytest.mark.parametrize(
    ("arguments", "steps", "fraction", "error", "said"),
    [
        ({}, 0, 1.0, ValueError, r"cooldown_fraction=1.0: must be above 0 and below 1"),
        ({}, 0, 0, ValueError, r"cooldown_fraction=0: must be above 0 and below 1"),
        ({}, 0, "0.5", TypeError, r"cooldown_fraction='0.5': must be a number"),
        ({"immediate_cooldown": True}, 0, 0.3, ValueError, r"cooldown_fraction=0.3: without effect .* immediate_cooldown=True"),
        ({}, 68, 0.4, ValueError, r"cooldown_fraction=0.4: must be forked off at step 67 or before, the run is at step 68"),
        ({}, 91, 0.1, ValueError, r"cooldown_fraction=0.1: must be forked off at step 90 or before"),  # its own began at 90
        ({}, 112, 0.1, ValueError, r"at step 112"),
        ({"decay_phase_factor": 0.8, "decay_phase_stat": "loss"}, 67, 0.4, ValueError, r"at step 66 or before"),
        (
            {"max_warmup_fraction": 0.5},
            0,
            0.6,
            ValueError,
            r"cooldown_fraction=0.6: the warm-up would end by step 45, not by step 56",
        ),
        (
            {"max_warmup_fraction": 0.9},
            0,
            0.1,
            ValueError,
            r"cooldown_fraction=0.1: the warm-up would end by step 100, not by step 90",
        ),
    ],
)
def test_a_fork_that_no_full_run_could_be_is_refused(arguments, steps, fraction, error, said):
    run = Digits(0.2, **arguments)
    run.train(0, steps)
    with pytest.raises(error, match=said):
        run.scheduler.fork_cooldown(fraction)


@pytest.mark.parametrize("fraction", [0, 1, float("nan")])
def test_a_start_of_no_cooldown_is_refused(fraction):
    with pytest.raises(ValueError, match="cooldown_fraction"):
        Digits(0.2).scheduler.cooldown_start(fraction)


# 6 epochs of 5 steps; the branches leave after steps 22, in an epoch, and 15, between two. Batch norm and dropout are in it.
OPTIONS = ["--batch-size", "256", "--epochs", "6", "--device", "cpu", "--opt", "sgd"]
SEVERAL = ["--cooldown-fraction", "0.5", "0.1", "0.25"]
FOLDERS = {0.1: ".", 0.25: "cooldown-0.25", 0.5: "cooldown-0.5"}


@pytest.fixture(autouse=True)
def _small_model(monkeypatch):
    """In the place of timm's: a model that draws in every step, so that the random states count."""

    def small(*arguments):
        parts = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * 36, 10)]
        return models.Model(nn.Sequential(*parts), 8, {})

    for module in (build, cooldowns):
        monkeypatch.setattr(module, "build_model", small)


class Steps:
    """The cooldown_fraction of every step that is trained, up to one step that is interrupted."""

    def __init__(self, monkeypatch):
        self.trained, self.stop_at, self.by_signal = [], None, False
        train_step, train = loop.train_step, loop.Loop.train

        def counted(*arguments):
            if self.stop_at == (self.fraction, self.trained.count(self.fraction)):
                if not self.by_signal:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGTERM)
            self.trained.append(self.fraction)
            return train_step(*arguments)

        def noted(run, progress):
            self.fraction = run.config.cooldown_fraction
            return train(run, progress)

        monkeypatch.setattr(loop, "train_step", counted)
        monkeypatch.setattr(loop.Loop, "train", noted)


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


def records(folder):
    """What a run of train.py leaves that a repetition must leave too."""
    epochs = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows(folder / "epochs.csv")]
    return rows(folder / "metrics.csv"), epochs


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_several_values_are_as_many_single_runs_and_go_on_when_interrupted(tmp_path, request, capsys, steps):
    command = [*OPTIONS, *SEVERAL, "--run-dir", str(tmp_path / "all")]
    assert main(command) == 0
    assert [steps.trained.count(f) for f in FOLDERS] == [30, 8, 15]
    said = capsys.readouterr().out
    request.getfixturevalue("blank_figures")  # those of the other runs are not looked at
    for fraction, name in FOLDERS.items():
        folder, single = tmp_path / "all" / name, tmp_path / str(fraction)
        assert main([*OPTIONS, "--cooldown-fraction", str(fraction), "--run-dir", str(single)]) == 0
        assert records(folder) == records(single)
        assert_same(weights(folder), weights(single))
        assert (folder / "figure.png").exists()
        assert json.loads((folder / "summary.json").read_text())["total_steps"] == 30
    branch = torch.load(tmp_path / "all" / "branch-0.25.pt", weights_only=True)
    assert (branch["epoch"], branch["step_in_epoch"]) == (4, 2)
    found = json.loads((tmp_path / "all" / "cooldowns.json").read_text())
    assert [run["cooldown_fraction"] for run in found["runs"]] == list(FOLDERS)
    assert [run["trained_steps"] for run in found["runs"]] == [30, 8, 15]
    assert found["trained_steps"] == 53
    best = max(found["runs"], key=lambda run: (run["test_accuracy"], -run["test_loss"]))
    assert found["best"] == best["cooldown_fraction"]
    assert f"best by validation: cooldown_fraction {found['best']}; 53 steps trained in all" in said
    with Image.open(tmp_path / "all" / "cooldowns.png") as image:
        assert image.width > 500

    # Interrupted in the trunk after branch-0.5.pt, in a branch without a checkpoint, in one with a checkpoint.
    command[-1] = str(tmp_path / "cut")
    resume = []
    for steps.stop_at in (0.1, 18), (0.25, 3), (0.5, 6):
        steps.trained.clear()
        assert main([*command, *resume]) == 130
        resume = ["--resume"]
    assert set(steps.trained) == {0.25, 0.5}
    steps.trained.clear()
    steps.stop_at = None
    assert main([*command, "--resume"]) == 0
    assert steps.trained == [0.5] * 10  # of its 15 steps one epoch of 5 was done
    for name in FOLDERS.values():
        assert records(tmp_path / "cut" / name) == records(tmp_path / "all" / name)
        assert_same(weights(tmp_path / "cut" / name), weights(tmp_path / "all" / name))
    assert json.loads((tmp_path / "cut" / "cooldowns.json").read_text()) == found
    steps.trained.clear()
    assert main([*command, "--resume"]) == 0
    assert steps.trained == []


@pytest.mark.slow  # a single run that is signalled is in test_train.py, branches that are interrupted above
@pytest.mark.usefixtures("blank_figures")
def test_a_signal_in_trunk_or_branch_costs_no_step(tmp_path, steps):
    command = [*OPTIONS, "--cooldown-fraction", "0.1", "0.5", "--run-dir"]
    assert main([*command, str(tmp_path / "all")]) == 0
    steps.trained.clear()
    steps.by_signal = True
    resume = []
    for steps.stop_at in (0.1, 18), (0.5, 3), (0.5, 6):  # the branch before its first epoch is done, and after
        assert main([*command, str(tmp_path / "cut"), *resume]) == 0
        resume = ["--resume"]
    steps.stop_at = None
    assert main([*command, str(tmp_path / "cut"), "--resume"]) == 0
    assert steps.trained == [0.1] * 30 + [0.5] * 15
    for name in (FOLDERS[0.1], FOLDERS[0.5]):
        assert records(tmp_path / "cut" / name) == records(tmp_path / "all" / name)
        assert_same(weights(tmp_path / "cut" / name), weights(tmp_path / "all" / name))


@pytest.mark.slow  # of one process this is held above, and that ranks agree in test_distributed.py
def test_two_processes_branch_as_one_run(tmp_path):
    # 4 epochs of 10 steps, with batch norm; the branch leaves after step 25.
    options = ["train.py", "--batch-size", "64", "--epochs", "4", "--img-size", "8", *OPTIONS[4:], "--cooldown-fraction", "0.37"]
    ranks(tmp_path, 2, *options, "0.1", "--run-dir", tmp_path / "all")
    ranks(tmp_path, 2, *options, "--run-dir", tmp_path / "single")
    assert records(tmp_path / "all" / "cooldown-0.37") == records(tmp_path / "single")
    assert_same(weights(tmp_path / "all" / "cooldown-0.37"), weights(tmp_path / "single"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["0.1", "1"], "--cooldown-fraction 1.0: must be above 0 and below 1"),
        (["0", "0.5"], "--cooldown-fraction 0.0: must be above 0 and below 1"),
        (["nan", "0.5"], "--cooldown-fraction nan: must be above 0 and below 1"),
        (["0.2", "0.5", "0.20"], "--cooldown-fraction 0.2: is there twice"),
        (["0.2", "0.8"], "--cooldown-fraction 0.8: cooldown_fraction=0.8: the warm-up would end by step"),
        (["0.2", "0.5", "--sched", "cosine"], "--cooldown-fraction: goes with AutoWU"),
        (["1.5"], "cooldown_fraction=1.5: must be above 0 and below 1"),
    ],
)
def test_values_that_cannot_be_are_said_in_one_line(tmp_path, capsys, options, said):
    assert main([*OPTIONS, "--run-dir", str(tmp_path / "run"), "--cooldown-fraction", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()

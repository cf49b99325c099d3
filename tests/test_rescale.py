"""A run that is taken up with another number of steps per epoch keeps its place in epochs, and ends where it should."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch

from autowu import AutoWU
from autowu.schema import check_state

KINDS = {
    "default": {},
    "immediate": {"immediate_cooldown": True, "cooldown_type": "cosine"},
    "by the epoch": {"test_interval": "epoch", "warmup_unit": "epoch"},
    "falls": {"stable_type": "inverse_sqrt", "max_warmup_steps": 130, "cooldown_fraction": 0.15},
    "decays": {"decay_phase_factor": 0.8, "cooldown_fraction": 0.3},
    "plateau": {"decay_phase_stat": "loss", "decay_phase_factor": 0.5, "cooldown_fraction": 0.3},
}
EPOCHS = 30


def made(steps_per_epoch, epochs=EPOCHS, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    return AutoWU(optimizer, steps_per_epoch, epochs, **({"min_lr": 1e-5, "max_lr": 1.0} | arguments))


def loss_at(epoch):
    """A valley with its lowest point after 5 epochs, and a fall from 8 on."""
    return 1 + abs(epoch / 5 - 1) + 0.02 * math.sin(50 * epoch) if epoch < 8 else 1.3 - epoch / 100 + 0.002 * math.sin(50 * epoch)


def advance(scheduler, epoch):
    """Up to the start of `epoch`; the LR of each step."""
    per_epoch, lrs = scheduler.config.steps_per_epoch, []
    while scheduler.last_epoch < round(epoch * per_epoch):
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(loss_at(scheduler.last_epoch / per_epoch))
    return lrs


def taken_up(scheduler, steps_per_epoch, epochs=EPOCHS, **arguments):
    again = made(steps_per_epoch, epochs, **arguments)
    again.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    check_state("state", again.state_dict())
    return again


TAKEN_UP_AT = (0, 3, 4.5, 12, 29)


@functools.cache
def whole_run(kind):
    """A run to its end, and copies of it at the epochs where it is taken up; nobody may change them."""
    scheduler, copies = made(20, watch=False, **KINDS[kind]), {}  # the valley rises whatever the LR
    for epoch in TAKEN_UP_AT:
        advance(scheduler, epoch)
        copies[epoch] = copy.deepcopy(scheduler)
    advance(scheduler, EPOCHS)
    return scheduler, copies


# Quick are all epochs of each kind in shorter ones that no longer divide, and two in the others.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("steps_per_epoch", "epoch"),
    [
        pytest.param(steps, epoch, marks=[] if steps == 7 or (steps, epoch) in ((10, 3), (40, 12)) else [pytest.mark.slow])
        for epoch in TAKEN_UP_AT
        for steps in (7, 10, 40)
    ],
)
def test_a_run_ends_where_it_should(epoch, steps_per_epoch, kind):
    ended, copies = whole_run(kind)
    whole = copies[epoch]
    again = taken_up(whole, steps_per_epoch)
    assert again.last_epoch == pytest.approx(epoch * steps_per_epoch, abs=0.5)
    assert (again.config.total_steps, again.config.steps_per_epoch) == (EPOCHS * steps_per_epoch, steps_per_epoch)
    assert again.config.cooldown_start == again.cooldown_start(again.config.cooldown_fraction)
    assert again.config.test_interval == max(1, round(whole.config.test_interval * steps_per_epoch / 20 + 1e-9))
    assert again.phase == whole.phase
    if again.config.warmup_unit == "step" or again.switch is not None:
        assert again.lr_at(again.last_epoch) == pytest.approx(whole.lr_at(whole.last_epoch), rel=0.1)
    advance(again, EPOCHS)
    whole = ended
    assert again.phase == "done"
    assert sorted(event.kind for event in again.events) == ["resume", "switch"]
    assert again.switch.step / steps_per_epoch == pytest.approx(whole.switch.step / 20, abs=1.5)
    assert again.switch.minimum / steps_per_epoch == pytest.approx(whole.switch.minimum / 20, abs=0.7)
    last = [run.lr_at(run.config.total_steps - 1) / run.switch.lr * run.config.steps_per_epoch for run in (again, whole)]
    if again.config.cooldown_type == "linear":
        assert last[0] == pytest.approx(last[1], rel=0.05)


@pytest.mark.parametrize("there", [40, 60, 100])
@pytest.mark.parametrize("epoch", [2, 12])
def test_there_and_back_is_the_run_as_it_was(there, epoch):
    whole = made(20)
    advance(whole, epoch)
    back = taken_up(taken_up(whole, there), 20)
    assert back.last_epoch == whole.last_epoch
    assert back.config == replace(whole.config, warmup_steps=back.config.warmup_steps, warmup_limit=back.config.warmup_limit)
    assert back.config.warmup_limit == pytest.approx(whole.config.warmup_limit, abs=1)
    assert back.switch is None or back.switch.step == pytest.approx(whole.switch.step, abs=2)


def test_equal_lengths_are_left_as_they_are():
    whole = made(20)
    advance(whole, 3)
    state = whole.state_dict()
    again = taken_up(whole, 20)
    assert again.config == whole.config
    assert again.events == whole.events
    assert torch.equal(again.state_dict()["judge"]["history"]["losses"], state["judge"]["history"]["losses"])


def test_a_longer_run_is_extended_in_the_new_steps():
    whole = made(20)
    advance(whole, 12)
    again = taken_up(whole, 10, 40)
    assert again.config.total_steps == 400
    assert again.config.cooldown_start == 160
    advance(again, 40)
    assert again.phase == "done"


def test_what_is_said(caplog):
    whole = made(20)
    advance(whole, 12)
    again = taken_up(whole, 10)
    assert again.events[-1].kind == "resume"
    said = "an epoch has 10 steps here and had 20 in the state: the run keeps its place in epochs, it goes on from step 120 of 300"
    assert said in caplog.text


def test_the_copy_and_the_switch_are_named_by_the_new_steps():
    whole = made(20)
    advance(whole, 3)
    held = whole._rooms.rollback.held
    again = taken_up(whole, 10)
    assert again._rooms.rollback.held == -(-held // 2)
    advance(again, 12)
    assert again.switch.step < 100


@pytest.mark.parametrize("of_state", [(None, None, 600), (20, 30, None)])
def test_steps_without_epochs_are_not_rescaled_but_warned_of(of_state):
    optimizer = made(20).optimizer
    whole = AutoWU(optimizer, of_state[0], of_state[1], total_steps=of_state[2])
    again = AutoWU(optimizer, total_steps=300) if of_state[0] else AutoWU(optimizer, 10, 30)
    again.load_state_dict(whole.state_dict())
    assert again.config == whole.config
    assert "as it was begun" in again.events[-1].message or "take up the run" in again.events[-1].message


@pytest.mark.parametrize("steps_per_epoch", [10, 40])
def test_losses_that_were_missing_or_not_finite_stay_what_they_are(steps_per_epoch):
    whole = made(20)
    for step in range(60):
        whole.optimizer.step()
        whole.step(math.nan if step in (20, 21) else None if step in (40, 41) else 2 - step / 60)
    history = taken_up(whole, steps_per_epoch).history
    assert history.steps == 3 * steps_per_epoch
    holes = 0 if steps_per_epoch == 10 else 60
    assert float(history.total()[1]) == history.steps - holes - (2 if steps_per_epoch == 10 else 4)


def test_a_history_in_bins_keeps_its_mean_and_its_spread():
    whole = made(400, gp="closed-form", max_warmup_fraction=0.9, cooldown_fraction=0.05, watch=False, patience=10**6)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for value in values.tolist():
        whole.optimizer.step()
        whole.step(value)
    for steps_per_epoch, spread in ((200, 0.5), (400, 1.0)):
        history = taken_up(whole, steps_per_epoch).history
        curve = history.curve(1000)
        number, mean = float(curve.counts.sum()), float(curve.sums.sum() / curve.counts.sum() + curve.anchor)
        assert number == pytest.approx(5000 * steps_per_epoch / 400)
        assert mean == pytest.approx(values.mean().item(), abs=0.02)
        assert float(curve.squares.sum() / number) < 1.2 * max(spread, 0.5)


def test_a_state_whose_losses_would_fill_the_memory_is_not_laid_out():
    whole = made(10)
    advance(whole, 5)
    again = taken_up(whole, 10**6)
    assert again.history.steps == 50
    assert "as it was begun" in again.events[-1].message

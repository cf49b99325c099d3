"""The stages alone, fed with losses: no scheduler, no torch LRs."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_judge import config_of
from torch import nn

from autowu.after_switch import AfterSwitch
from autowu.events import EventLog
from autowu.gp import ClosedFormGP
from autowu.held_out import HeldOut
from autowu.judge import Judge
from autowu.live import LiveRun
from autowu.phases import State, Switch
from autowu.ranks import Ranks
from autowu.reader import Reader
from autowu.rollback import NoRollback, Rollback
from autowu.stages import Rooms
from autowu.warm_up import WarmUp, stage_of


def rooms_of(config, model=None):
    ranks = Ranks()
    log = EventLog(ranks)
    rollback = NoRollback(LiveRun(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)), ranks, log)
    if model is not None:
        rollback = Rollback(LiveRun(torch.optim.SGD(model.parameters(), lr=0.1), model), ranks, log)
    return Rooms(ranks, log, Judge(config, ClosedFormGP(0.1), None, ranks, log), Reader(ranks), rollback, HeldOut(ranks))


def run(stage, losses, state=None, first=1):
    """The state and the stage after each loss."""
    state, passed = state or State(), []
    for step, loss in enumerate(losses, first):
        state, stage = stage.after_step(step, float(loss), state)
        passed.append((state, stage))
    return passed


def kinds(rooms):
    return [event.kind for event in rooms.log.events]


def valley(steps, lowest=60):
    return 1 + np.abs(np.arange(steps) / lowest - 1) + 0.01 * np.random.default_rng(0).normal(size=steps)


def test_a_warm_up_stays_itself_until_the_minimum_is_past():
    config = config_of()
    rooms = rooms_of(config)
    passed = run(WarmUp(config, rooms, 0.1), valley(120))
    switched_at = next(k for k, (state, _) in enumerate(passed, 1) if state.switch is not None)
    assert 60 < switched_at < 100
    assert all(type(stage) is WarmUp for _, stage in passed[: switched_at - 1])
    assert all(type(stage) is AfterSwitch for _, stage in passed[switched_at - 1 :])
    assert passed[-1][0].switch.by_test
    assert kinds(rooms)[0] == "switch"


def test_a_warm_up_without_a_valley_ends_at_its_limit():
    config = config_of()
    passed = run(WarmUp(config, rooms_of(config), 0.1), np.linspace(2, 1, 200))
    assert [state.switch is None for state, _ in passed] == [True] * 199 + [False]
    assert passed[-1][0].switch.step == 200
    assert not passed[-1][0].switch.by_test


@pytest.mark.parametrize("seed", range(3))
def test_a_warm_up_that_ends_while_a_spoilt_loss_falls_again_goes_back_to_where_it_was_best(seed):
    config = config_of()
    rooms, noise = rooms_of(config, nn.Linear(1, 1)), np.random.default_rng(seed).normal(size=200)
    falls, spoilt = np.geomspace(200, 7, 90) + noise[:90], 20 + 2 * noise[90:160]
    run(WarmUp(config, rooms, 0.1), [*falls, *spoilt, *np.linspace(20, 10, 40)])
    (switch,) = rooms.log.events
    assert rooms.judge.last.probability < 0.8
    assert re.search("limit.*back at step (8[4-9]|9.)$", switch.message)


@pytest.mark.parametrize("taken", [float, torch.tensor], ids=["host", "device"])
@pytest.mark.parametrize(("last", "goes_back"), [(9.0, False), (9.5, True)])
def test_whether_a_loss_has_come_back_by_the_limit_is_told_by_its_last_losses_too(last, goes_back, taken):
    config = config_of()
    rooms, noise = rooms_of(config, nn.Linear(1, 1)), np.random.default_rng(0).normal(size=200)
    falls, spoilt = np.geomspace(200, 7, 90) + noise[:90], 20 + 2 * noise[90:160]
    stage, state = WarmUp(config, rooms, 0.1), State()
    for step, loss in enumerate([*falls, *spoilt, *np.linspace(20, last, 40)], 1):
        state, stage = stage.after_step(step, taken(float(loss)), state)
    assert ("back at step" in rooms.log.events[-1].message) is goes_back


def test_a_warm_up_without_any_fit_goes_on_at_the_fallback():
    config = config_of(watch=False)
    passed = run(WarmUp(config, rooms_of(config), 0.025), [math.nan] * 200)
    assert passed[-1][0].switch == Switch(200, 0.025, None, None, by_test=False)


def test_an_explosion_ends_a_warm_up_at_its_third_loss():
    config = config_of()
    rooms = rooms_of(config)
    passed = run(WarmUp(config, rooms, 0.1), [*np.linspace(2, 1, 50), math.nan, math.nan, math.nan])
    assert [type(stage) for _, stage in passed[-2:]] == [WarmUp, AfterSwitch]
    assert [kind for kind in kinds(rooms) if kind != "loss"] == ["explosion", "switch"]


FALL = np.linspace(2, 1, 50)


@pytest.mark.parametrize(
    ("losses", "interval", "borne"),
    [
        pytest.param(FALL, 5, True, id="it fell"),
        pytest.param([*FALL, *np.linspace(1.1, 1.8, 8)], 40, False, id="it has risen since the last test"),
        pytest.param([*FALL, *[1.0, 1.01] * 30], 5, False, id="a test has seen no fall"),
    ],
)
def test_losses_that_are_not_finite_are_borne_only_where_the_loss_fell(losses, interval, borne):
    config = config_of(test_interval=interval, patience=1000)
    rooms = rooms_of(config, nn.Linear(2, 1))
    _, stage = run(WarmUp(config, rooms, 0.1), [*losses, *[math.nan] * 3])[-1]
    assert type(stage) is (WarmUp if borne else AfterSwitch)
    assert ("not_finite" in kinds(rooms)) == borne


@pytest.mark.parametrize(("loss", "ends"), [(math.nan, True), (1.0, False)])
def test_steps_skipped_for_good_end_a_warm_up_only_where_the_loss_is_gone(loss, ends):
    config = config_of()
    stage, state = WarmUp(config, rooms_of(config), 0.1), State()
    for step, fallen in enumerate(np.linspace(2, 1, 40), 1):
        state, stage = stage.after_step(step, float(fallen), state)
    for skipped in range(1, 81):
        state, stage = stage.after_skip(40, loss, state, skipped)
    assert (type(stage) is AfterSwitch) == ends
    assert (state.switch is not None) == ends


def after_switch(watched=True, **arguments):
    config = config_of(immediate_cooldown=False, cooldown_fraction=0.2, test_interval=5, **arguments)
    model = nn.Linear(2, 1)
    rooms = rooms_of(config, model)
    rooms.reader.begin(60, None)
    state = State(switch=Switch(60, 0.1, 0.99, 50.0, by_test=True), watched=watched)
    return config, rooms, stage_of(config, state, rooms, 0.1), state


@pytest.mark.parametrize(("loss", "setbacks"), [(math.nan, 10), (1.0, 0)])
def test_steps_skipped_after_the_switch_set_a_run_back_where_the_loss_is_gone(loss, setbacks):
    _, rooms, stage, state = after_switch()
    state, stage = run(stage, [*np.linspace(3, 1, 40)], state, first=61)[-1]
    for skipped in range(1, 1001):
        state, stage = stage.after_skip(100, loss, state, skipped)
    assert (state.setbacks, state.watched) == (setbacks, not setbacks)
    assert kinds(rooms) == ["divergence"] * setbacks
    assert [course.until for course in rooms.record.courses] == [100] * setbacks


def test_after_a_third_divergence_only_an_explosion_sets_a_run_back_and_after_ten_nothing_does():
    _, rooms, stage, state = after_switch()
    good = [1.0, 1.01, 0.99] * 10
    state, stage = run(stage, [*np.linspace(3, 1, 40), *good], state, first=61)[-1]
    assert state.setbacks == 0
    bad_from, step = 131, 130
    while state.setbacks < 3:
        step, before = step + 1, state.setbacks
        state, stage = stage.after_step(step, (5.0 if step >= bad_from else 1.0) + 1e-6 * step, state)
        if state.setbacks > before:
            bad_from = step + 6  # the copy is good, and comes apart again
    assert 131 < rooms.log.events[0].step <= 140
    assert (state.setbacks, state.watched) == (3, True)
    for number, size in enumerate([1e3, math.nan, 1e9, math.inf, 1e3, 1e5, math.nan], 4):
        # 8 losses as good as at the copy, then three that are none
        state, stage = run(stage, [1.0 + 1e-6 * k for k in range(8)] + [size, size * 1.1, size * 1.2], state, first=step + 1)[-1]
        step += 11
        assert (state.setbacks, state.watched) == (number, number < 10)
    assert kinds(rooms).count("divergence") == 10
    assert all("back at step" in event.message for event in rooms.log.events if event.kind == "divergence")
    assert rooms.rollback.held is None


def test_without_a_copy_the_third_divergence_ends_the_watch():
    _, rooms, stage, state = after_switch()
    rooms.rollback.give_up()
    good = [1.0, 1.01, 0.99] * 10
    for number in (1, 2, 3):
        state, stage = run(stage, [*good, math.nan, math.inf, math.nan], state, first=61 + 33 * number)[-1]
        assert (state.setbacks, state.watched) == (number, number < 3)
    assert rooms.log.events[-1].message.endswith("left alone")


def test_a_run_that_went_back_is_copied_again_after_forty_steps():
    _, rooms, stage, state = after_switch(total_steps=1000)
    good = [1.0, 1.01, 0.99]
    state, stage = run(stage, [*np.linspace(3, 1, 40), *good * 10, *[7.0] * 8], state, first=61)[-1]
    (event,), held = rooms.log.events, rooms.rollback.held
    for step in range(139, 300):
        state, stage = stage.after_step(step, good[step % 3], state)
        assert (rooms.rollback.held == held) == (step < 5 * math.ceil((event.step + 40) / 5))
        saved = stage.state_dict()
        stage = stage_of(stage.config, state, rooms, 0.1)
        stage.load_state_dict(saved)
        held = rooms.rollback.held if step >= event.step + 40 and step % 5 == 4 else held
        if step > event.step + 60:
            break


def test_copies_are_as_far_apart_as_tests_but_two_hundred_in_a_run_at_most():
    for total, apart in ((400, 5), (4000, 20)):
        _, rooms, stage, state = after_switch(total_steps=total)
        held = set()
        for step, loss in enumerate(np.geomspace(3, 1, 120), 61):
            state, stage = stage.after_step(step, float(loss), state)
            held.add(rooms.rollback.held)
        assert held - {None} == set(range(60 + apart, 181, apart)) - {60}


def test_a_loss_that_going_back_leaves_where_it_is_is_no_set_back():
    _, rooms, stage, state = after_switch()
    last, _ = run(stage, [*np.linspace(3, 1, 40), *[1.0, 1.01, 0.99] * 10, *[5.0, 5.01, 4.99] * 60], state, first=61)[-1]
    assert (last.setbacks, last.watched) == (0, True)
    assert kinds(rooms) == ["divergence", "loss_changed"]


def test_the_watch_ends_in_the_cooldown_at_half_the_peak_and_gives_the_copies_back():
    config, rooms, stage, state = after_switch()
    passed = run(stage, np.full(330, 1.0) + np.resize([0.01, -0.01], 330), state, first=61)
    watched = [state.watched for state, _ in passed]
    half = config.cooldown_start + (config.total_steps - config.cooldown_start) // 2
    ends = 61 + watched.index(False)
    assert half < ends <= half + 11
    assert rooms.rollback.held is None


@pytest.mark.parametrize("lost", [math.nan, 1e6])
def test_no_loss_sets_a_run_back_from_the_very_step_on_that_ends_the_watch(lost):
    _, rooms, stage, state = after_switch()
    for step in range(61, 1000):
        state, stage = stage.after_step(step, 1.0 + 0.01 * (-1) ** step, state)
        if not state.watched:
            break
    last, _ = run(stage, [lost] * 30, state, first=step + 1)[-1]
    assert last == state
    assert kinds(rooms) == []


def test_what_is_not_watched_keeps_its_losses_and_the_plateau_rule_goes_on():
    more = {"total_steps": None, "steps_per_epoch": 10, "total_epochs": 40, "decay_phase_stat": "loss", "decay_phase_factor": 0.5}
    _, _, stage, state = after_switch(watched=False, **more)
    last = run(stage, [1.0] * 200, state, first=61)[-1][0]
    assert stage.state_dict()["losses"]["steps"] == 200
    assert last.plateau_factor == 0.5**3  # 20 epochs: the best, then three times six without progress
    assert replace(last, plateau_factor=1.0, best_epoch_loss=math.inf, bad_epochs=0) == state


def test_a_stage_goes_on_from_its_state_in_the_middle_of_an_epoch():
    more = {"total_steps": None, "steps_per_epoch": 10, "total_epochs": 40, "decay_phase_stat": "loss", "decay_phase_factor": 0.5}
    _, _, stage, state = after_switch(**more)
    state = run(stage, [2.0] * 5, state, first=61)[-1][0]
    _, _, other, _ = after_switch(**more)
    other.load_state_dict(stage.state_dict())
    assert [run(which, [1.0] * 5, state, first=66)[-1][0].best_epoch_loss for which in (stage, other)] == [1.5, 1.5]

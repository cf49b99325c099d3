"""Runs whose end is open, and ends that are moved: which step runs at which LR, on a cut run as on a whole one."""

import copy
import io
import os
import re
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from autowu import AutoWU
from autowu.config import OPEN_WARMUP
from autowu.plotting import draw_run

LOWEST, WARMUP = 60, 120
NOISE = 0.02 * np.random.default_rng(0).normal(size=3000)


def scheduler_of(max_warmup_steps=WARMUP, **arguments):
    """Of one parameter, whose losses are made up."""
    arguments["max_warmup_steps"] = max_warmup_steps
    return AutoWU(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9), **arguments)


def loss_of(scheduler):
    """A valley in a warm-up, a level after it."""
    step = scheduler.last_epoch
    if scheduler.switch is None:
        position = step - scheduler.config.warmup_origin
        return 1 + abs(position / LOWEST - 1) + float(NOISE[step])
    return 1 + 0.1 * float(NOISE[step])


def train(scheduler, until, **step):
    """Train until step `until`; the LR of every step."""
    lrs = []
    while scheduler.last_epoch < until:
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(loss_of(scheduler), **step)
    return lrs


def resumed(scheduler, **arguments):
    """What goes on from a checkpoint in a file, in an object that was built with other arguments."""
    file = io.BytesIO()
    torch.save((scheduler.state_dict(), scheduler.optimizer.state_dict()), file)
    again = scheduler_of(**({"min_lr": 1e-3, "patience": 7} | arguments))
    state, optimizer = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again.load_state_dict(state)
    again.optimizer.load_state_dict(optimizer)
    return again


def assert_decays(lrs, peak):
    """From the peak, to the smallest LR in the last step, on a line."""
    assert lrs == pytest.approx([peak * (1 - k / len(lrs)) for k in range(len(lrs))], rel=1e-9)


def test_a_run_without_a_length_holds_the_lr_that_it_found_until_it_is_asked():
    scheduler = scheduler_of()
    lrs = train(scheduler, 200)
    assert scheduler.switch.by_test
    assert LOWEST < scheduler.switch.step < WARMUP
    assert set(lrs[scheduler.switch.step :]) == {scheduler.switch.lr}
    assert (scheduler.phase, scheduler.config.total_steps) == ("stable", None)
    assert scheduler.lr_at(10**9) == scheduler.switch.lr
    scheduler.start_cooldown(40)
    assert scheduler.phase == "stable"
    lrs += train(scheduler, 201)
    assert (scheduler.phase, scheduler.config.total_steps, scheduler.lr_at(201)) == ("cooldown", 241, scheduler.switch.lr)
    lrs += train(scheduler, 241)
    assert_decays(lrs[201:], scheduler.switch.lr)
    assert scheduler.phase == "done"
    assert train(scheduler, 260) == [lrs[-1]] * 19
    assert lrs[scheduler.switch.step :] == [scheduler.lr_at(step) for step in range(scheduler.switch.step, 241)]
    assert [event.kind for event in scheduler.events] == ["switch", "cooldown"]


def test_up_to_the_cooldown_it_is_the_run_with_a_length_whose_warmup_is_as_long():
    """And after it the run that had this length, and this cooldown, from the start."""
    scheduler = scheduler_of()
    lrs = train(scheduler, 300)
    scheduler.start_cooldown(fraction=0.3333)
    lrs += train(scheduler, 401)
    assert scheduler.phase == "done"
    planned = scheduler_of(total_steps=401, cooldown_fraction=100 / 401)
    assert train(planned, 401) == lrs
    assert planned.switch == scheduler.switch


@pytest.mark.parametrize(
    "arguments", [{}, {"total_steps": 400}, {"total_steps": 400, "immediate_cooldown": True}], ids=["open", "length", "immediate"]
)
@pytest.mark.parametrize("asked_at", [1, 20, 50, 120, 280])
def test_asked_in_any_phase_a_run_decays_from_where_it_is_and_ends(arguments, asked_at):
    scheduler = scheduler_of(**arguments)
    lrs = train(scheduler, asked_at)
    before = scheduler.phase
    scheduler.start_cooldown(50)
    lrs += train(scheduler, asked_at + 51)
    assert scheduler.phase == "done"
    assert all(a > b > 0 for a, b in pairwise(lrs[asked_at + 1 :]))
    reached = max(lrs[: asked_at + 1])
    assert lrs[asked_at + 1] <= (reached if before == "warmup" else lrs[asked_at])
    assert_decays(lrs[asked_at + 1 :], lrs[asked_at + 1])
    assert resumed(scheduler).phase == "done"


def test_a_cooldown_that_is_asked_for_again_and_again_ends_all_the_same_and_can_be_cut_short():
    scheduler = scheduler_of()
    train(scheduler, 140)
    lrs = []
    while scheduler.phase != "done":
        scheduler.start_cooldown(100)
        lrs += train(scheduler, scheduler.last_epoch + 1)
    assert scheduler.last_epoch == 241
    assert_decays(lrs[1:], scheduler.switch.lr)
    cut = scheduler_of()
    train(cut, 140)
    cut.start_cooldown(100)
    lrs = train(cut, 181)
    cut.start_cooldown(10)
    lrs += train(cut, 192)
    assert cut.phase == "done"
    assert lrs[42:] == pytest.approx([scheduler.switch.lr * 0.59 * (1 - k / 10) for k in range(10)])
    cut.start_cooldown(10)
    assert train(cut, 200) == [lrs[-1]] * 8
    assert [event.kind for event in cut.events] == ["switch", "cooldown", "cooldown"]


def test_a_run_with_a_length_ends_no_later_for_being_asked():
    scheduler = scheduler_of(total_steps=200, cooldown_fraction=0.1)
    train(scheduler, 170)
    scheduler.start_cooldown(500)
    lrs = train(scheduler, 200)
    assert scheduler.phase == "done"
    assert_decays(lrs[1:], scheduler.switch.lr)


CUTS = {"before the first step": 0, "in the warm-up": 23, "stable": 100, "asked": 140, "in the cooldown": 170, "done": 191}


@pytest.mark.parametrize(
    ("cut", "arguments"),
    [
        *((cut, {}) for cut in CUTS.values()),
        (CUTS["asked"], {"total_steps": 3000}),
        (CUTS["in the cooldown"], {"total_steps": 3000}),
    ],
    ids=[*CUTS, "asked, another length given", "in the cooldown, another length given"],
)
def test_a_cut_run_goes_on_to_the_bit(cut, arguments):
    def go(scheduler, until):
        lrs = train(scheduler, min(until, 140))
        if scheduler.last_epoch == 140:
            scheduler.start_cooldown(50)
        return lrs

    whole = scheduler_of()
    expected = go(whole, 140) + train(whole, 200)
    first = scheduler_of()
    lrs = go(first, cut) + train(first, cut)
    again = resumed(first, **arguments)
    lrs += go(again, 140) if again.last_epoch < 140 else []
    lrs += train(again, 200)
    assert lrs == expected
    assert again.switch == whole.switch
    assert [event.kind for event in again.events if event.kind != "resume"] == ["switch", "cooldown"]


def test_a_signal_handler_may_ask():
    scheduler = scheduler_of()
    train(scheduler, 140)
    before = signal.signal(signal.SIGUSR1, lambda *_: scheduler.start_cooldown(20))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    train(scheduler, 161)
    assert scheduler.phase == "done"


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({}, TypeError, r"steps=None, fraction=None: give one"),
        ({"steps": 5, "fraction": 0.1}, TypeError, r"steps=5, fraction=0.1: give one"),
        ({"steps": 0}, ValueError, r"steps=0: must be at least 1"),
        ({"steps": -3}, ValueError, r"steps=-3: must be at least 1"),
        ({"steps": 2.5}, TypeError, r"steps=2.5: must be an integer"),
        ({"steps": True}, TypeError, r"steps=True: must be an integer"),
        ({"fraction": 0}, ValueError, r"fraction=0: must be above 0"),
        ({"fraction": 1.5}, ValueError, r"fraction=1.5: must be above 0"),
        ({"fraction": float("nan")}, ValueError, r"fraction=nan: must be above 0"),
    ],
)
def test_a_cooldown_that_cannot_be_is_refused_at_once_and_changes_nothing(asked, error, said):
    scheduler = scheduler_of()
    with pytest.raises(error, match=said):
        scheduler.start_cooldown(**asked)
    train(scheduler, 2)
    assert scheduler.config.total_steps is None


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"immediate_cooldown": True}, ValueError, "immediate_cooldown=True.*give total_steps"),
        ({"steps_per_epoch": 10}, TypeError, "total_epochs=None: give both, or total_steps"),
        ({"test_interval": "epoch"}, ValueError, "test_interval='epoch': needs steps_per_epoch"),
        ({"decay_phase_factor": 0.5}, ValueError, "decay_phase_factor=0.5: act once an epoch"),
        ({"total_steps": 100, "max_warmup_steps": 100, "immediate_cooldown": True}, ValueError, "max_warmup_steps=100: leaves 100"),
    ],
)
def test_what_needs_a_length_says_so(arguments, error, said):
    with pytest.raises(error, match=said):
        scheduler_of(**arguments)


def test_the_warmup_has_the_steps_that_it_is_given_and_is_tested_some_sixty_times():
    for arguments, steps in (
        ({"max_warmup_steps": None}, OPEN_WARMUP),
        ({"max_warmup_steps": 120}, 120),
        ({"max_warmup_steps": 6000}, 6000),
    ):
        config = scheduler_of(**arguments).config
        assert (config.warmup_steps, config.warmup_limit) == (steps, steps)
        assert 50 <= steps / config.test_interval <= 70
    config = scheduler_of(total_steps=1000, max_warmup_steps=120).config
    assert (config.warmup_steps, config.warmup_limit, config.cooldown_start) == (120, 120, 400)


def test_a_warmup_without_a_minimum_ends_at_its_limit():
    scheduler = scheduler_of(max_warmup_steps=100)
    while scheduler.switch is None:
        scheduler.optimizer.step()
        scheduler.step(2.0 - scheduler.last_epoch / 100 + float(NOISE[scheduler.last_epoch]))
    assert (scheduler.switch.step, scheduler.switch.by_test) == (100, False)
    assert "at step 100: LR" in scheduler.events[0].message


def test_a_warmup_that_is_too_short_is_told_how_long_it_must_be(caplog):
    scheduler_of(max_warmup_steps=20)
    assert "a warm-up of 20 steps is too short" in caplog.text
    assert "pass max_warmup_steps=26 or more" in caplog.text
    caplog.clear()
    scheduler_of(max_warmup_steps=26)
    assert caplog.text == ""


def test_a_run_whose_end_is_open_is_copied_less_often_the_longer_it_gets():
    scheduler = scheduler_of()
    train(scheduler, 200)
    taken, renew = [], scheduler._rooms.rollback.renew
    scheduler._rooms.rollback.renew = lambda step, level: taken.append(step) or renew(step, level)
    train(scheduler, 240)
    assert taken == list(range(202, 241, 2))
    assert scheduler._stage._copies_every(10**6) == 5000


@pytest.mark.parametrize(
    ("saved", "given", "said"),
    [
        ({}, {}, None),
        ({}, {"total_steps": 2000}, r"no fixed end, that of the arguments given now ends at step 2000; scheduler.extend"),
        ({"total_steps": 2000}, {}, None),
    ],
)
def test_a_state_goes_on_with_its_own_end_and_says_where_another_was_expected(saved, given, said):
    scheduler = scheduler_of(**saved)
    train(scheduler, 20)
    again = resumed(scheduler, **given)
    assert again.config.total_steps == scheduler.config.total_steps
    told = [event.message for event in again.events if event.kind == "resume"]
    assert (told == []) if said is None else said.split(r";")[0] in told[0]


def test_where_nothing_is_known_of_the_lr_a_warmup_that_is_cut_goes_on_at_one_that_was_tried():
    scheduler = scheduler_of()
    tried = train(scheduler, 4)
    scheduler.start_cooldown(10)
    lrs = train(scheduler, 15)
    assert scheduler.switch.lr <= max(tried + lrs[:1]) < 2e-4  # the optimizer's own is 0.1


def test_a_cooldown_start_is_not_known_and_says_so():
    with pytest.raises(ValueError, match=r"cooldown_fraction=0.2: the end of this run is open"):
        scheduler_of().cooldown_start(0.2)


def test_it_is_shown_copied_and_drawn():
    scheduler = scheduler_of()
    assert "step=0, " in repr(scheduler)
    lrs = train(scheduler, 140)
    scheduler.start_cooldown(30)
    other = copy.deepcopy(scheduler)
    lrs += train(scheduler, 171)
    assert train(other, 171) == lrs[140:]
    assert "step=171/171" in repr(scheduler)
    assert draw_run([1.0] * len(lrs), lrs, scheduler).axes


def test_every_block_of_the_page_runs_to_its_end():
    page = (Path(__file__).parent.parent / "docs" / "horizon.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        names = {}
        exec(block, names)
        assert names["scheduler"].phase == "done"


# States of version 5, in which every run had its end, and what went on from there.
VERSION_5 = Path(__file__).parent / "data" / "states_version_5_with_a_length.pt"


@pytest.mark.parametrize("name", ["in the warm-up", "stable", "in the cooldown", "immediate"])
def test_a_run_with_a_length_that_was_saved_before_there_were_others_goes_on_as_it_did(name):
    case = torch.load(VERSION_5, weights_only=True)[name]
    assert case["scheduler"]["version"] == 5
    again = scheduler_of()
    again.load_state_dict(case["scheduler"])
    noise = 0.02 * np.random.default_rng(0).normal(size=200)
    lrs = []
    while again.last_epoch < 200:
        lrs.append(again.optimizer.param_groups[0]["lr"])
        again.optimizer.param_groups[0]["params"][0].grad = torch.full((2,), 0.01)
        again.optimizer.step()
        loss = 1 + abs(again.last_epoch / 40 - 1) + float(noise[again.last_epoch])
        again.step(loss if again.switch is None else 1 + 0.02 * loss / 10)
    assert lrs == pytest.approx(case["lrs"], rel=1e-9)
    assert [event.kind for event in again.events if event.kind != "resume"] == [k for k in case["events"] if k != "resume"]

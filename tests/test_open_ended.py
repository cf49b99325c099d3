"""Runs whose end is open, and ends that are moved: which step runs at which LR, on a cut run as on a whole one."""

import copy
import io
import os
import re
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from autowu import AutoWU
from autowu.config import OPEN_WARMUP
from autowu.phases import MAX_EXPLOSIONS
from autowu.plotting import draw_run

pytestmark = pytest.mark.usefixtures("no_ramps")

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


LENGTHS = {"open": {}, "length": {"total_steps": 400}, "immediate": {"total_steps": 400, "immediate_cooldown": True}}


@pytest.mark.parametrize(
    ("arguments", "asked_at"),
    [
        pytest.param(arguments, step, id=f"{name}-{step}", marks=[] if name == "open" or step in (20, 280) else [pytest.mark.slow])
        for name, arguments in LENGTHS.items()
        for step in (1, 20, 50, 120, 280)
    ],
)
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


# Going on later.


@pytest.mark.parametrize(
    ("arguments", "extended_at"),
    [
        *(({}, step) for step in (30, 100, 150, 200)),
        ({"immediate_cooldown": True}, 150),
        *(pytest.param({"immediate_cooldown": True}, step, marks=pytest.mark.slow) for step in (30, 100, 200)),
    ],
)
def test_an_extension_is_what_loading_the_state_into_a_longer_run_is(arguments, extended_at):
    scheduler = scheduler_of(total_steps=200, cooldown_fraction=0.4, **arguments)
    train(scheduler, extended_at)
    loaded = scheduler_of(total_steps=320, **arguments)
    loaded.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    scheduler.extend(total_steps=320)
    assert scheduler.optimizer.param_groups[0]["lr"] == loaded.optimizer.param_groups[0]["lr"]
    assert scheduler.config == loaded.config
    assert train(scheduler, 330) == train(loaded, 330)
    assert scheduler.phase == "done"
    assert sorted(event.kind for event in scheduler.events) == ["extended", "switch"]


def test_from_the_checkpoint_where_the_cooldown_began_a_run_goes_on_as_if_it_had_been_longer_from_the_start():
    longer, first = (scheduler_of(total_steps=steps, cooldown_fraction=0.4) for steps in (500, 250))
    lrs = train(first, 150)
    kept = resumed(first)
    train(first, 230)
    assert (kept.phase, first.phase) == ("cooldown", "cooldown")
    kept.extend(total_steps=500)
    assert lrs + train(kept, 510) == train(longer, 510)


def test_an_end_can_be_opened_and_an_open_one_given_a_step():
    scheduler = scheduler_of(total_steps=150, cooldown_fraction=0.4)
    train(scheduler, 120)
    assert scheduler.phase == "cooldown"
    scheduler.extend()
    assert (scheduler.phase, scheduler.progress) == ("stable", None)
    assert set(train(scheduler, 200)) == {scheduler.switch.lr}
    scheduler.extend(total_steps=240)  # 0.4 of it would have begun at 144
    assert (scheduler.phase, scheduler.config.cooldown_start) == ("cooldown", 200)
    assert_decays(train(scheduler, 240), scheduler.switch.lr)
    assert (scheduler.phase, scheduler.progress) == ("done", 1.0)


def test_a_cooldown_that_was_asked_for_keeps_its_share_of_a_run_that_is_extended():
    scheduler = scheduler_of()
    train(scheduler, 149)
    scheduler.start_cooldown(50)
    train(scheduler, 180)
    scheduler.extend(total_steps=400)
    assert (scheduler.phase, scheduler.config.cooldown_start) == ("stable", 300)
    assert_decays(train(resumed(scheduler), 400)[120:], scheduler.switch.lr)


def test_an_extension_in_the_warmup_leaves_it_alone_where_there_is_room():
    scheduler, other = scheduler_of(), scheduler_of()
    train(scheduler, 50)
    scheduler.extend(total_steps=1000)
    assert scheduler.config.warmup_limit == WARMUP
    train(other, 50)
    other.extend(total_steps=100)
    assert (other.config.warmup_limit, other.config.cooldown_start) == (51, 51)
    train(other, 100)
    assert other.phase == "done"
    assert resumed(other).phase == "done"


@pytest.mark.parametrize(
    ("arguments", "longer", "said"),
    [
        ({"total_steps": 100}, {"total_steps": 100}, "total_steps=100: must be more than 100 steps"),
        ({"total_steps": 100}, {"total_steps": 60}, "total_steps=60: must be more than 100 steps"),
        ({}, {"total_steps": 11}, "total_steps=11: must be more than 11 steps"),
        ({}, {"total_steps": 0}, "total_steps=0: must be at least 1"),
        ({}, {"total_epochs": 10}, "total_epochs=10: the run was given no epochs"),
        ({"steps_per_epoch": 10, "total_epochs": 10}, {"total_epochs": 10}, "total_epochs=10: must be more than 100 steps"),
        (
            {"steps_per_epoch": 10, "total_epochs": 10},
            {"total_epochs": 20, "total_steps": 9},
            "total_epochs=20, total_steps=9: give one",
        ),
        ({"total_steps": 100, "immediate_cooldown": True}, {}, "total_steps=None: a run with immediate_cooldown=True"),
    ],
)
def test_an_extension_that_is_none_is_refused_and_changes_nothing(arguments, longer, said):
    scheduler = scheduler_of(None, **arguments)
    train(scheduler, 10)
    before = scheduler.config
    with pytest.raises(ValueError, match=said):
        scheduler.extend(**longer)
    assert scheduler.config is before


# The search again.


@pytest.mark.parametrize("arguments", [{}, {"total_steps": 1000, "cooldown_fraction": 0.3}], ids=["open", "length"])
def test_a_warmup_that_is_begun_anew_finds_the_minimum_again_and_resumes_to_the_bit(arguments):
    scheduler = scheduler_of(**arguments)
    train(scheduler, 200)
    first = scheduler.switch
    scheduler.rewarm()
    assert (scheduler.phase, scheduler.switch) == ("warmup", None)
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(first.lr / 10)
    before = train(scheduler, 230)
    assert all(a < b for a, b in pairwise(before))
    again = resumed(scheduler)
    lrs = train(scheduler, 300)
    assert train(again, 300) == lrs
    assert again.switch == scheduler.switch
    # The losses are lowest 60 steps after the new beginning, whatever came before.
    assert scheduler.switch.by_test
    assert scheduler.switch.minimum == pytest.approx(260, abs=6)
    at_the_minimum = (before + lrs)[round(scheduler.switch.minimum) - 200]
    edge = (before + lrs)[round(scheduler.decision.edges[0] * scheduler.config.warmup_steps)]
    assert scheduler.switch.lr == pytest.approx(scheduler.config.peak_factor * edge, rel=0.05)
    assert at_the_minimum <= edge < 2 * at_the_minimum
    assert {scheduler.lr_at(step) for step in range(scheduler.switch.step, 700)} == {scheduler.switch.lr}
    assert [event.kind for event in scheduler.events] == ["switch", "rewarm", "switch"]
    assert draw_run([1.0] * 300, [0.1] * 300, scheduler).axes[0].lines[1].get_xdata()[0] == 200
    scheduler.start_cooldown(20)
    train(scheduler, 321)
    assert scheduler.phase == "done"


def test_the_pace_and_the_smoothness_in_decades_are_those_of_the_first_warmup():
    scheduler = scheduler_of()
    train(scheduler, 200)
    before, lengthscale = scheduler.config, scheduler.gp.lengthscale
    pace = scheduler.lr_at  # past its switch the axis is not shown
    scheduler.rewarm(0.5)
    config = scheduler.config
    assert config.warmup_steps * scheduler.gp.lengthscale == pytest.approx(before.warmup_steps * lengthscale)
    assert pace(201) / pace(200) == pytest.approx((before.max_lr / before.min_lr) ** (0.8 / before.warmup_steps), rel=0.01)
    assert config.test_interval == before.test_interval


def test_where_no_loss_comes_the_lr_before_is_taken_again():
    scheduler = scheduler_of(total_steps=400)
    train(scheduler, 130)
    before = scheduler.switch.lr
    scheduler.rewarm()
    while scheduler.switch is None:
        scheduler.optimizer.step()
        scheduler.step()
    assert (scheduler.switch.step, scheduler.switch.lr) == (160, before)


@pytest.mark.parametrize(
    ("step", "fraction", "said"),
    [
        (10, 0.1, "fraction=0.1: .* in 'warmup'; its search is still going on"),
        (190, 0.1, "fraction=0.1: .* in 'cooldown'; make it longer first"),
        (200, 0.1, "fraction=0.1: .* in 'done'; make it longer first"),
        (100, 1, "fraction=1: must be above 0 and below 1"),
        (100, 0, "fraction=0: must be above 0 and below 1"),
        (100, float("nan"), "fraction=nan: must be above 0 and below 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused_and_changes_nothing(step, fraction, said):
    scheduler = scheduler_of(total_steps=200, cooldown_fraction=0.2)
    train(scheduler, step)
    before = scheduler.config, scheduler._state
    with pytest.raises(ValueError, match=said):
        scheduler.rewarm(fraction)
    assert (scheduler.config, scheduler._state) == before


@pytest.mark.parametrize("how", [{"steps": 40}, {"cooldown_fraction": 0.2}], ids=["steps", "share of the branch"])
def test_an_open_run_has_branches_that_cool_down_while_it_goes_on(how):
    trunk = scheduler_of()
    train(trunk, 160)
    branch = scheduler_of(None, total_steps=5000)
    branch.load_state_dict(trunk.fork_cooldown(**how))
    assert_decays(train(branch, 200), trunk.switch.lr)
    assert branch.should_stop
    assert set(train(trunk, 220)) == {trunk.switch.lr}
    trunk.rewarm()
    train(trunk, 400)
    again = scheduler_of()
    again.load_state_dict(trunk.fork_cooldown(steps=10))
    assert_decays(train(again, 410), trunk.switch.lr)


def test_a_run_with_a_length_has_branches_of_any_number_of_steps():
    trunk = scheduler_of(total_steps=400)
    train(trunk, 140)
    branch = scheduler_of()
    branch.load_state_dict(trunk.fork_cooldown(steps=20))
    assert_decays(train(branch, 160), trunk.switch.lr)
    assert trunk.phase == "stable"


@pytest.mark.parametrize(
    ("step", "how", "error", "said"),
    [
        (
            10,
            {"steps": 5},
            ValueError,
            "steps=5: a branch cools down from the stable phase or the cooldown, the run is in 'warmup'",
        ),
        (10, {"cooldown_fraction": 0.5}, ValueError, "the run is in 'warmup'"),
        (100, {}, TypeError, "cooldown_fraction=None, steps=None: give one"),
        (100, {"cooldown_fraction": 0.5, "steps": 5}, TypeError, "cooldown_fraction=0.5, steps=5: give one"),
        (100, {"steps": 0}, ValueError, "steps=0: must be at least 1"),
        (100, {"cooldown_fraction": 1.0}, ValueError, "cooldown_fraction=1.0: must be above 0 and below 1"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(step, how, error, said):
    trunk = scheduler_of()
    train(trunk, step)
    with pytest.raises(error, match=said):
        trunk.fork_cooldown(**how)


def test_a_loop_asks_whether_to_stop():
    scheduler, steps = scheduler_of(total_steps=100), 0
    seen = []
    while not scheduler.should_stop:
        seen.append(scheduler.progress)
        steps += 1
        train(scheduler, steps)
    assert seen == [step / 100 for step in range(100)]


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


@pytest.mark.parametrize("by_state", [False, True])
def test_a_run_that_is_made_longer_late_in_its_cooldown_is_watched_again(by_state):
    scheduler = scheduler_of(total_steps=600)
    train(scheduler, 590)
    assert not scheduler._state.watched
    short = resumed(scheduler)
    assert not short._state.watched
    if by_state:
        longer = scheduler_of(total_steps=6000)
        longer.load_state_dict(scheduler.state_dict())
    else:
        longer = scheduler
        longer.extend(total_steps=6000)
    assert longer.phase == "stable"
    train(longer, 700)
    for _ in range(4):
        longer.optimizer.step()
        longer.step(float("nan"))
    assert longer._state.setbacks == 1
    assert longer.events[-1].kind == "divergence"


def test_what_ended_the_watch_for_good_is_not_undone_by_a_longer_run():
    scheduler = scheduler_of(total_steps=600)
    train(scheduler, 590)
    scheduler._state = replace(scheduler._state, setbacks=MAX_EXPLOSIONS)
    scheduler.extend(total_steps=6000)
    assert not scheduler._state.watched
    unwatched = scheduler_of(total_steps=600, watch=False)
    train(unwatched, 590)
    unwatched.extend(total_steps=6000)
    assert not unwatched._state.watched


def test_what_several_ranks_said_last_is_heard_where_one_goes_on():
    scheduler = scheduler_of()
    train(scheduler, 200)
    state = scheduler.state_dict()
    state["horizon"]["pending"] = [2.0, 100.0, 0.0]  # both asked for fifty steps
    alone = scheduler_of()
    alone.load_state_dict(state)
    train(alone, 201)
    assert alone.config.total_steps == 251
    assert alone.phase == "cooldown"
    train(alone, 202)
    assert alone.config.total_steps == 251


@pytest.mark.parametrize(("total", "told_at"), [(60, 161), (1200, 1321)])
def test_steps_past_the_end_are_told_of_once_they_are_many(total, told_at):
    scheduler = scheduler_of(max_warmup_steps=None, total_steps=total)
    lrs = train(scheduler, told_at - 1)
    assert "end" not in [event.kind for event in scheduler.events]
    train(scheduler, told_at + 200)
    (event,) = (event for event in scheduler.events if event.kind == "end")
    assert event.step == told_at
    assert f"over since step {total}: the LR stays at {lrs[-1]:.4g}; scheduler.extend" in event.message
    scheduler.extend(total_steps=2 * total + 1000)
    assert scheduler.phase != "done"


def test_so_are_those_past_the_end_of_a_run_whose_end_was_open():
    scheduler = scheduler_of()
    train(scheduler, 200)
    scheduler.start_cooldown(40)
    train(scheduler, 400)
    (event,) = (event for event in scheduler.events if event.kind == "end")
    assert event.step == scheduler.config.total_steps + 101

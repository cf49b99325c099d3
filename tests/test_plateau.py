"""A cooldown that begins by itself: when the loss has stopped improving, on all ranks alike, and exact on resume."""

import functools
import math

import numpy as np
import pytest
import torch
from test_open_ended import assert_decays, resumed, scheduler_of

from autowu.plateau import FEWEST, Plateau
from autowu.ranks import Ranks

pytestmark = pytest.mark.usefixtures("no_ramps")

NOISE = np.random.default_rng(1).normal(size=6000)


def loss_at(scheduler, floor=1.0, noise=0.05, rate=0.03, scale=1.0, offset=0.0):
    """A valley in the warm-up; after it an exponential fall to a floor, or an endless one, at any scale."""
    step, switch = scheduler.last_epoch, scheduler.switch
    value = 1.5 + 2 * abs((step - scheduler.config.warmup_origin) / 60 - 1) if switch is None else floor
    if switch is not None:
        since = step - switch.step
        value += 0.5 * math.exp(-rate * since) if rate else 1 - 0.25 * math.log1p(since / 100)
    return offset + scale * (value + noise * float(NOISE[step]))


def train(scheduler, until=3000, counts=None, **shape):
    """Train to the end, or to step `until`; the LR of every step."""
    lrs = []
    while not scheduler.should_stop and scheduler.last_epoch < until:
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(loss_at(scheduler, **shape), **(counts or {}))
    return lrs


def test_an_open_run_whose_loss_rests_cools_down_over_its_share_and_ends():
    scheduler = scheduler_of(cooldown="auto", cooldown_fraction=0.25)
    lrs = train(scheduler)
    config = scheduler.config
    assert scheduler.switch.step + FEWEST < config.cooldown_start < 700
    assert config.total_steps == len(lrs) == round(config.cooldown_start / 0.75)
    assert_decays(lrs[config.cooldown_start :], scheduler.switch.lr)
    assert [event.kind for event in scheduler.events] == ["switch", "cooldown"]
    assert scheduler.events[1].message.endswith("the loss has stopped improving")


@pytest.mark.parametrize("noise", [*(pytest.param(noise, marks=pytest.mark.slow) for noise in (0.003, 0.05)), 0.5])
def test_a_loss_that_goes_on_falling_is_let_fall(noise):
    scheduler = scheduler_of(cooldown="auto")
    train(scheduler, 2500, noise=noise, rate=0)
    assert scheduler.phase == "stable"


@pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (1e4, 0.0), (1.0, 1000.0), (1.0, -3.0)])
def test_neither_scale_nor_offset_of_the_loss_matters(scale, offset):
    assert cooldown_start_of(scale, offset) == cooldown_start_of(1.0, 0.0)


@functools.cache
def cooldown_start_of(scale, offset):
    scheduler = scheduler_of(cooldown="auto")
    while scheduler.phase != "cooldown":
        train(scheduler, scheduler.last_epoch + 1, scale=scale, offset=offset)
    return scheduler.config.cooldown_start


def test_more_noise_takes_more_steps():
    starts = []
    for noise in (0.01, 0.1, 0.3):
        scheduler = scheduler_of(cooldown="auto")
        train(scheduler, noise=noise)
        starts.append(scheduler.config.cooldown_start)
    assert starts[0] < starts[1] < starts[2]


ASKED = {"open": {}, "length": {"total_steps": 2000}, "tokens": {"total_tokens": 2000 * 7}}
COUNTS = {"tokens": 7}


@functools.cache
def cut_runs(asked):
    """A run to its end and its LRs, and by the place of a cut the LRs up to it and the run that was resumed there."""
    whole, first = (scheduler_of(cooldown="auto", cooldown_fraction=0.3, **ASKED[asked]) for _ in range(2))
    expected = train(whole, counts=COUNTS)
    begun = next(event.step for event in whole.events if event.kind == "cooldown")
    lrs, cuts = [], {}
    for cut, until in {1: 1, 30: 30, 150: 150, "settled": begun - 1, "cooling": begun + 20}.items():
        lrs += train(first, until, COUNTS)
        assert first._state.settled == (until >= begun - 1)
        cuts[cut] = list(lrs), resumed(first, total_steps=9000)
    return whole, expected, cuts


@pytest.mark.parametrize(
    ("asked", "cut"),
    [
        pytest.param(asked, cut, marks=[] if asked == "tokens" or cut == "settled" else [pytest.mark.slow])
        for asked in ASKED
        for cut in (1, 30, 150, "settled", "cooling")
    ],
)
def test_a_cut_run_goes_on_to_the_bit(asked, cut):
    whole, expected, cuts = cut_runs(asked)
    lrs, again = cuts[cut]
    lrs = lrs + train(again, counts=COUNTS)
    assert lrs == expected
    assert len(lrs) < 1500
    assert again.config == whole.config


def test_with_a_budget_less_of_it_is_used_and_with_a_length_fewer_steps():
    scheduler = scheduler_of(cooldown="auto", cooldown_fraction=0.3, total_samples=64 * 2000)
    lrs = train(scheduler, counts={"samples": 64})
    begun = scheduler.events[-1].step
    assert len(lrs) == pytest.approx(begun / 0.7, abs=2)
    assert scheduler.progress == 1.0
    assert lrs[-1] < 0.01 * scheduler.switch.lr
    late = scheduler_of(cooldown="auto", total_steps=260)  # whose cooldown comes before the loss has come to rest
    assert len(train(late)) == 260
    assert late.config.cooldown_start == 104


def test_after_an_extension_the_loss_is_looked_at_anew():
    scheduler = scheduler_of(cooldown="auto", cooldown_fraction=0.3)
    while scheduler.phase != "cooldown":
        train(scheduler, scheduler.last_epoch + 1)
    train(scheduler, scheduler.last_epoch + 10)
    scheduler.extend()
    assert scheduler.phase == "stable"
    train(scheduler, scheduler.last_epoch + FEWEST - 1)
    assert scheduler.phase == "stable"
    train(scheduler)
    assert scheduler.should_stop
    assert [event.kind for event in scheduler.events] == ["switch", "cooldown", "extended", "cooldown"]


def test_after_a_new_search_it_counts_from_the_begin_of_the_run_and_is_looked_for_anew():
    scheduler = scheduler_of(cooldown="auto", cooldown_fraction=0.3)
    train(scheduler, 130)
    start = scheduler._state.start_loss
    scheduler.rewarm()
    train(scheduler)
    assert scheduler.should_stop
    assert scheduler._state.start_loss == start == pytest.approx(3.4, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cooldown": "auto", "total_steps": 100, "immediate_cooldown": True}, "cooldown='auto': .*immediate_cooldown=True"),
        (
            {"cooldown": "auto", "steps_per_epoch": 10, "total_epochs": 9, "decay_phase_stat": "loss", "decay_phase_factor": 0.5},
            "cooldown='auto', decay_phase_stat='loss': both wait",
        ),
        ({"cooldown": "plateau"}, "cooldown='plateau': must be one of"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        scheduler_of(None, **arguments)


def test_losses_that_do_not_come_or_never_vary_are_no_evidence():
    for loss in (None, 1.0, math.nan):
        scheduler = scheduler_of(cooldown="auto", max_warmup_steps=30)
        for _ in range(400):
            scheduler.optimizer.step()
            scheduler.step(loss)
        assert scheduler.phase == "stable"


def test_a_constant_phase_of_any_length_is_looked_at_some_thirty_times_as_it_doubles():
    plateau, due = Plateau(Ranks(), 0.1), []
    for step in range(1, 4001):
        plateau.append(1.0)
        due += [step] if plateau.is_due(0) else []
    assert due[0] == FEWEST
    assert all(16 <= sum(n < step <= 2 * n for step in due) <= 32 for n in (100, 500, 1000, 2000))


def test_a_state_that_knows_nothing_of_it_loads_as_before():
    scheduler = scheduler_of()
    train(scheduler, 200)
    state = scheduler.state_dict()
    del state["config"]["cooldown"]
    for name in ("start_loss", "settled", "batch", "batch_factor"):
        del state["state"][name]
    again = scheduler_of()
    again.load_state_dict(state)
    assert again.config == scheduler.config
    assert again._state == scheduler._state
    assert torch.equal(torch.tensor(train(again, 220)), torch.tensor(train(scheduler, 220)))


def test_a_run_whose_losses_stop_coming_goes_on():
    scheduler = scheduler_of(cooldown="auto")
    train(scheduler, scheduler.config.warmup_limit + 90)
    assert scheduler.phase == "stable"
    for _ in range(6 * FEWEST):
        scheduler.optimizer.step()
        scheduler.step()
    assert scheduler.phase == "stable"
    train(scheduler)  # and they come again
    assert scheduler.events[-1].kind == "cooldown"

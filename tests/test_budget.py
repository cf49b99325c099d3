"""Runs with a budget of samples, tokens or seconds: they end where it is used, at their smallest LR, whatever the pace."""

import copy
import functools
import time
from itertools import pairwise

import pytest
from test_open_ended import loss_of, resumed, scheduler_of, train

from autowu import budget
from autowu.budget import MEASURED
from autowu.config import UNMEASURED
from autowu.report import Report

pytestmark = pytest.mark.usefixtures("no_ramps")

WARMUP = 60


class Clock:
    """A clock that goes on when a step is taken."""

    def __init__(self, monkeypatch):
        self.now = 5000.0
        monkeypatch.setattr(budget, "monotonic", lambda: self.now)

    def train(self, scheduler, pace, until=10**6):
        """Train to step `until` or the end; `pace` gives the seconds of a step. The LR of every step."""
        lrs = []
        while not scheduler.should_stop and scheduler.last_epoch < until:
            self.now += pace(scheduler.last_epoch)
            lrs += train(scheduler, scheduler.last_epoch + 1)
        return lrs


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def to_the_end(scheduler, name, count, until=10**6):
    """Train to the end, or to step `until`; `count` gives what a step takes. The LR of every step, and what was taken."""
    lrs, taken = [], 0
    while not scheduler.should_stop and scheduler.last_epoch < until:
        one = count(scheduler.last_epoch)
        lrs += train(scheduler, scheduler.last_epoch + 1, **{name: one})
        taken += one
    return lrs, taken


def assert_falls_to_the_last(scheduler, lrs):
    peak = scheduler.switch.lr
    cooldown = lrs[lrs.index(peak, scheduler.switch.step) :]
    cooldown = cooldown[cooldown.count(peak) - 1 :]
    assert all(a > b > 0 for a, b in pairwise(cooldown))
    assert lrs[-1] < 0.1 * peak
    assert train(scheduler, scheduler.last_epoch + 2, samples=1, tokens=1) == [lrs[-1]] * 2


@pytest.mark.parametrize("name", ["samples", "tokens"])
def test_where_all_steps_take_the_same_a_budget_is_a_number_of_steps(name):
    scheduler = scheduler_of(None, **{f"total_{name}": 64 * 500})
    assert (scheduler.config.total_steps, scheduler.progress) == (None, 0)
    lrs, taken = to_the_end(scheduler, name, lambda step: 64)
    assert (len(lrs), taken, scheduler.progress) == (500, 64 * 500, 1.0)
    assert set(lrs[:MEASURED]) == {scheduler.config.min_lr}
    steps = scheduler_of(None, total_steps=500).config
    for field in ("warmup_steps", "warmup_limit", "test_interval", "peak_factor"):
        assert getattr(scheduler.config, field) == getattr(steps, field)
    assert scheduler.config.cooldown_start == steps.cooldown_start == 200
    peak = scheduler.switch.lr
    assert lrs[200:] == pytest.approx([peak * (1 - k / 300) for k in range(300)])
    assert_falls_to_the_last(scheduler, lrs)


@pytest.mark.parametrize(
    "count",
    [lambda step: 10 + step // 10, lambda step: (0, 7, 90)[step % 3], lambda step: 30 if step < 250 else 90],
    ids=["ramp", "uneven", "thrice"],
)
def test_a_budget_is_met_though_steps_take_more_and_less(count):
    scheduler = scheduler_of(WARMUP, total_tokens=12_000)
    lrs, taken = to_the_end(scheduler, "tokens", count)
    assert abs(taken - 12_000) <= 90
    peak = scheduler.switch.lr
    assert all(a >= b for a, b in pairwise(lrs[scheduler.switch.step :]))
    assert lrs[-1] == min(lrs[scheduler.switch.step :]) < 0.05 * peak


PACES = {
    "steady": lambda step: 1.0,
    "thrice as slow in the warm-up": lambda step: 0.5 if step < 40 else 1.5,
    "thrice as slow when stable": lambda step: 0.5 if step < 150 else 1.5,
    "thrice as slow in the cooldown": lambda step: 0.5 if step < 500 else 1.5,
    "thrice as slow near the end": lambda step: 0.5 if step < 950 else 1.5,
    "thrice as fast in the cooldown": lambda step: 1.5 if step < 200 else 0.5,
    "thrice as fast near the end": lambda step: 1.5 if step < 325 else 0.5,
    "now and then an evaluation": lambda step: 4.0 if step % 50 == 49 else 0.8,
}


QUICK_PACES = (
    "thrice as slow in the warm-up",
    "thrice as slow near the end",
    "thrice as fast near the end",
    "now and then an evaluation",
)


@pytest.mark.parametrize(
    "pace", [pytest.param(p, id=name, marks=[] if name in QUICK_PACES else [pytest.mark.slow]) for name, p in PACES.items()]
)
def test_a_deadline_is_met_within_a_hundredth_whatever_the_pace_becomes(pace, clock):
    scheduler = scheduler_of(WARMUP, total_seconds=500.0)
    began = clock.now + pace(0)
    lrs = clock.train(scheduler, pace)
    assert 495 <= clock.now - began <= 501.5
    assert scheduler.phase == "done"
    assert_falls_to_the_last(scheduler, lrs)


def test_a_real_clock():
    scheduler = scheduler_of(WARMUP, total_seconds=1.0)
    train(scheduler, 1)
    began = last = time.monotonic()
    longest = 0.0
    while not scheduler.should_stop:
        time.sleep(0.002)
        train(scheduler, scheduler.last_epoch + 1)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    assert 0.98 - longest <= last - began <= 1.0 + longest
    assert (
        scheduler.optimizer.param_groups[0]["lr"] <= scheduler.switch.lr * 2 * longest / 0.6
    )  # by what was left for the last step


def test_pauses_and_the_time_between_two_processes_do_not_count(clock):
    scheduler = scheduler_of(WARMUP, total_seconds=300.0)
    clock.train(scheduler, lambda step: 1.0, 100)
    clock.now += 0.25
    with scheduler.paused():
        clock.now += 10_000
    clock.train(scheduler, lambda step: 0.75 if step == 100 else 1.0, 150)
    assert scheduler.progress == pytest.approx(149 / 300)
    again = resumed(scheduler)
    clock.now += 77_777
    lr = again.optimizer.param_groups[0]["lr"]
    lrs = clock.train(again, lambda step: 1.0)
    assert lrs[0] == lr
    assert again.last_epoch == 302  # the first step of each process is not counted
    copied = copy.deepcopy(scheduler)
    clock.now += 10**6
    clock.train(copied, lambda step: 1.0)
    assert copied.last_epoch == 302


CUTS = {"unmeasured": 5, "measured": 10, "in the warm-up": 60, "stable": 190, "in the cooldown": 300, "over": 500}


OTHERS = {"open": {}, "length": {"total_steps": 9000}}


def samples(step):
    return 31 + step % 3


@functools.cache
def cut_runs():
    """A run to its end and its LRs, and by cut the LRs up to it and the runs resumed there, by their own arguments."""
    arguments = {"total_samples": 32 * 500, "peak_factor": 0.7, "max_warmup_fraction": 0.25}
    whole, first = scheduler_of(None, **arguments), scheduler_of(None, **arguments)
    expected, _ = to_the_end(whole, "samples", samples)
    lrs, cuts = [], {}
    for cut in CUTS.values():
        lrs += to_the_end(first, "samples", samples, cut)[0]
        again = {name: resumed(first, max_warmup_steps=None, **other) for name, other in OTHERS.items()}
        cuts[cut] = list(lrs), again
    return whole, expected, cuts


@pytest.mark.parametrize(
    ("other", "cut"),
    [
        pytest.param(other, cut, id=f"{other}-{name}", marks=[] if other == "open" or name == "stable" else [pytest.mark.slow])
        for other in OTHERS
        for name, cut in CUTS.items()
    ],
)
def test_a_cut_run_goes_on_to_the_bit(cut, other):
    whole, expected, cuts = cut_runs()
    lrs, again = cuts[cut][0], cuts[cut][1][other]
    lrs = lrs + to_the_end(again, "samples", samples)[0]
    assert lrs == expected
    assert again.config == whole.config
    assert again.switch == whole.switch


def test_what_the_clock_decided_is_in_the_state(clock):
    scheduler = scheduler_of(WARMUP, total_seconds=300.0)
    clock.train(scheduler, lambda step: 1.0, 250)
    again = resumed(scheduler)
    clock.now += 10**6
    assert again.phase == "cooldown"
    assert [again.lr_at(step) for step in range(240, 320)] == [scheduler.lr_at(step) for step in range(240, 320)]


@pytest.mark.parametrize("longer", [{}, {"total_steps": 300}], ids=["open", "steps"])
@pytest.mark.parametrize("at", [0, 5, 50])
def test_a_budget_may_be_given_up_at_any_time(longer, at):
    scheduler = scheduler_of(None, total_tokens=1500)
    to_the_end(scheduler, "tokens", lambda step: 5, at)
    scheduler.extend(**longer)
    train(scheduler, at + 30)
    assert scheduler.optimizer.param_groups[0]["lr"] > 1.5 * scheduler.config.min_lr
    again = resumed(scheduler)
    again.start_cooldown(10)
    train(again, at + 41)
    assert again.should_stop


@pytest.mark.parametrize("count", [1, 64, 640, 10**6])
def test_a_budget_of_a_few_steps_is_survived(count):
    scheduler = scheduler_of(None, total_samples=640)
    lrs, _ = to_the_end(scheduler, "samples", lambda step: count)
    assert len(lrs) <= 640 / count + 2
    assert 0 < scheduler.optimizer.param_groups[0]["lr"] <= 0.1
    assert resumed(scheduler).phase == "done"


def test_a_budget_can_be_made_larger_before_and_in_the_cooldown_and_after_the_end():
    scheduler = scheduler_of(WARMUP, total_tokens=1000, cooldown_fraction=0.5)
    to_the_end(scheduler, "tokens", lambda step: 5, 120)
    assert scheduler.phase == "cooldown"
    scheduler.extend(total_tokens=1500)
    assert (scheduler.phase, scheduler.optimizer.param_groups[0]["lr"]) == ("stable", scheduler.switch.lr)
    to_the_end(scheduler, "tokens", lambda step: 5, 250)
    before = scheduler.optimizer.param_groups[0]["lr"]
    scheduler.extend(total_tokens=2000)
    assert scheduler.phase == "cooldown"
    assert before < scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(0.75 * scheduler.switch.lr)
    to_the_end(scheduler, "tokens", lambda step: 5)
    assert scheduler.last_epoch == 400
    scheduler.extend(total_tokens=4000)
    lrs, _ = to_the_end(resumed(scheduler), "tokens", lambda step: 5)
    assert len(lrs) == 400
    assert [lrs[0], lrs[-1] * 400] == pytest.approx([scheduler.switch.lr] * 2)


def test_a_budget_goes_with_a_cooldown_that_is_asked_for_a_new_search_and_branches():
    scheduler = scheduler_of(WARMUP, total_tokens=3000)
    to_the_end(scheduler, "tokens", lambda step: 5, 120)
    branch = scheduler_of()
    branch.load_state_dict(scheduler.fork_cooldown(0.2))
    assert len(to_the_end(branch, "tokens", lambda step: 5)[0]) == 480
    assert branch.lr_at(branch.last_epoch) == pytest.approx(branch.switch.lr / 120, rel=1e-6)
    with pytest.raises(ValueError, match=r"cooldown_fraction=0.9: must be forked off by 0.1 of the budget at most, used are 0.2"):
        scheduler.fork_cooldown(0.9)
    with pytest.raises(ValueError, match=r"cooldown_fraction=0.2: with a budget the step is not known"):
        scheduler.cooldown_start(0.2)
    scheduler.rewarm()
    to_the_end(scheduler, "tokens", lambda step: 5, 200)
    assert scheduler.phase == "stable"
    assert scheduler.switch.step > 120
    scheduler.start_cooldown(20)
    train(scheduler, 221, tokens=5)
    assert scheduler.should_stop
    train(scheduler, 230)  # no budget any longer


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({}, TypeError, "tokens=None: must be an integer, at least 0, in a run with total_tokens=1000"),
        ({"samples": 5}, TypeError, "tokens=None: must be an integer"),
        ({"tokens": -1}, ValueError, "tokens=-1: must be at least 0"),
        ({"tokens": 2.0}, TypeError, "tokens=2.0: must be an integer"),
        ({"tokens": True}, TypeError, "tokens=True: must be an integer"),
        ({"tokens": "5"}, TypeError, "tokens='5': must be an integer"),
        ({"tokens": 5, "samples": -2}, ValueError, "samples=-2: must be at least 0"),
    ],
)
def test_a_step_that_does_not_say_what_it_took_is_refused_and_does_not_count(given, error, said):
    scheduler, other = (scheduler_of(WARMUP, total_tokens=1000) for _ in range(2))
    for one in (scheduler, other):
        to_the_end(one, "tokens", lambda step: 5, 20)
    scheduler.optimizer.step()
    with pytest.raises(error, match=said):
        scheduler.step(loss_of(scheduler), **given)
    assert to_the_end(scheduler, "tokens", lambda step: 5, 40) == to_the_end(other, "tokens", lambda step: 5, 40)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"total_steps": 10, "total_seconds": 5.0}, "total_steps=10, total_seconds=5.0: give one length"),
        ({"total_samples": 10, "total_tokens": 5}, "total_samples=10, total_tokens=5: give one length"),
        (
            {"steps_per_epoch": 10, "total_epochs": 3, "total_tokens": 5},
            "steps_per_epoch=10, total_epochs=3, total_tokens=5: give one",
        ),
        ({"steps_per_epoch": 10, "total_tokens": 5}, "steps_per_epoch=10, total_tokens=5: give one"),
        ({"total_seconds": 5.0, "immediate_cooldown": True}, "immediate_cooldown=True"),
    ],
)
def test_lengths_that_do_not_go_together_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        scheduler_of(None, **arguments)


@pytest.mark.parametrize(
    ("larger", "said"),
    [
        ({"total_tokens": 1000}, "total_tokens=1000: must be more than 1000, of which 500 are used"),
        ({"total_tokens": 400}, "total_tokens=400: must be more than 1000, of which 500 are used"),
        ({"total_tokens": 0}, "total_tokens=0: must be at least 1"),
        ({"total_samples": 5000}, "total_samples=5000: the run has no such budget"),
        ({"total_tokens": 2000, "total_seconds": 3.0}, "total_tokens=2000, total_seconds=3.0: give one length"),
    ],
)
def test_a_budget_that_is_no_larger_or_spent_already_is_refused(larger, said):
    scheduler = scheduler_of(WARMUP, total_tokens=1000)
    to_the_end(scheduler, "tokens", lambda step: 5, 100)
    before = scheduler.config
    with pytest.raises(ValueError, match=said):
        scheduler.extend(**larger)
    assert scheduler.config is before


def test_pauses_may_be_nested_and_hold_steps(clock):
    scheduler = scheduler_of(WARMUP, total_seconds=300.0)
    clock.train(scheduler, lambda step: 1.0, 100)
    with scheduler.paused():
        clock.now += 1_000
        with scheduler.paused():
            clock.now += 1_000
        clock.train(scheduler, lambda step: 1_000, 105)
    clock.train(scheduler, lambda step: 1.0, 150)
    assert scheduler.progress == pytest.approx((99 + 45) / 300)


def test_what_several_ranks_have_used_last_counts_where_one_goes_on():
    scheduler = scheduler_of(WARMUP, total_tokens=100_000)
    train(scheduler, 100, tokens=100)
    state = scheduler.state_dict()
    state["horizon"]["pending"] = [0.0, 0.0, 700.0]
    alone = scheduler_of(WARMUP, total_tokens=100_000)
    alone.load_state_dict(state)
    train(alone, 101, tokens=100)
    assert alone.progress == pytest.approx((100 * 100 + 700 + 100) / 100_000)


def test_a_report_of_a_warm_up_that_is_not_planned_yet_says_so():
    scheduler = scheduler_of(None, total_tokens=100_000)
    train(scheduler, 5, tokens=100)
    report = Report.of(scheduler.state_dict())
    assert report.loss_steps.tolist() == [0, 1, 2, 3, 4]
    told = dict(report.decided())
    assert "its limit is known once" in told["switch"]
    assert not any(str(number) in str(told) for number in (UNMEASURED, UNMEASURED + 1))

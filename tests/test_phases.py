"""Which step runs at which LR, as pure functions of a configuration and a state."""

import dataclasses
import inspect
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autowu import AutoWU
from autowu.config import checked, configure, extended
from autowu.phases import (
    LRRule,
    State,
    Switch,
    Verdict,
    after_test,
    base_lr,
    end_plateau_epoch,
    exploded,
    is_test_due,
    next_test,
    phase_at,
    switched,
    verdict,
)
from autowu.schedules import COOLDOWN_TYPES, WARMUP_TYPES, cooldown_factor
from autowu.switching import SwitchDecision

OPTIMIZER = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
DEFAULTS = {name: p.default for name, p in inspect.signature(AutoWU).parameters.items()} | {
    "optimizer": OPTIMIZER,
    "steps_per_epoch": 10,
    "total_epochs": 20,
    "immediate_cooldown": True,
    "cooldown_type": "cosine",
    "cooldown_fraction": 0.2,
    "min_lr": 1e-5,
    "max_lr": 1.0,
    "max_warmup_fraction": 0.5,
    "warmup_type": "exp",
    "patience": 3,
    "peak_factor": 1.0,
}


def config_of(**arguments):
    return configure(checked(DEFAULTS | arguments))


def after_switch(step, lr=0.1):
    return State(switch=Switch(step, lr, 0.99, step / 2, by_test=True))


def past(minimum, probability=0.99):
    return SwitchDecision(True, 3, probability, (minimum,), (minimum,))


def not_past(minimum):
    return SwitchDecision(False, 0, 0.5, (minimum,), (minimum,))


@st.composite
def runs(draw):
    """A configuration, and a step at which a switch may come."""
    arguments = {
        "steps_per_epoch": draw(st.integers(1, 20)),
        "total_epochs": draw(st.integers(2, 20)),
        "immediate_cooldown": draw(st.booleans()),
        "cooldown_type": draw(st.sampled_from(COOLDOWN_TYPES)),
        "cooldown_fraction": draw(st.sampled_from([0.05, 0.2, 0.5, 0.9])),
        "max_warmup_fraction": draw(st.sampled_from([0.1, 0.25, 0.5, 0.9])),
        "warmup_type": draw(st.sampled_from(WARMUP_TYPES)),
        "warmup_unit": draw(st.sampled_from(["step", "epoch"])),
    }
    total = arguments["steps_per_epoch"] * arguments["total_epochs"]
    assume(total * arguments["max_warmup_fraction"] >= 2 and total * (1 - arguments["cooldown_fraction"]) >= 2)
    config = config_of(**arguments)
    return config, draw(st.integers(1, config.warmup_limit))


@given(runs())
@settings(max_examples=100)
def test_the_warmup_rises_within_the_range(run):
    config, _ = run
    lrs = [base_lr(config, State(), k) for k in range(config.warmup_limit)]
    assert lrs[0] == config.min_lr
    assert all(a <= b < config.max_lr for a, b in zip([0.0, *lrs], lrs, strict=False))


@given(runs())
@settings(max_examples=200)
def test_from_the_switch_on_the_lr_falls_from_the_peak_to_just_above_zero(run):
    config, step = run
    state = after_switch(step, lr=0.1)
    lrs = [base_lr(config, state, k) for k in range(step, config.total_steps)]
    assert lrs[0] == 0.1
    assert all(a >= b for a, b in pairwise(lrs))
    start = step if config.immediate_cooldown else max(step, config.cooldown_start)
    cooldown = lrs[start - step :]
    assert cooldown[0] == 0.1
    assert all(a > b for a, b in pairwise(cooldown))
    length = config.total_steps - start
    assert lrs[-1] == pytest.approx(0.1 * cooldown_factor((length - 1) / length, config.cooldown_type))
    assert lrs[-1] > 0


@given(runs(), st.integers(0, 10**6))
def test_past_the_end_the_last_lr_stays(run, further):
    config, step = run
    last = base_lr(config, after_switch(step), config.total_steps - 1)
    assert base_lr(config, after_switch(step), config.total_steps + further) == last


@given(runs())
def test_phases_follow_each_other(run):
    config, step = run
    before = [phase_at(config, State(), k) for k in range(step)]
    after = [phase_at(config, after_switch(step), k) for k in range(step, config.total_steps + 3)]
    assert before == ["warmup"] * step
    stable = 0 if config.immediate_cooldown else max(0, config.cooldown_start - step)
    assert after == ["stable"] * stable + ["cooldown"] * (config.total_steps - step - stable) + ["done"] * 3


@given(runs())
def test_a_warmup_leaves_room_for_the_rest_of_the_run(run):
    config, _ = run
    assert 1 <= config.warmup_limit < config.total_steps
    assert config.immediate_cooldown or config.warmup_limit <= config.cooldown_start


def test_the_cooldown_fraction_ends_a_warmup_only_where_the_cooldown_is_not_immediate():
    arguments = {"cooldown_fraction": 0.7, "max_warmup_fraction": 0.5}
    assert config_of(**arguments, immediate_cooldown=True).warmup_limit == 100
    assert config_of(**arguments, immediate_cooldown=False).warmup_limit == 60


def test_a_warmup_cut_short_keeps_its_slope():
    short, full = (config_of(cooldown_fraction=0.7, immediate_cooldown=immediate) for immediate in (False, True))
    assert [base_lr(short, State(), k) for k in range(60)] == [base_lr(full, State(), k) for k in range(60)]


@pytest.mark.parametrize("limit", [60, 61, 89, 90, 91, 100, 119, 150, 1000, 12_345, 1_000_000])
def test_about_sixty_tests_in_a_full_warmup(limit):
    config = config_of(steps_per_epoch=None, total_epochs=None, total_steps=2 * limit)
    assert config.warmup_limit == limit
    assert 40 <= -(-limit // config.test_interval) <= 90


@pytest.mark.parametrize("interval", [1, 7, "epoch", 1000])
def test_tests_are_due_at_the_interval_and_at_the_limit(interval):
    config = config_of(test_interval=interval)
    every = 10 if interval == "epoch" else interval
    due = [k for k in range(1, 250) if is_test_due(config, State(), k)]
    assert due == sorted({*range(every, 101, every), 100})
    assert not any(is_test_due(config, after_switch(20), k) for k in range(1, 250))


@given(interval=st.integers(1, 40), warmup=st.integers(1, 60), origin=st.integers(0, 30), step=st.integers(0, 100))
def test_the_next_test_is_the_first_that_is_due_later(interval, warmup, origin, step):
    config = config_of(test_interval=interval, max_warmup_steps=warmup, total_steps=200, steps_per_epoch=None, total_epochs=None)
    config = dataclasses.replace(config, warmup_origin=origin)
    due = [k for k in range(step + 1, 200) if is_test_due(config, State(), k)]
    assert step < next_test(config, step) <= min(due, default=math.inf)
    if due and step >= origin:
        assert next_test(config, step) == due[0]


def test_a_switch_goes_to_the_lr_of_the_minimum():
    config = config_of()
    switch = after_test(config, State(votes=2), 50, verdict(config, 50, past(0.25, 0.97))).switch
    assert (switch.step, switch.probability, switch.by_test) == (50, 0.97, True)
    assert switch.minimum == pytest.approx(25)
    assert switch.lr == pytest.approx(1e-5 * 1e5**0.25)


def test_a_switch_takes_the_mean_over_the_subsamples():
    decision = SwitchDecision(True, 3, 0.97, (0.05, 0.2, 0.35), (0.1, 0.2, 0.3))
    found = verdict(config_of(), 50, decision)
    assert (found.switch, found.votes, found.probability) == (True, 3, 0.97)
    assert found.lr == pytest.approx((1e-5 * 1e5**0.1 + 1e-5 * 1e5**0.2 + 1e-5 * 1e5**0.3) / 3)
    assert found.minimum == pytest.approx(20)


def test_the_lr_is_that_of_the_far_edge_of_a_valley_up_to_now():
    found = verdict(config_of(), 50, SwitchDecision(True, 3, 0.97, (0.2,), (0.4,)))
    assert (found.minimum, found.lr) == (pytest.approx(20), pytest.approx(1e-5 * 1e5**0.4))
    found = verdict(config_of(), 50, SwitchDecision(True, 3, 0.97, (0.2,), (0.7,)))
    assert found.lr == pytest.approx(1e-5 * 1e5**0.5)


def test_a_warmup_without_a_switch_goes_on():
    state = after_test(config_of(), State(), 50, Verdict(False, 2, 0.99, 0.1, 20.0))
    assert (state.votes, state.switch) == (2, None)


def test_a_warmup_at_its_limit_goes_back_to_the_minimum():
    switch = switched(config_of(), State(), 100, verdict(config_of(), 100, not_past(0.75)), fallback_lr=0.5).switch
    assert (switch.step, switch.by_test) == (100, False)
    assert switch.lr == pytest.approx(1e-5 * 1e5**0.75)


def test_after_an_explosion_the_peak_is_the_median_of_the_tests_before_it_else_that_of_the_minimum():
    config = config_of()
    state = switched(config, State(), 60, Verdict(False, 0, 1.0, 0.9, 30.0), fallback_lr=0.5)
    before = [Verdict(False, 0, 0.5, lr, 20.0) for lr in (0.1, 0.4, 0.2)]
    assert exploded(config, state, before).switch == dataclasses.replace(state.switch, lr=0.2)
    assert exploded(config, state, []).switch.lr == pytest.approx(1e-5 * 1e5**0.3)
    at_start = dataclasses.replace(state, switch=dataclasses.replace(state.switch, minimum=14.0))  # of 60: there was no fall
    assert exploded(config, at_start, before).switch.lr == pytest.approx(1e-5 * 1e5**0.14)
    assert exploded(dataclasses.replace(config, min_rise=0.0), state, before) == state  # where the minimum alone counts
    several = dataclasses.replace(config, others=((1e-4, 1.0, 0.5),))
    pair = switched(several, State(), 60, Verdict(False, 0, 1.0, 0.9, 30.0, (0.8,)), fallback_lr=(0.5, 0.5))
    both = [dataclasses.replace(verdict, others=(verdict.lr / 2,)) for verdict in before]
    assert exploded(several, pair, both).switch.lrs == (0.2, 0.1)


def test_a_failed_test_ends_the_votes_in_a_row():
    state = after_test(config_of(), State(votes=2), 50, None)
    assert (state.votes, state.switch) == (0, None)


@pytest.mark.parametrize(("fallback", "expected"), [(0.5, 0.5), (7.0, 1.0), (0.0, 1e-5)])
def test_a_warmup_that_ends_without_any_fit_takes_the_fallback_within_the_range(fallback, expected):
    switch = switched(config_of(), State(), 100, None, fallback_lr=fallback).switch
    assert switch == Switch(100, expected, None, None, by_test=False)


def test_the_factor_acts_after_every_epoch_of_the_stable_phase():
    config = config_of(immediate_cooldown=False, decay_phase_factor=0.5)
    lrs = [base_lr(config, after_switch(50, 0.8), k) for k in range(50, 160)]
    assert lrs == [0.8 * 0.5 ** (j // 10) for j in range(110)]


@st.composite
def long_stable_phases(draw):
    """The arguments of a run, and the step of its switch."""
    warmup, total = draw(st.integers(1, 60)), draw(st.one_of(st.none(), st.integers(70, 3000)))
    arguments = {"max_warmup_steps": warmup, "cooldown_fraction": draw(st.sampled_from([0.01, 0.2, 0.6])), "total_steps": total}
    arguments |= {"immediate_cooldown": False, "cooldown_type": draw(st.sampled_from(COOLDOWN_TYPES))}
    if total is not None and draw(st.booleans()):
        epochs = {"steps_per_epoch": 7, "total_epochs": total // 7, "decay_phase_factor": draw(st.sampled_from([0.7, 0.99, 1.0]))}
        arguments |= epochs | {"total_steps": None}
    else:
        arguments |= {"steps_per_epoch": None, "total_epochs": None}
    return arguments, draw(st.integers(1, config_of(**arguments).warmup_limit))


@given(long_stable_phases(), st.integers(0, 500))
@settings(max_examples=100)
def test_with_inverse_sqrt_the_lr_is_the_held_one_over_the_root_of_the_age_and_in_the_cooldown_that_of_its_first_step(run, origin):
    arguments, step = run
    held, falling = (config_of(**arguments, stable_type=name) for name in ("constant", "inverse_sqrt"))
    if held.total_steps is None:  # as after a warm-up that was begun anew
        held, falling = (dataclasses.replace(config, warmup_origin=origin) for config in (held, falling))
        step += origin
    tau = held.warmup_steps / 0.32
    steps = range(step, held.total_steps + 3 if held.total_steps else step + 3000)
    of_held, of_falling = ([rule.at(k) for k in steps] for rule in (LRRule(c, after_switch(step, 0.1)) for c in (held, falling)))
    assert all(a >= b > 0 for a, b in pairwise(of_falling))
    assert all(a >= b for a, b in zip(of_held, of_falling, strict=True))
    for k, one, other in zip(steps, of_held, of_falling, strict=True):
        age = min(k, max(step, held.cooldown_from)) - held.warmup_origin
        if age <= tau:
            assert one == other
        else:
            assert other == pytest.approx(one * min(1, math.sqrt(tau / age)), rel=1e-12)


@given(st.integers(10, 10**6))
def test_by_default_a_short_run_of_known_length_never_sees_the_lr_fall_and_a_long_one_does(total):
    known = {
        "steps_per_epoch": None,
        "total_epochs": None,
        "total_steps": total,
        "max_warmup_fraction": None,
        "cooldown_fraction": 0.6,
    }
    config = config_of(**known, immediate_cooldown=False, stable_type="inverse_sqrt")
    lr = LRRule(config, after_switch(config.warmup_limit, 0.1)).at(config.cooldown_start)
    assert lr == 0.1 if total < 5000 else lr < 0.1 if total > 6000 else lr <= 0.1
    assert LRRule(config, after_switch(config.warmup_limit, 0.1)).at(config.warmup_limit) == 0.1


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=40), st.floats(0.1, 0.9))
def test_the_plateau_rule_lowers_the_lr_and_never_raises_it(means, factor):
    config = config_of(immediate_cooldown=False, decay_phase_stat="loss", decay_phase_factor=factor)
    states = [after_switch(50)]
    for mean in means:
        states.append(end_plateau_epoch(config, states[-1], mean))
    factors = [s.plateau_factor for s in states]
    assert all(b == a or b == pytest.approx(a * factor) for a, b in pairwise(factors))
    assert min(means) <= states[-1].best_epoch_loss <= means[0]


def test_an_epoch_without_a_finite_loss_is_one_without_progress():
    config = config_of(immediate_cooldown=False, decay_phase_stat="loss", decay_phase_factor=0.5)
    state = end_plateau_epoch(config, after_switch(50), 1.0)
    for _ in range(5):
        state = end_plateau_epoch(config, state, math.nan)
    assert (state.bad_epochs, state.plateau_factor, state.best_epoch_loss) == (5, 1.0, 1.0)
    assert end_plateau_epoch(config, state, math.nan).plateau_factor == 0.5


def test_configurations_and_states_are_frozen():
    for value in (config_of(), State(), after_switch(1).switch):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.step = 3


@pytest.mark.parametrize("immediate", [True, False])
def test_a_longer_run_moves_the_cooldown_and_leaves_the_warmup(immediate):
    config = config_of(immediate_cooldown=immediate)
    longer = extended(config, config_of(total_epochs=30, min_lr=1e-3, immediate_cooldown=not immediate))
    assert longer == dataclasses.replace(config, total_steps=300, cooldown_start=240)
    in_warmup = [base_lr(longer, State(), k) for k in range(100)]
    assert in_warmup == [base_lr(config, State(), k) for k in range(100)]
    after = after_switch(50, 0.8)
    assert phase_at(longer, after, 200) == ("cooldown" if immediate else "stable")
    assert base_lr(longer, after, 299) == pytest.approx(base_lr(config, after, 199), rel=0.7)
    assert base_lr(longer, after, 170) > base_lr(config, after, 170)


@pytest.mark.parametrize("other", [{"total_epochs": 20}, {"total_epochs": 5}, {"steps_per_epoch": 99, "total_epochs": 20}])
def test_a_run_that_is_not_longer_in_epochs_changes_nothing(other):
    assert extended(config_of(), config_of(**other)) == config_of()


def test_steps_are_compared_only_with_steps():
    steps = config_of(steps_per_epoch=None, total_epochs=None, total_steps=200)
    longer = config_of(steps_per_epoch=None, total_epochs=None, total_steps=500)
    assert extended(steps, longer).total_steps == 500
    assert extended(config_of(), longer) == config_of()
    assert extended(steps, config_of(total_epochs=100)) == steps

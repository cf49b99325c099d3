"""Whole schedules in the situations that users bring: losses that come seldom or again and again, that rise first, or change."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from autowu import AutoWU


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


def by_lr(lr, lowest=0.3):
    """A loss that falls with the LR to a minimum, and rises steeply beyond it."""
    off = math.log10(lr / lowest)
    return 1 + 0.3 * abs(off) ** 1.2 + (3 * max(0.0, off - 0.2)) ** 2


def fed(loss_at, total=2000, seed=0, noise=0.05, **arguments):
    """A schedule that is fed ``loss_at(step, lr, noise)`` up to its switch; None for a step without a loss."""
    scheduler = AutoWU(sgd(), total_steps=total, **arguments)
    drawn = np.random.default_rng(seed)
    for step in range(total):
        scheduler.optimizer.step()
        scheduler.step(loss_at(step, scheduler.get_last_lr()[0], noise * drawn.normal()))
        if scheduler.switch is not None:
            break
    return scheduler


def kinds(scheduler):
    return [event.kind for event in scheduler.events]


# ---------------------------------------------------------------- losses that come seldom


def every(n, *, again=False):
    """A loss every n steps; in between none, or the last one `again`."""
    last = None

    def loss_at(step, lr, noise):
        nonlocal last
        if (step + 1) % n == 0 or (again and last is None):
            last = by_lr(lr) + noise
            return last
        return last if again else None

    return loss_at


@functools.cache
def lr_of_a_loss_at_every_step():
    return fed(every(1)).switch.lr


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("n", [2, 10, 32, 64])
def test_a_loss_every_n_steps_finds_the_lr_that_one_at_every_step_does(n, again):
    found = fed(every(n, again=again))
    assert 0.5 < found.switch.lr / lr_of_a_loss_at_every_step() < 2
    assert again or "fit" not in kinds(found)


@pytest.mark.parametrize("n", [10, 50])
def test_a_loss_that_falls_to_the_end_and_comes_seldom_ends_the_warm_up_at_its_limit(n):
    scheduler = fed(lambda step, lr, noise: 2 - step / 640 + noise if (step + 1) % n == 0 else None)
    assert scheduler.switch.step == scheduler.config.warmup_limit
    assert not scheduler.switch.by_test


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_losses_that_come_seldom_and_are_not_finite_end_the_warm_up(n, odd):
    scheduler = fed(lambda step, lr, noise: None if (step + 1) % n else odd if step > 300 else 2 - step / 640 + noise)
    assert scheduler.switch.step < 310 + 6 * n  # the first three may have been a batch
    assert [kind for kind in kinds(scheduler) if kind in ("not_finite", "explosion")] == ["not_finite", "explosion"]


# ---------------------------------------------------------------- losses that rise first


def rises_first(then):
    """A loss that doubles over 40 steps, and goes on as ``then(steps, lr)`` adds to it."""
    return lambda step, lr, noise: 1 + min(step / 40, 1) + then(max(0, step - 40), lr) + noise


@pytest.mark.parametrize("total", [300, 2000])
def test_a_loss_that_rises_and_then_falls_for_good_ends_the_warm_up_at_its_limit(total):
    scheduler = fed(rises_first(lambda steps, lr: -steps / 300), total)
    assert scheduler.switch.step == scheduler.config.warmup_limit
    assert scheduler.switch.minimum > 0.9 * scheduler.switch.step
    assert kinds(scheduler) == ["switch"]


@pytest.mark.parametrize("factor", [0.5, 2.0])  # the valley lies above the first loss, and below it
def test_a_valley_after_a_first_rise_is_found(factor):
    scheduler = fed(rises_first(lambda steps, lr: (steps > 0) * factor * (by_lr(lr) - 2)), noise=0.02)
    assert scheduler.switch.by_test
    assert 0.1 < scheduler.switch.lr < 0.5
    assert kinds(scheduler) == ["switch"]


@pytest.mark.parametrize("end", [math.inf, 1000])
def test_a_warm_up_that_only_rises_says_so_and_holds_min_lr(end, caplog):
    scheduler = fed(lambda step, lr, noise: 1 + step / 600 + noise if step < end else math.nan, 2000)
    switch = scheduler.switch
    assert not switch.by_test
    assert switch.lr == scheduler.config.min_lr == 1e-4
    assert kinds(scheduler)[-2:] == ["switch", "peak"]
    assert "lower min_lr" in scheduler.events[-1].message
    assert [record.levelname for record in caplog.records if "min_lr" in record.getMessage()] == ["WARNING"]


def test_a_run_whose_loss_only_rises_goes_back_to_a_copy_of_its_start():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoWU(optimizer, total_steps=400, model=model)
    weights = []
    for step in range(100):
        optimizer.step()
        with torch.no_grad():
            model.weight += 1.0
        weights.append(model.weight.item())
        scheduler.step(1 + step / 50 if step < 90 else math.nan)
    assert scheduler.switch.step == 93
    assert scheduler._rooms.rollback.held < 20
    assert model.weight.item() < weights[20] + 8


@pytest.mark.parametrize("loss", [None, math.nan])
def test_the_lr_of_a_run_without_any_loss_is_said_to_be_untested(loss):
    scheduler = fed(lambda step, lr, noise: loss, 200)
    assert scheduler.switch.lr == 0.1
    assert kinds(scheduler)[-1] == "peak"
    assert "untested" in scheduler.events[-1].message


# ---------------------------------------------------------------- waves


def flat_first(lr):
    """A loss that stays, falls by 1 from an LR of 0.02 to one of 0.3, and rises steeply beyond."""
    off = math.log10(lr / 0.3)
    return 2 - np.clip((off + 1.18) / 1.18, 0, 1) + (3 * max(0.0, off - 0.1)) ** 2


def waves(periods, height, phase, steps=192):
    """So many periods in the warm-up of a run of 600 steps."""
    return lambda step, lr, noise: flat_first(lr) + height * math.sin(2 * math.pi * (step * periods / steps + phase)) + noise


@functools.cache
def without_waves():
    return fed(waves(1, 0.0, 0), 600).switch.lr


QUICK = [(2, 0.1, 0.5), (7, 0.6, 0.75), (3, 0.1, 0.25), (4, 0.3, 0.0), (7, 0.3, 0.5), (10, 0.3, 0.0)]


@pytest.mark.parametrize(
    ("periods", "height", "phase"),
    [
        *QUICK,
        *(
            pytest.param(*of, marks=pytest.mark.slow)
            for of in itertools.product([3, 4, 5, 7, 10], [0.1, 0.3], [0.0, 0.25, 0.5, 0.75])
            if of not in QUICK
        ),
    ],
)
def test_a_wave_on_a_flat_start_is_no_valley(periods, height, phase):
    assert 0.08 < fed(waves(periods, height, phase), 600).switch.lr / without_waves() < 2


def test_a_valley_near_the_start_is_found_once_it_has_stood():
    scheduler = fed(lambda step, lr, noise: 1 + 0.3 * abs(math.log10(lr / 0.002)) ** 1.2 + noise, 600)
    switch, config = scheduler.switch, scheduler.config
    assert 0.3 < (switch.step - switch.minimum) / config.warmup_steps < 0.45
    assert 2e-4 < switch.lr < 3e-3


def test_a_valley_near_the_start_that_ends_in_an_explosion_is_found_at_once():
    scheduler = fed(lambda step, lr, noise: by_lr(lr, lowest=0.002) + noise, 600)
    assert kinds(scheduler) == ["explosion", "switch"]
    assert 4e-4 < scheduler.switch.lr < 2e-3


# ---------------------------------------------------------------- calls that are missing, or too many


def called(calls_for_each_step, total=60):
    """A schedule whose optimizer is called so many times for each of its steps."""
    scheduler = AutoWU(sgd(), total_steps=total)
    scheduler.optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    for calls in calls_for_each_step:
        for _ in range(calls):
            scheduler.optimizer.step()
        scheduler.step(1.0)
    return scheduler


def test_a_scheduler_that_is_called_once_an_epoch_says_so(caplog):
    scheduler = called([20] * 10)
    assert [(event.kind, event.step) for event in scheduler.events if event.kind == "calls"] == [("calls", 3)]
    assert "after every optimizer.step" in caplog.text
    assert '"interval": "step"' in caplog.text


@pytest.mark.parametrize("calls", [[1] * 20, [2] * 20, [1, 0, 0, 0] * 10, [5, 5, 1] * 8, [30, 1, 1, 1], [3, 0] * 10])
def test_wrappers_and_micro_batches_are_no_missing_calls(calls):
    assert "calls" not in kinds(called(calls))


def test_a_scaler_that_skips_for_ever_with_a_finite_loss_is_told_once():
    assert "skipped" not in kinds(called([1] + [0] * 99))
    scheduler = called([1] + [0] * 250)
    assert kinds(scheduler).count("skipped") == 1
    assert scheduler.last_epoch == 1


@pytest.mark.parametrize("mended", [False, True])
def test_a_scaler_whose_scale_falls_to_nothing_is_told_before_it_makes_nan_of_the_weights(mended, caplog):
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    model, scaler, spoilt = torch.nn.Linear(8, 1), torch.amp.GradScaler("cpu"), 330
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoWU(optimizer, total_steps=300, on_rollback=lambda step: scaler.update(2.0**16) if mended else None)
    for call in range(500):
        loss = (model(x) - x[:, :1]).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if call < spoilt and call % 2:
            model.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if not model.weight.isfinite().all():
            spoilt = 0
            assert "skipped" in kinds(scheduler)
        scheduler.step(loss)
    assert spoilt == 0
    assert "scaler.update(2.0**16)" in caplog.text
    assert "divergence" in kinds(scheduler)
    assert ("whose scale has fallen to 0" in caplog.text) == (not mended)
    assert bool(model.weight.isfinite().all()) == mended


@pytest.mark.parametrize(("calls", "gradient"), [([1, 0, 0, 0] * 200, 1.0), (([1] * 25 + [0]) * 101, math.inf)])
def test_neither_a_wrapper_nor_a_scaler_that_tries_a_higher_scale_now_and_then_is_told(calls, gradient):
    scheduler = AutoWU(sgd(), total_steps=len(calls))
    for number in calls:
        scheduler.optimizer.param_groups[0]["params"][0].grad = torch.full((1,), 1.0 if number else gradient)
        for _ in range(number):
            scheduler.optimizer.step()
        scheduler.step(1.0)
    assert scheduler.last_epoch == sum(calls)
    assert "skipped" not in kinds(scheduler)


def test_a_run_that_never_passes_a_loss_is_told_how():
    scheduler = fed(lambda step, lr, noise: None, 400)
    assert [(event.kind, event.step) for event in scheduler.events[:1]] == [("loss", 14)]
    assert "scheduler.observe(loss)" in scheduler.events[0].message


# ---------------------------------------------------------------- runs that are too short


@pytest.mark.parametrize(("total", "told"), [(30, True), (63, True), (81, True), (82, False), (1000, False)])
def test_a_run_too_short_for_its_warm_up_is_told_the_least_number_of_steps(total, told, caplog):
    scheduler = AutoWU(sgd(), total_steps=total)
    assert scheduler.events == []
    assert ("too short" in caplog.text) == told
    if told:
        least = int(caplog.text.split("train for ")[1].split()[0])
        caplog.clear()
        AutoWU(sgd(), total_steps=least)
        assert 81 <= least <= 90
        assert caplog.text == ""


def test_a_run_with_few_tests_is_too_short_for_its_patience(caplog):
    AutoWU(sgd(), 50, 10, test_interval="epoch")
    assert "too short" in caplog.text

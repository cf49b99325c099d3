"""Whole schedules in the situations that users bring: losses that come seldom or again and again, that rise first, or change."""

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


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("n", [2, 10, 32, 64])
def test_a_loss_every_n_steps_finds_the_lr_that_one_at_every_step_does(n, again):
    expected, found = fed(every(1)), fed(every(n, again=again))
    assert 0.5 < found.switch.lr / expected.switch.lr < 2
    assert "fit" not in kinds(found)


@pytest.mark.parametrize("n", [10, 50])
def test_a_loss_that_falls_to_the_end_and_comes_seldom_ends_the_warm_up_at_its_limit(n):
    scheduler = fed(lambda step, lr, noise: 2 - step / 640 + noise if (step + 1) % n == 0 else None)
    assert scheduler.switch.step == scheduler.config.warmup_limit
    assert not scheduler.switch.by_test


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_losses_that_come_seldom_and_are_not_finite_end_the_warm_up(n, odd):
    scheduler = fed(lambda step, lr, noise: None if (step + 1) % n else odd if step > 300 else 2 - step / 640 + noise)
    assert scheduler.switch.step < 310 + 3 * n
    assert "explosion" in kinds(scheduler)

"""Curves on which the default rule must switch near the minimum, and curves on which it must not switch at all."""

import numpy as np
import pytest
import torch

from autowu import AutoWU

NOISES = {
    "none": lambda rng, n: np.zeros(n),
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: np.clip(rng.standard_t(2, size=n), -3, None),
}


def decide(losses, **arguments):
    """What the default rule makes of the losses of a full warm-up: its switch, with the minimum as a share of the warm-up."""
    n = len(losses)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    run = {"total_steps": round(n / 0.32), "max_warmup_fraction": 0.32} if "steps_per_epoch" not in arguments else {}
    scheduler = AutoWU(optimizer, **run, **arguments)
    assert scheduler.config.warmup_steps == n
    optimizer.step()
    for loss in losses:
        if scheduler.switch is None:
            scheduler.step(float(loss))
    return scheduler.switch, scheduler.switch.minimum / n


def valley(n, lowest=0.7, floor=0.5):
    """Flat at the tiny LRs, a fall from half of the way to the minimum on, a steep rise after it."""
    x = np.arange(n) / n
    fall = 2.3 - (2.3 - floor) / (1 + np.exp(-(x - 0.8 * lowest) * 25))
    return fall + np.where(x > lowest, 40 * (x - lowest) ** 2, 0.0)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("n", [40, 240, 2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_valley_is_found(n, noise):
    losses = valley(n) + 0.03 * NOISES[noise](np.random.default_rng(n), n)
    switch, minimum = decide(losses)
    assert switch.by_test
    assert minimum == pytest.approx(0.72, abs=0.08)
    assert switch.step < 0.95 * n


@pytest.mark.parametrize("drift", [-0.2, 0.03])
def test_a_valley_is_found_under_a_drift(drift):
    n = 480
    losses = valley(n) + drift * np.arange(n) / n + 0.03 * np.random.default_rng(1).normal(size=n)
    switch, minimum = decide(losses)
    assert switch.by_test
    assert minimum == pytest.approx(0.72, abs=0.08)


def test_a_valley_is_found_in_epochs_of_two_steps():
    losses = valley(200) + 0.03 * np.random.default_rng(2).normal(size=200)
    switch, minimum = decide(losses, steps_per_epoch=2, total_epochs=250, max_warmup_fraction=0.4, test_interval="epoch")
    assert switch.by_test
    assert switch.step % 2 == 0
    assert minimum == pytest.approx(0.72, abs=0.08)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("height", [0.05, 0.1])
def test_a_small_bump_on_the_way_down_is_passed_over(height, seed):
    n = 480
    x = np.arange(n) / n
    bump = height * np.exp(-(((x - 0.45) / 0.02) ** 2))
    switch, minimum = decide(valley(n) + bump + 0.05 * np.random.default_rng(seed).normal(size=n))
    assert switch.by_test
    assert minimum == pytest.approx(0.72, abs=0.08)


@pytest.mark.parametrize("shape", ["flat", "falling", "late fall", "drift down"])
@pytest.mark.parametrize(
    ("n", "noise"),
    [(40, "normal"), (40, "heavy tails"), (240, "normal"), pytest.param(2000, "heavy tails", marks=pytest.mark.slow)],
)
def test_without_a_minimum_there_is_no_switch_by_test(n, shape, noise):
    x = np.arange(n) / n
    curve = {
        "flat": 2.3 + 0 * x,
        "falling": 2.3 - 2 * x,
        "late fall": 2.3 - 2 * np.clip(x - 0.7, 0, None),
        "drift down": 2.3 - 0.1 * x,
    }
    fired = [decide(curve[shape] + 0.1 * NOISES[noise](np.random.default_rng(seed), n))[0].by_test for seed in range(8)]
    assert sum(fired) <= 1

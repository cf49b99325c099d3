"""Curves on which the default rule must switch near the minimum, and curves on which it must not switch at all."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from autowu import AutoWU

DIPS = [json.loads(line) for line in (Path(__file__).parent / "data" / "recorded_dips.jsonl").read_text().splitlines()]

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


@pytest.mark.parametrize(
    ("n", "noise", "shape"),
    [
        pytest.param(n, noise, shape, marks=[] if (n, noise) in hard else [pytest.mark.slow])
        # Of a loss that falls to the end is a quick test in test_scheduler.py.
        for shape, hard in {
            "flat": [(240, "normal")],
            "falling": [],
            "late fall": [(40, "heavy tails")],
            "drift down": [(40, "heavy tails")],
        }.items()
        for n, noise in ((40, "normal"), (40, "heavy tails"), (240, "normal"), (2000, "heavy tails"))
    ],
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


@pytest.mark.parametrize("periods", [2, 3, 5, 10])
@pytest.mark.parametrize("amplitude", [0.05, 0.15])
def test_a_wave_on_the_way_down_is_passed_over(amplitude, periods):
    x = np.arange(320) / 320
    curve = 2.3 - 1.8 * np.minimum(x / 0.7, 1) + 40 * np.maximum(x - 0.7, 0) ** 2
    noise = 0.05 * np.random.default_rng(periods).normal(size=320)
    switch, minimum = decide(curve + amplitude * np.sin(2 * np.pi * periods * x) + noise)
    assert switch.by_test
    assert minimum == pytest.approx(0.72, abs=0.12)


@pytest.mark.parametrize(
    ("n", "fall"),
    [
        pytest.param(n, fall, marks=[] if (n, fall) in ((200, 0.04), (320, 0.16)) else [pytest.mark.slow])
        for n in (200, 320, 800)
        for fall in (0.04, 0.08, 0.16)
    ],
)
def test_the_noise_of_a_plateau_after_a_small_fall_is_no_rise(n, fall):
    x = np.arange(n) / n
    curve = 0.69 - fall * np.clip((x - 0.15) / 0.12, 0, 1) - 0.5 * np.clip((x - 0.6) / 0.2, 0, 1)
    curve += 40 * np.clip(x - 0.85, 0, None) ** 2
    for seed in range(8):
        noise = 0.04 * np.random.default_rng(seed).normal(size=n) * np.where(x > 0.3, 2, 1)
        assert decide(curve + noise)[1] > 0.55


@pytest.mark.parametrize("seed", [8, pytest.param(9, marks=pytest.mark.slow)])
def test_two_spirals_are_not_left_at_a_straight_border(seed):
    """It is reached early, at a loss of 0.6, and the loss rests there until the LR is tens of times higher."""
    generator = torch.Generator().manual_seed(seed)
    angle, side = (
        3 * math.pi * torch.rand(2400, generator=generator).sqrt() + 0.5,
        torch.randint(0, 2, (2400,), generator=generator),
    )
    turned = angle + math.pi * side
    points = angle[:, None] / 10 * torch.stack([turned.cos(), turned.sin()], 1)
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = AutoWU(optimizer, total_steps=1110)
    while scheduler.switch is None:
        batch = torch.randint(0, 2400, (64,))
        loss = torch.nn.functional.cross_entropy(model(points[batch]), side[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert 0.005 < scheduler.switch.lr < 0.05


def lr_found(curve, **arguments):
    """The peak LR on a recorded full warm-up of an even ramp, which ends where the loss was not finite."""
    parameters, steps = [torch.nn.Parameter(torch.zeros(1))], curve["warmup_steps"]
    optimizer = torch.optim.AdamW(parameters) if curve["optimizer"] == "adamw" else torch.optim.SGD(parameters, 0.1, momentum=0.9)
    run = {"total_steps": 2 * steps, "max_warmup_fraction": 0.5, "warmup_type": "exp", "immediate_cooldown": True}
    scheduler = AutoWU(optimizer, **run, test_interval=round(steps / 75), **arguments)
    assert (scheduler.config.min_lr, scheduler.config.max_lr) == (curve["min_lr"], curve["max_lr"])
    optimizer.step()
    for loss in [*curve["losses"], *[None] * steps][:steps]:
        if scheduler.switch is None:
            scheduler.step(math.nan if loss is None else loss)
    return scheduler.switch.lr


def regret(curve, lr):
    """The test loss of a tuned run at the nearest LR of the grid, over that at the best."""
    losses = {float(lr): loss for lr, loss in curve["grid_test_loss"].items()}
    return losses[min(losses, key=lambda known: abs(math.log(known / lr)))] / min(losses.values())


@pytest.mark.parametrize("curve", DIPS, ids=lambda curve: f"{curve['case']} {curve['seed']}")
def test_a_recorded_first_dip_or_plateau_is_no_minimum(curve):
    assert regret(curve, lr_found(curve)) < 3


def test_without_the_rise_a_first_dip_was_one():
    assert all(lr_found(c, min_rise=0.0, peak_factor=0.8) < 0.003 for c in DIPS if c["case"].startswith("friedman"))

"""Ramps alone: at which LR the loss rises, and which losses cannot tell."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autowu.phases import RampPlan
from autowu.ramp import SPAN, Ramp, is_smooth


def ramp_of(losses, steps=96, level=1.0, noise=0.01, span=SPAN, **how):
    ramp = Ramp(steps, span, level, noise, **how)
    ramp.follow(losses)
    return ramp


def valley(edge, steps=96, noise=0.1, seed=0, height=2.0, span=SPAN):
    """Losses of a ramp: noise about 1 up to the `edge`, in times of the peak LR, and a rise after it, by `height` a decade."""
    lrs = span ** (np.arange(steps) / steps)
    return 1 + height * np.maximum(0, np.log10(lrs) - np.log10(edge)) + noise * np.random.default_rng(seed).normal(size=steps)


# What a ramp finds


# What a run makes: up to 20 times the peak, in a short run and in a long one.
MADE = [{"steps": math.ceil(whole * math.log(20) / math.log(SPAN)), "span": 20.0} for whole in (64, 160)]


@given(st.floats(1.5, 30), st.integers(0, 100))
def test_the_edge_is_found_within_a_factor_of_two(edge, seed):
    found = ramp_of(valley(edge, seed=seed)).edge
    assert edge / 2 < found < 2 * edge


@pytest.mark.parametrize("made", MADE)
def test_of_a_thousand_ramps_as_they_are_made_those_are_told_apart_whose_loss_rises(made):
    for edge, least, most in ((1.5, 0, 0), (3.0, 0, 0), (5.0, 0, 50), (math.inf, 950, 1000)):
        losses = (valley(edge, **made, seed=seed, height=6.0) for seed in range(1000))
        raised = sum(ramp_of(of, **made).factor > 1 for of in losses)
        assert least <= raised <= most, f"edge {edge}"


@given(st.floats(1.5, 30), st.integers(0, 100))
def test_a_careful_ramp_goes_no_further_and_finds_no_higher_edge(edge, seed):
    losses, ends = valley(edge, seed=seed), []
    for careful in (False, True):
        ramp = ramp_of([], careful=careful)
        ends.append(next((k for k, loss in enumerate(losses) if ramp.follow([loss]) or ramp.edge is not None), 96))
    assert ends[1] < ends[0] or ends[0] == ends[1] == 95
    assert ramp_of(losses, careful=True).edge <= ramp_of(losses).edge


def test_of_a_thousand_careful_ramps_noise_ends_few():
    found = [ramp_of(valley(math.inf, seed=seed), careful=True).factor for seed in range(1000)]
    assert found.count(4.0) > 950


@pytest.mark.parametrize("careful", [False, True])
def test_of_a_thousand_ramps_whose_loss_rises_at_three_times_the_peak_none_raises_it(careful):
    assert all(ramp_of(valley(3, seed=seed), careful=careful).factor == 1 for seed in range(1000))


def test_a_loss_that_does_not_rise_raises_the_peak_by_four():
    for seed in range(100):
        ramp = ramp_of(valley(math.inf, seed=seed))
        assert (ramp.edge, ramp.factor) == (SPAN, 4.0)


@given(st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 100))
def test_neither_a_factor_nor_a_constant_matters_to_a_ramp(scale, shift, seed):
    losses = valley(8, seed=seed)
    moved = ramp_of(scale * losses + shift, level=scale + shift, noise=scale**2 * 0.01)
    assert moved.edge == pytest.approx(ramp_of(losses).edge)


def test_losses_that_are_not_finite_are_an_edge_and_missing_ones_say_nothing():
    plain = valley(math.inf, noise=0)
    for bad in (math.nan, math.inf, 1e200):
        losses = np.where(np.arange(96) >= 48, bad, plain)
        assert ramp_of(losses).edge == pytest.approx(8)
    noisy = valley(math.inf)
    assert ramp_of(np.where(np.arange(96) == 48, math.nan, noisy)).factor == 4


@pytest.mark.parametrize("every", [3, 20, 96, 1000])
@pytest.mark.parametrize("passed", ["missing", "again", "missing, with NaN now and then"])
def test_losses_that_are_missing_or_passed_again_raise_no_peak(every, passed):
    for edge in (3, math.inf):
        losses = valley(edge)
        kept = losses[np.arange(96) // every * every]
        if passed != "again":
            kept = np.where(np.arange(96) % every, -math.inf, losses)
        if "NaN" in passed:
            kept[5::40] = math.nan
        assert ramp_of(kept).factor == 1


@given(st.integers(1, 40), st.floats(2, 5))
def test_the_edge_lies_after_the_last_part_that_was_low(missing, edge):
    losses = valley(edge, seed=missing)
    losses[missing : missing + 20] = -math.inf
    assert ramp_of(losses).edge < 3 * edge


@given(st.integers(0, 96), st.integers(0, 20))
def test_a_ramp_goes_on_from_its_state(cut, seed):
    losses, whole = valley(20, seed=seed), ramp_of(valley(20, seed=seed))
    again = Ramp.of(copy.deepcopy(ramp_of(losses[:cut]).state_dict()))
    again.follow(losses[cut:])
    assert repr(vars(again)) == repr(vars(whole))  # of which NaN may be a part


def smoothed(losses, decay):
    means = [losses[0]]
    for loss in losses[1:]:
        means.append(decay * means[-1] + (1 - decay) * loss)
    return torch.tensor(means)


@pytest.mark.parametrize("count", [75, 128, 500])
@pytest.mark.parametrize("fall", [0.0, 0.002, 0.05], ids=str)
def test_running_means_are_smooth_and_losses_as_they_come_are_not_however_they_fall(count, fall):
    draws, trend = np.random.default_rng(0), 40 * np.exp(-fall * np.arange(count))
    raw = [torch.tensor(trend + draws.normal(size=count)) for _ in range(200)]
    assert sum(map(is_smooth, raw)) <= 6
    heavy = [torch.tensor(trend + draws.standard_t(2, size=count)).float() for _ in range(200)]
    assert sum(map(is_smooth, heavy)) <= 6
    for decay in (0.98, 0.9):
        means = [smoothed([*draws.normal(size=200), *draws.normal(size=count)], decay)[200:] for _ in range(200)]
        assert sum(map(is_smooth, means)) >= (175 if count == 75 else 190)


def test_losses_that_are_few_or_missing_are_not_smooth():
    for losses in ([], [1.0], [1.0, 2.0], [math.nan, -math.inf, 1.0], [2.0] * 64):
        assert not is_smooth(torch.tensor(losses))


@given(st.floats(0.01, 100), st.floats(0.01, 10), st.floats(0.1, 10))
def test_noise_that_hides_the_progress_blinds_a_ramp_and_half_of_it_those_after_the_first(scale, noise, progress):
    ramp = Ramp(47, 20.0, 0.0, (scale * noise) ** 2)
    hidden = 3 * noise * math.sqrt(1 / ramp.part + 0.1 / 1.9)
    for ramps, least in ((0, progress), (1, progress / 2), (3, progress / 2)):
        assert ramp.is_blind(scale * progress, ramps) == (hidden > least) or hidden == pytest.approx(least)


def test_a_plan_has_no_factor_outside_of_its_steps():
    plan = RampPlan(10, 4, 16.0)
    assert [plan.factor(step) for step in range(8, 16)] == pytest.approx([1, 1, 1, 2, 4, 8, 1, 1])

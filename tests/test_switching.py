"""The vote of a test, and how votes add up to a switch."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm

from autowu.gp import CurvePosterior
from autowu.switching import (
    EARLY,
    MIN_LOSSES,
    STANDS,
    SURE,
    decide,
    far_edge,
    lost_rise,
    probability_past_minimum,
    rise_contrast,
    rise_share,
    valley_contrast,
)


def posterior_of(mean, difference_variance, num_losses=100):
    mean = np.atleast_2d(np.asarray(mean, dtype=float))
    difference_variance = np.broadcast_to(np.asarray(difference_variance, dtype=float), mean.shape).copy()
    difference_variance[:, -1] = 0
    grid = np.linspace(0, 0.5, mean.shape[1])
    return CurvePosterior(grid, 0.5, mean, np.ones_like(mean), difference_variance, num_losses)


def posterior_with(probabilities, num_losses=100):
    """One fit for each probability."""
    rise = norm.ppf(np.asarray(probabilities))
    return posterior_of([[5.0, 0.0, z] if z > 0 else [5.0 + abs(z), -z, 0.0] for z in rise], 1.0, num_losses)


posteriors = st.tuples(st.integers(1, 6), st.integers(2, 30)).flatmap(
    lambda shape: st.tuples(arrays(float, shape, elements=st.floats(-4, 4)), arrays(float, shape, elements=st.floats(0.1, 4)))
)


@given(posteriors)
@settings(deadline=None, max_examples=200)
def test_probability_is_the_largest_over_the_grid(arrays):
    mean, variance = arrays
    posterior = posterior_of(mean, variance)
    z = (mean[:, -1:] - mean[:, :-1]) / np.sqrt(variance[:, :-1])
    np.testing.assert_allclose(probability_past_minimum(posterior), norm.cdf(z).max(1), rtol=1e-12)


@given(posteriors, st.floats(1e-6, 1e6), st.floats(-10, 10))
@settings(deadline=None, max_examples=100)
def test_probability_and_minimum_are_blind_to_scale_and_shift(arrays, scale, shift):
    mean, variance = arrays[0].round(3), arrays[1]
    plain = posterior_of(mean, variance)
    changed = posterior_of(scale * (mean + shift), scale**2 * variance)
    np.testing.assert_allclose(probability_past_minimum(changed), probability_past_minimum(plain), rtol=1e-9)
    for row, position in zip(mean, decide(changed, 0, confidence=0.95, patience=3).minima, strict=True):
        lowest = plain.grid[row == row.min()]
        assert np.isclose(lowest, position).any()


def test_minima_are_where_each_mean_is_lowest():
    posterior = posterior_of([[3, 1, 2], [1, 2, 3], [3, 2, 1]], 1.0)
    assert decide(posterior, 0, confidence=0.95, patience=3).minima == (0.25, 0.0, 0.5)


def test_switch_after_patience_votes_in_a_row():
    past, open_ = posterior_with([0.99]), posterior_with([0.9])
    votes, counted, switched = 0, [], []
    for posterior in (past, past, open_, past, past, past, past):
        decision = decide(posterior, votes, confidence=0.95, patience=3)
        votes = decision.votes
        counted.append(votes)
        switched.append(decision.switch)
    assert counted == [1, 2, 0, 1, 2, 3, 4]
    assert switched == [False, False, False, False, False, True, True]


@given(votes=st.integers(0, 10), patience=st.integers(1, 10))
@settings(deadline=None)
def test_votes_count_up_or_start_again(votes, patience):
    past = decide(posterior_with([0.96]), votes, confidence=0.95, patience=patience)
    assert (past.votes, past.switch) == (votes + 1, votes + 1 >= patience)
    open_ = decide(posterior_with([0.94]), votes, confidence=0.95, patience=patience)
    assert (open_.votes, open_.switch) == (0, False)


def test_a_probability_equal_to_the_confidence_is_no_vote():
    level = posterior_of([[1.0, 1.0, 1.0]], 1.0)
    assert probability_past_minimum(level).tolist() == [0.5]
    assert decide(level, 2, confidence=0.5, patience=3).votes == 0


@given(
    subsamples=st.lists(st.integers(1, 99).map(lambda k: k / 100), min_size=1, max_size=9).filter(lambda p: len(p) % 2),
    confidence=st.sampled_from([0.605, 0.755, 0.945]),
)
@settings(deadline=None, max_examples=200)
def test_an_odd_number_of_subsamples_votes_by_majority(subsamples, confidence):
    posterior = posterior_with(subsamples)
    probabilities = probability_past_minimum(posterior)
    np.testing.assert_allclose(probabilities, subsamples, rtol=1e-9)
    decision = decide(posterior, 0, confidence=confidence, patience=1)
    assert decision.switch == ((probabilities > confidence).sum() > len(subsamples) / 2)
    assert decision.probability == pytest.approx(np.median(subsamples))
    assert len(decision.minima) == len(subsamples)


def test_silence_is_a_vote():
    open_ = posterior_with([0.2])
    decision = decide(open_, 2, confidence=0.95, patience=3, silent=True)
    assert (decision.switch, decision.votes, decision.probability) == (True, 3, 1.0)


@pytest.mark.parametrize("silent", [False, True])
def test_few_losses_have_no_vote(silent):
    few, enough = (posterior_with([0.999], num_losses=n) for n in (MIN_LOSSES - 1, MIN_LOSSES))
    refused = decide(few, 2, confidence=0.95, patience=3, silent=silent)
    assert (refused.switch, refused.votes) == (False, 0)
    assert refused.probability > 0.99
    assert decide(enough, 2, confidence=0.95, patience=3, silent=silent).switch


def test_contrast_is_the_fall_to_the_minimum_plus_the_rise_from_it():
    grid = np.linspace(0, 1, 5)
    posterior = CurvePosterior(
        grid=grid,
        end=1.0,
        mean=np.array([[3.0, 5.0, 1.0, 9.0, 2.0]]),
        variance=np.array([[0.3, 0.7, 0.1, 0.1, 0.15]]),
        difference_variance=np.ones((1, 5)),
        num_losses=50,
    )
    fall, rise = 4.0 / np.sqrt(0.7 + 0.1), 1.0 / np.sqrt(0.15 + 0.1)  # 2 / sqrt(0.4) to the first point is less
    assert valley_contrast(posterior) == pytest.approx([fall + rise])


@pytest.mark.parametrize(("min_contrast", "votes"), [(0.0, 1), (6.4, 1), (6.5, 0)])
def test_a_shallow_valley_has_no_vote(min_contrast, votes):
    posterior = CurvePosterior(
        grid=np.linspace(0, 1, 3),
        end=1.0,
        mean=np.array([[2.0, 1.0, 3.0]]),
        variance=np.array([[0.2, 0.05, 0.15]]),  # 1 / 0.5 down and 2 / sqrt(0.2) up
        difference_variance=np.array([[0.1, 0.1, 0.0]]),
        num_losses=50,
    )
    decision = decide(posterior, 0, confidence=0.95, patience=3, min_contrast=min_contrast)
    assert decision.votes == votes


def curve_of(mean, std=0.1):
    mean = np.asarray(mean, dtype=float)[None]
    variance = np.full_like(mean, std**2)
    difference = 2 * variance
    difference[:, -1] = 0
    return CurvePosterior(np.linspace(0, 1, mean.shape[1]), 1.0, mean, variance, difference, 100)


RULE = {"confidence": 0.95, "patience": 3, "min_contrast": 6.0}


@pytest.mark.parametrize(
    ("mean", "votes", "minimum"),
    [
        ([3, 2, 1, 2, 3], 1, 0.5),
        ([1, 2, 3, 4, 5], 0, 0.0),  # only rises
        ([1, 3, 5, 4, 3], 0, 1.0),  # rises, then falls
        ([1, 5, 3, 4, 5], 1, 0.5),  # rises, then a valley, up to where it fell from
        ([1, 5, 3, 4, 9], 1, 0.5),
        ([2, 5, 1, 2, 3], 1, 0.5),
        ([1.05, 1, 2, 3, 4], 0, 0.25),  # a fall that may be noise
    ],
)
def test_a_valley_has_a_fall_and_a_rise(mean, votes, minimum):
    decision = decide(curve_of(mean), 0, **RULE)
    assert (decision.votes, decision.minima) == (votes, (minimum,))


def test_a_rise_alone_is_enough_for_the_published_rule():
    assert decide(curve_of([1, 2, 3]), 0, confidence=0.95, patience=3).votes == 1


@pytest.mark.parametrize(
    ("mean", "votes"),
    [
        ([10, 2, 1, 2.9], 1),
        ([10, 2, 1, 2.7], 0),  # a dip of less than a fifth of the fall
        ([10, 1, 1.5, 1, 1.4, 1.2, 1.5], 0),  # noise on a plateau
        ([10, 1, 3, 0, 1.5, 2.5], 1),  # the fall is the largest before the minimum
    ],
)
def test_a_dip_is_no_minimum(mean, votes):
    assert decide(curve_of(mean, 0.05), 0, **RULE, min_rise=0.2).votes == votes
    assert decide(curve_of(mean, 0.05), 0, **RULE).votes == 1


@pytest.mark.parametrize(
    ("mean", "rise"),
    [
        ([5, 4, 3, 2, 1, 0, 2], 0),
        ([5, 1, 3, 1, 0, 0, 0, 0, 0, 0, 2], 2),  # up by 2 and back
        ([5, 1, 3, 2, 2.5, 3.5, 4, 4, 4, 4, 4], 1),  # half of the way
        ([1, 5, 3, 2, 1, 0, 0, 0, 0, 0, 2], 0),  # a first rise comes after no fall
        ([9, 8, 7, 6, 5, 4, 3, 2, 4, 1, 0], 0),  # not early
    ],
)
def test_what_a_curve_has_risen_by_and_come_back_from(mean, rise):
    assert lost_rise(curve_of(mean)) == rise


def test_an_early_valley_has_a_vote_once_it_has_stood_and_is_no_wave():
    def votes(mean, waves=True):
        return decide(curve_of(mean, 0.05), 0, **RULE, min_rise=0.2, waves=waves).votes

    def valley(at, end):
        """A curve that is lowest at that share of the warm-up, and ends where the axis does, at 1."""
        x = np.linspace(0, end, 101)
        return replace(curve_of(4 * np.abs(x - at), 0.05), grid=x, end=end)

    for at in (0.1, EARLY - 0.05, EARLY + 0.05):
        for since in (STANDS - 0.05, STANDS + 0.05):
            posterior = valley(at, at + since)
            assert decide(posterior, 0, **RULE, min_rise=0.2, waves=True).votes == (at > EARLY or since > STANDS)
            assert decide(posterior, 0, **RULE, min_rise=0.2).votes == 1
    assert votes([5, 1, 3, 0, 1, 2.4]) == 0  # no more than it has come back from
    assert votes([5, 1, 3, 0, 1, 2.6]) == 1
    assert votes([5, 1, 3, 0, 1, 2.4], waves=False) == 1


@given(posteriors, st.floats(1e-3, 1e3), st.floats(-10, 10))
@settings(deadline=None, max_examples=100)
def test_rise_and_edge_are_those_of_a_slow_reference_and_blind_to_scale_and_shift(arrays, scale, shift):
    mean, variance = arrays[0][:1].round(3), arrays[1][:1]
    grid = np.linspace(0, 0.5, mean.shape[1])
    fit = CurvePosterior(grid, 0.5, mean, variance, np.ones_like(mean), 100)
    points = mean[0].tolist()
    lowest = points.index(min(points))
    fall, rise = max(points[: lowest + 1]) - points[lowest], points[-1] - points[lowest]
    assert rise_share(fit) == (pytest.approx(rise / fall) if fall else np.inf)
    spread = np.sqrt(variance[0] + variance[0, lowest])
    assert rise_contrast(fit) == pytest.approx(rise / spread[-1])
    margin = np.abs(mean[0] - points[lowest] - spread).min()
    edge = max(x for x, value, room in zip(grid, points, spread, strict=True) if value - points[lowest] <= room)
    assert far_edge(fit) == edge >= grid[lowest]
    assert far_edge(fit, 0.1) == min(edge, grid[lowest] + 0.1)
    if margin > 1e-6:
        changed = CurvePosterior(grid, 0.5, scale * (mean + shift), scale**2 * variance, np.ones_like(mean), 100)
        assert far_edge(changed) == edge


@pytest.mark.parametrize(("std", "votes"), [(0.9 / SURE / math.sqrt(2), 1), (1.1 / SURE / math.sqrt(2), 0)])
def test_a_rise_must_be_sure_by_itself_however_far_the_loss_has_fallen(std, votes):
    assert decide(curve_of([5, 4, 3, 1, 2], std), 0, **RULE, min_rise=0.2).votes == votes
    assert decide(curve_of([5, 4, 3, 1, 2], std), 0, **RULE).votes == 1  # by the fall


def test_of_a_flat_valley_the_far_edge_counts_a_decade_past_its_minimum_at_most():
    flat = curve_of([5, 1.05, 1, 1.05, 1.02, 1.1, 1.05, 1.08, 4], 0.1)
    decision = decide(flat, 0, **RULE, min_rise=0.2)
    assert (decision.votes, decision.minima, decision.edges) == (1, (0.25,), (0.875,))
    assert decide(flat, 0, **RULE, min_rise=0.2, reach=0.3).edges == (0.55,)
    assert decide(flat, 0, **RULE).edges == (0.25,)

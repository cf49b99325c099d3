"""The watch over a run: what it takes for an explosion or a divergence, and what AutoWU does about it."""

import functools
import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from autowu import AutoWU, ClosedFormGP
from autowu.history import MISSING
from autowu.watch import IN_A_ROW, LOST, NEAR, SURE, LossWatch

DATA = Path(__file__).parent.parent / "benchmarks" / "data"


def followed(losses, watch=None):
    """(exploded, diverged, near_best) after each loss."""
    watch = watch or LossWatch()
    said = []
    for loss in losses:
        watch.push(float(loss))
        said.append((watch.exploded, watch.diverged, watch.near_best))
    return said


def about(level, count):
    """So many losses that are almost the same; equal ones would be one."""
    return (level * (1 + 1e-6 * np.arange(count))).tolist()


def trained(steps=200, noise=0.05, seed=0):
    """A watch over a loss that has come down from 2 to 1."""
    watch = LossWatch()
    for loss in np.linspace(2, 1, steps) + noise * np.random.default_rng(seed).normal(size=steps):
        watch.push(float(loss))
    return watch


def test_a_run_whose_last_loss_is_far_off_is_not_worth_copying_though_its_mean_is_near():
    watch = LossWatch()
    said = followed([*np.linspace(2, 1, 60), 2.0, 1.0, 1.0], watch)
    assert watch.mean - watch.best < 0.1 * watch.progress
    assert [near for _, _, near in said[-4:]] == [True, False, True, True]


def first(said, which):
    """The number of losses after which the flag was up; None where it never was."""
    return next((k + 1 for k, flags in enumerate(said) if flags[which]), None)


EXPLODED, DIVERGED = 0, 1


@given(st.lists(st.floats() | st.sampled_from([1e154, -1e155, 1.7e308, -1.7e308, 1e-320, MISSING]), max_size=60))
def test_no_number_is_too_much(losses):
    watch = LossWatch()
    followed(losses, watch)
    assert math.isfinite(watch.noise)
    assert all(math.isfinite(number) for number in (watch.start, watch.mean, watch.level, watch.last))


@pytest.mark.parametrize("huge", [1e151, 1.7e308, -1.7e308])
def test_a_loss_whose_square_is_not_finite_counts_as_one_that_is_not(huge):
    said = followed([huge] * 3, trained())
    assert [flags[DIVERGED] for flags in said] == [False, False, True]


# ---------------------------------------------------------------- what it takes for what


@given(
    seed=st.integers(0, 1000),
    noise=st.floats(0.01, 0.5),
    rise=st.floats(-1.0, 20.0),
    at=st.integers(0, 150),
    holes=st.sets(st.tuples(st.integers(0, 199), st.sampled_from([math.nan, math.inf, MISSING])), max_size=20),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100.0, 100.0),
)
@settings(max_examples=60)
def test_neither_a_factor_nor_a_constant_on_the_loss_changes_anything(seed, noise, rise, at, holes, scale, shift):
    steps = np.arange(200)
    losses = 2 - steps / 200 + rise * (steps >= at) + noise * np.random.default_rng(seed).normal(size=200)
    for place, hole in holes:
        losses[place] = hole
    assert followed(scale * losses + shift) == followed(losses)


@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    st.sampled_from([0.0, 0.3, 1.0, 5.0, 100.0]),
    st.integers(0, 90),
    st.sampled_from([0, 1, 4, 200]),
)
@settings(max_examples=40)
def test_a_watch_that_looks_closely_at_few_losses_knows_what_one_knows_that_looks_at_all(seed, noise, rise, at, long):
    rng = np.random.default_rng(seed)
    losses = rng.normal() + np.exp(-np.arange(120) / 30) + noise * rng.normal(size=120)
    losses[at : at + long] += rise
    watch = LossWatch()
    watch.follow(losses[:10].tolist())
    start, best, mean, level, own, above = watch.start, watch.best, watch.mean, watch.level, watch.noise, 0
    for last, loss in pairwise(losses[9:].tolist()):
        error, progress = math.sqrt(own), max(0.0, start - best)
        sure = SURE * error * math.sqrt((1 - 0.9) / (1 + 0.9))
        far = loss > start + 2 * progress + SURE * error
        above = above + 1 if far else 0
        level += (1 - 0.7) * (loss - level)
        mean += (1 - 0.9) * (min(loss, best + IN_A_ROW * max(sure, LOST * progress, watch.slack)) - mean)
        if not far and mean - best <= max(sure, NEAR * progress):
            own += (1 - 0.95) * ((loss - last) ** 2 / 2 - own)
        best = min(best, mean)
        watch.push(loss)
        assert watch.above == above
        assert (watch.best, watch.mean, watch.level, watch.noise) == pytest.approx((best, mean, level, own), rel=1e-9, abs=1e-12)


def draws(kind, seed, count=5000):
    generator = np.random.default_rng(seed)
    return generator.normal(size=count) if kind == "normal" else np.abs(generator.standard_t(2, size=count))


@pytest.mark.parametrize("fall", [0.0, 0.3])
@pytest.mark.parametrize(
    "kind",
    ["normal", "heavy tail"],
)
def test_noise_is_neither_an_explosion_nor_a_divergence(kind, fall):
    for seed in range(8):
        said = followed(2 - fall * np.linspace(0, 1, 5000) + 0.1 * draws(kind, seed))
        assert not any(exploded or diverged for exploded, diverged, _ in said), seed


@pytest.mark.parametrize("odd", [math.nan, math.inf, MISSING])
def test_one_or_two_losses_that_are_not_finite_are_survived(odd):
    for count in (1, 2):
        said = followed([odd] * count + [1.0, odd] * 5, trained())
        assert not any(exploded or diverged for exploded, diverged, _ in said)


@pytest.mark.parametrize("huge", [5.0, 50.0])
def test_a_single_loss_above_the_start_is_no_explosion(huge):
    said = followed([huge, 1.0, 1.0, huge, huge, 1.0, 1.0], trained())
    assert first(said, EXPLODED) is None


@pytest.mark.parametrize("huge", [2.0, 10.0, 1e3, 1e9])
def test_a_single_huge_loss_is_no_divergence(huge):
    said = followed([huge, *[1.0] * 30], trained())
    assert first(said, DIVERGED) is None


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_three_in_a_row_that_are_not_finite_are_both(odd):
    said = followed([odd, odd, 1.0, odd, odd, odd], trained())
    assert first(said, EXPLODED) == first(said, DIVERGED) == 6


def test_a_run_that_never_had_a_finite_loss_has_not_exploded():
    said = followed([math.nan] * 50)
    assert first(said, EXPLODED) is None
    assert first(said, DIVERGED) == 3


def test_missing_losses_never_count():
    losses = [*np.linspace(2, 1, 50), math.nan, math.nan, 1.0, 3.0, 30.0, 30.0, 30.0, math.nan, math.nan, math.nan]
    plain, sparse = LossWatch(), LossWatch()
    for loss in losses:
        plain.push(loss)
        followed([MISSING] * 5 + [loss] + [MISSING] * 3, sparse)
        assert sparse.state_dict() == plain.state_dict()
    assert plain.exploded
    assert first(followed([MISSING] * 100), DIVERGED) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_share_of_the_progress_that_is_lost_is_a_divergence(seed):
    noise = 0.05 * np.random.default_rng(seed + 100).normal(size=300)
    assert first(followed(1.4 + noise, trained(500, seed=seed)), DIVERGED) <= 30
    assert first(followed(1.15 + noise, trained(500, seed=seed)), DIVERGED) is None


@pytest.mark.parametrize("start", [28_000.0, 1.0, -3.0, 1e-4])
def test_a_run_that_never_came_down_has_exploded_where_its_loss_rises_by_orders_of_magnitude(start):
    noise = 1 + 0.1 * np.random.default_rng(0).normal(size=60)
    watch = LossWatch()
    followed(start * noise, watch)
    said = [followed([abs(start) * 10.0**power], watch) and watch.apart >= 3 for power in range(1, 20)]
    assert 6 <= said.index(True) <= 12
    assert all(said[said.index(True) :])


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("rise", [np.arange(400.0), 0.01 * np.arange(400.0) ** 2, 1e3 * (np.arange(400) > 30)])
@pytest.mark.parametrize("start", [0.7, 0.01, 1e-9, 0.0, -1e-9])
def test_a_loss_that_rises_from_the_first_step_has_not_exploded(start, rise, noise):
    watch = LossWatch()
    for loss in start * (1 + noise * np.random.default_rng(0).normal(size=400)) + rise:
        watch.push(float(loss))
        assert watch.apart < 3


def test_a_loss_that_stays_far_above_the_start_has_exploded_after_three():
    assert first(followed(about(20.0, 5), trained()), EXPLODED) == 3
    assert first(followed([20.0, 20.1, 1.0] * 5, trained()), EXPLODED) is None


def test_a_run_that_has_not_come_down_cannot_explode_by_a_finite_loss():
    flat = 2 + 0.1 * np.random.default_rng(0).normal(size=200)
    assert first(followed([*flat, *[20.0] * 20]), EXPLODED) is None


# ---------------------------------------------------------------- losses that are passed again


def passed_again(losses, times):
    """Each loss so many times, as a metric is that is logged now and then."""
    return [loss for loss in losses for _ in range(times)]


@pytest.mark.parametrize("bad", [20.0, -20.0, 1e9])
@pytest.mark.parametrize("times", [2, 3, 5, 50])
def test_a_bad_loss_that_is_passed_again_is_one_loss(bad, times):
    watch = LossWatch()
    falling = (np.linspace(2, 1, 60) + 0.05 * np.random.default_rng(0).normal(size=60)).tolist()
    said = followed(passed_again([*falling, bad, 1.0, 1.01, bad, *falling[-10:]], times), watch)
    assert not any(exploded or diverged for exploded, diverged, _ in said)


@pytest.mark.parametrize("bad", [20.0, 1e9])
@pytest.mark.parametrize("times", [2, 3, 5])
def test_a_bad_loss_that_is_passed_again_for_once_is_one_loss(bad, times):
    said = followed([*[bad] * times, *about(1.0, 30)], trained())
    assert not any(exploded or diverged for exploded, diverged, _ in said)


@pytest.mark.parametrize("times", [2, 7, 50])
@pytest.mark.parametrize("holes", [0, 3])
def test_a_watch_says_of_losses_that_are_passed_again_what_it_says_of_each_alone(times, holes):
    losses = [2.0, *np.linspace(1.9, 1, 60), *about(3.0, 5), 1.0, math.nan, *about(1.0, 30), *about(5.0, 12)]
    alone, again = LossWatch(), LossWatch()
    for loss in losses:
        alone.push(loss)
        for _ in range(1 if math.isnan(loss) else times):
            again.follow([loss, *[MISSING] * holes])
        assert (again.exploded, again.diverged) == (alone.exploded, alone.diverged)
    assert alone.diverged
    # All the first losses are equal as far as is known: they were taken as they came.
    assert (again.mean, again.silent, again.high) == pytest.approx((alone.mean, alone.silent, alone.high), rel=1e-3)


@pytest.mark.parametrize("loss", [0.0, 1.0, -2.5])
def test_losses_that_are_all_equal_are_what_they_are(loss):
    watch = LossWatch()
    followed([loss] * 200, watch)
    assert (watch.count, watch.mean, watch.noise) == (200, loss, 0.0)
    assert first(followed([math.nan] * 3, watch), EXPLODED) == 3


def test_a_loss_that_stays_at_0_is_taken_each_time():
    watch = trained()
    followed([0.0] * 100, watch)
    assert watch.count == 300
    assert watch.mean < 1e-3
    assert first(followed(about(1.5, 20), watch), DIVERGED) is not None


@pytest.mark.parametrize("bad", [2.5, 20.0])
@pytest.mark.parametrize("times", [1, 10])
def test_a_run_that_is_stuck_at_one_bad_loss_has_diverged_all_the_same(bad, times):
    watch = LossWatch()
    followed(passed_again(np.linspace(2, 1, 60), times), watch)
    at = first(followed([bad] * 60, watch), DIVERGED)
    assert max(5, 2 * times) < at < max(5, 2 * times) + 12


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e151])
def test_what_is_not_finite_is_taken_each_time(odd):
    assert first(followed([odd] * 3, trained()), EXPLODED) == 3
    assert not any(exploded for exploded, _, _ in followed([1.0, odd, odd] * 5, trained()))


def test_what_is_passed_again_after_going_back_is_no_sign_that_the_loss_has_changed():
    watch = LossWatch()
    followed(passed_again(np.linspace(2, 1, 60), 20), watch)
    assert first(followed(passed_again(about(3.0, 6), 20), watch), DIVERGED) is not None
    watch.go_back(1.0, trial=True)
    followed([watch.previous] * 15, watch)
    assert watch.trial == 3
    followed(passed_again([1.01, 1.0, 1.02], 20), watch)
    assert (watch.trial, watch.changed) == (0, False)


def test_a_good_run_is_worth_a_copy_and_one_that_is_on_its_way_up_is_not():
    watch = trained()
    assert watch.near_best
    assert not followed([math.nan], watch)[-1][2]
    assert not followed([1.5] * 8, watch)[-1][2]


def recorded():
    for name in ("warmups.jsonl", "recorded.jsonl"):
        for line in (DATA / name).read_text().splitlines():
            yield [math.nan if loss is None else float(loss) for loss in json.loads(line)["losses"]]


def test_no_recorded_warmup_explodes_before_its_lowest_point():
    exploded = 0
    for losses in recorded():
        finite = np.where(np.isfinite(losses), losses, np.inf)
        width = max(2, len(losses) // 40)
        smooth = [finite[max(0, k - width) : k + width + 1].mean() for k in range(len(losses))]
        at = first(followed(losses), EXPLODED)
        assert at is None or at > np.argmin(smooth)
        exploded += at is not None
    assert exploded > 20


def test_a_restored_watch_goes_on_as_it_would_have():
    losses = [*np.linspace(2, 1, 60) + 0.05 * np.random.default_rng(1).normal(size=60), math.nan, 9.0, 9.0, 9.0, 1.0, math.nan]
    for cut in range(len(losses)):
        whole, part, again = LossWatch(), LossWatch(), LossWatch()
        expected = followed(losses, whole)
        followed(losses[:cut], part)
        again.load_state_dict(json.loads(json.dumps(part.state_dict())))
        assert followed(losses[cut:], again) == expected[cut:]
        assert again.state_dict() == whole.state_dict()


def test_a_watch_that_was_put_back_is_as_wakeful_as_before():
    watch = trained()
    mean, noise = watch.mean, watch.noise
    followed(about(200.0, 3), watch)
    watch.go_back(mean)
    followed(about(1.0, 3), watch)
    assert watch.noise < 4 * noise
    assert first(followed(about(3.0, 10), watch), DIVERGED) is not None


def test_a_watch_that_was_put_back_has_not_diverged_already():
    watch = trained(100)  # down from 2
    mean = watch.mean
    followed(np.linspace(1, 0.2, 30), watch)
    followed([math.nan] * 3, watch)
    watch.go_back(mean)
    assert not watch.diverged
    assert first(followed([1.0] * 30, watch), DIVERGED) is None


def test_where_there_is_no_copy_the_watch_begins_anew_from_the_present():
    watch = trained()
    assert first(followed([2.5] * 20, watch), DIVERGED) is not None
    watch.go_back()
    assert not watch.diverged
    assert first(followed([2.5] * 50, watch), DIVERGED) is None


def put_back_at_alarm(watch, losses, level, back):
    """Follow `losses` to the divergence, go back to where the loss was `level`, and follow those of `back`."""
    assert first(followed(losses, watch), DIVERGED) is not None
    watch.go_back(level, trial=True)
    return followed(back, watch)


@pytest.mark.parametrize("jump", [1.0, 5.0, 50.0])
def test_a_loss_that_going_back_does_not_bring_back_has_changed(jump):
    watch = trained()
    said = put_back_at_alarm(watch, about(1 + jump, 8), 1.0, about(1.1 + jump, 3))
    assert watch.changed
    assert not said[-1][DIVERGED]
    watch.changed = False
    noise = 0.05 * np.random.default_rng(1).normal(size=200)
    assert first(followed(1 + jump + noise, watch), DIVERGED) is None
    assert watch.progress == pytest.approx(1.0, abs=0.2)  # what was reached before still counts
    assert first(followed(about(1 + 5 * jump, 10), watch), DIVERGED) is not None


@pytest.mark.parametrize("back", [[1.0, 1.5, 4.0], [1.1, 0.9, 1.0], [3.0, 1.0, 3.0], [3.0, 3.0, 3.0]])
def test_a_loss_that_comes_back_for_once_has_not_changed(back):
    watch = trained()
    put_back_at_alarm(watch, about(3.1, 8), 1.0, back)
    assert not watch.changed


def test_a_loss_that_was_not_finite_has_not_changed():
    watch = trained()
    put_back_at_alarm(watch, [math.nan] * 3, 1.0, [1.1] * 3)
    assert not watch.changed


def test_a_change_that_comes_again_is_no_divergence():
    watch = trained()
    put_back_at_alarm(watch, about(2.0, 8), 1.0, about(2.1, 3))
    watch.changed = False
    sources = np.resize([*[2.0] * 20, *[1.0] * 20], 400) + 0.05 * np.random.default_rng(2).normal(size=400)
    assert first(followed(sources, watch), DIVERGED) is None


def test_a_watch_on_trial_is_saved_and_loaded():
    watch, other = trained(), LossWatch()
    put_back_at_alarm(watch, about(3.0, 8), 1.0, [3.1])
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for which in (watch, other):
        followed(about(3.2, 2), which)
    assert watch.changed
    assert other.state_dict() == watch.state_dict()


# ---------------------------------------------------------------- a change of the loss where nothing goes back


def halved_at_alarms(watch, losses):
    """The number of alarms while `losses` are followed, and how many of them were undone."""
    alarms = undone = 0
    for loss in losses:
        watch.push(float(loss))
        if watch.changed:
            watch.changed, undone = False, undone + watch.halved
        if watch.diverged and alarms - undone < 3:
            alarms += 1
            watch.go_back(trial=True)
    return alarms, undone


def noise(count, seed=3):
    return 0.05 * np.random.default_rng(seed).normal(size=count)


@pytest.mark.parametrize("jump", [0.5, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("over", [1, 10, 100])
@pytest.mark.parametrize("fall", [0.0, 0.002])
def test_a_loss_that_rises_to_a_new_level_and_goes_on_from_there_has_changed(jump, over, fall):
    losses = 1 + jump * np.clip(np.arange(300) / over, 0, 1) - fall * np.arange(300) + noise(300)
    alarms, undone = halved_at_alarms(trained(), losses)
    assert alarms == undone <= 3
    assert alarms or jump < 1


@pytest.mark.parametrize("every", [10, 20, 37, 100])
@pytest.mark.parametrize("height", [0.5, 1.5, 5.0])
def test_sources_that_alternate_leave_no_halving(every, height):
    alarms, undone = halved_at_alarms(trained(), 1 + height * (np.arange(600) // every % 2) - 0.0005 * np.arange(600) + noise(600))
    assert alarms == undone <= 3


@pytest.mark.parametrize("top", [2.0, 5.0, 50.0])
@pytest.mark.parametrize("back", [2, 5, 30])
def test_a_loss_that_finds_back_at_a_lower_lr_had_diverged(top, back):
    steps = np.arange(300)
    losses = 1 + (top - 1) * np.where(steps < 12, (steps / 12) ** 3, np.exp(-(steps - 12) / back)) + noise(300)
    alarms, undone = halved_at_alarms(trained(), losses)
    assert 1 <= alarms <= 2
    assert undone == 0


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_a_loss_that_rises_on_or_ends_in_nan_has_diverged(end):
    losses = [*np.geomspace(1.0, 50.0, 40), *[end] * 60]
    alarms, undone = halved_at_alarms(trained(), losses)
    assert alarms >= 2
    assert undone == 0
    assert halved_at_alarms(trained(), 1 + 0.02 * np.arange(400) + noise(400))[1] == 0


def set_back_at_alarms(watch, losses):
    """As `halved_at_alarms`, with a copy that is renewed in good times, and whose weights do not change the losses."""
    alarms = undone = 0
    level = watch.level
    for step, loss in enumerate(losses):
        watch.push(float(loss))
        if watch.changed:
            watch.changed, undone = False, undone + watch.halved
        if watch.diverged and alarms - undone < 3:
            alarms += 1
            watch.go_back(level, trial=True)
        elif step % 9 == 0 and watch.near_best:
            level = watch.level
    return alarms, undone


@pytest.mark.parametrize("every", [3, 5, 6, 7, 8, 9, 10, 20])
@pytest.mark.parametrize("height", [0.5, 1.5, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_sources_that_alternate_leave_no_halving_where_copies_are_put_back(every, height, seed):
    losses = 1 + height * (np.arange(400) // every % 2) - 0.0005 * np.arange(400) + noise(400, seed)
    alarms, undone = set_back_at_alarms(trained(), losses)
    assert alarms == undone


def test_what_has_leapt_up_and_back_by_itself_is_no_divergence_and_what_leaps_higher_is_one():
    watch = trained()
    followed([*about(3.0, 4), *about(1.0, 20)], watch)
    assert first(followed([*about(3.2, 40), *about(1.0, 20)], watch), DIVERGED) is None
    assert first(followed(about(5.0, 20), watch), DIVERGED) is not None


@pytest.mark.parametrize("top", [2.0, 4.0])
def test_leaps_that_going_back_ends_are_divergences(top):
    """A run that dies in one step, and does so again at each lower LR."""
    watch = trained()
    for _ in range(3):
        assert first(followed(1 + noise(30), watch), DIVERGED) is None
        dead = iter(top + noise(30))
        while not watch.diverged:
            watch.push(float(next(dead)))
        watch.go_back(1.0, trial=True)
        assert not watch.changed


def test_a_doubt_is_saved_and_loaded():
    watch, other = trained(), LossWatch()
    losses = 2 + noise(100)
    halved_at_alarms(watch, losses[:20])
    assert watch.doubt
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert halved_at_alarms(watch, losses[20:]) == halved_at_alarms(other, losses[20:]) == (0, 1)
    assert other.state_dict() == watch.state_dict()


# ---------------------------------------------------------------- AutoWU


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


class Run:
    """A perceptron without normalisation on the digits; `spoil`, told the scheduler, gives a factor on the gradients."""

    def __init__(self, total=300, *, keeps=True, spoil=lambda scheduler: 1.0, seed=0, **arguments):
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        fixed = {
            "min_lr": 1e-5,
            "max_lr": 10.0,
            "max_warmup_fraction": 0.5,
            "warmup_type": "exp",
            "patience": 3,
            "peak_factor": 1.0,
            "min_rise": 0.0,
        }
        self.scheduler = AutoWU(self.optimizer, total_steps=total, model=self.model, rollback=keeps, **(fixed | arguments))
        self.also = lambda scheduler: 0.0  # a term of the loss
        self.spoil, self.lrs, self.losses, self.weights, self.copies = spoil, [], [], [], {}

    def advance(self, stop):
        inputs, targets = digits()
        while self.scheduler.last_epoch < stop:
            batch = torch.randint(1797, (128,), generator=torch.Generator().manual_seed(self.scheduler.last_epoch))
            loss = nn.functional.cross_entropy(self.model(inputs[batch]), targets[batch])
            self.optimizer.zero_grad()
            (loss * self.spoil(self.scheduler)).backward()
            self.lrs.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            loss = loss + self.also(self.scheduler)
            self.scheduler.step(loss)
            self.losses.append(loss.item())
            self.weights.append(nn.utils.parameters_to_vector(self.model.parameters()).detach().clone())
        return self

    def accuracy(self):
        inputs, targets = digits()
        return (self.model(inputs).argmax(1) == targets).float().mean().item()

    def kinds(self):
        return [event.kind for event in self.scheduler.events]

    def saved(self):
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        return self


class TooHigh(ClosedFormGP):
    """Finds the minimum where the LR is higher than it should be, by a tenth of the warm-up or as far as it has come."""

    def posterior(self, curve):
        posterior = super().posterior(curve)
        return replace(posterior, grid=posterior.grid + 0.1)


def nan_at(*steps):
    return lambda scheduler: math.nan if scheduler.last_epoch in steps else 1.0


def up_the_hill(times, slope, wait=25):
    """Gradients with the wrong sign, from `wait` steps after the switch, until the run was set back so often."""

    def spoil(scheduler):
        wrong = scheduler.switch is not None and scheduler.last_epoch >= scheduler.switch.step + wait
        return -slope if wrong and scheduler._state.setbacks < times else 1.0

    return spoil


STABLE = {"immediate_cooldown": False, "cooldown_fraction": 0.3}


@pytest.mark.parametrize("seed", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_peak_that_is_too_high_is_lowered_and_the_model_goes_back(seed, caplog):
    run = Run(400, seed=seed, gp=TooHigh(0.1), **STABLE).advance(400)
    times = run.kinds().count("divergence")
    assert 1 <= times <= 3
    assert run.kinds() == ["switch"] + ["divergence"] * times
    assert all("back at step" in event.message for event in run.scheduler.events)
    assert run.lrs[279] == pytest.approx(run.scheduler.switch.lr / 2**times)
    assert run.weights[-1].isfinite().all()
    assert run.accuracy() > 0.9
    assert len([line for line in caplog.messages if "training has diverged" in line]) == times


def test_a_divergence_halves_the_peak_and_goes_back_to_the_last_copy():
    run = Run(400, spoil=up_the_hill(1, slope=0.3), **STABLE)
    held = None
    while "divergence" not in run.kinds():
        held = run.scheduler._rooms.rollback.held
        run.advance(run.scheduler.last_epoch + 1)
    switch, step = run.scheduler.switch, run.scheduler.last_epoch
    event = run.scheduler.events[-1]
    assert switch.step < held < step
    assert (event.kind, event.step) == ("divergence", step)
    assert f"model and optimizer are back at step {held}" in event.message
    assert torch.equal(run.weights[-1], run.weights[held - 1])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(switch.lr / 2)
    run.advance(400)
    assert run.kinds() == ["switch", "divergence"]
    assert run.lrs[step : run.scheduler.config.cooldown_start] == pytest.approx([switch.lr / 2] * (280 - step))
    assert run.accuracy() > 0.9


def test_without_the_model_the_peak_is_halved_all_the_same():
    run = Run(400, keeps=False, spoil=up_the_hill(1, slope=0.3), **STABLE).advance(400)
    times = run.kinds().count("divergence")
    assert 1 <= times <= 3
    assert run.lrs[279] == pytest.approx(run.scheduler.switch.lr / 2**times)
    assert all("back at step" not in event.message for event in run.scheduler.events)
    assert run.accuracy() > 0.5


def test_one_divergence_without_the_model_is_one():
    run = Run(400, keeps=False, spoil=up_the_hill(1, slope=0.3), **STABLE).advance(400)
    assert run.kinds() == ["switch", "divergence"]


CHANGES = {
    "a term joins": lambda since: 1.5 * (since > 25),
    "two terms join, one after the other": lambda since: 1.0 * (since > 25) + 1.0 * (since > 80),
    "a term ramps up": lambda since: 0.03 * max(0, since - 20),
    "two sources alternate": lambda since: 1.5 * (since > 20 and since // 20 % 2),
}


# Quick are the two that say most: one term joins in two of them, and what alternates does so faster below.
SAY_MOST = ("two terms join, one after the other", "a term ramps up")


@pytest.mark.parametrize(
    "change", [pytest.param(c, id=name, marks=[] if name in SAY_MOST else [pytest.mark.slow]) for name, c in CHANGES.items()]
)
def test_a_loss_that_changes_leaves_the_peak(change):
    run = Run(500, **STABLE)
    run.also = lambda scheduler: change(scheduler.last_epoch - scheduler.switch.step) if scheduler.switch else 0.0
    run.advance(500)
    kinds = run.kinds()
    assert kinds[0] == "switch"
    assert kinds[1:] == ["divergence", "loss_changed"] * (len(kinds) // 2)
    assert 1 <= len(kinds) // 2 <= 4
    assert "the loss has changed" in run.scheduler.events[2].message
    assert run.lrs[349] == pytest.approx(run.scheduler.switch.lr)
    assert run.accuracy() > 0.9


def test_sources_that_alternate_every_few_steps_leave_the_peak():
    run = Run(500, **STABLE)
    run.also = lambda scheduler: 1.5 * (scheduler.switch is not None and (scheduler.last_epoch - scheduler.switch.step) // 6 % 2)
    run.advance(500)
    assert run.kinds().count("divergence") <= 2
    assert run.scheduler._state.setbacks == 0
    assert run.lrs[349] == pytest.approx(run.scheduler.switch.lr)
    assert run.accuracy() > 0.9


# A ramp that never ends does not settle: without a copy it looks as a divergence does.
SETTLING = {name: change for name, change in CHANGES.items() if name != "a term ramps up"}
SETTLING["a large term joins"] = lambda since: 5.0 * (since > 60)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(c, id=name, marks=[] if name in (*SAY_MOST, "a large term joins") else [pytest.mark.slow])
        for name, c in SETTLING.items()
    ],
)
def test_a_loss_that_changes_leaves_the_peak_where_nothing_goes_back_either(change):
    run = Run(500, keeps=False, **STABLE)
    run.also = lambda scheduler: change(scheduler.last_epoch - scheduler.switch.step) if scheduler.switch else 0.0
    run.advance(500)
    kinds = run.kinds()
    assert {*kinds} == {"switch", "divergence", "loss_changed"}
    assert 1 <= kinds.count("loss_changed") <= 2
    assert "at a lower LR" in run.scheduler.events[-1].message
    assert run.scheduler._state.setbacks == 0
    assert run.accuracy() > 0.9


@pytest.mark.parametrize("keeps", [True, False])
def test_a_third_set_back_that_was_none_is_undone_too(keeps):
    """Two divergences, and then a term that joins."""
    hill = up_the_hill(2, slope=0.3)
    run = Run(600, keeps=keeps, spoil=hill if keeps else lambda scheduler: 1.0, **STABLE)
    joined = []

    def also(scheduler):
        if scheduler._state.setbacks == 2 and not joined:
            joined.append(scheduler.last_epoch + 60)
        return 3.0 * bool(joined and scheduler.last_epoch > joined[0])

    run.also = also
    if not keeps:
        run.advance(250)
        run.scheduler._state = replace(run.scheduler._state, setbacks=2)
    run.advance(600)
    assert run.kinds()[-2:] == ["divergence", "loss_changed"]
    assert "3 of 3" in run.scheduler.events[-2].message
    assert run.scheduler._state.setbacks == 2
    assert run.lrs[400] == pytest.approx(run.scheduler.switch.lr / 4)


def test_a_divergence_after_a_change_of_the_loss_is_still_seen():
    run = Run(500, spoil=up_the_hill(1, slope=0.5, wait=120), **STABLE)
    run.also = lambda scheduler: 1.5 * (scheduler.switch is not None and scheduler.last_epoch > scheduler.switch.step + 25)
    run.advance(500)
    assert run.kinds() == ["switch", "divergence", "loss_changed", "divergence"]
    assert run.accuracy() > 0.9


def test_after_the_third_divergence_only_an_explosion_lowers_the_lr():
    run = Run(400, spoil=up_the_hill(9, slope=0.3), **STABLE).advance(400)
    times = run.kinds().count("divergence")
    assert 3 < times < 10
    assert run.kinds() == ["switch"] + ["divergence"] * times
    third, fourth = run.scheduler.events[3:5]
    assert third.message.endswith("only a loss that explodes lowers it")
    assert run.lrs[third.step : fourth.step] == pytest.approx([run.scheduler.switch.lr / 8] * (fourth.step - third.step))
    assert fourth.step - third.step > third.step - run.scheduler.events[2].step  # it is lost later than the progress is
    assert run.weights[-1].isfinite().all()
    assert run.scheduler.phase == "done"


def test_weights_that_are_lost_where_nothing_goes_back_cost_no_further_halving():
    run = Run(400, keeps=False, spoil=up_the_hill(9, slope=0.1), **STABLE).advance(400)
    assert run.kinds() == ["switch", "divergence", "lost"]
    assert run.weights[-1].isnan().any()
    assert run.lrs[279] == pytest.approx(run.scheduler.switch.lr / 2)
    assert run.scheduler.phase == "done"


def test_a_divergence_does_not_use_up_all_that_are_borne():
    run = Run(400, spoil=up_the_hill(9, slope=1.0), **STABLE).advance(400)
    steps = [event.step for event in run.scheduler.events[1:]]
    assert min(np.diff(steps)) > 2


@pytest.mark.parametrize("spoilt", [(30,), (600,), (200, 400, 600)])
def test_a_batch_that_makes_nan_of_the_weights_does_not_end_the_search(spoilt):
    clean, run = Run(2000).advance(900), Run(2000, spoil=nan_at(*spoilt))
    for step in spoilt:
        held = run.advance(step + 3).scheduler._rooms.rollback.held
        run.advance(step + 4)
        assert run.kinds()[-1] == "not_finite" or run.kinds()[-2:] == ["not_finite", "loss"]
        assert torch.equal(run.weights[-1], run.weights[held - 1])
        assert run.scheduler.phase == "warmup"
        assert run.lrs[: step + 4] == clean.lrs[: step + 4]  # the LR grows on
    run.advance(900)
    assert [kind for kind in run.kinds() if kind != "loss"] == ["not_finite"] * len(spoilt) + ["switch"]
    assert run.scheduler.switch.lr == pytest.approx(clean.scheduler.switch.lr, rel=0.5)
    assert run.accuracy() > 0.9


def test_a_loss_that_turns_nan_again_at_once_ends_the_warmup_at_the_third():
    run = Run(2000, spoil=nan_at(570, 600)).advance(603)
    assert [(event.kind, event.step) for event in run.scheduler.events if event.kind != "loss"] == [("not_finite", 574)]
    assert [math.isnan(loss) for loss in run.losses[600:]] == [False, True, True]
    assert run.scheduler.phase == "warmup"
    held = run.scheduler._rooms.rollback.held
    run.advance(604)
    switch = run.scheduler.switch
    assert [kind for kind in run.kinds() if kind != "loss"] == ["not_finite", "explosion", "switch"]
    assert {event.step for event in run.scheduler.events[-2:]} == {604}
    assert (switch.step, switch.by_test) == (604, False)
    assert 500 < held <= 600
    assert f"back at step {held}" in run.scheduler.events[-1].message
    assert torch.equal(run.weights[-1], run.weights[held - 1])
    assert run.weights[-1].isfinite().all()
    assert run.optimizer.param_groups[0]["lr"] == switch.lr == pytest.approx(run.lrs[round(switch.minimum)], rel=0.02)
    assert run.advance(900).kinds()[-1] == "switch"
    assert run.accuracy() > 0.9


def test_a_nan_that_comes_where_nothing_goes_back_ends_it_too_and_the_weights_are_said_to_be_lost():
    run = Run(2000, keeps=False, spoil=nan_at(600)).advance(640)
    told = [(event.kind, event.step) for event in run.scheduler.events if event.kind != "loss"]
    assert told == [("explosion", 604), ("lost", 604), ("switch", 604)]
    assert run.weights[-1].isnan().any()


def test_without_a_watch_nothing_of_it_happens():
    run = Run(300, watch=False, spoil=nan_at(100)).advance(140)
    assert {"explosion", "divergence"}.isdisjoint(run.kinds())


def test_the_paper_preset_does_not_watch():
    scheduler = AutoWU.paper(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), 100, 10)
    for loss in [*np.linspace(2, 1, 40), *[math.nan] * 50]:
        scheduler.optimizer.step()
        scheduler.step(float(loss))
    assert not scheduler.config.watch
    assert scheduler.phase == "warmup"
    assert scheduler.events == []


def test_the_copy_is_given_back_once_the_cooldown_has_halved_the_lr():
    run = Run(300)
    held = []
    while run.scheduler.last_epoch < 300:
        run.advance(run.scheduler.last_epoch + 1)
        held.append(run.scheduler._rooms.rollback.held)
    switch, interval = run.scheduler.switch, run.scheduler.config.test_interval
    assert run.kinds() == ["switch"]
    half = next(k for k in range(switch.step, 300) if run.scheduler.lr_at(k) < switch.lr / 2)
    assert held[half - 2] > switch.step
    over = half + max(interval, 10)
    assert held[over:] == [None] * (300 - over)
    assert run.scheduler.state_dict()["snapshot"] is None


# ---------------------------------------------------------------- a GradScaler that skips


def scaled_run(poisoned, **arguments):
    """A run under a GradScaler whose weights are all NaN after `poisoned` steps, up to the end of its warm-up; skipped calls."""
    run = Run(400, patience=1000, immediate_cooldown=True, **arguments)
    inputs, targets = digits()
    scaler = torch.amp.GradScaler("cpu")
    skipped = 0
    while run.scheduler.switch is None:
        before = run.scheduler.last_epoch
        if before == poisoned and not skipped:
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.fill_(math.nan)
        batch = torch.randint(1797, (128,), generator=torch.Generator().manual_seed(before))
        loss = nn.functional.cross_entropy(run.model(inputs[batch]), targets[batch])
        run.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.scheduler.step(loss)
        skipped += run.scheduler.last_epoch == before
    return run, skipped


def test_a_run_that_the_scaler_skips_for_good_is_ended_after_sixty_calls():
    run, skipped = scaled_run(165)
    assert run.scheduler.last_epoch == 165
    assert skipped == 60
    assert run.kinds() == ["explosion", "switch"]
    assert not run.scheduler.switch.by_test
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_the_step_after_the_skipped_ones_runs_at_the_peak():
    run, _ = scaled_run(165)
    assert run.scheduler.switch.step == 165
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(run.scheduler.switch.lr)


# ---------------------------------------------------------------- cut and resumed


def eventful(scheduler):
    """NaN gradients twice in the warm-up, gradients uphill after the switch."""
    return nan_at(70, 90)(scheduler) * up_the_hill(1, slope=0.3)(scheduler)


def run_of_events():
    return Run(300, spoil=eventful, **STABLE)


# Steps before the cut. The loss is NaN from step 71 on, which is borne once, and from 91 on, which ends the warm-up at 94. What
# follows is counted from the divergence.
CUTS = {
    "before the first copy": lambda run: 7,
    "at a copy": lambda run: 40,
    "a step after a copy": lambda run: 41,
    "after two NaN that are borne": lambda run: 73,
    "where the warm-up goes on": lambda run: 74,
    "where the gradients are NaN": lambda run: 90,
    "where the loss turns NaN": lambda run: 91,
    "after two NaN": lambda run: 93,
    "at the switch": lambda run: 94,
    "a step after it": lambda run: 95,
    "at the foot of the hill": lambda run: 119,
    "a step before the divergence": lambda run: run.scheduler.events[-1].step - 1,
    "at the divergence": lambda run: run.scheduler.events[-1].step,
    "a step after the divergence": lambda run: run.scheduler.events[-1].step + 1,
    "in the stable phase": lambda run: 180,
    "after the watch": lambda run: 290,
}


@functools.cache
def uncut():
    """The run, and what it saved on the way at every cut."""
    whole, run, saved = run_of_events().advance(300), run_of_events(), {}
    for name, cut in CUTS.items():
        saved[name] = run.advance(cut(whole)).saved()
    run.advance(300)
    assert run.lrs == whole.lrs  # saving changes nothing
    assert torch.equal(run.weights[-1], whole.weights[-1])
    return whole, saved


def test_the_run_that_is_cut_has_a_history():
    run, _ = uncut()
    told = [(event.kind, event.step) for event in run.scheduler.events if event.kind != "loss"]
    assert told[:3] == [("not_finite", 74), ("explosion", 94), ("switch", 94)]
    assert [kind for kind, _ in told[3:]] == ["divergence"]
    assert 119 < told[3][1] < 150


QUICK_CUTS = (
    *("at a copy", "after two NaN that are borne", "where the warm-up goes on", "after two NaN", "at the switch"),
    *("a step before the divergence", "at the divergence", "after the watch"),
)


@pytest.mark.parametrize("cut", [pytest.param(cut, marks=[] if cut in QUICK_CUTS else [pytest.mark.slow]) for cut in CUTS])
def test_a_run_that_is_cut_goes_on_as_the_uncut_one(cut):
    whole, saved = uncut()
    step = CUTS[cut](whole)
    # Of its own arguments only the model matters, and that it may be watched is in the state.
    again = Run(50, spoil=eventful, seed=9, watch=False, max_lr=3.0, test_interval=7).load(saved[cut])
    again.advance(300)
    assert again.lrs == whole.lrs[step:]
    assert len(again.weights) == len(whole.weights) - step
    torch.testing.assert_close(again.weights, whole.weights[step:], rtol=0, atol=0, equal_nan=True)
    assert [event for event in again.scheduler.events if event.kind != "resume"] == whole.scheduler.events
    assert again.scheduler._rooms.rollback.held is None


def test_a_state_without_its_copy_goes_on_without():
    whole, saved = uncut()
    state = torch.load(io.BytesIO(saved["after two NaN"]), weights_only=True)
    state["scheduler"]["snapshot"] = None
    file = io.BytesIO()
    torch.save(state, file)
    again = Run(300, spoil=eventful, **STABLE).load(file.getvalue()).advance(94)
    assert again.scheduler.switch == whole.scheduler.switch
    assert "back at step" not in again.scheduler.events[-1].message
    assert again.weights[-1].isnan().any()


def test_a_run_is_at_its_best_until_it_has_come_down_and_gone_up():
    noise = 0.05 * np.random.default_rng(0).normal(size=180)
    rises = np.concatenate([np.full(20, 2.0), np.full(40, 3.0), np.linspace(3, 1, 60), np.full(20, 1.5), np.linspace(1.5, 0.9, 40)])
    watch, said = LossWatch(), []
    for loss in rises + noise:
        watch.push(float(loss))
        said.append(watch.at_best)
    assert all(said[:120])  # what it has at first is no progress to lose
    assert not any(said[125:150])
    assert all(said[160:])


def test_what_leaps_up_is_no_noise_that_a_run_is_as_good_as_ever_by():
    noise = np.random.default_rng(0).normal(size=400) * np.where(np.arange(400) < 20, 30, 1)  # less of it where the loss is low
    falls = np.concatenate([np.full(20, 200.0), np.geomspace(200, 7, 80), np.full(20, 7.0)])
    leaps = np.concatenate([np.tile([7, 45], 10), [200, 30, 90, 800, 100, 400, 2800, 200, 100], np.full(60, 30.0)])
    watch, said, noisiest = LossWatch(), [], 0.0
    for loss in np.concatenate([falls, leaps, np.full(60, 7.0)]) + noise[: len(falls) + len(leaps) + 60]:
        watch.push(float(loss))
        said.append(watch.at_best)
        noisiest = max(noisiest, watch.noise)
    assert all(said[: len(falls)])
    assert noisiest > 100 * watch.calm  # what leapt is in it
    assert not any(said[len(falls) + 20 : len(falls) + len(leaps)])
    assert said[-1]


def test_a_state_that_does_not_know_the_noise_at_the_best_takes_that_of_now():
    watch = LossWatch()
    watch.follow([2.0, 2.1] * 10)
    state = watch.state_dict()
    del state["calm"]
    again = LossWatch()
    again.load_state_dict(state)
    assert again.calm == watch.noise > 0

"""Held-out losses: which weights were best, when a run is past them, and what is done about it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autowu import AutoWU
from autowu.events import back_at
from autowu.held_out import MAX_LOWERINGS, HeldOut
from autowu.ranks import Ranks
from autowu.report import Report


def followed(losses, start=None):
    """The losses after which a run of these held-out ones would be lowered, if it never was."""
    held_out, past = HeldOut(Ranks()), []
    for number, loss in enumerate([losses[0] if start is None else start, *losses]):
        held_out.observe(float(loss))
        loss = held_out.read()
        held_out.begin_at(loss)
        if number and not held_out.follow(loss) and held_out.is_past_best:
            past.append(number - 1)
    return past


def noise(number, seed=0):
    return np.random.default_rng(seed).normal(size=number)


def test_losses_that_fall_or_rest_in_noise_are_never_past_their_best():
    for seed in range(200):
        assert not followed(1 + np.exp(-np.arange(60) / 10) + 0.03 * noise(60, seed), start=3.0)
        assert not followed(1 + 0.01 * noise(60, seed), start=3.0)


def test_a_rise_by_a_tenth_of_the_progress_is_past_the_best():
    valley = np.concatenate([np.linspace(2, 1, 20), np.linspace(1, 1.5, 20)[1:]])
    first = followed(valley, start=3.0)[0]
    assert valley[first - 1] - 1 >= 0.2 > valley[first - 3] - 1  # the mean of three is that of the middle one


def test_neither_a_factor_nor_a_constant_matters():
    valley = np.concatenate([np.linspace(2, 1, 20), np.linspace(1, 1.5, 20)[1:]]) + 0.02 * noise(39)
    expected = followed(valley, start=3.0)
    assert expected
    assert followed(1000 * valley, start=3000.0) == followed(0.001 * valley - 7, start=0.003 - 7) == expected


def test_a_run_that_never_improved_is_past_its_best_where_the_rise_is_no_noise():
    assert not followed(2 + 0.1 * noise(30), start=2.0)
    assert followed(2 + np.linspace(0, 1, 30) + 0.01 * noise(30), start=2.0)


def test_losses_that_are_not_finite_are_read_as_none():
    held_out = HeldOut(Ranks())
    for bad in (math.nan, math.inf, torch.tensor(math.nan)):
        held_out.observe(bad)
        assert math.isnan(held_out.read())
    assert math.isnan(held_out.start)
    held_out.observe(torch.tensor(2.0))
    held_out.observe(4.0)  # of two batches
    assert held_out.came
    assert held_out.read() == 3.0
    assert math.isnan(held_out.start)  # as of one whose weights are not to stay
    held_out.follow(3.0)
    held_out.begin_at(7.0)
    assert held_out.start == 3.0
    assert not held_out.came


class Overfitting:
    """A perceptron that is trained, and is told of a held-out loss that falls for half of the run, and rises; always the same."""

    def __init__(self, steps=300, observing=True, **options):
        torch.manual_seed(0)
        self.x = torch.randn(40, 10)
        self.y = self.x @ torch.randn(10)
        self.model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        options = {"model": self.model} | options
        self.scheduler = AutoWU(self.optimizer, total_steps=steps, **options)
        self.observing, self.steps, self.lrs, self.weights = observing, steps, [], []

    def train(self, until=None):
        for step in range(self.scheduler.last_epoch, until or self.steps):
            torch.manual_seed(step)
            rows = torch.randperm(40)[:20]
            loss = F.mse_loss(self.model(self.x[rows])[:, 0], self.y[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.observing and step % 4 == 0:
                self.scheduler.observe_validation(torch.tensor(1 + abs(step - 148) / 100))
            self.scheduler.step(loss)
            self.lrs.append(self.scheduler.get_last_lr()[0])
            self.weights.append(self.model[0].weight.detach().clone())
        return self

    def kinds(self):
        return [event.kind for event in self.scheduler.events]


@pytest.fixture(scope="module")
def observed():
    return Overfitting().train()


@pytest.fixture(scope="module")
def plain():
    return Overfitting(observing=False).train()


def test_a_run_that_overfits_goes_back_to_its_best_weights_and_on_at_a_lower_lr(observed, plain):
    events = [event for event in observed.scheduler.events if event.kind == "overfitting"]
    assert len(events) == MAX_LOWERINGS  # since it goes on to rise, whatever is done
    for times, event in enumerate(events, 1):
        assert observed.lrs[event.step - 1] == pytest.approx(plain.lrs[event.step - 1] / 2**times)
        assert 149 <= (best := back_at(event)) <= 157
        assert torch.equal(observed.weights[event.step - 1], observed.weights[best - 1])
    assert 170 <= (first := events[0].step) <= 190
    assert observed.lrs[: first - 1] == plain.lrs[: first - 1]
    assert all(map(torch.equal, observed.weights[: first - 1], plain.weights[: first - 1]))


def test_the_run_resumes_bit_for_bit_wherever_it_was_cut(observed):
    first = next(event.step for event in observed.scheduler.events if event.kind == "overfitting")
    before = Overfitting()
    for cut in (first - 30, first - 1, first + 2):
        before.train(cut)
        after = Overfitting()
        state = copy.deepcopy([before.model.state_dict(), before.optimizer.state_dict(), before.scheduler.state_dict()])
        after.model.load_state_dict(state[0])
        after.optimizer.load_state_dict(state[1])
        after.scheduler.load_state_dict(state[2])
        after.train()
        assert before.lrs + after.lrs == observed.lrs
        assert all(map(torch.equal, after.model.parameters(), observed.model.parameters()))
        assert after.kinds() == observed.kinds()


def test_a_report_knows_each_time_that_the_run_went_back_to_its_best_weights(observed):
    went_back = [(event.step, back_at(event)) for event in observed.scheduler.events if event.kind == "overfitting"]
    assert went_back
    report = Report.of(observed.scheduler.state_dict())
    assert set(went_back) <= set(report.returns)
    assert len(report.returns) == len(went_back) + sum(event.kind == "switch" for event in observed.scheduler.events)


def test_an_observed_loss_that_was_not_read_yet_is_saved():
    before, after = Overfitting().train(20), Overfitting()
    before.scheduler.observe_validation(5.0)
    after.scheduler.load_state_dict(before.scheduler.state_dict())
    assert after.scheduler.state_dict()["held_out"] == before.scheduler.state_dict()["held_out"]
    assert after.scheduler.state_dict()["held_out"]["observed"] == {"sum": 5.0, "count": 1}


def test_a_state_of_a_run_that_observed_nothing_holds_none_and_one_from_before_loads():
    run = Overfitting(observing=False).train(20)
    state = run.scheduler.state_dict()
    assert state.pop("held_out") is None
    observed = Overfitting().train(20)
    observed.scheduler.load_state_dict(state)
    assert observed.scheduler.state_dict()["held_out"] is None


@pytest.mark.parametrize(
    "options", [{"rollback": False}, pytest.param({"watch": False}, marks=pytest.mark.slow), {"model": None}], ids=str
)
def test_with_less_to_go_by_the_lr_is_lowered_all_the_same(options):
    run = Overfitting(**options).train()
    assert "overfitting" in run.kinds()
    back = ["back at step" in event.message for event in run.scheduler.events if event.kind == "overfitting"]
    assert all(back) if options.get("rollback", True) else not any(back)


def test_losses_that_are_not_finite_are_told_once_and_change_nothing(plain):
    bad = Overfitting(observing=False)
    for step in range(0, 200, 10):
        bad.train(step + 10)
        bad.scheduler.observe_validation(math.nan)
    assert bad.lrs == plain.lrs[:200]
    assert bad.kinds().count("held_out") == 1


@pytest.mark.parametrize("loss", [1, "1", None, torch.ones(2)], ids=str)
def test_what_is_no_loss_is_refused(loss):
    with pytest.raises((TypeError, ValueError), match="loss"):
        Overfitting().scheduler.observe_validation(loss)


@pytest.mark.parametrize("until", [20, 200])
def test_what_is_observed_is_read_in_the_next_step_whatever_its_loss(until):
    run = Overfitting(observing=False).train(until)
    for step in range(until, until + 12):
        run.scheduler.observe_validation(1.0)
        run.train(step + 1)
        assert not run.scheduler._rooms.held_out.came
